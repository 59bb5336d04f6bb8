"""Settings of every test: no deadlines (nothing here depends on timing), the same examples in every run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("bigclass", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("bigclass")

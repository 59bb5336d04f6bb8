"""Settings of every test: no deadlines (nothing here depends on timing), the same examples in every run."""

from __future__ import annotations

import os

import torch

# Triton kernels run in its interpreter, on CPU tensors, unless there is a GPU to run them on. To be set before Triton is first used.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

settings.register_profile("bigclass", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("bigclass")

# Tests run side by side on few cores: threads that spin for one another cost ten times what they save at these sizes.
torch.set_num_threads(1)

"""Settings of every test: no deadlines (nothing here depends on timing), the same examples in every run."""

from __future__ import annotations

import os

# Tests run side by side on few cores: threads that spin for one another cost ten times what they save at these sizes. Set before torch is
# imported, and inherited by all that tests start (examples, ranks, compilers); nor does torch.compile start processes of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

# Triton kernels run in its interpreter, on CPU tensors, unless there is a GPU to run them on. To be set before Triton is first used.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("bigclass", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("bigclass")

torch.set_num_threads(1)  # also where the environment says otherwise


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of every architecture out unless they are asked for."""
    if "architectures" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("architectures")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("architectures")]
        config.hook.pytest_deselected(items=left_out)

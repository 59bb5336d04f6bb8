"""A selection of losses under compute-sanitizer, where it is installed: no access out of bounds, no race in shared memory.

`python -m tests.gpu.test_sanitizer` runs that selection once, as the tests do in a process of their own: small, without torch's caching
allocator, so that a neighbour in the same block of memory does not hide a stray access.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CUDA_TOOL = Path("/usr/local/cuda/bin/compute-sanitizer")
LIMIT = 300  # seconds
FOUND = 9  # exit code

SELECTION = (
    "cross-entropy", "cross-entropy, capped, smoothed, z-loss, scaled", "cross-entropy, adapters", "cross-entropy, mixup",
    "log-probability, entropy", "bce", "contrastive", "arcface",
)  # fmt: skip


def tool() -> str | None:
    """compute-sanitizer, on the path or where CUDA usually is."""
    return shutil.which("compute-sanitizer") or (str(CUDA_TOOL) if CUDA_TOOL.exists() else None)


def select() -> None:
    """Both plans of the selection in bf16, then the filter, on the fused engine."""
    import torch

    from tests.gpu import test_filter
    from tests.gpu.cases import CASES, outcome

    for name in SELECTION:
        for plan in CASES[name].plans:
            leaves, run = CASES[name].make(torch.bfloat16)
            assert all(t.isfinite().all() for t in outcome(leaves, run, "fused", plan))
            print(name, plan, flush=True)
    problem = test_filter.popular(test_filter.N, test_filter.C, test_filter.D, torch.bfloat16)
    for plan in test_filter.PLANS:
        assert test_filter.filtered(*problem, plan, 2.0**-6)[1].isfinite().all()
        print("filter", plan, flush=True)


@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_no_access_out_of_bounds_and_no_race(check):
    found = tool()
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "BIGCLASS_GPU_TESTS": "small", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(root)}
    script = [sys.executable, "-m", "tests.gpu.test_sanitizer"]
    subprocess.run(script, cwd=root, env=environment, check=True, timeout=LIMIT)  # compiles: none of that is to be watched
    command = [found, "--tool", check, "--error-exitcode", str(FOUND), "--print-limit", "20", "--target-processes", "application-only"]
    done = subprocess.run([*command, *script], cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT)
    output = done.stdout + done.stderr
    if "not supported" in output and "ERROR SUMMARY: 0" not in output:
        pytest.skip(f"{check}: {next(line for line in output.splitlines() if 'not supported' in line)}")
    assert done.returncode == 0, output[-4000:]


if __name__ == "__main__":
    select()

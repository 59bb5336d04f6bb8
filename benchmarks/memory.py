"""Peak memory of one candidate above its inputs and what it returns, measured in a process of its own.

    extra = peak during the call - in use before it - bytes of the returned tensors

On CUDA the allocator counts. On a CPU the resident set counts, so everything else that could move it is kept still: a small
problem first (thread pools, the GEMM library's lazy set-up, imports), and an allocator that returns every large block at once
instead of handing it to the next request, which would hide that request. On Linux the high-water mark is then reset to
what is in use; elsewhere memory is held until what is in use has reached the mark.

Run as `python -m benchmarks.memory REQUEST` it is the child: JSON in, JSON out.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from .candidates import Call, Pass, candidates_for
from .data import make_problem
from .machine import MIB, process_memory
from .shapes import Shape

# Large enough for every engine to take the way it takes on a real problem.
WARM_UP = {"rows": 512, "classes": 8192, "features": 64}

# glibc raises its threshold for private mappings to the largest block freed so far, unless it is set: then it stays.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}

TIMEOUT_SECONDS = 900


class ChildFailed(RuntimeError):
    """The child failed; the message is its last line."""


def measure_memory(
    name: str, settings: Mapping[Pass, int | None], shape: Shape, kind: str, dtype: torch.dtype, device: torch.device
) -> dict[Pass, int]:
    """Extra bytes of candidate `name` for each pass in `settings`.

    Raises:
        ChildFailed: if the child process fails.
    """
    request = {
        "name": name,
        "settings": dict(settings),
        "shape": dataclasses.asdict(shape),
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    try:
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", json.dumps(request)],
            cwd=Path(__file__).parents[1],
            env=os.environ | ALLOCATOR,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"no answer after {TIMEOUT_SECONDS} s") from None
    if child.returncode != 0:
        raise ChildFailed((child.stderr.strip() or f"exit code {child.returncode}").splitlines()[-1])
    return json.loads(child.stdout.splitlines()[-1])


def extra_bytes(call: Call, device: torch.device) -> int:
    """Peak bytes during `call` above what is in use before it and what it returns."""
    gc.collect()
    before, peak = (_cuda_start, _cuda_peak) if device.type == "cuda" else (_resident_start, _resident_peak)
    in_use, held = before(device)
    outputs = call()
    most = peak(device)
    del held
    return max(0, most - in_use - sum(output.nbytes for output in outputs))


def _cuda_start(device: torch.device) -> tuple[int, None]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), None


def _cuda_peak(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _resident_start(_: torch.device) -> tuple[int, object]:
    """Bytes in use, with the high-water mark brought down to them, and whatever must be held meanwhile."""
    if sys.platform == "linux":
        c_library = ctypes.CDLL(None)
        if hasattr(c_library, "malloc_trim"):  # glibc only
            c_library.malloc_trim(0)
        with contextlib.suppress(OSError):  # some containers forbid it
            Path("/proc/self/clear_refs").write_text("5")
        in_use, mark = process_memory("VmRSS"), process_memory("VmHWM")
        if in_use is not None and mark is not None and mark - in_use < MIB:
            return in_use, None
    return _raise_to_peak()


def _resident_peak(_: torch.device) -> int:
    peak = process_memory("VmHWM") if sys.platform == "linux" else None
    return peak if peak is not None else _max_resident()


def _raise_to_peak() -> tuple[int, list[bytearray]]:
    """Where the mark cannot be lowered, take memory (and touch it) until it moves: what is in use is then the mark."""
    mark, held = _max_resident(), []
    while _max_resident() == mark:
        held.append(bytearray(b"\1") * MIB)
    return _max_resident(), held


def _max_resident() -> int:
    """The largest resident set this process ever had; macOS counts bytes, others KiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(request: Mapping[str, Any]) -> dict[Pass, int]:
    """The child: measure what `request` names."""
    torch.set_num_threads(request["threads"])
    device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
    shape = Shape(**request["shape"])
    (candidate,) = (c for c in candidates_for(shape, dtype) if c.name == request["name"])
    settings = cast("dict[Pass, int | None]", request["settings"])

    small = make_problem(dataclasses.replace(shape, **WARM_UP), request["kind"], dtype, device)
    problem = make_problem(shape, request["kind"], dtype, device)
    extra: dict[Pass, int] = {}
    for which, setting in settings.items():
        candidate.prepare(small, which, setting)()
        call = candidate.prepare(problem, which, setting)
        if device.type == "cuda":
            call()  # kernels that tune themselves on first sight of a shape allocate for it; the allocator's count is not disturbed
        extra[which] = extra_bytes(call, device)
    return extra


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

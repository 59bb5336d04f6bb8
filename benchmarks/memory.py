"""Peak memory of one candidate above its inputs and what it returns (`bigclass.demo.memory` says how it is measured)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from bigclass.demo.memory import peak_extra_bytes

from .candidate import Call, Pass
from .candidates import candidates_for
from .data import TRAINED, make_problem
from .shapes import Shape

# Large enough for every engine to take the way it takes on a real problem, too small for it to keep a work buffer for the next call.
WARM_UP = {"rows": 96, "classes": 8192, "features": 64}
WARM_UP_PAIRS = {"rows": 1024, "classes": 1024, "features": 64}


def measure_memory(
    name: str, settings: Mapping[Pass, int | None], shape: Shape, kind: str, dtype: torch.dtype, device: torch.device
) -> dict[Pass, int | None]:
    """Extra bytes of candidate `name` for each pass in `settings`; None where this system does not tell."""
    return {
        which: peak_extra_bytes(prepare, name, which, setting, shape, kind, dtype, device, device=device)
        for which, setting in settings.items()
    }


def prepare(name: str, which: Pass, setting: int | None, shape: Shape, kind: str, dtype: torch.dtype, device: torch.device) -> Call:
    """The call to be measured, warmed up: thread pools, the GEMM library's lazy set-up and imports are no part of it."""
    (candidate,) = (c for c in candidates_for(shape, dtype) if c.name == name)
    small_shape = dataclasses.replace(shape, **(WARM_UP_PAIRS if shape.contrastive else WARM_UP))
    small = make_problem(small_shape, "flat" if kind == TRAINED else kind, dtype, device)
    candidate.prepare(small, which, setting)()
    call = candidate.prepare(make_problem(shape, kind, dtype, device), which, setting)
    if device.type == "cuda":
        call()  # kernels that tune themselves on first sight of a shape allocate for it; the allocator's count is not disturbed
    return call

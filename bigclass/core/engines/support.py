"""Whether the fused engine can take a problem: the one predicate behind `engine="auto"`, the error of `engine="fused"` and `explain`.

Nothing here imports Triton.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache

import torch

from bigclass.core.folds import Fold, SumFold
from bigclass.core.stream import Stream

OLDEST = (8, 0)  # compute capability: Ampere, the first with asynchronous copies and bf16


@lru_cache(maxsize=1)
def triton_is_there() -> bool:
    """Is Triton importable? Asked by module name: its distributions have several."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Do Triton kernels run in its interpreter, on CPU tensors?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_reason(device: torch.device) -> str | None:
    """Why this device runs no fused kernels, or None if it does. A CUDA device that is not here is taken for a new one."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"Triton has no kernels for device {device.type!r}"
    if not triton_is_there():
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip is not None:
        return "its tiles are made for NVIDIA GPUs"
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"GPU compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    return None


def fused_reason(stream: Stream, folds: Sequence[Fold]) -> str | None:
    """Why the fused engine cannot take this, or None if it can."""
    if stream.device.type == "cpu" and not interpreting():
        return device_reason(stream.device)  # the usual case first: it is asked at every call
    reasons = (device_reason(stream.device), _stream_reason(stream), *[_fold_reason(f) for f in folds])
    return next((reason for reason in reasons if reason is not None), None)


def _stream_reason(stream: Stream) -> str | None:
    if not 1 <= len(stream.pairs) <= 2:
        return f"it takes one or two operand pairs, not {len(stream.pairs)}"
    dtypes = {stream.compute_dtype or torch.promote_types(x.dtype, w.dtype) for x, w in stream.pairs}
    if stream.accumulate_dtype == torch.float64:
        return "it has no float64 products"
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return f"it multiplies float32, bfloat16 or float16, one type for all pairs, not {', '.join(sorted(map(str, dtypes)))}"
    if stream.given is not None and (stream.given.requires_grad or stream.scale_tensor is not None):
        return "a given N x C tensor gets no gradient there and takes no learnable scale"
    for m in stream.maps:
        if m.forward_triton is None or m.backward_triton is None:
            return f"map {m.name!r} has no Triton form"
        if any(t.requires_grad for t in m.tensors):
            return f"map {m.name!r} has a parameter that needs a gradient"
    return None


def _fold_reason(f: Fold) -> str | None:
    forms = (f.term_triton, f.slope_triton) if isinstance(f, SumFold) else (f.lift_triton, f.merge_triton)
    if any(form is None for form in forms):
        return f"fold {f.name!r} has no Triton form"
    if not isinstance(f, SumFold) and any(f.differentiable) and f.gradient_triton is None:
        return f"fold {f.name!r} has no Triton form of its gradient"
    if any(t.requires_grad for t in f.tensors):
        return f"fold {f.name!r} has a tensor that needs a gradient"
    return None

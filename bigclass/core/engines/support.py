"""Whether the fused engine can take a problem: the one predicate behind `engine="auto"`, the error of `engine="fused"` and `explain`.

Nothing here imports Triton.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from bigclass.core.folds import Fold, SumFold
from bigclass.core.stream import Map, Stream

WIDEST = 1 << 24  # elements from row to row of an N x C tensor that a kernel reads: it counts those of up to 128 rows in 32 bits
NARROWEST = 32  # classes of its narrowest tile (launch.py): all widths are multiples of it
OLDEST = (8, 0)  # compute capability: Ampere, the first with asynchronous copies and bf16


# Is Triton importable? Asked by module name, for its distributions have several; and once, here, where no graph is being traced.
TRITON_IS_THERE = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Do Triton kernels run in its interpreter, on CPU tensors?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_reason(device: torch.device) -> str | None:
    """Why this device runs no fused kernels, or None if it does. A CUDA device that is not here is taken for a new one."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"Triton has no kernels for device {device.type!r}"
    if not TRITON_IS_THERE:
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip is not None:
        return "its tiles are made for NVIDIA GPUs"
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"GPU compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    return None


def fused_reason(stream: Stream, folds: Sequence[Fold]) -> str | None:
    """Why the fused engine cannot take this, or None if it can.

    It is asked again inside the custom op, where grad mode is off: what needs no gradient there was refused before, if it needed one."""
    if stream.device.type == "cpu" and not interpreting():
        return device_reason(stream.device)  # the usual case first: it is asked at every call
    reasons = (
        device_reason(stream.device),
        _stream_reason(stream, folds),
        form_reason(stream.maps, folds),
        _gradient_reason(stream, folds),
    )
    return next((reason for reason in reasons if reason is not None), None)


def filter_reason(stream: Stream, needs: Sequence[bool]) -> str | None:
    """Why the fused engine's gradient is exact though the stream has a filter, or None if it acts.

    needs: which of the stream's tensors (in their order) want a gradient."""
    of_pairs = 2 * len(stream.pairs)
    flag = iter(needs[of_pairs:])
    optional = (stream.bias, stream.class_scale, stream.given, stream.scale_tensor)
    _, _, given, scale = [t is not None and next(flag) for t in optional]
    if not any(needs[:of_pairs]):
        return "no product of the gradient is wanted"
    if stream.class_scale is not None:
        return "a class scale stands between the gradient of a logit and its two products"
    if given:
        return "a given N x C tensor gets a gradient"
    if scale:
        return "the gradient of a learnable scale is read off the products"
    return None


def form_reason(maps: Sequence[Map], folds: Sequence[Fold]) -> str | None:
    """Which map or fold lacks a Triton form, or None."""
    for m in maps:
        if m.forward_triton is None or m.backward_triton is None:
            return f"map {m.name!r} has no Triton form"
    for f in folds:
        forms = (f.term_triton, f.slope_triton) if isinstance(f, SumFold) else (f.lift_triton, f.merge_triton)
        if any(form is None for form in forms):
            return f"fold {f.name!r} has no Triton form"
        if not isinstance(f, SumFold) and any(f.differentiable) and f.gradient_triton is None:
            return f"fold {f.name!r} has no Triton form of its gradient"
        if NARROWEST % f.group:
            return f"fold {f.name!r} folds groups of {f.group} classes, which do not divide its tiles (powers of two up to {NARROWEST} do)"
    return None


def saves(stream: Stream, folds: Sequence[Fold]) -> bool:
    """`can_save`, of this stream. Under a map no scale may learn, for its gradient weighs saturated logits, whose slopes have no digits."""
    return can_save(stream.maps, folds) and (len(stream.maps) == 0 or stream.scale_tensor is None)


def can_save(maps: Sequence[Map], folds: Sequence[Fold]) -> bool:
    """Can the fused engine make gradients of these folds from logits that it saved in 16 bits (fused/saved.py)? One makes exponentials."""
    rest = [f for f in folds if not f.can_save()]
    if len(folds) - len(rest) != 1 or any(f.axis != "rows" for f in folds):
        return False
    if not all(isinstance(f, SumFold) and f.constant_slope and "grid" not in f.tensor_axes[: len(f.tensors)] for f in rest):
        return False
    return len(maps) == 0 or (len(maps) == 1 and len(rest) == 0 and maps[0].told_by_output())


def grids(stream: Stream, folds: Sequence[Fold]) -> list[Tensor]:
    """Every N x C tensor that is read."""
    of_folds = [t for f in folds for t, axis in zip(f.tensors, f.tensor_axes, strict=False) if axis == "grid"]
    return of_folds if stream.given is None else [stream.given, *of_folds]


def _stream_reason(stream: Stream, folds: Sequence[Fold]) -> str | None:
    if not 1 <= len(stream.pairs) <= 2:
        return f"it takes one or two operand pairs, not {len(stream.pairs)}"
    dtypes = {stream.compute_dtype or torch.promote_types(x.dtype, w.dtype) for x, w in stream.pairs}
    if stream.accumulate_dtype == torch.float64:
        return "it has no float64 products"
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return f"it multiplies float32, bfloat16 or float16, one type for all pairs, not {', '.join(sorted(map(str, dtypes)))}"
    if any(max(t.stride(0), t.shape[1]) >= WIDEST for t in grids(stream, folds)):
        return f"it reads N x C tensors whose rows are less than {WIDEST} elements apart"
    return None


def _gradient_reason(stream: Stream, folds: Sequence[Fold]) -> str | None:
    if not torch.is_grad_enabled():
        return None
    if stream.given is not None and stream.given.requires_grad:
        return "a given N x C tensor gets no gradient there"
    if stream.given is not None and stream.scale_tensor is not None and stream.scale_tensor.requires_grad:
        return "a learnable scale over a given N x C tensor gets no gradient there"
    for m in stream.maps:
        if any(t.requires_grad for t in m.tensors):
            return f"map {m.name!r} has a parameter that needs a gradient"
    for f in folds:
        if any(t.requires_grad for t in f.tensors):
            return f"fold {f.name!r} has a tensor that needs a gradient"
    return None

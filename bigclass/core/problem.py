"""A problem as the engines and the planner see it: checked, described, assigned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from bigclass.core.engines.support import form_reason, fused_reason, grids, saves
from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import Fold, State, SumFold
from bigclass.core.plan import Plan, Settings, Work, choose_engine, make_plan, tile_buffers
from bigclass.core.row_losses import AFFINE
from bigclass.core.stream import Map, Stream


def check(stream: Stream, picks: Tensor | None, folds: Sequence[Fold], keep: Tensor | None) -> None:
    """Raise for shapes, dtypes and options that do not fit together."""
    stream.check()
    n, c = stream.shape
    if picks is not None and (picks.dim() != 2 or picks.shape[0] != n):
        raise ArgumentError(f"picks: expected shape ({n}, K), got {tuple(picks.shape)}")
    if picks is not None and picks.dtype not in (torch.int64, torch.int32):
        raise ArgumentTypeError(f"picks: expected int64 or int32, got {picks.dtype}")
    if keep is not None and (tuple(keep.shape) != (n,) or keep.dtype != torch.bool):
        raise ArgumentError(f"keep: expected a bool tensor of shape ({n},), got {keep.dtype} {tuple(keep.shape)}")
    for f in folds:
        if f.axis not in ("rows", "columns"):
            raise ArgumentError(f"fold {f.name!r}: expected axis 'rows' or 'columns', got {f.axis!r}")
        if f.group > 1 and (c % f.group or f.axis == "columns"):
            raise ArgumentError(
                f"fold {f.name!r}: expected whole groups of {f.group} classes along each row, got axis {f.axis!r} and {c} classes"
            )
        if keep is not None and f.axis == "columns":
            raise ArgumentError("keep: rows cannot be left out of a column fold; drop them from the operands instead")
        for t, axis in zip(f.tensors, f.tensor_axes, strict=False):
            along_rows = (axis == "kept") == (f.axis == "rows")
            shape = (n, c) if axis == "grid" else ((n,) if along_rows else (c,))
            if axis == "grid" and stream.grad_filter:
                raise ArgumentError(
                    "grad_filter: the entries of a row's targets are set apart, for beside them all others would pass for negligible; "
                    "those of a dense target (N, C) are not known. Give indices, sparse positives or a SparseTarget, or leave it None"
                )
            if tuple(t.shape) != shape:
                raise ArgumentError(f"fold {f.name!r}: expected a {axis} tensor of shape {shape}, got {tuple(t.shape)}")
            if axis == "folded" and t.requires_grad and torch.is_grad_enabled():
                raise ArgumentError(f"fold {f.name!r}: a vector along the folded axis is a constant and gets no gradient; detach it")


def assert_picks(picks: Tensor | None, c: int) -> None:
    """Raise for a pick outside [-1, C); on CUDA an assertion on the device."""
    if picks is None or picks.numel() == 0:
        return
    if picks.device.type == "cpu":
        low, high = (int(v) for v in picks.aminmax())
        if low < -1 or high >= c:
            # of a target -1 is a class that is not there, of a pick none: it comes as C (losses/inputs.py)
            got = f"{c} or a negative one" if high == c else high if high > c else low
            raise IndexError(f"target (or index): expected class indices in [0, {c}), got {got}")
    else:
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            ((picks >= -1) & (picks < c)).all(), f"bigclass: a class index is outside [0, {c})"
        )


def squeezed(state: State) -> State:
    """The state with its parts (N, 1) as vectors."""
    return tuple([t.squeeze(-1) if t.shape[-1] == 1 else t for t in state])


def states_of(outputs: Sequence[Tensor], folds: Sequence[Fold]) -> list[State]:
    """The states that a custom op returned in a row; parts without a gradient detached."""
    out = iter(outputs)
    return [squeezed(tuple([t if d else t.detach() for d, t in zip(f.differentiable, out, strict=False)])) for f in folds]


def upstream_of(
    folds: Sequence[Fold], states: Sequence[Tensor], grads: Sequence[Tensor], has_grad: Sequence[bool], picked: bool
) -> tuple[list[State], list[list[Tensor | None]], Tensor | None]:
    """What a backward was handed in a row, by fold: their states, the gradients of their parts (None: none); that of the picks."""
    state, given = iter(states), iter(grads)
    above = iter([next(given) if there else None for there in has_grad])
    folded = [tuple([next(state) for _ in f.differentiable]) for f in folds]
    parts = [[next(above) for _ in f.differentiable] for f in folds]
    return folded, parts, next(above) if picked else None


def beside(keep: Tensor, t: Tensor) -> Tensor:
    """keep (N,), broadcastable to t (N,) or (N, k)."""
    return keep if t.dim() == 1 else keep.unsqueeze(-1)


def summed(loss: Tensor, keep: Tensor | None, stream: Stream) -> Tensor:
    """The sum of the losses (N,) of the rows that count."""
    return (loss if keep is None else torch.where(keep, loss, 0.0)).sum().to(stream.accumulate_dtype)


def is_affine(row_loss: str, picks: Tensor | None, folds: Sequence[Fold], args: Sequence[Tensor]) -> bool:
    """Are the gradients of a tile known before any state is?

    Its sums must leave the picks out, for these are then read apart, and rounded otherwise. Gradients of args are states."""
    sums = all(isinstance(f, SumFold) and (picks is None or f.exclude_picks) for f in folds)
    return row_loss in AFFINE and sums and len(folds) > 0 and not any(a.requires_grad for a in args)


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64 where there is one: of what is counted, divided by and drawn once a row."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_half(stream: Stream) -> bool:
    """Is any operand of the products of a 16-bit type?"""
    return any(t.dtype.itemsize == 2 for pair in stream.pairs for t in pair)


def work_of(stream: Stream, folds: Sequence[Fold], keep: Tensor | None, *, scalar: bool, grad: bool = True) -> Work:
    """What the planner is told. scalar: is the loss one sum over rows? grad: are gradients wanted?"""
    n, c = stream.shape
    lone = len(folds) == 1 and folds[0].overwrites and len(stream.maps) == 0
    products = [stream.compute_dtype or torch.promote_types(x.dtype, w.dtype) for x, w in stream.pairs]
    return Work(
        n=n,
        c=c,
        d=stream.features,
        device=stream.device.type,
        scalar=scalar,
        grad=grad,
        half=is_half(stream),
        wide=stream.accumulate_dtype == torch.float64,
        buffers=tile_buffers(lone, scalar, len(stream.maps)),
        not_fused=fused_reason(stream, folds),
        narrow=all(dtype.itemsize == 2 for dtype in products),
        masked=keep is not None,
        cast=any(t.dtype != dtype for pair, dtype in zip(stream.pairs, products, strict=True) for t in pair),
        laid_out=sum(t.numel() * t.element_size() for t in grids(stream, folds) if t.stride(1) != 1),
        group=math.lcm(*[f.group for f in folds]),
        filtered=stream.grad_filter > 0.0 and grad,
        saves=saves(stream, folds) and all(dtype == torch.bfloat16 for dtype in products) and not any(d % 8 for d in widths(stream)),
        direct=is_direct(stream, products),
        frozen=not any(w.requires_grad for _, w in stream.pairs),
    )


def widths(stream: Stream) -> list[int]:
    """The features of each pair."""
    return [w.shape[1] for _, w in stream.pairs]


def is_direct(stream: Stream, products: Sequence[torch.dtype]) -> bool:
    """Can a product round dw to the weight's type itself?"""
    same = all(w.dtype == dtype for (_, w), dtype in zip(stream.pairs, products, strict=True))
    return same and stream.device.type == "cuda" and stream.class_scale is None and stream.scale_tensor is None and not stream.grad_filter


def engine_for(work: Work, engine: str, stream: Stream, folds: Sequence[Fold]) -> str:
    """The engine's name. On a GPU, "auto" falls to tiled without the user's asking: if a form of theirs is all that lacks, say so once."""
    name = choose_engine(work, engine)
    if name == "tiled" and engine == "auto" and work.device == "cuda" and not torch.compiler.is_compiling():
        own = form_reason([m for m in stream.maps if _foreign(m)], [f for f in folds if _foreign(f)])
        if own is not None and own == work.not_fused and own not in _said:
            _said.add(own)
            warnings.warn(f"bigclass: not the fused engine but the tiled one, for {own}", UserWarning, stacklevel=3)
    return name


_said: set[str] = set()


def _foreign(part: Fold | Map) -> bool:
    """Is it registered from outside? What this library leaves without a form, its user cannot help."""
    return not type(part).__module__.startswith("bigclass.")


def parted(every: Sequence[Fold], plan: str) -> tuple[Sequence[Fold], Sequence[Fold]]:
    """(the folds that a row loss reads, those that are observed): the last so many, as the plan says."""
    count = len(every) - int(plan.split(",")[3])
    return every[:count], every[count:]


def plan_of(plan: str, work: Work, saved: int | None = None) -> Plan:
    """The plan that a custom op was handed as a string. saved: `saved_of` it, of the op that has it."""
    engine, gradients, workspace = plan.split(",")[:3]
    return make_plan(work, engine, Settings(int(workspace) or None, gradients, saved=saved))


def saved_of(plan: str) -> int:
    """Of how many sixteenths of the classes the forward saves logits for the backward, by the plan of `fold_op`."""
    return int(plan.split(",")[3])

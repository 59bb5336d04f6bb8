"""One-vs-all losses of a stream: targets to picks, class vectors, reductions. Public functions: multilabel.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import Fold, State
from bigclass.core.problem import exact_dtype
from bigclass.core.row_losses import ROW_LOSSES, register_row_loss
from bigclass.core.shards import Shards
from bigclass.core.stream import Stream
from bigclass.core.topk import TopK
from bigclass.core.updates import SlabUpdate
from bigclass.losses.elementwise import Registered
from bigclass.losses.one_vs_all import LOSSES
from bigclass.losses.positives import Positives, of_sparse_target
from bigclass.losses.targets import SparseTarget
from bigclass.parallel.classes import (
    merged,
    nothing,
    observed_loss,
    over_classes,
    own,
    own_picks,
    reduce_logits,
    rows_of,
    shards_of,
    whole_batch,
)

REDUCTIONS = ("none", "mean", "sum", "batchmean")


@register_row_loss("fold_sum", affine=True)
def sum_row_loss(folds, picked, args, numbers):
    """args: (N,) factor of the only fold's only part."""
    return args[0] * folds[0][0]


def row_factor(n: float | Tensor, c: int, reduction: str) -> float | Tensor:
    """What a row's sum is multiplied by, so that rows add up to the reduced loss ("none": the rows themselves, summed over classes)."""
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if reduction not in ("mean", "batchmean"):
        return 1.0
    if not isinstance(n, Tensor) and n == 0:
        return math.nan  # the mean of nothing: torch's answer
    return 1.0 / (n * c if reduction == "mean" else n)


@dataclass(frozen=True)
class Rows:
    """What becomes of the rows' losses. factor: of each. rowwise: are they returned, or their sum? engine: as asked for.
    observed: folds that are shown the same tiles. update: takes the weight's gradient slab by slab (core/updates.py)."""

    factor: float | Tensor = 1.0
    rowwise: bool = False
    engine: str = "auto"
    observed: tuple[TopK, ...] = ()
    update: SlabUpdate | None = None

    @classmethod
    def of(cls, stream: Stream, reduction: str, engine: str, observed: tuple[TopK, ...] = (), update: SlabUpdate | None = None) -> Rows:
        if update is not None and reduction == "none":
            raise ArgumentError("reduction: 'none' has no one loss to take a step for; with update= use 'mean', 'batchmean' or 'sum'")
        n = rows_of(stream) if reduction in ("mean", "batchmean") else 1
        return cls(row_factor(n, stream.shape[1], reduction), reduction == "none", engine, observed, update)

    def reduce(
        self, stream: Stream, picks: Tensor | None, folds: Sequence[Fold], row_loss: str, args: Sequence[Tensor] = (),
        numbers: Sequence[float] = (),
    ) -> tuple[Tensor, list[State]]:  # fmt: skip
        """The sum over rows of factor times a row loss, or the (N,) losses; the observed states. args: those after the factor."""
        n, factor, exact = stream.shape[0], self.factor, exact_dtype(stream.device)
        one = factor if isinstance(factor, Tensor) else stream.tensors[0].new_full((), factor, dtype=exact)
        args = [one.expand(n), *args]
        if not self.rowwise:
            loss, seen = observed_loss(stream, picks, folds, self.observed, row_loss, args, numbers, update=self.update, engine=self.engine)
            loss = whole_batch(loss, stream)
            if isinstance(factor, Tensor):
                return loss + (factor * 0.0).to(loss.dtype), seen
            return (loss + factor if math.isnan(factor) else loss), seen  # a sum over no rows is 0
        states, picked = reduce_logits(stream, picks, [*folds, *self.observed], engine=self.engine)
        seen = [tuple([t.detach() for t in s]) for s in states[len(folds) :]]
        return ROW_LOSSES[row_loss](states[: len(folds)], picked, args, numbers).to(stream.accumulate_dtype), seen


def check_dense(stream: Stream, lead: Sequence[int], target: Any) -> Tensor:
    """target (..., C) as (N, C), once it fits."""
    if not isinstance(target, Tensor):
        raise ArgumentTypeError(f"target: expected a tensor, got {type(target).__name__}")
    if tuple(target.shape) != (*lead, stream.shape[1]):
        raise ArgumentError(f"target: expected the shape of the logits, {(*lead, stream.shape[1])}, got {tuple(target.shape)}")
    if target.device != stream.device:
        raise ArgumentError(f"target: expected device {stream.device} (that of the logits), got {target.device}")
    target = target if target.is_floating_point() else target.to(stream.accumulate_dtype)
    return target.reshape(-1, stream.shape[1])


def class_vector(name: str, v: Tensor | None, stream: Stream) -> Tensor | None:
    """v as (C,), from (), (1,), (C,) or (1, C); None for one that needs the N x C loss. Raise where it wants a gradient."""
    if v is None:
        return None
    if v.requires_grad:
        raise ArgumentError(f"{name}: class weights are constants and get no gradient; pass {name}.detach()")
    c = stream.shape[1]
    if v.numel() == 1:
        return v.reshape(1).to(stream.accumulate_dtype).expand(c)
    return v.reshape(c).to(stream.accumulate_dtype) if tuple(v.shape) in ((c,), (1, c)) else None


def both(stream: Stream, weight: Tensor | None, pos_weight: Tensor | None) -> tuple[Tensor, ...]:
    """(weight, pos_weight) as class vectors, with ones for the one that is missing; nothing if both are."""
    if weight is None and pos_weight is None:
        return ()
    ones = stream.tensors[0].new_ones((1,), dtype=stream.accumulate_dtype).expand(stream.shape[1])
    return (ones if weight is None else weight, ones if pos_weight is None else pos_weight)


def one_vs_all(
    stream: Stream, targets: Positives | Tensor, loss: Registered, numbers: Sequence[float], rows: Rows,
    *, weight: Tensor | None = None, pos_weight: Tensor | None = None,
) -> tuple[Tensor, list[State]]:  # fmt: skip
    """The loss against `Positives` or an (N, C) tensor, with class vectors weight and pos_weight (elementwise.py has the formula)."""
    shards = shards_of(stream)
    if shards is not None:
        return _over_shards(stream, shards, targets, loss, numbers, rows, weight, pos_weight)
    vectors = both(stream, weight, pos_weight)
    if isinstance(targets, Tensor):
        fold = loss.dense[bool(vectors)](numbers=tuple(numbers), tensors=(targets, *vectors))
        return rows.reduce(stream, None, (fold,), loss.row_loss, (), numbers)
    picks, wide, c = targets.picks, stream.accumulate_dtype, stream.shape[1]
    if targets.floor:
        fold = loss.floor[bool(vectors)](numbers=(targets.floor, *numbers), tensors=vectors, exclude_picks=True)
    else:
        own = () if weight is None else (weight,)
        fold = loss.negatives[bool(own)](numbers=tuple(numbers), tensors=own, exclude_picks=True)
    there = (picks >= 0).to(wide)
    values = [] if targets.values is None else [targets.values.to(wide)]
    at = picks.clamp(0, c - 1)
    return rows.reduce(stream, picks, (fold,), loss.row_loss, [there, *values, *[v[at] for v in vectors]], numbers)


def _over_shards(
    stream: Stream, shards: Shards, targets: Positives | Tensor, loss: Registered, numbers: Sequence[float], rows: Rows,
    weight: Tensor | None, pos_weight: Tensor | None,
) -> tuple[Tensor, list[State]]:  # fmt: skip
    """`one_vs_all` of each rank's own classes, added up: nothing of the others' is needed before gradients are."""
    if rows.update is not None:
        raise ArgumentError("update: is not offered with group= (or DTensors); leave one of them out")
    mine = own(stream)
    here: Positives | Tensor
    if isinstance(targets, Tensor):
        here = shards.vector(targets)
    else:
        here = replace(targets, picks=own_picks(stream, targets.picks))
    part = [None if v is None else shards.vector(v) for v in (weight, pos_weight)]
    if mine.shape[1]:
        made, seen = one_vs_all(mine, here, loss, numbers, rows, weight=part[0], pos_weight=part[1])
    else:
        made = nothing(mine)
        seen = [f.identity(mine.shape[0], made.detach()) for f in rows.observed]
        made = made.expand(mine.shape[0]) if rows.rowwise else made
    made = over_classes(made, stream)
    seen = [merged(f, state, shards) for f, state in zip(rows.observed, seen, strict=True)]
    return (made if rows.rowwise else whole_batch(made, stream)), seen


def binary_cross_entropy(
    stream: Stream, lead: Sequence[int], target: Tensor | SparseTarget, *, weight: Tensor | None = None,
    pos_weight: Tensor | None = None, reduction: str = "mean", engine: str = "auto",
) -> Tensor:  # fmt: skip
    """F.binary_cross_entropy_with_logits against target (..., C); weight, pos_weight (C,). "none": summed over classes, (...)."""
    if isinstance(target, SparseTarget):
        targets: Positives | Tensor = of_sparse_target("target", target, lead, stream.shape[1], stream.device)
    else:
        targets = check_dense(stream, lead, target)
    rows = Rows.of(stream, reduction, engine)
    loss, _ = one_vs_all(stream, targets, LOSSES["bce"], (), rows, weight=weight, pos_weight=pos_weight)
    return loss.reshape(tuple(lead)) if rows.rowwise else loss

"""One-vs-all losses against dense or single-label targets, as sums over classes of an elementwise term.

    loss_i = sum_j term(s_ij, t_ij)                                             t a full (N, C) tensor: a fold reads it tile by tile
    loss_i = sum_{j not a pick} term(s_ij, floor) + sum_k term(s_ik, t_ik)      few classes a row: no N x C target is made

Sparse positives over millions of labels belong to `MultiLabelHead` and its losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import Fold
from bigclass.core.op import reduce_logits, stream_loss
from bigclass.core.row_losses import ROW_LOSSES, register_row_loss
from bigclass.core.stream import Stream
from bigclass.losses.folds import BinaryCrossEntropy, DenseBinaryCrossEntropy, WeightedBinaryCrossEntropy
from bigclass.losses.inputs import check_range
from bigclass.losses.targets import SparseTarget

REDUCTIONS = ("none", "mean", "sum", "batchmean")


@register_row_loss("fold_sum")
def sum_row_loss(folds, picked, args, numbers):
    """args: (N,) factor of the only fold's only part."""
    return args[0] * folds[0][0]


@register_row_loss("bce_sparse")
def bce_sparse_row_loss(folds, picked, args, numbers):
    """args: (N,) factor, (N, K) which picks there are, (N, K) targets of the picks [, (N, K) w, p at the picks].

    The fold holds the classes that are no picks."""
    factor, there, t, *vectors = args
    w, p = vectors or (1.0, 1.0)
    terms = -w * ((1.0 - t) * F.logsigmoid(-picked) + t * p * F.logsigmoid(picked))
    return factor * (folds[0][0] + torch.where(there > 0, terms, 0.0).sum(1))


def row_factor(n: int, c: int, reduction: str) -> float:
    """What a row's sum is multiplied by, so that rows add up to the reduced loss ("none": the rows themselves, summed over classes)."""
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if reduction not in ("mean", "batchmean"):
        return 1.0
    return math.nan if n == 0 else 1.0 / (n * c if reduction == "mean" else n)  # the mean of nothing: torch's answer


def sum_of_rows(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], row_loss: str, args: Sequence[Tensor], numbers: Sequence[float],
    *, factor: float, rowwise: bool, engine: str,
) -> Tensor:  # fmt: skip
    """The sum over rows of factor times a row loss, or (rowwise) the (N,) losses. args: those after the factor."""
    n, exact = stream.shape[0], torch.float32 if stream.device.type == "mps" else torch.float64
    args = [stream.tensors[0].new_full((), factor, dtype=exact).expand(n), *args]
    if not rowwise:
        loss = stream_loss(stream, picks, folds, row_loss, args, numbers, engine=engine)
        return loss + factor if math.isnan(factor) else loss  # a sum over no rows is 0
    states, picked = reduce_logits(stream, picks, folds, engine=engine)
    return ROW_LOSSES[row_loss](states, picked, args, numbers).to(stream.accumulate_dtype)


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


def binary_cross_entropy(
    stream: Stream, lead: Sequence[int], target: Tensor, *, weight: Tensor | None = None, pos_weight: Tensor | None = None,
    reduction: str = "mean", engine: str = "auto",
) -> Tensor:  # fmt: skip
    """F.binary_cross_entropy_with_logits against target (..., C); weight, pos_weight (C,). "none": summed over classes, (...)."""
    t = check_dense(stream, lead, target)
    fold = DenseBinaryCrossEntropy(tensors=(t, *both(stream, weight, pos_weight)))
    factor = row_factor(*stream.shape, reduction)
    loss = sum_of_rows(stream, None, (fold,), "fold_sum", (), (), factor=factor, rowwise=reduction == "none", engine=engine)
    return loss.reshape(tuple(lead)) if reduction == "none" else loss


def both(stream: Stream, weight: Tensor | None, pos_weight: Tensor | None) -> tuple[Tensor, ...]:
    """(weight, pos_weight) as class vectors, with ones for the one that is missing; nothing if both are."""
    if weight is None and pos_weight is None:
        return ()
    ones = stream.tensors[0].new_ones((1,), dtype=stream.accumulate_dtype).expand(stream.shape[1])
    return (ones if weight is None else weight, ones if pos_weight is None else pos_weight)


def sparse_binary_cross_entropy(
    stream: Stream, lead: Sequence[int], target: SparseTarget, *, weight: Tensor | None = None, pos_weight: Tensor | None = None,
    reduction: str = "mean", engine: str = "auto",
) -> Tensor:  # fmt: skip
    """`binary_cross_entropy` against a `SparseTarget` (..., C), without the N x C target."""
    c = stream.shape[1]
    if tuple(target.shape) != (*lead, c):
        raise ArgumentError(f"target: expected the shape of the logits, {(*lead, c)}, got {tuple(target.shape)}")
    if target.device != stream.device:
        raise ArgumentError(f"target: expected device {stream.device} (that of the logits), got {target.device}")
    picks, weights = target.merged()
    there = picks >= 0
    check_range("target", picks, picks != -1, c)
    picks = torch.where(picks < -1, c, picks)  # so that the op's own check sees it
    vectors = both(stream, weight, pos_weight)
    kind = WeightedBinaryCrossEntropy if vectors else BinaryCrossEntropy
    fold = kind(numbers=(target.floor,), tensors=vectors, exclude_picks=True)
    wide = stream.accumulate_dtype
    args = [there.to(wide), weights.to(wide) + target.floor, *[v[picks.clamp(0, c - 1)] for v in vectors]]
    factor, rowwise = row_factor(*stream.shape, reduction), reduction == "none"
    loss = sum_of_rows(stream, picks, (fold,), "bce_sparse", args, (), factor=factor, rowwise=rowwise, engine=engine)
    return loss.reshape(tuple(lead)) if rowwise else loss

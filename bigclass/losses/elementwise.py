"""One-vs-all losses against dense or single-label targets, as sums over classes of an elementwise term.

    loss_i = sum_j term(s_ij, t_ij)            t a full (N, C) tensor: a fold reads it tile by tile
    loss_i = sum_{j not y} term(s_ij, off) + term(s_iy, on)      one label y a row: no N x C target is made

Sparse positives over millions of labels belong to `MultiLabelHead` and its losses.
"""

from __future__ import annotations

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
from bigclass.losses.inputs import check_index, check_range

REDUCTIONS = ("none", "mean", "sum", "batchmean")


@register_row_loss("fold_sum")
def sum_row_loss(folds, picked, args, numbers):
    """args: (N,) factor of the only fold's only part."""
    return args[0] * folds[0][0]


@register_row_loss("bce_index")
def bce_index_row_loss(folds, picked, args, numbers):
    """args: (N,) factor [, (N,) w_y, p_y]; numbers: the target of the label. The fold leaves the label out."""
    factor, on, s = args[0], numbers[0], picked[:, 0]
    w, p = args[1:] if len(args) > 1 else (1.0, 1.0)
    return factor * (folds[0][0] + w * ((1.0 - on) * F.softplus(s) + on * p * F.softplus(-s)))


def row_factor(n: int, c: int, reduction: str) -> float:
    """What a row's sum is multiplied by, so that rows add up to the reduced loss ("none": the rows themselves, summed over classes)."""
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if reduction == "mean":
        return 1.0 / max(n * c, 1)
    return 1.0 / max(n, 1) if reduction == "batchmean" else 1.0


def sum_of_rows(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], row_loss: str, args: Sequence[Tensor], numbers: Sequence[float],
    *, factor: float, rowwise: bool, engine: str,
) -> Tensor:  # fmt: skip
    """The sum over rows of factor times a row loss, or (rowwise) the (N,) losses. args: those after the factor."""
    n, exact = stream.shape[0], torch.float32 if stream.device.type == "mps" else torch.float64
    args = [stream.tensors[0].new_full((), factor, dtype=exact).expand(n), *args]
    if not rowwise:
        return stream_loss(stream, picks, folds, row_loss, args, numbers, engine=engine)
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


def index_binary_cross_entropy(
    stream: Stream, lead: Sequence[int], target: Tensor, *, on: float = 1.0, off: float = 0.0, weight: Tensor | None = None,
    pos_weight: Tensor | None = None, reduction: str = "mean", engine: str = "auto",
) -> Tensor:  # fmt: skip
    """`binary_cross_entropy` against the target that is `on` at each row's label target (...) and `off` elsewhere."""
    check_index("target", target, stream.device)
    if tuple(target.shape) != tuple(lead):
        raise ArgumentError(f"target: expected class indices of shape {tuple(lead)}, got {tuple(target.shape)}")
    y = target.reshape(-1).long()
    check_range("target", y, None, stream.shape[1])
    y = torch.where(y < 0, stream.shape[1], y)  # so that the op's own check sees it
    vectors = both(stream, weight, pos_weight)
    kind = WeightedBinaryCrossEntropy if vectors else BinaryCrossEntropy
    fold = kind(numbers=(off,), tensors=vectors, exclude_picks=True)
    args = [v[y.clamp_max(stream.shape[1] - 1)] for v in vectors]
    factor = row_factor(*stream.shape, reduction)
    rowwise = reduction == "none"
    loss = sum_of_rows(stream, y.unsqueeze(1), (fold,), "bce_index", args, (on,), factor=factor, rowwise=rowwise, engine=engine)
    return loss.reshape(tuple(lead)) if rowwise else loss

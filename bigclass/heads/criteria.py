"""Loss modules that stream on lazy logits: `convert_criterion`.

Most criteria need nothing: over `F.cross_entropy`, `F.binary_cross_entropy_with_logits`, `F.log_softmax` they stream as they stand. Losses
written elementwise (sigmoid, clamp, pow ... of every logit) would write the logits out; their streamed twins stand here. So do those of
modules whose parts would stream, in two passes where one is enough, or with an N x C target that nobody needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import LogSumExp, log_sum, log_sum_exp
from bigclass.core.row_losses import ROW_LOSSES, register_row_loss
from bigclass.heads.lazy import LazyLogits
from bigclass.heads.lazy.base import result_dtype
from bigclass.losses.classwise import Rows, binary_cross_entropy, check_dense, class_vector, one_vs_all
from bigclass.losses.cross_entropy import cross_entropy
from bigclass.losses.folds import TemperedMoment
from bigclass.losses.inputs import check_index, check_range
from bigclass.losses.one_vs_all import LOSSES
from bigclass.losses.targets import SparseTarget
from bigclass.parallel.classes import reduce_logits, rows_of, stream_loss, whole_batch

# (criterion, lazy logits, target) -> loss, or NotImplemented where this combination does not stream
Streamed = Callable[[Any, LazyLogits, Any], Any]

_NO_IGNORED = -(1 << 62)  # these modules know no ignored index


class StreamedCriterion(nn.Module):
    """A criterion whose loss streams where it is given lazy logits, and is the criterion's own elsewhere (evaluation).

    criterion: the module it was made from; its options and buffers are read at every call.
    """

    def __init__(self, criterion: nn.Module, streamed: Streamed) -> None:
        super().__init__()
        self.criterion = criterion
        self._streamed = streamed

    def forward(self, input: Any, target: Any) -> Any:
        """The loss of logits (..., C) against target, as the criterion defines it."""
        if isinstance(input, LazyLogits):
            input.check()
            loss = self._streamed(self.criterion, input, target)
            if loss is not NotImplemented:
                return loss
        return self.criterion(input, target)

    def extra_repr(self) -> str:
        return "streamed"


def convert_criterion(criterion: nn.Module) -> nn.Module:
    """The streamed form of a loss module, for lazy logits; real logits go to the module itself.

    Streams: torch's CrossEntropyLoss, NLLLoss, KLDivLoss, BCEWithLogitsLoss (as they stand: returned unchanged) and
    MultiLabelSoftMarginLoss; timm's LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, BinaryCrossEntropy, PolyCrossEntropy,
    PolyBinaryCrossEntropy, AsymmetricLossMultiLabel and AsymmetricLossSingleLabel. Reduction "none" of the one-vs-all losses is N x C
    by definition: it falls back to the module, with the warning of lazy logits. So do AsymmetricLossSingleLabel with smoothing and a
    gamma_neg of 0, and class weights of other shapes than (C,).

    Args:
        criterion: the module. A subclass is not taken for its base, whose forward it may change.

    Raises:
        TypeError: for a module that has no streamed form, with what to do instead.

    Example:
        >>> criterion = bigclass.convert_criterion(timm.loss.AsymmetricLossMultiLabel())
        >>> loss = criterion(model(images), targets)  # model after bigclass.convert_head(model)
    """
    if isinstance(criterion, StreamedCriterion):
        return criterion
    if not isinstance(criterion, nn.Module):
        raise ArgumentTypeError(f"criterion: expected a module, got {type(criterion).__name__}")
    if type(criterion) in _AS_THEY_STAND:
        return criterion
    kind = type(criterion)
    name = f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"
    streamed = _STREAMED.get(name)
    if streamed is None:
        reason = _REASONS.get(name, "it is not known here")
        raise ArgumentTypeError(
            f"criterion: {name} has no streamed form: {reason}. It works on lazy logits as it stands, but may write them out "
            f"(bigclass.LogitsWarning says so). Known: {', '.join(sorted(_STREAMED))}"
        )
    return StreamedCriterion(criterion, streamed)


def _label_smoothing(criterion: Any, lazy: LazyLogits, target: Any) -> Any:
    return _softmax(lazy, target, reduction="mean", label_smoothing=criterion.smoothing)


def _soft_target(criterion: Any, lazy: LazyLogits, target: Any) -> Any:
    return _softmax(lazy, target, reduction="mean")


def _poly(criterion: Any, lazy: LazyLogits, target: Any) -> Any:
    smoothing = criterion.smoothing if tuple(target.shape) != tuple(lazy.shape) else 0.0
    return _softmax(lazy, target, poly=criterion.epsilon, label_smoothing=smoothing, reduction=criterion.reduction).float()


def _softmax(lazy: LazyLogits, target: Any, **arguments: Any) -> Any:
    if lazy.class_first:
        return NotImplemented
    soft = isinstance(target, SparseTarget) or target.is_floating_point()
    ignore_index = None if soft else _NO_IGNORED
    return cross_entropy(lazy.stream, lazy.lead, target, engine=lazy.engine, ignore_index=ignore_index, **arguments).to(
        result_dtype(lazy.dtype)
    )


def _binary(criterion: Any, lazy: LazyLogits, target: Any) -> Any:
    reduction = "batchmean" if criterion.sum_classes else criterion.reduction
    vectors = {name: class_vector(name, getattr(criterion, name), lazy.stream) for name in ("weight", "pos_weight")}
    if reduction == "none" or lazy.ndim != 2 or any(v is None and getattr(criterion, name) is not None for name, v in vectors.items()):
        return NotImplemented
    if tuple(target.shape) != tuple(lazy.shape):
        if target.numel() != lazy.shape[0]:
            raise ArgumentError(f"target: expected {lazy.shape[0]} class indices, got shape {tuple(target.shape)}")
        off = criterion.smoothing / lazy.shape[1]
        check_range("target", target, None, lazy.shape[1])
        on = torch.full((lazy.shape[0], 1), 1.0 - criterion.smoothing, device=lazy.device, dtype=lazy.stream.accumulate_dtype)
        target = SparseTarget(target.long().reshape(-1, 1), on, lazy.shape[1], off)
    elif criterion.smooth_dense and criterion.smoothing:
        target = target * (1.0 - criterion.smoothing) + 0.5 * criterion.smoothing
    if criterion.target_threshold is not None:
        above = target.gt(criterion.target_threshold)
        target = above if isinstance(above, SparseTarget) else above.to(dtype=target.dtype)
    loss = binary_cross_entropy(lazy.stream, lazy.lead, target, reduction=reduction, engine=lazy.engine, **vectors)
    return loss.to(result_dtype(lazy.dtype))


def _soft_margin(criterion: Any, lazy: LazyLogits, target: Any) -> Any:
    weight = class_vector("weight", criterion.weight, lazy.stream)
    if lazy.class_first or (weight is None and criterion.weight is not None):
        return NotImplemented
    rows = criterion.reduction == "none"
    loss = binary_cross_entropy(
        lazy.stream, lazy.lead, target, weight=weight, reduction="none" if rows else "mean", engine=lazy.engine
    )  # torch takes the mean over classes whatever the reduction
    if rows:
        loss = loss / lazy.shape[-1]
    elif criterion.reduction == "sum":
        loss = loss * rows_of(lazy.stream)
    return loss.to(result_dtype(lazy.dtype))


def _one_vs_all(criterion: Any, lazy: LazyLogits, target: Any, loss: str, numbers: Any, *vectors: Tensor | None) -> Tensor:
    """A one-vs-all loss against a dense target; in float32, as timm's modules compute."""
    t = check_dense(lazy.stream, lazy.lead, target)
    t = t * (1.0 - criterion.smoothing) + 0.5 * criterion.smoothing if criterion.smoothing else t
    rows, given = Rows.of(lazy.stream, criterion.reduction, lazy.engine), dict(zip(("weight", "pos_weight"), vectors, strict=False))
    return one_vs_all(lazy.stream, t, LOSSES[loss], [float(v) for v in numbers], rows, **given)[0].float()


def _asymmetric_multi(criterion: Any, lazy: LazyLogits, target: Any) -> Any:
    if criterion.reduction == "none" or lazy.ndim != 2:
        return NotImplemented
    vectors = [class_vector(name, getattr(criterion, name), lazy.stream) for name in ("weight", "pos_weight")]
    if any(v is None and getattr(criterion, n) is not None for v, n in zip(vectors, ("weight", "pos_weight"), strict=True)):
        return NotImplemented
    options = (criterion.gamma_neg, criterion.gamma_pos, criterion.clip or 0.0, criterion.eps, criterion.disable_torch_grad_focal_loss)
    return _one_vs_all(criterion, lazy, target, "asymmetric", options, *vectors)


def _poly_binary(criterion: Any, lazy: LazyLogits, target: Any) -> Any:
    if criterion.reduction == "none" or lazy.ndim != 2:
        return NotImplemented
    alpha = -1.0 if criterion.alpha is None else criterion.alpha
    return _one_vs_all(criterion, lazy, target, "poly", (criterion.epsilon, criterion.gamma, alpha))


@register_row_loss("asymmetric_single")
def asymmetric_row_loss(folds, picked, args, numbers):
    """-[t_y (1 - p_y)^g+ log p_y + floor sum_{j not y} p_j^g- log p_j]; args: (N,) factor; numbers: g+, g-, t_y, floor."""
    gamma_pos, gamma_neg, on, floor = numbers
    rest, s = folds[0], picked[:, 0]
    gap = (s - rest[0]) - log_sum(rest)
    loss = on * F.logsigmoid(gap) * torch.sigmoid(-gap).pow(gamma_pos)
    if floor:
        lse = torch.logaddexp(log_sum_exp(rest), s)
        m, mass, moment = folds[1]
        down = m - gamma_neg * lse  # log p^g- = u + down
        loss = loss + floor / gamma_neg * torch.exp(down) * (moment + down * mass)
    return -args[0] * loss


def _asymmetric_single(criterion: Any, lazy: LazyLogits, target: Any) -> Any:
    if lazy.ndim != 2 or criterion.reduction not in ("mean", "none", None, ""):
        return NotImplemented
    (n, c), stream = lazy.shape, lazy.stream
    check_index("target", target, lazy.device)
    y = target.long().reshape(-1)
    check_range("target", y, None, c)
    y = torch.where(y < 0, c, y).unsqueeze(1)  # so that the op's own check sees it
    floor = criterion.eps / c if criterion.eps > 0 else 0.0
    on = 1.0 - criterion.eps + floor if criterion.eps > 0 else 1.0
    gamma_pos, gamma_neg = float(criterion.gamma_pos), float(criterion.gamma_neg)
    if floor and gamma_neg <= 0.0:
        return NotImplemented  # the moment is one of p^g-
    moments = (TemperedMoment(numbers=(gamma_neg,), exclude_picks=True),) if floor else ()
    folds = (LogSumExp(exclude_picks=True), *moments)
    rowwise, numbers = criterion.reduction != "mean", (gamma_pos, gamma_neg, on, floor)
    count = 1.0 if rowwise else rows_of(stream)
    count = count if isinstance(count, Tensor) else stream.tensors[0].new_full((), max(count, 1.0), dtype=stream.accumulate_dtype)
    factor = (1.0 / count).to(stream.accumulate_dtype).expand(n)
    if rowwise:
        states, picked = reduce_logits(stream, y, folds, engine=lazy.engine)
        loss = ROW_LOSSES["asymmetric_single"](states, picked, (factor,), numbers)
    else:
        loss = whole_batch(stream_loss(stream, y, folds, "asymmetric_single", (factor,), numbers, engine=lazy.engine), stream)
    return loss.to(result_dtype(lazy.dtype))


_AS_THEY_STAND = (nn.CrossEntropyLoss, nn.NLLLoss, nn.KLDivLoss, nn.BCEWithLogitsLoss)

_STREAMED: dict[str, Streamed] = {
    "torch.MultiLabelSoftMarginLoss": _soft_margin,
    "timm.LabelSmoothingCrossEntropy": _label_smoothing,
    "timm.SoftTargetCrossEntropy": _soft_target,
    "timm.BinaryCrossEntropy": _binary,
    "timm.PolyCrossEntropy": _poly,
    "timm.PolyBinaryCrossEntropy": _poly_binary,
    "timm.AsymmetricLossMultiLabel": _asymmetric_multi,
    "timm.AsymmetricLossSingleLabel": _asymmetric_single,
}

_REASONS = {
    "timm.JsdCrossEntropy": "it compares whole distributions of several views of an image",
    "timm.TwoWayLoss": "it folds rows and columns under two temperatures",
    "timm.ZlprLoss": "its log-sum-exps run over classes that a dense target selects",
    "timm.DistributionBalancedLoss": "its logits are shifted class by class before a focal loss",
    "torch.MultiMarginLoss": "its margin is taken from the target's own logit",
    "torch.MultiLabelMarginLoss": "it compares every target with every other class",
}

"""One-vs-all losses of a linear layer over huge numbers of classes: each class decides for itself, positives are few.

    loss_i = sum over classes of an elementwise term (elementwise.py, one_vs_all.py), or ZLPR's pair of log-sum-exps

Flops: 6NCD with gradients, whatever C: a tile's gradient needs nothing of other tiles, so no logit is made twice or kept. (ZLPR as
cross-entropy; 8NCD with update=, or reduction "none".) Temporary memory: one tile and its elementwise temporaries (80 MiB at most on a
CPU, `planning`), dw apart. Dense targets are read as they are if they are floating point; others, and smoothed ones, are copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import LogSumExp, State, log_sum_exp
from bigclass.core.row_losses import register_row_loss
from bigclass.core.stream import Stream
from bigclass.core.topk import TopK
from bigclass.core.updates import SlabUpdate
from bigclass.losses.classwise import Rows, class_vector, one_vs_all
from bigclass.losses.elementwise import numbers_of, registered
from bigclass.losses.inputs import check_smoothing, check_tensor, make_stream, open_layer
from bigclass.losses.positives import Positives, read_positives
from bigclass.parallel.layer import Layer


class TopClasses(NamedTuple):
    """The k largest logits of each row, (..., k) in descending order, and their classes."""

    values: Tensor
    indices: Tensor


def linear_binary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    positives: Any,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    return_topk: int = 0,
    grad_filter: float | None = None,
    update: SlabUpdate | None = None,
    engine: str = "auto",
    group: Any = None,
) -> Any:
    r"""Binary cross-entropy of every class against few positives a row, without the N x C logits or targets.

    L = sum_ij v_j [(1 - t_ij) sp(s_ij) + t_ij p_j sp(-s_ij)], sp(s) = log(1 + e^s), s = softcap(logit_scale * (x w^T + b)):
    the value and the gradients of `F.binary_cross_entropy_with_logits` on the written-out logits.

    Args:
        input: features (..., D). linear_weight: (C, D). linear_bias: (C,).
        positives: which classes are positive, with N rows = the leading axes of input; any of
            class indices (..., K), int64 or int32, -1 where a row has fewer (a class that stands twice counts once), or (...), one a row;
            CSR: (indptr (N + 1,), indices (P,)) or (indptr, indices, values (P,)), values in [0, 1] being soft targets;
            a torch sparse CSR tensor (N, C); a `SparseTarget` (mixup, cutmix);
            a dense target (..., C), floating point in [0, 1] or bool.
            Padded indices cost no host sync (`pad_positives` makes them from lists); CSR is padded to its longest row, whose length a GPU
            must tell the host, and which breaks a graph under torch.compile.
        weight: (C,) or a scalar tensor, v: a factor for each class. pos_weight: (C,) or a scalar tensor, p: a factor for its positives.
            Constants: they get no gradient.
        label_smoothing: e in [0, 1]; targets become (1 - e) t + e / C, as timm's BinaryCrossEntropy has it.
        reduction: "mean" (over N C numbers, as torch's), "sum", "batchmean" (the sum over classes, averaged over rows; timm's
            sum_classes) or "none": each row's sum over classes, (...).
        softcap, logit_scale: as in `linear_cross_entropy`.
        return_topk: k > 0 also returns the k largest logits and their classes, from the same pass (for precision at k while training).
            Top-k has no Triton form: engine="fused" raises, and "auto" takes the tiled engine.
        grad_filter: as in `linear_cross_entropy`, the positives being the targets. Sparse ones: a dense target is refused, for beside the
            entries of its positives, which cannot be told from others, all else would pass for negligible.
        update: a `bigclass.optim.SlabOptimizer` that holds linear_weight, or a `GradAccumulator`: takes the weight's gradient slab by slab
            in the backward (8NCD flops), so that no C x D gradient is returned. Any backward through the loss takes the step, even one
            that asks for the features' gradient alone. One rank, and outside a traced graph.
        engine: "auto", "dense" (materialises), "tiled", "fused".
        group: as in `linear_cross_entropy`. Each rank makes its classes' part, and nothing but the loss and dx is added up: 6NMD flops
            for M classes.

    Returns:
        The loss, fp32 (float64 for float64 inputs). With return_topk: (loss, TopClasses(values, indices)).

    Raises:
        ValueError (also a RuntimeError): shapes, devices or values that do not fit: pointers that do not match, targets outside [0, 1],
        a class twice in a row with values. TypeError: wrong types. IndexError: a class outside [0, C) (on CUDA: a device-side assertion).

    Example:
        >>> x, w = torch.randn(8, 16), torch.randn(1000, 16, requires_grad=True)
        >>> positives = torch.tensor([[3, 17, -1]] * 8)
        >>> bigclass.linear_binary_cross_entropy(x, w, positives).backward()
    """
    return linear_elementwise_loss(
        input, linear_weight, positives, loss="bce", linear_bias=linear_bias, weight=weight, pos_weight=pos_weight,
        label_smoothing=label_smoothing, reduction=reduction, softcap=softcap, logit_scale=logit_scale, return_topk=return_topk,
        grad_filter=grad_filter, update=update, engine=engine, group=group,
    )  # fmt: skip


def linear_focal_loss(
    input: Tensor,
    linear_weight: Tensor,
    positives: Any,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
    **options: Any,
) -> Any:
    r"""Focal loss of every class: a (1 - sigma)^g sp(-s) for a positive, (1 - a) sigma^g sp(s) for a negative, sigma = sigmoid(s).

    Args:
        alpha: a, the share of the positives; -1: no factors. gamma: g >= 0. Both as in torchvision's sigmoid_focal_loss.
        Everything else: as in `linear_binary_cross_entropy`.

    Returns, Raises:
        As `linear_binary_cross_entropy`.

    Example:
        >>> loss = bigclass.linear_focal_loss(x, w, positives, gamma=2.0, reduction="batchmean")

    Lin et al., "Focal Loss for Dense Object Detection", arXiv:1708.02002, equation 5.
    """
    return linear_elementwise_loss(
        input, linear_weight, positives, loss="focal", reduction=reduction, alpha=alpha, gamma=gamma, **options
    )  # fmt: skip


def linear_asymmetric_loss(
    input: Tensor,
    linear_weight: Tensor,
    positives: Any,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float | None = 0.05,
    eps: float = 1e-8,
    disable_torch_grad_focal_loss: bool = False,
    reduction: str = "batchmean",
    **options: Any,
) -> Any:
    r"""Asymmetric loss (ASL) of every class: (1 - sigma)^g+ sp(-s) for a positive, -q^g- log(1 - q), q = max(sigma - m, 0), for a negative.

    A negative below logit(m) has exactly no loss and no gradient; on a CPU, classes that lie there in every row of a tile are skipped.

    Args:
        gamma_neg, gamma_pos: the exponents g-, g+ >= 0. clip: the margin m of probability in [0, 1); 0 or None: none.
        eps: the least probability inside a logarithm, timm's. With its default a positive below s = -18.4 gets (next to) no gradient;
            0: no such bound.
        disable_torch_grad_focal_loss: take the focusing weights as constants in the gradient, as in timm.
        reduction: default "batchmean", as in timm. Everything else: as in `linear_binary_cross_entropy`.

    Returns, Raises:
        As `linear_binary_cross_entropy`.

    Example:
        >>> loss = bigclass.linear_asymmetric_loss(x, w, positives, gamma_neg=4.0, gamma_pos=1.0, clip=0.05)

    Ridnik et al., "Asymmetric Loss For Multi-Label Classification", arXiv:2009.14119, equations 2 to 5.
    """
    return linear_elementwise_loss(
        input, linear_weight, positives, loss="asymmetric", reduction=reduction, gamma_neg=gamma_neg, gamma_pos=gamma_pos,
        clip=clip, eps=eps, disable_torch_grad_focal_loss=disable_torch_grad_focal_loss, **options,
    )  # fmt: skip


def linear_squared_hinge_loss(
    input: Tensor, linear_weight: Tensor, positives: Any, *, margin: float = 1.0, reduction: str = "mean", **options: Any
) -> Any:
    r"""Squared hinge of every class: max(m - s, 0)^2 for a positive, max(m + s, 0)^2 for a negative, which is exactly 0 below -m.

    Args:
        margin: m. Everything else: as in `linear_binary_cross_entropy`.

    Returns, Raises:
        As `linear_binary_cross_entropy`.

    Example:
        >>> loss = bigclass.linear_squared_hinge_loss(x, w, positives)

    The loss of DiSMEC (Babbar and Schölkopf, arXiv:1609.02521) and of most linear extreme multi-label learners.
    """
    return linear_elementwise_loss(
        input, linear_weight, positives, loss="squared_hinge", reduction=reduction, margin=margin, **options
    )  # fmt: skip


def linear_elementwise_loss(
    input: Tensor,
    linear_weight: Tensor,
    positives: Any,
    *,
    loss: str,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    return_topk: int = 0,
    grad_filter: float | None = None,
    update: SlabUpdate | None = None,
    engine: str = "auto",
    group: Any = None,
    **options: float | None,
) -> Any:
    r"""A one-vs-all loss by its name: one of the library's, or your own (`register_elementwise_loss`).

    Args:
        loss: "bce", "focal", "asymmetric", "squared_hinge", "poly" or a registered name. options: its constants; as in timm None
            for no clip ("asymmetric") and no alpha ("poly").
        Everything else: as in `linear_binary_cross_entropy`.

    Returns, Raises:
        As `linear_binary_cross_entropy`. ValueError for an unknown loss, TypeError for an unknown option.

    Example:
        >>> loss = bigclass.linear_elementwise_loss(x, w, positives, loss="squared_hinge", margin=0.5)
    """
    layer = open_layer(input, linear_weight, linear_bias, group)
    stream, targets = _inputs(layer, positives, softcap, logit_scale, grad_filter)
    made = streamed_loss(
        stream, layer.input.shape[:-1], targets, loss, options, weight=weight, pos_weight=pos_weight, label_smoothing=label_smoothing,
        reduction=reduction, return_topk=return_topk, update=update, engine=engine,
    )  # fmt: skip
    return layer.finish(made, reduction)


def linear_zlpr_loss(
    input: Tensor,
    linear_weight: Tensor,
    positives: Any,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    return_topk: int = 0,
    grad_filter: float | None = None,
    update: SlabUpdate | None = None,
    engine: str = "auto",
    group: Any = None,
) -> Any:
    r"""ZLPR: log(1 + sum over negatives of e^s) + log(1 + sum over positives of e^-s), a ranking around zero.

    Args:
        positives: sparse ones, without values (a dense target would have to be read on the host).
        reduction: "mean" or "batchmean" (over rows), "sum" or "none" (...). Everything else: as in `linear_binary_cross_entropy`.

    Returns, Raises:
        As `linear_binary_cross_entropy`.

    Example:
        >>> loss = bigclass.linear_zlpr_loss(x, w, positives)

    Su et al., "ZLPR: A Novel Loss for Multi-label Classification", arXiv:2208.02955, equation 6.
    """
    layer = open_layer(input, linear_weight, linear_bias, group)
    stream, targets = _inputs(layer, positives, softcap, logit_scale, grad_filter)
    lead = layer.input.shape[:-1]
    made = zlpr_loss(stream, lead, targets, reduction=reduction, return_topk=return_topk, update=update, engine=engine)
    return layer.finish(made, reduction)


def _inputs(layer: Layer, positives: Any, softcap, logit_scale, grad_filter) -> tuple[Stream, Positives | Tensor]:
    stream = make_stream(*layer.operands, softcap, logit_scale, grad_filter=grad_filter, layer=layer)
    return stream, layer_positives(layer, positives)


def layer_positives(layer: Layer, positives: Any) -> Positives | Tensor:
    """Targets in any form, for all rows that the layer works on."""
    here = read_positives(positives, layer.lead, layer.classes, layer.input.device)
    if layer.rows is None:
        return here
    if isinstance(here, Tensor):
        return layer.gather(here.reshape(*layer.lead, layer.classes)).reshape(-1, layer.classes)
    k = here.picks.shape[1]
    picks, width = layer.gather_padded(here.picks.reshape(*layer.lead, k), -1)
    values = None if here.values is None else layer.gather_padded(here.values.reshape(*layer.lead, k), 0)[0].reshape(-1, width)
    return Positives(picks.reshape(-1, width), values, here.floor)


def streamed_loss(
    stream: Stream, lead: torch.Size, targets: Positives | Tensor, loss: str, options: dict[str, Any], *, weight: Tensor | None = None,
    pos_weight: Tensor | None = None, label_smoothing: float = 0.0, reduction: str = "mean", return_topk: int = 0,
    update: SlabUpdate | None = None, engine: str = "auto",
) -> Any:  # fmt: skip
    """`linear_elementwise_loss` of a stream whose N rows are `lead`, against checked targets."""
    found = registered(loss)
    numbers = numbers_of(found.loss, options)
    check_smoothing(label_smoothing)
    vectors = [_class_vector(name, v, stream) for name, v in (("weight", weight), ("pos_weight", pos_weight))]
    targets = _smoothed(targets, label_smoothing, stream)
    rows = Rows.of(stream, reduction, engine, _observed(return_topk, stream), update)
    made, seen = one_vs_all(stream, targets, found, numbers, rows, weight=vectors[0], pos_weight=vectors[1])
    return _result(made, seen, lead, rows)


@register_row_loss("zlpr")
def zlpr_row_loss(folds, picked, args, numbers):
    """args: (N,) factor, (N, K) which picks there are. The fold is a log-sum-exp of all other classes."""
    factor, there = args
    lowest = torch.finfo(picked.dtype).min  # not -inf: the log-sum-exp of a row without positives would have NaN for a gradient
    positives = torch.where(there > 0, -picked, lowest).logsumexp(1)
    return -factor * (F.logsigmoid(-log_sum_exp(folds[0])) + F.logsigmoid(-positives))  # F.softplus drops e^-u above 20


def zlpr_loss(
    stream: Stream, lead: torch.Size, targets: Positives | Tensor, *, reduction: str = "mean", return_topk: int = 0,
    update: SlabUpdate | None = None, engine: str = "auto",
) -> Any:  # fmt: skip
    """`linear_zlpr_loss` of a stream whose N rows are `lead`, against checked targets."""
    if isinstance(targets, Tensor) or targets.values is not None or targets.floor:
        raise ArgumentError("positives: ZLPR takes sparse positives without values: padded indices (..., K), or CSR (indptr, indices)")
    rows = Rows.of(stream, "batchmean" if reduction == "mean" else reduction, engine, _observed(return_topk, stream), update)
    there = (targets.picks >= 0).to(stream.accumulate_dtype)
    made, seen = rows.reduce(stream, targets.picks, (LogSumExp(exclude_picks=True),), "zlpr", [there])
    return _result(made, seen, lead, rows)


def _observed(k: int, stream: Stream) -> tuple[TopK, ...]:
    if not isinstance(k, int) or isinstance(k, bool):
        raise ArgumentTypeError(f"return_topk: expected an integer, got {k!r}")
    if not 0 <= k <= stream.shape[1]:
        raise ArgumentError(f"return_topk: expected 0 (none) to {stream.shape[1]} (the number of classes), got {k}")
    return (TopK((float(k),)),) if k else ()


def _result(loss: Tensor, seen: list[State], lead: torch.Size, rows: Rows) -> Any:
    loss = loss.reshape(tuple(lead)) if rows.rowwise else loss
    if not seen:
        return loss
    values, indices = (t.reshape(*lead, rows.observed[0].k) for t in seen[0])
    return loss, TopClasses(values, indices)


def _smoothed(targets: Positives | Tensor, smoothing: float, stream: Stream) -> Positives | Tensor:
    """(1 - e) t + e / C"""
    if isinstance(targets, Tensor):
        t = targets.reshape(-1, stream.shape[1])
        t = t if t.is_floating_point() else t.to(stream.accumulate_dtype)
        return t * (1.0 - smoothing) + smoothing / stream.shape[1] if smoothing else t
    if not smoothing:
        return targets
    floor = smoothing / stream.shape[1]
    ones = torch.ones(targets.picks.shape, dtype=stream.accumulate_dtype, device=stream.device)
    values = (ones if targets.values is None else targets.values) * (1.0 - smoothing) + floor
    return Positives(targets.picks, values, targets.floor * (1.0 - smoothing) + floor)


def _class_vector(name: str, v: Tensor | None, stream: Stream) -> Tensor | None:
    if v is None:
        return None
    check_tensor(name, v)
    if not v.is_floating_point():
        raise ArgumentTypeError(f"{name}: expected a floating-point tensor, got {v.dtype}")
    if v.device != stream.device:
        raise ArgumentError(f"{name}: expected device {stream.device} (that of input), got {v.device}")
    made = class_vector(name, v, stream)
    if made is None:
        raise ArgumentError(f"{name}: expected a factor for each class, shape ({stream.shape[1]},), or one for all, got {tuple(v.shape)}")
    return made

"""Multi-token prediction: features of position t are scored against the labels at t + k for several k.

    loss = sum_k a_k mean over t of CE(s^k_t, y_{t + k})        s^k_t = softcap(logit_scale * (W_k x^k_t + b_k))

Three roads, by what is shared:

    one weight, K feature sets   one stream of K N rows: w is read once for all, dw is one buffer
    one weight, one feature set  one stream of N rows with K targets each: the same logits serve all, a K-th of the work
    K weights                    K streams

What row i of the first has for a factor is a_k / (number of valid labels of shift k). In the second the targets of a row are t_ik =
a_k / n_k where valid, and the row is a cross-entropy against t_i / |t_i| with the factor |t_i|.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.core.folds import LogSumExp, Total
from bigclass.core.repeats import Repeats
from bigclass.core.stream import Stream
from bigclass.losses.inputs import check_index, check_linear, check_range, check_smoothing, check_tensor, make_stream, open_layer, shifted
from bigclass.losses.log_prob import log_probs
from bigclass.losses.softmax import Options, Task, factor_dtype, rowwise, weighted
from bigclass.losses.targets import SparseTarget
from bigclass.parallel.classes import reduce_logits


def linear_multi_token_cross_entropy(
    input: Tensor | Sequence[Tensor],
    linear_weight: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    shifts: Sequence[int] = (1, 2, 3),
    loss_weights: Sequence[float] | None = None,
    linear_bias: Tensor | Sequence[Tensor] | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    z_loss: float = 0.0,
    grad_filter: float | None = None,
    engine: str = "auto",
    group: Any = None,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Multi-token prediction: sum_k a_k mean_t CE(s^k_t, target[t + shifts[k]]), each mean over its own valid labels. No N x C logits.

    Features and heads may be shared or not. With one weight and K feature sets (trunks of their own under one unembedding, as in the
    paper) all K are one stream: the weight is read once and its gradient is one buffer. With one of both the logits are made once for all
    K targets. Weights of their own are K losses.

    Args:
        input: (..., T, D): one feature set for every shift; or K of them, a sequence or a tensor (K, ..., T, D). Under one weight a
            sequence is stacked, a copy of the features; a contiguous tensor is not.
        linear_weight: (C, D): one head; or a sequence of K of them.
        target: (..., T) class indices, int64 or int32: with shifts from 1 on the input ids themselves.
        shifts: K >= 1 integers >= 0.
        loss_weights: K factors a_k; None: 1 each.
        linear_bias: (C,), or a sequence of K of them.
        ignore_index, label_smoothing, softcap, logit_scale, z_loss, grad_filter, engine: as in `linear_cross_entropy`.
        group: as there, of one weight, and with the same rows on all ranks.
        return_losses: also return the K means, which costs one more forward pass (2 on 6 parts of work) where the weight is shared.

    Returns:
        The loss, a scalar, fp32 (float64 for float64 inputs). With return_losses: (loss, losses (K,)); these have no gradient.
        A shift without a valid label has the loss 0: a batch may be too short for the farthest.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit. IndexError: a target outside [0, C) that is not
        ignore_index (on CUDA: a device-side assertion).

    Example:
        >>> features = [trunk(hidden) for trunk in trunks]  # 3 times (B, T, D)
        >>> loss = bigclass.linear_multi_token_cross_entropy(features, w, input_ids, shifts=(1, 2, 3))

    Gloeckle et al., "Better & Faster Large Language Models via Multi-token Prediction", arXiv:2404.19737, equation 2.
    """
    ignored = -100 if ignore_index is None else ignore_index
    factors = _factors(shifts, loss_weights, label_smoothing, z_loss)
    sets, weights = _feature_sets(input, target, len(shifts)), _heads("linear_weight", linear_weight, len(shifts))
    biases = [None] if linear_bias is None else _heads("linear_bias", linear_bias, len(shifts))
    for x, w, b in _together(sets, weights, biases):
        if group is None:
            check_linear(x, w, b)
    check_index("target", target, sets[0].device, ignored)
    labels = _labels(target, shifts, ignored)  # (K, N)
    used = labels != ignored
    options = Options(None, label_smoothing, z_loss, 0.0, ignored, engine)
    if len(weights) == len(biases) == 1:
        x = sets[0] if len(sets) == 1 else input if isinstance(input, Tensor) else torch.stack(sets)
        layer = open_layer(x, weights[0], biases[0], group)
        if layer.rows is not None or (layer.layout is not None and layer.layout.batch is not None):
            raise ArgumentError("group: rows that are spread over ranks are not offered here; spread the classes alone")
        stream = make_stream(*layer.operands, softcap, logit_scale, grad_filter=grad_filter, layer=layer)
        check_range("target", labels, used, stream.shape[1])
        share = _shares(used, stream)
        scaled = torch.stack([a * s for a, s in zip(factors, share, strict=True)])
        one = len(sets) == 1 < len(shifts)
        loss = (_of_one_set if one else _of_all_sets)(stream, labels, used, scaled, options)
        if not return_losses:
            return loss
        with torch.no_grad():
            rows = (_rows_of_one_set if one else _rows_of_all_sets)(stream, labels, used, options)
            return loss, (rows.sum(1, dtype=share.dtype) * share).to(loss.dtype)
    if group is not None:
        raise ArgumentError("group: is offered for one linear_weight and one linear_bias; of several, add up the losses of each")
    losses = []
    for (x, w, b), y, there in zip(_together(sets, weights, biases), labels, used, strict=True):
        stream = make_stream(x, w, b, softcap, logit_scale, grad_filter=grad_filter)
        check_range("target", y, there, stream.shape[1])
        losses.append(weighted(Task(stream, y, options), _shares(there, stream).expand(len(y))))
    loss = torch.stack([part if a == 1.0 else a * part for a, part in zip(factors, losses, strict=True)]).sum()
    return (loss, torch.stack(losses).detach()) if return_losses else loss


def _of_all_sets(stream: Stream, labels: Tensor, used: Tensor, scaled: Tensor, options: Options) -> Tensor:
    """The loss of K N rows, set by set, each with its label."""
    return weighted(Task(stream, labels.reshape(-1), options), scaled.unsqueeze(1).expand(labels.shape).reshape(-1))


def _rows_of_all_sets(stream: Stream, labels: Tensor, used: Tensor, options: Options) -> Tensor:
    return rowwise(Task(stream, labels.reshape(-1), options)).view(labels.shape)


def _of_one_set(stream: Stream, labels: Tensor, used: Tensor, scaled: Tensor, options: Options) -> Tensor:
    """The loss of N rows with K labels each: of row i a cross-entropy against t_i / |t_i|, times |t_i|."""
    t = torch.where(used, scaled.unsqueeze(1), 0.0).t()  # (N, K)
    mass = t.sum(1)
    shares = t / torch.where(mass > 0, mass, 1.0).unsqueeze(1)
    target = SparseTarget(_classes(labels, used, stream.shape[1]), shares, stream.shape[1])
    return weighted(Task(stream, target, options), mass, keep=mass > 0)


def _rows_of_one_set(stream: Stream, labels: Tensor, used: Tensor, options: Options) -> Tensor:
    """(K, N): the loss of each label of each row."""
    eps, z = options.smoothing, options.z_loss
    repeats = Repeats.of(_classes(labels, used, stream.shape[1]))
    picks = repeats.distinct
    folds = (LogSumExp(exclude_picks=True), *((Total(),) if eps else ()))
    states, picked = reduce_logits(stream, picks, folds, keep=used.any(0), engine=options.engine)
    assert picked is not None
    logp = log_probs(states[0], picked, picks >= 0)
    lse, logp = repeats.copied(picked - logp), repeats.copied(logp)
    rows = (1.0 - eps) * -logp
    if eps:
        rows = rows + eps * (lse - states[1][0].unsqueeze(1) / stream.shape[1])
    if z:
        rows = rows + z * lse.square()
    return torch.where(used, rows.t(), 0.0)


def _classes(labels: Tensor, used: Tensor, classes: int) -> Tensor:
    """Picks (N, K) for labels (K, N): -1 where ignored, C (which the op refuses) for any other negative one."""
    return torch.where(used, torch.where(labels < 0, classes, labels), -1).t()


def _shares(used: Tensor, stream: Stream) -> Tensor:
    """1 / (number of labels that count) along the last axis; 1 where there is none."""
    return 1.0 / used.sum(-1).clamp_min(1).to(factor_dtype(stream))


def _together(sets: list[Tensor], weights: list[Tensor], biases: list[Any]) -> list[tuple[Tensor, Tensor, Any]]:
    """(features, weight, bias) of each shift; of all, if nothing has parts."""
    k = max(len(sets), len(weights), len(biases))
    return [(sets[i % len(sets)], weights[i % len(weights)], biases[i % len(biases)]) for i in range(k)]


def _factors(shifts: Sequence[int], loss_weights: Sequence[float] | None, label_smoothing: float, z_loss: float) -> list[float]:
    """The factors of the K losses. Raise for numbers that cannot be."""
    if not isinstance(shifts, Sequence) or not shifts:
        raise ArgumentError(f"shifts: expected a sequence of at least one integer >= 0, got {shifts!r}")
    check_smoothing(label_smoothing, z_loss)
    factors = [1.0] * len(shifts) if loss_weights is None else list(loss_weights)
    if len(factors) != len(shifts) or not all(isinstance(a, int | float) and 0.0 <= a < math.inf for a in factors):
        raise ArgumentError(f"loss_weights: expected {len(shifts)} finite numbers >= 0, one a shift, got {loss_weights}")
    return factors


def _feature_sets(input: Tensor | Sequence[Tensor], target: Tensor, k: int) -> list[Tensor]:
    """One tensor (..., T, D), or K of them."""
    check_tensor("target", target)
    one = isinstance(input, Tensor) and input.dim() != target.dim() + 2
    sets: list[Any] = [input] if one else list(input)
    for x in sets:
        check_tensor("input", x)
    if len(sets) not in (1, k) or any(x.shape[:-1] != target.shape for x in sets):
        raise ArgumentError(
            f"input: expected features (..., T, D) for target (..., T) = {tuple(target.shape)}, or {k} of them, one a shift, got "
            f"{tuple(sets[0].shape) if one else [tuple(x.shape) for x in sets]}"
        )
    return sets


def _heads(name: str, given: Tensor | Sequence[Tensor], k: int) -> list[Tensor]:
    """One tensor, or K of them."""
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        return [given]  # type: ignore[list-item]
    heads = list(given)
    if len(heads) != k:
        raise ArgumentError(f"{name}: expected a tensor or {k} of them, one a shift, got {len(heads)}")
    return heads


def _labels(target: Tensor, shifts: Sequence[int], ignored: int) -> Tensor:
    """(K, N): the label of each row at each shift."""
    return torch.stack([shifted("target", target.long(), shift, ignored)[0].reshape(-1) for shift in shifts])

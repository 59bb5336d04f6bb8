"""Log-sum-exp, log-probabilities of selected classes and of sequences, entropy and top-k of a linear layer, as functions of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import LogSumExp, ShiftedMoment, State, entropy, log_sum, log_sum_exp
from bigclass.core.repeats import Repeats
from bigclass.core.topk import TopK
from bigclass.losses.inputs import check_index, check_range, kept_rows, make_stream, open_layer, shifted
from bigclass.losses.lora import Adapters, adapter_pairs
from bigclass.losses.softmax import beside_largest, certain_is_nan, others
from bigclass.parallel.classes import reduce_logits
from bigclass.parallel.layer import Layer


def linear_logsumexp(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    index: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    lora: Adapters | None = None,
    grad_filter: float | None = None,
    engine: str = "auto",
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""LSE_i = log sum_j exp(s_ij) over all classes and, if asked, the logits s at given classes. Both differentiable.

    The primitive that other losses are arithmetic on; s = softcap(logit_scale * (input @ linear_weight.T + linear_bias)).
    A picked logit is rounded exactly as in the sum: none exceeds its own LSE.

    Args:
        input: (..., D). linear_weight: (C, D). linear_bias: (C,).
        index: (..., K) or (...) class indices, int64 or int32; -1 picks nothing and returns 0.
        softcap, logit_scale, lora, engine, group: as in `linear_cross_entropy`.
        grad_filter: as there; the targets are what `index` names. A loss that reads the logits at targets asks for them here, then, and not
            elsewhere: beside a target's entry the rest of its row would pass for negligible.

    Returns:
        lse (...), fp32 (float64 for float64 inputs); with index: (lse, logits), the logits in index's shape.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit. IndexError: an index outside [-1, C).

    Example:
        >>> lse, at = bigclass.linear_logsumexp(x, w, index=y)  # cross-entropy is lse - at
    """
    layer, pairs = _layer(input, linear_weight, linear_bias, lora, group)
    input, index = layer.input, layer.gather(index)
    lead = input.shape[:-1]
    picks = None if index is None else _picks(index, lead, input)
    if picks is not None and index is not None:
        check_range("index", picks, picks != -1, layer.classes)
    stream = make_stream(*layer.operands, softcap, logit_scale, pairs=pairs, grad_filter=grad_filter, layer=layer)
    (state,), picked = reduce_logits(stream, picks, (LogSumExp(),), engine=engine)
    lse = log_sum_exp(state)
    lse = lse.masked_fill(state[0] == torch.inf, torch.inf).reshape(lead)
    return layer.own(lse) if picked is None or index is None else (layer.own(lse), layer.own(picked.reshape(index.shape)))


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    shift: int = 0,
    temperature: float = 1.0,
    return_entropy: bool = False,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    lora: Adapters | None = None,
    ignore_index: int = -100,
    grad_filter: float | None = None,
    engine: str = "auto",
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""log p(index) under softmax(s / temperature) and, if asked, the exact entropy. Both differentiable.

    For policy gradients, DPO, GRPO: one forward pass over the classes gives both. log p never exceeds 0, and near-certain
    choices keep their digits: log p_k = log sigmoid(s_k - LSE of all but k), which does not cancel.

    Args:
        input: (..., D). linear_weight: (C, D). linear_bias: (C,).
        index: (...) or (..., K) class indices, int64 or int32; an index may stand several times in a row.
        shift: k > 0 scores position t's features at index[t + k] (the axis T is the last of (..., T), or of the leading ones of
            (..., T, K)), as in `linear_cross_entropy`, without slicing copies. The results have T - k positions.
        temperature: > 0; divides the (soft-capped) logits.
        return_entropy: also return the entropy of each row in nats, (...).
        ignore_index: where index has this value, log p is 0. A row without any other index contributes nothing, not even if it holds NaN,
            and its entropy is 0. (Where there is no index at all, K = 0, every row counts.)
        softcap, logit_scale, lora, grad_filter, engine, group: as in `linear_cross_entropy`.

    Returns:
        log-probabilities in index's shape, fp32 (float64 for float64 inputs); with return_entropy: (log-probabilities, entropy).
        Their gradients, of rows and not of one sum, make the logits again (8NCD flops in all) and take little memory.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit. IndexError: an index outside [0, C).

    Example:
        >>> logp, entropy = bigclass.linear_log_prob(hidden, w, actions, return_entropy=True)
    """
    layer, pairs = _layer(input, linear_weight, linear_bias, lora, group)
    input, index = layer.input, layer.gather(index)
    if isinstance(temperature, Tensor) or not 0.0 < temperature < math.inf:  # of a tensor its gradient would be lost
        raise ArgumentError(f"temperature: expected a finite number greater than 0 (one to learn is a logit_scale), got {temperature!r}")
    lead, classes = input.shape[:-1], layer.classes
    check_index("index", index, input.device, ignore_index)
    _check_rows(index, lead)
    axis = -2 if index.dim() > len(lead) else -1
    if shift:
        layer.refuse_cut(len(lead) - 1)
    index, cut = shifted("index", index, shift, ignore_index, axis)
    picks = _picks(index, lead, input)
    used = picks != ignore_index
    check_range("index", picks, used, classes)
    picks = torch.where(used, torch.where(picks < 0, classes, picks), -1)
    keep = kept_rows(picks.amax(1), -1) if picks.shape[1] else None
    repeats = None if picks.shape[1] == 1 else Repeats.of(picks)
    asked = picks if repeats is None else repeats.distinct
    stream = make_stream(*layer.operands, softcap, logit_scale, float(temperature), pairs, grad_filter, layer)
    folds = (LogSumExp(exclude_picks=True), *((ShiftedMoment(),) if return_entropy else ()))
    states, picked = reduce_logits(stream, asked, folds, keep=keep, engine=engine)
    assert picked is not None
    logp = log_probs(states[0], picked, asked >= 0)
    logp = logp if repeats is None else repeats.copied(logp)
    logp = layer.own(torch.where(picks >= 0, logp, 0.0).reshape(index.shape))
    logp = logp if cut is None else logp.narrow(axis, 0, cut)
    if not return_entropy:
        return logp
    h = entropy(states[1])
    h = layer.own((h if keep is None else torch.where(keep, h, 0.0)).reshape(lead))
    return logp, (h if cut is None else h[..., :cut])


def linear_sequence_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    labels: Tensor,
    *,
    shift: int = 1,
    ignore_index: int = -100,
    average: bool = False,
    temperature: float = 1.0,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    grad_filter: float | None = None,
    engine: str = "auto",
    group: Any = None,
) -> Tensor:
    r"""log p of whole sequences, sum over t of log p(labels[t + shift] | position t). Differentiable; what DPO and its relatives compare.

    Args:
        input: features (..., T, D). linear_weight: (C, D). linear_bias: (C,).
        labels: (..., T) token indices, int64 or int32. With the default shift they are the input ids themselves.
        shift: 1: position t's features are scored at labels[t + 1]; 0 if labels are shifted already.
        ignore_index: labels that do not count: the prompt, padding. Their rows contribute nothing, not even if they hold NaN.
        average: divide each sum by the number of its labels that count (as IPO and SimPO do).
        temperature: > 0; divides the (soft-capped) logits.
        softcap, logit_scale, grad_filter, engine, group: as in `linear_cross_entropy`.

    Returns:
        (...), fp32 (float64 for float64 inputs). A sequence without a label that counts has 0, and no gradient.
        Gradients cost what those of `linear_log_prob` do: each sequence has its own upstream gradient, which the forward cannot know.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit. IndexError: a label outside [0, C).

    Example:
        >>> chosen = bigclass.linear_sequence_log_prob(hidden, w, labels)  # hidden (B, T, D), labels (B, T) -> (B,)

    Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290, equation 7.
    """
    check_index("labels", labels, input.device, ignore_index)
    if input.dim() < 2 or labels.shape != input.shape[:-1]:
        raise ArgumentError(
            f"labels: expected token indices of shape (..., T) for input (..., T, D) = {tuple(input.shape)}, got {tuple(labels.shape)}"
        )
    logp = linear_log_prob(
        input, linear_weight, labels, shift=shift, temperature=temperature, linear_bias=linear_bias, softcap=softcap,
        logit_scale=logit_scale, ignore_index=ignore_index, grad_filter=grad_filter, engine=engine, group=group,
    )  # fmt: skip
    assert isinstance(logp, Tensor)
    total = logp.sum(-1)
    return total / (labels[..., int(shift) :] != ignore_index).sum(-1).clamp_min(1) if average else total


def linear_topk(
    input: Tensor,
    linear_weight: Tensor,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    lora: Adapters | None = None,
    return_log_probs: bool = False,
    engine: str = "auto",
    group: Any = None,
) -> tuple[Tensor, ...]:
    r"""The k largest logits of each row and their classes, in descending order, without the N x C logits.

    Prediction: no gradients. (For gradients give the indices to `linear_logsumexp` or `linear_log_prob`.)

    Args:
        input: (..., D). linear_weight: (C, D). linear_bias: (C,). k: 1 <= k <= C.
        return_log_probs: also return the log-probabilities of the k classes, from the same pass.
        softcap, logit_scale, lora, engine, group: as in `linear_cross_entropy`.

    Returns:
        values (..., k) in fp32 (float64 for float64 inputs), indices (..., k) in int64 [, log-probabilities (..., k)].
        Which of several equal logits is returned is not specified.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or k that do not fit.

    Example:
        >>> values, classes = bigclass.linear_topk(features, w, 5)
    """
    if not isinstance(k, int):
        raise ArgumentTypeError(f"k: expected an integer, got {k!r}")
    with torch.no_grad():
        layer, pairs = _layer(input, linear_weight, linear_bias, lora, group)
        if not 1 <= k <= layer.classes:
            raise ArgumentError(f"k: expected 1 <= k <= {layer.classes} (the number of classes), got {k}")
        lead = layer.input.shape[:-1]
        stream = make_stream(*layer.operands, softcap, logit_scale, pairs=pairs, layer=layer)
        folds = (TopK((float(k),)), *((LogSumExp(),) if return_log_probs else ()))
        states, _ = reduce_logits(stream, None, folds, engine=engine)
        values, indices = (t.reshape(*lead, k) for t in states[0])
        if not return_log_probs:
            return layer.own(values), layer.own(indices)
        m, log_l = states[1][0], log_sum(states[1])
        log_probs = (values - m.reshape(lead).unsqueeze(-1)) - log_l.reshape(lead).unsqueeze(-1)
        return layer.own(values), layer.own(indices), layer.own(log_probs)


def _layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, lora: Adapters | None, group: Any) -> tuple[Layer, Any]:
    """The layer, and the operands of its adapters."""
    layer = open_layer(input, linear_weight, linear_bias, group)
    if lora is not None:
        layer.whole("lora")
    return layer, adapter_pairs(layer.input, layer.weight, lora)


def _picks(index: Tensor, lead: torch.Size, input: Tensor) -> Tensor:
    """index as (N, K)."""
    check_index("index", index, input.device)
    _check_rows(index, lead)
    rows = lead.numel()
    return index.long().reshape(rows, 1 if index.shape == lead else index.shape[-1])


def _check_rows(index: Tensor, lead: torch.Size) -> None:
    if index.shape != lead and index.shape[:-1] != lead:
        raise ArgumentError(f"index: expected shape {tuple(lead)} or {tuple(lead)} + (K,), got {tuple(index.shape)}")


def log_probs(rest: State, picked: Tensor, there: Tensor) -> Tensor:
    """(N, K) log p of the picks that are there; rest: the `LogSumExp` of a row's logits without them."""
    s = certain_is_nan(picked)
    if picked.shape[1] == 1:
        return F.logsigmoid((s - rest[0].unsqueeze(1)) - log_sum(rest).unsqueeze(1))
    least = torch.finfo(picked.dtype).min
    s, apart, top = beside_largest(rest, torch.where(there, s, least))
    s = s.masked_fill((top <= least).unsqueeze(1), torch.nan)  # every logit -inf: as in torch
    return F.logsigmoid(s - others(apart, s))

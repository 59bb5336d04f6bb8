"""Log-sum-exp, selected log-probabilities, entropy and top-k of a linear layer, as functions of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import LogSumExp, ShiftedMoment, entropy, log_sum, log_sum_exp
from bigclass.core.op import reduce_logits
from bigclass.core.topk import TopK
from bigclass.losses.inputs import check_index, check_linear, check_range, kept_rows, make_stream
from bigclass.losses.lora import Adapters, adapter_pairs


def linear_logsumexp(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    index: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    lora: Adapters | None = None,
    engine: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""LSE_i = log sum_j exp(s_ij) over all classes and, if asked, the logits s at given classes. Both differentiable.

    The primitive that other losses are arithmetic on; s = softcap(logit_scale * (input @ linear_weight.T + linear_bias)).
    A picked logit is rounded exactly as in the sum: none exceeds its own LSE.

    Args:
        input: (..., D). linear_weight: (C, D). linear_bias: (C,).
        index: (..., K) or (...) class indices, int64 or int32; -1 picks nothing and returns 0.
        softcap, logit_scale, lora, engine: as in `linear_cross_entropy`.

    Returns:
        lse (...), fp32 (float64 for float64 inputs); with index: (lse, logits), the logits in index's shape.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit. IndexError: an index outside [-1, C).

    Example:
        >>> lse, at = bigclass.linear_logsumexp(x, w, index=y)  # cross-entropy is lse - at
    """
    check_linear(input, linear_weight, linear_bias)
    lead = input.shape[:-1]
    picks = None if index is None else _picks(index, lead, input)
    if picks is not None and index is not None:
        check_range("index", picks, picks != -1, linear_weight.shape[0])
    pairs = adapter_pairs(input, linear_weight, lora)
    stream = make_stream(input, linear_weight, linear_bias, softcap, logit_scale, pairs=pairs)
    (state,), picked = reduce_logits(stream, picks, (LogSumExp(),), engine=engine)
    lse = log_sum_exp(state)
    lse = lse.masked_fill(state[0] == torch.inf, torch.inf).reshape(lead)
    return lse if picked is None or index is None else (lse, picked.reshape(index.shape))


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    lora: Adapters | None = None,
    ignore_index: int = -100,
    engine: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""log p(index) under softmax(s / temperature) and, if asked, the exact entropy. Both differentiable.

    For policy gradients, DPO, GRPO: one forward pass over the classes gives both. log p never exceeds 0, and near-certain
    choices keep their digits: with one index a row, log p = log sigmoid(s - LSE without the index), which does not cancel.

    Args:
        input: (..., D). linear_weight: (C, D). linear_bias: (C,).
        index: (...) or (..., K) class indices, int64 or int32.
        temperature: > 0; divides the (soft-capped) logits.
        return_entropy: also return the entropy of each row in nats, (...).
        ignore_index: where index has this value, log p is 0. Of a single index a row: its entropy too, and the row contributes nothing.
        softcap, logit_scale, lora, engine: as in `linear_cross_entropy`.

    Returns:
        log-probabilities in index's shape, fp32 (float64 for float64 inputs); with return_entropy: (log-probabilities, entropy).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit. IndexError: an index outside [0, C).

    Example:
        >>> logp, entropy = bigclass.linear_log_prob(hidden, w, actions, return_entropy=True)
    """
    check_linear(input, linear_weight, linear_bias)
    if not temperature > 0:
        raise ArgumentError(f"temperature: expected a value greater than 0, got {temperature}")
    lead, classes = input.shape[:-1], linear_weight.shape[0]
    check_index("index", index, input.device, ignore_index)
    picks = _picks(index, lead, input)
    used = picks != ignore_index
    check_range("index", picks, used, classes)
    picks = torch.where(used, torch.where(picks < 0, classes, picks), -1)
    single = picks.shape[1] == 1
    keep = kept_rows(picks[:, 0], -1) if single else None
    pairs = adapter_pairs(input, linear_weight, lora)
    stream = make_stream(input, linear_weight, linear_bias, softcap, logit_scale, float(temperature), pairs)
    folds = (LogSumExp(exclude_picks=single), *((ShiftedMoment(),) if return_entropy else ()))
    states, picked = reduce_logits(stream, picks, folds, keep=keep, engine=engine)
    assert picked is not None
    m, log_l = states[0][0].unsqueeze(-1), log_sum(states[0]).unsqueeze(-1)
    if single:
        # a logit of +inf: NaN as in torch, where the excluded form alone would call it certain
        logp = F.logsigmoid((picked.masked_fill(picked == torch.inf, torch.nan) - m) - log_l)
    else:
        logp = (picked - m) - log_l
    logp = torch.where(picks >= 0, logp, 0.0).reshape(index.shape)
    if not return_entropy:
        return logp
    h = entropy(states[1])
    return logp, (h if keep is None else torch.where(keep, h, 0.0)).reshape(lead)


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
) -> tuple[Tensor, ...]:
    r"""The k largest logits of each row and their classes, in descending order, without the N x C logits.

    Prediction: no gradients. (For gradients give the indices to `linear_logsumexp` or `linear_log_prob`.)

    Args:
        input: (..., D). linear_weight: (C, D). linear_bias: (C,). k: 1 <= k <= C.
        return_log_probs: also return the log-probabilities of the k classes, from the same pass.
        softcap, logit_scale, lora, engine: as in `linear_cross_entropy`.

    Returns:
        values (..., k) in fp32 (float64 for float64 inputs), indices (..., k) in int64 [, log-probabilities (..., k)].
        Which of several equal logits is returned is not specified.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or k that do not fit.

    Example:
        >>> values, classes = bigclass.linear_topk(features, w, 5)
    """
    check_linear(input, linear_weight, linear_bias)
    if not isinstance(k, int):
        raise ArgumentTypeError(f"k: expected an integer, got {k!r}")
    if not 1 <= k <= linear_weight.shape[0]:
        raise ArgumentError(f"k: expected 1 <= k <= {linear_weight.shape[0]} (the number of classes), got {k}")
    shape = (*input.shape[:-1], k)
    with torch.no_grad():
        pairs = adapter_pairs(input, linear_weight, lora)
        stream = make_stream(input, linear_weight, linear_bias, softcap, logit_scale, pairs=pairs)
        folds = (TopK((float(k),)), *((LogSumExp(),) if return_log_probs else ()))
        states, _ = reduce_logits(stream, None, folds, engine=engine)
        values, indices = (t.reshape(shape) for t in states[0])
        if not return_log_probs:
            return values, indices
        m, log_l = states[1][0], log_sum(states[1])
        lead = input.shape[:-1]
        return values, indices, (values - m.reshape(lead).unsqueeze(-1)) - log_l.reshape(lead).unsqueeze(-1)


def _picks(index: Tensor, lead: torch.Size, input: Tensor) -> Tensor:
    """index as (N, K)."""
    check_index("index", index, input.device)
    if index.shape != lead and index.shape[:-1] != lead:
        raise ArgumentError(f"index: expected shape {tuple(lead)} or {tuple(lead)} + (K,), got {tuple(index.shape)}")
    rows = lead.numel()
    return index.long().reshape(rows, 1 if index.shape == lead else index.shape[-1])

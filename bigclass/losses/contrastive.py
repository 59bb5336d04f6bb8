"""Contrastive losses of two sets of features, without their N x M matrix of logits: InfoNCE (CLIP) and the pairwise sigmoid (SigLIP).

    s_ij = scale <a_i, b_j> + bias        images a (N, D), texts b (M, D); P_i the positives of image i, Q_j those of text j

    softmax    mean_i [ LSE_j s_ij - mean of s over P_i ] / 2  +  mean_j [ LSE_i s_ij - mean of s over Q_j ] / 2
    sigmoid    sum_ij softplus(-z_ij s_ij) / N                       z = 1 for positives, -1 else

Both directions of the softmax come from one pass over the tiles, a log-sum-exp of rows and one of columns, and one pass that makes the
tiles again for both gradients: 8NMD flops (two cross-entropies take 12 dense). The columns' sums need the whole matrix, so gradients
cannot be made in the forward; one direction alone (`direction`) can, at 6NMD, and so can the sigmoid. Memory: N + M numbers and the tiles.

The positives are left out of both sums, R_i (C_j) over the rest, so that a confident pair keeps its digits:

    row i:  softplus(R_i - P) + (P - mean of s over P_i)        P the log-sum-exp of the positives, which for one positive is its logit

Over ranks (`group`) each folds its own images against all texts. Rows are complete, columns are merged by an all-reduce of two numbers
each, and the gradient of the texts goes back to their owners (parallel/spread.py has flops and bytes).

Radford et al., CLIP, arXiv:2103.00020; Zhai et al., SigLIP, arXiv:2303.15343; several positives: Khosla et al., arXiv:2004.11362 (L_out).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.core.folds import Fold, LogSumExp, State, log_sum, log_sum_exp
from bigclass.core.op import reduce_logits, stream_loss
from bigclass.core.row_losses import ROW_LOSSES, register_row_loss
from bigclass.core.stream import Stream
from bigclass.losses.one_vs_all import LOSSES
from bigclass.losses.pairs import Batch, Means
from bigclass.losses.softmax import certain_is_nan
from bigclass.parallel.collectives import gather_rows, merge_states, replicated, sum_over
from bigclass.parallel.spread import choose_exchange

DIRECTIONS = ("both", "image", "text")
_ROWS, _COLUMNS = LogSumExp(exclude_picks=True), LogSumExp(exclude_picks=True, axis="columns")


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    logit_bias: float | Tensor | None = None,
    positives: Any = None,
    ignore: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    direction: str = "both",
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "auto",
    check_norms: bool = False,
    grad_filter: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Symmetric InfoNCE, the loss of CLIP, without the matrix of logits.

    Args:
        image_features: (N, D), usually of length 1. text_features: (M, D).
        logit_scale: what similarities are multiplied by, 1/temperature (already exponentiated): a number > 0, or a tensor of shape () or
            (1,), which gets its gradient. A tensor's value is not looked at.
        logit_bias: added to all logits. A softmax does not see it: the loss is the same, its gradient exactly 0.
        positives: which texts belong to an image. None: text i to image i, and N = M. Else indices of texts, (N,) or (N, K) padded with
            -1, or another of the sparse forms of `linear_binary_cross_entropy`. An image's loss is the mean over its positives, all of
            which stand in the denominator; images and texts without any have no loss of their own.
        ignore: (N, Q) indices of texts that are neither positive nor negative of an image (copies of its caption, say), -1 for none.
        hard_negatives: (H, D) more texts, which are negatives of every image.
        direction: "both"; "image": each image among the texts only, "text": each text among the images only (their mean, not halved).
        reduction: "mean"; "sum": over images and texts, halved for "both"; "none": (N,) the mean of a pair's two losses (without
            `positives`), or the (N,) or (M + H,) losses of one direction.
        group: a ProcessGroup or a DeviceMesh of one axis: the loss of the whole batch, of which each rank has a part (of any size).
            Every rank gets its value. Gradients of the features are those of the loss times the number of ranks, so that averaged over
            ranks, as DistributedDataParallel and FSDP do, those of the parameters are exact; that of the scale is exact on each.
            `positives` and `ignore` then count the texts of all ranks, rank after rank, each with its hard negatives behind its texts.
            What all ranks could know is refused on all; an error that one rank alone has (a positive out of range) leaves the others
            waiting, as in any collective.
        exchange: how ranks see each other's texts: "gather", "ring" (never holds them all), "auto" (by size).
        check_norms: raise for features whose length is not 1 within 1 %.
        grad_filter: as in `linear_cross_entropy`, rows being images (texts for direction="text") and targets their positives; texts of
            `ignore` count as such. With group= each rank's blocks of rows keep the promise over the texts of all ranks.
        engine: "auto", "dense", "tiled" or "fused".

    Returns:
        The loss, in float32 (float64 for float64 features).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, options or groups that do not fit. IndexError: a positive outside [0, M).

    NaN in the features makes the loss NaN, as in the dense form; a negative scale tensor is used as it is.

    Example:
        >>> loss = bigclass.contrastive_loss(image_features, text_features, model.logit_scale.exp())
    """
    if direction not in DIRECTIONS:
        raise ArgumentError(f"direction: expected one of {DIRECTIONS}, got {direction!r}")
    batch = Batch.of(image_features, text_features, logit_scale, logit_bias, positives, ignore, hard_negatives, reduction, group, exchange,
                     engine, check_norms, grad_filter)  # fmt: skip
    if reduction == "none" and direction == "both" and not batch.diagonal:
        raise ArgumentError("reduction: with positives= images and texts do not pair up; choose direction='image' or 'text' for 'none'")
    return softmax_loss(batch, direction)


def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    positives: Any = None,
    ignore: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "auto",
    check_norms: bool = False,
    grad_filter: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP, without the matrix of logits: every pair of an image and a text is a binary problem.

    Args:
        image_features, text_features, logit_scale, positives, ignore, hard_negatives, group, exchange, check_norms,
            grad_filter, engine: as in `contrastive_loss`. Texts that no image claims are negatives of all.
        logit_bias: added to all logits, a number or a tensor of shape () or (1,), which gets its gradient. The paper begins at -10.
        reduction: "mean": the sum over pairs divided by the number of images (SigLIP's); "sum"; "none": (N,), each summed over texts.

    Returns, Raises: as `contrastive_loss`.

    Example:
        >>> loss = bigclass.sigmoid_contrastive_loss(image_features, text_features, log_scale.exp(), bias)
    """
    batch = Batch.of(image_features, text_features, logit_scale, logit_bias, positives, ignore, hard_negatives, reduction, group, exchange,
                     engine, check_norms, grad_filter)  # fmt: skip
    return sigmoid_loss(batch)


def _gap(rest: State, at: Tensor) -> Tensor:
    """softplus(log-sum-exp of the rest - at), with all its digits on both sides."""
    return -F.logsigmoid((certain_is_nan(at) - rest[0]) - log_sum(rest))


def _spread(top: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """The log-sum-exp of positives less their mean. Of one it is 0, and so is its gradient: 1 - 1 would round what stands beside it."""
    return torch.where(count > 1, top - total / count.clamp_min(1), 0.0)


@register_row_loss("info_nce")
def info_nce_row_loss(folds, picked, args, numbers):
    """args: (N,) factor, (N, K) which positives there are. picked: (N, K + Q)."""
    factor, there = args
    p = picked[:, : there.shape[1]]
    if there.shape[1] == 1:
        return torch.where(there[:, 0] > 0, factor * _gap(folds[0], p[:, 0]), 0.0)
    count = there.sum(1)
    inside = torch.where(there > 0, p, torch.finfo(p.dtype).min)
    top = inside.logsumexp(1)
    loss = _gap(folds[0], top) + _spread(top, (p * there).sum(1), count)
    return torch.where(count > 0, factor * loss, 0.0)


def softmax_loss(batch: Batch, direction: str = "both", means: Means | None = None) -> Tensor:
    """`contrastive_loss` of a batch."""
    loss = _softmax_loss(batch, direction, means or Means())
    if isinstance(batch.bias, Tensor):  # a softmax does not see it
        loss = loss + batch.bias.sum().to(loss.dtype) * 0.0
    return loss


def _softmax_loss(batch: Batch, direction: str, means: Means) -> Tensor:
    stream, ranks, reduction = batch.stream, batch.ranks, batch.reduction
    if ranks is None and direction == "text" and batch.diagonal and batch.picks.shape[1] == 1 and batch.texts == batch.images:
        # the columns of this matrix are the rows of its transpose, whose gradients can be made in the forward
        (x, w), direction = stream.pairs[0], "image"
        stream = replace(stream, pairs=((w, x),))
    wide = stream.accumulate_dtype
    there = (batch.picks[:, : batch.count] >= 0).to(wide)
    if ranks is None and direction == "image" and reduction != "none":
        factor = there.new_ones((), dtype=batch.exact).expand(batch.images)
        count = (there.sum(1) > 0).sum() if reduction == "mean" else 1
        keep = None if batch.diagonal else there.sum(1) > 0  # an image without a positive is no part of this direction
        loss = stream_loss(stream, batch.picks, [_ROWS], "info_nce", [factor / count, there], keep=keep, engine=batch.engine)
        return loss + 0.0 / count  # the mean of nothing is NaN
    parts = _parts(batch, replace(batch, stream=stream).shared(means), there, direction)
    if reduction == "none":
        losses = [loss for loss, _ in parts]
        # behind the texts stand the hard negatives, which have no loss
        return (losses[0] + losses[1][: batch.images]) / 2 if direction == "both" else losses[0]
    if means.local and ranks is not None:
        rows, columns = (loss.to(batch.exact) for loss, _ in parts)
        own = columns.split(list(batch.sizes))[ranks.rank]
        # those of the other ranks are no part of this rank's value, but of the gradient
        others = columns.sum() / own.shape[0] - own.mean()
        return ((rows.mean() + own.mean() + torch.where(others.isfinite(), others - others.detach(), 0.0)) / 2).to(wide)
    sums = [loss.to(batch.exact).sum() / (count if reduction == "mean" else 1) for loss, count in parts]
    first = batch.total(sums[0]) if direction != "text" else sums[0]
    whole = first if len(sums) == 1 else (first + sums[1]) / 2
    return whole.to(wide)


def _parts(batch: Batch, stream: Stream, there: Tensor, direction: str) -> list[tuple[Tensor, Tensor | int]]:
    """(losses, how many of them count over all ranks): (N,) of this rank's images, then (M,) of the texts of all ranks."""
    folds: list[Fold] = [f for f, name in ((_ROWS, "image"), (_COLUMNS, "text")) if direction in ("both", name)]
    states, picked = batch.fold(stream, folds)
    parts: list[tuple[Tensor, Tensor | int]] = []
    if direction != "text":
        one = there.new_ones(()).expand(there.shape[0])
        count = (there.sum(1) > 0).sum()
        parts.append((ROW_LOSSES["info_nce"]([states[0]], picked, [one, there], ()), batch.total(count)))
    if direction != "image":
        parts.append(_columns(batch, states[-1], picked[:, : batch.count]))
    return parts


def _columns(batch: Batch, rest: State, p: Tensor) -> tuple[Tensor, Tensor | int]:
    """The losses (M,) of the texts of all ranks and how many have a positive. p: (N, K)."""
    ranks, m = batch.ranks, batch.texts
    if ranks is None and batch.diagonal and m == batch.images:
        return _gap(rest, p[:, 0]), m
    state, total, count = _by_column(p, batch.picks[:, : batch.count], m)
    if ranks is not None:
        rest, state = merge_states(_COLUMNS, rest, ranks), merge_states(LogSumExp(), state, ranks)
        total, count = sum_over(total, ranks), sum_over(count, ranks)
    has = count > 0
    top = torch.where(has, log_sum_exp(state), 0.0)
    loss = _gap(rest, top) + _spread(top, total, count)
    return torch.where(has, loss, 0.0), has.sum()


def _by_column(p: Tensor, picks: Tensor, m: int) -> tuple[State, Tensor, Tensor]:
    """Of the picked logits p (N, K) of each column: their log-sum-exp's state, their sum, their number, (M,) each.

    Sorted and summed by segments: same bits every run, which adding at indices is not on a GPU."""
    key = torch.where(picks < 0, m, picks).flatten()
    key, order = key.sort(stable=True)
    values = p.flatten()[order]
    count = torch.zeros(m + 1, dtype=torch.int64, device=p.device).scatter_add(0, key, torch.ones_like(key))

    def segments(t: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(t, how, lengths=count, unsafe=True)

    top = segments(values.detach(), "max")
    mass = segments((values - top[key]).exp(), "sum")
    return (top[:m], mass[:m]), segments(values, "sum")[:m], count[:m]


def sigmoid_loss(batch: Batch, means: Means | None = None) -> Tensor:
    """`sigmoid_contrastive_loss` of a batch."""
    ranks, reduction, bce, means = batch.ranks, batch.reduction, LOSSES["bce"], means or Means()
    stream = batch.shared(means)
    wide, n = stream.accumulate_dtype, stream.shape[0]
    if batch.bias is not None:
        bias = batch.bias if isinstance(batch.bias, Tensor) else stream.tensors[0].new_full((), float(batch.bias), dtype=wide)
        bias = bias.reshape(1) if ranks is None or not bias.requires_grad else replicated(bias.reshape(1), ranks, means.factors(ranks)[1])
        stream = replace(stream, bias=bias, bias_last=True)
    fold = bce.negatives[False](exclude_picks=True)
    there = (batch.picks >= 0).to(wide)
    there[:, batch.count :] = 0.0
    images = (n if means.local else batch.images) if reduction == "mean" else 1
    of = there.new_full((), images, dtype=batch.exact)  # no number: in a graph of any batch size nothing may depend on it
    factor = (1.0 / of).expand(n)
    gathers = ranks is not None and choose_exchange(batch.exchange, stream.pairs[0][1], batch.sizes) == "gather"
    if gathers and ranks is not None:
        x, w = stream.pairs[0]
        compute = stream.compute_dtype or torch.promote_types(x.dtype, w.dtype)  # of the products; what is gathered is wider
        stream = replace(stream, pairs=((x, gather_rows(w, batch.sizes, ranks)),), compute_dtype=compute)
    if ranks is None or gathers:
        stream = stream if stream.bias is None else replace(stream, bias=stream.bias.expand(stream.shape[1]))
        if reduction == "none":
            states, picked = reduce_logits(stream, batch.picks, [fold], engine=batch.engine)
            return ROW_LOSSES[bce.row_loss](states, picked, [factor, there], ()).to(wide)
        loss = stream_loss(stream, batch.picks, [fold], bce.row_loss, [factor, there], engine=batch.engine)
    else:
        states, picked = batch.fold(stream, [fold])
        loss = ROW_LOSSES[bce.row_loss](states, picked, [factor, there], ()).sum()
    whole = loss if means.local else batch.total(loss.to(batch.exact))
    return (whole + 0.0 / of).to(wide)  # the mean of nothing is NaN

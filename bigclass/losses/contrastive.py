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

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import Fold, LogSumExp, State, log_sum, log_sum_exp
from bigclass.core.op import reduce_logits, spread_engine, stream_loss
from bigclass.core.plan import settings
from bigclass.core.problem import assert_picks
from bigclass.core.row_losses import ROW_LOSSES, register_row_loss
from bigclass.core.stream import Stream
from bigclass.losses.inputs import INDEX_DTYPES, check_range, check_scale, check_tensor, in_autocast
from bigclass.losses.one_vs_all import LOSSES
from bigclass.losses.positives import read_positives
from bigclass.parallel.collectives import gather_rows, merge_states, replicated, row_counts, scaled_gradient, sum_over
from bigclass.parallel.groups import Ranks
from bigclass.parallel.spread import choose_exchange, spread_logits

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
        exchange: how ranks see each other's texts: "gather", "ring" (never holds them all), "auto" (by size).
        check_norms: raise for features whose length is not 1 within 1 %.
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
    if reduction not in ("mean", "sum", "none"):
        raise ArgumentError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    batch = Batch.of(image_features, text_features, logit_scale, logit_bias, positives, ignore, hard_negatives, group, exchange, engine,
                     check_norms)  # fmt: skip
    if reduction == "none" and batch.ranks is not None:
        raise ArgumentError("reduction: 'none' is not offered with group=, for a rank's own losses are no whole; use 'mean' or 'sum'")
    if reduction == "none" and direction == "both" and not batch.diagonal:
        raise ArgumentError("reduction: with positives= images and texts do not pair up; choose direction='image' or 'text' for 'none'")
    loss = softmax_loss(batch, direction, reduction)
    if isinstance(logit_bias, Tensor):
        loss = loss + logit_bias.sum().to(loss.dtype) * 0.0
    return loss


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
    engine: str = "auto",
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP, without the matrix of logits: every pair of an image and a text is a binary problem.

    Args:
        image_features, text_features, logit_scale, positives, ignore, hard_negatives, group, exchange, check_norms, engine:
            as in `contrastive_loss`. Texts that no image claims are negatives of all.
        logit_bias: added to all logits, a number or a tensor of shape () or (1,), which gets its gradient. The paper begins at -10.
        reduction: "mean": the sum over pairs divided by the number of images (SigLIP's); "sum"; "none": (N,), each summed over texts.

    Returns, Raises: as `contrastive_loss`.

    Example:
        >>> loss = bigclass.sigmoid_contrastive_loss(image_features, text_features, log_scale.exp(), bias)
    """
    if reduction not in ("mean", "sum", "none"):
        raise ArgumentError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    batch = Batch.of(image_features, text_features, logit_scale, logit_bias, positives, ignore, hard_negatives, group, exchange, engine,
                     check_norms)  # fmt: skip
    if reduction == "none" and batch.ranks is not None:
        raise ArgumentError("reduction: 'none' is not offered with group=, for a rank's own losses are no whole; use 'mean' or 'sum'")
    return sigmoid_loss(batch, reduction, logit_bias)


@dataclass(frozen=True)
class Means:
    """What the loss of a rank means to its gradients.

    local: is it the mean over this rank's images and texts (of as many on every rank), the sum of which over ranks is differentiated? Else
    it is that of the whole batch, on every rank. features, scalars: what gradients are multiplied by, so that their average over ranks
    is that of the mean over the whole batch; None: the number of ranks and 1 (local: 1 and one by the number of ranks).
    """

    local: bool = False
    features: float | None = None
    scalars: float | None = None

    def factors(self, ranks: Ranks) -> tuple[float, float]:
        """(features, scalars)"""
        usual = (1.0, 1.0 / ranks.size) if self.local else (float(ranks.size), 1.0)
        return usual[0] if self.features is None else self.features, usual[1] if self.scalars is None else self.scalars


@dataclass(frozen=True)
class Batch:
    """Features and who belongs to whom.

    stream: this rank's images and texts (hard negatives behind them); no bias. picks: (N, K + Q) texts, counted over all ranks, those of
    `ignore` last. count: K. diagonal: is text i the only positive of image i? sizes: texts of each rank. images: of all ranks.
    """

    stream: Stream
    picks: Tensor
    count: int
    diagonal: bool
    ranks: Ranks | None
    sizes: tuple[int, ...]
    images: int
    exchange: str
    engine: str

    @classmethod
    def of(cls, image_features, text_features, logit_scale, logit_bias, positives, ignore, hard_negatives, group, exchange, engine,
           check_norms) -> Batch:  # fmt: skip
        """From a user's arguments, checked."""
        _check_features(image_features, text_features, hard_negatives)
        _check_number("logit_scale", logit_scale, image_features)
        if logit_bias is not None:
            _check_number("logit_bias", logit_bias, image_features)
        if not isinstance(logit_scale, Tensor) and not 0.0 < logit_scale < math.inf:
            raise ArgumentError(f"logit_scale: expected a finite number > 0 (1/temperature, not its logarithm), got {logit_scale}")
        (n, device), ranks = (image_features.shape[0], image_features.device), Ranks.of(group)
        if check_norms:
            _check_norms(image_features=image_features, text_features=text_features, hard_negatives=hard_negatives)
        if positives is None and text_features.shape[0] != n:
            raise ArgumentError(
                f"text_features: expected {n} rows (as image_features), got {text_features.shape[0]}; with another number say who belongs "
                f"to whom: positives= (hard negatives have an argument of their own)"
            )
        texts = text_features if hard_negatives is None else torch.cat((text_features, hard_negatives))
        choose_exchange(exchange, texts, (0,))  # raises for what it does not know
        sizes, images = (texts.shape[0],), n
        if ranks is not None:
            if engine == "dense":
                raise ArgumentError("engine: 'dense' is not offered with group=, whose ranks hold no whole matrix; use 'auto' or 'tiled'")
            of_texts, of_images = row_counts((texts, image_features), ranks)  # in one exchange, whatever this rank alone was given
            sizes, images = tuple(of_texts), sum(of_images)
        start = 0 if ranks is None else sum(sizes[: ranks.rank])
        if positives is None:
            picks = torch.arange(start, start + n, device=device).unsqueeze(1)
        else:
            read = read_positives(positives, (n,), sum(sizes), device)
            if isinstance(read, Tensor) or read.values is not None or read.floor:
                raise ArgumentTypeError("positives: expected indices of texts (padded, a CSR pair or one each), without weights")
            picks = read.picks
        count = picks.shape[1]
        if ignore is not None:
            picks = torch.cat((picks, _ignored(ignore, picks, sum(sizes), device)), 1)
        compute = torch.get_autocast_dtype(device.type) if in_autocast(device.type) else None
        tensor = logit_scale if isinstance(logit_scale, Tensor) else None
        stream = Stream(
            ((image_features, texts),), scale=1.0 if tensor is not None else float(logit_scale), scale_tensor=tensor, compute_dtype=compute
        )
        return cls(stream, picks, count, positives is None, ranks, sizes, images, exchange, engine)

    @property
    def texts(self) -> int:
        """M, of all ranks."""
        return sum(self.sizes)

    @property
    def exact(self) -> torch.dtype:
        """Of sums over images or texts."""
        return torch.float32 if self.stream.device.type == "mps" else torch.float64

    def fold(self, stream: Stream, folds: list[Fold]) -> tuple[list[State], Tensor]:
        """States and picked logits (N, K + Q); of columns, this rank's part."""
        if self.ranks is not None:
            engine = spread_engine(stream, folds, self.engine, self.texts)
            states, picked = spread_logits(
                stream, self.picks, folds, self.ranks, self.sizes, exchange=self.exchange, engine=engine, workspace=settings().workspace
            )
        else:
            states, picked = reduce_logits(stream, self.picks, folds, engine=self.engine)
        assert picked is not None
        return states, picked

    def shared(self, means: Means) -> Stream:
        """The stream whose gradients come multiplied; those of what all ranks hold are summed over ranks."""
        if self.ranks is None:
            return self.stream
        features, scalars = means.factors(self.ranks)
        (x, w), scale = self.stream.pairs[0], self.stream.scale_tensor
        pairs = ((scaled_gradient(x, features), scaled_gradient(w, features)),)
        return replace(self.stream, pairs=pairs, scale_tensor=None if scale is None else replicated(scale, self.ranks, scalars))

    def total(self, t: Tensor) -> Tensor:
        """The sum of t over ranks."""
        return t if self.ranks is None else sum_over(t, self.ranks)


def _gap(rest: State, at: Tensor) -> Tensor:
    """softplus(log-sum-exp of the rest - at), with all its digits on both sides."""
    at = at * torch.where(at == torch.inf, torch.nan, 1.0)  # a logit of +inf is NaN, as in torch's cross-entropy
    return -F.logsigmoid((at - rest[0]) - log_sum(rest))


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


def softmax_loss(batch: Batch, direction: str, reduction: str, means: Means | None = None) -> Tensor:
    """`contrastive_loss` of a batch."""
    stream, ranks, means = batch.stream, batch.ranks, means or Means()
    if ranks is None and direction == "text" and batch.diagonal and batch.picks.shape[1] == 1 and batch.texts == batch.images:
        # the columns of this matrix are the rows of its transpose, whose gradients can be made in the forward
        (x, w), direction = stream.pairs[0], "image"
        stream = replace(stream, pairs=((w, x),))
    wide = stream.accumulate_dtype
    there = (batch.picks[:, : batch.count] >= 0).to(wide)
    if ranks is None and direction == "image" and reduction != "none":
        factor = there.new_ones((), dtype=batch.exact).expand(batch.images)
        count = (there.sum(1) > 0).sum() if reduction == "mean" else 1
        loss = stream_loss(stream, batch.picks, [_ROWS], "info_nce", [factor / count, there], engine=batch.engine)
        return loss + 0.0 / count  # the mean of nothing is NaN
    parts = _parts(batch, replace(batch, stream=stream).shared(means), there, direction)
    if reduction == "none":
        losses = [loss for loss, _ in parts]
        # behind the texts stand the hard negatives, which have no loss
        return (losses[0] + losses[1][: batch.images]) / 2 if direction == "both" else losses[0]
    if means.local and ranks is not None:
        rows, columns = (loss.to(batch.exact) for loss, _ in parts)
        own = columns.split(list(batch.sizes))[ranks.rank]
        others = columns.sum() / own.shape[0] - own.mean()  # of the other ranks: no part of this rank's value, but of the gradient
        return ((rows.mean() + own.mean() + (others - others.detach())) / 2).to(wide)
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
        parts.append(
            (ROW_LOSSES["info_nce"]([states[0]], picked, [one, there], ()), count if batch.ranks is None else sum_over(count, batch.ranks))
        )
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


def sigmoid_loss(batch: Batch, reduction: str, logit_bias: float | Tensor | None, means: Means | None = None) -> Tensor:
    """`sigmoid_contrastive_loss` of a batch."""
    ranks, bce, means = batch.ranks, LOSSES["bce"], means or Means()
    stream = batch.shared(means)
    wide, n = stream.accumulate_dtype, stream.shape[0]
    if logit_bias is not None:
        bias = logit_bias if isinstance(logit_bias, Tensor) else stream.tensors[0].new_full((), float(logit_bias), dtype=wide)
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
        stream = replace(stream, pairs=((x, gather_rows(w, batch.sizes, ranks)),))
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


# --- checks -----------------------------------------------------------------------------------------------------------------------


def _check_features(image_features: Tensor, text_features: Tensor, hard_negatives: Tensor | None) -> None:
    for name, t in (("image_features", image_features), ("text_features", text_features), ("hard_negatives", hard_negatives)):
        if name == "hard_negatives" and t is None:
            continue
        check_tensor(name, t)
        assert t is not None
        if t.dim() != 2:
            raise ArgumentError(f"{name}: expected shape (rows, D), got {tuple(t.shape)}")
        if not t.is_floating_point():
            raise ArgumentTypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")
        if t.device != image_features.device:
            raise ArgumentError(f"{name}: expected device {image_features.device} (that of image_features), got {t.device}")
        if t.shape[1] != image_features.shape[1]:
            raise ArgumentError(f"{name}: expected {image_features.shape[1]} features (as image_features), got {t.shape[1]}")
    if image_features.shape[1] == 0:
        raise ArgumentError("image_features: expected at least one feature, got 0")


def _check_number(name: str, value: Any, features: Tensor) -> None:
    if isinstance(value, Tensor):
        check_scale(value, features) if name == "logit_scale" else _check_bias(value, features)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name}: expected a number or a tensor of shape () or (1,), got {value!r}")


def _check_bias(bias: Tensor, features: Tensor) -> None:
    if bias.numel() != 1 or not bias.is_floating_point():
        raise ArgumentError(f"logit_bias: expected a number or a floating-point tensor of shape () or (1,), got {bias.dtype} "
                            f"{tuple(bias.shape)}")  # fmt: skip
    if bias.device != features.device:
        raise ArgumentError(f"logit_bias: expected device {features.device} (that of image_features), got {bias.device}")


def _check_norms(**features: Tensor | None) -> None:
    for name, t in features.items():
        if t is None or t.shape[0] == 0:
            continue
        length = torch.linalg.vector_norm(t.detach(), dim=1, dtype=torch.promote_types(t.dtype, torch.float32))
        off = (length - 1.0).abs()
        if torch.compiler.is_compiling() or t.device.type != "cpu":
            torch._assert_async((off <= 0.01).all(), f"bigclass: {name} are not of length 1")  # pyright: ignore[reportPrivateImportUsage]
        elif not bool((off <= 0.01).all()):
            worst = float(length[off.nan_to_num(math.inf).argmax()])
            raise ArgumentError(
                f"{name}: expected rows of length 1 (check_norms=True), got one of {worst:g}; see torch.nn.functional.normalize"
            )


def _ignored(ignore: Tensor, picks: Tensor, m: int, device: torch.device) -> Tensor:
    check_tensor("ignore", ignore)
    if ignore.dtype not in INDEX_DTYPES:
        raise ArgumentTypeError(f"ignore: expected int64 or int32 indices, got {ignore.dtype}")
    if ignore.dim() != 2 or ignore.shape[0] != picks.shape[0]:
        raise ArgumentError(f"ignore: expected shape ({picks.shape[0]}, Q), got {tuple(ignore.shape)}")
    if ignore.device != device:
        raise ArgumentError(f"ignore: expected device {device} (that of image_features), got {ignore.device}")
    ignore = ignore.long()
    check_range("ignore", ignore, ignore != -1, m)
    # a positive that is also ignored is a positive; one that stands twice counts once
    both, order = torch.cat((picks, ignore), 1).sort(dim=1, stable=True)
    again = torch.zeros_like(both, dtype=torch.bool)
    again[:, 1:] = both[:, 1:] == both[:, :-1]
    return ignore.masked_fill(again.scatter(1, order, again)[:, picks.shape[1] :], -1)

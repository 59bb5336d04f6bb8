"""The softmax losses as arithmetic on what a stream is folded to, and their reductions.

With the target y left out of the log-sum-exp (LSE_rest) nothing cancels when a row is confident:

    nll_i  = -log sigmoid(s_iy - LSE_rest_i)          LSE_i = s_iy (+) LSE_rest_i          ((+): log of the sum of exponentials)
    loss_i = (1 - eps) v_y nll_i  +  eps/C (V LSE_i - sum_j v_j s_ij)  +  z LSE_i^2     V = sum_j v_j

eps: label smoothing, v: class weights, z: z-loss. Class probabilities t, t' = (1 - eps) t + eps/C:

    loss_i = LSE_i sum_j v_j t'_ij - sum_j v_j t'_ij s_ij  +  z LSE_i^2

The same for a few classes a row (`SparseTarget`), all of them left out of LSE_rest, with nll_ik = log(1 + e^(others_ik - s_ik)) and
others_ik the log-sum-exp of all logits but the k-th pick:

    loss_i = sum_k (1 - eps) v_k t_ik nll_ik  +  floor' (V LSE_i - sum_j v_j s_ij)  +  z LSE_i^2     floor' = (1 - eps) floor + eps/C

Poly-1 (Leng et al., arXiv:2204.12511) adds poly (1 - p_t), p_t = sum_j t'_ij p_ij; for an index (1 - eps) (1 - p_y) + eps (1 - 1/C).

The mean divides by the sum of v_y over kept rows (probabilities, sparse ones too: by the number of rows), as
torch.nn.functional.cross_entropy does. All constant factors, that divisor included, enter as row vectors, so that the upstream
gradient is 1 in plain training.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.folds import Dot, Fold, LogSumExp, State, Total, log_sum, log_sum_exp
from bigclass.core.guards import autocast_off
from bigclass.core.op import empty_report
from bigclass.core.problem import beside, exact_dtype
from bigclass.core.row_losses import ROW_LOSSES, register_row_loss
from bigclass.core.stream import Stream
from bigclass.core.topk import TopK
from bigclass.core.updates import SlabUpdate
from bigclass.losses.folds import WeightedExp
from bigclass.losses.inputs import check_range, kept_picks, kept_rows
from bigclass.losses.targets import SparseTarget
from bigclass.parallel.classes import observed_loss, over_batch, reduce_logits, whole_batch


class Stats(NamedTuple):
    """What `return_stats=True` adds to the loss; row-wise fields have the shape of `reduction="none"`.

    lse: log-sum-exp of each row's logits, differentiable, 0 where ignored. correct: does the target have the largest logit?
    kept_share, promised_error: of `grad_filter`, for logging: the share of the gradient's columns (of a block of rows each) whose products
    were made, and the largest ||G' lost|| / ||G'|| of a block. 1.0 and 0.0 without a filter; with one 0-dim tensors that are NaN until
    the backward fills them in (another backward anew).
    """

    lse: Tensor
    correct: Tensor
    kept_share: float | Tensor = 1.0
    promised_error: float | Tensor = 0.0


def certain_is_nan(s: Tensor) -> Tensor:
    """torch's loss is NaN for a target logit of +inf; the excluded form alone would call it certain."""
    return s * torch.where(s == torch.inf, torch.nan, 1.0)  # a product, so that its gradient is NaN too


@register_row_loss("cross_entropy")
def index_row_loss(folds, picked, args, numbers):
    """args: (N,) factors of nll [, of LSE, of the weighted sum of logits] [, of 1 - p_t] [, of LSE^2].

    numbers: smoothing, is there a z-loss, is there a Poly-1 term."""
    eps, z, poly = numbers[:3]
    rest, s = folds[0], certain_is_nan(picked[:, 0])
    factor = iter(args)
    gap = (s - rest[0]) - log_sum(rest)
    loss = next(factor) * -F.logsigmoid(gap)  # log sigmoid keeps its digits on both sides
    lse = torch.logaddexp(log_sum_exp(rest), s) if eps or z else s
    if eps:
        loss = loss + (next(factor) * lse - next(factor) * folds[1][0])
    if poly:
        loss = loss + next(factor) * ((1.0 - eps) * torch.sigmoid(-gap) + numbers[3])
    if z:
        loss = loss + next(factor) * lse.square()
    return loss


@register_row_loss("cross_entropy_probabilities")
def probability_row_loss(folds, picked, args, numbers):
    """args: (N,) factors of LSE, of sum_j v_j t_ij s_ij [, of sum_j v_j s_ij] [, of 1 - p_t] [, of LSE^2].

    numbers: smoothing, is there a z-loss, is there a Poly-1 term, what smoothing adds to p_t."""
    eps, z, poly = numbers[:3]
    lse = log_sum_exp(folds[0])
    factor = iter(args)
    loss = next(factor) * lse - next(factor) * folds[1][0]
    if eps:
        loss = loss - next(factor) * folds[2][0]
    if poly:
        m, mass = folds[-1]
        loss = loss + next(factor) * (1.0 - ((1.0 - eps) * mass * torch.exp(m - lse) + numbers[3]))
    if z:
        loss = loss + next(factor) * lse.square()
    return loss


@register_row_loss("cross_entropy_sparse")
def sparse_row_loss(folds, picked, args, numbers):
    """args: (N, K) which picks there are, (N, K) factors of nll_ik [, (N,) of LSE, of sum_j v_j s_ij] [, (N, K) t' without its floor,
    (N,) of 1 - p_t] [, (N,) of LSE^2]. numbers: is there a floor, is there a z-loss, is there a Poly-1 term, the floor of t'."""
    floor, z, poly = numbers[:3]
    factor = iter(args)
    s, rest, top = beside_largest(folds[0], torch.where(next(factor) > 0, certain_is_nan(picked), torch.finfo(picked.dtype).min))
    apart = others(rest, s)
    loss = (next(factor) * -F.logsigmoid(s - apart)).sum(1)  # F.softplus would drop e^-20
    lse = torch.logaddexp(apart[:, 0], s[:, 0]) + top if floor or z else rest
    if floor:
        loss = loss + (next(factor) * lse - next(factor) * folds[1][0])
    if poly:
        p_t = (next(factor) * torch.sigmoid(s - apart)).sum(1) + numbers[3]
        loss = loss + next(factor) * (1.0 - p_t)
    if z:
        loss = loss + next(factor) * lse.square()
    return loss


def beside_largest(rest: State, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(picked logits (N, K), log-sum-exp of the rest (N,), top (N,)), the first two less top, the largest logit.

    As they are, sums of them would be rounded to their size, and their differences with it."""
    m, largest = rest[0], s.detach().amax(1) if s.shape[1] else rest[0]
    top = torch.maximum(m, largest).clamp_min(torch.finfo(s.dtype).min)
    return s - top.unsqueeze(1), (m - top) + log_sum(rest), top


def others(rest: Tensor, s: Tensor) -> Tensor:
    """(N, K): the log-sum-exp of rest (N,) and of every column of s (N, K) but the k-th."""
    before = torch.cat((rest.clamp_min(torch.finfo(s.dtype).min).unsqueeze(1), s[:, :-1]), 1).logcumsumexp(1)
    if s.shape[1] == 1:
        return before
    after = s[:, 1:].flip(1).logcumsumexp(1).flip(1)
    return torch.cat((torch.logaddexp(before[:, :-1], after), before[:, -1:]), 1)


class Options(NamedTuple):
    """weight (C,) or None, label smoothing, coefficients of the z-loss and of Poly-1, ignored index, engine, update (updates.py)."""

    weight: Tensor | None = None
    smoothing: float = 0.0
    z_loss: float = 0.0
    poly: float = 0.0
    ignore_index: int = -100
    engine: str = "auto"
    update: SlabUpdate | None = None


class Task(NamedTuple):
    """One linear layer with its targets: (N,) indices, (N, C) probabilities, or N rows of few classes."""

    stream: Stream
    target: Tensor | SparseTarget
    options: Options


def finish(tasks: list[Task], shape, reduction: str, return_stats: bool):
    """Losses (and stats) of one linear layer, or of one for each position, reduced together."""
    prepared = [_prepare(task) for task in tasks]
    factor = None
    if reduction == "mean":
        of_all = [over_batch(sum(counts), tasks[0].stream) for counts in ([p.mass for p in prepared], [p.rows for p in prepared])]
        factor = _inverse(of_all[0]), _inverse(of_all[1])
    outs = [_run(p, factor, reduction == "none", return_stats) for p in prepared]
    if reduction == "none":
        loss = _join([loss for loss, _ in outs], shape)
    else:
        loss = outs[0][0] if len(outs) == 1 else torch.stack([loss for loss, _ in outs]).sum()
        loss = whole_batch(loss, tasks[0].stream)
        if factor is not None and (isinstance(factor[0], Tensor) or math.isinf(factor[0])):
            loss = loss + factor[0] * 0.0  # nothing kept: 0 / 0, which is torch's answer too
            loss = loss.to(tasks[0].stream.accumulate_dtype)
    if not return_stats:
        return loss
    stats = [s for _, s in outs if s is not None]
    return loss, stats[0]._replace(lse=_join([s.lse for s in stats], shape), correct=_join([s.correct for s in stats], shape))


def _inverse(mass: float | Tensor) -> float | Tensor:
    return 1.0 / mass if isinstance(mass, Tensor) or mass else math.inf


def _join(parts: list[Tensor], shape) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.stack(parts, 1)).reshape(shape)


def factor_dtype(stream: Stream) -> torch.dtype:
    """Of the row factors and of the sum over rows: float64, for 1/N in fp32 would shift every loss by the same rounding."""
    return exact_dtype(stream.device)


class _Prepared(NamedTuple):
    """A task ready to run: folds and picks, what the mean divides by, and the constant factors before that division.

    mass: sum of v_y over kept rows. rows: number of kept rows. factors: of the row loss, in its order, without those of the terms that
    are divided by `rows` (Poly-1 and z-loss): numbers, scalars or (N,) in float64. plain: what the row loss takes undivided, before them.
    poly: what it takes between them and the Poly-1 factor. numbers: its constants.
    """

    task: Task
    picks: Tensor | None
    keep: Tensor | None
    folds: tuple[Fold, ...]
    row_loss: str
    factors: list[float | Tensor]
    mass: float | Tensor
    rows: float | Tensor
    numbers: tuple[float, ...]
    plain: tuple[Tensor, ...] = ()
    poly: tuple[Tensor, ...] = ()


def _prepare(task: Task) -> _Prepared:
    stream, target, options = task
    (n, c), exact = stream.shape, factor_dtype(stream)
    eps, v = options.smoothing, None if options.weight is None else options.weight.to(stream.accumulate_dtype)
    if isinstance(target, SparseTarget):
        return _prepare_sparse(task, v)
    factors: list[float | Tensor]
    rows: float | Tensor = float(n)
    smooth_folds = (Total(tensors=() if v is None else (v,)),) if eps else ()
    smooth_mass = eps if v is None else v.sum(dtype=exact) * (eps / c)
    numbers = (eps, *_flags(options))
    if target.dim() == 2:
        wide = stream.accumulate_dtype
        with autocast_off(target.device):
            sums = target.sum(-1, dtype=wide) if v is None else torch.cat([part.to(wide) @ v for part in target.split(1024)])
        factors = [(1.0 - eps) * sums.to(exact) + smooth_mass, 1.0 - eps, *([eps / c] if eps else [])]
        poly_folds = (WeightedExp(tensors=(target,)),) if options.poly else ()
        folds = (LogSumExp(), Dot(tensors=(target,) if v is None else (target, v)), *smooth_folds, *poly_folds)
        return _Prepared(
            task,
            None,
            None,
            folds,
            "cross_entropy_probabilities",
            factors,
            rows,
            rows,
            (*numbers, eps / c if options.poly and eps else 0.0),
        )
    keep = kept_rows(target, options.ignore_index)
    check_range("target", target, keep, c)
    picks = kept_picks(target, keep, c)
    if keep is not None:
        rows = keep.sum(dtype=exact)
    mass = rows
    factors = [1.0 - eps, *([smooth_mass, eps / c] if eps else [])]
    if v is not None:
        chosen = v[picks.squeeze(-1).clamp(0, c - 1)].to(exact)
        factors[0] = (1.0 - eps) * chosen
        mass = (chosen if keep is None else torch.where(keep, chosen, 0.0)).sum()
    folds = (LogSumExp(exclude_picks=True), *smooth_folds)
    return _Prepared(
        task, picks, keep, folds, "cross_entropy", factors, mass, rows, (*numbers, eps * (1.0 - 1.0 / c) if options.poly and eps else 0.0)
    )


def _flags(options: Options) -> tuple[float, float]:
    """Is there a z-loss, is there a Poly-1 term. Literals: a traced graph takes no computed number for a list of numbers."""
    return (1.0 if options.z_loss else 0.0, 1.0 if options.poly else 0.0)


def _prepare_sparse(task: Task, v: Tensor | None) -> _Prepared:
    stream, target, options = task
    assert isinstance(target, SparseTarget)
    (n, c), exact, eps = stream.shape, factor_dtype(stream), options.smoothing
    picks, weights = target.merged()
    check_range("target", picks, picks != -1, c)
    used = picks >= 0
    floor = (1.0 - eps) * target.floor + eps / c
    t = (1.0 - eps) * weights.to(exact)
    factors: list[float | Tensor] = [t if v is None else t * v[picks.clamp(0, c - 1)].to(exact)]
    if floor:
        factors += [floor * c if v is None else floor * v.sum(dtype=exact), floor]
    folds = (LogSumExp(exclude_picks=True), *((Total(tensors=() if v is None else (v,)),) if floor else ()))
    numbers = (1.0 if floor else 0.0, *_flags(options), floor if options.poly and floor else 0.0)
    plain, rows = (used.to(exact),), float(n)
    return _Prepared(task, picks, None, folds, "cross_entropy_sparse", factors, rows, rows, numbers, plain, (t,) if options.poly else ())


def _run(
    p: _Prepared, factor: tuple[float | Tensor, float | Tensor] | None, rowwise: bool, return_stats: bool
) -> tuple[Tensor, Stats | None]:
    """The loss (a sum, or (N,)) and the stats of one prepared task."""
    stream, _, options = p.task
    by_mass, by_rows = (1.0, 1.0) if factor is None else factor
    factors = [f * by_mass for f in p.factors]
    if options.poly:
        factors += [*p.poly, options.poly * by_rows]
    if options.z_loss:
        factors.append(options.z_loss * by_rows)
    args = [*p.plain, *[_rows(f, stream) for f in factors]]
    if p.keep is not None:  # nothing kept: 1 / 0, which the dense engine's autograd would multiply by 0 and hand NaN to dw
        args = [torch.where(beside(p.keep, f), f, 0.0) for f in args]
    if not rowwise and not return_stats:
        loss, _ = observed_loss(
            stream, p.picks, p.folds, (), p.row_loss, args, p.numbers, keep=p.keep, update=options.update, engine=options.engine
        )
        return loss, None
    by_probability = p.picks is None
    folds = (*p.folds, TopK((1,))) if by_probability and return_stats else p.folds
    report = empty_report(stream) if return_stats and stream.grad_filter else None
    states, picked = reduce_logits(stream, p.picks, folds, keep=p.keep, engine=options.engine, report=report)
    loss = ROW_LOSSES[p.row_loss](states[: len(p.folds)], picked, args, p.numbers)
    lse = log_sum_exp(states[0])
    if picked is not None:
        there = picked if not p.plain else torch.where(p.plain[0] > 0, picked, torch.finfo(picked.dtype).min)
        aim = there if not p.plain else there.gather(1, p.factors[0].argmax(1, keepdim=True))  # type: ignore[union-attr]
        correct = (aim[:, 0] >= states[0][0]) & (aim[:, 0] >= there.amax(1))
        lse = torch.logaddexp(lse, there.logsumexp(1))
    elif return_stats:
        assert isinstance(p.task.target, Tensor)
        correct = p.task.target.argmax(-1) == states[-1][1]
    else:
        return (loss if rowwise else loss.sum()).to(stream.accumulate_dtype), None
    if p.keep is not None:
        loss, lse = torch.where(p.keep, loss, 0.0), torch.where(p.keep, lse, 0.0)
        correct = correct & p.keep
    loss = (loss if rowwise else loss.sum()).to(stream.accumulate_dtype)
    return loss, Stats(lse, correct) if report is None else Stats(lse, correct, report[0], report[1])


def _rows(factor: float | Tensor, stream: Stream) -> Tensor:
    """A factor of the row loss with its N rows."""
    if isinstance(factor, Tensor):
        return factor if factor.dim() else factor.expand(stream.shape[0])
    return stream.tensors[0].new_full((), factor, dtype=factor_dtype(stream)).expand(stream.shape[0])


def weighted(task: Task, factor: Tensor, keep: Tensor | None = None) -> Tensor:
    """sum_i factor_i loss_i, factor (N,) constant. keep (N,): in place of what the target says is ignored; the rest contributes nothing."""
    p = _prepare(task)
    scaled = [beside(factor, f) * f if isinstance(f, Tensor) else factor * f for f in p.factors]
    p = p._replace(factors=scaled, keep=p.keep if keep is None else keep)
    return _run(p, (1.0, factor), False, False)[0]


def rowwise(task: Task) -> Tensor:
    """The losses (N,) of a task, 0 where ignored."""
    return _run(_prepare(task), None, True, False)[0]

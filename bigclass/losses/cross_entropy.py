"""Cross-entropy of a linear layer.

With the target y left out of the log-sum-exp (LSE_rest) nothing cancels when a row is confident:

    nll_i  = -log sigmoid(s_iy - LSE_rest_i)          LSE_i = s_iy (+) LSE_rest_i          ((+): log of the sum of exponentials)
    loss_i = (1 - eps) v_y nll_i  +  eps/C (V LSE_i - sum_j v_j s_ij)  +  z LSE_i^2     V = sum_j v_j

eps: label smoothing, v: class weights, z: z-loss. With class probabilities t instead of an index, t' = (1 - eps) t + eps/C:

    loss_i = LSE_i sum_j v_j t'_ij - sum_j v_j t'_ij s_ij

The mean divides by the sum of v_y over kept rows (probabilities: by the number of rows), as torch.nn.functional.cross_entropy does.
All constant factors, that divisor included, enter as row vectors, so that the upstream gradient is 1 in plain training.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import Dot, Fold, LogSumExp, Total, log_sum, log_sum_exp
from bigclass.core.guards import autocast_off
from bigclass.core.op import reduce_logits, stream_loss
from bigclass.core.plan import Work, choose_engine
from bigclass.core.row_losses import ROW_LOSSES, register_row_loss
from bigclass.core.stream import Stream
from bigclass.core.topk import TopK
from bigclass.losses.inputs import check_index, check_linear, check_range, check_tensor, kept_picks, kept_rows, make_stream

REDUCTIONS = ("none", "mean", "sum")


class Stats(NamedTuple):
    """What `return_stats=True` adds to the loss; row-wise fields have the shape of `reduction="none"`.

    lse: log-sum-exp of each row's logits, differentiable, 0 where ignored. correct: does the target have the largest logit?
    kept_share: share of the gradient's columns that were computed. promised_error: bound on what was dropped. Exact: 1 and 0.
    """

    lse: Tensor
    correct: Tensor
    kept_share: float = 1.0
    promised_error: float = 0.0


def _certain_is_nan(s: Tensor) -> Tensor:
    """torch's loss is NaN for a target logit of +inf; the excluded form alone would call it certain."""
    return s * torch.where(s == torch.inf, torch.nan, 1.0)  # a product, so that its gradient is NaN too


@register_row_loss("cross_entropy")
def index_row_loss(folds, picked, args, numbers):
    """args: (N,) factors of nll [, of LSE, of the weighted sum of logits] [, of LSE^2]; numbers: (smoothing?, z-loss?)."""
    smooth, z = bool(numbers[0]), bool(numbers[1])
    rest, s = folds[0], _certain_is_nan(picked[:, 0])
    nll = -F.logsigmoid((s - rest[0]) - log_sum(rest))  # log sigmoid keeps its digits on both sides
    loss = args[0] * nll
    if smooth or z:
        lse = torch.logaddexp(log_sum_exp(rest), s)
        if smooth:
            loss = loss + (args[1] * lse - args[2] * folds[1][0])
        if z:
            loss = loss + args[-1] * lse.square()
    return loss


@register_row_loss("cross_entropy_probabilities")
def probability_row_loss(folds, picked, args, numbers):
    """args: (N,) factors of LSE, of sum_j v_j t_ij s_ij [, of sum_j v_j s_ij] [, of LSE^2]; numbers: (smoothing?, z-loss?)."""
    smooth, z = bool(numbers[0]), bool(numbers[1])
    lse = log_sum_exp(folds[0])
    loss = args[0] * lse - args[1] * folds[1][0]
    if smooth:
        loss = loss - args[2] * folds[2][0]
    if z:
        loss = loss + args[-1] * lse.square()
    return loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    shift: int = 0,
    z_loss: float = 0.0,
    grad_filter: float | None = None,
    engine: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    r"""Cross-entropy of `softcap(logit_scale * (input @ linear_weight.T + linear_bias))` against target, without the N x C logits.

    A superset of `torch.nn.functional.linear_cross_entropy` (torch 2.13): the same arguments mean the same and give the same
    values and errors. Half-precision inputs give an fp32 loss; logits are never rounded to 16 bits.

    Args:
        input: features (..., D), with any number of leading axes.
        linear_weight: (C, D); or (C, d_1, ..., d_K, D) with input (N, D) for the K-dimensional loss.
        target: class indices (...) (K-dimensional: (N, d_1, ..., d_K)), int64 or int32; or class probabilities (..., C)
            (K-dimensional: (N, C, d_1, ..., d_K)), floating point.
        linear_bias: (C,), or (C, d_1, ..., d_K).
        weight: (C,) a factor for each class. A constant: it gets no gradient.
        reduction: "mean", "sum" or "none".
        ignore_index: rows with this target contribute exactly nothing. None: -100 for index targets; not allowed with probabilities.
        label_smoothing: in [0, 1].
        softcap: logits become softcap * tanh(logits / softcap); > 0.
        logit_scale: a number or a scalar tensor (which gets a gradient); applied before the soft cap.
        shift: k > 0 scores position t's features against the label at t + k along the last leading axis, without slicing copies.
            With reduction "none" the result has T - k positions.
        z_loss: adds z_loss * LSE^2 to each row's loss (PaLM, arXiv:2204.02311); in the mean it is averaged over the kept rows.
        grad_filter: None: exact gradients. (A tolerance is reserved for the certified filter and raises in this version.)
        engine: "auto", "dense" (materialises), "tiled".
        return_stats: also return `Stats`.

    Returns:
        The loss, fp32 (float64 for float64 inputs): a scalar, or for reduction "none" the shape of index targets.
        With return_stats: (loss, Stats).

    Raises:
        ValueError (also a RuntimeError, as in torch): shapes, devices or values that do not fit. TypeError: wrong dtypes.
        IndexError: a target outside [0, C) that is not ignore_index (on CUDA: a device-side assertion).

    Example:
        >>> x, w, y = torch.randn(8, 16), torch.randn(1000, 16, requires_grad=True), torch.randint(1000, (8,))
        >>> bigclass.linear_cross_entropy(x, w, y).backward()

    The streamed log-sum-exp follows Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
    """
    check_linear(input, linear_weight, linear_bias, weight_dims=None)
    check_tensor("target", target)
    classes, positions = linear_weight.shape[0], linear_weight.shape[1:-1]
    lead = input.shape[:-1]
    _check_options(reduction, label_smoothing, z_loss, grad_filter, weight, classes, input)
    if positions and len(lead) != 1:
        raise ArgumentError(
            f"input: a K-dimensional loss (linear_weight {tuple(linear_weight.shape)}) needs (N, D), got {tuple(input.shape)}"
        )
    probabilities = tuple(target.shape) == (*lead, classes, *positions)
    if target.device != input.device:
        raise ArgumentError(f"target: expected device {input.device} (that of input), got {target.device}")
    if probabilities:
        if ignore_index is not None:
            raise ArgumentError("ignore_index: cannot be specified when target contains class probabilities; leave it None")
        if not target.is_floating_point():
            raise ArgumentTypeError(
                f"target: expected floating-point class probabilities for shape {tuple(target.shape)}, got {target.dtype}"
            )
        if shift:
            raise ArgumentError("shift: works on class indices; slice the features and the class probabilities instead")
    else:
        if tuple(target.shape) != (*lead, *positions):
            raise ArgumentError(
                f"target: expected class indices of shape {(*lead, *positions)} or class probabilities of shape "
                f"{(*lead, classes, *positions)}, got {tuple(target.shape)}"
            )
        check_index("target", target, input.device, -100 if ignore_index is None else ignore_index)
        target = target.long()  # ignore_index may be any number
    plain = not (positions or probabilities or shift or return_stats or label_smoothing or z_loss)
    plain = plain and weight is None and softcap is None and logit_scale is None and engine == "auto"
    if plain and _is_small(input, linear_weight, target, ignore_index):
        loss = _small(input, linear_weight, linear_bias, target, reduction)
        if loss is not None:
            return loss
    options = _Options(weight, label_smoothing, z_loss, -100 if ignore_index is None else ignore_index, engine)
    if positions:
        if shift:
            raise ArgumentError("shift: is not defined for a K-dimensional loss")
        return _per_position(
            input, linear_weight, linear_bias, target, probabilities, softcap, logit_scale, options, reduction, return_stats
        )
    stream = make_stream(input, linear_weight, linear_bias, softcap, logit_scale)
    if probabilities:
        return _finish([_Task(stream, target.reshape(-1, classes), options)], lead, reduction, return_stats)
    target, cut = _shifted(target, shift, options.ignore_index)
    out: Any = _finish([_Task(stream, target.reshape(-1), options)], lead, reduction, return_stats)
    return out if cut is None else _cut(out, cut, reduction, return_stats)


def _is_small(input: Tensor, linear_weight: Tensor, target: Tensor, ignore_index: int | None) -> bool:
    """May `_small` take this? The planner would run it dense, and (looking costs no sync) every target is a class."""
    if torch.compiler.is_compiling() or input.device.type != "cpu" or target.numel() == 0:
        return False
    if input.dtype != linear_weight.dtype or input.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu"):
        return False
    work = Work(n=target.numel(), c=linear_weight.shape[0], d=linear_weight.shape[1], wide=input.dtype == torch.float64)
    if choose_engine(work) != "dense":
        return False
    low, high = target.aminmax()
    low, high = int(low), int(high)
    return low >= 0 and high < linear_weight.shape[0] and not low <= (-100 if ignore_index is None else ignore_index) <= high


# A loss above which torch's own cross-entropy keeps its digits: LSE - s_y is off by about |s| 2^-24, at |s| = 100 6e-5 of 0.1.
# For a mean it is the mean that counts: beside rows that far off, what confident rows lose is as little.
_DOUBTFUL = 0.1


def _small(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, reduction: str) -> Tensor | None:
    """The plain loss of a small problem in the fewest calls: below a few thousand logits a row or two of Python is what counts.

    None: a NaN or an infinity among confident rows, for the general road to treat."""
    s = F.linear(input, linear_weight, linear_bias).reshape(-1, linear_weight.shape[0])
    y = target.reshape(-1)
    loss = F.cross_entropy(s, y, reduction=reduction)
    level = float(loss.detach().min()) if reduction == "none" else float(loss.detach())
    if level > (_DOUBTFUL * y.numel() if reduction == "sum" else _DOUBTFUL):
        return loss.reshape(target.shape) if reduction == "none" else loss
    y = y.unsqueeze(1)
    # the least finite number: a log-sum-exp over nothing but -inf has NaN for a gradient
    rest = s.scatter(1, y, torch.finfo(s.dtype).min).logsumexp(1, keepdim=True)
    nll = F.logsigmoid(s.gather(1, y) - rest).neg()
    if not math.isfinite(float(nll.detach().sum())):
        return None
    if reduction == "none":
        return nll.reshape(target.shape)
    return nll.mean() if reduction == "mean" else nll.sum()


class _Options(NamedTuple):
    """weight (C,) or None, label smoothing, z-loss, ignored index, engine."""

    weight: Tensor | None
    smoothing: float
    z_loss: float
    ignore_index: int
    engine: str


class _Task(NamedTuple):
    """One linear layer with its targets: (N,) indices or (N, C) probabilities."""

    stream: Stream
    target: Tensor
    options: _Options


def _check_options(reduction, label_smoothing, z_loss, grad_filter, weight, classes, input) -> None:
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"label_smoothing: expected a value in [0, 1], got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ArgumentError(f"z_loss: expected a coefficient >= 0, got {z_loss}")
    if grad_filter is not None:
        raise NotImplementedError("grad_filter: the certified filter is not part of this version; leave it None (exact gradients)")
    if weight is None:
        return
    check_tensor("weight", weight)
    if tuple(weight.shape) != (classes,):
        raise ArgumentError(f"weight: expected a factor for each of {classes} classes, shape ({classes},), got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ArgumentTypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
    if weight.device != input.device:
        raise ArgumentError(f"weight: expected device {input.device} (that of input), got {weight.device}")
    if weight.requires_grad:
        raise ArgumentError("weight: class weights are constants and get no gradient; pass weight.detach()")


def _shifted(target: Tensor, shift: int, ignore_index: int) -> tuple[Tensor, int | None]:
    """(target of each position, number of positions that have one): labels moved by `shift` to the left, the rest ignored."""
    if isinstance(shift, float) or shift < 0:
        raise ArgumentError(f"shift: expected an integer >= 0, got {shift}")
    shift = int(shift)
    if not shift:
        return target, None
    if target.dim() < 1:
        raise ArgumentError("shift: needs a sequence axis: input (..., T, D) with target (..., T)")
    length = target.shape[-1]
    shift = min(shift, length)
    return F.pad(target[..., shift:], (0, shift), value=ignore_index), length - shift


def _cut(out, positions: int, reduction: str, return_stats: bool):
    """Only the positions that have a target."""
    loss, stats = out if return_stats else (out, None)
    if reduction == "none":
        loss = loss[..., :positions]
    return loss if stats is None else (loss, stats._replace(lse=stats.lse[..., :positions], correct=stats.correct[..., :positions]))


def _per_position(input, linear_weight, linear_bias, target, probabilities, softcap, logit_scale, options, reduction, return_stats):
    """The K-dimensional loss: each of the d_1 ... d_K positions is a classifier of its own over the same classes."""
    shape = linear_weight.shape[1:-1]
    ws = linear_weight.flatten(1, -2).unbind(1)
    bs = [None] * len(ws) if linear_bias is None else linear_bias.flatten(1).unbind(1)
    ts = target.flatten(2).unbind(2) if probabilities else target.flatten(1).unbind(1)
    tasks = [_Task(make_stream(input, w, b, softcap, logit_scale), t, options) for w, b, t in zip(ws, bs, ts, strict=True)]
    return _finish(tasks, (input.shape[0], *shape), reduction, return_stats)


def _finish(tasks: list[_Task], shape, reduction: str, return_stats: bool):
    """Losses (and stats) of one linear layer, or of one for each position, reduced together."""
    prepared = [_prepare(task) for task in tasks]
    factor = None
    if reduction == "mean":
        factor = _inverse(sum([p.mass for p in prepared])), _inverse(sum([p.rows for p in prepared]))
    outs = [_run(p, factor, reduction == "none", return_stats) for p in prepared]
    if reduction == "none":
        loss = _join([loss for loss, _ in outs], shape)
    else:
        loss = outs[0][0] if len(outs) == 1 else torch.stack([loss for loss, _ in outs]).sum()
        if factor is not None and (isinstance(factor[0], Tensor) or math.isinf(factor[0])):
            loss = loss + factor[0] * 0.0  # nothing kept: 0 / 0, which is torch's answer too
            loss = loss.to(tasks[0].stream.accumulate_dtype)
    if not return_stats:
        return loss
    stats = [s for _, s in outs if s is not None]
    return loss, Stats(_join([s.lse for s in stats], shape), _join([s.correct for s in stats], shape))


def _inverse(mass: float | Tensor) -> float | Tensor:
    return 1.0 / mass if isinstance(mass, Tensor) or mass else math.inf


def _join(parts: list[Tensor], shape) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.stack(parts, 1)).reshape(shape)


def _factor_dtype(stream: Stream) -> torch.dtype:
    """Of the row factors and of the sum over rows: float64, for 1/N in fp32 would shift every loss by the same rounding."""
    return torch.float32 if stream.device.type == "mps" else torch.float64


class _Prepared(NamedTuple):
    """A task ready to run: folds and picks, what the mean divides by, and the constant factors before that division.

    mass: sum of v_y over kept rows. rows: number of kept rows. factors: numbers, scalars or (N,), in float64; the z-loss factor apart.
    """

    task: _Task
    picks: Tensor | None
    keep: Tensor | None
    folds: tuple[Fold, ...]
    row_loss: str
    factors: list[float | Tensor]
    mass: float | Tensor
    rows: float | Tensor


def _prepare(task: _Task) -> _Prepared:
    stream, target, options = task
    (n, c), exact = stream.shape, _factor_dtype(stream)
    eps, v = options.smoothing, None if options.weight is None else options.weight.to(stream.accumulate_dtype)
    factors: list[float | Tensor]
    rows: float | Tensor = float(n)
    smooth_folds = (Total(tensors=() if v is None else (v,)),) if eps else ()
    smooth_mass = eps if v is None else v.sum(dtype=exact) * (eps / c)
    if target.dim() == 2:
        wide = stream.accumulate_dtype
        with autocast_off(target.device):
            sums = target.sum(-1, dtype=wide) if v is None else torch.cat([part.to(wide) @ v for part in target.split(1024)])
        factors = [(1.0 - eps) * sums.to(exact) + smooth_mass, 1.0 - eps, *([eps / c] if eps else [])]
        folds = (LogSumExp(), Dot(tensors=(target,) if v is None else (target, v)), *smooth_folds)
        return _Prepared(task, None, None, folds, "cross_entropy_probabilities", factors, rows, rows)
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
    return _Prepared(task, picks, keep, (LogSumExp(exclude_picks=True), *smooth_folds), "cross_entropy", factors, mass, rows)


def _run(
    p: _Prepared, factor: tuple[float | Tensor, float | Tensor] | None, rowwise: bool, return_stats: bool
) -> tuple[Tensor, Stats | None]:
    """The loss (a sum, or (N,)) and the stats of one prepared task."""
    stream, _, options = p.task
    n = stream.shape[0]
    factors = [f if factor is None else f * factor[0] for f in p.factors]
    if options.z_loss:
        factors.append(options.z_loss if factor is None else options.z_loss * factor[1])
    like, exact = stream.tensors[0], _factor_dtype(stream)
    args = [(f if isinstance(f, Tensor) else like.new_full((), f, dtype=exact)).expand(n) for f in factors]
    if p.keep is not None:  # nothing kept: 1 / 0, which the dense engine's autograd would multiply by 0 and hand NaN to dw
        args = [torch.where(p.keep, f, 0.0) for f in args]
    numbers = (1.0 if options.smoothing else 0.0, 1.0 if options.z_loss else 0.0)
    if not rowwise and not return_stats:
        return stream_loss(stream, p.picks, p.folds, p.row_loss, args, numbers, keep=p.keep, engine=options.engine), None
    by_probability = p.picks is None
    folds = (*p.folds, TopK((1,))) if by_probability and return_stats else p.folds
    states, picked = reduce_logits(stream, p.picks, folds, keep=p.keep, engine=options.engine)
    loss = ROW_LOSSES[p.row_loss](states, picked, args, numbers)
    lse = log_sum_exp(states[0])
    if picked is not None:
        correct = picked[:, 0] >= states[0][0]
        lse = torch.logaddexp(lse, picked[:, 0])
    elif return_stats:
        correct = p.task.target.argmax(-1) == states[-1][1]
    else:
        return (loss if rowwise else loss.sum()).to(stream.accumulate_dtype), None
    if p.keep is not None:
        loss, lse = torch.where(p.keep, loss, 0.0), torch.where(p.keep, lse, 0.0)
        correct = correct & p.keep
    loss = (loss if rowwise else loss.sum()).to(stream.accumulate_dtype)
    return loss, Stats(lse, correct)

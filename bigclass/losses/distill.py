"""Distillation: a linear layer taught by another one over the same classes, or by a stored list of its best classes.

    p_ij = softmax of t_ij / T,  t_i = teacher_softcap(teacher_logit_scale (teacher_weight u_i + teacher_bias))     u_i (E,), a constant
    q_ij = softmax of s_ij / T,  s_i = softcap(logit_scale (linear_weight x_i + linear_bias))                       x_i (D,)

`linear_kl_div` streams both layers (core/compare.py): with N rows and C classes 2NC(D+E) flops for the loss, 4NCD more for its gradients
(2NCD each for input and weight, 0 for a frozen one), as many as the dense computation. Neither N x C matrix exists: whole rows of both
are kept in the planner's workspace (`bigclass.planning`), as many at a time as fit. 16-bit weights are read at 2CD and 2CE bytes a chunk.

`linear_topk_kl_div` streams the student once, with K picks a row: 6NCD flops with gradients, in the same workspace.

Measured in fp32 on two cores of an EPYC 9004 beside F.kl_div of log-softmaxes, gradients included, N=2048, C=32000, D=512, E=1024: forward
2.39 s (dense 3.10), reverse 2.50 (3.73), Jensen-Shannon 2.68 (6.78); a peak of 64 MiB beyond inputs and gradients (1193), 68 (2693).

A temperature moves into the scale and the soft cap: cap tanh(z / cap) / T = cap' tanh((z / T) / cap') with cap' = cap / T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.divergences import DIVERGENCES, CrossEntropy, Divergence
from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import LogSumExp
from bigclass.core.row_losses import ROW_LOSSES, register_row_loss
from bigclass.core.stream import Softcap, Stream
from bigclass.losses.cross_entropy import REDUCTIONS
from bigclass.losses.inputs import check_index, check_linear, check_range, check_scale, check_tensor, make_stream, open_layer
from bigclass.losses.softmax import beside_largest, factor_dtype, others
from bigclass.losses.targets import SparseTarget
from bigclass.parallel.classes import over_batch, reduce_logits, stream_loss, whole_batch
from bigclass.parallel.divergences import compare_rows, compare_sum
from bigclass.parallel.layer import Layer, layer_of

KINDS = ("forward", "reverse", "jensen_shannon")
RESTS = ("tail", "renormalize")


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float | Tensor | None = None,
    engine: str = "auto",
    group: Any = None,
) -> Tensor:
    r"""Divergence of a student's linear layer from a teacher's over the same classes, without the N x C logits of either.

    With p_i the teacher's softmax at the temperature T and q_i the student's,

        forward          T^2 KL(p_i || q_i) = T^2 sum_j p_ij log(p_ij / q_ij)
        reverse          T^2 KL(q_i || p_i)
        jensen_shannon   T^2 [beta KL(p_i || m_i) + (1 - beta) KL(q_i || m_i)],  m_i = beta p_i + (1 - beta) q_i

    The factor T^2 keeps gradients as large at every temperature (Hinton et al.); divide by temperature ** 2 for the bare divergence.
    forward is `torch.nn.functional.kl_div(log q, log p, log_target=True)` summed over classes. jensen_shannon is the generalised one of
    GKD, beta the teacher's share of the mixture: near 0 it behaves as beta KL(p || q), near 1 as (1 - beta) KL(q || p).
    Where student and teacher agree the loss and its gradients are small to their last digits: 0 for equal logits.

    Args:
        input: the student's features (..., D), with any number of leading axes. linear_weight: (C, D). linear_bias: (C,).
        teacher_input: the teacher's features (..., E) with the same leading axes; without a teacher_weight its stored logits (..., C).
        teacher_weight: (C, E). teacher_bias: (C,). The teacher is a constant: whatever of it requires gradients gets none.
        divergence: "forward", "reverse" or "jensen_shannon". beta: of the last, 0 < beta < 1.
        temperature: T > 0; divides the (soft-capped) logits of both.
        reduction: "mean" over the rows that count (torch's "batchmean"; not its "mean", which divides by C too), "sum" or "none".
        mask: (...) bool; rows where it is False contribute exactly nothing, even if they hold NaN (e.g. labels != -100). None: all count.
        softcap, logit_scale: of the student, as in `linear_cross_entropy`. teacher_softcap, teacher_logit_scale: of the teacher.
        engine: "auto", "dense" (materialises both) or "tiled". There is no fused one for two streams: on a GPU "auto" is tiled.
        group: as in `linear_cross_entropy`. teacher_weight and teacher_bias are shards of the same classes as linear_weight; stored logits
            are those of all classes.

    Returns:
        The loss, fp32 (float64 for a float64 student): a scalar, or for reduction "none" (...), 0 where masked out. Infinite where a
        distribution has mass and the one it is measured by has none. A mean over no row is NaN, as that of `linear_cross_entropy`.

    Raises:
        ValueError (also a RuntimeError): shapes, devices or values that do not fit. TypeError: wrong dtypes.

    Example:
        >>> x, w = torch.randn(8, 16), torch.randn(1000, 16, requires_grad=True)
        >>> u, v = torch.randn(8, 64), torch.randn(1000, 64)
        >>> bigclass.linear_kl_div(x, w, u, v, temperature=2.0).backward()

    Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; Agarwal et al., "On-Policy Distillation of Language
    Models: Learning from Self-Generated Mistakes" (GKD), arXiv:2306.13649, section 2.
    """
    layer = open_layer(input, linear_weight, linear_bias, group)
    check_options(reduction, temperature)
    student = _tempered(layer, softcap, logit_scale, temperature)
    teacher = _teacher(layer, group, teacher_input, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale, temperature)
    loss = kl_div(
        student, teacher, layer.input.shape[:-1], divergence=divergence, beta=beta, temperature=temperature, reduction=reduction,
        mask=layer.gather(mask), engine=engine,
    )  # fmt: skip
    return layer.own(loss) if reduction == "none" else loss


def kl_div(
    student: Stream, teacher: Stream, lead: Sequence[int], *, divergence: str = "forward", beta: float = 0.5, temperature: float = 1.0,
    reduction: str = "mean", mask: Tensor | None = None, engine: str = "auto",
) -> Tensor:  # fmt: skip
    """`linear_kl_div` of two streams, at the temperature already, whose N rows are `lead`; options: `check_options`."""
    kind = _divergence(divergence, beta)
    keep = _kept(mask, lead, student.device)
    if reduction == "none":
        return (compare_rows(student, teacher, kind, keep=keep, engine=engine) * temperature**2).reshape(tuple(lead))
    rows = _Rows(student, keep, temperature, reduction)
    return rows.finish(compare_sum(student, teacher, kind, rows.factor, keep=keep, engine=engine))


def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_index: Tensor,
    teacher_log_prob: Tensor,
    *,
    linear_bias: Tensor | None = None,
    rest: str = "tail",
    temperature: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    engine: str = "auto",
    group: Any = None,
) -> Tensor:
    r"""Forward KL of a student's linear layer from the K best classes of a teacher, stored with their log-probabilities.

    With p_ik the teacher's probabilities of its K classes, P_i their sum, q_ik the student's and Q_i their sum, at the temperature T,

        tail            T^2 [sum_k p_ik log(p_ik / q_ik) + (1 - P_i) log((1 - P_i) / (1 - Q_i))]: all other classes are one
        renormalize     T^2 sum_k p'_ik log(p'_ik / q_ik),  p'_ik = p_ik / P_i: the others have nothing

    q is the student's softmax over all C classes in both. 1 - Q is made of the log-sum-exp of the other classes, not by subtraction.

    Args:
        input: the student's features (..., D). linear_weight: (C, D). linear_bias: (C,).
        teacher_index: (..., K) class indices, int64 or int32; -1 is none. A class that stands twice in a row gets the sum.
        teacher_log_prob: (..., K) the teacher's log-probabilities of these classes *at the temperature T*: log softmax(t / T). A constant.
            For rest="renormalize" anything that differs from them by a number a row will do, such as logits t / T.
        rest: "tail" or "renormalize" (the formulas above).
        temperature: T > 0; divides the student's (soft-capped) logits.
        reduction, mask, softcap, logit_scale: as in `linear_kl_div`.
        engine: "auto", "dense", "tiled" or "fused". group: as in `linear_cross_entropy`.

    Returns:
        The loss, as `linear_kl_div`. A row without any class (all -1) has nothing to renormalise: NaN. With "tail" it is 0.

    Raises:
        ValueError (also a RuntimeError): shapes, devices or values that do not fit (on a CPU also a row of "tail" whose probabilities sum
        to more than 1: those are logits). TypeError: wrong dtypes.
        IndexError: a class outside [-1, C) in a row that counts.

    Example:
        >>> with torch.no_grad():  # once, and stored
        ...     values, index, log_prob = bigclass.linear_topk(u, v, 32, return_log_probs=True)
        >>> bigclass.linear_topk_kl_div(x, w, index, log_prob).backward()

    Hinton et al., arXiv:1503.02531.
    """
    layer = open_layer(input, linear_weight, linear_bias, group)
    check_options(reduction, temperature)
    if rest not in RESTS:
        raise ArgumentError(f"rest: expected one of {RESTS}, got {rest!r}")
    input, teacher_index, teacher_log_prob, mask = (layer.input, *[layer.gather(t) for t in (teacher_index, teacher_log_prob, mask)])
    lead, classes = input.shape[:-1], layer.classes
    _check_stored(teacher_index, teacher_log_prob, input)
    keep = _kept(mask, lead, input.device)
    student = _tempered(layer, softcap, logit_scale, temperature)
    index, p, tail = _stored(teacher_index, teacher_log_prob, rest, keep, student)
    check_range("teacher_index", index, index != -1, classes)
    index = torch.where(index < -1, classes, index)  # for the op to refuse, where looking here would be a host sync
    rows = _Rows(student, keep, temperature, reduction)
    args = [(index >= 0).to(p.dtype), p, p.log().masked_fill(p == 0.0, 0.0), tail, tail.log().masked_fill(tail == 0.0, 0.0), rows.factor]
    folds = (LogSumExp(exclude_picks=True),)
    if reduction != "none":
        return rows.finish(stream_loss(student, index, folds, "topk_kl_div", args, keep=keep, engine=engine))
    states, picked = reduce_logits(student, index, folds, keep=keep, engine=engine)
    loss = ROW_LOSSES["topk_kl_div"](states, picked, args, ())
    loss = loss if keep is None else torch.where(keep, loss, 0.0)
    return layer.own(loss.to(student.accumulate_dtype).reshape(lead))


@register_row_loss("topk_kl_div")
def topk_row_loss(folds, picked, args, numbers):
    """args: (N, K) which picks there are, p, log p; (N,) the teacher's tail, its logarithm, factors of the row."""
    there, p, log_p, tail, log_tail, factor = args
    s, rest, _ = beside_largest(folds[0], torch.where(there > 0, picked, torch.finfo(picked.dtype).min))
    nll = -F.logsigmoid(s - others(rest, s))  # -log q, which keeps its digits for a certain student
    among = torch.where(p == 0, 0.0, p * (log_p + nll)).sum(1)  # not p > 0, which would make 0 of a teacher's NaN
    # a tail of the teacher where the student has none: infinite, as it should be
    gap = torch.where(tail == 0, 0.0, rest - s.logsumexp(1))
    return factor * (among + torch.where(tail == 0, 0.0, tail * (log_tail - F.logsigmoid(gap))))


def teacher_cross_entropy(
    x: Tensor, w: Tensor, scale: Tensor, teacher_x: Tensor, teacher_w: Tensor, teacher_scale: Tensor, engine: str = "auto"
) -> Tensor:
    """The sum over rows of -sum_j p_ij log q_ij, fp32 (float64 for float64 features): of contrastive features, whose scales are tensors.

    x (N, D), w (C, D), scale of one element: get gradients. teacher_x (N, E), teacher_w (C, E), teacher_scale: constants.
    """
    student = make_stream(x, w, None, None, scale)
    teacher = make_stream(teacher_x, teacher_w, None, None, teacher_scale)
    return compare_sum(student, teacher, CrossEntropy(), x.new_ones(x.shape[0], dtype=factor_dtype(student)), engine=engine)


class _Rows:
    """What rows are worth: the factor of each, and what a mean over none of them is."""

    def __init__(self, stream: Stream, keep: Tensor | None, temperature: float, reduction: str) -> None:
        n, exact = stream.shape[0], factor_dtype(stream)
        self.stream = stream
        self.none: Tensor | None = None
        factor = stream.tensors[0].new_full((), temperature**2, dtype=exact)
        if reduction == "mean":
            count = over_batch(stream.tensors[0].new_full((), n, dtype=exact) if keep is None else keep.sum(dtype=exact), stream)
            assert isinstance(count, Tensor)
            inverse = 1.0 / count
            factor, self.none = factor * inverse, inverse * 0.0  # nothing kept: 0 / 0, which is torch's answer too
        self.factor = factor.expand(n) if keep is None else torch.where(keep, factor, 0.0)

    def finish(self, loss: Tensor) -> Tensor:
        loss = whole_batch(loss, self.stream)
        return loss if self.none is None else loss + self.none.to(loss.dtype)


def check_options(reduction: str, temperature: float) -> None:
    """Raise for a reduction or a temperature that is none."""
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction: expected one of {REDUCTIONS} ('mean' is over rows, torch's 'batchmean'), got {reduction!r}")
    if isinstance(temperature, Tensor) or not 0.0 < temperature < math.inf:
        raise ArgumentError(f"temperature: expected a finite number greater than 0, got {temperature}")


def _divergence(name: str, beta: float) -> Divergence:
    if name not in KINDS:
        raise ArgumentError(f"divergence: expected one of {KINDS}, got {name!r}")
    if name != "jensen_shannon":
        if beta != 0.5:
            raise ArgumentError(f"beta: belongs to divergence='jensen_shannon', got {beta} with {name!r}; leave it out")
        return DIVERGENCES[name]()
    if isinstance(beta, Tensor) or not 0.0 < beta < 1.0:
        raise ArgumentError(f"beta: expected 0 < beta < 1 (for the ends take divergence='forward' and 'reverse'), got {beta}")
    return DIVERGENCES[name]((float(beta),))


def _tempered(layer: Layer, softcap: float | None, scale: float | Tensor | None, temperature: float) -> Stream:
    """softcap(scale (x w^T + b)) / temperature."""
    if softcap is not None:
        softcap = Softcap.at(softcap).numbers[0] / temperature
    stream = make_stream(*layer.operands, softcap, scale, layer=layer)
    return stream if temperature == 1.0 else replace(stream, scale=stream.scale / temperature)


def _teacher(
    student: Layer, group: Any, teacher_input: Tensor, weight: Tensor | None, bias: Tensor | None, softcap: float | None,
    scale: float | Tensor | None, temperature: float,
) -> Stream:  # fmt: skip
    """The teacher's stream: of features and a weight, or of stored logits."""
    input, lead, classes = student.input, student.input.shape[:-1], student.classes
    check_tensor("teacher_input", teacher_input)
    taught = None
    if weight is not None and student.layout is not None:
        with torch.no_grad():
            taught = layer_of(teacher_input.detach(), weight, bias, group)
        teacher_input, weight, bias = taught.operands
        sizes = [None if one is None or one.classes is None else one.classes.sizes for one in (taught.layout, student.layout)]
        if sizes[0] != sizes[1]:
            raise ArgumentError(f"teacher_weight: expected shards of {sizes[1]} classes (as linear_weight), got {sizes[0]}")
    elif weight is None:
        teacher_input = student.gather(teacher_input)
    if teacher_input.device != input.device:
        raise ArgumentError(f"teacher_input: expected device {input.device} (that of input), got {teacher_input.device}")
    if teacher_input.shape[:-1] != lead or teacher_input.dim() != input.dim():
        raise ArgumentError(f"teacher_input: expected leading axes {tuple(lead)} (those of input), got shape {tuple(teacher_input.shape)}")
    if scale is not None:
        check_scale(scale, input, name="teacher_logit_scale")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ArgumentError(f"teacher_softcap: expected a finite number greater than 0, got {softcap}")
    if weight is not None:
        check_linear(teacher_input, weight, bias, names=("teacher_input", "teacher_weight", "teacher_bias"), shard=taught is not None)
        taught = taught or Layer(teacher_input, weight, bias)
        if taught.classes != classes:
            raise ArgumentError(f"teacher_weight: expected {classes} classes (as linear_weight), got {taught.classes}")
        return _tempered(taught, softcap, scale, temperature)
    if bias is not None:
        raise ArgumentError("teacher_bias: belongs to a teacher_weight, which is None; add it to the logits in teacher_input")
    if not teacher_input.is_floating_point():
        raise ArgumentTypeError(f"teacher_input: expected a floating-point tensor, got {teacher_input.dtype}")
    if teacher_input.shape[-1] != classes:
        raise ArgumentError(
            f"teacher_input: expected logits of {classes} classes (as linear_weight), for teacher_weight is None, got shape "
            f"{tuple(teacher_input.shape)}"
        )
    stream = _tempered(Layer(teacher_input, student.weight, None), softcap, scale, temperature)
    given, shards = teacher_input.reshape(-1, classes), None if student.layout is None else student.layout.classes
    return replace(stream, pairs=(), given=given if shards is None else shards.vector(given), layout=student.layout)


def _kept(mask: Tensor | None, lead: Sequence[int], device: torch.device) -> Tensor | None:
    """The mask (N,); None if it is known that every row counts (known: on a CPU, outside a traced graph)."""
    if mask is None:
        return None
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(f"mask: expected a bool tensor, got {mask.dtype}")
    if mask.device != device:
        raise ArgumentError(f"mask: expected device {device} (that of input), got {mask.device}")
    if tuple(mask.shape) != tuple(lead):
        raise ArgumentError(f"mask: expected shape {tuple(lead)}, got {tuple(mask.shape)}")
    if not torch.compiler.is_compiling() and mask.device.type == "cpu" and bool(mask.all()):
        return None
    made_for_inference = not torch.compiler.is_compiling() and mask.is_inference()  # autograd would refuse to save it
    return mask.reshape(-1).clone() if made_for_inference else mask.reshape(-1)


def _check_stored(index: Tensor, log_prob: Tensor, input: Tensor) -> None:
    check_index("teacher_index", index, input.device)
    check_tensor("teacher_log_prob", log_prob)
    lead = tuple(input.shape[:-1])
    if index.dim() != len(lead) + 1 or tuple(index.shape[:-1]) != lead or index.shape[-1] == 0:
        raise ArgumentError(f"teacher_index: expected shape {(*lead, 'K')}, K >= 1, got {tuple(index.shape)}")
    if not log_prob.is_floating_point():
        raise ArgumentTypeError(f"teacher_log_prob: expected a floating-point tensor, got {log_prob.dtype}")
    if log_prob.device != input.device:
        raise ArgumentError(f"teacher_log_prob: expected device {input.device} (that of input), got {log_prob.device}")
    if log_prob.shape != index.shape:
        raise ArgumentError(f"teacher_log_prob: expected the shape of teacher_index, {tuple(index.shape)}, got {tuple(log_prob.shape)}")


def _stored(index: Tensor, log_prob: Tensor, rest: str, keep: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """(classes (N, K), -1 for none; the teacher's p (N, K), each class once; its tail (N,)), in float64."""
    k, exact = index.shape[-1], factor_dtype(stream)
    index, log_p = index.reshape(-1, k), log_prob.detach().reshape(-1, k).to(exact)
    if keep is not None:  # an ignored row may hold anything
        index, log_p = torch.where(keep.unsqueeze(1), index, -1), torch.where(keep.unsqueeze(1), log_p, 0.0)
    log_p = log_p.masked_fill(index == -1, -math.inf)
    lse = log_p.logsumexp(1)
    if rest == "renormalize":
        log_p = log_p - lse.unsqueeze(1)
        tail = torch.where(lse > -math.inf, 0.0, math.nan)  # of nothing, or of NaN: NaN, whatever the row lists
        tail = tail.to(exact) if keep is None else torch.where(keep, tail, 0.0).to(exact)
    else:
        if not torch.compiler.is_compiling() and lse.device.type == "cpu" and bool((lse > 0.1).any()):
            raise ArgumentError(
                f"teacher_log_prob: expected log-probabilities, whose exponentials sum to at most 1 a row, got {float(lse.exp().max())}"
                "; of logits take log_softmax over all classes first, or rest='renormalize'"
            )
        # 1 - P in the form that keeps its digits; rounding may have left P above 1
        tail = -torch.expm1(lse.clamp_max(0.0))
    index, p = SparseTarget(index, log_p.exp(), stream.shape[1]).merged()
    if rest == "tail":  # where every class is listed, what is left is rounding, which no class could hold
        tail = tail.masked_fill((index >= 0).sum(1) == stream.shape[1], 0.0)
    return index, p, tail

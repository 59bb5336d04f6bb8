"""Cross-entropy of a linear layer: what the user gives, checked, and the road it takes. The arithmetic: softmax.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.plan import Work, choose_engine
from bigclass.core.stream import Stream
from bigclass.core.updates import SlabUpdate
from bigclass.losses.inputs import check_index, check_range, check_smoothing, check_tensor, kept_rows, make_stream, open_layer, shifted
from bigclass.losses.lora import Adapters, adapter_pairs
from bigclass.losses.sampling import ClassSampling, sampled
from bigclass.losses.softmax import Options, Stats, Task, finish
from bigclass.losses.targets import SparseTarget
from bigclass.parallel.layer import Layer

REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseTarget,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    lora: Adapters | None = None,
    shift: int = 0,
    z_loss: float = 0.0,
    grad_filter: float | None = None,
    update: SlabUpdate | None = None,
    engine: str = "auto",
    return_stats: bool = False,
    group: Any = None,
    sample: ClassSampling | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    r"""Cross-entropy of `softcap(logit_scale * (input @ linear_weight.T + linear_bias))` against target, without the N x C logits.

    A superset of `torch.nn.functional.linear_cross_entropy` (torch 2.13): the same arguments mean the same and give the same
    values and errors. Half-precision inputs give an fp32 loss; logits are never rounded to 16 bits.

    Args:
        input: features (..., D), with any number of leading axes.
        linear_weight: (C, D); or (C, d_1, ..., d_K, D) with input (N, D) for the K-dimensional loss.
        target: class indices (...) (K-dimensional: (N, d_1, ..., d_K)), int64 or int32; or class probabilities (..., C)
            (K-dimensional: (N, C, d_1, ..., d_K)), floating point; or a `SparseTarget` (..., C), a few classes a row.
        linear_bias: (C,), or (C, d_1, ..., d_K).
        weight: (C,) a factor for each class. A constant: it gets no gradient.
        reduction: "mean", "sum" or "none".
        ignore_index: rows with this target contribute exactly nothing. None: -100 for index targets; not allowed with probabilities.
        label_smoothing: in [0, 1].
        softcap: logits become softcap * tanh(logits / softcap); > 0.
        logit_scale: a number or a scalar tensor (which gets a gradient); applied before the soft cap.
        lora: (A (R, D), B (C, R), alpha), or a sequence of such triples: low-rank adapters of a weight (C, D). The logits become
            x w^T + alpha (x A^T) B^T (+ bias), then scale and soft cap. alpha is the factor itself (PEFT's lora_alpha / r), a number or a
            scalar tensor. No copy of the weight is made, and a frozen one gets no C x D gradient (arXiv:2106.09685).
        shift: k > 0 scores position t's features against the label at t + k along the last leading axis, without slicing copies. (Of a
            sequence whose positions are spread over ranks each rank drops its last k: shift its labels before they are spread.)
            With reduction "none" the result has T - k positions.
        z_loss: adds z_loss * LSE^2 to each row's loss (PaLM, arXiv:2204.02311); in the mean it is averaged over the kept rows.
        grad_filter: None: exact gradients. A tolerance t such as 2**-8: columns of the logits' gradient that are too small to matter are
            left out of its two products, for the weight and for the features, but for the mean that they have in common.
            Promised, for each block of rows (up to 512; on GPUs 4096): let G' be that gradient without its entries at the targets, row
            weights and z-loss included; then what is lost has at most the norm t ||G'||_F.
            Exact as ever are the loss and the gradients of linear_bias and logit_scale. A target's own entry is never left out.
            Nothing at all is left out in a block that would keep more than 60 % of its columns, as early in training, where the gradient
            is spread evenly; nor by engine="dense" (small problems under "auto", too), by "tiled" on GPUs, nor by "fused" where logit_scale
            learns. `explain(grad_filter=t)` says so.
            Costs a few passes over the logits, spares up to two of the three products; takes 256 MiB on a CPU unless `planning` says
            otherwise. Where ignored rows are, blocks are of those that count. Not with class probabilities (..., C): an entry that belongs
            to a target cannot be told from others there. Not below the rounding of the products' dtype (2^-24 for float32, 2^-11 for
            float16, 2^-8 for bfloat16).
        update: takes the weight's gradient slab by slab in the backward, as in `linear_binary_cross_entropy`: no C x D gradient. Of one
            loss: not with reduction "none", return_stats or a K-dimensional weight.
        engine: "auto", "dense" (materialises), "tiled", "fused".
        return_stats: also return `Stats`: log-sum-exps, hits, and what grad_filter kept (of this rank's classes).
        group: a ProcessGroup or a DeviceMesh of one axis, over whose ranks the classes are spread: linear_weight and linear_bias are this
            rank's shard (of any size), the rows the same on all; targets count the classes of all ranks, first to last. For rows that are
            spread, too, or instead: a `Spread`. DTensors say how they lie. Every rank gets the loss of the whole, and exact gradients: of
            its shard, and of what all ranks hold (with rows that are spread: exact once they are combined as `Spread.gradients` says).
            weight, pos_weight and (N, C) targets are those of all classes. Not with lora, update or a K-dimensional weight. An
            error that one rank alone has (a target out of range) leaves the others waiting, as in any collective.
        sample: a `ClassSampling`: a share of the classes for this step, the targets among them, and a gradient of their rows alone. Of
            class indices; not with softcap, lora, label_smoothing, class weights, update, or a logit_scale that learns. None: all classes.

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
    layer = open_layer(input, linear_weight, linear_bias, group, weight_dims=None)
    input, linear_weight, linear_bias = layer.operands
    target = gathered_target(layer, target)
    classes, positions = layer.classes, linear_weight.shape[1:-1]
    lead = input.shape[:-1]
    if positions and len(lead) != 1:
        raise ArgumentError(
            f"input: a K-dimensional loss (linear_weight {tuple(linear_weight.shape)}) needs (N, D), got {tuple(input.shape)}"
        )
    arguments = Arguments(weight, reduction, ignore_index, label_smoothing, z_loss, 0.0, shift, engine, return_stats, update)
    target, probabilities = arguments.check(target, lead, classes, positions, input.device)
    if positions or lora is not None:
        layer.whole("lora" if lora is not None else "linear_weight (K-dimensional)")
    pairs = adapter_pairs(input, linear_weight, lora)
    plain = softcap is None and logit_scale is None and lora is None and grad_filter is None and layer.layout is None and sample is None
    if isinstance(target, Tensor) and not (positions or probabilities) and plain:
        loss = arguments.run_small(input, linear_weight, linear_bias, target)
        if loss is not None:
            return loss
    if shift and (reduction == "none" or return_stats):
        layer.refuse_cut(len(lead) - 1)
    if sample is not None:
        given = (softcap, lora, weight, update, label_smoothing or None, logit_scale if isinstance(logit_scale, Tensor) else None)
        if positions or probabilities or any([a is not None for a in given]):
            raise ArgumentError(
                "sample: is for class indices and a weight (C, D), without softcap, lora, weight, update, label_smoothing and with a "
                "number for logit_scale; leave these out, or sample=None"
            )
        loss = _sampled(layer, target, sample, logit_scale, grad_filter, arguments)
        return layer.finish(loss, reduction)
    if positions:
        if shift or isinstance(target, SparseTarget):
            raise ArgumentError(f"{'shift' if shift else 'SparseTarget'}: is not defined for a K-dimensional loss")
        if return_stats and grad_filter is not None:
            raise ArgumentError("return_stats: of a K-dimensional loss each position has a filter of its own; leave it or grad_filter out")
        return _per_position(input, linear_weight, linear_bias, target, probabilities, softcap, logit_scale, grad_filter, arguments)
    stream = make_stream(input, linear_weight, linear_bias, softcap, logit_scale, pairs=pairs, grad_filter=grad_filter, layer=layer)
    return layer.finish(arguments.run(stream, lead, target), reduction)


def linear_poly_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseTarget,
    *,
    epsilon: float = 2.0,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    lora: Adapters | None = None,
    grad_filter: float | None = None,
    update: SlabUpdate | None = None,
    engine: str = "auto",
    group: Any = None,
) -> Tensor:
    r"""Poly-1 loss of a linear layer: cross-entropy + epsilon (1 - p_t), p_t = sum_j t_ij softmax(s)_ij, without the N x C logits.

    Args:
        epsilon: coefficient of the Poly-1 term; 0 is cross-entropy. t is the smoothed target.
        Everything else: as in `linear_cross_entropy`.

    Returns:
        The loss, as `linear_cross_entropy`. The mean divides by the number of kept rows.

    Raises:
        What `linear_cross_entropy` raises.

    Example:
        >>> loss = bigclass.linear_poly_cross_entropy(features, weight, labels, epsilon=2.0)

    Leng et al., "PolyLoss", arXiv:2204.12511, equation 6.
    """
    layer = open_layer(input, linear_weight, linear_bias, group)
    if lora is not None:
        layer.whole("lora")
    pairs = adapter_pairs(layer.input, layer.weight, lora)
    stream = make_stream(*layer.operands, softcap, logit_scale, pairs=pairs, grad_filter=grad_filter, layer=layer)
    loss = cross_entropy(
        stream, layer.input.shape[:-1], gathered_target(layer, target), poly=epsilon, reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing, update=update, engine=engine,
    )  # fmt: skip
    return layer.finish(loss, reduction)


def gathered_target(layer: Layer, target: Any) -> Any:
    """A target for all rows that the layer works on."""
    if isinstance(target, SparseTarget) and layer.rows is not None:
        return replace(target, indices=layer.gather(target.indices), weights=layer.gather(target.weights))
    return layer.gather(target)


def cross_entropy(stream: Stream, lead: Sequence[int], target: Tensor | SparseTarget, **arguments: Any) -> Any:
    """`linear_cross_entropy` of a stream whose N rows are `lead`, with the arguments of `Arguments`."""
    checked = Arguments(**arguments)
    target, probabilities = checked.check(target, lead, stream.shape[1], (), stream.device)
    if isinstance(target, Tensor) and not probabilities and stream.is_linear and not stream.grad_filter:
        loss = checked.run_small(*stream.pairs[0], stream.bias, target)
        if loss is not None:
            return loss
    return checked.run(stream, lead, target)


@dataclass(frozen=True)
class Arguments:
    """What `linear_cross_entropy` takes beside the layer and the target, and `poly`, the coefficient of Poly-1."""

    weight: Tensor | None = None
    reduction: str = "mean"
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    poly: float = 0.0
    shift: int = 0
    engine: str = "auto"
    return_stats: bool = False
    update: SlabUpdate | None = None

    @property
    def options(self) -> Options:
        ignore_index = -100 if self.ignore_index is None else self.ignore_index
        return Options(self.weight, self.label_smoothing, self.z_loss, self.poly, ignore_index, self.engine, self.update)

    def check(
        self, target: Tensor | SparseTarget, lead: Sequence[int], classes: int, positions: Sequence[int], device: torch.device
    ) -> tuple[Tensor | SparseTarget, bool]:
        """(the target, is it probabilities). Raise for what does not fit."""
        if self.reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction: expected one of {REDUCTIONS}, got {self.reduction!r}")
        check_smoothing(self.label_smoothing, self.z_loss)
        self._check_update(positions)
        self._check_weight(classes, device)
        sparse = isinstance(target, SparseTarget)
        if not sparse:
            check_tensor("target", target)
        probabilities = tuple(target.shape) == (*lead, classes, *positions)
        if target.device != device:
            raise ArgumentError(f"target: expected device {device} (that of input), got {target.device}")
        if probabilities or sparse:
            if not probabilities:
                raise ArgumentError(f"target: expected a SparseTarget of shape {(*lead, classes)}, got {tuple(target.shape)}")
            if self.ignore_index is not None:
                raise ArgumentError("ignore_index: cannot be specified when target contains class probabilities; leave it None")
            if not sparse and not target.is_floating_point():
                raise ArgumentTypeError(
                    f"target: expected floating-point class probabilities for shape {tuple(target.shape)}, got {target.dtype}"
                )
            if self.shift:
                raise ArgumentError("shift: works on class indices; slice the features and the class probabilities instead")
            return target, True
        if tuple(target.shape) != (*lead, *positions):
            raise ArgumentError(
                f"target: expected class indices of shape {(*lead, *positions)} or class probabilities of shape "
                f"{(*lead, classes, *positions)}, got {tuple(target.shape)}"
            )
        check_index("target", target, device, self.options.ignore_index)
        return target.long(), False  # ignore_index may be any number

    def _check_update(self, positions: Sequence[int]) -> None:
        if self.update is None:
            return
        if self.reduction == "none":
            raise ArgumentError("reduction: 'none' has no one loss to take a step for; with update= use 'mean' or 'sum'")
        if self.return_stats:
            raise ArgumentError("return_stats: the log-sum-exp has a gradient of its own, which update= cannot take; leave one out")
        if positions:
            raise ArgumentError(f"update: expected a weight (C, D), got one with positions {tuple(positions)}; leave update=None")

    def _check_weight(self, classes: int, device: torch.device) -> None:
        weight = self.weight
        if weight is None:
            return
        check_tensor("weight", weight)
        if tuple(weight.shape) != (classes,):
            raise ArgumentError(f"weight: expected a factor for each of {classes} classes, shape ({classes},), got {tuple(weight.shape)}")
        if not weight.is_floating_point():
            raise ArgumentTypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
        if weight.device != device:
            raise ArgumentError(f"weight: expected device {device} (that of input), got {weight.device}")
        if weight.requires_grad:
            raise ArgumentError("weight: class weights are constants and get no gradient; pass weight.detach()")

    def run_small(self, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor) -> Tensor | None:
        """The loss of a problem so small that Python's own time rules; None: it is not, or is no plain cross-entropy."""
        if self.shift or self.return_stats or self.label_smoothing or self.z_loss or self.poly:
            return None
        if self.weight is not None or self.update is not None:
            return None
        if self.engine != "auto" or (b is not None and b.dtype != w.dtype) or not _is_small(x, w, target, self.ignore_index):
            return None
        return _small(x, w, b, target, self.reduction)

    def run(self, stream: Stream, lead: Sequence[int], target: Tensor | SparseTarget) -> Any:
        """The loss (and stats) of a checked target."""
        if isinstance(target, SparseTarget):
            return finish([Task(stream, target, self.options)], lead, self.reduction, self.return_stats)
        if target.dim() > len(lead):
            rows = target.reshape(-1, stream.shape[1])
            return finish([Task(stream, rows, self.options)], lead, self.reduction, self.return_stats)
        target, cut = shifted("target", target, self.shift, self.options.ignore_index)
        out: Any = finish([Task(stream, target.reshape(-1), self.options)], lead, self.reduction, self.return_stats)
        return out if cut is None else _cut(out, cut, self.reduction, self.return_stats)


def _sampled(layer: Layer, target: Any, sample: ClassSampling, logit_scale: Any, grad_filter: float | None, arguments: Arguments) -> Any:
    """The loss over a share of the classes."""
    ignored, lead = arguments.options.ignore_index, layer.input.shape[:-1]
    target, cut = shifted("target", target, arguments.shift, ignored)
    y = target.reshape(-1)
    keep = kept_rows(y, ignored)
    check_range("target", y, keep, layer.classes)
    found = sampled(layer, y, keep, sample)
    x, w, b = found.layer.operands
    move = found.shift.to(torch.promote_types(w.dtype, torch.float32)) / (1.0 if logit_scale is None else logit_scale)
    stream = make_stream(x, w, move if b is None else b + move, None, logit_scale, grad_filter=grad_filter, layer=found.layer)
    # places in the sample, none of which may look like the class that is ignored
    target = found.target if keep is None else torch.where(keep, found.target, -100)
    out = replace(arguments, shift=0, ignore_index=-100).run(stream, lead, target.reshape(lead))
    return out if cut is None else _cut(out, cut, arguments.reduction, arguments.return_stats)


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


def _cut(out, positions: int, reduction: str, return_stats: bool):
    """Only the positions that have a target."""
    loss, stats = out if return_stats else (out, None)
    if reduction == "none":
        loss = loss[..., :positions]
    return loss if stats is None else (loss, stats._replace(lse=stats.lse[..., :positions], correct=stats.correct[..., :positions]))


def _per_position(input, linear_weight, linear_bias, target, probabilities, softcap, logit_scale, grad_filter, arguments: Arguments):
    """The K-dimensional loss: each of the d_1 ... d_K positions is a classifier of its own over the same classes."""
    shape = linear_weight.shape[1:-1]
    ws = linear_weight.flatten(1, -2).unbind(1)
    bs = [None] * len(ws) if linear_bias is None else linear_bias.flatten(1).unbind(1)
    ts = target.flatten(2).unbind(2) if probabilities else target.flatten(1).unbind(1)
    streams = [make_stream(input, w, b, softcap, logit_scale, grad_filter=grad_filter) for w, b in zip(ws, bs, strict=True)]
    tasks = [Task(stream, t, arguments.options) for stream, t in zip(streams, ts, strict=True)]
    return finish(tasks, (input.shape[0], *shape), arguments.reduction, arguments.return_stats)

"""Softmax losses over cosines with a margin for the target, without the N x C logits: ArcFace, CosFace and their kin.

    cos_ij = <x_i/||x_i||, w_j/||w_j||>        s_ij = scale cos_ij        loss_i = softplus(LSE_rest_i - scale f(cos_iy))

The target stays out of the log-sum-exp, so the margin is arithmetic on one number a row, and a confident row keeps its digits.
With theta the angle of cos,

    f = cos(m1 theta + m2) - m3        df/dcos = m1 sin(m1 theta + m2) / sin theta        (m1, m2, m3): ArcFace (1, m, 0), CosFace (1, 0, m)

Near theta = 0 the cosine no longer tells the angle (in fp32 1 - cos is off by 6e-8, so at theta = 1e-3 by a tenth). So f and its slope
are made before the stream, in float64 from N dot products of the operands themselves (`target_cosines`), and the streamed logit of the
target serves only as the road for its gradient. Below sin theta = sqrt(eps of the sums), 3e-4 in fp32, the slope, which has no bound, is
held; the gradient by x or w has a factor sin theta more, so it fades to 0 at theta = 0 instead of keeping a length without a direction.

Sub-centres (Deng et al., 2020): w is (C K, D), rows jK .. jK + K - 1 the centres of class j, its logit the largest of the K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.custom_ops import checked_in_graph
from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import Fold, LogSumExp, log_sum
from bigclass.core.guards import autocast_off
from bigclass.core.norms import EPSILON, inverse_norms
from bigclass.core.problem import exact_dtype
from bigclass.core.row_losses import ROW_LOSSES, register_row_loss
from bigclass.core.stream import Stream
from bigclass.core.updates import SlabUpdate
from bigclass.losses.cross_entropy import REDUCTIONS
from bigclass.losses.inputs import check_index, check_linear, check_range, filter_of, in_autocast, kept_picks, kept_rows
from bigclass.losses.margin_folds import CurricularLogSumExp, GroupedLogSumExp
from bigclass.losses.sampling import ClassSampling, sampled
from bigclass.parallel.classes import observed_loss, over_batch, reduce_logits, whole_batch
from bigclass.parallel.collectives import sum_over
from bigclass.parallel.layer import Layer, layer_of

# the margin (or margins) of each kind where none is given: those of the papers' code
KINDS: dict[str, float | tuple[float, float, float]] = {"arcface": 0.5, "cosface": 0.4, "combined": (1.0, 0.3, 0.2)}
BEYOND_PI = ("linear", "easy", "plain", "monotone", "clip")
GRADIENTS = ("differentiated", "straight_through")

MarginValue = float | Tensor | Sequence[float | Tensor]


def linear_margin_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kind: str = "arcface",
    margin: MarginValue | None = None,
    logit_scale: float = 64.0,
    subcenters: int = 1,
    beyond_pi: str | None = None,
    gradient: str = "differentiated",
    curriculum: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    grad_filter: float | None = None,
    update: SlabUpdate | None = None,
    engine: str = "auto",
    group: Any = None,
    sample: ClassSampling | None = None,
) -> Tensor:
    r"""Margin softmax: cross-entropy of `logit_scale * cos(input, linear_weight)`, of the target f(cos), without the N x C logits.

    f = cos(m1 theta + m2) - m3 with theta the target's angle. Weights are normalised, and differentiated, without a C x D copy.

    Args:
        input: features (..., D), of any length; they are normalised here.
        linear_weight: (C, D), or with sub-centres (C K, D), rows jK to jK + K - 1 being the centres of class j; normalised here.
        target: class indices (...), int64 or int32.
        kind: "arcface" (m2), "cosface" (m3) or "combined" (m1, m2, m3); SphereFace is "combined" with (m1, 0, 0).
        margin: m2 or m3; for "combined" three of them. Numbers, or, for m2 and m3, tensors (...) with one for each row (constants).
            m2 lies in [0, pi], under beyond_pi="clip" in [-pi, pi]; those of rows are looked at on a CPU, where the row is not ignored.
            None: 0.5, 0.4 and (1, 0.3, 0.2).
        logit_scale: a number > 0 (s in the papers).
        subcenters: K >= 1, the centres of a class, of which the nearest counts.
        beyond_pi: f where m1 theta + m2 passes pi and the cosine would rise again.
            "linear": cos(theta) - m2 sin(m2) - m3 there, as the papers' code (m1 = 1; a step down at pi).
            "easy": the angular margin only where cos(theta) > 0, elsewhere cos(theta) - m3.
            "plain": the cosine as it is, which falls, and with it the differentiated gradient turns round.
            "monotone": (-1)^k cos(t) - 2k - m3 for t = m1 theta + m2 in [k pi, (k + 1) pi], as SphereFace.
            "clip": t is held in [0, pi], without a gradient beyond, as AdaFace.
            None: "linear", or "monotone" if m1 is not 1.
        gradient: "differentiated", or "straight_through": f passes its gradient on as if it were cos, as where f is made under no_grad.
        curriculum: t of CurricularFace (a number or a scalar tensor, a constant): negatives whose cosine exceeds f ("plain") count with
            cos (t + cos). Not with sub-centres.
        reduction: "mean" (over kept rows), "sum" or "none". ignore_index: rows with it contribute exactly nothing; None: -100.
        update: takes the weight's gradient slab by slab in the backward, as in `linear_binary_cross_entropy`: no C x D gradient.
        group: as in `linear_cross_entropy`; with sub-centres shards are of whole classes. Margins of rows go with the rows.
        sample: a `ClassSampling`: a share of the classes for this step, as in Partial FC. None: all.
        grad_filter, engine: as in `linear_cross_entropy`. A class that a block of rows leaves out gets from them its part of the
            mean alone, through its norm, too.

    Norms are clamped at 1e-12 as in `torch.nn.functional.normalize`. A class of zeros has cosine 0 with everything (and the gradient
    of that clamp, 1e12 long). Features of zeros are refused on a CPU (they have no angle); elsewhere, and in a traced graph, their
    cosines are 0 and their gradient is that of the clamp.

    Returns:
        The loss, fp32 (float64 for float64 inputs): a scalar, or the shape of target.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit; a row of zeros in input (on a CPU).
        IndexError: a target outside [0, C) that is not ignore_index (on CUDA: a device-side assertion).
        RuntimeError: a second derivative is asked for.

    Example:
        >>> loss = linear_margin_loss(embeddings, weight, labels, kind="arcface", margin=0.5, logit_scale=64.0)

    Deng et al., "ArcFace", arXiv:1801.07698, equation 4; Wang et al., "CosFace", arXiv:1801.09414; Liu et al., "SphereFace",
    arXiv:1704.08063; Deng et al., "Sub-center ArcFace", ECCV 2020; Huang et al., "CurricularFace", arXiv:2004.00288.
    """
    if sample is not None and update is not None:
        raise ArgumentError("sample: its gradient is of some rows, which update= does not take; leave one of them out")
    layer = layer_of(input, linear_weight, None, group)
    target = layer.gather(target)
    chosen = Margin.of(kind, gathered_margin(layer, margin), beyond_pi, gradient, target)
    cosines = Cosines.of(layer, target, logit_scale, subcenters, ignore_index, grad_filter, sample)
    chosen.check_rows(cosines.keep)
    loss = cosines.loss(chosen, curriculum, reduction, engine, update)
    return layer.own(loss) if reduction == "none" else loss


def gathered_margin(layer: Layer, margin: MarginValue | None) -> Any:
    """The margin, one of rows for all rows that the layer works on."""
    if layer.rows is None or margin is None:
        return margin
    if isinstance(margin, Tensor):
        return layer.gather(margin)
    return margin if isinstance(margin, int | float) else [layer.gather(m) for m in margin]


@dataclass(frozen=True)
class Margin:
    """f and its slope. m1: a number; m2, m3: numbers or tensors (N,). beyond_pi, straight_through: see `linear_margin_loss`."""

    m1: float
    m2: float | Tensor
    m3: float | Tensor
    beyond_pi: str
    straight_through: bool = False

    @classmethod
    def of(cls, kind: str, margin: MarginValue | None, beyond_pi: str | None, gradient: str, target: Tensor | None = None) -> Margin:
        """What `linear_margin_loss` was told; raise for what does not fit. target: whose shape margins of rows have; None: numbers only."""
        if kind not in KINDS:
            raise ArgumentError(f"kind: expected one of {tuple(KINDS)}, got {kind!r}")
        if gradient not in GRADIENTS:
            raise ArgumentError(f"gradient: expected one of {GRADIENTS}, got {gradient!r}")
        given = KINDS[kind] if margin is None else margin
        several = isinstance(given, Sequence)
        if several != (kind == "combined") or (several and len(given) != 3):
            raise ArgumentError(
                f"margin: expected {'(m1, m2, m3)' if kind == 'combined' else 'one margin'} for kind {kind!r}, got {given!r}"
            )
        m1, m2, m3 = given if isinstance(given, Sequence) else (1.0, given, 0.0) if kind == "arcface" else (1.0, 0.0, given)
        if isinstance(m1, Tensor) or not _is_number(m1) or not m1 > 0.0:
            raise ArgumentError(f"margin: expected a number m1 > 0, got {m1!r}")
        if beyond_pi is None:
            beyond_pi = "linear" if m1 == 1.0 else "monotone"
        if beyond_pi not in BEYOND_PI:
            raise ArgumentError(f"beyond_pi: expected one of {BEYOND_PI}, got {beyond_pi!r}")
        if beyond_pi == "linear" and m1 != 1.0:
            raise ArgumentError(f"beyond_pi: 'linear' is defined for m1 = 1, got {m1}; use 'monotone' or 'plain'")
        made = cls(float(m1), _of_rows("m2", m2, target), _of_rows("m3", m3, target), beyond_pi, gradient == "straight_through")
        if not isinstance(made.m2, Tensor) and not made.least <= made.m2 <= math.pi:
            raise ArgumentError(f"margin: expected an angle in {made.angles}, got {made.m2}")
        return made

    @property
    def least(self) -> float:
        """Of m2. Only where the angle is held in [0, pi] may a margin be negative: AdaFace's are, of clear images."""
        return -math.pi if self.beyond_pi == "clip" else 0.0

    @property
    def angles(self) -> str:
        return "[-pi, pi]" if self.least else "[0, pi]"

    def check_rows(self, keep: Tensor | None) -> None:
        """Raise for margins of kept rows that are no numbers or angles, where looking costs no host sync."""
        for name, m in (("m2", self.m2), ("m3", self.m3)):
            if not isinstance(m, Tensor) or torch.compiler.is_compiling() or m.device.type != "cpu":
                continue
            wrong = ~((m >= self.least) & (m <= math.pi)) if name == "m2" else ~m.isfinite()
            wrong = wrong if keep is None else wrong & keep
            if bool(wrong.any()):
                row, wanted = int(wrong.nonzero()[0]), f"an angle in {self.angles}" if name == "m2" else "a finite number"
                raise ArgumentError(f"margin: expected {wanted} for {name}, got {float(m[row]):g} in row {row}")

    def plain(self, cos: Tensor) -> Tensor:
        """cos(m1 theta + m2) - m3, whatever lies beyond pi."""
        return torch.cos(self.m1 * torch.acos(cos) + self.m2) - self.m3

    def apply(self, cos: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """f (N,) and its slope df/dcos (N,) from cos (N,) in float64. floor: of sin theta in the slope."""
        one = torch.ones_like(cos)
        if self.m1 == 1.0 and not isinstance(self.m2, Tensor) and self.m2 == 0.0:
            return cos - self.m3, one
        t, sine = self.m1 * torch.acos(cos) + self.m2, ((1.0 - cos) * (1.0 + cos)).sqrt().clamp_min(floor)
        f, slope = torch.cos(t), self.m1 * torch.sin(t) / sine
        if self.beyond_pi == "linear":
            step = self.m2 * torch.sin(self.m2) if isinstance(self.m2, Tensor) else self.m2 * math.sin(self.m2)
            f, slope = torch.where(t < math.pi, f, cos - step), torch.where(t < math.pi, slope, one)
        elif self.beyond_pi == "easy":
            f, slope = torch.where(cos > 0.0, f, cos), torch.where(cos > 0.0, slope, one)
        elif self.beyond_pi == "monotone":
            turns = torch.floor(t / math.pi)
            sign = 1.0 - 2.0 * torch.remainder(turns, 2.0)
            f, slope = sign * f - 2.0 * turns, sign * slope
        elif self.beyond_pi == "clip":
            inside = (t > 0.0) & (t < math.pi)
            f, slope = torch.cos(t.clamp(0.0, math.pi)), torch.where(inside, slope, 0.0)
        return f - self.m3, one if self.straight_through else slope


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf  # isfinite does not trace


def _of_rows(name: str, margin: float | Tensor, target: Tensor | None) -> float | Tensor:
    if not isinstance(margin, Tensor):
        if not _is_number(margin):
            raise ArgumentError(f"margin: expected a finite number for {name}, got {margin!r}")
        return float(margin)
    if target is None or margin.shape != target.shape or margin.device != target.device or not margin.is_floating_point():
        wanted = (
            "a number" if target is None else f"a number or a floating-point tensor like target, {tuple(target.shape)} on {target.device}"
        )
        raise ArgumentError(f"margin: expected {wanted} for {name}, got {margin.dtype} {tuple(margin.shape)} on {margin.device}")
    if margin.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"margin: {name} is a constant and gets no gradient; pass {name}.detach()")
    return margin.reshape(-1).to(exact_dtype(margin.device))


@dataclass(frozen=True)
class Cosines:
    """A checked problem: the stream of scale cos_ij, the target's own cosines, which rows count.

    picks: (N, K) rows of w, -1 where ignored. target: (N,) the cosine of the nearest centre, float64. nearest: (N, K) 1 at that centre.
    """

    stream: Stream
    picks: Tensor
    keep: Tensor | None
    target: Tensor
    nearest: Tensor
    lead: torch.Size
    scale: float

    @classmethod
    def of(
        cls, layer: Layer, target: Tensor, scale: float, subcenters: int, ignore_index: int | None, grad_filter: float | None = None,
        sample: ClassSampling | None = None,
    ) -> Cosines:  # fmt: skip
        """Check and normalise what `linear_margin_loss` was given."""
        input, w, shards = layer.input, layer.weight, None if layer.layout is None else layer.layout.classes
        check_layer(layer, scale, subcenters)
        ignored = -100 if ignore_index is None else ignore_index
        check_index("target", target, input.device, ignored)
        if target.shape != input.shape[:-1]:
            raise ArgumentError(f"target: expected class indices of shape {tuple(input.shape[:-1])}, got {tuple(target.shape)}")
        y, classes = target.reshape(-1).long(), layer.classes // subcenters
        keep = kept_rows(y, ignored)
        check_range("target", y, keep, classes)
        shift = None
        if sample is not None:
            found = sampled(layer, y, keep, sample, subcenters)
            layer, y, shift = found.layer, found.target, found.shift
            w, shards, classes = layer.weight, None if layer.layout is None else layer.layout.classes, layer.classes // subcenters
        if torch.compiler.is_compiling():  # the loss's own op would speak of the rows of w, where there are sub-centres
            y = checked_in_graph(kept_picks(y, keep, classes), classes).squeeze(-1)
        centres = torch.where(y < 0, classes, y).unsqueeze(-1) * subcenters + torch.arange(subcenters, device=y.device)
        picks = centres if keep is None else torch.where(keep.unsqueeze(-1), centres, -1)
        x = input.reshape(-1, input.shape[-1])
        if keep is not None:  # what ignored rows hold must not reach the gradient of their norm
            x = x.masked_fill(~keep.unsqueeze(-1), 0.0)
        check_directions(x, keep)
        with autocast_off(x.device), torch.no_grad():
            if shards is None:
                cosines = target_cosines(x.detach(), w.detach(), picks)
            else:  # each from the rank that has the class
                here = shards.picks(picks)
                cosines = (
                    target_cosines(x.detach(), w.detach(), here) if w.shape[0] else x.new_zeros(picks.shape, dtype=exact_dtype(x.device))
                )
                cosines = sum_over(torch.where(here >= 0, cosines, 0.0), shards.ranks)
            best, at = cosines.max(1, keepdim=True)
        nearest = torch.zeros_like(cosines).scatter(1, at, 1.0)
        stream = cosine_stream(layer, x, scale, grad_filter)
        if shift is not None:
            stream = replace(stream, bias=shift.to(stream.accumulate_dtype), bias_last=True)
        return cls(stream, picks, keep, best.squeeze(1), nearest, target.shape, float(scale))

    def loss(
        self, margin: Margin, curriculum: float | Tensor | None, reduction: str, engine: str, update: SlabUpdate | None = None
    ) -> Tensor:
        """The reduced loss under a margin."""
        if reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
        stream, keep, n = self.stream, self.keep, self.target.numel()
        exact, wide = self.target.dtype, stream.accumulate_dtype
        f, slope = margin.apply(self.target, math.sqrt(torch.finfo(wide).eps))
        fold: Fold = LogSumExp(exclude_picks=True)
        if self.picks.shape[1] > 1:
            fold = GroupedLogSumExp((float(self.picks.shape[1]),), exclude_picks=True)
        if curriculum is not None:
            fold = CurricularLogSumExp((self.scale,), (self._hard(margin, wide), self._level(curriculum, wide)), exclude_picks=True)
        count = over_batch(float(n) if keep is None else keep.sum(dtype=exact), stream)
        factor = torch.ones_like(f)
        if reduction == "mean":
            factor = factor / (count if isinstance(count, Tensor) else max(count, 1.0))
        args = [self.scale * f, slope.unsqueeze(1) * self.nearest, factor]
        if keep is not None:
            args = [torch.where(keep if a.dim() == 1 else keep.unsqueeze(1), a, 0.0) for a in args]
        if reduction == "none":
            if update is not None:
                raise ArgumentError("reduction: 'none' has no one loss to take a step for; with update= use 'mean' or 'sum'")
            states, picked = reduce_logits(stream, self.picks, (fold,), keep=keep, engine=engine)
            loss = ROW_LOSSES["margin"](states, picked, args, ())
            return (loss if keep is None else torch.where(keep, loss, 0.0)).to(wide).reshape(self.lead)
        loss, _ = observed_loss(stream, self.picks, (fold,), (), "margin", args, keep=keep, update=update, engine=engine)
        loss = whole_batch(loss, stream)
        if reduction == "mean" and (isinstance(count, Tensor) or not count):
            loss = loss + (0.0 / count if isinstance(count, Tensor) else math.nan)  # nothing kept: 0 / 0, as torch's mean
        return loss.to(wide)

    def _hard(self, margin: Margin, dtype: torch.dtype) -> Tensor:
        """(N,) the logit above which a negative is hard."""
        if self.picks.shape[1] > 1:
            raise ArgumentError(f"curriculum: is not defined for sub-centres, got subcenters={self.picks.shape[1]}; leave it None")
        return (self.scale * margin.plain(self.target)).to(dtype)

    def _level(self, t: float | Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) t in every row."""
        if not isinstance(t, Tensor):
            if not _is_number(t):
                raise ArgumentError(f"curriculum: expected a finite number or a scalar tensor, got {t!r}")
            t = self.target.new_full((), t)
        elif t.numel() != 1 or not t.is_floating_point() or t.device != self.target.device:
            raise ArgumentError(
                f"curriculum: expected a floating-point scalar on {self.target.device}, got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
        return t.detach().to(dtype).reshape(()).expand(self.target.numel())


def check_layer(layer: Layer, scale: float, subcenters: int) -> None:
    """Raise unless input (..., D), w (C K, D), a scale and K fit together."""
    w = layer.weight
    check_linear(layer.input, w, None, shard=layer.layout is not None)
    if not isinstance(subcenters, int) or isinstance(subcenters, bool):
        raise ArgumentTypeError(f"subcenters: expected an integer, got {subcenters!r}")
    if subcenters < 1 or w.shape[0] % subcenters:
        raise ArgumentError(f"subcenters: expected a number >= 1 that divides the {w.shape[0]} rows of linear_weight, got {subcenters}")
    if not _is_number(scale) or not scale > 0.0:
        raise ArgumentError(f"logit_scale: expected a finite number > 0, got {scale!r}")


def check_directions(x: Tensor, keep: Tensor | None) -> None:
    """Raise for kept rows of zeros, where looking costs no host sync."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return
    lost = (x == 0).all(1) if keep is None else (x == 0).all(1) & keep
    if bool(lost.any()):
        raise ArgumentError(f"input: expected features with a direction, got zeros only in row {int(lost.nonzero()[0])}")


def cosine_stream(layer: Layer, x: Tensor, scale: float, grad_filter: float | None = None) -> Stream:
    """The stream of scale cos_ij for x (N, D) and the layer's w: x is normalised in fp32 and stays so up to its product, w nowhere."""
    w, device = layer.weight, x.device.type
    narrow = layer.compute_dtype or torch.promote_types(x.dtype, w.dtype)
    narrow = torch.get_autocast_dtype(device) if in_autocast(device) else narrow
    with autocast_off(x.device):
        unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=EPSILON)
    compute = narrow if narrow.itemsize == 2 else None
    return Stream(
        ((unit, w),), class_scale=inverse_norms(w), normalized=True, scale=float(scale), compute_dtype=compute,
        grad_filter=filter_of(grad_filter), layout=layer.layout,
    )  # fmt: skip


@register_row_loss("margin")
def margin_row_loss(folds, picked, args, numbers):
    """args: (N,) the target's logit with its margin, (N, K) its slopes by the picks, (N,) factors."""
    logit, slopes, factor = args
    rest = folds[0]
    s = _Linearised.apply(picked, logit, slopes)
    return factor * -F.logsigmoid((s - rest[0]) - log_sum(rest))  # log sigmoid keeps its digits on both sides


class _Linearised(torch.autograd.Function):
    """value (N,) as a function of picked (N, K), of which only the slopes (N, K) are known."""

    @staticmethod
    def forward(picked, value, slopes):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        picked, _, slopes = inputs
        ctx.save_for_backward(slopes)
        ctx.dtype = picked.dtype

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_margin_loss: double backward (create_graph=True) is not supported by any engine")
        (slopes,) = ctx.saved_tensors
        return (g.unsqueeze(1) * slopes).to(ctx.dtype), None, None


# Elements of the gathered weights at once: float64, so 2 MiB on a CPU.
_PIECE = {"cpu": 1 << 18, "other": 1 << 24}


@torch.library.custom_op("bigclass::target_cosines", mutates_args=())
def target_cosines(x: Tensor, w: Tensor, picks: Tensor) -> Tensor:
    """cos(x_i, w_p) for p = picks[i, k], in float64 (N, K): N K dot products. Without gradients."""
    (n, k), wide = picks.shape, exact_dtype(x.device)
    out = x.new_empty((n, k), dtype=wide)
    step = max(_PIECE["cpu" if x.device.type == "cpu" else "other"] // max(k * x.shape[1], 1), 1)
    for at in range(0, n, step):
        near = w[picks[at : at + step].clamp(0, w.shape[0] - 1)].to(wide)  # (n, K, D)
        one = x[at : at + step].to(wide).unsqueeze(-1)  # (n, D, 1)
        norms = torch.linalg.vector_norm(near, dim=2).clamp_min(EPSILON) * torch.linalg.vector_norm(one, dim=1).clamp_min(EPSILON)
        out[at : at + step] = torch.bmm(near, one).squeeze(-1) / norms
    return out.clamp_(-1.0, 1.0)


@target_cosines.register_fake
def _(x, w, picks):
    return x.new_empty(picks.shape, dtype=exact_dtype(x.device))

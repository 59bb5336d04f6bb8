"""The monoids that logits are folded with.

A fold takes the logits of a row (or, with axis="columns", of a class) to a few numbers, its *state*:

    state = merge over tiles of lift(tile)            merge is associative, identity() is its neutral element

so tiles, chunks and ranks all combine in the same way, and the raw state can leave and enter.

The state is raw on purpose. Log-sum-exp is kept as (m, l) with LSE = m + log l: its differentiable part is l, and m
is a reference point that gradients treat as a constant (m + log l does not depend on which m was chosen, so
differentiating l alone gives the exact gradient). Probabilities in a backward are then e^(s-m) / l, with no rounding
of a finished LSE in between.

With `exclude_picks` the picked classes contribute nothing, bit for bit. That is how precision survives confident rows:
log(l) over the rest minus the pick never cancels, where LSE - s_y does.

A fold is written once for rows: for columns an engine hands it the transposed tile. In its methods
n is the kept axis, c the folded one, states are (n, width), and every method must also work under plain autograd
when `tile.scratch` is None (the dense engine differentiates `lift`, which is also how `gradient` is tested).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from bigclass.core.stream import check_name
from bigclass.core.triton_form import TritonForm, triton_form

if TYPE_CHECKING:
    import triton.language as tl

State = tuple[Tensor, ...]

PIECE = 1 << 19  # logits of `pieces`: 2 MiB of fp32, half of it for each of two cores


class Tile:
    """A block of logits, and room to work.

    s: (n, c), not to be changed but through this class. scratch: a buffer of the same shape, or None: allocate (dense).
    work: more of them, by number (`SumFold.lift_with_gradient` has some).
    base: index of the first folded element. picks: where the picked logits are.
    """

    def __init__(self, s: Tensor, base: int = 0, scratch: Tensor | None = None, picks: Tensor | None = None, mask: Tensor | None = None):
        self.s = s
        self.base = base
        self.scratch = scratch
        self._picks = picks  # tiled: flat positions in s's memory; those of other tiles point one past its end
        self._mask = mask  # dense: (n, c), True at picks
        self._saved: Tensor | None = None
        self.work: Callable[[int], Tensor] | None = None

    def logits(self, without_picks: bool) -> Tensor:
        """s, with -inf at the picks if asked. Call `restore` before s is read again."""
        if not without_picks:
            return self.s
        if self._mask is not None:
            return self.s.masked_fill(self._mask, -math.inf)
        if self._picks is not None:
            flat = _flat(self.s)
            self._saved = flat[self._picks]
            flat[self._picks] = -math.inf
        return self.s

    def restore(self) -> None:
        """Put the picked logits back."""
        if self._saved is not None:
            _flat(self.s)[self._picks] = self._saved
            self._saved = None

    def clear_picks(self, t: Tensor) -> Tensor:
        """t (n, c) with exact zeros at the picks. Overwrites t if it is a work buffer."""
        if self._mask is not None:
            return t.masked_fill(self._mask, 0.0)
        if self._picks is not None:
            _flat(t)[self._picks] = 0.0
        return t


def _flat(t: Tensor) -> Tensor:
    """A work buffer (contiguous, or a transposed view) as one row, with the spare element behind its end.

    Picks outside the tile are aimed at that element, so that no index has to be read on the host."""
    return torch.as_strided(t, (t.numel() + 1,), (1,))


@dataclass(frozen=True, eq=False)
class Fold:
    """A monoid over logits. Subclass under `@register_fold` to add one; engines need no edit.

    numbers: constants. tensors: parameters, one per entry of `tensor_axes`: "kept" is a vector along the kept axis
    (for rows: (N,)), "folded" one along the folded axis (for rows: (C,)), "grid" a full (N, C) tensor.
    "kept" and "grid" tensors get gradients if the class defines `tensor_gradient`; "folded" ones are constants.
    """

    numbers: tuple[float, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    exclude_picks: bool = False
    axis: str = "rows"

    name: ClassVar[str] = ""
    tensor_axes: ClassVar[tuple[str, ...]] = ()
    differentiable: ClassVar[tuple[bool, ...]] = ()  # for each part of the state
    overwrites: ClassVar[bool] = False  # are `lift_in_place` and `factor_in_place` there?
    weight: ClassVar[int] = 0  # of its Triton forms: 0, a few registers a logit; 2, a dozen; 3, more (fused/launch.py chooses tiles by it)
    literal_numbers: ClassVar[bool] = False  # are the numbers integers that Triton forms take as constants (shapes)?

    @property
    def group(self) -> int:
        """Adjacent classes that belong together: engines cut tiles only between groups. Of row folds; C must be whole groups."""
        return 1

    def identity(self, n: int, like: Tensor) -> State:
        """The neutral state of n rows, in like's dtype and device."""
        raise NotImplementedError

    def lift(self, tile: Tile, tensors: Sequence[Tensor]) -> State:
        """The state of one tile, each part (n, width)."""
        raise NotImplementedError

    def merge(self, a: State, b: State) -> State:
        """The state of two disjoint sets of classes."""
        raise NotImplementedError

    def update(self, state: State, tile: Tile, tensors: Sequence[Tensor]) -> State:
        """merge(state, lift(tile)); a fold that can skip work by looking at the state overrides this."""
        return self.merge(state, self.lift(tile, tensors))

    def gradient(self, tile: Tile, tensors: Sequence[Tensor], state: State, grads: Sequence[Tensor | None], out: Tensor) -> Tensor:
        """dL/ds (n, c), written to `out` (which may be the tile itself) and returned.

        state: the merged state. grads: dL/dstate, None where there is none.
        """
        raise NotImplementedError

    def tensor_gradient(self, which: int, tile: Tile, tensors: Sequence[Tensor], state: State, grads: Sequence[Tensor | None]) -> Tensor:
        """This tile's part of dL/dtensors[which]: (n, 1) for a "kept" tensor, (n, c) for a "grid".

        With `exclude_picks` the picks have no part in it: `tile.clear_picks` on a copy in `tile.scratch`.
        """
        raise NotImplementedError(f"fold {self.name!r} has no gradient for its tensor {which}")

    def lift_in_place(self, tile: Tile) -> State:
        """`lift`, leaving in tile.s what `factor_in_place` turns into a gradient: saves an exponential per logit."""
        raise NotImplementedError

    def factor_in_place(self, local: State, state: State, grads: Sequence[Tensor | None]) -> Tensor:
        """(n, 1): times this, what `lift_in_place` left is dL/ds. local: the state it returned; its last part sums what it left."""
        raise NotImplementedError

    # The same three for the fused engine, on fp32 tiles s (n, c) in which what does not count is -inf; a state's parts and their
    # gradients are vectors (n,), tensors broadcast to (n, c), numbers are scalars:
    #     lift_triton(s, *tensors, *numbers) -> parts          merge_triton(*parts, *other_parts) -> parts
    #     gradient_triton(s, *parts, *gradients_of_the_differentiable_parts, *tensors, *numbers) -> dL/ds
    lift_triton: ClassVar[TritonForm | None] = None
    merge_triton: ClassVar[TritonForm | None] = None
    gradient_triton: ClassVar[TritonForm | None] = None
    # Where the fused engine can save a tile in 16 bits: `lift_triton` that also returns e = e^(s - m) (n, c), m its first part; and the
    # gradient from 2^15 e and m: saved_triton(e, m, *parts, *gradients_of_the_differentiable_parts) -> dL/ds
    saving_triton: ClassVar[TritonForm | None] = None
    saved_triton: ClassVar[TritonForm | None] = None

    @classmethod
    def can_save(cls) -> bool:
        """Is `saving_triton` that of this fold's own terms, and not inherited by one of others?"""
        forms = ("saving_triton", "saved_triton", "lift_triton", "gradient_triton")
        homes = [next(base for base in cls.__mro__ if form in vars(base)) for form in forms]
        return cls.saving_triton is not None and len(set(homes)) == 1


AnyFold = TypeVar("AnyFold", bound=Fold)

FOLDS: dict[str, type[Fold]] = {}


def register_fold(cls: type[AnyFold]) -> type[AnyFold]:
    """Make a `Fold` known under its `name`, so that it can cross a custom op."""
    check_name(cls.name, FOLDS, cls)
    FOLDS[cls.name] = cls
    return cls


def _there(g: Tensor | None) -> Tensor:
    """The gradient of a state's only differentiable part: an engine asks for no gradient of a fold that got none."""
    assert g is not None
    return g


def _finite(m: Tensor) -> Tensor:
    """The reference point: m, or the least finite number where nothing was folded yet (-inf - -inf would be NaN)."""
    return m.clamp_min(torch.finfo(m.dtype).min)


def pieces(s: Tensor) -> list[slice]:
    """The rows of a tile, a few at a time: what passes over them again and again then reads a CPU's own cache, not the one it shares.

    0.5 ns a logit instead of 0.7 for the five passes of a log-sum-exp, on two cores of a Xeon (Sapphire Rapids)."""
    step = max(PIECE // max(s.shape[1], 1), 1) if s.device.type == "cpu" else max(s.shape[0], 1)
    return [slice(at, min(at + step, s.shape[0])) for at in range(0, s.shape[0], step)]


def exp_(u: Tensor) -> Tensor:
    """e^u in place, for u <= 0.

    On CPUs as 2^(u log2 e): the math library behind `exp` takes 3 x the time of `exp2`, and 10 to 30 x where results underflow
    (0.82, 0.28 and up to 30 ns an element on one core of an EPYC 9004). The product's rounding, |u| 2^-25, is no larger than that of u.
    """
    return u.mul_(1.4426950408889634).exp2_() if u.device.type == "cpu" else u.exp_()


@register_fold
@dataclass(frozen=True, eq=False)
class LogSumExp(Fold):
    """(m, l) with m = max_j s_j and l = sum_j e^(s_j - m). `log_sum_exp(state)` finishes it."""

    name: ClassVar[str] = "logsumexp"
    differentiable: ClassVar[tuple[bool, ...]] = (False, True)
    overwrites: ClassVar[bool] = True

    def identity(self, n, like):
        return like.new_full((n, 1), -math.inf), like.new_zeros((n, 1))

    def lift(self, tile, tensors):
        s = tile.logits(self.exclude_picks)
        m = s.detach().amax(-1, keepdim=True)
        u = torch.sub(s, _finite(m), out=tile.scratch)
        e = torch.exp(u) if tile.scratch is None else exp_(u)
        return m, e.sum(-1, keepdim=True)

    def merge(self, a, b):
        m = torch.maximum(a[0], b[0])
        ref = _finite(m)
        return m, a[1] * torch.exp(a[0] - ref) + b[1] * torch.exp(b[0] - ref)

    def gradient(self, tile, tensors, state, grads, out):
        s = tile.logits(self.exclude_picks)
        return exp_(torch.sub(s, _finite(state[0]), out=out)).mul_(_there(grads[1]))

    def lift_in_place(self, tile):
        s = tile.logits(self.exclude_picks)
        m, l = s.new_empty((s.shape[0], 1)), s.new_empty((s.shape[0], 1))  # noqa: E741
        for rows in pieces(s):
            part = s[rows]
            torch.amax(part, -1, keepdim=True, out=m[rows])
            torch.sum(exp_(part.sub_(_finite(m[rows]))), -1, keepdim=True, out=l[rows])
        return m, l

    def factor_in_place(self, local, state, grads):
        # e^(s - m_tile) is there already; move it to the common reference in the same product
        return _there(grads[1]) * torch.exp(local[0] - _finite(state[0]))

    @triton_form
    def lift_triton(s):
        m = tl.max(s, axis=1)
        ref = tl.where(m == float("-inf"), 0.0, m)
        # Not s log2 e - m log2 e, one multiply-add instead of two operations: it is off by ulps of s, not of s - m.
        return m, tl.sum(tl.exp2((s - ref[:, None]) * 1.4426950408889634), axis=1)

    @triton_form
    def saving_triton(s):
        m = tl.max(s, axis=1)
        ref = tl.where(m == float("-inf"), 0.0, m)
        e = tl.exp2((s - ref[:, None]) * 1.4426950408889634)
        return m, tl.sum(e, axis=1), e

    @triton_form
    def merge_triton(m, l, m2, l2):  # noqa: E741
        top = tl.maximum(m, m2)
        ref = tl.where(top == float("-inf"), 0.0, top)
        return top, l * tl.exp2((m - ref) * 1.4426950408889634) + l2 * tl.exp2((m2 - ref) * 1.4426950408889634)

    @triton_form
    def gradient_triton(s, m, l, g):  # noqa: E741
        ref = tl.where(m == float("-inf"), 0.0, m)
        return tl.exp2((s - ref[:, None]) * 1.4426950408889634) * g[:, None]

    @triton_form
    def saved_triton(e, reference, m, l, g):  # noqa: E741
        ref = tl.where(m == float("-inf"), 0.0, m)
        # 2^-15 goes to e, where it is exact: the factor of a row that is sure of its class is as small as fp32 can be
        factor = tl.exp2((reference - ref) * 1.4426950408889634) * g
        return e * 3.0517578125e-05 * factor[:, None]  # pyright: ignore[reportOperatorIssue]


def log_sum_exp(state: State) -> Tensor:
    """LSE = m + log l, from a `LogSumExp` state; -inf where nothing was folded."""
    return state[0] + log_sum(state)


def log_sum(state: State) -> Tensor:
    """log l. Where nothing was folded (l = 0, and only there m = -inf) it is finite with a zero gradient, where log 0 would make NaN."""
    return (state[1] + torch.finfo(state[1].dtype).tiny).log()  # l is 0 or >= 1, so the sum is exact; a clamp would stop NaN's gradient


@register_fold
@dataclass(frozen=True, eq=False)
class ShiftedMoment(Fold):
    """(m, l, t) with u_j = s_j - m and, over all but the largest, l = sum of e^u_j, t = sum of (u_j - 1) e^u_j. For the entropy.

    H = log(1 + l) - (t + l) / (1 + l), and t's derivative by s_j is u_j e^u_j: 0 at the largest, where that of sum u e^u would be 1 and
    cancel against l's. With p nearly one-hot, LSE - sum p s is all rounding, and even 1 + l rounds l away:
    the largest term (exactly 1) therefore stays outside the sum.
    """

    name: ClassVar[str] = "shifted_moment"
    differentiable: ClassVar[tuple[bool, ...]] = (False, True, True)
    # e^u is 0 far above this, and u e^u must be 0 and not NaN at u = -inf
    _LOWEST: ClassVar[float] = -1e4

    def identity(self, n, like):
        return like.new_full((n, 1), -math.inf), like.new_zeros((n, 1)), like.new_zeros((n, 1))

    def lift(self, tile, tensors):
        s = tile.logits(self.exclude_picks)
        m, top = s.detach().max(-1, keepdim=True)
        u = torch.sub(s, _finite(m), out=tile.scratch)
        u = torch.clamp(u, min=self._LOWEST, out=tile.scratch)
        e = torch.exp(u)
        # The largest term is 1 and leaves the value, but not the derivative (m counts as a constant).
        largest = e.gather(-1, top)
        rest = e.scatter(-1, top, 0.0) if tile.scratch is None else e.scatter_(-1, top, 0.0)
        t = ((u - 1.0) * rest).sum(-1, keepdim=True)
        return m, rest.sum(-1, keepdim=True) + (largest - largest.detach()), t

    def merge(self, a, b):
        a_leads = a[0] >= b[0]
        big = [torch.where(a_leads, p, q) for p, q in zip(a, b, strict=True)]
        small = [torch.where(a_leads, q, p) for p, q in zip(a, b, strict=True)]
        down = (small[0] - _finite(big[0])).clamp_min(self._LOWEST)
        shrink = torch.exp(down)
        mass = small[1] + (small[0] > -math.inf)
        m = torch.maximum(a[0], b[0])
        seen = mass - small[1]  # 1, but 0 where nothing was folded
        return m, big[1] + shrink * mass, big[2] + shrink * ((small[2] - seen) + down * mass)

    def gradient(self, tile, tensors, state, grads, out):
        s = tile.logits(self.exclude_picks)
        u = torch.sub(s, _finite(state[0]), out=out).clamp_(min=self._LOWEST)
        e = torch.exp(u)
        if grads[2] is None:
            return torch.mul(e, _there(grads[1]), out=out)
        u.mul_(grads[2])
        return (u if grads[1] is None else u.add_(grads[1])).mul_(e)

    @triton_form
    def lift_triton(s):
        # One of the largest is left out, by counting them: an argmax has nothing to return for a row of NaN.
        m = tl.max(s, axis=1)
        u = s - tl.where(m == float("-inf"), 0.0, m)[:, None]
        u = tl.where(u < -1e4, -1e4, u)  # keeps NaN, which tl.maximum would not
        rest = tl.where(u == 0.0, 0.0, tl.exp2(u * 1.4426950408889634))
        more = tl.where(m == float("-inf"), 1.0, tl.sum(tl.where(u == 0.0, 1.0, 0.0), axis=1)) - 1.0
        return m, tl.sum(rest, axis=1) + more, tl.sum((u - 1.0) * rest, axis=1) - more

    @triton_form
    def merge_triton(m, l, t, m2, l2, t2):  # noqa: E741
        leads = m >= m2
        top = tl.where(leads, m, m2)
        low = tl.where(leads, m2, m)
        small_l, small_t = tl.where(leads, l2, l), tl.where(leads, t2, t)
        down = low - tl.where(top == float("-inf"), 0.0, top)
        down = tl.where(down < -1e4, -1e4, down)
        shrink = tl.exp2(down * 1.4426950408889634)
        seen = tl.where(low > float("-inf"), 1.0, 0.0)
        mass = small_l + seen
        big_t = tl.where(leads, t, t2) + shrink * ((small_t - seen) + down * mass)
        return top, tl.where(leads, l, l2) + shrink * mass, big_t

    @triton_form
    def gradient_triton(s, m, l, t, g_l, g_t):  # noqa: E741
        u = s - tl.where(m == float("-inf"), 0.0, m)[:, None]
        u = tl.where(u < -1e4, -1e4, u)
        return tl.exp2(u * 1.4426950408889634) * (g_l[:, None] + g_t[:, None] * u)


class _Entropy(torch.autograd.Function):
    """H = log(1 + l) - (t + l) / (1 + l).

    dH/dl = (t + l) / (1 + l)^2 in one piece: autograd's is a difference of two numbers near 1.
    """

    @staticmethod
    def forward(l, t):  # noqa: E741
        return torch.log1p(l) - (t + l) / (1.0 + l)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def slopes(l, t):  # noqa: E741
        return (t + l) / (1.0 + l).square(), -1.0 / (1.0 + l)

    @staticmethod
    def backward(ctx, g):
        by_l, by_t = _Entropy.slopes(*ctx.saved_tensors)
        return g * by_l, g * by_t


class _TransformableEntropy(_Entropy):
    """The same for forward mode and vmap, whose methods no traced graph takes."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, dl, dt):
        by_l, by_t = _Entropy.slopes(*ctx.saved_tensors)
        return dl * by_l + dt * by_t


def entropy(state: State) -> Tensor:
    """The entropy (nats) of softmax(s) from a `ShiftedMoment` state; NaN where every logit is -inf."""
    m, l, t = state  # noqa: E741
    form = _Entropy if torch.compiler.is_compiling() else _TransformableEntropy
    return form.apply(l, t).masked_fill(m == -math.inf, math.nan)


@dataclass(frozen=True, eq=False)
class SumFold(Fold):
    """(sum_j phi(s_j),): subclasses give `term` and its derivative `slope`, elementwise.

    Both may read the fold's numbers and its tensors, which come broadcastable to (n, c).
    """

    differentiable: ClassVar[tuple[bool, ...]] = (True,)
    vanishes: ClassVar[bool] = False  # are term and slope 0 at s = -inf? Picks are then left out by that, before anything is computed

    @property
    def zero_below(self) -> float:
        """Where s lies below this, term and slope are exactly 0: classes that do so in all rows of a tile are skipped."""
        return -math.inf

    @staticmethod
    def term(s: Tensor, numbers: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        """phi(s), a new tensor (n, c)."""
        raise NotImplementedError

    @staticmethod
    def slope(s: Tensor, numbers: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        """phi'(s), broadcastable to (n, c)."""
        raise NotImplementedError

    def identity(self, n, like):
        return (like.new_zeros((n, 1)),)

    @classmethod
    def term_and_slope(cls, s: Tensor, numbers: Sequence[float], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(phi, phi'), for a gradient that is made with the value: what both share is then computed once."""
        return cls.term(s, numbers, tensors), cls.slope(s, numbers, tensors)

    def lift(self, tile, tensors):
        if self.vanishes and self.exclude_picks:
            s = tile.logits(True)
            if tile.scratch is not None and s.device.type == "cpu" and self.zero_below > -math.inf:
                some = live(s, self.zero_below).nonzero().squeeze(-1)
                if 2 * some.numel() < s.shape[1]:
                    s, tensors = s[:, some], [t[:, some] if t.shape[1] > 1 else t for t in tensors]
            return (self.term(s, self.numbers, tensors).sum(-1, keepdim=True),)
        t = self.term(tile.s, self.numbers, tensors)
        if self.exclude_picks:
            t = tile.clear_picks(_own(t, tile))
        return (t.sum(-1, keepdim=True),)

    def merge(self, a, b):
        return (a[0] + b[0],)

    def gradient(self, tile, tensors, state, grads, out):
        slope = self.slope(tile.s, self.numbers, tensors)
        g = _there(grads[0])
        torch.mul(slope, g, out=out) if slope.shape == out.shape else out.copy_(slope * g)
        return tile.clear_picks(out) if self.exclude_picks else out

    def slope_in_place(self, s: Tensor, work: Callable[[int], Tensor], tensors: Sequence[Tensor]) -> Tensor | None:
        """phi(s), in one of the buffers work(0), work(1), ... like s, with phi'(s) left in s; None: not written so."""
        return None

    def lift_with_gradient(self, tile: Tile, tensors: Sequence[Tensor], g: Tensor, out: Tensor) -> State:
        """`lift` and, in `out` (which may be the tile), `gradient` for a g (n, 1) that is known before."""
        s = tile.logits(True) if self.vanishes and self.exclude_picks else tile.s
        if out is s and tile.work is not None and (self.vanishes or not self.exclude_picks):
            term = self.slope_in_place(s, tile.work, tensors)
            if term is not None:
                s.mul_(g)
                return (term.sum(-1, keepdim=True),)
        term, slope = self.term_and_slope(s, self.numbers, tensors)
        late = self.exclude_picks and not self.vanishes
        state = ((tile.clear_picks(_own(term, tile)) if late else term).sum(-1, keepdim=True),)
        torch.mul(slope, g, out=out) if slope.shape == out.shape else out.copy_(slope * g)
        if late:
            tile.clear_picks(out)
        return state

    constant_slope: ClassVar[bool] = False  # does the slope not depend on s?

    # (s, *tensors, *numbers), for the fused engine; what does not count is left out of the sum there
    term_triton: ClassVar[TritonForm | None] = None
    slope_triton: ClassVar[TritonForm | None] = None


def live(s: Tensor, below: float) -> Tensor:
    """(c,) bool: has the column a logit that is not below `below`? NaN is not."""
    return ~(s.amax(0) < below)


def _own(t: Tensor, tile: Tile) -> Tensor:
    """t where the tile may overwrite it: its scratch (dense: t itself, clear_picks copies there)."""
    return t if tile.scratch is None else tile.scratch.copy_(t)


@register_fold
@dataclass(frozen=True, eq=False)
class Total(SumFold):
    """sum_j c_j s_j, with c a class vector or, without tensors, 1."""

    name: ClassVar[str] = "total"
    tensor_axes: ClassVar[tuple[str, ...]] = ("folded",)
    constant_slope: ClassVar[bool] = True

    @staticmethod
    def term(s, numbers, tensors):
        return s * tensors[0] if tensors else s

    @staticmethod
    def slope(s, numbers, tensors):
        return tensors[0] if tensors else s.new_ones(())

    @triton_form
    def term_triton(s, c=1.0):
        return s * c  # pyright: ignore[reportOperatorIssue]

    @triton_form
    def slope_triton(s, c=1.0):
        return c


@register_fold
@dataclass(frozen=True, eq=False)
class Dot(SumFold):
    """sum_j t_ij c_j s_ij with a full (N, C) tensor t (class probabilities, a stored teacher) and, if given, a class vector c."""

    name: ClassVar[str] = "dot"
    tensor_axes: ClassVar[tuple[str, ...]] = ("grid", "folded")

    @staticmethod
    def term(s, numbers, tensors):
        t = s * tensors[0]
        return t * tensors[1] if len(tensors) > 1 else t

    @staticmethod
    def slope(s, numbers, tensors):
        return tensors[0] * tensors[1] if len(tensors) > 1 else tensors[0]

    def tensor_gradient(self, which, tile, tensors, state, grads):
        g = tile.s * _there(grads[0])
        g = g * tensors[1] if len(tensors) > 1 else g
        return tile.clear_picks(_own(g, tile)) if self.exclude_picks else g

    @triton_form
    def term_triton(s, t, c=1.0):
        return s * t * c

    @triton_form
    def slope_triton(s, t, c=1.0):
        return t * c

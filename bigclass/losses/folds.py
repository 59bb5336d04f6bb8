"""Folds that single losses need beside those of the core."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bigclass.core.folds import Fold, LogSumExp, register_fold
from bigclass.core.triton_form import triton_form

if TYPE_CHECKING:
    import triton.language as tl

_LOWEST = -1e4  # e^u is 0 far above this, and u e^u must be 0 and not NaN at u = -inf


def _shifted(s: Tensor) -> tuple[Tensor, Tensor]:
    """(m, s - m), with m finite where it is subtracted, and s - m not below `_LOWEST`."""
    m = s.detach().amax(-1, keepdim=True)
    return m, (s - m.clamp_min(torch.finfo(m.dtype).min)).clamp_min(_LOWEST)


@register_fold
@dataclass(frozen=True, eq=False)
class WeightedExp(LogSumExp):
    """(m, sum_j t_ij e^(s_ij - m)) with a full (N, C) tensor t of constants: the mass of softmax(s) under t, before division by l."""

    name: ClassVar[str] = "weighted_exp"
    tensor_axes: ClassVar[tuple[str, ...]] = ("grid",)
    overwrites: ClassVar[bool] = False

    def lift(self, tile, tensors):
        m, u = _shifted(tile.logits(self.exclude_picks))
        return m, (torch.exp(u) * tensors[0]).sum(-1, keepdim=True)

    def gradient(self, tile, tensors, state, grads, out):
        s = tile.logits(self.exclude_picks)
        torch.sub(s, state[0].clamp_min(torch.finfo(s.dtype).min), out=out)
        assert grads[1] is not None  # an engine asks for no gradient of a fold that got none
        return out.exp_().mul_(tensors[0]).mul_(grads[1])

    @triton_form
    def lift_triton(s, t):
        m = tl.max(s, axis=1)
        ref = tl.where(m == float("-inf"), 0.0, m)
        return m, tl.sum(t * tl.exp2((s - ref[:, None]) * 1.4426950408889634), axis=1)

    @triton_form
    def gradient_triton(s, m, l, g, t):  # noqa: E741
        ref = tl.where(m == float("-inf"), 0.0, m)
        return tl.exp2((s - ref[:, None]) * 1.4426950408889634) * t * g[:, None]


@register_fold
@dataclass(frozen=True, eq=False)
class TemperedMoment(Fold):
    """(m, sum_j e^(a s_j - m), sum_j u_j e^u_j) with u = a s - m, m = max a s, for a number a > 0: sums of p^a and of p^a log p^a.

    All three are of a s, so that a merge needs no a.
    """

    name: ClassVar[str] = "tempered_moment"
    differentiable: ClassVar[tuple[bool, ...]] = (False, True, True)

    def identity(self, n, like):
        return like.new_full((n, 1), -math.inf), like.new_zeros((n, 1)), like.new_zeros((n, 1))

    def lift(self, tile, tensors):
        m, u = _shifted(tile.logits(self.exclude_picks) * self.numbers[0])
        e = torch.exp(u)
        return m, e.sum(-1, keepdim=True), (u * e).sum(-1, keepdim=True)

    def merge(self, a, b):
        m = torch.maximum(a[0], b[0])
        ref = m.clamp_min(torch.finfo(m.dtype).min)
        l, t = 0.0, 0.0  # noqa: E741
        for state in (a, b):
            down = (state[0] - ref).clamp_min(_LOWEST)
            shrink = torch.exp(down)
            l = l + state[1] * shrink  # noqa: E741
            t = t + (state[2] + down * state[1]) * shrink
        return m, l, t

    def gradient(self, tile, tensors, state, grads, out):
        power = self.numbers[0]
        u = torch.mul(tile.logits(self.exclude_picks), power, out=out)
        u = u.sub_(state[0].clamp_min(torch.finfo(u.dtype).min)).clamp_(min=_LOWEST)
        e = torch.exp(u).mul_(power)
        g_l, g_t = (0.0 if g is None else g for g in grads[1:])
        return u.add_(1.0).mul_(g_t).add_(g_l).mul_(e)

    @triton_form
    def lift_triton(s, a):
        s *= a
        m = tl.max(s, axis=1)
        u = s - tl.where(m == float("-inf"), 0.0, m)[:, None]
        u = tl.where(u < -1e4, -1e4, u)  # keeps NaN, which tl.maximum would not
        e = tl.exp2(u * 1.4426950408889634)
        return m, tl.sum(e, axis=1), tl.sum(u * e, axis=1)

    @triton_form
    def merge_triton(m, l, t, m2, l2, t2):  # noqa: E741
        top = tl.maximum(m, m2)
        ref = tl.where(top == float("-inf"), 0.0, top)
        d = m - ref
        d = tl.where(d < -1e4, -1e4, d)
        d2 = m2 - ref
        d2 = tl.where(d2 < -1e4, -1e4, d2)
        k = tl.exp2(d * 1.4426950408889634)
        k2 = tl.exp2(d2 * 1.4426950408889634)
        return top, l * k + l2 * k2, (t + d * l) * k + (t2 + d2 * l2) * k2

    @triton_form
    def gradient_triton(s, m, l, t, g_l, g_t, a):  # noqa: E741
        u = s * a - tl.where(m == float("-inf"), 0.0, m)[:, None]
        u = tl.where(u < -1e4, -1e4, u)
        return a * tl.exp2(u * 1.4426950408889634) * (g_l[:, None] + (1.0 + u) * g_t[:, None])

"""Folds of the margin losses: hard negatives enlarged, several centres a class, the best classes of such centres."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (the language of device functions has other types than Python's)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bigclass.core.folds import LogSumExp, Tile, register_fold
from bigclass.core.topk import TopK
from bigclass.core.triton_form import triton_form

if TYPE_CHECKING:
    import triton.language as tl


@register_fold
@dataclass(frozen=True, eq=False)
class CurricularLogSumExp(LogSumExp):
    """The log-sum-exp state of phi(s_ij), phi(s) = s (t + s / a) for s > r_i (a hard negative), else s.

    tensors: r (N,), t (N,) (the same number in every row, but kept on the device). numbers: a, the scale of s. Constants all
    three. Huang et al., "CurricularFace", arXiv:2004.00288, equation 8: cos (t + cos) where cos > cos(theta_y + m); nothing is
    differentiated through the comparison.
    """

    name: ClassVar[str] = "curricular"
    tensor_axes: ClassVar[tuple[str, ...]] = ("kept", "kept")
    overwrites: ClassVar[bool] = False
    weight: ClassVar[int] = 2

    def _bent(self, s: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        r, t = tensors
        v = (s * (1.0 / self.numbers[0])).add_(t).mul_(s)
        return torch.where(s > r, v, s) if s.requires_grad else torch.where(s > r, v, s, out=v)

    def lift(self, tile, tensors):
        phi = self._bent(tile.logits(self.exclude_picks), tensors)
        return super().lift(Tile(phi, scratch=tile.scratch), ())

    def gradient(self, tile, tensors, state, grads, out):
        s = tile.logits(self.exclude_picks)
        slope = (s * (2.0 / self.numbers[0])).add_(tensors[1]).masked_fill_(~(s > tensors[0]), 1.0)
        return super().gradient(Tile(self._bent(s, tensors)), (), state, grads, out).mul_(slope)

    @triton_form
    def lift_triton(s, r, t, a):
        s = tl.where(s > r, s * (t + s * (1.0 / a)), s)
        m = tl.max(s, axis=1)
        ref = tl.where(m == float("-inf"), 0.0, m)
        return m, tl.sum(tl.exp2((s - ref[:, None]) * 1.4426950408889634), axis=1)

    @triton_form
    def gradient_triton(s, m, l, g, r, t, a):  # noqa: E741
        ref = tl.where(m == float("-inf"), 0.0, m)
        hard = s > r
        phi = tl.where(hard, s * (t + s * (1.0 / a)), s)
        slope = tl.where(hard, t + s * (2.0 / a), 1.0)
        return tl.exp2((phi - ref[:, None]) * 1.4426950408889634) * slope * g[:, None]


@register_fold
@dataclass(frozen=True, eq=False)
class GroupedLogSumExp(LogSumExp):
    """The log-sum-exp state of the largest logit of each group of K adjacent classes; of equal ones the first gets the gradient.

    numbers: K. For sub-centres: the K centres of a class are a group, and excluded together if all are picks.
    """

    name: ClassVar[str] = "grouped_logsumexp"
    overwrites: ClassVar[bool] = False
    literal_numbers: ClassVar[bool] = True

    @property
    def group(self) -> int:
        return int(self.numbers[0])

    def _best(self, s: Tensor, out: Tensor | None = None) -> Tensor:
        """The largest logit of each group (n, c / K), column by column of the groups: a reduction over so few would crawl."""
        best = torch.maximum(s[:, :: self.group], s[:, 1 :: self.group], out=out) if self.group > 1 else s.clone()
        for k in range(2, self.group):
            torch.maximum(best, s[:, k :: self.group], out=best)
        return best

    def lift(self, tile, tensors):
        s = tile.logits(self.exclude_picks)
        if s.requires_grad:  # not amax, which divides the gradient of ties
            return super().lift(Tile(s.unflatten(-1, (-1, self.group)).max(-1).values), ())
        if tile.scratch is None or self.group == 1:
            return super().lift(Tile(self._best(s)), ())
        shape, size = (s.shape[0], s.shape[1] // self.group), s.numel() // self.group
        room = tile.scratch.view(-1)
        best = self._best(s, room[:size].view(shape))
        return super().lift(Tile(best, scratch=room[size : 2 * size].view(shape)), ())

    def gradient(self, tile, tensors, state, grads, out):
        s = tile.logits(self.exclude_picks)
        best = self._best(s)
        share = super().gradient(Tile(best), (), state, grads, torch.empty_like(best))
        for k in range(self.group):
            here = s[:, k :: self.group] == best
            torch.mul(share, here, out=out[:, k :: self.group])
            share.masked_fill_(here, 0.0)  # the first of equal ones takes it
        return out

    @triton_form
    def lift_triton(s, K: tl.constexpr):
        best = tl.max(tl.reshape(s, (s.shape[0], s.shape[1] // K, K)), axis=2)
        m = tl.max(best, axis=1)
        ref = tl.where(m == float("-inf"), 0.0, m)
        lost = tl.sum(tl.where(s == s, 0.0, s), axis=1)  # the maximum skips NaN, which the sum must not
        return m, tl.sum(tl.exp2((best - ref[:, None]) * 1.4426950408889634), axis=1) + lost

    @triton_form
    def gradient_triton(s, m, l, g, K: tl.constexpr):  # noqa: E741
        groups = tl.reshape(s, (s.shape[0], s.shape[1] // K, K))
        best = tl.max(groups, axis=2)
        place = tl.arange(0, K)[None, None, :]
        first = tl.min(tl.where(groups == best[:, :, None], place, K), axis=2)
        ref = tl.where(m == float("-inf"), 0.0, m)
        share = tl.exp2((best - ref[:, None]) * 1.4426950408889634) * g[:, None]
        return tl.reshape(tl.where(place == first[:, :, None], share[:, :, None], 0.0), s.shape)


@register_fold
@dataclass(frozen=True, eq=False)
class GroupedTopK(TopK):
    """The k classes with the largest logits, a class being K adjacent logits of which the largest counts. numbers: (k, K)."""

    name: ClassVar[str] = "grouped_topk"

    @property
    def group(self) -> int:
        return int(self.numbers[1])

    def _grouped(self, tile: Tile) -> Tile:
        best = tile.logits(self.exclude_picks).unflatten(-1, (-1, self.group)).amax(-1)
        return Tile(best, tile.base // self.group)

    def lift(self, tile, tensors):
        return super().lift(self._grouped(tile), ())

    def update(self, state, tile, tensors):
        return super().update(state, self._grouped(tile), ())

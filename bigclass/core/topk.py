"""The fold that keeps the k largest logits and where they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bigclass.core.folds import Fold, State, register_fold


@register_fold
@dataclass(frozen=True, eq=False)
class TopK(Fold):
    """The k largest logits and their indices, in descending order. No gradients (pick the indices instead).

    numbers: (k,). Where fewer than k classes were folded, the rest is (-inf, -1).
    """

    name: ClassVar[str] = "topk"
    differentiable: ClassVar[tuple[bool, ...]] = (False, False)
    _GROUP: ClassVar[int] = 64  # classes to a group whose maximum stands for it

    @property
    def k(self) -> int:
        return int(self.numbers[0])

    def identity(self, n, like):
        return like.new_full((n, self.k), -math.inf), torch.full((n, self.k), -1, dtype=torch.int64, device=like.device)

    def lift(self, tile, tensors):
        return self._of_block(tile.logits(self.exclude_picks), tile.base)

    def merge(self, a, b):
        values, classes = (torch.cat(parts, -1) for parts in zip(a, b, strict=True))
        # a class at -inf still comes before none
        _, at = values.clamp_min(torch.finfo(values.dtype).min).masked_fill(classes < 0, -math.inf).topk(self.k, -1)
        return values.gather(-1, at), classes.gather(-1, at)

    def update(self, state, tile, tensors):
        s = tile.logits(self.exclude_picks)
        if s.device.type != "cpu":  # which rows to touch would be a host sync there
            return self.merge(state, self._of_block(s, tile.base))
        # A tile can only matter to rows whose k-th best it beats; `~(<=)` so that NaN counts as beating.
        rows = (~(s.amax(-1) <= state[0][:, -1]) | (state[1][:, -1] < 0)).nonzero().squeeze(-1)
        if rows.numel() == 0:
            return state
        if rows.numel() == s.shape[0]:
            return self.merge(state, self._of_block(s, tile.base))
        better = self.merge((state[0][rows], state[1][rows]), self._of_block(s[rows], tile.base))
        state[0][rows], state[1][rows] = better
        return state

    def _of_block(self, s: Tensor, base: int) -> State:
        """Top k of (n, c) logits whose first class is `base`.

        The k largest lie in the k groups with the largest maxima: one pass of maxima, then k groups instead of c classes."""
        n, c = s.shape
        groups = c // self._GROUP
        if groups <= 2 * self.k:
            values, at = s.topk(min(self.k, c), -1)
        else:
            whole = groups * self._GROUP
            grouped = s[:, :whole].unflatten(-1, (groups, self._GROUP))
            _, best = grouped.amax(-1).topk(self.k, -1)
            inside = grouped.gather(1, best.unsqueeze(-1).expand(-1, -1, self._GROUP)).flatten(1)
            classes = (best.unsqueeze(-1) * self._GROUP + torch.arange(self._GROUP, device=s.device)).flatten(1)
            if whole < c:
                inside = torch.cat((inside, s[:, whole:]), -1)
                tail = torch.arange(whole, c, device=s.device).expand(n, -1)
                classes = torch.cat((classes, tail), -1)
            values, pos = inside.topk(self.k, -1)
            at = classes.gather(-1, pos)
        missing = self.k - values.shape[-1]
        if missing > 0:
            values = torch.cat((values, values.new_full((n, missing), -math.inf)), -1)
            return values, torch.cat((at + base, at.new_full((n, missing), -1)), -1)
        return values, at + base

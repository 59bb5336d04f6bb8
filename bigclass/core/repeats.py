"""Picks (N, K) in which a class may stand several times in a row: each class once, and what its places share or add up to.

A row's classes are sorted, so that a class and its repeats are a run; o_k is how far place k stands behind the first of its run.

    copied    y_k = v_{k - o_k}                          for each bit 2^b of o: v_k <- v_{k - 2^b} where o_k has it
    summed    y_k = sum of v over the run from k on      for each 2^b: v_k += v_{k + 2^b} where that is of the same run

Either takes log2 K steps of N x K numbers, and neither reads or writes a place twice: of a gather that reads a place three times the
gradient is a sum whose order is open on a GPU, and comparing every pair of a row takes N x K x K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Repeats:
    """distinct: (N, K) sorted picks, -1 in place of repeats. order: (N, K) where each stood, place: its inverse. behind: (N, K) o_k."""

    distinct: Tensor
    order: Tensor
    place: Tensor
    behind: Tensor

    @classmethod
    def of(cls, picks: Tensor) -> Repeats:
        """Of picks (N, K), int64. Of equal ones the first given is the first of its run."""
        ordered, order = picks.sort(dim=1, stable=True)
        at = torch.arange(picks.shape[1], device=picks.device).expand_as(picks)
        # numbers are padded: of marks Inductor makes C++ that is none
        again = (ordered == F.pad(ordered[:, :-1], (1, 0), value=-1)) & (at > 0)
        first = at.masked_fill(again, 0)
        first = first.cummax(1).values if picks.shape[1] else first
        return cls(ordered.masked_fill(again, -1), order, torch.zeros_like(order).scatter(1, order, at), at - first)

    def copied(self, values: Tensor) -> Tensor:
        """(N, K): for each pick as it was given, the value of its class in values (N, K), which stand as `distinct` does."""
        for step in self._steps():
            values = torch.where((self.behind & step) > 0, F.pad(values[:, :-step], (step, 0)), values)
        return values.gather(1, self.place)

    def summed(self, values: Tensor) -> Tensor:
        """(N, K): for each of `distinct`, the sum of its class in values (N, K), which stand as the picks were given; 0 for repeats."""
        values = values.gather(1, self.order)
        for step in self._steps():
            same = self.behind[:, step:] >= step
            values = values + F.pad(torch.where(same, values[:, step:], 0.0), (0, step))
        return torch.where(self.behind > 0, 0.0, values)

    def _steps(self) -> Iterator[int]:
        step = 1
        while step < self.behind.shape[1]:
            yield step
            step *= 2

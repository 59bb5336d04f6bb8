"""Where the classes and the rows of a problem lie, if they are spread over ranks: values that a stream carries.

The core folds what this rank has. What the ranks' parts are merged to: parallel/classes.py; how operands get there: parallel/layer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def local_picks(picks: Tensor, start: int, stop: int) -> Tensor:
    """The picks among classes [start, stop), counted from start; -1 for all others."""
    return torch.where((picks >= start) & (picks < stop), picks - start, -1)


@dataclass(frozen=True)
class Shards:
    """Which classes this rank has. ranks: the ranks that share them (parallel/groups.py). sizes: how many each has, in order."""

    ranks: Any
    sizes: tuple[int, ...]

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.ranks.rank])

    @property
    def stop(self) -> int:
        return self.start + self.sizes[self.ranks.rank]

    @property
    def total(self) -> int:
        """C, of all ranks."""
        return sum(self.sizes)

    def picks(self, picks: Tensor) -> Tensor:
        """The picks that are this rank's, counted from its first class; -1 for all others."""
        return local_picks(picks, self.start, self.stop)

    def vector(self, v: Tensor) -> Tensor:
        """This rank's part of a vector (..., C) over all classes."""
        return v[..., self.start : self.stop]


@dataclass(frozen=True)
class Layout:
    """classes: who has which; None: each rank has them all. batch: the ranks over which rows are spread, each having others; None: here are
    all.

    factor: what a rank's own part of a gradient is multiplied by, so that what the ranks' gradients are combined to is that of the whole:
    their number if they are averaged, 1 if they are added up.
    """

    classes: Shards | None = None
    batch: Any = None
    factor: float = 1.0

"""What the study of the filter looks at: synthetic kinds, and states of a model that was really trained, each as one problem.

flat, early, peaked, onehot, popular    as in data.py
trained P                               held-out text met by a language model at the point P of its training (trained.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import make_problem
from .shapes import Shape
from .trained import States, points, states

SYNTHETIC = ("flat", "early", "peaked", "onehot", "popular")
TRAINED = tuple(f"trained {point}" for point in points())
KINDS = SYNTHETIC + TRAINED


@dataclass(frozen=True, slots=True)
class Case:
    """One problem, its rows in an order that means nothing (synthetic) or is that of a text (trained)."""

    kind: str
    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    b: Tensor | None  # (C,)
    y: Tensor  # (N,)
    popularity: Tensor  # (C,), how often each class is met, not counted on these rows

    def head(self, rows: int) -> Case:
        """The first rows."""
        return Case(self.kind, self.x[:rows], self.w, self.b, self.y[:rows], self.popularity)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the synthetic kinds; of the trained ones only `rows` can be chosen."""

    rows: int
    classes: int
    features: int


def cases(kinds: Sequence[str], sizes: Sizes) -> Iterator[Case]:
    """One problem after the other, so that only one is held."""
    for kind in kinds:
        yield make_case(kind, sizes)


def make_case(kind: str, sizes: Sizes) -> Case:
    """The problem of a kind.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind in TRAINED:
        return _trained(kind, states(kind.removeprefix("trained ")), sizes.rows)
    if kind not in SYNTHETIC:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    shape = Shape("study", sizes.rows, sizes.classes, sizes.features)
    problem = make_problem(shape, kind, torch.float32, torch.device("cpu"))
    if kind in ("early", "peaked"):  # drawn by Zipf's law, classes in order of rank
        popularity = 1.0 / torch.arange(1, sizes.classes + 1)
    else:
        popularity = torch.ones(sizes.classes) if problem.bias is None else problem.bias.exp()
    return Case(kind, problem.input, problem.linear_weight, problem.bias, problem.target, popularity)


def _trained(kind: str, found: States, rows: int) -> Case:
    others = found.target[rows:]
    popularity = torch.bincount(others, minlength=found.weight.shape[0]).float()
    return Case(kind, found.hidden[:rows], found.weight, None, found.target[:rows], popularity)

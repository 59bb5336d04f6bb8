"""Losses of a linear layer whose classes, rows or both are spread over ranks, beside one process that has everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import bigclass

D = 6
# classes of the ranks: uneven, one rank without any, one whose classes no row has
SHARDS = {2: (5, 12), 3: (12, 0, 5), 4: (3, 7, 2, 5)}
# rows of the ranks, where they are spread
ROWS = {2: (4, 7), 3: (3, 8, 0), 4: (2, 1, 5, 3)}


@dataclass
class Problem:
    """A whole problem in float64: x (N, D), w (C, D), b (C,), a learning scale."""

    x: Tensor
    w: Tensor
    b: Tensor
    scale: Tensor

    @classmethod
    def of(cls, n: int, c: int, seed: int = 0) -> Problem:
        g = torch.Generator().manual_seed(seed)
        draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=g)  # noqa: E731
        return cls(draw(n, D), draw(c, D), draw(c), torch.tensor(1.7, dtype=torch.float64))

    def leaves(self, rows: slice, classes: slice) -> list[Tensor]:
        return [t.clone().requires_grad_() for t in (self.x[rows], self.w[classes], self.b[classes], self.scale)]


Loss = Callable[..., Any]  # (x, w, b, scale, rows, group) -> a loss, or rows of losses


@dataclass
class Case:
    """A loss, and what goes with its rows: `given` are tensors (N, ...), of which a rank has its own."""

    loss: Loss
    given: dict[str, Any] = field(default_factory=dict)
    rowwise: bool = False


def spans(sizes: tuple[int, ...]) -> list[slice]:
    return [slice(sum(sizes[:q]), sum(sizes[: q + 1])) for q in range(len(sizes))]


def value(case: Case, leaves: list[Tensor], rows: slice, **group: Any) -> Tensor:
    given = {name: t[rows] if isinstance(t, Tensor) else t for name, t in case.given.items()}
    made = case.loss(*leaves, **given, **group)
    # rows with weights of their own, so that each gradient differs
    return (made * torch.arange(1, 1 + case_rows(case, leaves), dtype=made.dtype)[rows if case.rowwise else slice(0)].reshape(
        -1, *[1] * (made.dim() - 1))).sum() if case.rowwise else made  # fmt: skip


def case_rows(case: Case, leaves: list[Tensor]) -> int:
    return next((t.shape[0] for t in case.given.values() if isinstance(t, Tensor)), leaves[0].shape[0])


def relative(made: Tensor, exact: Tensor) -> float:
    return float((made.detach() - exact.detach()).norm() / exact.detach().norm().clamp_min(1e-6))


def whole(case: Case, problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of one process."""
    leaves = problem.leaves(slice(None), slice(None))
    loss = value(case, leaves, slice(None))
    loss.backward()
    return loss.detach(), [t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves]


def grad_of(t: Tensor) -> Tensor:
    return torch.zeros_like(t) if t.grad is None else t.grad


def errors_of_classes(case: Case, rank: int, world: int, engine: str | None = None) -> list[float]:
    """Of the loss and its four gradients, the same rows on all ranks."""
    sizes = SHARDS[world]
    problem = Problem.of(sum(ROWS[world]), sum(sizes))
    exact, grads = whole(case, problem)
    mine = spans(sizes)[rank]
    leaves = problem.leaves(slice(None), mine)
    loss = value(case, leaves, slice(None), group=dist.group.WORLD)
    loss.backward()
    cut = [grads[0], grads[1][mine], grads[2][mine], grads[3]]
    return [relative(loss, exact), *[relative(grad_of(t), g) for t, g in zip(leaves, cut, strict=True)]]


def errors_of_both(case: Case, rank: int, world: int, gradients: str = "mean") -> list[float]:
    """The same, rows spread over the ranks that share the classes. What all ranks hold (the scale) gets the whole gradient on each."""
    sizes, rows = SHARDS[world], ROWS[world]
    problem = Problem.of(sum(rows), sum(sizes))
    exact, grads = whole(case, problem)
    mine, own = spans(sizes)[rank], spans(rows)[rank]
    leaves = problem.leaves(own, mine)
    group = bigclass.Spread(classes=dist.group.WORLD, batch=dist.group.WORLD, gradients=gradients)
    loss = value(case, leaves, own, group=group)
    loss.backward()
    if case.rowwise:  # each rank's loss is of its own rows: their sum is the whole's, their mean a W-th
        total = loss.detach().clone()
        dist.all_reduce(total)
        share = 1.0 / world if gradients == "mean" else 1.0
    else:
        total, share = loss.detach(), 1.0
    combined = share * (world if gradients == "mean" else 1.0)
    cut = [grads[0][own] * combined, grads[1][mine] * share, grads[2][mine] * share, grads[3] * share]
    return [relative(total, exact), *[relative(grad_of(t), g) for t, g in zip(leaves, cut, strict=True)]]


def errors_of_batch(case: Case, rank: int, world: int, gradients: str = "mean") -> list[float]:
    """Rows spread, every rank with all classes: gradients of what all hold, once combined, are the whole's."""
    rows = ROWS[world]
    problem = Problem.of(sum(rows), sum(SHARDS[world]))
    exact, grads = whole(case, problem)
    own = spans(rows)[rank]
    leaves = problem.leaves(own, slice(None))
    loss = value(case, leaves, own, group=bigclass.Spread(batch=dist.group.WORLD, gradients=gradients))
    loss.backward()
    combined = [grad_of(t).clone() for t in leaves]
    factor = float(world) if gradients == "mean" else 1.0
    for t in combined[1:]:
        dist.all_reduce(t)
        t /= factor
    return [relative(loss, exact), relative(combined[0], grads[0][own] * factor)] + [
        relative(a, b) for a, b in zip(combined[1:], grads[1:], strict=True)
    ]

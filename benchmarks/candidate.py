"""What a candidate is: it prepares a call for a problem; the call takes no arguments and returns what it computed.

    loss, "forward"             (loss,)                 no gradients wanted
    loss, "backward"            (loss, dx, dw)          a `Staged` call: the forward before it, with gradients wanted, is not timed
    loss, "forward+backward"    (loss, dx, dw)
    prediction, "forward"       (values, indices)
    floor                       ()                      the bare matrix products, into memory that is already there

A bias is part of the recipe and constant: no candidate makes its gradient.

One that cannot run here raises `Unavailable` with the reason, which is reported. Some have a setting (rows of a chunk, classes of a tile)
whose best value depends on the machine: they offer several, and the fastest one competes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .data import Problem
from .machine import GIB, free_memory
from .shapes import Shape
from .timing import Staged

Pass = Literal["forward", "backward", "forward+backward"]
LOSS_PASSES: tuple[Pass, ...] = ("forward", "backward", "forward+backward")
GRADIENT_PASSES: tuple[Pass, ...] = ("backward", "forward+backward")

Role = Literal["floor", "dense", "peer", "bigclass"]
Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # input (N, D), linear_weight (C, D), target (N,) or labels (N, K) -> mean loss ()
MakeLoss = Callable[[Problem, int | None], Loss]  # problem, setting
Prepare = Callable[[Problem, Pass, int | None], Call]


class Unavailable(Exception):
    """A candidate cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute the same thing.

    what: a sentence for the report. prepare: (problem, pass, setting) -> call; the setting is None where `settings` is empty.
    settings: the values to try, named by `unit`. passes: the passes it is a way of its own for.
    exact: False for one that leaves small gradients out on purpose: their error is shown, and not held against rounding.
    """

    name: str
    role: Role
    what: str
    prepare: Prepare
    settings: tuple[int, ...] = ()
    unit: str = ""
    passes: tuple[Pass, ...] = LOSS_PASSES
    exact: bool = True

    def settings_for(self, shape: Shape) -> Sequence[int | None]:
        """The settings that cut `shape` into several parts, or the smallest if none does."""
        if not self.settings:
            return (None,)
        extent = shape.classes if self.unit == "classes" else shape.rows
        return [s for s in self.settings if s < extent] or [self.settings[0]]


def from_loss(make: MakeLoss) -> Prepare:
    """A candidate's `prepare` from a function that makes its loss."""

    def prepare(problem: Problem, which: Pass, setting: int | None) -> Call:
        loss = make(problem, setting)
        x, w, y = problem.input, problem.linear_weight, problem.target
        if which == "forward":

            @torch.no_grad()
            def call() -> Outputs:
                return (loss(x, w, y),)

            return call

        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()

        def forward() -> Tensor:
            return loss(x, w, y)

        def backward(value: Tensor) -> Outputs:
            return (value.detach(), *torch.autograd.grad(value, (x, w)))

        return Staged(forward, backward) if which == "backward" else lambda: backward(forward())

    return prepare


# What a candidate asks of the problem


def need_no_softcap(problem: Problem) -> None:
    """Raise Unavailable where the logits are capped."""
    if problem.shape.softcap is not None:
        raise Unavailable("has no soft cap")


def need_no_bias(problem: Problem) -> None:
    """Raise Unavailable where the logits have a bias."""
    if problem.bias is not None:
        raise Unavailable("takes no bias")


def need_memory(problem: Problem, bytes_a_logit: int) -> None:
    """Refuse before allocating: an over-committed CPU process is killed, not told."""
    needed = problem.shape.rows * problem.shape.classes * bytes_a_logit
    free = free_memory(problem.input.device)
    if free is not None and needed > 0.9 * free:
        raise Unavailable(f"needs {needed / GIB:.1f} GiB for logits, {free / GIB:.1f} GiB are free")

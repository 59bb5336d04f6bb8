"""bigclass' own candidates: as the planner chooses, then each engine and plan by name, then the certified filter."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from typing import Any

import torch
from torch import Tensor

import bigclass
from bigclass.core.engines.support import device_reason

from . import contrastive, one_vs_all
from .candidate import GRADIENT_PASSES, LOSS_PASSES, Call, Candidate, Loss, Outputs, Pass, Unavailable, from_loss, need_memory
from .data import Problem
from .peers import of_pairs
from .shapes import Shape
from .timing import Staged

OURS = "bigclass"
FILTERED = "bigclass, filter 2^-8"


def ours_for(shape: Shape) -> list[Candidate]:
    """The library's own candidates on `shape`."""
    if shape.k:
        return [Candidate("bigclass top-k", "bigclass", "bigclass.linear_topk", _topk, passes=("forward",))]
    if shape.one_vs_all or shape.contrastive:
        return [
            _ours(OURS, "as the planner chooses", "auto", "auto"),
            _ours("bigclass tiled", "tiled engine", "tiled", "auto"),
            _ours("bigclass tiled, recompute", "tiled engine, logits made again for the gradients", "tiled", "recompute", GRADIENT_PASSES),
            _ours("bigclass fused", "fused engine", "fused", "auto"),
            _ours("bigclass dense", "dense engine", "dense", "auto"),
        ]
    return [
        _ours(OURS, "as the planner chooses", "auto", "auto"),
        _filtered(2**-8),
        _filtered(2**-6),
        _ours("bigclass tiled", "tiled engine", "tiled", "auto", ("forward",)),
        _ours("bigclass tiled, in forward", "tiled engine, gradients made in the forward", "tiled", "forward", GRADIENT_PASSES),
        _ours("bigclass tiled, recompute", "tiled engine, logits made again for the gradients", "tiled", "recompute", GRADIENT_PASSES),
        _ours("bigclass fused", "fused engine: logits in registers", "fused", "auto", ("forward",)),
        _ours("bigclass fused, in forward", "fused engine, gradients made in the forward", "fused", "forward", GRADIENT_PASSES),
        _ours("bigclass fused, saved", "fused engine, logits saved in 16 bits for the gradient", "fused", "saved", GRADIENT_PASSES),
        _ours("bigclass fused, recompute", "fused engine, logits made again for the gradients", "fused", "recompute", GRADIENT_PASSES),
        _ours("bigclass dense", "dense engine", "dense", "auto"),
    ]


def _ours(name: str, what: str, engine: str, gradients: str, passes: tuple[Pass, ...] = LOSS_PASSES) -> Candidate:
    def make(problem: Problem, _: int | None) -> Loss:
        if engine == "dense":
            need_memory(problem, 3 * problem.input.element_size())
        if engine == "fused":
            reason = device_reason(problem.input.device)
            if reason is not None or problem.input.device.type == "cpu":  # in the interpreter it runs, but a time would mean nothing
                raise Unavailable(reason or "needs a CUDA device")
        if problem.shape.one_vs_all:
            return one_vs_all.streamed_loss(problem.shape.loss, engine)
        if problem.shape.contrastive:
            return of_pairs(contrastive.streamed_loss(problem.shape.loss, engine))
        return _cross_entropy(problem, engine)

    def prepare(problem: Problem, which: Pass, setting: int | None) -> Call:
        call = from_loss(make)(problem, which, setting)
        # "auto" is measured as users meet it, without the cost of entering a context.
        if gradients == "auto":
            return call

        def planned(stage: Callable[..., Any]) -> Callable[..., Any]:
            def run(*made: Tensor) -> Any:
                with bigclass.planning(gradients=gradients):
                    return stage(*made)

            return run

        return Staged(planned(call.first), planned(call.second)) if isinstance(call, Staged) else planned(call)

    return Candidate(name, "bigclass", what, prepare, passes=passes)


def _filtered(tolerance: float) -> Candidate:
    power = f"2^{log2(tolerance):.0f}"
    return Candidate(
        f"bigclass, filter {power}",
        "bigclass",
        f"the smallest gradients left out, at most {power} of their norm",
        from_loss(lambda problem, _: _cross_entropy(problem, "auto", tolerance)),
        passes=("forward+backward",),
        exact=False,
    )


def _cross_entropy(problem: Problem, engine: str, grad_filter: float | None = None) -> Loss:
    softcap, bias = problem.shape.softcap, problem.bias

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        value = bigclass.linear_cross_entropy(x, w, y, linear_bias=bias, softcap=softcap, grad_filter=grad_filter, engine=engine)
        assert isinstance(value, Tensor)  # a pair only where statistics are asked for
        return value

    return loss


def _topk(problem: Problem, _: Pass, __: int | None) -> Call:
    k = problem.shape.k
    assert k is not None

    @torch.no_grad()
    def call() -> Outputs:
        values, indices = bigclass.linear_topk(problem.input, problem.linear_weight, k)
        return values, indices

    return call

"""Losses whose weight gradient is handed on, a slab of classes at a time, instead of being returned.

A C x D gradient (and autograd's copy of it, where gradients accumulate) is often the largest thing left beside the weights. Here the
backward makes the logits again slab by slab; a slab's dw is finished before the next slab begins, and goes to

    update.begin_step(w)                                    once a backward
    update.update_slab(w, start, stop, gradient)            rows [start, stop) of w, whose gradient (fp32, to be used up) is finished

an optimizer's update (bigclass.optim), or an addition to `w.grad`. Other gradients (features, bias, scale) go their usual way. What dx
needs of a slab of w is read before that slab is updated, and upstream factors (loss / 4, ...) are inside the gradient.
Cost: 8NCD flops, where 6NCD would have to guess the upstream factor in the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bigclass.core.engines import streaming_engine
from bigclass.core.errors import ArgumentError
from bigclass.core.folds import Fold, State
from bigclass.core.guards import autocast_off, refuse_create_graph
from bigclass.core.plan import Plan
from bigclass.core.stream import Stream


class SlabUpdate(Protocol):
    """What takes finished slabs of a parameter's gradient."""

    def begin_step(self, parameter: Tensor) -> None: ...

    def update_slab(self, parameter: Tensor, start: int, stop: int, gradient: Tensor) -> None: ...


class GradAccumulator:
    """Adds a weight's gradient to its `.grad` slab by slab: no second C x D tensor beside the one that accumulates.

    Example:
        >>> loss = bigclass.linear_binary_cross_entropy(x, head.weight, positives, update=bigclass.GradAccumulator())
        >>> loss.backward()  # head.weight.grad has grown
    """

    def begin_step(self, parameter: Tensor) -> None:
        """Make `.grad` where there is none."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)

    def update_slab(self, parameter: Tensor, start: int, stop: int, gradient: Tensor) -> None:
        """parameter.grad[start:stop] += gradient"""
        assert parameter.grad is not None
        parameter.grad[start:stop].add_(gradient)


@dataclass(frozen=True)
class Problem:
    """A loss and how to run it.

    evaluate(states, picked, args, mask) -> (sum, its derivatives by the states, by the picks, by the args). args: constants.
    affine: do these wait for no state (row_losses.py)? A tile's gradient is then made with the tile."""

    stream: Stream
    picks: Tensor | None
    keep: Tensor | None
    folds: tuple[Fold, ...]
    observed: tuple[Fold, ...]
    args: tuple[Tensor, ...]
    evaluate: Callable[..., tuple[Tensor, list[list[Tensor | None]], Tensor | None, list[Tensor]]]
    forward_plan: Plan
    backward_plan: Plan
    update: SlabUpdate
    affine: bool


def check_update(update: Any, stream: Stream, tensors: Sequence[Tensor], args: Sequence[Tensor]) -> None:
    """Raise where a slab's gradient cannot be handed on, or would not be the whole of it."""
    if not (callable(getattr(update, "begin_step", None)) and callable(getattr(update, "update_slab", None))):
        raise ArgumentError(f"update: expected a SlabOptimizer (bigclass.optim) or a GradAccumulator, got {type(update).__name__}")
    if len(stream.pairs) != 1:
        raise ArgumentError(f"update: expected logits of one weight, got a stream of {len(stream.pairs)} operand pairs")
    weight = stream.pairs[0][1]
    if not (weight.is_leaf and weight.requires_grad):
        raise ArgumentError("update: expected a weight that is a parameter (a leaf that needs a gradient); leave None where it is frozen")
    groups = getattr(update, "param_groups", None)
    if groups is not None and not any(p is weight for group in groups for p in group["params"]):
        raise ArgumentError("update: expected an optimizer that holds the weight; add_param_group adds it")
    if any(a.requires_grad for a in args) or any(t.requires_grad for t in tensors[len(stream.tensors) :]):
        raise ArgumentError("update: the loss's own tensors (targets, row weights) get no gradients there; detach them")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ArgumentError(
            "update: several ranks would each apply their own part of the gradient; leave update=None under data parallelism"
        )


_WEIGHT = 1  # its place among a stream's tensors, (x, w, ...)


class _HandedOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        p = problem
        with autocast_off(p.stream.device):
            engine = streaming_engine(p.forward_plan.engine)
            states, picked = engine.reduce(p.stream, p.picks, p.keep, [*p.folds, *p.observed], p.forward_plan)
            states, seen = states[: len(p.folds)], states[len(p.folds) :]
            if p.keep is not None:
                keep = p.keep.unsqueeze(-1)
                states = [tuple([torch.where(keep, t, 0.0) for t in state]) for state in states]
            total, ctx.grads, ctx.h, _ = p.evaluate(states, picked, p.args, p.keep)
        ctx.problem, ctx.states = problem, states
        ctx.save_for_backward(*tensors)
        flat = [t for state in seen for t in state]
        ctx.mark_non_differentiable(*flat)
        return total.to(p.stream.accumulate_dtype), *flat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_create_graph()
        p: Problem = ctx.problem
        tensors, up = ctx.saved_tensors, grads[0]  # reading them tells whether one was changed, by an earlier backward of ours, say
        if up is None:
            return (None,) * (1 + len(tensors))
        weight = p.stream.pairs[0][1]
        p.update.begin_step(weight)

        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32

        def on_slab(start: int, stop: int, gradient: Tensor) -> None:
            p.update.update_slab(weight, start, stop, gradient.to(wide))

        def scaled(t: Tensor | None) -> Tensor | None:
            return None if t is None else t * up.to(t.dtype)

        def evaluate(states: Any, picked: Any, args: Any, mask: Any) -> Any:
            total, parts, h, rest = p.evaluate(states, picked, args, mask)
            return total, [[scaled(t) for t in of_fold] for of_fold in parts], scaled(h), rest

        needs = list(ctx.needs_input_grad[1:])
        engine, found = streaming_engine(p.backward_plan.engine), []
        with autocast_off(p.stream.device):
            if p.affine:
                wanted = [*needs, *[False] * len(p.args)]
                _, _, found = engine.slab_loss(
                    p.stream, p.picks, p.keep, p.folds, (), evaluate, p.args, p.backward_plan, wanted, on_slab=on_slab
                )
            else:
                found = engine.reduce_backward(
                    p.stream, p.picks, p.keep, p.folds, p.backward_plan, ctx.states,
                    [[scaled(t) for t in parts] for parts in ctx.grads], scaled(ctx.h), needs, on_slab=on_slab,
                )  # fmt: skip
        made = iter(found)
        needs[_WEIGHT] = False  # by place: what was saved may come back as another object, and x may be the weight itself
        out = [next(made).to(t.dtype) if need else None for t, need in zip(tensors, needs, strict=True)]
        return None, *out


def handed_on(problem: Problem, tensors: Sequence[Tensor]) -> tuple[Tensor, list[State]]:
    """The loss, and the states of the observed folds."""
    loss, *flat = _HandedOn.apply(problem, *tensors)
    taken = iter(flat)
    return loss, [tuple([next(taken) for _ in f.differentiable]) for f in problem.observed]

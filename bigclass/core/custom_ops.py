"""The custom ops behind the one op (op.py), which torch.compile keeps whole: forward, backward, fake kernels.

A stream and its folds cross as a string of registered names, numbers and tensors (recipe.py); the plan crosses as a string too:

    fold_op     "engine,gradients,workspace,saved"        states of the folds and picked logits; tiles are made again in the backward, or
                                                          read from what the forward saved of `saved` sixteenths of the classes
    loss_op     "engine,gradients,workspace,observed"     the loss, states of the observed folds, and the gradients of what needs them

What the filter kept is known in the backward, and wanted in a tensor that the forward returned. A graph that writes to it there cannot be
traced: it would write to a copy. So `fold_backward_op` writes below the tracer's eyes, to a tensor that comes from an op of its own
(`report_op`), which no compiler makes a second time instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigclass.core.engines import streaming_engine
from bigclass.core.folds import Fold, State
from bigclass.core.guards import autocast_off, autograd_inside_op, refuse_create_graph
from bigclass.core.plan import classes_of
from bigclass.core.problem import assert_picks, is_affine, parted, plan_of, saved_of, squeezed, summed, upstream_of, work_of
from bigclass.core.recipe import unpack
from bigclass.core.row_losses import ROW_LOSSES
from bigclass.core.stream import Stream


@torch.library.custom_op("bigclass::reduce_logits", mutates_args=())
def fold_op(
    tensors: list[Tensor], picks: Tensor | None, keep: Tensor | None, recipe: str, numbers: list[float], plan: str, needs: list[bool],
    report: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    stream, folds = unpack(recipe, numbers, tensors)
    assert_picks(picks, stream.shape[1])
    with autocast_off(stream.device):
        saved = saved_of(plan)
        chosen = plan_of(plan, work_of(stream, folds, keep, scalar=False, grad=saved > 0), saved)
        engine = streaming_engine(chosen.engine)
        room = engine.room_for(stream, chosen.saved) if saved else []
        options: dict[str, Any] = {"saved": room} if saved else {}
        states, picked = engine.reduce(stream, picks, keep, folds, chosen, **options)
    return [t for state in states for t in state] + ([] if picked is None else [picked]) + room


@fold_op.register_fake
def _(tensors, picks, keep, recipe, numbers, plan, needs, report=None):
    stream, folds = unpack(recipe, numbers, tensors)
    saved = saved_of(plan)
    room = streaming_engine(plan.split(",")[0]).room_for(stream, classes_of(saved, stream.shape[1])) if saved else []
    return _fake_outputs(stream, folds, picks) + room


def _fake_outputs(stream: Stream, folds: Sequence[Fold], picks: Tensor | None) -> list[Tensor]:
    (n, c), like = stream.shape, stream.tensors[0].new_empty((), dtype=stream.accumulate_dtype)
    states = [t for f in folds for t in f.identity(n if f.axis == "rows" else c, like)]
    return states + ([] if picks is None else [like.new_empty((n, picks.shape[1]))])


@torch.library.custom_op("bigclass::filter_report", mutates_args=())
def report_op(like: Tensor, double: bool) -> Tensor:
    """(2,) NaN: what a backward will fill in."""
    return like.new_full((2,), torch.nan, dtype=torch.float64 if double else torch.float32)


@report_op.register_fake
def _(like, double):
    return like.new_empty((2,), dtype=torch.float64 if double else torch.float32)


@torch.library.custom_op("bigclass::reduce_logits_backward", mutates_args=())
def fold_backward_op(
    tensors: list[Tensor], picks: Tensor | None, keep: Tensor | None, states: list[Tensor], grads: list[Tensor],
    has_grad: list[bool], recipe: str, numbers: list[float], plan: str, needs: list[bool], saved: list[Tensor],
    report: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    return _fold_backward(tensors, picks, keep, states, grads, has_grad, recipe, numbers, plan, needs, saved, report, in_place=False)


def _fold_backward(
    tensors, picks, keep, states, grads, has_grad, recipe, numbers, plan, needs, saved: list[Tensor], report, *, in_place: bool
) -> list[Tensor]:
    """Gradients of the needed tensors. saved: of the forward, or nothing any more; in_place: is it to be used up?"""
    stream, folds = unpack(recipe, numbers, tensors)
    folded, parts, h = upstream_of(folds, states, grads, has_grad, picks is not None)
    with autocast_off(stream.device):
        count = saved_of(plan)
        chosen = plan_of(plan, work_of(stream, folds, keep, scalar=False, grad=True), count)
        run = streaming_engine(chosen.engine).reduce_backward
        written = None if report is None else report.data  # with a version counter of its own: autograd is not to see it
        options: dict[str, Any] = {"saved": saved, "in_place": in_place} if saved else {}
        return run(stream, picks, keep, folds, chosen, folded, parts, h, needs, report=written, **options)


@fold_backward_op.register_fake
def _(tensors, picks, keep, states, grads, has_grad, recipe, numbers, plan, needs, saved, report=None):
    return [_fake_gradient(t) for t in _needed(tensors, needs)]


def _fake_gradient(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return t.new_empty(t.shape, dtype=dtype)


def _reduce_context(ctx, inputs, output):
    tensors, picks, keep, recipe, numbers, plan, needs, report = inputs
    _, folds = unpack(recipe, numbers, tensors)
    flags = [d for f in folds for d in f.differentiable]
    first = len(flags) + (picks is not None)
    ctx.mark_non_differentiable(*[t for t, d in zip(output, flags, strict=False) if not d], *output[first:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *[t for t in (picks, keep) if t is not None], *output[: len(flags)], *output[first:])
    ctx.sizes = len(tensors), picks is not None, keep is not None, len(flags)
    ctx.used_up = False
    ctx.constants = recipe, numbers, plan, needs
    ctx.report = report  # not saved: activation checkpointing would make another, which nobody reads


def _reduce_gradients(ctx, grads):
    refuse_create_graph()
    saved = ctx.saved_tensors
    count, has_picks, has_keep, parts = ctx.sizes
    recipe, numbers, plan, needs = ctx.constants
    rest = list(saved[count:])
    picks = rest.pop(0) if has_picks else None
    keep = rest.pop(0) if has_keep else None
    states, codes = rest[:parts], rest[parts:]
    grads = grads[: parts + has_picks]
    has_grad = [g is not None for g in grads]
    tensors = list(saved[:count])
    if not any(has_grad) or not any(needs):
        return [None] * count, None, None, None, None, None, None, None
    given = [g for g in grads if g is not None]
    operands = tensors, picks, keep, states, given, has_grad, recipe, numbers, plan, needs
    if codes and type(given[0]) is Tensor and not torch.compiler.is_compiling():
        # The first backward uses the saved logits up, unseen by autograd; a second makes them again (pitfall 46).
        codes = [] if ctx.used_up else [t.data for t in codes]
        ctx.used_up = True
        with torch.no_grad():
            made = _fold_backward(*operands, codes, ctx.report, in_place=True)
    else:
        made = fold_backward_op(*operands, codes, ctx.report)
    return spread(made, tensors, needs), None, None, None, None, None, None, None


fold_op.register_autograd(_reduce_gradients, setup_context=_reduce_context)


@torch.library.custom_op("bigclass::stream_loss", mutates_args=())
def loss_op(
    tensors: list[Tensor], picks: Tensor | None, keep: Tensor | None, args: list[Tensor], recipe: str, numbers: list[float],
    row_loss: str, row_numbers: list[float], plan: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    stream, every = unpack(recipe, numbers, tensors)
    folds, observed = parted(every, plan)
    assert_picks(picks, stream.shape[1])
    arg_needs = needs[len(tensors) :]
    row_numbers = row_numbers[:-1]  # the caller's; the last only keeps the list from being empty, which autograd takes for tensors

    def evaluate(states: list[State], picked: Tensor | None, chunk: list[Tensor], mask: Tensor | None):
        return row_loss_gradients(row_loss, row_numbers, folds, states, picked, chunk, arg_needs, mask)

    with autocast_off(stream.device):
        work = work_of(stream, every, keep, scalar=True, grad=any(needs))
        chosen = plan_of(plan, replace(work, affine=is_affine(row_loss, picks, folds, ()) and not any(arg_needs)))
        module = streaming_engine(chosen.engine)
        seen: list[State] = []
        if not any(needs):
            states, picked = module.reduce(stream, picks, keep, every, chosen)
            seen = states[len(folds) :]
            loss = ROW_LOSSES[row_loss]([squeezed(s) for s in states[: len(folds)]], picked, args, row_numbers)
            loss, grads = summed(loss, keep, stream), []
        elif chosen.gradients == "slabs":
            loss, seen, grads = module.slab_loss(stream, picks, keep, folds, observed, evaluate, args, chosen, needs)
        else:
            loss, grads = module.stream_loss(stream, picks, keep, folds, evaluate, args, chosen, needs)
    return [loss, *[t for state in seen for t in state], *grads]


@loss_op.register_fake
def _(tensors, picks, keep, args, recipe, numbers, row_loss, row_numbers, plan, needs):
    stream, every = unpack(recipe, numbers, tensors)
    wide = stream.accumulate_dtype
    loss = stream.tensors[0].new_empty((), dtype=wide)
    seen = _fake_outputs(stream, parted(every, plan)[1], None)
    return [loss, *seen] + [_fake_gradient(t, wide) for t in _needed([*tensors, *args], needs)]


def row_loss_gradients(row_loss, numbers, folds, states, picked, args, arg_needs, mask):
    """One chunk's row losses and their derivatives, by plain autograd on N-vectors."""
    with autograd_inside_op():
        leaves = [
            tuple([t.detach().requires_grad_(d) for t, d in zip(s, f.differentiable, strict=True)])
            for s, f in zip(states, folds, strict=True)
        ]
        picked = None if picked is None else picked.detach().requires_grad_()
        args = [a.detach().requires_grad_(need) for a, need in zip(args, arg_needs, strict=True)]
        total = ROW_LOSSES[row_loss]([squeezed(s) for s in leaves], picked, args, numbers)
        total = (total if mask is None else torch.where(mask, total, 0.0)).sum()
        wanted = [t for s in leaves for t in s if t.requires_grad]
        wanted += ([] if picked is None else [picked]) + [a for a in args if a.requires_grad]
        grads = iter(torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted))
    parts = [[next(grads) if t.requires_grad else None for t in s] for s in leaves]
    h = None if picked is None else next(grads)
    for_args = [_or_zeros(next(grads), a) for a in args if a.requires_grad]
    return total.detach(), parts, h, for_args


def _or_zeros(g: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if g is None else g


def _stream_loss_context(ctx, inputs, output):
    tensors, picks, keep, args, *constants = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *args, *[t for t in (picks, keep) if t is not None])
    ctx.sizes = len(tensors), len(args), picks is not None, keep is not None
    ctx.constants = constants
    ctx.gradients = output[len(output) - sum(constants[-1]) :]


def scaled_gradients(ctx, upstream: Tensor, again: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The gradients that came with a scalar loss, times its upstream factor. again: makes them anew.

    ctx.gradients holds them outside save_for_backward: in eager mode the first backward consumes them in place (pitfall 46)."""
    gradients = ctx.gradients
    if type(upstream) is not Tensor or torch.compiler.is_compiling():
        return [g * upstream for g in gradients]
    if gradients is None:
        with torch.no_grad():
            gradients = again()
    ctx.gradients = None
    # an upstream of exactly 1 is the rule, and a pass over dw is not free; reading it on a GPU would be a host sync
    if upstream.device.type != "cpu" or float(upstream) != 1.0:
        for g in gradients:
            g.mul_(upstream)
    return gradients


def _stream_loss_gradients(ctx, grads):
    refuse_create_graph()
    upstream = grads[0]
    count, arg_count, has_picks, has_keep = ctx.sizes
    nothing = [None] * count, None, None, [None] * arg_count, None, None, None, None, None, None
    needs = ctx.constants[-1]
    if upstream is None or not any(needs):
        return nothing
    saved = list(ctx.saved_tensors)
    inputs = saved[: count + arg_count]

    def again() -> list[Tensor]:
        rest = saved[count + arg_count :]
        picks = rest.pop(0) if has_picks else None
        keep = rest.pop(0) if has_keep else None
        outputs = loss_op(inputs[:count], picks, keep, inputs[count:], *ctx.constants)
        return outputs[len(outputs) - sum(needs) :]

    gradients = scaled_gradients(ctx, upstream, again)
    made = spread(gradients, inputs, needs)
    return made[:count], None, None, made[count:], None, None, None, None, None, None


loss_op.register_autograd(_stream_loss_gradients, setup_context=_stream_loss_context)


@torch.library.custom_op("bigclass::checked_picks", mutates_args=())
def checked_in_graph(picks: Tensor, c: int) -> Tensor:
    """The picks, once they are known to be classes (or -1): inside a traced graph nothing else can raise IndexError."""
    assert_picks(picks, c)
    return picks.clone()


@checked_in_graph.register_fake
def _(picks, c):
    return torch.empty_like(picks)


def _needed(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [t for t, need in zip(tensors, needs, strict=True) if need]


def spread(grads: Sequence[Tensor], tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """One gradient for each tensor, in its type; None where it needs none."""
    it = iter(grads)
    return [next(it).to(t.dtype) if need else None for t, need in zip(tensors, needs, strict=True)]

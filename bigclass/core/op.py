"""The one op: fold the logits of a stream, and pick some of them, without ever storing N x C.

    s_ij = maps(scale * (x_i . w_j + b_j))                                    the stream (stream.py)
    folds_i = merge over j of lift(s_ij)      picked_ik = s[i, picks[i, k]]      (folds.py)

    reduce_logits(stream, picks, folds)                    the folds and the picks, differentiable; the backward makes the tiles again
    stream_loss(stream, picks, folds, row_loss, args)      sum_i row_loss(folds_i, picked_i, args_i); gradients are made with the loss

Every loss is arithmetic on what the first returns. With g_i what reached row i's folds and h_ik its k-th pick, the gradient of a tile is

    G_ij = sum over folds g_i d(fold_i)/d(s_ij)  [0 where the fold excludes j]  +  [j is a pick of i] h_ik        dx = G w    dw = G^T x

Costs in flops: 2NCD for the forward; 8NCD for reduce_logits with its backward, 6NCD for stream_loss. Memory: plan.py.

Two streams over the same classes are compared in compare.py. Classes that are spread over ranks: parallel/classes.py, which calls this.

Both are custom ops (custom_ops.py; one graph under torch.compile). The dense engine is the exception: plain autograd, no custom op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bigclass.core.custom_ops import checked_in_graph, fold_op, loss_op, report_op, row_loss_gradients
from bigclass.core.engines import dense, streaming_engine
from bigclass.core.engines.filter import exact_report
from bigclass.core.errors import ArgumentError
from bigclass.core.folds import Fold, State
from bigclass.core.guards import autocast_off, refuse_transforms
from bigclass.core.plan import Settings, choose_engine, choose_gradients, make_plan, saved_steps, settings
from bigclass.core.problem import assert_picks, beside, check, engine_for, is_affine, squeezed, states_of, summed, work_of
from bigclass.core.recipe import pack
from bigclass.core.row_losses import ROW_LOSSES
from bigclass.core.stream import Stream
from bigclass.core.updates import Problem, SlabUpdate, check_update, handed_on


def reduce_logits(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], *, keep: Tensor | None = None, engine: str = "auto",
    report: Tensor | None = None,
) -> tuple[list[State], Tensor | None]:  # fmt: skip
    """Fold a stream's logits and pick some of them.

    Args:
        stream: how the logits are made.
        picks: (N, K) class indices, -1 for none; or None.
        folds: what to fold them to.
        keep: (N,) bool; rows where it is False contribute exactly nothing, to gradients either; what is returned for them means nothing.
        engine: "auto", "dense", "tiled" or "fused".
        report: from `empty_report`; each backward writes to it the share of the gradient's columns that `stream.grad_filter` kept, and the
            largest relative error of a block of rows of dL/dz. In a compiled graph, too.

    Returns:
        For each fold its raw state, a tuple of tensors (N,) (or (N, k); (C,) for column folds), and the picked logits (N, K), 0 where none.

    Raises:
        IndexError: a pick outside [-1, C). ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    check(stream, picks, folds, keep)
    name = engine if engine == "dense" else engine_for(work_of(stream, folds, keep, scalar=False), engine, stream, folds)
    if name == "dense":
        if picks is not None and torch.compiler.is_compiling():
            picks = checked_in_graph(picks, stream.shape[1])
        else:
            assert_picks(picks, stream.shape[1])
        states, picked = dense.reduce(stream, picks, keep, folds)
        if report is not None:
            report.copy_(exact_report(report))
    else:
        refuse_transforms([*stream.tensors, *(t for f in folds for t in f.tensors)])
        recipe, numbers, tensors = pack(stream, folds)
        needs = [t.requires_grad and torch.is_grad_enabled() for t in tensors]
        saved = saved_steps(work_of(stream, folds, keep, scalar=False, grad=any(needs)), settings(), name)
        plan = f"{name},{'saved' if saved else 'recompute'},{settings().workspace or 0},{saved}"
        outputs = fold_op(tensors, picks, keep, recipe, numbers, plan, needs, report)
        return states_of(outputs, folds), None if picks is None else outputs[sum(len(f.differentiable) for f in folds)]
    return [squeezed(state) for state in states], picked


def empty_report(stream: Stream) -> Tensor:
    """(2,) NaN, for `reduce_logits(report=)`."""
    return report_op(stream.tensors[0].detach(), stream.accumulate_dtype == torch.float64)


def stream_loss(
    stream: Stream,
    picks: Tensor | None,
    folds: Sequence[Fold],
    row_loss: str,
    args: Sequence[Tensor] = (),
    numbers: Sequence[float] = (),
    *,
    keep: Tensor | None = None,
    engine: str = "auto",
) -> Tensor:
    """sum over rows of row_loss(folds_i, picked_i, args_i), a scalar.

    Args:
        stream, picks, folds, keep, engine: as in `reduce_logits` (row folds only).
        row_loss: the name of a registered row loss. args: its tensors, each with N rows. numbers: its constants.

    Returns:
        The sum, in fp32 (float64 for float64 streams; float64 args make the sum itself run in float64).
        Gradients reach the stream's tensors, the folds' and args.
    """
    return observed_loss(stream, picks, folds, (), row_loss, args, numbers, keep=keep, engine=engine)[0]


def observed_loss(
    stream: Stream,
    picks: Tensor | None,
    folds: Sequence[Fold],
    observed: Sequence[Fold],
    row_loss: str,
    args: Sequence[Tensor] = (),
    numbers: Sequence[float] = (),
    *,
    keep: Tensor | None = None,
    update: SlabUpdate | None = None,
    engine: str = "auto",
) -> tuple[Tensor, list[State]]:
    """`stream_loss`, and the states of row folds that the loss does not read (top-k classes), from the same tiles. They get no gradient.

    update: takes the gradient of the stream's one weight, slab by slab in the backward, in place of autograd (updates.py).
    """
    if row_loss not in ROW_LOSSES:
        raise KeyError(f"row_loss: no {row_loss!r} is registered; known: {sorted(ROW_LOSSES)}")
    if any(f.axis != "rows" for f in (*folds, *observed)):
        raise ArgumentError("stream_loss: column folds do not reach a row loss; use reduce_logits")
    if any(f.tensors for f in observed):
        raise ArgumentError("observed: expected folds without tensors of their own")
    for a in args:
        if a.shape[0] != stream.shape[0]:
            raise ArgumentError(f"args: expected tensors with {stream.shape[0]} rows, got shape {tuple(a.shape)}")
    tensors = [*stream.tensors, *[t for f in folds for t in f.tensors], *args]
    needs = [t.requires_grad and torch.is_grad_enabled() for t in tensors]
    options = settings()
    if update is not None:
        check_update(update, stream, tensors[: len(tensors) - len(args)], args)
        if any(needs):
            return _handed_on(stream, picks, folds, observed, row_loss, args, numbers, keep, update, engine)
    work = work_of(stream, [*folds, *observed], keep, scalar=True, grad=any(needs))
    work = replace(work, affine=is_affine(row_loss, picks, folds, args))
    name = engine_for(work, engine, stream, [*folds, *observed])
    gradients = choose_gradients(work, options, name)
    if gradients == "forward" and options.gradients == "auto" and _scales_frozen(stream):
        gradients = "recompute"
    # an observed fold is shown tiles once: where chunks of whole rows are kept, it would need them all again
    if name == "dense" or gradients in ("recompute", "saved") or (observed and gradients == "forward"):
        states, picked = reduce_logits(stream, picks, [*folds, *observed], keep=keep, engine=name)
        return loss_of_states(stream, states, picked, len(folds), row_loss, args, numbers, keep)
    check(stream, picks, [*folds, *observed], keep)
    refuse_transforms(tensors)
    recipe, constants, tensors = pack(stream, [*folds, *observed])
    plan = f"{name},{options.gradients},{options.workspace or 0},{len(observed)}"
    out = iter(loss_op(tensors, picks, keep, list(args), recipe, constants, row_loss, [*numbers, 0.0], plan, needs))
    loss = next(out)
    return loss, [squeezed(tuple([next(out) for _ in f.differentiable])) for f in observed]


def loss_of_states(
    stream: Stream, states: Sequence[State], picked: Tensor | None, read: int, row_loss: str, args: Sequence[Tensor],
    numbers: Sequence[float], keep: Tensor | None,
) -> tuple[Tensor, list[State]]:  # fmt: skip
    """The sum over rows of a row loss of the first `read` states; the other states, without gradients."""
    states, seen = states[:read], [tuple([t.detach() for t in s]) for s in states[read:]]
    if keep is not None:  # what ignored rows hold (0 times an infinite identity is NaN) must not reach the gradients of args
        states = [tuple([torch.where(beside(keep, t), t, 0.0) for t in state]) for state in states]
    return summed(ROW_LOSSES[row_loss](states, picked, args, numbers), keep, stream), seen


def _scales_frozen(stream: Stream) -> bool:
    """Does a class scale learn over a weight that does not? Its gradient is read off G^T x, which over chunks of rows would be C x D."""
    return stream.class_scale is not None and stream.class_scale.requires_grad and not all([w.requires_grad for _, w in stream.pairs])


@torch.compiler.disable(reason="update= writes to the weight in the backward, which no graph can hold; with fullgraph=True leave it None")
def _handed_on(
    stream, picks, folds, observed, row_loss, args, numbers, keep, update: SlabUpdate, engine: str
) -> tuple[Tensor, list[State]]:
    """`observed_loss` with an update: never dense, where the gradient would be a whole."""
    if engine == "dense":
        raise ArgumentError("engine: 'dense' makes the whole C x D gradient; update= needs 'auto', 'tiled' or 'fused'")
    every = [*folds, *observed]
    check(stream, picks, every, keep)
    assert_picks(picks, stream.shape[1])
    tensors = [*stream.tensors, *[t for f in every for t in f.tensors]]
    refuse_transforms(tensors)
    work = work_of(stream, every, keep, scalar=False)
    name = engine_for(work, engine, stream, every)
    name = "tiled" if name == "dense" else name

    def evaluate(states, picked, chunk, mask):
        return row_loss_gradients(row_loss, list(numbers), folds, states, picked, chunk, [False] * len(args), mask)

    affine = is_affine(row_loss, picks, folds, args)
    options = replace(settings(), gradients="auto" if affine else "recompute")
    work = replace(work, affine=affine, scalar=affine)
    problem = Problem(
        stream, picks, keep, tuple(folds), tuple(observed), tuple(args), evaluate,
        make_plan(replace(work, grad=False), name, options), make_plan(work, name, options), update, affine,
    )  # fmt: skip
    loss, seen = handed_on(problem, tensors)
    return loss, [squeezed(s) for s in seen]


def spread_engine(stream: Stream, folds: Sequence[Fold], engine: str, classes: int) -> str:
    """The streaming engine for `engine`, of a stream that will be run over this many classes, a piece at a time."""
    check(replace(stream, bias=None), None, folds, None)
    work = replace(work_of(stream, folds, None, scalar=False), c=classes)
    name = choose_engine(work, engine)
    return "tiled" if name == "dense" else name


def fold_states(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], engine: str, workspace: int | None
) -> tuple[list[State], Tensor | None]:
    """`reduce_logits` by a streaming engine below autograd, for other ops to build on: raw states, each part (N, k) or (C, k)."""
    assert_picks(picks, stream.shape[1])
    with autocast_off(stream.device):
        plan = make_plan(work_of(stream, folds, None, scalar=False, grad=False), engine, Settings(workspace, "recompute"))
        return streaming_engine(engine).reduce(stream, picks, None, folds, plan)


def fold_gradients(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], states: Sequence[State], grads: Sequence[Sequence[Tensor | None]],
    h: Tensor | None, needs: Sequence[bool], engine: str, workspace: int | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the needed tensors of the stream, from any states (of more classes than these, say) and what reached them.

    They come in fp32 (fp64), to be added to others before they are rounded."""
    with autocast_off(stream.device):
        plan = make_plan(work_of(stream, folds, None, scalar=False, grad=True), engine, Settings(workspace, "recompute"))
        return streaming_engine(engine).reduce_backward(stream, picks, None, folds, plan, states, grads, h, needs, keep_wide=True)

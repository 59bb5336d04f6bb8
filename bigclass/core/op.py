"""The one op: fold the logits of a stream, and pick some of them, without ever storing N x C.

    s_ij = maps(scale * (x_i . w_j + b_j))                                    the stream (stream.py)
    folds_i = merge over j of lift(s_ij)      picked_ik = s[i, picks[i, k]]      (folds.py)

    reduce_logits(stream, picks, folds)                    the folds and the picks, differentiable; the backward makes the tiles again
    stream_loss(stream, picks, folds, row_loss, args)      sum_i row_loss(folds_i, picked_i, args_i); gradients are made with the loss

Every loss is arithmetic on what the first returns. With g_i what reached row i's folds and h_ik its k-th pick, the gradient of a tile is

    G_ij = sum over folds g_i d(fold_i)/d(s_ij)  [0 where the fold excludes j]  +  [j is a pick of i] h_ik        dx = G w    dw = G^T x

Costs in flops: 2NCD for the forward; 8NCD for reduce_logits with its backward, 6NCD for stream_loss. Memory: plan.py.

Both are custom ops with fake kernels (one graph under torch.compile). A stream and its folds cross as a string of
registered names, numbers and tensors (recipe.py). The dense engine is the exception: plain autograd, no custom op.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bigclass.core.engines import dense, streaming_engine
from bigclass.core.engines.support import form_reason, fused_reason, grids
from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import Fold, State, SumFold
from bigclass.core.guards import autocast_off, autograd_inside_op, refuse_create_graph, refuse_transforms
from bigclass.core.plan import Plan, Settings, Work, choose_engine, choose_gradients, make_plan, settings, tile_buffers
from bigclass.core.recipe import pack, unpack
from bigclass.core.row_losses import AFFINE, ROW_LOSSES
from bigclass.core.stream import Map, Stream
from bigclass.core.updates import Problem, SlabUpdate, check_update, handed_on


def reduce_logits(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], *, keep: Tensor | None = None, engine: str = "auto"
) -> tuple[list[State], Tensor | None]:
    """Fold a stream's logits and pick some of them.

    Args:
        stream: how the logits are made.
        picks: (N, K) class indices, -1 for none; or None.
        folds: what to fold them to.
        keep: (N,) bool; rows where it is False contribute exactly nothing, to gradients either; what is returned for them means nothing.
        engine: "auto", "dense", "tiled" or "fused".

    Returns:
        For each fold its raw state, a tuple of tensors (N,) (or (N, k); (C,) for column folds), and the picked logits (N, K), 0 where none.

    Raises:
        IndexError: a pick outside [-1, C). ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    _check(stream, picks, folds, keep)
    name = engine if engine == "dense" else _choose(_work(stream, folds, keep, scalar=False), engine, stream, folds)
    if name == "dense":
        if picks is not None and torch.compiler.is_compiling():
            picks = checked_in_graph(picks, stream.shape[1])
        else:
            assert_picks(picks, stream.shape[1])
        states, picked = dense.reduce(stream, picks, keep, folds)
    else:
        refuse_transforms([*stream.tensors, *(t for f in folds for t in f.tensors)])
        recipe, numbers, tensors = pack(stream, folds)
        needs = [t.requires_grad and torch.is_grad_enabled() for t in tensors]
        outputs = _reduce(tensors, picks, keep, recipe, numbers, f"{name},recompute,{settings().workspace or 0}", needs)
        states, at = [], 0
        for f in folds:
            parts = [t if d else t.detach() for t, d in zip(outputs[at : at + len(f.differentiable)], f.differentiable, strict=True)]
            states.append(tuple(parts))
            at += len(parts)
        picked = None if picks is None else outputs[at]
    return [_squeeze(state) for state in states], picked


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
    work = _work(stream, [*folds, *observed], keep, scalar=True, grad=any(needs))
    work = replace(work, affine=_is_affine(row_loss, picks, folds, args))
    name = _choose(work, engine, stream, [*folds, *observed])
    gradients = choose_gradients(work, options)
    # an observed fold is shown tiles once: where chunks of whole rows are kept, it would need them all again
    if name == "dense" or gradients == "recompute" or (observed and gradients == "forward"):
        states, picked = reduce_logits(stream, picks, [*folds, *observed], keep=keep, engine=name)
        states, seen = states[: len(folds)], [tuple([t.detach() for t in s]) for s in states[len(folds) :]]
        if keep is not None:  # what ignored rows hold (0 times an infinite identity is NaN) must not reach the gradients of args
            states = [tuple([torch.where(_like(keep, t), t, 0.0) for t in state]) for state in states]
        return _sum(ROW_LOSSES[row_loss](states, picked, args, numbers), keep, stream), seen
    _check(stream, picks, [*folds, *observed], keep)
    refuse_transforms(tensors)
    recipe, constants, tensors = pack(stream, [*folds, *observed])
    plan = f"{name},{options.gradients},{options.workspace or 0},{len(observed)}"
    out = iter(_stream_loss(tensors, picks, keep, list(args), recipe, constants, row_loss, [*numbers, 0.0], plan, needs))
    loss = next(out)
    return loss, [_squeeze(tuple([next(out) for _ in f.differentiable])) for f in observed]


@torch.compiler.disable(reason="update= writes to the weight in the backward, which no graph can hold; with fullgraph=True leave it None")
def _handed_on(
    stream, picks, folds, observed, row_loss, args, numbers, keep, update: SlabUpdate, engine: str
) -> tuple[Tensor, list[State]]:
    """`observed_loss` with an update: never dense, where the gradient would be a whole."""
    if engine == "dense":
        raise ArgumentError("engine: 'dense' makes the whole C x D gradient; update= needs 'auto', 'tiled' or 'fused'")
    every = [*folds, *observed]
    _check(stream, picks, every, keep)
    assert_picks(picks, stream.shape[1])
    tensors = [*stream.tensors, *[t for f in every for t in f.tensors]]
    refuse_transforms(tensors)
    work = _work(stream, every, keep, scalar=False)
    name = _choose(work, engine, stream, every)
    name = "tiled" if name == "dense" else name

    def evaluate(states, picked, chunk, mask):
        return _row_loss_gradients(row_loss, list(numbers), folds, states, picked, chunk, [False] * len(args), mask)

    affine = _is_affine(row_loss, picks, folds, args)
    options = replace(settings(), gradients="auto" if affine else "recompute")
    work = replace(work, affine=affine, scalar=affine)
    problem = Problem(
        stream, picks, keep, tuple(folds), tuple(observed), tuple(args), evaluate,
        make_plan(replace(work, grad=False), name, options), make_plan(work, name, options), update, affine,
    )  # fmt: skip
    loss, seen = handed_on(problem, tensors)
    return loss, [_squeeze(s) for s in seen]


def _is_affine(row_loss: str, picks: Tensor | None, folds: Sequence[Fold], args: Sequence[Tensor]) -> bool:
    """Are the gradients of a tile known before any state is?

    Its sums must leave the picks out, for these are then read apart, and rounded otherwise. Gradients of args are states."""
    sums = all(isinstance(f, SumFold) and (picks is None or f.exclude_picks) for f in folds)
    return row_loss in AFFINE and sums and len(folds) > 0 and not any(a.requires_grad for a in args)


def spread_engine(stream: Stream, folds: Sequence[Fold], engine: str, classes: int) -> str:
    """The streaming engine for `engine`, of a stream that will be run over this many classes, a piece at a time."""
    _check(replace(stream, bias=None), None, folds, None)
    work = replace(_work(stream, folds, None, scalar=False), c=classes)
    name = choose_engine(work, engine)
    return "tiled" if name == "dense" else name


def fold_states(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], engine: str, workspace: int | None
) -> tuple[list[State], Tensor | None]:
    """`reduce_logits` by a streaming engine below autograd, for other ops to build on: raw states, each part (N, k) or (C, k)."""
    assert_picks(picks, stream.shape[1])
    with autocast_off(stream.device):
        plan = make_plan(_work(stream, folds, None, scalar=False, grad=False), engine, Settings(workspace, "recompute"))
        return streaming_engine(engine).reduce(stream, picks, None, folds, plan)


def fold_gradients(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], states: Sequence[State], grads: Sequence[Sequence[Tensor | None]],
    h: Tensor | None, needs: Sequence[bool], engine: str, workspace: int | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the needed tensors of the stream, from any states (of more classes than these, say) and what reached them.

    They come in fp32 (fp64), to be added to others before they are rounded."""
    with autocast_off(stream.device):
        plan = make_plan(_work(stream, folds, None, scalar=False, grad=True), engine, Settings(workspace, "recompute"))
        return streaming_engine(engine).reduce_backward(stream, picks, None, folds, plan, states, grads, h, needs, keep_wide=True)


# --- the custom ops -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bigclass::reduce_logits", mutates_args=())
def _reduce(
    tensors: list[Tensor], picks: Tensor | None, keep: Tensor | None, recipe: str, numbers: list[float], plan: str, needs: list[bool]
) -> list[Tensor]:
    stream, folds = unpack(recipe, numbers, tensors)
    assert_picks(picks, stream.shape[1])
    with autocast_off(stream.device):
        chosen = _plan(plan, _work(stream, folds, keep, scalar=False, grad=False))
        states, picked = streaming_engine(chosen.engine).reduce(stream, picks, keep, folds, chosen)
    return [t for state in states for t in state] + ([] if picked is None else [picked])


@_reduce.register_fake
def _(tensors, picks, keep, recipe, numbers, plan, needs):
    stream, folds = unpack(recipe, numbers, tensors)
    return _fake_outputs(stream, folds, picks)


def _fake_outputs(stream: Stream, folds: Sequence[Fold], picks: Tensor | None) -> list[Tensor]:
    (n, c), like = stream.shape, stream.tensors[0].new_empty((), dtype=stream.accumulate_dtype)
    states = [t for f in folds for t in f.identity(n if f.axis == "rows" else c, like)]
    return states + ([] if picks is None else [like.new_empty((n, picks.shape[1]))])


@torch.library.custom_op("bigclass::reduce_logits_backward", mutates_args=())
def _reduce_backward(
    tensors: list[Tensor], picks: Tensor | None, keep: Tensor | None, states: list[Tensor], grads: list[Tensor],
    has_grad: list[bool], recipe: str, numbers: list[float], plan: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    stream, folds = unpack(recipe, numbers, tensors)
    given, state = iter(grads), iter(states)
    upstream = [next(given) if there else None for there in has_grad]
    parts, at, folded = [], 0, []
    for f in folds:
        width = len(f.differentiable)
        parts.append(upstream[at : at + width])
        folded.append(tuple([next(state) for _ in range(width)]))
        at += width
    h = upstream[at] if picks is not None else None
    with autocast_off(stream.device):
        chosen = _plan(plan, _work(stream, folds, keep, scalar=False, grad=True))
        return streaming_engine(chosen.engine).reduce_backward(stream, picks, keep, folds, chosen, folded, parts, h, needs)


@_reduce_backward.register_fake
def _(tensors, picks, keep, states, grads, has_grad, recipe, numbers, plan, needs):
    return [_fake_gradient(t) for t, need in zip(tensors, needs, strict=True) if need]


def _fake_gradient(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return t.new_empty(t.shape, dtype=dtype)


def _reduce_context(ctx, inputs, output):
    tensors, picks, keep, recipe, numbers, plan, needs = inputs
    _, folds = unpack(recipe, numbers, tensors)
    flags = [d for f in folds for d in f.differentiable]
    ctx.mark_non_differentiable(*[t for t, d in zip(output, flags, strict=False) if not d])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *[t for t in (picks, keep) if t is not None], *output[: len(flags)])
    ctx.sizes = len(tensors), picks is not None, keep is not None
    ctx.constants = recipe, numbers, plan, needs


def _reduce_gradients(ctx, grads):
    refuse_create_graph()
    saved = ctx.saved_tensors
    count, has_picks, has_keep = ctx.sizes
    recipe, numbers, plan, needs = ctx.constants
    rest = list(saved[count:])
    picks = rest.pop(0) if has_picks else None
    keep = rest.pop(0) if has_keep else None
    has_grad = [g is not None for g in grads]
    tensors = list(saved[:count])
    if not any(has_grad) or not any(needs):
        return [None] * count, None, None, None, None, None, None
    made = _reduce_backward(tensors, picks, keep, rest, [g for g in grads if g is not None], has_grad, recipe, numbers, plan, needs)
    return _spread([_as(g, t) for g, t in zip(made, _needed(tensors, needs), strict=True)], needs), None, None, None, None, None, None


_reduce.register_autograd(_reduce_gradients, setup_context=_reduce_context)


@torch.library.custom_op("bigclass::stream_loss", mutates_args=())
def _stream_loss(
    tensors: list[Tensor], picks: Tensor | None, keep: Tensor | None, args: list[Tensor], recipe: str, numbers: list[float],
    row_loss: str, row_numbers: list[float], plan: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    stream, every = unpack(recipe, numbers, tensors)
    folds, observed = _parted(every, plan)
    assert_picks(picks, stream.shape[1])
    arg_needs = needs[len(tensors) :]
    row_numbers = row_numbers[:-1]  # the caller's; the last only keeps the list from being empty, which autograd takes for tensors

    def evaluate(states: list[State], picked: Tensor | None, chunk: list[Tensor], mask: Tensor | None):
        return _row_loss_gradients(row_loss, row_numbers, folds, states, picked, chunk, arg_needs, mask)

    with autocast_off(stream.device):
        work = _work(stream, every, keep, scalar=True, grad=any(needs))
        chosen = _plan(plan, replace(work, affine=_is_affine(row_loss, picks, folds, ()) and not any(arg_needs)))
        module = streaming_engine(chosen.engine)
        seen: list[State] = []
        if not any(needs):
            states, picked = module.reduce(stream, picks, keep, every, chosen)
            seen = states[len(folds) :]
            loss = ROW_LOSSES[row_loss]([_squeeze(s) for s in states[: len(folds)]], picked, args, row_numbers)
            loss, grads = _sum(loss, keep, stream), []
        elif chosen.gradients == "slabs":
            loss, seen, grads = module.slab_loss(stream, picks, keep, folds, observed, evaluate, args, chosen, needs)
        else:
            loss, grads = module.stream_loss(stream, picks, keep, folds, evaluate, args, chosen, needs)
    return [loss, *[t for state in seen for t in state], *grads]


@_stream_loss.register_fake
def _(tensors, picks, keep, args, recipe, numbers, row_loss, row_numbers, plan, needs):
    stream, every = unpack(recipe, numbers, tensors)
    wide = stream.accumulate_dtype
    loss = stream.tensors[0].new_empty((), dtype=wide)
    seen = _fake_outputs(stream, _parted(every, plan)[1], None)
    return [loss, *seen] + [_fake_gradient(t, wide) for t in _needed([*tensors, *args], needs)]


def _row_loss_gradients(row_loss, numbers, folds, states, picked, args, arg_needs, mask):
    """One chunk's row losses and their derivatives, by plain autograd on N-vectors."""
    with autograd_inside_op():
        leaves = [
            tuple([t.detach().requires_grad_(d) for t, d in zip(s, f.differentiable, strict=True)])
            for s, f in zip(states, folds, strict=True)
        ]
        picked = None if picked is None else picked.detach().requires_grad_()
        args = [a.detach().requires_grad_(need) for a, need in zip(args, arg_needs, strict=True)]
        total = ROW_LOSSES[row_loss]([_squeeze(s) for s in leaves], picked, args, numbers)
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
    # Kept outside save_for_backward: in eager mode the backward consumes them in place, once (pitfall 46).
    ctx.gradients = output[len(output) - sum(constants[-1]) :]


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
    gradients = ctx.gradients
    eager = type(upstream) is Tensor and not torch.compiler.is_compiling()
    if eager:
        if gradients is None:  # consumed by an earlier backward: make them again
            rest = saved[count + arg_count :]
            picks = rest.pop(0) if has_picks else None
            keep = rest.pop(0) if has_keep else None
            with torch.no_grad():
                outputs = _stream_loss(inputs[:count], picks, keep, inputs[count:], *ctx.constants)
                gradients = outputs[len(outputs) - sum(needs) :]
        ctx.gradients = None
        # an upstream of exactly 1 is the rule, and a pass over dw is not free; reading it on a GPU would be a host sync
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            for g in gradients:
                g.mul_(upstream)
    else:
        gradients = [g * upstream for g in gradients]
    made = _spread([_as(g, t) for g, t in zip(gradients, _needed(inputs, needs), strict=True)], needs)
    return made[:count], None, None, made[count:], None, None, None, None, None, None


_stream_loss.register_autograd(_stream_loss_gradients, setup_context=_stream_loss_context)


@torch.library.custom_op("bigclass::checked_picks", mutates_args=())
def checked_in_graph(picks: Tensor, c: int) -> Tensor:
    """The picks, once they are known to be classes (or -1): inside a traced graph nothing else can raise IndexError."""
    assert_picks(picks, c)
    return picks.clone()


@checked_in_graph.register_fake
def _(picks, c):
    return torch.empty_like(picks)


# --- plumbing -------------------------------------------------------------------------------------------------------------------


def _like(keep: Tensor, t: Tensor) -> Tensor:
    return keep if t.dim() == 1 else keep.unsqueeze(-1)


def _sum(loss: Tensor, keep: Tensor | None, stream: Stream) -> Tensor:
    return (loss if keep is None else torch.where(keep, loss, 0.0)).sum().to(stream.accumulate_dtype)


def _needed(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [t for t, need in zip(tensors, needs, strict=True) if need]


def _spread(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    it = iter(grads)
    return [next(it) if need else None for need in needs]


def _as(g: Tensor, t: Tensor) -> Tensor:
    return g if g.dtype == t.dtype else g.to(t.dtype)


def _squeeze(state: State) -> State:
    return tuple([t.squeeze(-1) if t.shape[-1] == 1 else t for t in state])


def _work(stream: Stream, folds: Sequence[Fold], keep: Tensor | None, *, scalar: bool, grad: bool = True) -> Work:
    n, c = stream.shape
    lone = len(folds) == 1 and folds[0].overwrites and len(stream.maps) == 0
    products = [stream.compute_dtype or torch.promote_types(x.dtype, w.dtype) for x, w in stream.pairs]
    return Work(
        n=n,
        c=c,
        d=stream.features,
        device=stream.device.type,
        scalar=scalar,
        grad=grad,
        half=any(t.dtype.itemsize == 2 for pair in stream.pairs for t in pair),
        wide=stream.accumulate_dtype == torch.float64,
        buffers=tile_buffers(lone, scalar, len(stream.maps)),
        not_fused=fused_reason(stream, folds),
        narrow=all(dtype.itemsize == 2 for dtype in products),
        masked=keep is not None,
        cast=any(t.dtype != dtype for pair, dtype in zip(stream.pairs, products, strict=True) for t in pair),
        laid_out=sum(t.numel() * t.element_size() for t in grids(stream, folds) if t.stride(1) != 1),
        group=math.lcm(*[f.group for f in folds]),
    )


def _choose(work: Work, engine: str, stream: Stream, folds: Sequence[Fold]) -> str:
    """The engine's name. On a GPU, "auto" falls to tiled without the user's asking: if a form of theirs is all that lacks, say so once."""
    name = choose_engine(work, engine)
    if name == "tiled" and engine == "auto" and work.device == "cuda" and not torch.compiler.is_compiling():
        own = form_reason([m for m in stream.maps if _foreign(m)], [f for f in folds if _foreign(f)])
        if own is not None and own == work.not_fused and own not in _said:
            _said.add(own)
            warnings.warn(f"bigclass: not the fused engine but the tiled one, for {own}", UserWarning, stacklevel=3)
    return name


_said: set[str] = set()


def _foreign(part: Fold | Map) -> bool:
    """Is it registered from outside? What this library leaves without a form, its user cannot help."""
    return not type(part).__module__.startswith("bigclass.")


def _parted(every: Sequence[Fold], plan: str) -> tuple[Sequence[Fold], Sequence[Fold]]:
    """(the folds that a row loss reads, those that are observed): the last so many, as the plan says."""
    count = len(every) - int(plan.split(",")[3])
    return every[:count], every[count:]


def _plan(plan: str, work: Work) -> Plan:
    engine, gradients, workspace = plan.split(",")[:3]
    return make_plan(work, engine, Settings(int(workspace) or None, gradients))


def _check(stream: Stream, picks: Tensor | None, folds: Sequence[Fold], keep: Tensor | None) -> None:
    stream.check()
    n, c = stream.shape
    if picks is not None and (picks.dim() != 2 or picks.shape[0] != n):
        raise ArgumentError(f"picks: expected shape ({n}, K), got {tuple(picks.shape)}")
    if picks is not None and picks.dtype not in (torch.int64, torch.int32):
        raise ArgumentTypeError(f"picks: expected int64 or int32, got {picks.dtype}")
    if keep is not None and (tuple(keep.shape) != (n,) or keep.dtype != torch.bool):
        raise ArgumentError(f"keep: expected a bool tensor of shape ({n},), got {keep.dtype} {tuple(keep.shape)}")
    for f in folds:
        if f.axis not in ("rows", "columns"):
            raise ArgumentError(f"fold {f.name!r}: expected axis 'rows' or 'columns', got {f.axis!r}")
        if f.group > 1 and (c % f.group or f.axis == "columns"):
            raise ArgumentError(
                f"fold {f.name!r}: expected whole groups of {f.group} classes along each row, got axis {f.axis!r} and {c} classes"
            )
        if keep is not None and f.axis == "columns":
            raise ArgumentError("keep: rows cannot be left out of a column fold; drop them from the operands instead")
        for t, axis in zip(f.tensors, f.tensor_axes, strict=False):
            along_rows = (axis == "kept") == (f.axis == "rows")
            shape = (n, c) if axis == "grid" else ((n,) if along_rows else (c,))
            if tuple(t.shape) != shape:
                raise ArgumentError(f"fold {f.name!r}: expected a {axis} tensor of shape {shape}, got {tuple(t.shape)}")
            if axis == "folded" and t.requires_grad and torch.is_grad_enabled():
                raise ArgumentError(f"fold {f.name!r}: a vector along the folded axis is a constant and gets no gradient; detach it")


def assert_picks(picks: Tensor | None, c: int) -> None:
    """Raise for a pick outside [-1, C); on CUDA an assertion on the device."""
    if picks is None or picks.numel() == 0:
        return
    if picks.device.type == "cpu":
        low, high = (int(v) for v in picks.aminmax())
        if low < -1 or high >= c:
            # of a target -1 is a class that is not there, of a pick none: it comes as C (losses/inputs.py)
            got = f"{c} or a negative one" if high == c else high if high > c else low
            raise IndexError(f"target (or index): expected class indices in [0, {c}), got {got}")
    else:
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            ((picks >= -1) & (picks < c)).all(), f"bigclass: a class index is outside [0, {c})"
        )

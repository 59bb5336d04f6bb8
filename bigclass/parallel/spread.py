"""Folds of this rank's rows over classes that lie on all ranks.

Rank r has rows x_r (n_r, D) and classes w_r (m_r, D). It folds the tiles (its rows) x (all classes): 2 n_r M D flops, M the sum of the m_r.
Row states are then complete; a column state (M,) is this rank's part, to be merged (`collectives.merge_states`). The backward makes the
tiles again, 6 n_r M D flops: dx is complete, a piece of dw is the part of these rows and goes home to be added up in fp32.

    gather    w of all ranks at once (M D numbers in their own dtype): asked for first, and while it travels this rank's own classes are
              folded, then those of the ranks before and behind. It is kept for the backward, where dw (M, D) is reduce-scattered.
    ring      one piece of w at a time goes round, each rank folding it and handing it on; the next travels while this one is folded.
              In the backward its dw goes with it and is home after a round. Two pieces and two of dw, never the whole.

Bytes a rank sends, e an element's: gather (W-1) m D (e + 4), ring (W-1) m D (2e) + W m D 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.core.folds import Fold, State
from bigclass.core.guards import refuse_create_graph, refuse_transforms
from bigclass.core.op import fold_gradients, fold_states
from bigclass.core.problem import assert_picks, states_of, upstream_of
from bigclass.core.recipe import pack, unpack
from bigclass.core.shards import local_picks
from bigclass.core.stream import Stream
from bigclass.parallel.collectives import padded, scatter_sum, shift, start_gather, unpadded, wait
from bigclass.parallel.groups import Ranks, ranks_named

EXCHANGES = ("auto", "gather", "ring")
GATHERED = 1 << 29  # bytes of gathered classes and their fp32 gradient from which on "auto" goes round the ring


def choose_exchange(exchange: str, w: Tensor, sizes: Sequence[int]) -> str:
    """ "gather" or "ring"."""
    if exchange not in EXCHANGES:
        raise ArgumentError(f"exchange: expected one of {EXCHANGES}, got {exchange!r}")
    if exchange != "auto":
        return exchange
    return "gather" if sum(sizes) * w.shape[1] * (w.element_size() + 4) <= GATHERED else "ring"


def spread_logits(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], ranks: Ranks, sizes: Sequence[int], *, exchange: str = "auto",
    engine: str = "tiled", workspace: int | None = None,
) -> tuple[list[State], Tensor | None]:  # fmt: skip
    """`core.op.reduce_logits` of this rank's rows over the classes of all ranks.

    Args:
        stream: one pair (x, w) of this rank's rows and classes; its bias, if there is one, has shape (1,): the same for all classes.
        picks: (n, K), counted over the classes of all ranks. folds: without tensors of their own.
        sizes: how many classes each rank has. exchange: "auto", "gather" or "ring". engine: "tiled" or "fused".

    Returns:
        Row states and picks, complete, and column states of sum(sizes) classes, this rank's part. A gradient that reaches them must be
        the same on every rank for the same class; those of w are added up over ranks, those of bias and scale are this rank's part.
    """
    if len(stream.pairs) != 1 or stream.class_scale is not None or stream.given is not None:
        raise ArgumentError("spread_logits: expected a stream of one operand pair, without class_scale or given")
    if any(f.tensors or f.group > 1 for f in folds):
        raise ArgumentError("spread_logits: expected folds without tensors or groups")
    recipe, numbers, tensors = pack(stream, folds)
    refuse_transforms(tensors)
    chosen = choose_exchange(exchange, stream.pairs[0][1], sizes)
    needs = [t.requires_grad and torch.is_grad_enabled() for t in tensors]
    *outputs, _ = _spread(tensors, picks, recipe, numbers, f"{engine},{workspace or 0},{chosen}", ranks.name, list(sizes), needs)
    return states_of(outputs, folds), None if picks is None else outputs[-1]


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:q]) for q in range(len(sizes))]


def _over(stream: Stream, w: Tensor) -> Stream:
    """The stream over other classes."""
    bias = None if stream.bias is None else stream.bias.expand(w.shape[0])
    return replace(stream, pairs=((stream.pairs[0][0], w),), bias=bias)


def _ring(w: Tensor, sizes: Sequence[int], ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
    """(rank q, its classes), this rank's own first. The next piece travels while one is in use."""
    current = padded(w, max(sizes))
    for step in range(ranks.size):
        q = (ranks.rank - step) % ranks.size
        coming = shift(current, ranks) if step < ranks.size - 1 else None
        yield q, current[: sizes[q]]
        if coming is not None:
            current = wait(coming)


def _gathered(w: Tensor, sizes: Sequence[int], ranks: Ranks, whole: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first class, classes): this rank's own, then those before and behind; what was gathered is left in `whole`."""
    coming = start_gather(w, sizes, ranks)
    start = _starts(sizes)[ranks.rank]
    stop = start + sizes[ranks.rank]
    yield start, w
    whole.append(unpadded(wait(coming), sizes))
    yield 0, whole[0][:start]
    yield stop, whole[0][stop:]


@torch.library.custom_op("bigclass::spread_logits", mutates_args=())
def _spread(
    tensors: list[Tensor], picks: Tensor | None, recipe: str, numbers: list[float], plan: str, group: str, sizes: list[int],
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    stream, folds = unpack(recipe, numbers, tensors)
    (x, w), ranks, starts = stream.pairs[0], ranks_named(group), _starts(sizes)
    engine, workspace, exchange = plan.split(",")
    like = x.new_empty((), dtype=stream.accumulate_dtype)
    total = sum(sizes)
    states = [f.identity(x.shape[0] if f.axis == "rows" else total, like) for f in folds]
    picked = None if picks is None else like.new_zeros(picks.shape)
    assert_picks(picks, total)
    whole: list[Tensor] = []
    pieces = ((starts[q], part) for q, part in _ring(w, sizes, ranks)) if exchange == "ring" else _gathered(w, sizes, ranks, whole)
    for start, part in pieces:
        if part.shape[0] == 0 or x.shape[0] == 0:
            continue
        stop = start + part.shape[0]
        found, here = fold_states(
            _over(stream, part), None if picks is None else local_picks(picks, start, stop), folds, engine, int(workspace) or None
        )
        for i, f in enumerate(folds):
            if f.axis == "rows":
                states[i] = f.merge(states[i], found[i])
            else:
                for out, t in zip(states[i], found[i], strict=True):
                    out[start:stop] = t
        if picked is not None and here is not None:
            picked += here
    kept = whole[0] if exchange == "gather" and any(needs) else w.new_empty((0, w.shape[1]))
    return [t for state in states for t in state] + ([] if picked is None else [picked]) + [kept]


@_spread.register_fake
def _(tensors, picks, recipe, numbers, plan, group, sizes, needs):
    stream, folds = unpack(recipe, numbers, tensors)
    (x, w), total = stream.pairs[0], sum(sizes)
    like = x.new_empty((), dtype=stream.accumulate_dtype)
    states = [t for f in folds for t in f.identity(x.shape[0] if f.axis == "rows" else total, like)]
    kept = total if plan.endswith("gather") and any(needs) else 0
    return states + ([] if picks is None else [like.new_empty(picks.shape)]) + [w.new_empty((kept, w.shape[1]))]


@torch.library.custom_op("bigclass::spread_logits_backward", mutates_args=())
def _spread_backward(
    tensors: list[Tensor], picks: Tensor | None, whole: Tensor, states: list[Tensor], grads: list[Tensor], has_grad: list[bool],
    recipe: str, numbers: list[float], plan: str, group: str, sizes: list[int], needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    stream, folds = unpack(recipe, numbers, tensors)
    (x, w), ranks, starts = stream.pairs[0], ranks_named(group), _starts(sizes)
    engine, workspace, exchange = plan.split(",")
    wide = stream.accumulate_dtype
    folded, parts, h = upstream_of(folds, states, grads, has_grad, picks is not None)
    sums = [t.new_zeros(t.shape, dtype=wide) if i != 1 else t for i, t in enumerate(tensors)]  # dw is no sum until it is home

    def piece(start: int, part: Tensor) -> Tensor | None:
        """dw of one piece; the others' gradients are added up."""
        if part.shape[0] == 0 or x.shape[0] == 0:
            return None
        stop = start + part.shape[0]

        def cut(t: Tensor, f: Fold) -> Tensor:
            return t if f.axis == "rows" else t[start:stop]

        some = [tuple([cut(t, f) for t in s]) for f, s in zip(folds, folded, strict=True)]
        above = [[None if t is None else cut(t, f) for t in p] for f, p in zip(folds, parts, strict=True)]
        here, space = None if picks is None else local_picks(picks, start, stop), int(workspace) or None
        made = iter(fold_gradients(_over(stream, part), here, folds, some, above, h, needs, engine, space))
        dw = None
        for i, need in enumerate(needs):
            if need and i == 1:
                dw = next(made)
            elif need:
                sums[i] += next(made).sum_to_size(tensors[i].shape)
        return dw

    if exchange == "gather":
        dw = piece(0, whole)
        if needs[1]:
            sums[1] = scatter_sum(x.new_zeros(whole.shape, dtype=wide) if dw is None else dw, sizes, ranks)
        return [t for t, need in zip(sums, needs, strict=True) if need]
    travelling: Tensor | None = None
    most = max(sizes)
    for q, part in _ring(w, sizes, ranks):
        dw = piece(starts[q], part)
        if needs[1]:
            own = x.new_zeros((most, w.shape[1]), dtype=wide) if dw is None else padded(dw, most)
            if travelling is not None:
                own = own + wait(travelling)
            travelling = shift(own, ranks)
    if travelling is not None:
        sums[1] = wait(travelling)[: sizes[ranks.rank]].clone()
    return [t for t, need in zip(sums, needs, strict=True) if need]


@_spread_backward.register_fake
def _(tensors, picks, whole, states, grads, has_grad, recipe, numbers, plan, group, sizes, needs):
    stream, _ = unpack(recipe, numbers, tensors)
    return [t.new_empty(t.shape, dtype=stream.accumulate_dtype) for t, need in zip(tensors, needs, strict=True) if need]


def _context(ctx, inputs, output):
    tensors, picks, recipe, numbers, plan, group, sizes, needs = inputs
    _, folds = unpack(recipe, numbers, tensors)
    flags = [d for f in folds for d in f.differentiable]
    ctx.mark_non_differentiable(*[t for t, d in zip(output, flags, strict=False) if not d], output[-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *([] if picks is None else [picks]), *output[: len(flags)], output[-1])
    ctx.counts = len(tensors), picks is not None
    ctx.constants = recipe, numbers, plan, group, sizes, needs


def _gradients(ctx, grads):
    refuse_create_graph()
    count, has_picks = ctx.counts
    saved = list(ctx.saved_tensors)
    tensors, rest, whole = saved[:count], saved[count:-1], saved[-1]
    picks = rest.pop(0) if has_picks else None
    recipe, numbers, plan, group, sizes, needs = ctx.constants
    has_grad = [g is not None for g in grads]
    if not any(needs):
        return [None] * count, None, None, None, None, None, None, None
    # even where nothing reached this rank's outputs: the others wait for it
    made = iter(
        _spread_backward(
            tensors, picks, whole, rest, [g for g in grads if g is not None], has_grad, recipe, numbers, plan, group, sizes, needs
        )
    )
    out = [next(made).to(t.dtype) if need else None for t, need in zip(tensors, needs, strict=True)]
    return out, None, None, None, None, None, None, None


_spread.register_autograd(_gradients, setup_context=_context)

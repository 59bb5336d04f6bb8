"""The tiled engine's plan for sums over classes: loss and gradient of a tile in one go, a slab of classes at a time.

Where a loss is affine in its folds (row_losses.py) what reaches a tile is known before it is made:

    read the picks                 N K dot products; with them the row loss gives g_i, the factor of row i's sum, and h_ik
    for each slab of classes       tile = x w^T; state += phi(s); G = g phi'(s), h at the picks; dw = G^T x, dx += G w       3 passes

Beside operands and gradients there is a tile and its temporaries, whatever N and C. dw of a slab is finished with its last row, so it
can be handed on (`on_slab`: an optimizer's update) instead of being stored.

A term that is exactly 0 below some logit (asymmetric margins, hinges) has nothing to add there: classes that lie below it in every row
of a tile are left out of everything behind the first product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bigclass.core.engines.sink import OnSlab, Sink
from bigclass.core.engines.tiles import Rows, Span, TileMaker, Upstream, Where, add_picks, logit_gradient, spans, update
from bigclass.core.folds import Fold, State, SumFold, live
from bigclass.core.plan import Plan
from bigclass.core.stream import Stream

_DENSE_SHARE = 0.6  # a tile in which more classes than this are live is treated whole: gathering them costs as much as it saves


def slab_loss(
    stream: Stream, picks: Tensor | None, keep: Tensor | None, folds: Sequence[Fold], observed: Sequence[Fold],
    row_loss: Callable[..., tuple[Tensor, list[list[Tensor | None]], Tensor | None, list[Tensor]]],
    args: Sequence[Tensor], plan: Plan, needs: Sequence[bool], on_slab: OnSlab | None = None,
) -> tuple[Tensor, list[State], list[Tensor]]:  # fmt: skip
    """The sum of the row losses, the states of the observed folds, and the gradients (fp32 until the upstream factor is known).

    on_slab: the upstream factor is known (row_loss has it), and the gradient of the only weight is handed on slab by slab."""
    rows = Rows(stream.shape[0], keep)
    maker = TileMaker(stream, picks, rows)
    tensors = len(stream.tensors) + sum(len(f.tensors) for f in folds)
    sink = Sink(maker, folds, needs[:tensors], keep_wide=on_slab is None, whole=False, on_slab=on_slab, plan=plan)
    like = maker.pool.get("empty", 0, 0)
    everything = Span(0, rows.count)
    states = [f.identity(rows.count, like) for f in folds]
    seen = [f.identity(rows.count, like) for f in observed]
    picked = None if picks is None else read_picks(maker, everything)
    own, mask = [rows.take(a, everything) for a in args], rows.mask(everything)
    _, grads, h, _ = row_loss(states, picked, own, mask)
    up = Upstream(states, grads, h)
    sink.open_rows(everything)
    for c in spans(maker.c, plan.class_block) if rows.count else []:
        ws, sums = maker.slab(c), sink.open_slab(c)
        for r in spans(rows.count, plan.row_block):
            xs = maker.features(r)
            values = maker.bend(maker.raw(xs, ws, r, c, maker.pool.get("tile", r.size, c.size)), keep_inputs=True)
            for f, state in zip(observed, seen, strict=True):
                update(f, tuple([t[r.start : r.stop] for t in state]), maker, values[-1], r, c, None)  # which counts every class
            g, values, live, where = _fold(maker, folds, states, up, values, r, c, maker.positions(r, c), sink)
            sink.add(g, values, xs, ws, sums, r, c, first_rows=r.start == 0, first_classes=c.start == 0, live=live, where=where)
        sink.close_slab(c, sums)
    if rows.count == 0:
        sink.no_rows()
    else:
        sink.close_rows()
    loss = row_loss(states, picked, own, mask)[0]
    found = [tuple([rows.scatter(t, fill) for t, fill in zip(s, f.identity(rows.total, like), strict=True)])
             for f, s in zip(observed, seen, strict=True)]  # fmt: skip
    return loss.to(maker.dtype), found, sink.finish()


def _fold(
    maker: TileMaker, folds: Sequence[Fold], states: list[State], up: Upstream, values: list[Tensor], r: Span, c: Span, where: Where,
    sink: Sink,
) -> tuple[Tensor, list[Tensor], Tensor | None, Where]:  # fmt: skip
    """Add a tile to the states and make its G: (G (r, c'), values along the maps (r, c'), which classes c' are; None: all, its picks)."""
    on_tensor = sink.on_tensor(r, c)
    active = [i for i, _ in enumerate(folds) if up.grads[i][0] is not None]
    if len(folds) > 1 or not active or on_tensor is not None:
        for f, state in zip(folds, states, strict=True):
            flat = None if where is None else where[0]
            tile = maker.tile(f, values[-1], r, c, flat, "scratch")
            state[0][r.start : r.stop].add_(f.lift(tile, maker.fold_tensors(f, r, c))[0])
            tile.restore()
        return logit_gradient(maker, folds, up, values, r, c, where, on_tensor), values, None, where
    (f,) = folds
    assert isinstance(f, SumFold)
    _, (g_rows,) = up.of(0, f, r, c)
    assert g_rows is not None
    some = live_classes(values[-1], f.zero_below, where)
    vectors = maker.fold_tensors(f, r, c)
    if some is not None:
        values, where = compact(maker, values, some, where)
        vectors = [v[:, some] if v.shape[1] > 1 else v for v in vectors]
    s = values[-1]
    apart = bool(maker.stream.maps) or maker.keeps_z
    out = maker.pool.get("g", *s.shape) if apart else s
    tile = maker.tile(f, s, r, c, None if where is None else where[0], "scratch")
    tile.work = lambda i: maker.pool.get(f"work {i}", *s.shape)
    (part,) = f.lift_with_gradient(tile, vectors, g_rows, out)
    states[0][0][r.start : r.stop].add_(part)
    if apart:
        tile.restore()
    add_picks(out, where, r, up)
    return out, values, some, where


def live_classes(s: Tensor, below: float, where: Where) -> Tensor | None:
    """The columns of s (r, c) that have a pick or a logit that is not below `below`; None for all, or where most of them do.

    Only on a CPU: elsewhere their number would be a host sync."""
    if below == -torch.inf or s.device.type != "cpu":
        return None
    found = live(s, below)
    if where is not None:
        flat, inside = where
        found[(flat % s.shape[1])[inside]] = True
    some = found.nonzero().squeeze(-1)
    return None if some.numel() > _DENSE_SHARE * s.shape[1] else some


def compact(maker: TileMaker, values: list[Tensor], live: Tensor, where: Where) -> tuple[list[Tensor], Where]:
    """The values along the maps, and where the picks are, at some of the columns."""
    n, c = values[-1].shape
    m = live.numel()
    made: dict[int, Tensor] = {}  # maps that act in place have one tensor in several places
    for i, v in enumerate(values):
        if id(v) not in made:
            made[id(v)] = torch.index_select(v, 1, live, out=maker.pool.get(f"live {i}", n, m))
    if where is None:
        return [made[id(v)] for v in values], None
    flat, inside = where
    rank = torch.zeros(c, dtype=torch.int64).index_copy_(0, live, torch.arange(m))
    flat = torch.where(inside, flat // c * m + rank[flat % c], n * m)
    return [made[id(v)] for v in values], (flat, inside)


def read_picks(maker: TileMaker, span: Span) -> Tensor:
    """The picked logits (r, K) by row dots, 0 where there is no pick. For folds that leave the picks out, which compare nothing to them."""
    stream, rows = maker.stream, maker.rows
    assert maker.picks is not None
    picks = rows.take(maker.picks, span)
    out = maker.pool.get("empty", 0, 0).new_zeros(picks.shape)
    k = picks.shape[1]
    if picks.numel() == 0 or maker.c == 0:
        return out
    widest = max([w.shape[1] for _, w in stream.pairs], default=1)
    block = max((1 << 20) // (k * widest), 1)  # rows of w gathered at once: 4 MiB
    for part in spans(span.size, block):
        at = picks[part.start : part.stop]
        classes = at.clamp_min(0)
        here = Span(span.start + part.start, span.start + part.stop)
        z = out[part.start : part.stop]
        for x, w in stream.pairs:
            wide = w[classes.flatten()].to(maker.dtype).view(*classes.shape, -1)  # (r, K, D)
            z += (wide * rows.take(x, here).to(maker.dtype).unsqueeze(1)).sum(-1)  # in pairs: bmm adds one after the other
        if stream.class_scale is not None:
            z *= stream.class_scale[classes].to(maker.dtype)
        if stream.given is not None:
            z += rows.take(stream.given, here).gather(1, classes).to(maker.dtype)
        if stream.bias is not None and not stream.bias_last:
            z += stream.bias[classes].to(maker.dtype)
        z *= maker.alpha
        if maker.alpha_tensor is not None:
            z *= maker.alpha_tensor
        if stream.bias is not None and stream.bias_last:
            z += stream.bias[classes].to(maker.dtype)
        for m in stream.maps:
            z.copy_(m.forward(z.clone(), m.numbers, m.tensors))
        z.masked_fill_(at < 0, 0.0)
    return out

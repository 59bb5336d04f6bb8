"""The tiled engine: library GEMMs over tiles in a reused workspace, elementwise work in place, on any device torch has.

    reduce           for each slab of classes: for each block of rows: tile = x w^T; update every fold        1 pass
    reduce_backward  the same tiles again, with the folds known: G in the tile's place;
                     dw of a slab = G^T x, summed over its blocks of rows before the next slab begins;
                     dx += G w                                                                                3 passes
    slab_loss        (slabs.py) for sums over classes: G with each tile, a slab of classes after the other               3 passes in all
    stream_loss      for each chunk of rows: all its tiles, kept; row_loss and its derivatives on the chunk's
                     statistics; G in place of the tiles; dw += G^T x, dx = G w                               3 passes in all

What a tile costs besides its GEMM (a lone log-sum-exp): one maximum, one subtraction, one exponential, one sum, and in the
gradient one product (stream_loss: the forward's exponentials are scaled in place). They run on a tile just written,
so on a CPU they read the cache and not memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bigclass.core.engines.columns import Columns
from bigclass.core.engines.sink import OnSlab, Sink
from bigclass.core.engines.slabs import slab_loss
from bigclass.core.engines.tiles import Rows, Span, TileMaker, Upstream, Where, add_picks, logit_gradient, spans, update
from bigclass.core.engines.unscaled import Unscaled
from bigclass.core.folds import Fold, State
from bigclass.core.plan import Plan
from bigclass.core.stream import Stream

__all__ = ["reduce", "reduce_backward", "slab_loss", "stream_loss"]

_SPARE = 16  # elements between kept tiles: the first takes the picks that lie elsewhere, the rest keeps alignment


def _identities(folds: Sequence[Fold], maker: TileMaker, rows: int) -> list[State]:
    like = maker.pool.get("empty", 0, 0)
    return [f.identity(rows if f.axis == "rows" else maker.c, like) for f in folds]


def _read_picks(maker: TileMaker, s: Tensor, flat: Tensor, picked: Tensor) -> None:
    """picked += the tile's picks. Those elsewhere read the spare element, which is 0."""
    whole = torch.as_strided(s, (s.numel() + 1,), (1,))
    whole[-1] = 0.0
    picked.add_(whole[flat])


def reduce(
    stream: Stream, picks: Tensor | None, keep: Tensor | None, folds: Sequence[Fold], plan: Plan
) -> tuple[list[State], Tensor | None]:
    """The states of all folds, and the picked logits (N, K)."""
    n = stream.shape[0]
    rows = Rows(n, keep)
    maker = TileMaker(stream, picks, rows)
    states = _identities(folds, maker, rows.count)
    picked = None if picks is None else maker.pool.get("empty", 0, 0).new_zeros((rows.count, picks.shape[1]))
    for c in spans(maker.c, plan.class_block):
        ws = maker.slab(c)
        for r in spans(rows.count, plan.row_block):
            z = maker.pool.get("tile", r.size, c.size)
            s = maker.bend(maker.raw(maker.features(r), ws, r, c, z), keep_inputs=False)[-1]
            where = maker.positions(r, c)
            if where is not None and picked is not None:
                _read_picks(maker, s, where[0], picked[r.start : r.stop])
            for f, state in zip(folds, states, strict=True):
                span = r if f.axis == "rows" else c
                part = tuple([t[span.start : span.stop] for t in state])
                update(f, part, maker, s, r, c, None if where is None else where[0])
    full = []
    for f, state in zip(folds, states, strict=True):
        if f.axis == "rows" and rows.index is not None:
            empty = f.identity(n, maker.pool.get("empty", 0, 0))
            state = tuple([rows.scatter(t, fill) for t, fill in zip(state, empty, strict=True)])
        full.append(state)
    if picked is not None and picks is not None:
        picked = rows.scatter(picked, picked.new_zeros((n, picks.shape[1])))
    return full, picked


def reduce_backward(
    stream: Stream, picks: Tensor | None, keep: Tensor | None, folds: Sequence[Fold], plan: Plan,
    states: Sequence[State], grads: Sequence[Sequence[Tensor | None]], h: Tensor | None, needs: Sequence[bool],
    on_slab: OnSlab | None = None, keep_wide: bool = False, report: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the needed tensors, from the states and what reached them. The tiles are made again.

    on_slab: takes that of the only weight a slab at a time, which is then not among those returned. keep_wide: return them in fp32.
    report: (2,), takes what the filter kept and promised."""
    rows = Rows(stream.shape[0], keep)
    maker = TileMaker(stream, picks, rows)
    sink = Sink(maker, folds, needs, keep_wide=keep_wide, whole=False, on_slab=on_slab, plan=plan)
    if rows.count == 0:
        sink.no_rows()
        return sink.finish()
    everything = Span(0, rows.count)

    def compact(t: Tensor | None, f: Fold) -> Tensor | None:
        return t if t is None or f.axis == "columns" else rows.take(t, everything)

    def compact_state(t: Tensor, f: Fold) -> Tensor:
        # never masked: a masked row's tile still holds the bias, which only its own maximum keeps from overflowing
        return t if rows.index is None or f.axis == "columns" else t[rows.index]

    up = Upstream(
        [tuple([compact_state(t, f) for t in state]) for f, state in zip(folds, states, strict=True)],
        [[compact(t, f) for t in parts] for f, parts in zip(folds, grads, strict=True)],
        None if h is None else rows.take(h, everything),
    )
    sink.open_rows(everything)
    for c in spans(maker.c, plan.class_block):
        ws, sums = maker.slab(c), sink.open_slab(c)
        for r in spans(rows.count, plan.row_block):
            xs = maker.features(r)
            z = maker.raw(xs, ws, r, c, maker.pool.get("tile", r.size, c.size))
            values = maker.bend(z, keep_inputs=True)
            where = maker.positions(r, c)
            g = logit_gradient(maker, folds, up, values, r, c, where, sink.on_tensor(r, c))
            sink.add(g, values, xs, ws, sums, r, c, first_rows=r.start == 0, first_classes=c.start == 0, where=where)
        sink.close_slab(c, sums)
    sink.close_rows()
    if report is not None:
        report.copy_(sink.report())
    return sink.finish()


def stream_loss(
    stream: Stream, picks: Tensor | None, keep: Tensor | None, folds: Sequence[Fold],
    row_loss: Callable[..., tuple[Tensor, list[list[Tensor | None]], Tensor | None, list[Tensor]]],
    args: Sequence[Tensor], plan: Plan, needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """sum_i row_loss_i and the gradients of the needed tensors (fp32 until the upstream factor is known).

    row_loss(states, picked, args, mask) -> (sum over the mask, its derivatives by the states, by the picks, by those args that need them).
    """
    rows = Rows(stream.shape[0], keep)
    maker = TileMaker(stream, picks, rows)
    tensors = len(stream.tensors) + sum(len(f.tensors) for f in folds)
    sink = Sink(maker, folds, needs[:tensors], keep_wide=True, whole=True, plan=plan)
    like = maker.pool.get("empty", 0, 0)
    loss: Tensor | None = None
    dargs = [a.new_zeros(a.shape, dtype=maker.dtype) if need else None for a, need in zip(args, needs[tensors:], strict=True)]
    slabs = spans(maker.c, plan.class_block)
    # A lone log-sum-exp over unbent logits leaves its exponentials where the logits were.
    in_place = len(folds) == 1 and folds[0].overwrites and folds[0].axis == "rows" and not stream.maps and not sink.wants_tensors
    in_place = in_place and not maker.keeps_z
    # What is squared on the way must not hold the picks.
    in_place = in_place and (sink.filter is None or picks is None or folds[0].exclude_picks)
    for r in spans(rows.count, plan.chunk):
        xs = maker.features(r)
        kept = maker.pool.get("kept", 1, r.size * maker.c + _SPARE * len(slabs)).view(-1)
        tiles, places, locals_ = [], [], []
        states = _identities(folds, maker, r.size)
        picked = None if picks is None else like.new_zeros((r.size, picks.shape[1]))
        for t, c in enumerate(slabs):
            start = r.size * c.start + _SPARE * t
            z = kept[start : start + r.size * c.size].view(r.size, c.size)
            tiles.append(z)
            maker.raw(xs, maker.slab(c), r, c, z)
            s = kept_values(maker, z)[-1]
            where = maker.positions(r, c)
            places.append(where)
            flat = None if where is None else where[0]
            if flat is not None and picked is not None:
                _read_picks(maker, s, flat, picked)
            if in_place:
                local = folds[0].lift_in_place(maker.tile(folds[0], s, r, c, flat, None))
                locals_.append(local)
                states[0] = folds[0].merge(states[0], local)
                continue
            for f, state in zip(folds, states, strict=True):
                update(f, state, maker, s, r, c, flat)
        total, grads, h, for_args = row_loss(states, picked, [rows.take(a, r) for a in args], rows.mask(r))
        loss = total if loss is None else loss + total
        for out, part in zip([d for d in dargs if d is not None], for_args, strict=True):
            rows.put(out, r, part)
        up = Upstream(states, grads, h, start=r.start)
        sink.open_rows(r)
        if sink.filter is not None:
            _add_filtered(sink, folds, up, tiles, places, locals_, slabs, xs, r)
            continue
        for t, c in enumerate(slabs):
            if in_place:
                values, g = [tiles[t]], tiles[t]
                factor = _factor(folds[0], locals_[t], up, r, c)
                g.zero_() if factor is None else g.mul_(factor)
                add_picks(g, places[t], r, up)
            else:
                values = kept_values(maker, tiles[t], again=True)
                g = logit_gradient(maker, folds, up, values, r, c, places[t], sink.on_tensor(r, c))
            sink.add(g, values, xs, maker.slab(c), sink.open_slab(c), r, c, first_rows=r.start == 0, first_classes=c.start == 0)
        sink.close_rows()
    if sink.tails is not None:
        sink.tails.flush(slabs)
    if rows.count == 0:
        sink.no_rows()
    else:
        for c in slabs:
            sink.close_slab(c, sink.open_slab(c))
    loss = like.new_zeros(()) if loss is None else loss.to(maker.dtype)
    return loss, sink.finish() + [d for d in dargs if d is not None]


def _factor(f: Fold, local: State, up: Upstream, r: Span, c: Span) -> Tensor | None:
    """(r, 1): what turns the tile that a lone fold left into its gradient; None: it has none."""
    state, upstream = up.of(0, f, r, c)
    return None if upstream[-1] is None else f.factor_in_place(local, state, upstream)


def _add_filtered(
    sink: Sink, folds: Sequence[Fold], up: Upstream, tiles: list[Tensor], places: list[Where], locals_: list[State], slabs: list[Span],
    xs: list[Tensor], r: Span,
) -> None:  # fmt: skip
    """The gradient of a chunk of rows whose tiles are kept: its columns are measured, chosen among all classes, and multiplied.

    locals_: what a lone fold left of each tile in its place; empty: tiles are logits."""
    maker, chooser = sink.maker, sink.filter
    assert chooser is not None
    # the gradients of a bias and of stored logits are read off the whole of dL/dz
    only_products = sink.db is None and maker.stream.given is None
    whole = Columns.empty(tiles[0], r, maker.c, picked=places[0] is not None, scaled=maker.keeps_z)
    unscaled: list[Unscaled | None] = [None] * len(slabs)
    for t, c in enumerate(slabs):
        columns = whole.cut(c)
        factor = _factor(folds[0], locals_[t], up, r, c) if locals_ else None
        if factor is not None and only_products:
            f = factor.squeeze(1)
            h = None if up.h is None else up.h[r.start - up.start : r.stop - up.start]
            unscaled[t] = Unscaled(f, f * locals_[t][-1].squeeze(1), places[t], h)
            columns.add_squares(tiles[t], f.square(), maker.pool)
            columns.force(places[t])
            continue
        if locals_:
            values, g = [tiles[t]], tiles[t].zero_() if factor is None else tiles[t].mul_(factor)
            add_picks(g, places[t], r, up)
        else:
            values = kept_values(maker, tiles[t], again=True)
            g = logit_gradient(maker, folds, up, values, r, c, places[t], sink.on_tensor(r, c))
        g = sink.settled(g, values, r, c)
        sink.measure(columns, g, values[0], r, c, places[t])
        tiles[t] = g if g is tiles[t] else tiles[t].copy_(g)
    keep = chooser.choose(whole.norms, whole.forced, whole.blocks)
    tails = [
        sink.add_kept(
            tiles[t], keep[:, c.start : c.stop], whole.cut(c), xs, maker.slab(c), sink.open_slab(c), r, c,
            first_rows=r.start == 0, first_classes=c.start == 0, unscaled=unscaled[t],
        )
        for t, c in enumerate(slabs)
    ]  # fmt: skip
    sink.close_rows()
    sink.keep_tails(whole, tails, slabs, xs, r)


def kept_values(maker: TileMaker, z: Tensor, again: bool = False) -> list[Tensor]:
    """The values along the maps for a kept tile: where maps act in place, the second reading must not act again."""
    if maker.in_place and not maker.keeps_z:
        return [z] * (1 + len(maker.stream.maps)) if again else maker.bend(z, keep_inputs=False)
    return maker.bend(z, keep_inputs=True)

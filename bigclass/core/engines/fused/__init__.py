"""The fused engine: Triton kernels that fold logits in registers (kernels.py), on the recipe's own functions (compose.py).

    reduce           one kernel over bands of rows and splits of classes, one small kernel that merges the splits        1 pass
    reduce_backward  for each slab of classes: one kernel writes G (N x slab) in the operands' type; dw of the slab = G^T x and
                     dx += G w are library products                                                                      3 passes
                     (what the forward saved of its logits in 16 bits is not made again but turned into G in place, saved.py: 2 passes)
    stream_loss      for each chunk of rows: logits by library products, kept in fp32; the fold kernel reads them; row_loss on the
                     chunk's statistics; the gradient kernel turns a slab of them into G; dw += G^T x, dx += G w         3 passes
                     (where 16 bits will do: the fold kernel makes them and saves them)
    slab_loss        for each slab of classes: logits by library products, in fp32; one kernel reads them, folds their sums and writes
                     their G, for nothing waits for whole rows; then as reduce_backward                                  3 passes

Memory: reduce: 4 bytes x states x N x splits. reduce_backward: a slab of G, and dx in fp32 (N x D) for half types. stream_loss: a chunk of
logits, a slab of G and, for half types, dw in fp32. One program writes each G and each sum is made in one order: same bits every run.
Where the stream has a filter the two products of G are of the columns that it keeps (filtered.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigclass.core.engines.filter import ColumnFilter
from bigclass.core.engines.fused import compose, filtered, launch
from bigclass.core.engines.fused.problem import Picks, Problem, flat, merged, picks_shape, rowwise
from bigclass.core.engines.fused.saved import ALIGNED, Saved, empty
from bigclass.core.engines.sink import OnSlab, Sink
from bigclass.core.engines.tiles import Rows, Span, TileMaker, product, spans
from bigclass.core.folds import Fold, State
from bigclass.core.plan import Plan
from bigclass.core.stream import Stream


def reduce(
    stream: Stream, picks: Tensor | None, keep: Tensor | None, folds: Sequence[Fold], plan: Plan, saved: Sequence[Tensor] = ()
) -> tuple[list[State], Tensor | None]:
    """The states of all folds, and the picked logits (N, K). saved: of `room_for`, takes the logits of the plan's first classes."""
    n = stream.shape[0]
    source = _Source(stream, picks, folds, keep)
    picked = None if source.picks is None else stream.tensors[0].new_zeros(picks_shape(source.picks), dtype=torch.float32)
    states = source.fold(Span(0, n), picked, plan, source.saved(saved, plan.saved))
    shaped = [tuple([t.unsqueeze(-1) for t in state]) for state in states]
    return shaped, None if picked is None or source.picks is None else source.picks.back(picked)


def room_for(stream: Stream, classes: int) -> list[Tensor]:
    """Room for what the forward saves of so many classes (saved.py)."""
    return empty(stream.tensors[0], stream.shape[0], classes, launch.saved_width(stream.device))


def reduce_backward(
    stream: Stream, picks: Tensor | None, keep: Tensor | None, folds: Sequence[Fold], plan: Plan,
    states: Sequence[State], grads: Sequence[Sequence[Tensor | None]], h: Tensor | None, needs: Sequence[bool],
    on_slab: OnSlab | None = None, keep_wide: bool = False, report: Tensor | None = None, saved: Sequence[Tensor] = (),
    in_place: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the needed tensors, from the states and what reached them, a slab of classes at a time. Tiles are made again, or read
    from what the forward saved.

    on_slab, keep_wide: of the sink (sink.py). report: (2,), takes what the filter kept and promised. saved: what `reduce` was given;
    in_place: may it be used up?"""
    source = _Source(stream, picks, folds, keep)
    maker, n = source.maker, stream.shape[0]
    chooser = source.make_filter(needs)
    sink = Sink(maker, folds, needs, keep_wide=keep_wide, whole=False, on_slab=on_slab, direct=chooser is None)
    sink.filter = chooser
    everything = Span(0, n)
    if n == 0:
        sink.no_rows()
        return sink.finish()
    up = _Up.of(source, folds, states, grads, h, everything)
    sink.open_rows(everything)
    operands = source.features(everything)
    xs = source.of_products(operands)
    codes = source.saved(saved, plan.saved)
    count = 0 if codes is None else codes.classes
    for c in [*spans(count, plan.saved_block if in_place else plan.class_block), *spans(maker.c, plan.class_block, count)]:
        sums = sink.open_slab(c)
        ws = source.weights(c)
        pairs = list(zip(operands, ws, strict=True))
        part = codes.cut(c) if codes is not None and c.start < count else None
        source.add_gradient(
            sink, everything, c, pairs, up, None, xs, source.of_products(ws), sums, first_rows=True, saved=part, in_place=in_place
        )
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
    """sum_i row_loss_i and the gradients of the needed tensors (fp32 until the upstream factor is known). As the tiled engine's."""
    source = _Source(stream, picks, folds, keep)
    maker, n = source.maker, stream.shape[0]
    tensors = len(stream.tensors) + sum(len(f.tensors) for f in folds)
    sink = Sink(maker, folds, needs[:tensors], keep_wide=True, whole=True)
    sink.filter = source.make_filter(needs)
    like = maker.pool.get("empty", 0, 0)
    loss = like.new_zeros(())
    dargs = [a.new_zeros(a.shape, dtype=maker.dtype) if need else None for a, need in zip(args, needs[tensors:], strict=True)]
    slabs = source.saved_slabs(plan) if plan.saved else spans(maker.c, plan.class_block)
    room = empty(like, min(plan.chunk, n), plan.saved, source.width) if plan.saved and n else []
    for r in spans(n, plan.chunk):
        chosen = source.picks
        picked = None if chosen is None else like.new_zeros((r.size, picks_shape(chosen)[1]))
        mask = maker.rows.mask(r)
        found, add = _saved_chunk(source, r, picked, room, plan) if room else _stored_chunk(source, r, picked, slabs)
        states = [tuple([t.unsqueeze(-1) if mask is None else torch.where(mask, t, 0.0).unsqueeze(-1) for t in state]) for state in found]
        back = None if picked is None or chosen is None else chosen.rows(r).back(picked)
        total, grads, h, for_args = row_loss(states, back, [maker.rows.take(a, r) for a in args], mask)
        loss = loss + total
        for out, part in zip([d for d in dargs if d is not None], for_args, strict=True):
            maker.rows.put(out, r, part)
        up = _Up.of(source, folds, states, grads, h, r)
        sink.open_rows(r)
        for c in slabs:
            add(sink, c, up)
        sink.close_rows()
    if n == 0:
        sink.no_rows()
    else:
        for c in slabs:
            sink.close_slab(c, sink.open_slab(c))
    return loss.to(maker.dtype), sink.finish() + [d for d in dargs if d is not None]


_Add = Callable[[Sink, Span, "_Up"], None]  # adds up the gradient of a slab of classes, of a chunk's rows


def _stored_chunk(source: _Source, r: Span, picked: Tensor | None, slabs: Sequence[Span]) -> tuple[list[State], _Add]:
    """The folds of rows r from logits that the library makes, in fp32, and what makes their gradient of the same."""
    maker = source.maker
    xs, stored = maker.features(r), maker.pool.get("kept", r.size, maker.c)
    for c in slabs:
        for p, (x, w) in enumerate(zip(xs, maker.slab(c), strict=True)):
            product(x, w.t(), stored[:, c.start : c.stop], beta=float(p > 0))

    def add(sink: Sink, c: Span, up: _Up) -> None:
        part, sums = stored[:, c.start : c.stop], sink.open_slab(c)
        source.add_gradient(sink, r, c, [], up, part, xs, maker.slab(c), sums, first_rows=r.start == 0)

    return source.problem(r, Span(0, maker.c), (), stored).fold(picked), add


def _saved_chunk(source: _Source, r: Span, picked: Tensor | None, room: list[Tensor], plan: Plan) -> tuple[list[State], _Add]:
    """The same from logits in registers, which are saved in 16 bits."""
    xs, saved = source.features(r), Saved.of(room, source.c, source.width).rows(r.size)
    operands = source.of_products(xs)

    def add(sink: Sink, c: Span, up: _Up) -> None:
        ws, sums = source.weights(c), sink.open_slab(c)
        source.add_gradient(
            sink, r, c, list(zip(xs, ws, strict=True)), up, None, operands, source.of_products(ws), sums, first_rows=r.start == 0,
            saved=saved.cut(c), in_place=True,
        )  # fmt: skip

    return source.fold(r, picked, plan, saved), add


def slab_loss(
    stream: Stream, picks: Tensor | None, keep: Tensor | None, folds: Sequence[Fold], observed: Sequence[Fold],
    row_loss: Callable[..., tuple[Tensor, list[list[Tensor | None]], Tensor | None, list[Tensor]]],
    args: Sequence[Tensor], plan: Plan, needs: Sequence[bool], on_slab: OnSlab | None = None,
) -> tuple[Tensor, list[State], list[Tensor]]:  # fmt: skip
    """The sum of the row losses, the states of the observed folds, and the gradients. As the tiled engine's (slabs.py)."""
    source = _Source(stream, picks, (*folds, *observed), keep)
    maker, n = source.maker, stream.shape[0]
    tensors = len(stream.tensors) + sum(len(f.tensors) for f in folds)
    sink = Sink(maker, folds, needs[:tensors], keep_wide=on_slab is None, whole=False, on_slab=on_slab)
    sink.filter = source.make_filter(needs)
    like = maker.pool.get("empty", 0, 0)
    everything = Span(0, n)
    states = [f.identity(n, like) for f in (*folds, *observed)]
    own, mask, chosen, picked = list(args), maker.rows.mask(everything), source.picks, None
    if n and chosen is not None:
        picked = chosen.back(source.read_picks(everything, plan))
    elif picks is not None:
        picked = like.new_zeros(picks.shape)
    _, grads, h, _ = row_loss(states[: len(folds)], picked, own, mask)
    up = _Up.of(source, (*folds, *observed), states, [*grads, *[[None] * len(f.differentiable) for f in observed]], h, everything)
    sink.open_rows(everything)
    xs = maker.features(everything)
    for c in spans(maker.c, plan.class_block) if n else []:
        ws, sums = maker.slab(c), sink.open_slab(c)
        stored = maker.pool.get("kept", n, c.size)
        for p, (x, w) in enumerate(zip(xs, ws, strict=True)):
            product(x, w.t(), stored, beta=float(p > 0))
        found: list[State] = []
        source.add_gradient(sink, everything, c, [], up, stored, xs, ws, sums, first_rows=True, found=found)
        for f, state, new in zip((*folds, *observed), states, found, strict=True):
            for old, part in zip(state, f.merge(state, tuple([t.unsqueeze(-1) for t in new])), strict=True):
                old.copy_(part)
        sink.close_slab(c, sums)
    if n == 0:
        sink.no_rows()
    else:
        sink.close_rows()
    if mask is not None:
        states = [tuple([torch.where(mask.unsqueeze(-1), t, 0.0) for t in state]) for state in states]
    loss = row_loss(states[: len(folds)], picked, own, mask)[0]
    return loss.to(maker.dtype), states[len(folds) :], sink.finish()


@dataclass(frozen=True)
class _Up:
    """What reached the op's outputs at some rows, as flat vectors. h: (r, K) in the picks' order. keep: (r,) uint8 or None."""

    states: list[State]
    grads: list[list[Tensor | None]]
    h: Tensor | None
    keep: Tensor | None

    @classmethod
    def of(cls, source: _Source, folds: Sequence[Fold], states: Sequence[State], grads: Any, h: Tensor | None, r: Span) -> _Up:
        mask = source.maker.rows.mask(r)
        flat = [tuple([t.reshape(-1) for t in state]) for state in states]
        if h is not None and source.picks is not None:
            h = source.picks.rows(r).there(h if mask is None else torch.where(mask.unsqueeze(-1), h, 0.0))
        return cls(
            flat,
            [[None if t is None else t.reshape(-1) for t in parts] for parts in grads],
            h,
            None if mask is None else mask.to(torch.uint8),
        )


class _Source:
    """A stream whose operands are cut and cast as launches need them."""

    def __init__(self, stream: Stream, picks: Tensor | None, folds: Sequence[Fold], keep: Tensor | None) -> None:
        n, self.c = stream.shape
        # The kernels read classes side by side. An N x C tensor in which they are not (transposed) is copied whole: plan.py counts it.
        self.stream = replace(stream, bias=flat(stream.bias), class_scale=flat(stream.class_scale), given=flat(stream.given))
        self.folds = tuple([replace(f, tensors=tuple([rowwise(t) for t in f.tensors])) for f in folds])
        self.maker = TileMaker(stream, None, Rows(n, keep, compact=False))
        if picks is not None and keep is not None:  # an ignored row has no picks: what its logits hold must reach nothing
            picks = torch.where(keep.unsqueeze(-1), picks, -1)
        self.picks = Picks.of(picks)
        self.dtypes = [stream.compute_dtype or torch.promote_types(x.dtype, w.dtype) for x, w in stream.pairs]
        self.dtype = self.dtypes[0] if self.dtypes else torch.float32  # of all products, and so of G
        self.whole = Problem(self.stream, self.folds, (), n, self.c, None if self.picks is None else self.picks.sorted)

    def features(self, r: Span) -> list[Tensor]:
        """x of each pair, as the kernels' operands."""
        return [rowwise(self.maker.rows.take(x, r).to(dtype)) for (x, _), dtype in zip(self.stream.pairs, self.dtypes, strict=True)]

    def weights(self, c: Span) -> list[Tensor]:
        """w of each pair, as the kernels' operands."""
        return [rowwise(w[c.start : c.stop].to(dtype)) for (_, w), dtype in zip(self.stream.pairs, self.dtypes, strict=True)]

    def of_products(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The kernels' operands as those of the library's products: the same tensors, but wider where it has no products into fp32."""
        return [t.to(dtype) for t, dtype in zip(operands, self.maker.operand_dtypes, strict=True)]

    def _slabs(self, plan: Plan, saved: int = 0) -> list[Span]:
        """All classes at once, or, where w must be cast or laid out anew, a slab at a time; those that are saved apart from the others."""
        cast = any(w.dtype != dtype or w.stride(1) != 1 for (_, w), dtype in zip(self.stream.pairs, self.dtypes, strict=True))
        most = plan.class_block if cast else self.c
        return [*spans(saved, most), *spans(self.c, most, saved)]

    def read_picks(self, r: Span, plan: Plan) -> Tensor:
        """The picked logits (r, K), in the picks' order, by row dots."""
        out = self.maker.pool.get("empty", 0, 0).new_zeros((r.size, picks_shape(self.picks)[1])) if self.picks else None
        made = compose.composition(self.stream.maps, [])
        xs = self.features(r)
        for c in self._slabs(plan):
            self.problem(r, c, list(zip(xs, self.weights(c), strict=True)), None).read_picks(made, out)
        assert out is not None
        return out

    def problem(
        self, r: Span, c: Span, pairs: Sequence[tuple[Tensor, Tensor]], stored: Tensor | None, saved: Saved | None = None
    ) -> Problem:
        """Rows r and classes c of it. stored: their products (r, c), if they are made already; saved: their logits, or room for them."""
        return self.whole.cut(r, c, tuple(pairs), stored, saved)

    def fold(self, r: Span, picked: Tensor | None, plan: Plan, saved: Saved | None = None) -> list[State]:
        """The folds over all classes. saved: takes the logits of the first of them."""
        if r.size == 0:
            like = self.maker.pool.get("empty", 0, 0)
            return [tuple([t.view(-1) for t in f.identity(0 if f.axis == "rows" else self.c, like)]) for f in self.folds]
        xs, count = self.features(r), 0 if saved is None else saved.classes
        found = [
            self.problem(r, c, list(zip(xs, self.weights(c), strict=True)), None, saved.cut(c) if saved and c.start < count else None)
            .fold(picked)
            for c in self._slabs(plan, count)
        ]  # fmt: skip
        if len(found) == 1:
            return found[0]
        made = compose.composition(self.stream.maps, [compose.part_of(f) for f in self.folds])
        of_rows = [[t for f, state in zip(self.folds, one, strict=True) if f.axis == "rows" for t in state] for one in found]
        rows = [torch.stack(parts) for parts in zip(*of_rows, strict=True)]
        taken = iter(merged(rows, made.load_rows, made.merge_rows, made.store))
        return [
            tuple([next(taken) for _ in f.differentiable])
            if f.axis == "rows"
            else tuple([torch.cat(parts) for parts in zip(*[one[i] for one in found], strict=True)])
            for i, f in enumerate(self.folds)
        ]

    @property
    def width(self) -> int:
        """Classes of a tile that is saved."""
        return launch.saved_width(self.stream.device)

    def saved(self, tensors: Sequence[Tensor], classes: int) -> Saved | None:
        """What the forward saves, or has saved, of the first so many classes."""
        return Saved.of(tensors, classes, self.width) if tensors else None

    def saved_slabs(self, plan: Plan) -> list[Span]:
        """In what slabs saved logits of all classes are folded, and multiplied in place: as few as weights to cast and a filter allow."""
        return spans(self.c, plan.class_block) if self.stream.grad_filter else self._slabs(plan)

    def gradient(
        self, r: Span, c: Span, pairs: Sequence[tuple[Tensor, Tensor]], up: _Up, stored: Tensor | None, sink: Sink, saved: Saved | None,
        in_place: bool, found: list[State] | None,
    ) -> tuple[Tensor, filtered.Kept | None]:  # fmt: skip
        """G of rows r and classes c, in the type of the products and boosted. Which columns the sink's filter keeps, if it has one."""
        if saved is not None and in_place:
            out = saved.codes.view(self.dtype)
        else:
            out = self._slab(r.size, c.size, self.dtype, 8 if saved is None else ALIGNED)
        states = [s if f.axis == "rows" else tuple([t[c.start : c.stop] for t in s]) for f, s in zip(self.folds, up.states, strict=True)]
        grads = [
            parts if f.axis == "rows" else [None if t is None else t[c.start : c.stop] for t in parts]
            for f, parts in zip(self.folds, up.grads, strict=True)
        ]
        problem = self.problem(r, c, pairs, stored, saved)
        base = problem.gradient(states, grads, up.keep, out, sink.boost, found)
        kept = None if sink.filter is None else filtered.choose(problem, out, r.start, sink.filter, self.maker.pool)
        problem.add_picks(up.h, base, out, sink.boost)
        return out, kept

    def add_gradient(
        self, sink: Sink, r: Span, c: Span, pairs: Sequence[tuple[Tensor, Tensor]], up: _Up, stored: Tensor | None,
        xs: list[Tensor], ws: list[Tensor], sums: list[Tensor | None], *, first_rows: bool, saved: Saved | None = None,
        in_place: bool = False, found: list[State] | None = None,
    ) -> None:  # fmt: skip
        """Make G of rows r and classes c and add it up. xs, ws: operands of the products. sums: of dw; first_rows: are they still empty?

        saved: the logits, if the forward saved them; in_place: may G take their place? found: takes the states of these classes
        (`Problem.gradient`)."""
        first_classes = c.start == 0
        g, kept = self.gradient(r, c, pairs, up, stored, sink, saved, in_place, found)
        if kept is None:
            sink.add(g, None, xs, ws, sums, r, c, first_rows=first_rows, first_classes=first_classes)
            return
        sink.settled(g, None, r, c)
        dxs = sink.open_products(sums, r, first_rows, first_classes)
        xs, ws = ([rowwise(t.to(self.dtype)) for t in ts] for ts in (xs, ws))
        filtered.multiply(g, kept, xs, ws, dxs, sums, 1.0 / sink.boost, self.maker.alpha / sink.boost, self.maker.pool)

    def make_filter(self, needs: Sequence[bool]) -> ColumnFilter | None:
        """The filter of one gradient; None: it is exact. needs: flags of the stream's tensors."""
        return filtered.make_filter(self.stream, self.maker, needs, self.dtype)

    def _slab(self, rows: int, cols: int, dtype: torch.dtype, aligned: int) -> Tensor:
        """The work buffer of G: rows of whole 16 bytes at least, for descriptors and vector loads."""
        stride = -(-cols // aligned) * aligned
        words = self.maker.pool.get("slab", rows, stride * dtype.itemsize // self.maker.dtype.itemsize)
        return words.view(dtype)[:, :cols]

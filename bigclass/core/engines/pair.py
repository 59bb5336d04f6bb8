"""Two streams over the same classes, compared row by row: the tiled engine's walks for a `Divergence` (core/divergences.py).

    compare            for each chunk of rows: all tiles of both streams, kept; their maxima and sums; then p, q and r of each tile and the
                       divergence's sums; then, if gradients are wanted, G in a work buffer; dw += G^T x, dx = G w
    compare_backward   the sums are known, so classes are the outer loop, as in tiled.reduce_backward: both tiles again, G, dw of a slab, dx

A row's statistics (N, 4 + width): m and rest of the teacher (the largest logit, and the sum of the others' e^(t - m)), of the student, the
divergence's sums; and `top` (N,), the student's largest class. Only the student has gradients. Both walks make tiles of the same shapes:
products of other shapes round otherwise, and a largest logit that is not its own m would cost a confident row its digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigclass.core.divergences import Divergence, PairTile
from bigclass.core.engines.sink import Sink
from bigclass.core.engines.tiled import kept_values
from bigclass.core.engines.tiles import Rows, Span, TileMaker, spans
from bigclass.core.folds import exp_
from bigclass.core.plan import Plan
from bigclass.core.stream import Stream


class _Pair:
    """Both streams' tile makers, over the same rows, in the student's type."""

    def __init__(self, student: Stream, teacher: Stream, keep: Tensor | None, divergence: Divergence) -> None:
        self.rows = Rows(student.shape[0], keep)
        self.student = TileMaker(student, None, self.rows)
        self.teacher = TileMaker(teacher, None, self.rows, self.student.dtype)
        self.divergence = divergence

    def buffer(self, name: str, rows: int, cols: int) -> Tensor:
        return self.student.pool.get(name, rows, cols)

    def teacher_tile(self, us: list[Tensor], r: Span, c: Span, out: Tensor) -> Tensor:
        """t (r, c), in `out`."""
        return self.teacher.bend(self.teacher.raw(us, self.teacher.slab(c), r, c, out), keep_inputs=False)[-1]

    def tiles(self, ws: list[Tensor], r: Span, c: Span) -> tuple[Tensor, list[Tensor]]:
        """(t (r, c), what the student's logits go through), in work buffers."""
        t = self.teacher_tile(self.teacher.features(r), r, c, self.buffer("t", r.size, c.size))
        s = self.student.raw(self.student.features(r), ws, r, c, self.buffer("tile", r.size, c.size))
        return t, self.student.bend(s, keep_inputs=True)

    def compared(self, t: Tensor, s: Tensor, stats: Tensor, top: Tensor, c: Span) -> PairTile:
        """p, q, r and b of a tile, in work buffers, and where the student's largest logits lie."""
        m_t, rest_t, m_s, rest_s = (stats[:, i : i + 1] for i in range(4))
        lowest = torch.finfo(s.dtype).min  # a reference point where every logit is -inf
        p, q, r, b = (self.buffer(name, *s.shape) for name in ("p", "q", "r", "b"))
        torch.sub(t, m_t.clamp_min(lowest), out=r)
        torch.sub(s, m_s.clamp_min(lowest), out=b)
        exp_(p.copy_(r)).div_(1.0 + rest_t)
        exp_(q.copy_(b)).div_(1.0 + rest_s)
        more = rest_s - rest_t  # log(l_s / l_t) over the lesser of the two: over the greater, 1 + x would cancel
        r.sub_(b).add_(torch.log1p(more.abs() / (1.0 + torch.minimum(rest_s, rest_t))).copysign(more))
        at = top.unsqueeze(1) - c.start
        inside = (at >= 0) & (at < c.size)
        return PairTile(p, q, r, b, torch.where(inside, at, 0), inside, lambda name: self.buffer(name, *s.shape))

    def gradient(self, tile: PairTile, stats: Tensor, g: Tensor, mask: Tensor | None) -> Tensor:
        """g_i dD_i/ds_ij. NaN for the whole row where D is infinite or NaN and its gradient is made of it."""
        sums = stats[:, 4:]
        out = self.divergence.gradient(tile, sums, stats[:, 3])
        g = g + _nothing(stats)
        if self.divergence.waits:  # where one of p and q is 0, r is infinite, and 0 times that is NaN
            out.nan_to_num_(0.0, 0.0, 0.0)
            g = g + 0.0 * sums.sum(1)
        out.mul_(g.unsqueeze(-1))
        return out if mask is None else out.masked_fill_(~mask.unsqueeze(-1), 0.0)

    def values(self, stats: Tensor) -> Tensor:
        """D (r,)."""
        return self.divergence.value(stats[:, 4:], stats[:, 3]) + _nothing(stats)


def _nothing(stats: Tensor) -> Tensor:
    """0 (r,), or NaN for a row of which a logit is NaN or +inf, or every logit -inf: sums leave a NaN out, and must not hide it."""
    return (0.0 * stats[:, :4]).sum(1)


class Largest:
    """A row's largest logit m, where it is, and the sum of the others' e^(s - m), over the tiles seen so far.

    The largest stays out of the sum: for a confident row the others are less than what 1 + rest can hold.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self.m, self.rest = like.new_full((rows, 1), -torch.inf), like.new_zeros((rows, 1))
        self.top = torch.zeros((rows, 1), dtype=torch.int64, device=like.device)

    def add(self, s: Tensor, start: int, scratch: Tensor) -> None:
        """One tile, of the classes from `start` on."""
        m, top = s.max(1, keepdim=True)
        others = exp_(torch.sub(s, m.clamp_min(torch.finfo(s.dtype).min), out=scratch)).scatter_(1, top, 0.0).sum(1, keepdim=True)
        self.merge(m, others, top + start)

    def merge(self, m: Tensor, others: Tensor, top: Tensor) -> None:
        """Other classes: their largest, the sum of the rest's exponentials, which it is."""
        leads = self.m >= m
        high, low = torch.where(leads, self.m, m), torch.where(leads, m, self.m)
        shrink = torch.exp(low - high.clamp_min(torch.finfo(m.dtype).min))
        mass = torch.where(leads, others, self.rest) + 1.0  # of the lower one, its largest included: shrink is 0 where it has none
        self.rest = torch.where(leads, self.rest, others) + shrink * mass
        self.top = torch.where(leads, self.top, top)
        self.m = high


def compare(
    student: Stream, teacher: Stream, keep: Tensor | None, divergence: Divergence, plan: Plan, g: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(D (N,), 0 where left out; the rows' statistics and `top`; gradients of sum_i g_i D_i, in fp32 until the upstream factor is known).

    g: (N,); None: no gradients are wanted."""
    pair = _Pair(student, teacher, keep, divergence)
    maker, rows = pair.student, pair.rows
    like = maker.pool.get("empty", 0, 0)
    sink = None if g is None else Sink(maker, (), needs, keep_wide=True, whole=True)
    slabs = spans(maker.c, plan.class_block)
    stats = like.new_zeros((rows.total, 4 + divergence.width))
    values, tops = like.new_zeros(rows.total), torch.zeros(rows.total, dtype=torch.int64, device=like.device)
    for r in spans(rows.count, plan.chunk):
        xs, us = maker.features(r), pair.teacher.features(r)
        kept = [pair.buffer(name, r.size, maker.c).view(-1) for name in ("kept s", "kept t")]
        tiles, largest = [], (Largest(r.size, like), Largest(r.size, like))
        for c in slabs:
            z, t = (k[r.size * c.start : r.size * c.stop].view(r.size, c.size) for k in kept)
            tiles.append((z, t))
            s = kept_values(maker, maker.raw(xs, maker.slab(c), r, c, z))[-1]
            t = pair.teacher_tile(us, r, c, t)
            for found, logits in zip(largest, (t, s), strict=True):
                found.add(logits, c.start, pair.buffer("p", r.size, c.size))
        chunk = torch.cat([part for found in largest for part in (found.m, found.rest)], 1)
        chunk = torch.cat([chunk, chunk.new_zeros((r.size, divergence.width))], 1)
        top = largest[1].top.squeeze(1)
        mask = rows.mask(r)
        here = None if g is None else rows.take(g, r).to(maker.dtype)

        def add(tile: PairTile, along: list[Tensor], c: Span, r=r, xs=xs, chunk=chunk, mask=mask, here=here) -> None:
            if sink is not None and here is not None:
                out, sums = pair.gradient(tile, chunk, here, mask), sink.open_slab(c)
                sink.add(out, along, xs, maker.slab(c), sums, r, c, first_rows=r.start == 0, first_classes=c.start == 0)

        if sink is not None:
            sink.open_rows(r)
        for c, (z, t) in zip(slabs, tiles, strict=True):
            along = kept_values(maker, z, again=True)
            tile = pair.compared(t, along[-1], chunk, top, c)
            for total, part in zip(chunk[:, 4:].unbind(1), divergence.sums(tile), strict=True):
                total.add_(part.squeeze(1))
            if not divergence.waits:
                add(tile, along, c)
        if sink is not None and divergence.waits:
            for c, (z, t) in zip(slabs, tiles, strict=True):
                along = kept_values(maker, z, again=True)
                add(pair.compared(t, along[-1], chunk, top, c), along, c)
        if sink is not None:
            sink.close_rows()
        rows.put(stats, r, chunk)
        rows.put(tops, r, top)
        found = pair.values(chunk)
        rows.put(values, r, found if mask is None else torch.where(mask, found, 0.0))
    return values, stats, tops, [] if sink is None else _finish(sink, rows, slabs)


def compare_backward(
    student: Stream, teacher: Stream, keep: Tensor | None, divergence: Divergence, plan: Plan, stats: Tensor, top: Tensor,
    g: Tensor, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of sum_i g_i D_i from the rows' statistics."""
    pair = _Pair(student, teacher, keep, divergence)
    maker, rows = pair.student, pair.rows
    sink = Sink(maker, (), needs, keep_wide=False, whole=False)
    everything = Span(0, rows.count)
    if rows.count == 0:
        sink.no_rows()
        return sink.finish()
    if rows.index is not None:
        stats, top, g = stats[rows.index], top[rows.index], g[rows.index]
    sink.open_rows(everything)
    for c in spans(maker.c, plan.class_block):
        ws, sums = maker.slab(c), sink.open_slab(c)
        for r in spans(rows.count, plan.chunk):
            xs = maker.features(r)
            t, along = pair.tiles(ws, r, c)
            at = slice(r.start, r.stop)
            tile = pair.compared(t, along[-1], stats[at], top[at], c)
            out = pair.gradient(tile, stats[at], g[at].to(maker.dtype), rows.mask(r))
            sink.add(out, along, xs, ws, sums, r, c, first_rows=r.start == 0, first_classes=c.start == 0)
        sink.close_slab(c, sums)
    sink.close_rows()
    return sink.finish()


def largest(student: Stream, teacher: Stream, keep: Tensor | None, divergence: Divergence, plan: Plan) -> tuple[Largest, Largest]:
    """(the teacher's, the student's) of each row (N, 1); what it says of rows that are left out means nothing.

    The tiles are those of `compare_backward` under the same plan."""
    pair = _Pair(student, teacher, keep, divergence)
    maker, rows = pair.student, pair.rows
    like = maker.pool.get("empty", 0, 0)
    whole = Largest(rows.total, like), Largest(rows.total, like)
    parts = [(r, (Largest(r.size, like), Largest(r.size, like))) for r in spans(rows.count, plan.chunk)]
    for c in spans(maker.c, plan.class_block):
        ws = maker.slab(c)
        for r, found in parts:
            t, s = pair.tiles(ws, r, c)
            for one, logits in zip(found, (t, s[-1]), strict=True):
                one.add(logits, c.start, pair.buffer("p", r.size, c.size))
    for r, found in parts:
        for one, of_chunk in zip(whole, found, strict=True):
            for name in ("m", "rest", "top"):
                rows.put(getattr(one, name), r, getattr(of_chunk, name))
    return whole


def sums(student: Stream, teacher: Stream, keep: Tensor | None, divergence: Divergence, plan: Plan, stats: Tensor, top: Tensor) -> Tensor:
    """These classes' part of the divergence's sums (N, width), from the rows' statistics (N, 4) of more classes than these, say, and the
    student's largest class (N,), counted from the first of these."""
    pair = _Pair(student, teacher, keep, divergence)
    maker, rows = pair.student, pair.rows
    made = maker.pool.get("empty", 0, 0).new_zeros((rows.total, divergence.width))
    for r in spans(rows.count, plan.chunk):
        chunk, at = rows.take(stats, r), rows.take(top, r)
        total = made.new_zeros((r.size, divergence.width))
        for c in spans(maker.c, plan.class_block):
            t, s = pair.tiles(maker.slab(c), r, c)
            tile = pair.compared(t, s[-1], chunk, at, c)
            for column, part in zip(total.unbind(1), divergence.sums(tile), strict=True):
                column.add_(part.squeeze(1))
        rows.put(made, r, total)
    return made


def values(divergence: Divergence, stats: Tensor, keep: Tensor | None) -> Tensor:
    """D (N,) from the statistics (N, 4 + width), 0 where left out."""
    found = divergence.value(stats[:, 4:], stats[:, 3]) + _nothing(stats)
    return found if keep is None else torch.where(keep, found, 0.0)


def _finish(sink: Sink, rows: Rows, slabs: list[Span]) -> list[Tensor]:
    if rows.count == 0:
        sink.no_rows()
    else:
        for c in slabs:
            sink.close_slab(c, sink.open_slab(c))
    return sink.finish()

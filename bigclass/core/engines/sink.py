"""Where the tiled engine's gradients add up.

From a tile's G = dL/dz (r, c), with y = sum_p x_p w_p^T, z = scale (class_scale y + given + bias):

    db_j    += scale sum_i G_ij                       d(given)_ij = scale G_ij
    dw_p    += scale class_scale (G^T x_p)            d(class_scale)_j = scale <w_j, (G^T x)_j>
    dx_p    += scale (G class_scale) w_p              d(scale) = <x, dx/scale> + <bias, db/scale> + <given, G>

A bias behind the scale (`Stream.bias_last`) has db_j = sum_i G_ij and no part in d(scale).
Where class_scale_j is r_j = 1/||w_j|| (`Stream.normalized`), dw_j has the part that goes through the norm too, with u = scale G^T x:

    dw_j    = r_j (u_j - r_j^2 <w_j, u_j> w_j)        made in place when the sum is complete

The scales are applied where they cost least: after a product's sum, never to N x C numbers (class_scale excepted, for dx).
Sums are in fp32 (fp64); a slab of dw is finished, and cast once, when its last row has been seen, a span of dx likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bigclass.core.engines.columns import Columns
from bigclass.core.engines.filter import ColumnFilter, exact_report
from bigclass.core.engines.pages import fresh
from bigclass.core.engines.tail import Tail, Tails
from bigclass.core.engines.tiles import Span, TileMaker, Where, product, spans
from bigclass.core.engines.unscaled import Unscaled
from bigclass.core.folds import Fold, State, Tile
from bigclass.core.norms import through_norms
from bigclass.core.plan import Plan

OnSlab = Callable[[int, int, Tensor], None]  # (first class, class behind the last, their finished dw in fp32, to be used up)


class Sink:
    """Gradients of the tensors flagged in `needs` (the stream's tensors, then the folds').

    keep_wide: leave dw (and what else was summed over chunks) in fp32, for an upstream factor that is not known yet.
    whole: dw is summed over all chunks of rows before any slab is finished.
    on_slab: takes each slab's dw (of the one pair there is), which is then not stored.
    plan: what the stream's filter may take for itself; None: it does not act on what is added here.
    direct: is each slab's dw one product over all rows? Where nothing more happens to it, the product then rounds it to w's type itself.
    """

    def __init__(
        self, maker: TileMaker, folds: Sequence[Fold], needs: Sequence[bool], *, keep_wide: bool, whole: bool,
        on_slab: OnSlab | None = None, plan: Plan | None = None, direct: bool = False,
    ) -> None:  # fmt: skip
        self.maker, self.folds, self.rows = maker, folds, maker.rows
        # A power of two about N, undone exactly in the products. At most 4096, so that a sum over rows does not overflow instead.
        low = torch.float16 in maker.operand_dtypes and keep_wide
        self.boost = float(1 << min(max(maker.rows.total, 1).bit_length() - 1, 12)) if low else 1.0
        st, acc = maker.stream, maker.dtype
        flag = iter(needs)
        pairs = [(next(flag), next(flag)) for _ in st.pairs]
        self.need_x, self.need_w = [p[0] for p in pairs], [p[1] for p in pairs]
        self.need_bias, self.need_cs, self.need_given, need_scale = (
            t is not None and next(flag) for t in (st.bias, st.class_scale, st.given, st.scale_tensor)
        )
        self.need_maps = [[next(flag) for _ in m.tensors] for m in st.maps]
        self.need_folds = [[next(flag) for _ in f.tensors] for f in folds]

        def final(t: Tensor) -> torch.dtype:
            return acc if keep_wide else t.dtype

        like, c = st.tensors[0], maker.c
        self.filter: ColumnFilter | None = None
        # Elsewhere than on a CPU reading how many columns are kept would be a host sync. A scale of 0 hides what its gradient is made of.
        if plan is not None and plan.gathered and st.grad_filter and st.device.type == "cpu" and not (need_scale and maker.alpha == 0.0):
            self.filter = ColumnFilter(st.grad_filter, max(self.rows.count, 1), c, like.new_empty(0, dtype=acc))
            maker.keeps_z = need_scale
        self._zeroed = zeros = self.filter is not None  # products that leave columns out only add
        self.dx = [x.new_zeros(x.shape, dtype=final(x)) if need else None for (x, _), need in zip(st.pairs, self.need_x, strict=True)]
        self.on_slab = on_slab
        stored = [need and on_slab is None for need in self.need_w]
        self.dw = [fresh(w, w.shape, final(w), zeros=zeros) if need else None for (_, w), need in zip(st.pairs, stored, strict=True)]
        self.db = like.new_zeros(c, dtype=acc) if self.need_bias or (need_scale and st.bias is not None and not st.bias_last) else None
        self.dcs = like.new_zeros(c, dtype=acc) if self.need_cs else None
        self.dgiven = st.given.new_zeros(st.given.shape, dtype=final(st.given)) if self.need_given and st.given is not None else None
        self.dscale = like.new_zeros((), dtype=acc) if need_scale else None
        self.dmaps = [[t.new_zeros(t.shape, dtype=acc) for t in m.tensors] for m in st.maps]
        self.dfolds = [
            [t.new_zeros(t.shape, dtype=acc) if need else None for t, need in zip(f.tensors, flags, strict=True)]
            for f, flags in zip(folds, self.need_folds, strict=True)
        ]
        # dw is summed where it will be returned, if that is wide enough; else in a slab's work buffer, or in a whole one
        self._dw_sum = [self._sum_buffer(t, whole, zeros) for t in self.dw]
        if self.need_cs and whole:  # its gradient is read off dw, so a frozen w needs the sum too
            self._dw_sum = [
                fresh(w, w.shape, acc, zeros=zeros) if t is None else t for t, (_, w) in zip(self._dw_sum, st.pairs, strict=True)
            ]
        plain = direct and st.class_scale is None and maker.alpha_tensor is None
        self._direct = [
            plain and dw is not None and dw.dtype == of_product for dw, of_product in zip(self.dw, maker.operand_dtypes, strict=True)
        ]
        # Where rows are whole, so are tails; elsewhere each slab has its own, added at once.
        self.gathered = plan.gathered if plan is not None else 0
        self.tails = Tails(maker, self.dx, self._dw_sum, plan.waiting) if whole and zeros and plan is not None else None
        self._dx_sum: list[Tensor | None] = [None] * len(st.pairs)
        self.wants_tensors = any(any(flags) for flags in self.need_folds)

    def _sum_buffer(self, t: Tensor | None, whole: bool, zeros: bool) -> Tensor | None:
        if t is None or t.dtype == self.maker.dtype:
            return t
        return fresh(t, t.shape, self.maker.dtype, zeros=zeros) if whole else None

    def open_rows(self, span: Span) -> None:
        """Begin the sums of dx over classes for rows `span`."""
        self._span = span
        for p, ((x, _), need) in enumerate(zip(self.maker.stream.pairs, self.need_x, strict=True)):
            if not need and self.dscale is None:
                continue
            out = self.dx[p]
            if out is not None and self.rows.index is None and out.dtype == self.maker.dtype:
                self._dx_sum[p] = out[span.start : span.stop]
            else:
                self._dx_sum[p] = self.maker.pool.get(f"dx {p}", span.size, x.shape[1])

    def open_slab(self, span: Span) -> list[Tensor | None]:
        """The fp32 sums of dw for classes `span` (or dw itself, `direct`)."""
        sums: list[Tensor | None] = []
        for p, (_, w) in enumerate(self.maker.stream.pairs):
            whole = self.dw[p] if self._direct[p] else self._dw_sum[p]
            if whole is not None:
                sums.append(whole[span.start : span.stop])
            elif self.need_w[p] or self.need_cs:
                sums.append(self.maker.pool.get(f"dw {p}", span.size, w.shape[1]))
            else:
                sums.append(None)
        return sums

    def add(
        self, g: Tensor, values: list[Tensor] | None, xs: list[Tensor], ws: list[Tensor], sums: list[Tensor | None], r: Span, c: Span,
        *, first_rows: bool, first_classes: bool, live: Tensor | None = None, where: Where = None,
    ) -> None:  # fmt: skip
        """Take one tile's dL/ds (which is used up). first_rows, first_classes: are the sums of dw, of dx still empty?

        values: the logits along the maps; None: g is dL/dz already, in the operands' type (and then boosted).
        live: the columns of the slab that g has (its others are 0); None: all. where: its picks, for the filter."""
        g = self.settled(g, values, r, c, live)
        if self.filter is None:
            self._begin(live is not None, sums, r, first_rows, first_classes)
            self._multiply(g, xs, ws, sums, r, c, live, first_rows, first_classes)
            return
        z = None if values is None else values[0]
        columns = Columns.empty(g, r, g.shape[1], picked=where is not None, scaled=self.dscale is not None and z is not None)
        self.measure(columns, g, z, r, c, where, live)
        keep = self.filter.choose(columns.norms, columns.forced, columns.blocks, c.size)
        self.add_kept(g, keep, columns, xs, ws, sums, r, c, first_rows=first_rows, first_classes=first_classes, live=live)

    def settled(self, g: Tensor, values: list[Tensor] | None, r: Span, c: Span, live: Tensor | None = None) -> Tensor:
        """dL/dz of a tile, with everything taken from it that needs no product."""
        maker, st = self.maker, self.maker.stream
        if values is not None and g.numel():
            made = self._through_maps(g, values)
            g = made if self.filter is None or made is g else g.copy_(made)  # which sets the picks apart in a work buffer (columns.py)
        if self.db is not None:
            part = g.sum(0, dtype=self.db.dtype)
            part = part if values is not None else part.div_(self.boost)
            at = self.db[c.start : c.stop]
            at.add_(part) if live is None else at.index_add_(0, live, part)
        if st.given is not None and (self.dscale is not None or self.dgiven is not None):
            whole = g if live is None else g.new_zeros((r.size, c.size)).index_copy_(1, live, g)
            if self.dscale is not None:
                self.dscale.add_((whole * self.rows.take(st.given[:, c.start : c.stop], r)).sum())
            if self.dgiven is not None:
                part = whole * maker.alpha if maker.alpha_tensor is None else whole * maker.alpha * maker.alpha_tensor
                self.rows.put(self.dgiven[:, c.start : c.stop], r, part.to(self.dgiven.dtype))
        return g

    def measure(self, columns: Columns, g: Tensor, z: Tensor | None, r: Span, c: Span, where: Where, live: Tensor | None = None) -> None:
        """Tell the filter of a settled tile (r, c') of the columns c' = live, or all."""
        columns.measure(g, where, self.maker.pool)
        if columns.moments is not None and z is not None:
            columns.moments.zero_()
            for b, piece in columns.pieces(g.shape[1]):
                part, rows = g[piece.start : piece.stop], Span(r.start + piece.start, r.start + piece.stop)
                moments = self._unscaled(z[piece.start : piece.stop], rows, c, live).mul_(part)
                columns.moments[b].add_(moments.masked_fill_(part == 0.0, 0.0).sum(0))  # 0: where a bias of -inf is

    def _unscaled(self, z: Tensor, r: Span, c: Span, live: Tensor | None) -> Tensor:
        """class_scale sum_p x_p w_p^T, from z."""
        maker, st = self.maker, self.maker.stream

        def part(t: Tensor) -> Tensor:
            t = t[..., c.start : c.stop]
            return (t if live is None else t[..., live]).to(maker.dtype)

        y = z - part(st.bias) if st.bias is not None and st.bias_last else z
        y = y / maker.alpha
        y = y - part(st.bias) if st.bias is not None and not st.bias_last else y
        return y if st.given is None else y - part(self.rows.take(st.given, r))

    def add_kept(
        self, g: Tensor, keep: Tensor, tile: Columns, xs: list[Tensor], ws: list[Tensor], sums: list[Tensor | None], r: Span, c: Span,
        *, first_rows: bool, first_classes: bool, live: Tensor | None = None, unscaled: Unscaled | None = None,
    ) -> list[Tail | None]:  # fmt: skip
        """The products of those columns of a settled tile that are kept (blocks, c'). What each block dropped, if that must wait (`tails`).

        unscaled: g is not dL/dz yet."""
        counts = keep.sum(1).tolist()
        tails: list[Tail | None] = [None] * len(counts)
        if all(count == g.shape[1] for count in counts):
            g = g if unscaled is None else unscaled.complete(g, Span(0, r.size))
            self._begin(live is not None, sums, r, first_rows, first_classes)
            self._multiply(g, xs, ws, sums, r, c, live, first_rows, first_classes)
            return tails
        self._begin(True, sums, r, first_rows, first_classes)
        if self.dscale is not None and tile.moments is not None:
            self.dscale.add_(torch.where(keep, 0.0, tile.moments).sum())
        for b, (rows, columns, count) in enumerate(zip(tile.rows, keep, counts, strict=True)):
            here, own = Span(r.start + rows.start, r.start + rows.stop), [x[rows.start : rows.stop] for x in xs]
            part = g[rows.start : rows.stop]
            if count == g.shape[1]:
                part = part if unscaled is None else unscaled.complete(g, rows)
                self._multiply(part, own, ws, sums, here, c, live, False, False)
                continue
            factor = None if unscaled is None else unscaled.factor[rows.start : rows.stop]
            dropped = None if unscaled is None else unscaled.sums[rows.start : rows.stop].clone()
            chosen = columns.nonzero().squeeze(-1)
            for some in chosen.split(self.gathered) if count else ():
                out = self.maker.pool.get("kept g", rows.size, some.numel())
                if unscaled is None or dropped is None:
                    picked = torch.gather(part, 1, some.expand(rows.size, -1), out=out)
                else:
                    picked, kept = unscaled.gather(g, some, rows, out)
                    dropped.sub_(kept)
                self._multiply(picked, own, ws, sums, here, c, some if live is None else live[some], False, False)
            tails[b] = tail = Tail.of(part, ~columns, dropped, factor)
            if self.tails is None:
                self._put_back(tail, own, ws, sums, here, c, live)
        return tails

    def _put_back(
        self, tail: Tail, xs: list[Tensor], ws: list[Tensor], sums: list[Tensor | None], r: Span, c: Span, live: Tensor | None
    ) -> None:
        """The outer product in place of what the block r dropped of the classes c (of those `live`, if given)."""
        st, maker = self.maker.stream, self.maker
        assert self.filter is not None
        self.filter.returned(r.start, tail.back)
        a = tail.a if live is None else tail.a.new_zeros(c.size).index_copy_(0, live, tail.a)
        scaled = a if st.class_scale is None else a * st.class_scale[c.start : c.stop].to(a.dtype)
        for x, w, dw, dx in zip(xs, ws, sums, self._dx_sum, strict=True):
            bar = tail.m @ x
            if dw is not None:
                dw.addr_(a, bar, alpha=maker.alpha)
            if dx is None:
                continue
            row = scaled @ w
            dx[r.start - self._span.start : r.stop - self._span.start].addr_(tail.m, row)
            if self.dscale is not None:  # its gradient has all that was dropped already (moments)
                self.dscale.sub_(bar @ row)

    def keep_tails(self, whole: Columns, of_slabs: list[list[Tail | None]], slabs: list[Span], xs: list[Tensor], r: Span) -> None:
        """The outer products in place of what the blocks of rows r dropped of all slabs, once their dx is finished (`close_rows`)."""
        assert self.filter is not None and self.tails is not None
        for b, rows in enumerate(whole.rows):
            some = [tails[b] for tails in of_slabs]
            if all(tail is None for tail in some):
                continue
            nothing = xs[0].new_zeros(rows.size, dtype=self.maker.dtype)
            made = [
                Tail(nothing, nothing.new_zeros(c.size), nothing.new_zeros(())) if tail is None else tail
                for tail, c in zip(some, slabs, strict=True)
            ]
            block = Span(r.start + rows.start, r.start + rows.stop)
            self.filter.returned(block.start, torch.stack([tail.back for tail in made]).sum())
            self.tails.add(block, made, slabs, [x[rows.start : rows.stop] for x in xs])

    def _begin(self, empty: bool, sums: list[Tensor | None], r: Span, first_rows: bool, first_classes: bool) -> None:
        """Where products will only add (to some columns, say), sums that are still empty are zeroed."""
        if not empty:
            return
        at = slice(r.start - self._span.start, r.stop - self._span.start)
        for total, whole in zip(sums, self._dw_sum, strict=True) if first_rows else ():
            if total is not None and not (self._zeroed and whole is not None):
                total.zero_()
        for total in self._dx_sum if first_classes else ():
            if total is not None:
                total[at].zero_()

    def open_products(self, sums: list[Tensor | None], r: Span, first_rows: bool, first_classes: bool) -> list[Tensor | None]:
        """The sums of dx at rows r, to which products may only add: where they, or the sums of dw, are still empty they are zeroed."""
        self._begin(True, sums, r, first_rows, first_classes)
        start = self._span.start
        return [None if total is None else total[r.start - start : r.stop - start] for total in self._dx_sum]

    def _multiply(
        self, g: Tensor, xs: list[Tensor], ws: list[Tensor], sums: list[Tensor | None], r: Span, c: Span,
        live: Tensor | None, first_rows: bool, first_classes: bool,
    ) -> None:  # fmt: skip
        """dw += G^T x, dx += G w for the columns that g has: `live` of the slab, or all. g is used up."""
        maker, st = self.maker, self.maker.stream
        if live is not None and not live.numel():
            return
        for x, total in zip(xs, sums, strict=True):
            if total is None:
                continue
            if live is None:
                product(self._operand(g, x).t(), x, total, beta=float(not first_rows), alpha=maker.alpha / self.boost)
            else:
                part = maker.pool.get("live dw", live.numel(), x.shape[1])
                total.index_add_(0, live, product(g.t(), x, part, alpha=maker.alpha))
        if st.class_scale is not None and any(t is not None for t in self._dx_sum):
            factor = st.class_scale[c.start : c.stop]
            g.mul_((factor if live is None else factor[live]).to(maker.dtype))
        for p, (w, total) in enumerate(zip(ws, self._dx_sum, strict=True)):
            if total is None:
                continue
            at = total[r.start - self._span.start : r.stop - self._span.start]
            if live is None:
                product(self._operand(g, w), w, at, beta=float(not first_classes), alpha=1.0 / self.boost)
            else:
                rows = torch.index_select(w, 0, live, out=maker.pool.get(f"live w {p}", live.numel(), w.shape[1]))
                product(g, rows, at, beta=1.0)

    def _through_maps(self, g: Tensor, values: list[Tensor]) -> Tensor:
        """dL/dz from dL/ds, with the maps' own gradients taken on the way."""
        maps = self.maker.stream.maps
        for i in range(len(maps) - 1, -1, -1):
            m, s = maps[i], values[i + 1]
            z = values[i] if m.needs_input else None
            if any(self.need_maps[i]):
                for total, part in zip(self.dmaps[i], m.tensor_gradients(g, z, s, m.numbers, m.tensors), strict=True):
                    total.add_(part)
            g = m.backward(g, z, s, m.numbers, m.tensors)
        return g

    def _operand(self, g: Tensor, like: Tensor) -> Tensor:
        """G in the dtype of the other operand. In fp16 the 1/N inside G would underflow, for the loss scaler's factor is not there yet."""
        return g if g.dtype == like.dtype else (g * self.boost if self.boost != 1.0 else g).to(like.dtype)

    def close_rows(self) -> None:
        """The sums of dx over all classes are there: scale, cast, and d(scale)."""
        maker, span = self.maker, self._span
        for p, total in enumerate(self._dx_sum):
            if total is None:
                continue
            if self.dscale is not None:
                x = maker.stream.pairs[p][0]
                for part in spans(span.stop, 4096, span.start):
                    lo = part.start - span.start
                    self.dscale.add_((self.rows.take(x, part).to(maker.dtype) * total[lo : lo + part.size]).sum())
            out = self.dx[p]
            if out is None:
                continue
            if maker.alpha != 1.0:
                total.mul_(maker.alpha)
            if maker.alpha_tensor is not None:
                total.mul_(maker.alpha_tensor)
            self.rows.put(out, span, total)

    def close_slab(self, c: Span, sums: list[Tensor | None]) -> None:
        """The sums of dw over all rows are there for classes c: class scale, cast."""
        maker, st = self.maker, self.maker.stream
        for p, total in enumerate(sums):
            if total is None or self._direct[p]:
                continue
            if maker.alpha_tensor is not None:
                total.mul_(maker.alpha_tensor)
            if self.dcs is not None:
                self.dcs[c.start : c.stop].add_((st.pairs[p][1][c.start : c.stop].to(maker.dtype) * total).sum(1))
            if st.normalized and st.class_scale is not None:
                through_norms(total, st.pairs[p][1][c.start : c.stop], st.class_scale[c.start : c.stop])
            elif st.class_scale is not None:
                total.mul_(st.class_scale[c.start : c.stop].to(maker.dtype).unsqueeze(-1))
            if self.on_slab is not None:
                self.on_slab(c.start, c.stop, total)
            out = self.dw[p]
            if out is not None and out is not self._dw_sum[p]:
                out[c.start : c.stop].copy_(total)

    def on_tensor(self, r: Span, c: Span):
        """A callback that adds up the gradients of a fold's own tensors, or None."""
        if not self.wants_tensors:
            return None

        def take(i: int, f: Fold, tile: Tile, tensors: list[Tensor], state: State, grads: list[Tensor | None]) -> None:
            for which, total in enumerate(self.dfolds[i]):
                if total is None:
                    continue
                part = f.tensor_gradient(which, tile, tensors, state, grads)
                if f.axis == "columns":
                    part = part.t() if f.tensor_axes[which] == "grid" else part
                if f.tensor_axes[which] == "grid":
                    self.rows.put(total[:, c.start : c.stop], r, part)
                elif f.axis == "rows":
                    here = self.rows.take(total, r) + part.squeeze(-1)
                    self.rows.put(total, r, here)
                else:
                    total[c.start : c.stop].add_(part.squeeze(-1))

        return take

    def report(self) -> Tensor:
        """(2,): what the filter kept and promised (filter.py)."""
        like = torch.empty(0, dtype=self.maker.dtype, device=self.maker.stream.device)
        return exact_report(like) if self.filter is None else self.filter.report().to(like.dtype)

    def no_rows(self) -> None:
        """No row counts, so the sums of dw never began: they are zero."""
        for t in self.dw:
            if t is not None:
                t.zero_()
        if self.on_slab is not None:
            w = self.maker.stream.pairs[0][1]
            for c in spans(self.maker.c, max((1 << 20) // w.shape[1], 1)):
                self.on_slab(c.start, c.stop, w.new_zeros((c.size, w.shape[1]), dtype=self.maker.dtype))

    def finish(self) -> list[Tensor]:
        """The gradients that were needed, in order."""
        maker, st = self.maker, self.maker.stream
        out: list[Tensor] = []
        for dx, dw in zip(self.dx, self.dw, strict=True):
            out += [t for t in (dx, dw) if t is not None]
        if self.db is not None:
            if self.dscale is not None and st.bias is not None and not st.bias_last:
                # a class without a gradient has no part in it, even where its bias is -inf
                self.dscale.add_(torch.where(self.db == 0.0, 0.0, self.db * st.bias.to(maker.dtype)).sum())
            if self.need_bias and st.bias_last:
                out.append(self.db)
            elif self.need_bias:
                db = self.db.mul_(maker.alpha)
                out.append(db if maker.alpha_tensor is None else db.mul_(maker.alpha_tensor))
        if self.dcs is not None:
            out.append(self.dcs)
        if self.dgiven is not None:
            out.append(self.dgiven)
        if self.dscale is not None and st.scale_tensor is not None:
            out.append(self.dscale.mul_(st.scale).reshape(st.scale_tensor.shape))
        for grads, flags in zip(self.dmaps, self.need_maps, strict=True):
            out += [t for t, need in zip(grads, flags, strict=True) if need]
        out += [t for grads in self.dfolds for t in grads if t is not None]
        return out

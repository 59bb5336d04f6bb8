"""Pieces of the tiled engine: rows and slabs of operands, work buffers, a tile's logits, a tile's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bigclass.core.engines.pages import borrow, give_back
from bigclass.core.folds import Fold, State, Tile
from bigclass.core.stream import Stream

# Libraries that multiply 16-bit operands into fp32 outputs. Elsewhere tiles are widened to fp32 first:
# a 16-bit output would round every logit.
WIDE_OUTPUT = ("cuda",)


# Where the picks of a tile's rows lie in it: (flat positions, inside), both (r, K); None without picks.
Where = tuple[Tensor, Tensor] | None


class Pool:
    """Named work buffers, allocated once a call and reused by every tile. Each has one spare element behind its end (folds.Tile)."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, cols: int) -> Tensor:
        """A contiguous (rows, cols) view of the buffer `name`, its content undefined."""
        size = rows * cols + 1
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = borrow(self._like, size, self._dtype)
        return flat[: size - 1].view(rows, cols)

    def __del__(self) -> None:
        for flat in self._flat.values():
            give_back(flat)


def product(a: Tensor, b: Tensor, out: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """out = alpha a b + beta out, summed and stored in out's dtype."""
    rows, cols = out.shape
    pieces = _pieces(rows, cols, a.shape[1]) if out.device.type == "cpu" else 1
    if pieces == 1:
        return _product(a, b, out, beta, alpha)
    for cut in spans(cols, -(-cols // pieces)):
        _product(a, b[:, cut.start : cut.stop], out[:, cut.start : cut.stop], beta, alpha)
    return out


def _product(a: Tensor, b: Tensor, out: Tensor, beta: float, alpha: float) -> Tensor:
    if a.dtype != out.dtype:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    if beta == 0.0 and alpha == 1.0:
        return torch.mm(a, b, out=out)
    return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)


def _pieces(rows: int, cols: int, inner: int) -> int:
    """How many pieces of columns to make a CPU product in.

    On AMD's CPUs MKL likes narrow outputs. Zen 4 (fp32, two cores of an EPYC 9004, rows x cols x inner): pieces no wider than high gain
    5 % at 688 x 4032 x 512, 15 % at 256 x 11264 x 512, 27 % at 688 x 4032 x 2048; below 256 rows or 128 inner they cost more than they
    gain. Zen 3 (no AVX-512; two cores of an EPYC 7003): pieces of 256 gain 24 % at 464 x 12288 x 512, 35 % at 160 x 12288 x 512, and more
    at 2048 inner. On Intel's, which it was made for, pieces always cost: 13 % at 512 x 4096 x 512, 20 % at 256 x 4096 x 512 (two cores of
    a Xeon, Sapphire Rapids)."""
    if _is_intel():
        return 1
    if inner >= 512 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return 1 if rows < 32 else -(-cols // 256)
    return 1 if rows < 256 or inner < 128 else -(-cols // max(rows, 512))


@lru_cache(maxsize=1)
def _is_intel() -> bool:
    """Is the CPU known to be Intel's?"""
    try:
        with open("/proc/cpuinfo") as file:
            return "GenuineIntel" in file.read(512)
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of rows or of classes."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def spans(total: int, block: int, start: int = 0) -> list[Span]:
    """[start, total) in blocks."""
    return [Span(at, min(at + block, total)) for at in range(start, total, max(block, 1))]


class Rows:
    """The rows that count.

    On a CPU ignored rows are left out before any product (`index`). On a GPU counting them would be a host sync:
    there their features are replaced by zeros, so that NaN in them meets no sum.
    """

    COMPACT = ("cpu",)  # devices where ignored rows are left out

    def __init__(self, n: int, keep: Tensor | None, compact: bool = True) -> None:
        self.total = n
        self.index: Tensor | None = None
        self._mask: Tensor | None = None
        if keep is not None and compact and keep.device.type in self.COMPACT:
            self.index = keep.nonzero().squeeze(-1)
            if self.index.numel() == n:
                self.index = None
        elif keep is not None:
            self._mask = keep
        self.count = n if self.index is None else self.index.numel()

    def take(self, t: Tensor, span: Span) -> Tensor:
        """Rows `span` (of those that count) of t (N, ...)."""
        if self.index is not None:
            return t[self.index[span.start : span.stop]]
        t = t[span.start : span.stop]
        mask = self.mask(span)
        if mask is not None and t.is_floating_point():
            return torch.where(mask.view(-1, *[1] * (t.dim() - 1)), t, t.new_zeros(()))
        return t

    def mask(self, span: Span) -> Tensor | None:
        """(r,) bool, False at the ignored among rows `span`; None if none of them is."""
        return None if self._mask is None else self._mask[span.start : span.stop]

    def put(self, out: Tensor, span: Span, value: Tensor) -> None:
        """Write `value` to rows `span` (of those that count) of out (N, ...)."""
        if self.index is not None:
            out[self.index[span.start : span.stop]] = value.to(out.dtype)
        elif out[span.start : span.stop].data_ptr() != value.data_ptr():
            out[span.start : span.stop].copy_(value)

    def add(self, out: Tensor, span: Span, value: Tensor) -> None:
        """Add `value` to rows `span` (of those that count) of out (N, ...)."""
        if self.index is not None:
            out.index_add_(0, self.index[span.start : span.stop], value.to(out.dtype))
        else:
            out[span.start : span.stop].add_(value)

    def scatter(self, compact: Tensor, fill: Tensor) -> Tensor:
        """compact (M, ...) at its rows of a copy of `fill` (N, ...)."""
        if self.index is None:
            return compact
        fill[self.index] = compact
        return fill


class TileMaker:
    """Makes tiles of one stream: cuts and casts its operands, multiplies, adds, maps, finds picks."""

    def __init__(self, stream: Stream, picks: Tensor | None, rows: Rows, dtype: torch.dtype | None = None) -> None:
        self.stream, self.rows = stream, rows
        self.dtype = dtype or stream.accumulate_dtype  # of a second stream: that of the first
        self.c = stream.shape[1]
        self.pool = Pool(stream.tensors[0], self.dtype)
        self.picks = None if picks is None else picks.long()
        self.keeps_z = False  # must the gradient leave z as it was made? (sink.py: for that of a scale, of filtered columns)
        self._row_numbers = torch.arange(0 if picks is None else rows.count, device=stream.device).unsqueeze(-1)
        wide = stream.device.type in WIDE_OUTPUT
        self.operand_dtypes = [self._operand_dtype(x, w) if wide else self.dtype for x, w in stream.pairs]
        # On a CPU a learnable scale is read once and rides along in the products; elsewhere that would be a host sync.
        self.alpha, self.alpha_tensor = stream.scale, None
        if stream.scale_tensor is not None:
            if stream.device.type == "cpu":
                self.alpha *= float(stream.scale_tensor)
            else:
                self.alpha_tensor = stream.scale_tensor.to(self.dtype).reshape(())

    def _operand_dtype(self, x: Tensor, w: Tensor) -> torch.dtype:
        chosen = self.stream.compute_dtype or torch.promote_types(x.dtype, w.dtype)
        return self.dtype if torch.float64 in (self.dtype, chosen) else chosen

    def features(self, span: Span) -> list[Tensor]:
        """x_p (r, D_p) for each pair, in the dtype of its products."""
        return [self.rows.take(x, span).to(dtype) for (x, _), dtype in zip(self.stream.pairs, self.operand_dtypes, strict=True)]

    def slab(self, span: Span) -> list[Tensor]:
        """w_p (c, D_p) for each pair, in the dtype of its products."""
        return [w[span.start : span.stop].to(dtype) for (_, w), dtype in zip(self.stream.pairs, self.operand_dtypes, strict=True)]

    def raw(self, xs: list[Tensor], ws: list[Tensor], r: Span, c: Span, out: Tensor) -> Tensor:
        """z (r, c): everything but the maps, in `out`."""
        st = self.stream
        # the scale rides in the product unless something must be added before it
        early_bias = st.bias is not None and not st.bias_last
        late = st.class_scale is not None or st.given is not None or early_bias
        alpha = 1.0 if late else self.alpha
        if alpha != 1.0 and all(x.dtype == out.dtype for x in xs):
            # as plain torch has it, with whose rounding ours is compared: applied to the product, errors of confident rows were 13 % larger
            xs, alpha = [x * alpha for x in xs], 1.0
        for p, (x, w) in enumerate(zip(xs, ws, strict=True)):
            product(x, w.t(), out, beta=float(p > 0), alpha=alpha)
        if st.class_scale is not None and xs:
            factor = st.class_scale[c.start : c.stop].to(self.dtype)
            if st.given is None and not early_bias:  # nothing is added before the scale, which then rides along
                late, factor = False, factor * self.alpha
            out.mul_(factor)
        if st.given is not None:
            given = self.rows.take(st.given[:, c.start : c.stop], r)
            out.add_(given) if xs else out.copy_(given)
        if st.bias is not None and early_bias:
            out.add_(st.bias[c.start : c.stop].to(self.dtype))
        if late and self.alpha != 1.0:
            out.mul_(self.alpha)
        if self.alpha_tensor is not None:
            out.mul_(self.alpha_tensor)
        if st.bias is not None and st.bias_last:
            out.add_(st.bias[c.start : c.stop].to(self.dtype))
        return out

    @property
    def in_place(self) -> bool:
        """May s overwrite z? Only if no map reads z again for its gradient."""
        maps = self.stream.maps
        return not maps or (len(maps) == 1 and not maps[0].needs_input)

    def bend(self, z: Tensor, *, keep_inputs: bool) -> list[Tensor]:
        """[z, s_1, ..., s]: the values along the maps; all in z's place unless a gradient needs them apart."""
        values = [z]
        apart = keep_inputs and (self.keeps_z or not self.in_place)
        for i, m in enumerate(self.stream.maps):
            out = self.pool.get(f"map {i}", *z.shape) if apart else z
            values.append(m.forward(values[-1], m.numbers, m.tensors, out=out))
        return values

    def positions(self, r: Span, c: Span) -> Where:
        """Where the picks of rows r lie in the tile (r, c): (flat (r, K), inside (r, K)); those elsewhere point past its end."""
        if self.picks is None:
            return None
        local = self.rows.take(self.picks, r) - c.start
        inside = (local >= 0) & (local < c.size)
        local += self._row_numbers[: r.size] * c.size
        return torch.where(inside, local, r.size * c.size), inside

    def fold_tensors(self, f: Fold, r: Span, c: Span) -> list[Tensor]:
        """A fold's tensors cut to a tile, broadcastable to it (to its transpose for a column fold)."""
        cut = []
        for t, axis in zip(f.tensors, f.tensor_axes, strict=False):
            if axis == "grid":
                part = self.rows.take(t[:, c.start : c.stop], r).to(self.dtype)
                cut.append(part if f.axis == "rows" else part.t())
                continue
            along_rows = (axis == "kept") == (f.axis == "rows")
            part = (self.rows.take(t, r) if along_rows else t[c.start : c.stop]).to(self.dtype)
            cut.append(part.unsqueeze(-1 if axis == "kept" else 0))
        return cut

    def tile(self, f: Fold, s: Tensor, r: Span, c: Span, flat: Tensor | None, scratch: str | None) -> Tile:
        """The tile as fold f sees it."""
        work = None if scratch is None else self.pool.get(scratch, *s.shape)
        if f.axis == "rows":
            return Tile(s, c.start, work, flat)
        return Tile(s.t(), r.start, None if work is None else work.t(), flat)


def update(f: Fold, state: State, maker: TileMaker, s: Tensor, r: Span, c: Span, flat: Tensor | None) -> None:
    """Fold one tile into `state` (whose rows, or columns, are those of the tile)."""
    tile = maker.tile(f, s, r, c, flat, "scratch")
    new = f.update(state, tile, maker.fold_tensors(f, r, c))
    tile.restore()
    for old, part in zip(state, new, strict=True):
        old.copy_(part)


@dataclass(slots=True)
class Upstream:
    """What reached the op's outputs, for the rows that count from `start` on.

    states, grads: for each fold its merged state and the gradients of its parts (None: none). h: (M, K) gradients of the picks.
    """

    states: list[State]
    grads: list[list[Tensor | None]]
    h: Tensor | None
    start: int = 0

    def of(self, i: int, f: Fold, r: Span, c: Span) -> tuple[State, list[Tensor | None]]:
        """Fold i's states and gradients at the rows r (a column fold: at the classes c)."""
        span = Span(r.start - self.start, r.stop - self.start) if f.axis == "rows" else c
        return (
            tuple([t[span.start : span.stop] for t in self.states[i]]),
            [None if t is None else t[span.start : span.stop] for t in self.grads[i]],
        )


def logit_gradient(
    maker: TileMaker, folds: Sequence[Fold], up: Upstream, values: list[Tensor], r: Span, c: Span, where: Where, on_tensor=None
) -> Tensor:
    """G (r, c) = dL/ds of one tile: every fold's part, then the picks'. Overwrites s if nothing else reads it."""
    s = values[-1]
    active = [(i, f) for i, f in enumerate(folds) if any(g is not None for g in up.grads[i])]
    alone = len(active) == 1 and not maker.stream.maps and on_tensor is None and not maker.keeps_z
    g = s if alone else maker.pool.get("g", *s.shape)
    for first, (i, f) in enumerate(active):
        state, grads = up.of(i, f, r, c)
        tile = maker.tile(f, s, r, c, None if where is None else where[0], None if on_tensor is None else "scratch")
        tensors = maker.fold_tensors(f, r, c)
        if on_tensor is not None:
            on_tensor(i, f, tile, tensors, state, grads)
        target = g if first == 0 else maker.pool.get("scratch" if on_tensor is None else "part", *s.shape)
        f.gradient(tile, tensors, state, grads, target if f.axis == "rows" else target.t())
        if not alone:
            tile.restore()
        if first > 0:
            g.add_(target)
    if not active:
        g.zero_()
    add_picks(g, where, r, up)
    return g


def add_picks(g: Tensor, where: Where, r: Span, up: Upstream) -> None:
    """g += the picks' own gradients."""
    if where is None or up.h is None or g.numel() == 0:
        return
    flat, inside = where
    h = torch.where(inside, up.h[r.start - up.start : r.stop - up.start], 0.0)
    at = torch.where(inside, flat % g.shape[1], 0)
    if g.device.type == "cpu":
        g.scatter_add_(1, at, h)  # along each row: equal picks of one row add up in order
        return
    for k in range(at.shape[1]):  # elsewhere their order within one call is open
        g.scatter_add_(1, at[:, k : k + 1], h[:, k : k + 1])

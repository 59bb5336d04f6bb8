"""The kernels of the filter (filtered.py): norms of the columns of G, a copy of those that are kept, the two products of the copy.

    zero_picks    G[i, pick_ik] = 0, and a note of the pick's column: the picks' entries take no part in the choice
    column_norms  for a tile of rows: sum of G_ij^2 of each column, in fp32
    compact       K[i, m] = G[i, columns[m]] for the kept m < count; zeros up to the next whole block of columns
    add_dx        out[i, :] += alpha sum over m < count of K_im w[columns[m], :]
    add_dw        out[columns[m], :] += alpha sum over i of K_im x[i, :]

How many columns are kept is read from memory, never by the host: a grid is made for all of them, and what lies behind `count` is no work.
Each element of a sum has one program to its own, for a column stands once in a list: it reads the sum, adds, and writes it back.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# (the language of device functions has other types than Python's)

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["class_base", "N", "C", "K", "band"])
def zero_picks(picks, out, forced, class_base, N, C, K, band, out_stride, BLOCK: tl.constexpr):
    """forced: (bands, C) uint8, zeros; 1 at the picks of a band's rows. Picks of one column write the same number."""
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    for k in range(0, K):
        pick = tl.load(picks + rows * K + k, mask=rows < N, other=-1) - class_base
        inside = (pick >= 0) & (pick < C) & (rows < N)
        tl.store(out + rows * out_stride + pick, tl.zeros((BLOCK,), out.dtype.element_ty), mask=inside)
        tl.store(forced + (rows // band) * C + pick, tl.full((BLOCK,), 1, tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["N", "C", "band", "tiles"])
def column_norms(g, norms, N, C, band, tiles, g_stride, BM: tl.constexpr, BN: tl.constexpr):
    """norms: (bands x tiles, C), of the tiles of BM rows that a band has. Past the last row they are 0."""
    tile, part = tl.program_id(0) // tl.cdiv(C, BN), tl.program_id(0) % tl.cdiv(C, BN)
    inner = (tile % tiles) * BM + tl.arange(0, BM)  # rows of the band
    rows, cols = (tile // tiles).to(tl.int64) * band + inner, part * BN + tl.arange(0, BN)
    there = ((inner < band) & (rows < N))[:, None] & (cols < C)[None, :]
    block = tl.load(g + rows[:, None] * g_stride + cols[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(norms + tile.to(tl.int64) * C + cols, tl.sum(block * block, axis=0), mask=cols < C)


@triton.jit(do_not_specialize=["N", "band"])
def compact(g, columns, counts, out, band, N, g_stride, out_stride, BM: tl.constexpr, BN: tl.constexpr):
    """out (N, whole blocks of BN columns): the kept columns of a band's G (N, C)."""
    count = tl.load(counts + band)
    tiles = tl.cdiv(N, BM)
    at = (tl.program_id(0) // tiles) * BN + tl.arange(0, BN)
    rows = ((tl.program_id(0) % tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    if (tl.program_id(0) // tiles) * BN < count:
        column = tl.load(columns + at, mask=at < count, other=0)
        inside = (rows < N)[:, None]
        block = tl.load(g + rows[:, None] * g_stride + column[None, :], mask=inside & (at < count)[None, :], other=0.0)
        tl.store(out + rows[:, None] * out_stride + at[None, :], block, mask=inside)


@triton.jit
def _place(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Which tile this program makes: GROUP tiles of the first axis go side by side through those of the second."""
    group = tl.program_id(0) // (GROUP * tiles_n)
    width = tl.maximum(tl.minimum(tiles_m - group * GROUP, GROUP), 1)
    place = tl.program_id(0) - group * GROUP * tiles_n
    return group * GROUP + place % width, place // width


@triton.jit
def _add(out, rows, d, value, inside, stride, D):
    """out[rows, d] += value, 4096 numbers at a time: the sum read beside all of a 256x128 `value` spilled up to 350 bytes."""
    BM: tl.constexpr = value.shape[0]
    BN: tl.constexpr = value.shape[1]
    if BM * BN > 4096:
        left, right = tl.split(tl.permute(tl.reshape(value, (BM, 2, BN // 2)), (0, 2, 1)))
        d_left, d_right = tl.split(tl.permute(tl.reshape(d, (2, BN // 2)), (1, 0)))
        _add(out, rows, d_left, left, inside, stride, D)
        _add(out, rows, d_right, right, inside, stride, D)
    else:
        at = out + rows.to(tl.int64)[:, None] * stride + d[None, :]
        there = inside[:, None] & (d < D)[None, :]
        tl.store(at, tl.load(at, mask=there, other=0.0) + value, mask=there)


@triton.jit(do_not_specialize=["N", "band"])
def add_dx(kept, columns, counts, w, out, alpha, band, N, D, kept_stride, w_stride, out_stride,
           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
           PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """kept: (N, whole blocks). A tile is BM rows x BN features; rows of w are read where they lie, BK classes at a time."""
    count = tl.load(counts + band)
    tile, part = _place(tl.cdiv(N, BM), tl.cdiv(D, BN), GROUP)
    rows, d = tile * BM + tl.arange(0, BM), part * BN + tl.arange(0, BN)
    row = tl.minimum(rows, N - 1).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for m0 in range(0, count, BK):
        m = m0 + tl.arange(0, BK)
        # behind the last: it again, times a zero of K. Not class 0, whose row may hold what no kept one does (0 inf = NaN).
        column = tl.load(columns + tl.minimum(m, count - 1)).to(tl.int64)
        at = w + column[:, None] * w_stride + d[None, :]
        a = kept.load([tile * BM, m0]) if TMA else tl.load(kept + row[:, None] * kept_stride + m[None, :])
        b = tl.load(at, mask=(d < D)[None, :], other=0.0)
        if INTERPRETED:  # where bf16 blocks multiply as if their bits were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    _add(out, rows, d, alpha * acc, rows < N, out_stride, D)


@triton.jit(do_not_specialize=["N", "band"])
def add_dw(kept, columns, counts, x, out, alpha, band, N, D, kept_stride, x_stride, out_stride,
           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
           PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """kept: (N, whole blocks). A tile is BM kept classes x BN features, BK rows at a time."""
    count = tl.load(counts + band)
    tiles, parts = tl.cdiv(count, BM), tl.cdiv(D, BN)
    tile, part = _place(tiles, parts, GROUP)
    m, d = tile * BM + tl.arange(0, BM), part * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    last = tl.where(tl.program_id(0) < tiles * parts, N, 0)  # what lies behind the list has no rows to add, nor (m, d) to store
    for row0 in range(0, last, BK):
        if TMA:
            a, b = kept.load([row0, tile * BM]), x.load([row0, part * BN])
        else:
            rows = row0 + tl.arange(0, BK)
            row = tl.minimum(rows, N - 1).to(tl.int64)  # behind the last: it again, times zeros
            a = tl.load(kept + row[:, None] * kept_stride + m[None, :], mask=(rows < N)[:, None], other=0.0)
            at = x + row[:, None] * x_stride + d[None, :]
            b = tl.load(at, mask=(d < D)[None, :], other=0.0)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    column = tl.load(columns + m, mask=m < count, other=0)
    _add(out, column, d, alpha * acc, m < count, out_stride, D)

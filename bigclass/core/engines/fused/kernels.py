"""The kernels of the fused engine. Logits exist in registers; what varies with the recipe comes in as compile-time functions (compose.py).

    fold      for a band of BM rows, for tiles of BN classes: acc = sum_p x_p w_p^T; s = maps(raw(acc)); states of the row folds stay in
              registers over the band; states of the column folds and the picked logits are written as tiles meet them
    merge     states of the class splits (of the row blocks, for column folds) to one
    gradient  one tile a program: acc again (or read, where the forward stored it), G = dL/dz, written in the operands' type; and, of
              folds that are sums and ask for no other's state, the fold too
    saved_gradient          the same from logits that the forward saved in 16 bits (saved.py)
    drop_picks              stored logits of the picks = -inf
    read_picks, add_picks   N K dot products: the picked logits; G[i, pick_ik] = what the folds gave there + h_ik

Flops: fold and gradient 2NCD each. Bytes: fold reads w once for each group of bands (8 or 16: `Config.group`) and x once for each class
split (from L2 while a group's x fits), writes 4 x states x N x splits, and 2 N C where it saves logits; gradient reads the
same and writes the operand size x N x C; saved_gradient reads and writes 2 N C. Floor: the GEMM's time; of the last the copy's.
Epilogue instructions a logit (sm_90, 8 warps, from the compiled binary; `python -m benchmarks.kernels` prints them): see launch.py.

C is specialised (a multiple of 16, or not): what is read of memory with a mask for classes is then read 16 bytes at a time.
Ragged ends: rows past N repeat the last row (or read zeros) and are never stored, classes past C are -inf and only in a last, peeled tile,
features past D are zeros. Offsets into N x C and C x D are 64 bits wide.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# (the language of device functions has other types than Python's)

import triton
import triton.language as tl

NO_CLASS = tl.constexpr(2147483647)  # stands for a pick that is no more


@triton.jit
def _block(source, row0, k0, stride, rows_total, D, BR: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr):
    """source[row0 : row0 + BR, k0 : k0 + BK]; past the ends zeros, or rows that nobody stores."""
    if TMA:
        block = source.load([row0, k0])
    else:
        r = tl.minimum(row0 + tl.arange(0, BR), rows_total - 1)
        k = k0 + tl.arange(0, BK)
        at = source + r.to(tl.int64)[:, None] * stride + k[None, :]
        block = tl.load(at) if EVEN_D else tl.load(at, mask=(k < D)[None, :], other=0.0)
    return block


@triton.jit
def grid(source, row0, class0, stride, N, C, BM: tl.constexpr, BN: tl.constexpr):
    """source[row0 : row0 + BM, class0 : class0 + BN] of an (N, C) tensor in fp32, 0 past the ends.

    Offsets inside the tile are 32 bits wide (support.py sees to that): of 64 bits, and kept from tile to tile as the compiler likes it,
    they took up to 2 registers a logit and spilled. The minimum is 0, but the compiler cannot know: so they are made anew in each tile."""
    i, j = tl.arange(0, BM) + tl.minimum(class0, 0), tl.arange(0, BN)
    at = (source + row0.to(tl.int64) * stride + class0) + (i[:, None] * stride + j[None, :])
    return tl.load(at, mask=(i < N - row0)[:, None] & (j < C - class0)[None, :], other=0.0).to(tl.float32)


@triton.jit
def save(codes, references, e, m, row0, class0, rows, cols, N, stride, TMA: tl.constexpr):
    """Save a tile's e = exp(s - m), m the largest of each row (saved.py): in fp16 times 2^15, which never overflows.

    Rows of codes reach to the end of a last, ragged tile, where e is 0."""
    code = (e * 32768.0).to(tl.float16)
    if TMA:
        codes.store([row0, class0], code)
    else:
        tl.store(codes + rows.to(tl.int64)[:, None] * stride + cols[None, :], code, mask=(rows < N)[:, None])
    tl.store(references + tl.full((), class0 // e.shape[1], tl.int64) * N + rows, m, mask=rows < N)


@triton.jit
def _rounded(g, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """g in `dtype`, to nearest even. Triton's interpreter cuts bf16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = g.to(tl.float32).to(tl.int32, bitcast=True)
        g = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return g.to(dtype)


@triton.jit
def _product(acc, x, w, row0, class0, x_stride, w_stride, N, C, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
             EVEN_D: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """acc (BM, BN) + x w^T."""
    for k0 in range(0, D, BK):
        a = _block(x, row0, k0, x_stride, N, D, BM, BK, TMA, EVEN_D)
        b = _block(w, class0, k0, w_stride, C, D, BN, BK, TMA, EVEN_D)
        if INTERPRETED:  # where bf16 blocks multiply as if their bits were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _raw(x0, w0, x1, w1, stored, class_scale, given, bias, scale, scale_tensor, row0, class0, rows, cols, N, C, D0, D1,
         x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride,
         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr, SCALED: tl.constexpr,
         BIAS_LAST: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """z (BM, BN): the logits before the maps. stored: the products, if they lie in memory already."""
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    if stored is not None:
        acc = tl.load(stored + rows.to(tl.int64)[:, None] * stored_stride + cols[None, :], mask=inside, other=0.0)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        acc = _product(acc, x0, w0, row0, class0, x0_stride, w0_stride, N, C, D0, BM, BN, BK, TMA, EVEN_D, PRECISION, INTERPRETED)
        if x1 is not None:
            acc = _product(acc, x1, w1, row0, class0, x1_stride, w1_stride, N, C, D1, BM, BN, BK, TMA, EVEN_D, PRECISION, INTERPRETED)
    if class_scale is not None:
        acc *= tl.load(class_scale + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if given is not None:
        acc += grid(given, row0, class0, given_stride, N, C, BM, BN)
    if bias is not None and not BIAS_LAST:
        acc += tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        acc *= scale
    if scale_tensor is not None:
        acc *= tl.load(scale_tensor).to(tl.float32)
    if bias is not None and BIAS_LAST:
        acc += tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _first_pick(picks, rows, N, K, class0):
    """How many of each row's picks (ascending, -1 first) lie before class0 of all classes: log2 K looks at them."""
    step = tl.minimum(K, 1)
    while step * 2 <= K:
        step *= 2
    before = tl.zeros_like(rows)
    while step > 0:
        at = before + step - 1
        pick = tl.load(picks + rows.to(tl.int64) * K + at, mask=(rows < N) & (at < K), other=NO_CLASS)
        before += tl.where(pick < class0, step, 0)
        step = step // 2
    return before


@triton.jit
def _pick(picks, rows, N, K, at, class_base):
    """The at-th pick of each row, counted from class_base; far off behind the last."""
    return tl.load(picks + rows.to(tl.int64) * K + at, mask=(rows < N) & (at < K), other=NO_CLASS) - class_base


@triton.jit
def _fold_tile(state, at, x0, w0, x1, w1, stored, class_scale, given, bias, scale, scale_tensor, picks, picked, tensors, numbers,
               column_out, codes, references, codes_stride, block, row0, class0, rows, class_base, N, C, K, D0, D1,
               x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride,
               BEND: tl.constexpr, UPDATE: tl.constexpr, COLUMNS: tl.constexpr, HAS_COLUMNS: tl.constexpr, ONE_PICK: tl.constexpr,
               READ: tl.constexpr, EXCLUDE: tl.constexpr, MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
               TMA: tl.constexpr, EVEN_D: tl.constexpr,
               SCALED: tl.constexpr, BIAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
               INTERPRETED: tl.constexpr, TMA_CODES: tl.constexpr):  # fmt: skip
    """Fold one tile into the band's state. `at`: with one pick a row its class, else the number of picks passed."""
    cols = class0 + tl.arange(0, BN)
    z = _raw(x0, w0, x1, w1, stored, class_scale, given, bias, scale, scale_tensor, row0, class0, rows, cols, N, C, D0, D1,
             x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride, BM, BN, BK, TMA, EVEN_D, SCALED, BIAS_LAST, PRECISION,
             INTERPRETED)  # fmt: skip
    s = BEND(z, tensors, numbers)
    live = (cols < C)[None, :]
    if HAS_COLUMNS:  # a column must not see the rows past N
        live = live & (rows < N)[:, None]
    if MASKED or HAS_COLUMNS:
        s = tl.where(live, s, float("-inf"))
    sx, livex = s, live
    if picks is not None:
        if ONE_PICK:
            hit = cols[None, :] == at[:, None]
            if READ:
                inside = (at >= class0) & (at < class0 + BN) & (rows < N)
                tl.store(picked + rows, tl.sum(tl.where(hit, s, 0.0), axis=1), mask=inside)
        else:
            # one turn for each pick that a row has in this tile, whatever K
            hit = cols[None, :] < tl.zeros_like(rows)[:, None]
            next_pick = _pick(picks, rows, N, K, at, class_base)
            inside = next_pick < class0 + BN
            while tl.max(inside.to(tl.int32), axis=0) > 0:
                here = (cols[None, :] == next_pick[:, None]) & inside[:, None]
                hit = hit | here
                if READ:
                    tl.store(picked + rows.to(tl.int64) * K + at, tl.sum(tl.where(here, s, 0.0), axis=1), mask=inside)
                at += inside.to(tl.int32)
                next_pick = _pick(picks, rows, N, K, at, class_base)
                inside = next_pick < class0 + BN
        if EXCLUDE:
            sx = tl.where(hit, float("-inf"), s)
            livex = live & (hit == 0)
    state = UPDATE(state, s, sx, live, livex, row0, class0, rows, cols, N, C, tensors, numbers, MASKED or HAS_COLUMNS, EXCLUDE,
                   codes, references, codes_stride, TMA_CODES)  # fmt: skip
    if HAS_COLUMNS:
        COLUMNS(s, sx, live, livex, row0, class0, rows, cols, N, C, tensors, numbers, True, EXCLUDE, column_out, block.to(tl.int64) * C)
    return state, at


@triton.jit(do_not_specialize=["class_base", "N", "K", "split_tiles", "splits"])
def fold(x0, w0, x1, w1, stored, class_scale, given, bias, scale_tensor, picks, picked, tensors, row_out, column_out, codes, references,
         scale, numbers, class_base, N, C, K, D0, D1,
         x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride, codes_stride, split_tiles, splits,
         BEND: tl.constexpr, START: tl.constexpr, UPDATE: tl.constexpr, STORE: tl.constexpr, COLUMNS: tl.constexpr,
         HAS_COLUMNS: tl.constexpr, ONE_PICK: tl.constexpr, READ: tl.constexpr, EXCLUDE: tl.constexpr,
         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
         TMA: tl.constexpr, EVEN_D: tl.constexpr, SCALED: tl.constexpr, BIAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
         INTERPRETED: tl.constexpr, TMA_CODES: tl.constexpr):  # fmt: skip
    # codes, references: None, or take what `save` saves of each tile.
    # GROUP bands x all splits run side by side: their x stays in L2, and each tile of w is read once for GROUP bands
    bands = tl.cdiv(N, BM)
    group = tl.program_id(0) // (GROUP * splits)
    width = tl.minimum(bands - group * GROUP, GROUP)
    place = tl.program_id(0) - group * GROUP * splits
    block = group * GROUP + place % width
    split = place // width

    row0 = block * BM
    rows = row0 + tl.arange(0, BM)
    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(C, BN))
    whole = tl.maximum(tl.minimum(last, C // BN), first)
    state = START(BM)
    at = tl.zeros_like(rows)
    if picks is not None:
        if ONE_PICK:
            at = tl.load(picks + rows, mask=rows < N, other=-1) - class_base
        else:
            at = _first_pick(picks, rows, N, K, class_base + first * BN)
    for t in range(first, whole):
        state, at = _fold_tile(
            state, at, x0, w0, x1, w1, stored, class_scale, given, bias, scale, scale_tensor, picks, picked, tensors, numbers, column_out,
            codes, references, codes_stride, block, row0, t * BN, rows, class_base, N, C, K, D0, D1, x0_stride, w0_stride, x1_stride,
            w1_stride, stored_stride, given_stride,
            BEND, UPDATE, COLUMNS, HAS_COLUMNS, ONE_PICK, READ, EXCLUDE, False, BM, BN, BK, TMA, EVEN_D, SCALED, BIAS_LAST, PRECISION,
            INTERPRETED, TMA_CODES)  # fmt: skip
    for t in range(whole, last):  # at most one tile, the ragged last
        state, at = _fold_tile(
            state, at, x0, w0, x1, w1, stored, class_scale, given, bias, scale, scale_tensor, picks, picked, tensors, numbers, column_out,
            codes, references, codes_stride, block, row0, t * BN, rows, class_base, N, C, K, D0, D1, x0_stride, w0_stride, x1_stride,
            w1_stride, stored_stride, given_stride,
            BEND, UPDATE, COLUMNS, HAS_COLUMNS, ONE_PICK, READ, EXCLUDE, True, BM, BN, BK, TMA, EVEN_D, SCALED, BIAS_LAST, PRECISION,
            INTERPRETED, TMA_CODES)  # fmt: skip
    STORE(state, row_out, split.to(tl.int64) * N, rows, N)


@triton.jit(do_not_specialize=["n", "count"])
def merge(parts, out, n, count, LOAD: tl.constexpr, MERGE: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr):
    """parts: pointers to (count, n) states; out: to (n,)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = LOAD(parts, 0, index, n)
    for i in range(1, count):
        state = MERGE(state, LOAD(parts, tl.full((), i, tl.int64) * n, index, n))
    STORE(state, out, 0, index, n)


@triton.jit
def _hits(picks, rows, class0, cols, class_base, N, K, BN: tl.constexpr, ONE_PICK: tl.constexpr):
    """Where in the tile the rows' picks are."""
    if ONE_PICK:
        hit = cols[None, :] == (tl.load(picks + rows, mask=rows < N, other=-1) - class_base)[:, None]
    else:
        hit = cols[None, :] < tl.zeros_like(rows)[:, None]
        at = _first_pick(picks, rows, N, K, class_base + class0)
        next_pick = _pick(picks, rows, N, K, at, class_base)
        inside = next_pick < class0 + BN
        while tl.max(inside.to(tl.int32), axis=0) > 0:
            hit = hit | (cols[None, :] == next_pick[:, None]) & inside[:, None]
            at += inside.to(tl.int32)
            next_pick = _pick(picks, rows, N, K, at, class_base)
            inside = next_pick < class0 + BN
    return hit


@triton.jit
def _note_picks(base, g, picks, rows, class0, cols, class_base, N, K, BN: tl.constexpr, ONE_PICK: tl.constexpr):
    """base (N, K): the tile's g at the rows' picks."""
    if ONE_PICK:
        pick = tl.load(picks + rows, mask=rows < N, other=-1) - class_base
        there = (pick >= class0) & (pick < class0 + BN) & (rows < N)
        tl.store(base + rows, tl.sum(tl.where(cols[None, :] == pick[:, None], g, 0.0), axis=1), mask=there)
    else:
        at = _first_pick(picks, rows, N, K, class_base + class0)
        coming = _pick(picks, rows, N, K, at, class_base)
        there = coming < class0 + BN
        while tl.max(there.to(tl.int32), axis=0) > 0:
            here = (cols[None, :] == coming[:, None]) & there[:, None]
            tl.store(base + rows.to(tl.int64) * K + at, tl.sum(tl.where(here, g, 0.0), axis=1), mask=there)
            at += there.to(tl.int32)
            coming = _pick(picks, rows, N, K, at, class_base)
            there = coming < class0 + BN


@triton.jit(do_not_specialize=["class_base", "N", "K"])
def gradient(x0, w0, x1, w1, stored, class_scale, given, bias, scale_tensor, picks, base, keep, tensors, row_out, out,
             scale, boost, numbers, class_base, N, C, K, D0, D1,
             x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride, out_stride,
             BEND: tl.constexpr, START: tl.constexpr, UPDATE: tl.constexpr, STORE: tl.constexpr, GRADIENT: tl.constexpr,
             ONE_PICK: tl.constexpr, EXCLUDE: tl.constexpr, FOLDED: tl.constexpr, DROPPED: tl.constexpr, SUMS: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, TMA_OUT: tl.constexpr,
             EVEN_D: tl.constexpr, SCALED: tl.constexpr, BIAS_LAST: tl.constexpr,
             PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BOOSTED: tl.constexpr):  # fmt: skip
    """out[i, j] = boost dL/dz_ij but for the picks' own gradients, one tile a program.

    base: None where no fold counts the picks (`add_picks` writes over them); else takes those folds' gradient at the picks (N, K).
    FOLDED: the row folds' states of each tile go to row_out (tiles, N). Of folds whose gradient needs no state: one pass for both.
    picks: None where neither asks for them; DROPPED: their stored logits are -inf, whatever the bias. SUMS: are all folds sums?"""
    bands, tiles = tl.cdiv(N, BM), tl.cdiv(C, BN)
    group = tl.program_id(0) // (GROUP * tiles)
    width = tl.minimum(bands - group * GROUP, GROUP)
    place = tl.program_id(0) - group * GROUP * tiles
    row0 = (group * GROUP + place % width) * BM
    class0 = (place // width) * BN
    rows, cols = row0 + tl.arange(0, BM), class0 + tl.arange(0, BN)

    z = _raw(x0, w0, x1, w1, stored, class_scale, given, bias, scale, scale_tensor, row0, class0, rows, cols, N, C, D0, D1,
             x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride, BM, BN, BK, TMA, EVEN_D, SCALED, BIAS_LAST, PRECISION,
             INTERPRETED)  # fmt: skip
    s = BEND(z, tensors, numbers)
    live = (cols < C)[None, :]
    if DROPPED:  # -inf and a bias of inf would be NaN
        at = stored + rows.to(tl.int64)[:, None] * stored_stride + cols[None, :]
        s = tl.where(tl.load(at, mask=(rows < N)[:, None] & live, other=0.0) == float("-inf"), float("-inf"), s)
    if FOLDED and not SUMS:
        s = tl.where(live, s, float("-inf"))
    sx, livex = s, live
    if EXCLUDE:
        hit = _hits(picks, rows, class0, cols, class_base, N, K, BN, ONE_PICK)
        sx = tl.where(hit, float("-inf"), s)
        livex = live & (hit == 0)
    if FOLDED:
        inside = livex & (rows < N)[:, None]
        state = UPDATE(
            START(BM), s, sx, live, inside, row0, class0, rows, cols, N, C, tensors, numbers, True, EXCLUDE, None, None, 0, False
        )
        STORE(state, row_out, (class0 // BN).to(tl.int64) * N, rows, N)
    NOTED: tl.constexpr = EXCLUDE and base is not None  # pyright: ignore[reportAssignmentType]
    g = GRADIENT(z, s, sx, live, livex, row0, class0, rows, cols, N, C, tensors, numbers, False, NOTED, None)
    if keep is not None:
        g = tl.where(tl.load(keep + rows, mask=rows < N, other=0)[:, None] != 0, g, 0.0)
    if BOOSTED:
        g *= boost
    if base is not None:
        _note_picks(base, g, picks, rows, class0, cols, class_base, N, K, BN, ONE_PICK)
    if TMA_OUT:
        out.store([row0, class0], _rounded(g, out.dtype, INTERPRETED))
    else:
        to = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
        tl.store(to, _rounded(g, out.dtype.element_ty, INTERPRETED), mask=(rows < N)[:, None] & live)


@triton.jit
def _log(e):
    """log e of normal numbers, within 1e-5; of 0 -88. A code is off by more, and `tl.log2`, good to the last bit, takes 25 instructions."""
    bits = e.to(tl.int32, bitcast=True)
    f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    # least maximum of |log2(1 + f) - f p(f)| on [0, 1), 1.43e-5, by reweighted least squares
    p = 1.44196547 + f * (-0.70966137 + f * (0.41759159 + f * (-0.19626464 + f * 0.0463833)))
    return ((bits >> 23).to(tl.float32) - 127.0 + f * p) * 0.6931471805599453


@triton.jit(do_not_specialize=["class_base", "N", "C", "K"])
def saved_gradient(codes, references, picks, base, keep, tensors, out, numbers, class_base, N, C, K, codes_stride, out_stride,
                   GRADIENT: tl.constexpr, MAPPED: tl.constexpr, ONE_PICK: tl.constexpr, EXCLUDE: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """`gradient` from what `save` wrote of tiles as wide as these. out may be where the codes are.

    Rows of both reach to the end of a last, ragged tile: without a mask for classes 16 bytes are read and written at once. 8 bytes a
    logit in flight allow 26 instructions (H200: 4.3 TB/s, 132 multiprocessors that issue 128 at 1.7 GHz)."""
    tiles = tl.cdiv(C, BN)
    row0, class0 = (tl.program_id(0) // tiles) * BM, (tl.program_id(0) % tiles) * BN
    rows, cols = row0 + tl.arange(0, BM), class0 + tl.arange(0, BN)
    there = (rows < N)[:, None]
    e = tl.load(codes + rows.to(tl.int64)[:, None] * codes_stride + cols[None, :], mask=there, other=0.0).to(tl.float32)
    reference = tl.load(references + tl.full((), class0 // BN, tl.int64) * N + rows, mask=rows < N, other=0.0)
    s = e
    if MAPPED:  # its slope is told by its output; far below, where there is none at -inf
        s = _log(e) - 10.39720770839918 + reference[:, None]  # 15 log 2
    live = (cols < C)[None, :]
    livex = live
    if EXCLUDE:
        livex = live & (_hits(picks, rows, class0, cols, class_base, N, K, BN, ONE_PICK) == 0)
    g = GRADIENT(e, s, s, live, livex, row0, class0, rows, cols, N, C, tensors, numbers, False, EXCLUDE, reference)
    if keep is not None:
        g = tl.where(tl.load(keep + rows, mask=rows < N, other=0)[:, None] != 0, g, 0.0)
    if picks is not None:
        _note_picks(base, g, picks, rows, class0, cols, class_base, N, K, BN, ONE_PICK)
    to = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    tl.store(to, _rounded(g, out.dtype.element_ty, INTERPRETED), mask=there)


@triton.jit
def _raw_picks(x0, w0, x1, w1, stored, class_scale, given, bias, scale, scale_tensor, rows, pick, inside, C, D0, D1,
               x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride,
               BLOCK: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr, BIAS_LAST: tl.constexpr):  # fmt: skip
    """z (BLOCK,) of rows at their picks: N K dot products."""
    if stored is not None:
        acc = tl.load(stored + rows * stored_stride + pick, mask=inside, other=0.0)
    else:
        acc = _row_dot(x0, w0, rows, pick, inside, D0, x0_stride, w0_stride, BLOCK, BK)
        if x1 is not None:
            acc += _row_dot(x1, w1, rows, pick, inside, D1, x1_stride, w1_stride, BLOCK, BK)
    if class_scale is not None:
        acc *= tl.load(class_scale + pick, mask=inside, other=0.0).to(tl.float32)
    if given is not None:
        acc += tl.load(given + rows * given_stride + pick, mask=inside, other=0.0).to(tl.float32)
    if bias is not None and not BIAS_LAST:
        acc += tl.load(bias + pick, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        acc *= scale
    if scale_tensor is not None:
        acc *= tl.load(scale_tensor).to(tl.float32)
    if bias is not None and BIAS_LAST:
        acc += tl.load(bias + pick, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _row_dot(x, w, rows, pick, inside, D, x_stride, w_stride, BLOCK: tl.constexpr, BK: tl.constexpr):
    total = tl.zeros((BLOCK, BK), tl.float32)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        there = inside[:, None] & (k < D)[None, :]
        a = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(w + pick.to(tl.int64)[:, None] * w_stride + k[None, :], mask=there, other=0.0).to(tl.float32)
        total += a * b
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["class_base", "N", "C", "K"])
def drop_picks(picks, stored, class_base, N, C, K, stride, BLOCK: tl.constexpr):
    """stored (N, C) = -inf at the picks, where a fold that leaves them out has nothing to find."""
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    for k in range(0, K):
        pick = tl.load(picks + rows * K + k, mask=rows < N, other=-1) - class_base
        inside = (pick >= 0) & (pick < C) & (rows < N)
        tl.store(stored + rows * stride + pick, tl.full((BLOCK,), float("-inf"), tl.float32), mask=inside)


@triton.jit(do_not_specialize=["class_base", "N", "C", "K"])
def read_picks(x0, w0, x1, w1, stored, class_scale, given, bias, scale_tensor, picks, picked, tensors,
               scale, numbers, class_base, N, C, K, D0, D1, x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride,
               BEND: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr, BIAS_LAST: tl.constexpr):  # fmt: skip
    """picked (N, K): the logits at those picks that are among the classes [class_base, class_base + C)."""
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    for k in range(0, K):
        pick = tl.load(picks + rows * K + k, mask=rows < N, other=-1) - class_base
        inside = (pick >= 0) & (pick < C) & (rows < N)
        z = _raw_picks(x0, w0, x1, w1, stored, class_scale, given, bias, scale, scale_tensor, rows, pick, inside, C, D0, D1,
                       x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride, BLOCK, BK, SCALED,
                           BIAS_LAST)  # fmt: skip
        tl.store(picked + rows * K + k, BEND(z, tensors, numbers), mask=inside)


@triton.jit(do_not_specialize=["class_base", "N", "C", "K"])
def add_picks(x0, w0, x1, w1, stored, class_scale, given, bias, scale_tensor, picks, h, base, tensors, out,
              scale, boost, numbers, class_base, N, C, K, D0, D1,
              x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride, out_stride,
              MAP_BACK: tl.constexpr, HAS_MAPS: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
              BIAS_LAST: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """out[i, pick_ik] = base_ik + boost (sum of h over equal picks of the row, through the maps), rounded once.

    h: (N, K), 0 where a row does not count. base: (N, K), boosted already, or None for 0. Equal picks write the same number."""
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    for k in range(0, K):
        pick = tl.load(picks + rows * K + k, mask=rows < N, other=-1) - class_base
        inside = (pick >= 0) & (pick < C) & (rows < N)
        g = tl.zeros((BLOCK,), tl.float32)
        for j in range(0, K):
            same = inside & (tl.load(picks + rows * K + j, mask=rows < N, other=-1) - class_base == pick)
            g += tl.load(h + rows * K + j, mask=same, other=0.0)
        g *= boost
        if HAS_MAPS:
            z = _raw_picks(x0, w0, x1, w1, stored, class_scale, given, bias, scale, scale_tensor, rows, pick, inside, C, D0, D1,
                           x0_stride, w0_stride, x1_stride, w1_stride, stored_stride, given_stride, BLOCK, BK, SCALED,
                           BIAS_LAST)  # fmt: skip
            g = MAP_BACK(g, z, tensors, numbers)
        if base is not None:
            g += tl.load(base + rows * K + k, mask=inside, other=0.0)
        tl.store(out + rows * out_stride + pick, _rounded(g, out.dtype.element_ty, INTERPRETED), mask=inside)

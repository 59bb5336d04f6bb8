"""The certified filter (engines/filter.py) on the fused engine: which columns of a slab of G are kept, and the products of those alone.

A block of rows, on which a column is kept or dropped, is all rows of a launch, or an even share of at most `FILTER_BAND` of them: one
list of columns serves a whole product, and a kept row of w is read once for all. The lists stay on the device. For a slab of classes, for
each band:

    G' = G with zeros at the picks             zero_picks      N K writes; it notes the columns that have one
    n_j = sum over the band's rows of G'_ij^2  column_norms    reads G once
    keep = ColumnFilter.choose(n)              a sort of the slab's norms, and sums: some 20 small launches
    columns = the kept ones first, ascending   a running sum and a scatter
    m, a of the dropped part of G'             Tail.of         reads G twice (tail.py)
    K = G[:, columns], with the picks          compact         reads G once, writes the kept share k of it
    dw[columns] += K^T x, dx += K w[columns]   add_dw, add_dx  2 k NCD flops each
    dw += a (m^T x), dx += m (a^T w)           torch           reads and writes both sums once more, and w once

Workspace beside that of the exact gradient: K (band x slab, in the operands' type), partial norms (fp32, one for 128 rows and a class) and
about 100 bytes a band and class for the choice.

What it costs where nothing is dropped (flat data, early in training). The host cannot know that: to read a count and call the library's
product would be a synchronisation, which no CUDA graph can capture. So the same kernels multiply all columns, at their rate and not the
library's; and G is read four times and written once more than in the exact gradient: 10 bytes a logit in 16 bits, 11 % of the time of
both products at D = 4096 (by the rates of an H200, 4.3 TB/s and 790 TFLOP/s; not measured).

Everything else (the bias) is read off the whole of G. No atomics, one program for each number, every order fixed: same bits every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bigclass.core.engines.filter import FILTER_BAND, ColumnFilter
from bigclass.core.engines.fused import filtered_kernels as kernels
from bigclass.core.engines.fused import launch
from bigclass.core.engines.support import filter_reason, interpreting
from bigclass.core.engines.tail import Tail, matvec
from bigclass.core.engines.tiles import Pool, Span, spans

if TYPE_CHECKING:
    from bigclass.core.engines.fused.problem import Problem
    from bigclass.core.engines.tiles import TileMaker
    from bigclass.core.stream import Stream


def make_filter(stream: Stream, maker: TileMaker, needs: Sequence[bool], dtype: torch.dtype) -> ColumnFilter | None:
    """The filter of one gradient, or None where it is exact. needs: flags of the stream's tensors. dtype: that of G."""
    if not stream.grad_filter or filter_reason(stream, needs) is not None:
        return None
    # Norms are those of rounded numbers: both sides of the promise may be off by half an ulp of G's type.
    tolerance = stream.grad_filter * (1.0 - torch.finfo(dtype).eps)
    return ColumnFilter(tolerance, max(maker.rows.count, 1), maker.c, torch.empty(0, dtype=maker.dtype, device=stream.device))


def bands(rows: int) -> list[Span]:
    """The blocks of the rows of a launch, of one size but for the last."""
    count = -(-rows // FILTER_BAND)
    return spans(rows, -(-rows // count))


@dataclass(frozen=True)
class Kept:
    """What each band keeps of a slab. columns: (b, C') int32, the kept ones first, ascending. counts: (b,) int32, how many they are.

    tails: of what each band dropped."""

    columns: Tensor
    counts: Tensor
    tails: tuple[Tail, ...] = ()

    @classmethod
    def of(cls, keep: Tensor) -> Kept:
        """From keep (b, c) bool. Each column gets a place of its own, so that the scatter has one outcome."""
        number = torch.arange(keep.shape[1], dtype=torch.int32, device=keep.device)
        before = keep.cumsum(1, dtype=torch.int32)  # with itself
        counts = before[:, -1].contiguous()
        place = torch.where(keep, before - 1, counts.unsqueeze(1) + number - before)
        columns = torch.empty((keep.shape[0], -(-keep.shape[1] // 4) * 4), dtype=torch.int32, device=keep.device)  # rows of whole 16 bytes
        columns.scatter_(1, place.long(), number.expand(keep.shape))
        return cls(columns, counts)


def choose(problem: Problem, g: Tensor, first_row: int, chooser: ColumnFilter, pool: Pool) -> Kept:
    """Which columns of g (N, C), the gradient of this problem's rows, each band keeps. Leaves zeros at the picks.

    first_row: of the problem, as the filter names its blocks."""
    own = bands(problem.n)
    band, device, forced = own[0].size, g.device, None
    if problem.picks is not None and problem.k:
        forced = torch.zeros((len(own), problem.c), dtype=torch.uint8, device=device)
        launch.start(
            kernels.zero_picks, -(-problem.n // launch.MERGE_BLOCK), device,
            [problem.picks, g, forced, problem.class_base, problem.n, problem.c, problem.k, band, g.stride(0)],
            {"BLOCK": launch.MERGE_BLOCK},
        )  # fmt: skip
    tile = launch.COLUMNS
    tiles = -(-band // tile.BM)
    parts = pool.get("norms", len(own) * tiles, problem.c)
    launch.start(
        kernels.column_norms, len(own) * tiles * -(-problem.c // tile.BN), device,
        [g, parts, problem.n, problem.c, band, tiles, g.stride(0)], {"BM": tile.BM, "BN": tile.BN}, tile,
    )  # fmt: skip
    norms = parts.view(len(own), tiles, problem.c).sum(1)
    blocks = torch.arange(first_row, first_row + problem.n, band, device=device)
    keep = chooser.choose(norms, None if forced is None else forced.view(torch.bool), blocks)
    tails = tuple([Tail.of(g[r.start : r.stop], ~keep[b]) for b, r in enumerate(own)])
    for r, tail in zip(own, tails, strict=True):
        chooser.returned(first_row + r.start, tail.back)
    return replace(Kept.of(keep), tails=tails)


def multiply(
    g: Tensor, kept: Kept, xs: Sequence[Tensor], ws: Sequence[Tensor], dxs: Sequence[Tensor | None], dws: Sequence[Tensor | None],
    alpha_x: float, alpha_w: float, pool: Pool,
) -> None:  # fmt: skip
    """dx += alpha_x K w[columns] and dw[columns] += alpha_w K^T x of each pair, K the kept columns of g (N, C).

    xs (N, D), ws (C, D): in g's type, features side by side. dxs (N, D), dws (C, D): sums in fp32; None: not wanted."""
    config = launch.product_config(launch.architecture(g.device), g.dtype)
    width = -(-g.shape[1] // config.BM) * config.BM
    for b, r in enumerate(bands(g.shape[0])):
        copy = pool.get("kept columns", r.size, width * g.dtype.itemsize // 4).view(g.dtype)
        columns, rows = kept.columns[b], launch.COLUMNS.BM * launch.COLUMNS.BN // config.BM
        launch.start(
            kernels.compact, -(-r.size // rows) * (width // config.BM), g.device,
            [g[r.start : r.stop], columns, kept.counts, copy, b, r.size, g.stride(0), width], {"BM": rows, "BN": config.BM}, launch.COLUMNS,
        )  # fmt: skip
        for x, w, dx, dw in zip(xs, ws, dxs, dws, strict=True) if kept.tails else ():
            tail = kept.tails[b]
            if dx is not None:
                dx[r.start : r.stop].addr_(tail.m, matvec(w.t(), tail.a), alpha=alpha_x)
            if dw is not None:
                dw.addr_(tail.a, matvec(x[r.start : r.stop].t(), tail.m), alpha=alpha_w)
        for x, total in zip(xs, dws, strict=True):
            if total is not None:
                _product(copy, columns, kept.counts, b, x[r.start : r.stop], total, alpha_w, config, classes=g.shape[1])
        for w, total in zip(ws, dxs, strict=True):
            if total is not None:
                _product(copy, columns, kept.counts, b, w, total[r.start : r.stop], alpha_x, config)


def _product(
    copy: Tensor, columns: Tensor, counts: Tensor, band: int, operand: Tensor, out: Tensor, alpha: float, config: launch.Config,
    classes: int | None = None,
) -> None:  # fmt: skip
    """out += alpha K operand[columns]; classes: how many there are, then out[columns] += alpha K^T operand."""
    dx, d = classes is None, operand.shape[1]
    # rows of w are found by way of the list, so only K is read by descriptor there; and the pipeline takes two turns more to get as deep
    tma = config.tma and (dx or launch.describable([operand]))
    config = launch.deeper(config, 2) if dx else config
    block = (config.BM, config.BK) if dx else (config.BK, config.BM)
    launch.start(
        kernels.add_dx if dx else kernels.add_dw,
        -(-(copy.shape[0] if classes is None else classes) // config.BM) * -(-d // config.BN),
        out.device,
        [launch.operand(copy, *block, tma), columns, counts, launch.operand(operand, config.BK, config.BN, tma and not dx), out,
         alpha, band, copy.shape[0], d, copy.stride(0), operand.stride(0), out.stride(0)],
        {"BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP": config.group, "TMA": tma,
         "PRECISION": launch.precision(operand.dtype), "INTERPRETED": interpreting()},
        config,
    )  # fmt: skip

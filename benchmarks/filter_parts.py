"""The parts of the study that look at one problem at a time, as rows of plain values. What they mean: filter_study.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import bigclass
from bigclass.core.engines.filter import FILTER_ROWS, MOST

from . import filter_analysis as fa
from .filter_data import Case, Sizes
from .filter_training import tolerance_name
from .timing import interleave

TOLERANCES = (2.0**-10, 2.0**-8, 2.0**-6, 2.0**-4)
BLOCK_ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TILE_CLASSES = (128, 256)
THRESHOLD = 2.0**-12  # of Cut Cross-Entropy for bfloat16: tiles where every |p - (is it the target)| is below (arXiv:2411.09009)

ROWS = 128  # that share a list, where the size of blocks is not the question
ENGINE_ROWS = 2048  # of `errors` and `threshold`
PRODUCT_ROWS = 1024  # of the parts that make many products
DRAWS = 8
OBSERVED_ROWS = 1024  # whose logit gradient is read off the engine, at the price of as many more features

Row = dict[str, Any]
CPU = torch.device("cpu")


# errors


def errors(case: Case, rounds: int) -> list[Row]:
    """The library's own engine, exact and at each tolerance."""
    case = case.head(ENGINE_ROWS)
    exact = _engine(case, None)()
    settings = (None, *TOLERANCES)
    times = interleave([_engine(case, t) for t in settings], [1] * len(settings), rounds, CPU)
    medians = [sorted(samples)[len(samples) // 2] for samples in times]
    observed = case.head(OBSERVED_ROWS)
    g = fa.logit_gradient(observed.x, observed.w, observed.b, observed.y)
    total = fa.column_norms(g.rest, FILTER_ROWS).sum(1, dtype=torch.float64)
    kept = _kept_of_whole_rows(case)
    rows = []
    for tolerance, seconds, samples in zip(TOLERANCES, medians[1:], times[1:], strict=True):
        off = fa.column_norms(engine_gradient(observed, tolerance).sub_(g.rest), FILTER_ROWS).sum(1, dtype=torch.float64)
        dx, dw = _engine(case, tolerance)()
        reported, promised = _reported(case, tolerance)
        rows.append(
            {
                "kind": case.kind,
                "loss": float(g.loss.mean()),
                "tolerance": tolerance,
                "kept": kept[tolerance],
                "kept_reported": reported,
                "promised": promised,
                "worst_block": float((off / total).max().sqrt()),
                "pooled": float((off.sum() / total.sum()).sqrt()),
                "dx": fa.relative(dx - exact[0], exact[0]),
                "dw": fa.relative(dw - exact[1], exact[1]),
                "time_ratio": seconds / medians[0],
                "seconds": samples,
                "exact_seconds": times[0],
            }
        )
    return rows


def _engine(case: Case, tolerance: float | None) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the mean loss and its gradients dx, dw."""
    x, w = case.x.detach().requires_grad_(), case.w.detach().requires_grad_()

    def call() -> tuple[Tensor, ...]:
        loss = bigclass.linear_cross_entropy(x, w, case.y, linear_bias=case.b, grad_filter=tolerance, engine="tiled")
        return torch.autograd.grad(loss, (x, w))  # type: ignore[arg-type]

    call()  # warm
    return call


def engine_gradient(case: Case, tolerance: float | None) -> Tensor:
    """(N, C): G' as the engine's products saw it, whatever it dropped and put in its place.

    x gets one more feature for each row, 1 on that row, and w zeros in its place. No logit changes, and dw of that feature is the row of G.
    """
    n, d = case.x.shape
    x, w = torch.cat((case.x, torch.eye(n)), 1), torch.cat((case.w, case.w.new_zeros(case.w.shape[0], n)), 1)
    _, dw = _engine(Case(case.kind, x, w, case.b, case.y, case.popularity), tolerance)()
    made = dw[:, d:].t() * n  # of the mean over rows
    return made.scatter(1, case.y.unsqueeze(1), 0.0)


def _kept_of_whole_rows(case: Case) -> dict[float, float]:
    """Share that the timed call multiplies, by tolerance: the choice among all classes of a block, blocks above MOST whole."""
    g = fa.logit_gradient(case.x, case.w, case.b, case.y)
    forced = fa.target_columns(case.y, FILTER_ROWS, case.w.shape[0])
    shares = fa.work_share(fa.kept_shares(fa.column_norms(g.rest, FILTER_ROWS), TOLERANCES, forced), MOST)
    return dict(zip(TOLERANCES, shares.mean(1).tolist(), strict=True))


def _reported(case: Case, tolerance: float) -> tuple[float, float]:
    """What the library itself says it kept and promises; read after the backward, which fills it in.

    With return_stats it makes the tiles again and chooses slab by slab, so it keeps more than the call that is timed."""
    x, w = case.x.detach().requires_grad_(), case.w.detach().requires_grad_()
    made = bigclass.linear_cross_entropy(x, w, case.y, linear_bias=case.b, grad_filter=tolerance, engine="tiled", return_stats=True)
    assert isinstance(made, tuple)
    made[0].backward()
    return float(made[1].kept_share), float(made[1].promised_error)


# blocks


def blocks(case: Case, rounds: int) -> list[Row]:
    """Kept share against the rows that share a list, and with one budget for all blocks of 128 rows together."""
    g = fa.logit_gradient(case.x, case.w, case.b, case.y)
    norms = fa.column_norms(g.rest, BLOCK_ROWS[0])
    forced = fa.target_columns(case.y, BLOCK_ROWS[0], case.w.shape[0])
    found = []
    for size in BLOCK_ROWS:
        if size > BLOCK_ROWS[0]:
            norms, forced = fa.join_blocks(norms, 2), fa.join_blocks(forced, 2)
        if size > case.x.shape[0]:
            break
        if size == ROWS:
            pooled = fa.kept_shares(norms.view(1, -1), TOLERANCES, forced.view(1, -1))[:, 0]
            found += [_block_row(case, "pooled", t, float(p), float("nan"), forced) for t, p in zip(TOLERANCES, pooled, strict=True)]
        shares = fa.kept_shares(norms, TOLERANCES, forced)
        work = fa.work_share(shares, MOST).mean(1)
        rows = zip(TOLERANCES, shares.mean(1).tolist(), work.tolist(), strict=True)
        found += [_block_row(case, size, tolerance, kept, computed, forced) for tolerance, kept, computed in rows]
    return found


def _block_row(case: Case, size: int | str, tolerance: float, kept: float, computed: float, forced: Tensor) -> Row:
    row = {"kind": case.kind, "rows": size, "tolerance": tolerance, "kept": kept, "forced": float(forced.double().mean())}
    return row if math.isnan(computed) else row | {"computed": computed}


def block_rates(sizes: Sizes, rounds: int) -> Row:
    """What a kept column costs in blocks of each size: gathered and multiplied, against the same flops in one product of all rows.

    Both products of the backward, a tenth of the columns kept, drawn at random; dw added to in place.
    """
    n, c, d = sizes.rows, sizes.classes, sizes.features
    generator = torch.Generator().manual_seed(0)
    g, x, w = (torch.randn(*shape, generator=generator) for shape in ((n, c), (n, d), (c, d)))
    dx, dw = torch.empty(n, d), torch.empty(c, d)

    def whole() -> None:
        torch.mm(g, w, out=dx)
        torch.mm(g.t(), x, out=dw)

    def in_blocks(size: int) -> Callable[[], None]:
        columns = torch.randperm(c, generator=generator)[: c // 10].sort().values

        def call() -> None:
            part, own = g[:size], x[:size]
            kept = part.index_select(1, columns)
            torch.mm(kept, w.index_select(0, columns), out=dx[:size])
            dw.index_add_(0, columns, kept.t() @ own)

        return call

    fitting = [size for size in BLOCK_ROWS if size <= n]
    calls = [whole, *map(in_blocks, fitting)]
    for call in calls:
        call()
    repeats = [1, *(max(1, 1024 // size) for size in fitting)]
    medians = [sorted(samples)[len(samples) // 2] for samples in interleave(calls, repeats, rounds, CPU)]
    of_row_column = medians[0] / (n * c)
    rates = {str(size): t / (size * (c // 10)) / of_row_column for size, t in zip(fitting, medians[1:], strict=True)}
    return {"cost_of_kept_column": rates}


# orders


def orders(case: Case, rounds: int) -> list[Row]:
    """Columns with sorted rows, tiles with sorted classes."""
    g = fa.logit_gradient(case.x, case.w, case.b, case.y)
    c = case.w.shape[0]
    found = []
    for name, order in fa.row_orders(g, case.x, ROWS).items():
        norms, forced = fa.column_norms(g.rest, ROWS, order), fa.target_columns(case.y, ROWS, c, order)
        found += _order_rows(case, "columns", name, norms, forced)
    norms, forced = fa.column_norms(g.rest, ROWS), fa.target_columns(case.y, ROWS, c)
    for name, order in fa.class_orders(case.x, case.w, case.b, case.popularity).items():
        for width in TILE_CLASSES:
            found += _order_rows(case, f"tiles of {width}", name, fa.tiles(norms, width, order), fa.tiles(forced, width, order))
    return found


def _order_rows(case: Case, what: str, order: str, norms: Tensor, forced: Tensor) -> list[Row]:
    shares = fa.kept_shares(norms, TOLERANCES, forced).mean(1).tolist()
    return [
        {"kind": case.kind, "what": what, "order": order, "tolerance": t, "kept": kept} for t, kept in zip(TOLERANCES, shares, strict=True)
    ]


# correction, random


def _product_case(case: Case) -> tuple[Case, fa.Gradient, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(case, gradient, norms, forced, exact dx and dw) of the first PRODUCT_ROWS rows."""
    case = case.head(PRODUCT_ROWS)
    g = fa.logit_gradient(case.x, case.w, case.b, case.y)
    forced = fa.target_columns(case.y, ROWS, case.w.shape[0])
    return case, g, fa.column_norms(g.rest, ROWS), forced, fa.gradients(g, case.x, case.w)


def correction(case: Case, rounds: int) -> list[Row]:
    """Errors with the dropped part left out, and with a rank-one stand-in for each block of 128 rows, or one for all rows."""
    case, g, norms, forced, (dx, dw) = _product_case(case)
    total = float(norms.sum(dtype=torch.float64))
    found = []
    for tolerance in TOLERANCES:
        keep = fa.kept_columns(norms, tolerance, forced)
        dropped = fa.dropped_part(g.rest, keep, ROWS)
        lost = dropped @ case.w, dropped.t() @ case.x
        row = {
            "kind": case.kind,
            "tolerance": tolerance,
            "kept": float(keep.double().mean()),
            "g": fa.block_errors(norms, keep)[1],
            "dx": fa.relative(lost[0], dx),
            "dw": fa.relative(lost[1], dw),
        }
        for name, rows in (("block", ROWS), ("all", case.x.shape[0])):
            made = fa.mean_correction(dropped, case.x, case.w, rows)
            row |= {
                f"g_{name}": math.sqrt(made.residual / total),
                f"dx_{name}": fa.relative(lost[0] - made.dx, dx),
                f"dw_{name}": fa.relative(lost[1] - made.dw, dw),
            }
        found.append(row | _kept_beside_correction(case, g, tolerance, forced, total))
    return found


def _kept_beside_correction(case: Case, g: fa.Gradient, tolerance: float, forced: Tensor, total: float) -> Row:
    """What must be kept if it is the stand-in's own error, not the dropped part, that is held to the tolerance."""
    keep = fa.kept_beside_correction(g.rest, tolerance, ROWS, forced)
    dropped = fa.dropped_part(g.rest, keep, ROWS)
    made = fa.mean_correction(dropped, case.x, case.w, ROWS)
    dx, dw = fa.gradients(g, case.x, case.w)
    return {
        "kept_fit": float(keep.double().mean()),
        "g_fit": math.sqrt(made.residual / total),
        "dx_fit": fa.relative(dropped @ case.w - made.dx, dx),
        "dw_fit": fa.relative(dropped.t() @ case.x - made.dw, dw),
    }


def random(case: Case, rounds: int) -> list[Row]:
    """Dropping against drawing at the same expected share: the error of one draw and of the mean of several."""
    case, g, norms, forced, (dx, dw) = _product_case(case)
    found = []
    for tolerance in TOLERANCES[2:]:
        keep = fa.kept_columns(norms, tolerance, forced)
        dropped = fa.dropped_part(g.rest, keep, ROWS)
        q = fa.keep_probabilities(norms, keep.sum(1).double(), forced)
        row = {
            "kind": case.kind,
            "tolerance": tolerance,
            "kept": float(keep.double().mean()),
            "g_drop": fa.block_errors(norms, keep)[1],
            "dx_drop": fa.relative(dropped @ case.w, dx),
            "dw_drop": fa.relative(dropped.t() @ case.x, dw),
            "g_draw": fa.draw_error(norms, q),
        }
        found.append(row | _draws(case, g, q, dx, dw))
    return found


def _draws(case: Case, g: fa.Gradient, q: Tensor, dx: Tensor, dw: Tensor) -> Row:
    """Errors of one draw (root of the mean square) and of the mean of DRAWS."""
    generator = torch.Generator().manual_seed(0)
    sums, squares = [torch.zeros_like(dx), torch.zeros_like(dw)], [0.0, 0.0]
    for _ in range(DRAWS):
        factor = fa.draw(q, generator) - 1.0
        off = fa.spread(factor.to(g.rest.dtype), ROWS, g.rest.shape[0]).mul_(g.rest)
        for i, part in enumerate((off @ case.w, off.t() @ case.x)):
            sums[i] += part
            squares[i] += float(part.norm(dtype=torch.float64) ** 2)
    made = {}
    for i, (name, exact) in enumerate((("dx", dx), ("dw", dw))):
        made[f"{name}_draw"] = math.sqrt(squares[i] / DRAWS) / float(exact.norm(dtype=torch.float64))
        made[f"{name}_mean"] = fa.relative(sums[i] / DRAWS, exact)
    return made


# threshold


def threshold(case: Case, rounds: int) -> list[Row]:
    """Tiles of 128 rows x 256 classes dropped by a fixed threshold on every entry, classes as they come and by mean logit."""
    case = case.head(ENGINE_ROWS)
    g = fa.logit_gradient(case.x, case.w, case.b, case.y)
    norms, peaks = fa.column_norms(g.rest, ROWS), fa.column_peaks(g, ROWS)
    exact = fa.gradients(g, case.x, case.w)
    width, orders = TILE_CLASSES[-1], fa.class_orders(case.x, case.w, case.b, case.popularity)
    found = []
    for name in ("as they come", "by mean logit"):
        order = orders[name]
        keep = spread_tiles(fa.tiles(peaks >= THRESHOLD, width, order), width, order, peaks.shape[1])
        worst, pooled = fa.block_errors(norms, keep)
        dropped = fa.dropped_part(g.rest, keep, ROWS)
        at_target = g.at_target.masked_fill(fa.spread(keep, ROWS, len(g.target)).gather(1, g.target.unsqueeze(1)).squeeze(1), 0.0)
        lost = fa.gradients(replace(g, rest=dropped, at_target=at_target), case.x, case.w)
        found.append(
            {
                "kind": case.kind,
                "order": name,
                "loss": float(g.loss.mean()),
                "kept": float(keep.double().mean()),
                "worst_block": worst,
                "pooled": pooled,
                "mass": float(dropped.sum(dtype=torch.float64) / g.rest.sum(dtype=torch.float64)),
                "dx": fa.relative(lost[0], exact[0]),
                "dw": fa.relative(lost[1], exact[1]),
            }
        )
    return found


def spread_tiles(keep: Tensor, width: int, order: Tensor | None, classes: int) -> Tensor:
    """(B, C) from (B, T): undo `tiles`."""
    columns = keep.repeat_interleave(width, 1)[:, :classes]
    return columns if order is None else torch.empty_like(columns).index_copy_(1, order, columns)


PER_CASE: dict[str, Callable[[Case, int], list[Row]]] = {
    "errors": errors,
    "blocks": blocks,
    "orders": orders,
    "correction": correction,
    "random": random,
    "threshold": threshold,
}
ONCE: dict[str, Callable[[Sizes, int], Row]] = {"blocks": block_rates}

__all__ = ["DRAWS", "ONCE", "PER_CASE", "THRESHOLD", "TOLERANCES", "tolerance_name"]

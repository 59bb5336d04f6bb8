"""The certified filter taken apart: what dropping, ordering, correcting and drawing columns of a logit gradient does. Pure functions.

For the summed cross-entropy of rows i over classes j, with targets y_i:

    G'_ij = softmax(x_i . w_j + b_j), and 0 at j = y_i             h_i = p_iy - 1, the entry at the target
    dx    = G' w + h w_y                                           dw  = G'^T x + sum over rows with y_i = j of h_i x_i

A *column* is a class over a block of consecutive rows, n_bj = sum of G'_ij^2 over block b its squared norm. The filter keeps a set of
columns for each block (bigclass/core/engines/filter.py). Everything here is dense and meant for a few thousand rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gradient:
    """The logit gradient of a problem, the entries at the targets apart."""

    rest: Tensor  # (N, C) G'
    at_target: Tensor  # (N,) h
    target: Tensor  # (N,)
    loss: Tensor  # (N,)

    def head(self, rows: int) -> Gradient:
        """That of the first rows."""
        return Gradient(self.rest[:rows], self.at_target[:rows], self.target[:rows], self.loss[:rows])

    def predicted(self) -> Tensor:
        """The class (N,) of the largest logit."""
        largest, at = self.rest.max(1)
        return torch.where(1.0 + self.at_target >= largest, self.target, at)


def logit_gradient(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Gradient:
    """G' and h. x (N, D), w (C, D), b (C,), y (N,). The target is left out of the sum, so that sure rows lose no digits."""
    z = x @ w.t() if b is None else torch.addmm(b, x, w.t())
    own = z.gather(1, y.unsqueeze(1))
    z.scatter_(1, y.unsqueeze(1), -torch.inf)
    others = z.logsumexp(1, keepdim=True)
    z.sub_(torch.logaddexp(others, own)).exp_()
    ahead = (others - own).squeeze(1)
    return Gradient(z, -torch.sigmoid(ahead), y, torch.nn.functional.softplus(ahead))


def gradients(g: Gradient, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """dx (N, D) and dw (C, D)."""
    dx = g.rest @ w + g.at_target.unsqueeze(1) * w[g.target]
    dw = (g.rest.t() @ x).index_add_(0, g.target, g.at_target.unsqueeze(1) * x)
    return dx, dw


def relative(difference: Tensor, exact: Tensor) -> float:
    """||difference|| / ||exact||, summed in float64."""
    return float(difference.norm(dtype=torch.float64) / exact.norm(dtype=torch.float64))


# Columns of blocks of rows


def column_norms(rest: Tensor, rows: int, order: Tensor | None = None) -> Tensor:
    """(B, C) squared norms of the columns of blocks of `rows` rows, the rows taken in `order` (N,)."""
    n = rest.shape[0]
    norms = rest.new_empty(math.ceil(n / rows), rest.shape[1])
    for block, start in enumerate(range(0, n, rows)):
        part = rest[start : start + rows] if order is None else rest[order[start : start + rows]]
        torch.sum(part * part, 0, out=norms[block])
    return norms


def column_peaks(g: Gradient, rows: int) -> Tensor:
    """(B, C) largest |G_ij| of each column, the entries at the targets included."""
    n = g.rest.shape[0]
    peaks = torch.stack([g.rest[start : start + rows].amax(0) for start in range(0, n, rows)])
    flat = (torch.arange(n) // rows) * g.rest.shape[1] + g.target
    peaks.view(-1).scatter_reduce_(0, flat, g.at_target.abs(), "amax")
    return peaks


def target_columns(y: Tensor, rows: int, classes: int, order: Tensor | None = None) -> Tensor:
    """(B, C) bool: the columns that hold a target, which are kept whatever their norm."""
    y = y if order is None else y[order]
    forced = torch.zeros(math.ceil(y.numel() / rows), classes, dtype=torch.bool)
    forced[torch.arange(y.numel()) // rows, y] = True
    return forced


def join_blocks(norms: Tensor, factor: int) -> Tensor:
    """Squared norms of blocks `factor` times as long, or for a bool (B, C) whether any of them is set."""
    joined = norms.split(factor)
    return torch.stack([part.any(0) if part.dtype == torch.bool else part.sum(0) for part in joined])


def tiles(columns: Tensor, width: int, order: Tensor | None = None) -> Tensor:
    """(B, T) from (B, C), classes taken in `order` and `width` of them to a tile: sums of norms, or whether any bool is set."""
    columns = columns if order is None else columns[:, order]
    parts = columns.split(width, 1)
    return torch.stack([part.any(1) if part.dtype == torch.bool else part.sum(1) for part in parts], 1)


# What is kept


def kept_columns(norms: Tensor, tolerance: float, forced: Tensor | None = None, total: Tensor | None = None) -> Tensor:
    """(B, C) bool: all but the smallest columns whose norms sum to at most tolerance^2 times `total` (B,), or the block's sum."""
    total = norms.sum(1, dtype=torch.float64) if total is None else total
    droppable = norms if forced is None else norms.masked_fill(forced, torch.inf)
    ordered, order = droppable.sort(1)
    dropped = ordered.cumsum(1, dtype=torch.float64) <= tolerance**2 * total.unsqueeze(1)
    return torch.ones_like(dropped).scatter_(1, order, ~dropped)


def kept_shares(norms: Tensor, tolerances: Sequence[float], forced: Tensor | None = None) -> Tensor:
    """(tolerances, B): the share of each block's columns that `kept_columns` keeps; one sort for all tolerances."""
    droppable = norms if forced is None else norms.masked_fill(forced, torch.inf)
    sums = droppable.sort(1).values.cumsum(1, dtype=torch.float64)
    budgets = torch.tensor(tolerances, dtype=torch.float64).square() * norms.sum(1, dtype=torch.float64).unsqueeze(1)
    return 1.0 - torch.searchsorted(sums, budgets, right=True).t().double() / norms.shape[1]


def work_share(shares: Tensor, most: float) -> Tensor:
    """The share that is computed where a block that would keep more than `most` runs in full."""
    return torch.where(shares > most, 1.0, shares)


def spread(keep: Tensor, rows: int, n: int) -> Tensor:
    """(N, C) from (B, C)."""
    return keep.repeat_interleave(rows, 0)[:n]


def dropped_part(rest: Tensor, keep: Tensor, rows: int) -> Tensor:
    """(N, C): G' where its column was dropped, else 0."""
    return rest.masked_fill(spread(keep, rows, rest.shape[0]), 0.0)


def block_errors(norms: Tensor, keep: Tensor) -> tuple[float, float]:
    """(of the worst block, pooled): ||G' dropped|| / ||G'||."""
    lost, total = torch.where(keep, 0.0, norms).sum(1, dtype=torch.float64), norms.sum(1, dtype=torch.float64)
    ratio = torch.where(lost > 0, lost / total, 0.0)
    return float(ratio.max().sqrt()), float((lost.sum() / total.sum()).sqrt())


# In place of what was dropped


@dataclass(frozen=True, slots=True)
class Correction:
    """A rank-one stand-in for each block of the dropped part, as what it adds to dx and dw."""

    dx: Tensor  # (N, D)
    dw: Tensor  # (C, D)
    residual: float  # ||dropped - stand-in||_F^2


def mean_correction(dropped: Tensor, x: Tensor, w: Tensor, rows: int) -> Correction:
    """The dropped part R of each block of rows, replaced by m c^T / s with its row sums m, column sums c and sum s.

    dx_i gets m_i times the mean dropped class (c w / s), dw_j gets c_j times the mean feature (m x / s): exact where all rows of a block
    are alike. Flops: the two products c w and c^T (m x) are 1 / rows of those of the whole R.
    """
    dx, residual = torch.zeros_like(x), 0.0
    sums, features = [], []
    for start in range(0, x.shape[0], rows):
        part = dropped[start : start + rows]
        m, c = part.sum(1), part.sum(0)
        s = m.sum().clamp_min(torch.finfo(m.dtype).tiny)
        sums.append(c)
        features.append((m / s) @ x[start : start + rows])
        dx[start : start + rows] = (m / s).unsqueeze(1) * (c @ w)
        cross = float((m.double() / s.double()) @ (part @ c).double())
        alike = float((m.double() / s.double()).square().sum() * c.double().square().sum())
        residual += float(part.norm(dtype=torch.float64) ** 2) - 2.0 * cross + alike
    return Correction(dx, torch.stack(sums).t() @ torch.stack(features), max(residual, 0.0))


def misfit_norms(rest: Tensor, keep: Tensor, rows: int) -> Tensor:
    """(B, C): ||G'_j - c_j m / s||^2 of every column, m and s being those of the columns that `keep` drops."""
    left = torch.empty_like(keep, dtype=rest.dtype)
    for block, start in enumerate(range(0, rest.shape[0], rows)):
        part = rest[start : start + rows]
        m = part.masked_fill(keep[block], 0.0).sum(1)
        m = m / m.sum().clamp_min(torch.finfo(m.dtype).tiny)
        torch.sum((part - m.unsqueeze(1) * part.sum(0)).square_(), 0, out=left[block])
    return left


def kept_beside_correction(rest: Tensor, tolerance: float, rows: int, forced: Tensor) -> Tensor:
    """(B, C) bool: the columns to keep so that `mean_correction` of the others is off by at most tolerance ||G'|| a block.

    Two rounds, since what is kept depends on the fit and the fit on what is kept."""
    norms = column_norms(rest, rows)
    total, keep = norms.sum(1, dtype=torch.float64), forced
    for _ in range(2):
        keep = kept_columns(misfit_norms(rest, keep, rows), tolerance, forced, total)
    return keep


def keep_probabilities(norms: Tensor, expected: Tensor, forced: Tensor | None = None) -> Tensor:
    """(B, C) q = min(1, sqrt(n_bj) / level_b), 1 for forced columns, with sum over j of q = expected (B,).

    Of all ways to keep that many in the mean and scale the kept by 1/q this has the least variance, sum of n (1/q - 1).
    """
    size = norms.double().sqrt()
    low, high = torch.full_like(size[:, :1], -800.0), size.amax(1, keepdim=True).clamp_min(1e-300).log() + 40.0
    for _ in range(80):  # bisection of the level's logarithm: at `low` all are kept, at `high` next to none
        middle = (low + high) / 2
        q = (size / middle.exp()).clamp_max(1.0)
        q = q if forced is None else q.masked_fill(forced, 1.0)
        much = q.sum(1, keepdim=True) > expected.unsqueeze(1)
        low, high = torch.where(much, middle, low), torch.where(much, high, middle)
    q = (size / high.exp()).clamp_max(1.0)
    return q if forced is None else q.masked_fill(forced, 1.0)


def draw(q: Tensor, generator: torch.Generator) -> Tensor:
    """(B, C) factors, 1/q with probability q and else 0: of mean 1 wherever q > 0."""
    taken = torch.rand(q.shape, generator=generator, dtype=q.dtype) < q
    return torch.where(taken, 1.0 / q, 0.0)


def draw_error(norms: Tensor, q: Tensor) -> float:
    """sqrt(E ||G' - drawn||^2) / ||G'||. Columns of norm 0 count for nothing."""
    n = norms.double()
    variance = torch.where(n > 0, n * (1.0 / q - 1.0), 0.0).sum()
    return float((variance / n.sum()).sqrt())


# Orders of the rows


def clusters(x: Tensor, count: int, rounds: int = 5, seed: int = 0) -> Tensor:
    """The nearest of `count` centres (N,), by a few rounds of Lloyd's iteration."""
    centres = x[torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))[:count]].clone()
    nearest = torch.cdist(x, centres).argmin(1)
    for _ in range(rounds):
        members = torch.bincount(nearest, minlength=count).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(members > 0, sums / members.clamp_min(1), centres)
        nearest = torch.cdist(x, centres).argmin(1)
    return nearest


def row_orders(g: Gradient, x: Tensor, rows: int, seed: int = 0) -> dict[str, Tensor | None]:
    """Permutations of the rows by name; None: as they come."""
    shuffled = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    return {
        "as they come": None,
        "random": shuffled,
        "by target": g.target.argsort(stable=True),
        "by predicted class": g.predicted().argsort(stable=True),
        "by loss": g.at_target.argsort(stable=True),
        "by cluster": clusters(x, max(x.shape[0] // rows, 1), seed=seed).argsort(stable=True),
    }


def class_orders(x: Tensor, w: Tensor, b: Tensor | None, popularity: Tensor, seed: int = 0) -> dict[str, Tensor | None]:
    """Permutations of the classes by name; None: as they come. popularity: (C,), how often a class is met elsewhere."""
    mean_logit = w @ x.mean(0) + (0.0 if b is None else b)
    return {
        "as they come": None,
        "random": torch.randperm(w.shape[0], generator=torch.Generator().manual_seed(seed)),
        "by popularity": popularity.argsort(descending=True, stable=True),
        "by mean logit": mean_logit.argsort(descending=True, stable=True),
    }

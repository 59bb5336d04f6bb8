"""The certified filter: which columns of a tile of the gradient are worth a product.

Let G' be dL/dz of a block of rows (some `FILTER_ROWS` of them) over all classes, without the picks' entries (with them, all that a uniform
row has beside its target would pass for negligible). With n_j = sum over the block's rows of G'_ij^2,

    the smallest columns are dropped while   sum of n_j over the dropped  <=  tolerance^2 * sum of n_j over all,

so ||G' dropped||_F <= tolerance * ||G'||_F. Row weights, upstream factors and z-loss are inside G'. Columns with a pick are always kept,
and a block that would keep more than `MOST` of its columns runs in full: gathering them would cost what it saves, and where the
gradient is spread evenly (early in training) nothing is lost at all.

Where all of a block's columns are at hand (`stream_loss` keeps whole rows) they are chosen together. Elsewhere they come a slab after the
other: of what the norm so far allows each may spend its share of the classes, and what those before it left. The whole norm is no less, so
the promise holds in any order. (Without shares the first slab, which in a vocabulary holds the frequent classes, would spend everything.)

What is dropped takes no part in the products dw = G^T x and dx = G w, but for its outer product (tail.py), which brings it nearer. All else
(bias, scale, parameters of maps and folds) is read off the whole tile. Cost: a square and a sum a logit. Norms are in fp32, 1 ulp of which
is far below `SLACK`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a block, on which columns are kept or dropped together. Of a trained language model 128 rows keep 17.7 % of the columns at 2^-8,
# 1024 rows 19.0 % (benchmarks/filter_study.py); products, and the rows of w gathered for them, gain more than that by the larger block.
FILTER_ROWS = 512
FILTER_BAND = 4096  # the same on the fused engine, at most: rows enough for products to run at their rate (not measured on a GPU)
MOST = 0.6  # share of the columns above which a block runs in full
SLACK = 0.999  # of the squared norm that may be spent: the rest is for rounding

# Bits of a norm by which the CPU sorts it into bins: the exponent and 6 (5) of the mantissa.
_BINS = {torch.float32: (torch.int32, 17), torch.float64: (torch.int64, 47)}

_PARTS = 1 << 36  # of a budget: 2^26 columns of more than it do not overflow, and what rounding up wastes of it is 2^-36 a column


class ColumnFilter:
    """What was seen, spent and kept of each block of rows, named by its first row."""

    def __init__(self, tolerance: float, rows: int, classes: int, like: Tensor) -> None:
        wide = torch.float32 if like.device.type == "mps" else torch.float64
        self._share = SLACK * tolerance**2
        # Below this a norm's squares may have underflowed; what is so small is kept whole.
        self._least = 1e3 * torch.finfo(like.dtype).tiny * classes / tolerance**2
        self._total, self._spent = like.new_zeros(rows, dtype=wide), like.new_zeros(rows, dtype=wide)
        self._kept, self._seen = like.new_zeros(rows, dtype=wide), like.new_zeros(rows, dtype=wide)
        self._back, self._passed = like.new_zeros(rows, dtype=wide), like.new_zeros(rows, dtype=wide)
        self._classes = max(classes, 1)

    def choose(self, norms: Tensor, forced: Tensor | None, blocks: Tensor, passed: int | None = None) -> Tensor:
        """(b, c) bool: the columns to keep.

        norms: (b, c) squared norms of some columns, NaN or infinite if a gradient was. forced: (b, c) bool, those to keep in any case.
        blocks: (b,) first row of each block. passed: of how many classes these are all columns that are not 0; None: c."""
        total = self._total[blocks] + norms.sum(1, dtype=self._total.dtype)
        self._passed[blocks] += norms.shape[1] if passed is None else passed
        budget = total * self._share * (self._passed[blocks] / self._classes) - self._spent[blocks]
        budget = torch.where((total > self._least) & total.isfinite(), budget, -1.0)  # -1: keep all (of NaN too)
        droppable = norms if forced is None else norms.masked_fill(forced, torch.inf)
        keep = _kept_on_cpu(droppable, budget) if norms.device.type == "cpu" else _kept(droppable, budget)
        keep |= (keep.sum(1) > MOST * norms.shape[1]).unsqueeze(1)
        self._total[blocks] = total
        self._spent[blocks] += torch.where(keep, 0.0, norms).sum(1, dtype=self._total.dtype)
        self._kept[blocks] += keep.sum(1)
        self._seen[blocks] += norms.shape[1]
        return keep

    def returned(self, block: int, back: Tensor) -> None:
        """Of what a block dropped, a part of this squared norm is back (tail.py): it counts in the report, not in what may be spent."""
        self._back[block] += back * SLACK

    def report(self) -> Tensor:
        """(2,): share of all columns that were kept, and the largest ||G' dropped|| / ||G'|| of a block."""
        seen = self._seen.sum()
        share = torch.where(seen > 0, self._kept.sum() / seen.clamp_min(1.0), 1.0)
        lost = (self._spent - self._back).clamp_min(0.0)
        ratio = torch.where(self._spent > 0, lost / self._total, 0.0).sqrt()
        return torch.stack((share, ratio.amax() if ratio.numel() else share * 0.0))


def exact_report(like: Tensor) -> Tensor:
    """The report of a gradient that dropped nothing."""
    made = like.new_zeros(2)
    made[0].fill_(1.0)  # of a list it would be copied from the host, which no CUDA graph can capture
    return made


def _kept(norms: Tensor, budget: Tensor) -> Tensor:
    """All but the smallest whose sum is within the budget (b,); for a negative one, all. Nothing is read on the host.

    Sums are of whole parts of the budget, rounded up: those of floats would depend on the order in which a GPU happens to add them."""
    ordered, order = norms.sort(dim=1, stable=True)
    share = ordered / budget.clamp_min(torch.finfo(budget.dtype).tiny).unsqueeze(1)
    parts = (share * _PARTS).ceil_().clamp_(max=_PARTS + 1).long()
    dropped = (parts.cumsum(1) <= _PARTS) & (budget >= 0.0).unsqueeze(1)
    return torch.ones_like(dropped).scatter_(1, order, ~dropped)


def _kept_on_cpu(norms: Tensor, budget: Tensor) -> Tensor:
    """The same to within a bin (1.6 % of a norm), without the sort: 0.3 ms instead of 10 for 128,000 columns."""
    integer, shift = _BINS[norms.dtype]
    infinite = int(norms.new_tensor([torch.inf]).view(integer) >> shift)  # the bin of those that must be kept
    keep = torch.ones(norms.shape, dtype=torch.bool)
    for row, allowed, out in zip(norms, budget.tolist(), keep, strict=True):
        if allowed < 0.0:
            continue
        bins = row.view(integer) >> shift
        sums = torch.bincount(bins, weights=torch.where(row.isinf(), 0.0, row)).cumsum(0)
        fits = int(torch.searchsorted(sums, sums.new_tensor([allowed]), right=True))
        torch.ge(bins, min(fits, infinite), out=out)
    return keep

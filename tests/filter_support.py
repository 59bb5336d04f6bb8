"""What tests of the gradient filter share: data with many negligible classes, small tiles, and the masked gradient made visible.

With linear_weight = identity (C = D) the features' gradient is that of the logits, times the scale: what was left out are exact zeros.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass
from bigclass.core import op, problem
from bigclass.core.engines.tail import Tail
from bigclass.core.folds import LogSumExp
from bigclass.core.stream import Stream

TOLERANCES = (2.0**-10, 2.0**-8, 2.0**-6, 2.0**-4)
KINDS = ("flat", "early", "peaked", "onehot", "popular")


PLANS = ("forward", "recompute", "slabs")
N, C, TILE = 70, 193, (24, 50, 8)  # ragged: chunks of 24, 24 and 22 rows, slabs of 50 and 43 classes, blocks of 8 and 6 rows

every_plan = pytest.mark.parametrize("plan", PLANS)
every_tolerance = pytest.mark.parametrize("tolerance", TOLERANCES, ids=lambda t: f"2^{math.log2(t):g}")


def loss_of(plan, x, w, b, y, tolerance, **options):
    """A loss on the road of this plan. Slabs: one-vs-all, of logits that are as rare as labels are."""
    if plan == "slabs":
        return bigclass.linear_binary_cross_entropy(
            x, w, y, linear_bias=b, reduction="batchmean", grad_filter=tolerance, engine="tiled", **options
        )
    with bigclass.planning(gradients=plan):
        return bigclass.linear_cross_entropy(x, w, y, linear_bias=b, grad_filter=tolerance, engine="tiled", **options)


def draw(kind: str, n: int, c: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0, *, identity: bool = False):
    """x (N, D), w (C, D), b (C,) leaves, y (N,). identity: w is (C = D), so that x holds the logits without their bias.

    flat, early: normal logits, wide and next to none. peaked: the target and 4 rivals stand out by a few nats. onehot: losses of e^-20.
    popular: a bias that falls with 1/rank^2 (in random order) and targets that follow it; most classes are negligible in every row."""
    g = torch.Generator().manual_seed(seed)
    d = c if identity else d
    w = torch.eye(c, dtype=torch.float64) if identity else F.normalize(torch.randn(c, d, generator=g, dtype=torch.float64))
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y, b = torch.randint(c, (n,), generator=g), 0.1 * torch.randn(c, generator=g, dtype=torch.float64)
    if kind == "early":
        x *= 0.03
    elif kind == "peaked":
        lead = math.log(c) + 2.0 + 2.0 * torch.randn(n, 1, generator=g, dtype=torch.float64)
        x += lead * w[y]
        for _ in range(4):
            behind = 3.0 * torch.rand(n, 1, generator=g, dtype=torch.float64)
            x += (lead - behind).clamp_min(0.0) * w[torch.randint(c, (n,), generator=g)]
    elif kind == "onehot":
        x += (math.log(c) + 20.0) * w[y]
    elif kind == "popular":
        frequency = 1.0 / (1.0 + torch.randperm(c, generator=g).double())
        b, y = 2.0 * (frequency / frequency.sum()).log(), torch.multinomial(frequency, max(n, 1), replacement=True, generator=g)[:n]
        x += (5.0 + 10.0 * torch.rand(n, 1, generator=g, dtype=torch.float64)) * w[y]
    return *(t.to(dtype).requires_grad_() for t in (x, w, b)), y


@contextmanager
def tiles(rows: int, classes: int, block: int, *, tails: bool = False) -> Iterator[None]:
    """Tiles of rows x classes (chunks of as many rows), and a filter that chooses for `block` rows together.

    tails: is what it drops put back as outer products, as ever? Else it is left out, to be seen."""
    original = problem.make_plan

    def small(*args, **kwargs):
        plan = original(*args, **kwargs)
        return replace(plan, chunk=min(rows, max(plan.chunk, 1)), row_block=min(rows, plan.row_block), class_block=classes)

    with pytest.MonkeyPatch.context() as patch:
        for module in (problem, op):
            patch.setattr(module, "make_plan", small)
        for name, module in list(sys.modules.items()):
            if name.startswith("bigclass.core.engines") and hasattr(module, "FILTER_ROWS"):
                patch.setattr(module, "FILTER_ROWS", block)
        if not tails:
            patch.setattr(Tail, "of", classmethod(no_tail))
        yield


def no_tail(cls, g: Tensor, drop: Tensor, *known: Tensor | None) -> Tail:
    """In place of `Tail.of`: what is dropped stays away."""
    like = g.new_zeros((), dtype=torch.promote_types(g.dtype, torch.float32))
    return cls(like.new_zeros(g.shape[0]), like.new_zeros(g.shape[1]), like)


def blocks(n: int, rows: int, block: int) -> list[slice]:
    """The rows that the filter takes together, in tiles of `rows`."""
    return [slice(at, min(at + block, start + rows, n)) for start in range(0, n, rows) for at in range(start, min(start + rows, n), block)]


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Those of a loss, by the leaves."""
    return list(torch.autograd.grad(loss, leaves))


def reported(x: Tensor, w: Tensor, b: Tensor, picks: Tensor, tolerance: float) -> tuple[Tensor, list[float]]:
    """(dx of a cross-entropy by `reduce_logits`, what its filter kept and promised, which nobody knows before the backward)."""
    stream = Stream(((x, w),), bias=b, grad_filter=tolerance)
    report = op.empty_report(stream)
    (state,), picked = op.reduce_logits(stream, picks, (LogSumExp(exclude_picks=True),), engine="tiled", report=report)
    assert picked is not None and report.isnan().all()
    return gradients(F.softplus(state[0] + state[1].log() - picked[:, 0]).sum(), x)[0], report.tolist()


def left_out(made: Tensor, exact: Tensor) -> Tensor:
    """Where the filter acted on a logit gradient (N, C). All else must be the exact one."""
    out = (made == 0.0) & (exact != 0.0)
    torch.testing.assert_close(made, torch.where(out, 0.0, exact), rtol=1e-9, atol=0.0)
    return out


def without_picks(g: Tensor, picks: Tensor) -> Tensor:
    """G' (N, C): G with zeros at the picks (N, K), -1 for none."""
    wide = F.pad(g, (0, 1)).scatter(1, torch.where(picks < 0, g.shape[1], picks), 0.0)
    return wide[:, :-1]


def ratios(made: Tensor, exact: Tensor, picks: Tensor, parts: list[slice]) -> list[float]:
    """||G' left out|| / ||G'|| of each block of rows, once no pick is found to be left out."""
    out = left_out(made, exact)
    g = without_picks(exact, picks)
    assert not (out & (g == 0.0)).any(), "an entry at a pick was left out"
    return [float((g * out)[rows].norm() / g[rows].norm()) if out[rows].any() else 0.0 for rows in parts]

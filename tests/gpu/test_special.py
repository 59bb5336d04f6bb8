"""Special values on a GPU are what they are on a CPU: NaN, infinities, ignored rows, nothing at all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bigclass

from .cases import CASES, outcome
from .support import DEVICE, LIMITS, at, check_close, every_dtype, every_road, ours, problem, same_bits, wide

NAMES = ("cross-entropy", "cross-entropy, capped", "cross-entropy, smoothed", "cross-entropy, statistics", "log-sum-exp, picks", "bce")


def check_same_places(made: list[Tensor], truth: list[Tensor], limit: float) -> None:
    """NaN where the truth has it, each infinity where it is, and numbers elsewhere."""
    for i, (got, want) in enumerate(zip(made, truth, strict=True)):
        if not want.is_floating_point():
            continue
        assert torch.equal(got.isnan(), want.isnan()), (
            f"output {i}: NaN at {int(got.isnan().sum())} against {int(want.isnan().sum())} places"
        )
        assert torch.equal(got.isfinite(), want.isfinite()), f"output {i}: infinities elsewhere"
        there = want.isfinite()
        if there.any():
            check_close([got[there]], [want[there]], limit)


@every_road
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["features", "bias"])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinities_come_out_where_float64_has_them(road, value, where, name):
    leaves, run = CASES[name].make(torch.float32)
    if road[1] not in CASES[name].plans:
        pytest.skip("has one plan")
    with torch.no_grad():
        (leaves[0][6:7] if where == "features" else leaves[2][40:41]).fill_(value)
    truth = outcome([wide(t) for t in leaves], run, "dense", "auto")
    check_same_places(outcome(leaves, run, *road), truth, 1e-4)


@every_road
@every_dtype
def test_ignored_rows_that_hold_nan_contribute_exactly_nothing(road, dtype):
    x, w, b, y = problem("peaked", *at((300, 2000, 64), (40, 150, 24)), dtype)
    y[::7] = -100
    clean = ours(x, w, b, y, road)
    for value in (math.nan, math.inf):
        with torch.no_grad():
            x[::7] = value
        made = ours(x, w, b, y, road)
        assert same_bits(made, clean) and not made[1][::7].any()


@pytest.mark.parametrize("engine", ["tiled", "fused"])
@every_dtype
def test_ignored_ids_of_log_probabilities_may_stand_beside_nan(engine, dtype):
    leaves, run = CASES["log-probability, entropy"].make(dtype)
    truth = outcome([wide(t) for t in leaves], run, "dense", "auto")
    x, w = leaves[:2]
    rows = torch.arange(0, len(x), 5, device=DEVICE)  # their ids are ignored; shifted by one: the row before each
    rows = rows[rows % (len(x) // 4) > 0] - 1
    with torch.no_grad():
        x[rows] = math.nan
    made = outcome(leaves, run, engine, "auto")
    assert made[0].isfinite().all()
    check_close(made[0:1], truth[0:1], LIMITS[dtype])
    check_close([made[3]], [truth[3]], LIMITS[dtype])
    assert w.isfinite().all()


@every_road
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_everything_ignored_and_nothing_at_all(road, reduction):
    """Pitfall 8. As in torch a mean over nothing is NaN, its gradient too; a sum is 0."""
    x, w, b, y = problem("flat", *at((256, 3000, 64), (30, 150, 24)), torch.bfloat16)
    ignored = ours(x, w, b, torch.full_like(y, -100), road, reduction=reduction)
    empty = ours(x[:0].detach().requires_grad_(), w, b, y[:0], road, reduction=reduction)
    leaves = [wide(t, True) for t in (x, w, b)]
    dense = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves), torch.full_like(y, -100), reduction=reduction)
    assert torch.equal(ignored[0].isnan(), dense.isnan()) and not ignored[0].nan_to_num(0.0).any()
    for made in (ignored, empty):
        assert all(g.shape == t.shape for g, t in zip(made[2:], (w, b), strict=True))
        assert reduction == "mean" or not any(g.any() for g in made[1:])


@every_road
def test_classes_of_no_probability_and_rows_of_none(road):
    """A bias of -inf takes classes out; where it takes all out the loss is NaN, and nothing else is."""
    x, w, b, y = problem("peaked", *at((256, 3000, 64), (30, 150, 24)), torch.float32)
    with torch.no_grad():
        b[len(b) // 2 :] = -math.inf
    y %= len(b) // 2
    made = ours(x, w, b, y, road)
    half = [t[: len(b) // 2].detach().requires_grad_() for t in (w, b)]
    check_close([made[0], made[1]], ours(x, *half, y, road)[:2], 1e-6)
    assert not made[2][len(b) // 2 :].any() and made[2].isfinite().all()
    none = torch.full_like(b, -math.inf)
    rows = bigclass.linear_cross_entropy(x, w, y, linear_bias=none, reduction="none", engine=road[0])
    assert isinstance(rows, Tensor) and rows.isnan().all()


@every_road
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("c", [1, 2, 33])
@pytest.mark.parametrize("d", [1, 7])
def test_the_smallest_problems(road, n, c, d):
    x, w, b, y = problem("flat", n, c, d, torch.float32)
    truth = ours(wide(x), wide(w), wide(b), y, ("dense", "auto"))
    for got, want in zip(ours(x, w, b, y, road), truth, strict=True):
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-7)

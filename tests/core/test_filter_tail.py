"""What the filter drops comes back as outer products (core/engines/tail.py): nearer to the exact gradient, and never further off."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bigclass.core.engines.tail import Tail
from tests.filter_support import (
    KINDS,
    PLANS,
    TILE,
    C,
    N,
    blocks,
    draw,
    every_plan,
    every_tolerance,
    gradients,
    loss_of,
    reported,
    tiles,
    without_picks,
)


def off(made, exact, picks, parts):
    """||made - exact|| / ||exact|| of each block of rows of a logit gradient, without the picks, which must be exact."""
    at = torch.gather(made, 1, picks), torch.gather(exact, 1, picks)
    torch.testing.assert_close(*at, rtol=1e-9, atol=0.0)
    lost, whole = without_picks(made - exact, picks), without_picks(exact, picks)
    return [float(lost[rows].norm() / whole[rows].norm()) for rows in parts]


@every_plan
@pytest.mark.parametrize("learns", [True, False], ids=["bias", "constant bias"])
@pytest.mark.parametrize("kind", KINDS)
@every_tolerance
def test_each_block_of_rows_is_off_by_less_than_the_tolerance(tolerance, kind, learns, plan):
    """Without a bias that learns the tiles of a lone log-sum-exp are not even scaled (core/engines/unscaled.py)."""
    x, w, b, y = draw(kind, N, C, C, identity=True)
    leaves = (x, w, b.requires_grad_(learns))[: 2 + learns]
    with tiles(*TILE, tails=True):
        made, exact = (gradients(loss_of(plan, x, w, b, y, t), *leaves) for t in (tolerance, None))
    assert max(off(made[0], exact[0], y[:, None], blocks(N, *TILE[::2]))) <= tolerance
    torch.testing.assert_close(made[1], made[0].t() @ x.detach(), rtol=1e-8, atol=1e-15)  # dw has the same tail as dx
    torch.testing.assert_close(made[0].sum(1), exact[0].sum(1), rtol=0.0, atol=1e-12 * float(exact[0].abs().sum(1).max()))
    assert not learns or torch.equal(made[2], exact[2])


@pytest.mark.parametrize("kind", KINDS)
@every_tolerance
def test_the_promised_error_knows_what_came_back(tolerance, kind):
    x, w, b, y = draw(kind, N, C, C, identity=True)
    picks = y[:, None]

    with tiles(*TILE, tails=True):
        (made, (_, promised)), (exact, _) = (reported(x, w, b, picks, t) for t in (tolerance, 0.0))
    worst = max(off(made, exact, picks, blocks(N, *TILE[::2])))
    assert worst <= promised * (1.0 + 1e-6) and promised <= tolerance
    assert promised <= 3.0 * worst or kind not in ("peaked", "popular")
    assert worst > 0.0 or kind != "popular"


@pytest.mark.parametrize("plan", PLANS[:2])
def test_rows_of_one_mean_lose_little_of_the_gradient_of_the_features(plan):
    """Class vectors of a trained head share a direction: leaving many of them out would take it from every row."""
    x, w, b, y = draw("popular", 256, 700, 24)
    with torch.no_grad():
        w += 3.0 * F.normalize(torch.randn(24, dtype=torch.float64), dim=0)
        x -= (x @ w.mean(0, keepdim=True).t()) * w.mean(0) / w.mean(0).square().sum()

    def error(tails):
        with tiles(64, 200, 64, tails=tails):
            made, exact = (gradients(loss_of(plan, x, w, b, y, t), x, w) for t in (2.0**-6, None))
        return [float((m - e).norm() / e.norm()) for m, e in zip(made, exact, strict=True)]

    (dx, dw), (bare_dx, bare_dw) = error(True), error(False)
    assert bare_dx > 4.0 * dx > 0.0
    assert bare_dw > dw > 0.0


FORMS = [(form, plan) for form in ("scale", "frozen x", "frozen w") for plan in PLANS]
FORMS += [(form, plan) for form in ("two pairs", "ignored") for plan in PLANS[:2]]  # one-vs-all losses have neither


@pytest.mark.parametrize(("form", "plan"), FORMS)
def test_every_form_comes_back_whole(form, plan):
    """The scale's gradient has what was dropped already and must not count it twice."""
    x, w, b, y = draw("popular", N, C, C, identity=True)
    scale = torch.tensor(1.25, dtype=torch.float64, requires_grad=True)
    options, leaves = {}, [x, w, b]
    if form == "scale":
        options, leaves = {"logit_scale": scale}, [x, w, b, scale]
    elif form == "two pairs":
        down, up = torch.randn(3, C, dtype=torch.float64) / C, torch.randn(C, 3, dtype=torch.float64)
        options, leaves = {"lora": (down.requires_grad_(), up.requires_grad_(), 0.5)}, [x, w, b, down, up]
    elif form == "frozen x":
        leaves = [w, b]
        x.requires_grad_(False)
    elif form == "frozen w":
        leaves = [x, b]
        w.requires_grad_(False)
    elif form == "ignored":
        with torch.no_grad():
            x[::3] = math.nan
        y = torch.where(torch.arange(N) % 3 == 0, -100, y)
    with tiles(*TILE, tails=True):
        made, exact = (gradients(loss_of(plan, x, w, b, y, t, **options), *leaves) for t in (2.0**-4, None))
    for leaf, m, e in zip(leaves, made, exact, strict=True):
        small = leaf is b or leaf is scale
        assert float((m - e).norm()) <= (1e-10 if small else 2.0**-3) * float(e.norm())
    assert any(not torch.equal(m, e) for m, e in zip(made, exact, strict=True))


@given(st.integers(1, 9), st.integers(1, 17), st.floats(-30.0, 30.0), st.integers(0, 99))
def test_a_tail_is_the_projection_of_what_was_dropped(r, c, magnitude, seed):
    """Of any sign and size: nothing is further off with it than without, and of an outer product nothing is lost."""
    g = torch.Generator().manual_seed(seed)
    tile = torch.randn(r, c, generator=g, dtype=torch.float64) * 10.0**magnitude
    drop = torch.rand(c, generator=g) < 0.7
    dropped = torch.where(drop, tile, 0.0)
    tail = Tail.of(tile, drop)
    back, whole = torch.outer(tail.m, tail.a), dropped.square().sum()
    left = (dropped - back).square().sum()
    assert left <= whole * (1.0 + 1e-9)
    torch.testing.assert_close(left, whole - tail.back, rtol=1e-9, atol=1e-9 * float(whole))
    assert not back[:, ~drop].any()
    same = torch.outer(torch.randn(r, generator=g, dtype=torch.float64), torch.rand(c, generator=g, dtype=torch.float64) + 0.1)
    tail = Tail.of(same, drop)
    torch.testing.assert_close(torch.outer(tail.m, tail.a), torch.where(drop, same, 0.0), rtol=1e-9, atol=1e-12)


def test_a_tail_of_nothing_is_nothing():
    tail = Tail.of(torch.zeros(3, 4), torch.ones(4, dtype=torch.bool))
    assert not tail.m.any() and not tail.a.any() and float(tail.back) == 0.0

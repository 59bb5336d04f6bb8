"""The certified filter (core/engines/filter.py): what a block of rows loses is within the tolerance, and is nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import bigclass
from bigclass.core.compare import compare_sum
from bigclass.core.divergences import Forward
from bigclass.core.folds import LogSumExp
from bigclass.core.norms import inverse_norms
from bigclass.core.op import reduce_logits, stream_loss
from bigclass.core.row_losses import register_row_loss
from bigclass.core.stream import Map, Softcap, Stream, register_map
from tests.filter_support import (
    KINDS,
    PLANS,
    TILE,
    TOLERANCES,
    C,
    N,
    blocks,
    draw,
    every_plan,
    every_tolerance,
    gradients,
    left_out,
    loss_of,
    ratios,
    reported,
    tiles,
    without_picks,
)

CE, BCE = bigclass.linear_cross_entropy, bigclass.linear_binary_cross_entropy


def run(plan, kind, tolerance, tile=TILE, seed=0, **options):
    """(gradients with the filter, without) by x, w, b, in float64 and under an identity weight; the leaves; y."""
    x, w, b, y = draw(kind, N, C, C, seed=seed, identity=True)
    with tiles(*tile):
        made, exact = (gradients(loss_of(plan, x, w, b, y, t, **options), x, w, b) for t in (tolerance, None))
    return made, exact, (x, w, b), y


@every_plan
@pytest.mark.parametrize("kind", KINDS)
@every_tolerance
def test_what_each_block_of_rows_loses_is_within_the_tolerance(tolerance, kind, plan):
    made, exact, (x, _, _), y = run(plan, kind, tolerance)
    worst = max(ratios(made[0], exact[0], y[:, None], blocks(N, *TILE[::2])))
    assert worst <= tolerance
    assert worst > tolerance / 4 or kind != "popular", "so much could have been left out, and little was"
    torch.testing.assert_close(made[1], made[0].t() @ x.detach(), rtol=1e-9, atol=1e-15)  # dw is made of the same entries as dx
    assert torch.equal(made[2], exact[2])


@every_plan
def test_much_is_left_out_where_most_classes_are_negligible(plan):
    made, exact, _, _ = run(plan, "popular", 2.0**-6)
    assert left_out(made[0], exact[0]).double().mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
@every_tolerance
def test_the_promised_error_is_that_of_the_worst_block(tolerance, kind):
    x, w, b, y = draw(kind, N, C, C, identity=True)
    picks = y[:, None]

    with tiles(*TILE):
        (made, (share, promised)), (exact, of_exact) = (reported(x, w, b, picks, t) for t in (tolerance, 0.0))
    assert of_exact == [1.0, 0.0]
    worst = max(ratios(made, exact, picks, blocks(N, *TILE[::2])))
    assert worst <= promised * (1.0 + 1e-6) and promised <= tolerance
    assert promised <= worst * (1.0 + 1e-6)
    out = left_out(made, exact)
    kept = torch.stack([~out[rows].any(0) for rows in blocks(N, *TILE[::2])])
    assert share == pytest.approx(float(kept.double().mean()))
    assert share < 0.5 or kind != "popular" or tolerance < 2.0**-6


@pytest.mark.parametrize("plan", PLANS[:2])
@pytest.mark.parametrize("kind", ["flat", "early"])
@every_tolerance
def test_an_evenly_spread_gradient_keeps_its_bits(tolerance, kind, plan):
    """Pitfalls 3 and 44: a threshold, or a promise that the targets' own entries are part of, would leave all the rest out."""
    x, w, b, y = draw(kind, 150, 700, 24, torch.float32)
    made, exact = (gradients(loss_of(plan, x, w, b, y, t), x, w, b) for t in (tolerance, None))
    for a, e in zip(made, exact, strict=True):
        assert torch.equal(a, e)


@every_plan
def test_uniform_rows_lose_nothing(plan):
    """Pitfall 44: of p = 1/C all but the target's entry is 1/sqrt(C) of a row, 0.04 here."""
    x, w, b = torch.zeros(40, 5), torch.randn(700, 5, requires_grad=True), torch.zeros(700)
    y = torch.arange(40)
    made, exact = (gradients(loss_of(plan, x.requires_grad_(), w, b, y, t), x, w) for t in (2.0**-4, None))
    assert torch.equal(made[0], exact[0]) and torch.equal(made[1], exact[1]) and made[0].any()


@given(data=st.data())
def test_whatever_the_options_what_is_left_out_is_within_the_tolerance_and_all_else_exact(data):
    kind, tolerance = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(TOLERANCES))
    plan, n, c = data.draw(st.sampled_from(PLANS[:2])), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    tile = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 12))
    x, w, b, y = draw(kind, n, c, c, seed=data.draw(st.integers(0, 99)), identity=True)
    g = torch.Generator().manual_seed(n)
    options = {
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
        "z_loss": data.draw(st.sampled_from([0.0, 1e-2])),
        "softcap": data.draw(st.sampled_from([None, 12.0])),
        "weight": data.draw(st.sampled_from([None, torch.rand(c, generator=g, dtype=torch.float64)])),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
    }
    scale = data.draw(st.sampled_from([None, torch.tensor(1.25, dtype=torch.float64, requires_grad=True)]))
    ignored = torch.rand(n, generator=g) < data.draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    with torch.no_grad():
        x[ignored] = math.nan
    y = torch.where(ignored, -100, y)
    upstream = 10.0 ** torch.randn(n if options["reduction"] == "none" else 1, generator=g, dtype=torch.float64)
    leaves = [t for t in (x, b, w, scale) if t is not None]
    with tiles(*tile):
        losses = [loss_of(plan, x, w, b, y, t, logit_scale=scale, **options) for t in (tolerance, None)]
        made, exact = (gradients((upstream * loss).sum(), *leaves) for loss in losses)
    assert torch.equal(*[loss.nan_to_num() for loss in losses])
    for a, e in zip((made[1], *made[3:]), (exact[1], *exact[3:]), strict=True):  # of the bias, of the scale
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-12 * float(upstream.max()))
    assert not made[0][ignored].any()
    kept = ~ignored
    if not kept.any():
        return
    found = [t[0][kept] / (1.0 if scale is None else scale.detach()) for t in (made, exact)]
    rows = tile[0] if plan == "recompute" or options["reduction"] == "none" else min(tile[0], int(kept.sum()))
    parts = blocks(int(kept.sum()), rows, tile[2])
    assert max(ratios(*found, y[kept][:, None], parts)) <= tolerance * (1.0 + 1e-9)
    torch.testing.assert_close(made[2], made[0][kept].t() @ x.detach()[kept], rtol=1e-8, atol=1e-13 * float(upstream.max()))


@every_plan
@pytest.mark.parametrize("tail", ["softcap", "scale", "scale and softcap"])
def test_bias_and_scale_gradients_are_those_without_a_filter(plan, tail):
    """Pitfall 2, its end: the bias's gradient behind an early return. Here these are read off what is left out, too."""
    x, w, b, y = draw("popular", N, 400, 24)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    options = {"logit_scale": scale if "scale" in tail else None, "softcap": 15.0 if "softcap" in tail else None}
    leaves = (x, b, scale) if "scale" in tail else (x, b)
    with tiles(24, 150, 8):
        losses = [loss_of(plan, x, w, b, y, t, **options) for t in (2.0**-4, None)]
        made, exact = (gradients(loss, *leaves) for loss in losses)
    assert losses[0] == losses[1]
    assert (made[0] - exact[0]).norm() > 1e-3 * exact[0].norm(), "nothing was left out"
    for a, e in zip(made[1:], exact[1:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-15)


@register_row_loss("test_filter_plain")
def plain_row_loss(folds, picked, args, numbers):
    """LSE - s_y as it stands, of a sum that holds the pick."""
    return folds[0][0] + folds[0][1].log() - picked[:, 0]


@pytest.mark.parametrize("plan", PLANS[:2])
@pytest.mark.parametrize("kind", ["early", "popular", "onehot"])
def test_picks_that_the_fold_holds_are_no_part_of_the_promise_either(kind, plan):
    """Pitfall 44, in its second form: what the sum itself gives the target's entry."""
    x, w, b, y = draw(kind, N, C, C, identity=True)
    with tiles(*TILE), bigclass.planning(gradients=plan):
        made, exact = (
            gradients(
                stream_loss(Stream(((x, w),), bias=b, grad_filter=t), y[:, None], [LogSumExp()], "test_filter_plain", engine="tiled"), x
            )[0]
            for t in (2.0**-5, 0.0)
        )
    assert max(ratios(made, exact, y[:, None], blocks(N, *TILE[::2]))) <= 2.0**-5


@pytest.mark.parametrize("form", ["plain", "bias last", "given", "class scale", "two pairs", "normalized", "softcap", "frozen features"])
def test_every_form_of_a_stream_is_filtered_and_its_scale_learns_from_all(form):
    x, w, b, y = draw("popular", N, C, C, identity=True)
    g = torch.Generator().manual_seed(1)
    u, v = (torch.randn(k, 3, generator=g, dtype=torch.float64, requires_grad=True) for k in (N, C))
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    norms = 0.5 + torch.rand(C, generator=g, dtype=torch.float64)
    w = torch.diag(norms).requires_grad_() if form == "normalized" else w
    x = x.detach().requires_grad_(form != "frozen features")

    def stream(t):
        options: dict = {"bias": b, "scale_tensor": scale, "grad_filter": t}
        options |= {"bias_last": True} if form == "bias last" else {}
        options |= {"given": 0.5 * torch.randn(N, C, generator=g.manual_seed(2), dtype=torch.float64)} if form == "given" else {}
        options |= {"class_scale": norms.clone()} if form == "class scale" else {}
        options |= {"maps": (Softcap.at(12.0),)} if form == "softcap" else {}
        options |= {"class_scale": inverse_norms(w), "normalized": True} if form == "normalized" else {}
        return Stream(((x, w), (u, v)) if form == "two pairs" else ((x, w),), **options)

    def all_of(t):
        (state,), picked = reduce_logits(stream(t), y[:, None], (LogSumExp(exclude_picks=True),), engine="tiled")
        loss = F.softplus(state[0] + state[1].log() - picked[:, 0]).sum()
        leaves = [("scale", scale), ("b", b), ("w", w), *([("x", x)] if x.requires_grad else [])]
        leaves += [("u", u), ("v", v)] if form == "two pairs" else []
        return dict(zip([name for name, _ in leaves], gradients(loss, *[t for _, t in leaves]), strict=True))

    with tiles(24, 50, 8):
        made, exact = all_of(2.0**-4), all_of(0.0)
    for name in ("scale", "b"):
        torch.testing.assert_close(made[name], exact[name], rtol=1e-10, atol=1e-13)
    assert (made["w"] - exact["w"]).norm() > 1e-4 * exact["w"].norm(), "nothing was left out"
    factor = scale.detach() * (norms if form == "class scale" else 1.0)
    if form == "frozen features":
        return
    g0, g1 = exact["x"] / factor, made["x"] / factor
    assert max(ratios(g1, g0, y[:, None], blocks(N, 24, 8))) <= 2.0**-4
    total = (g1 * factor).t() @ x.detach()
    if form == "normalized":  # dw = r (u - r^2 <w, u> w), whose part through the norm is filtered with it
        r, wide = 1.0 / norms[:, None], w.detach()
        total = r * (total - r**2 * (wide * total).sum(1, keepdim=True) * wide)
    torch.testing.assert_close(made["w"], total, rtol=1e-9, atol=1e-12)
    if form == "two pairs":
        torch.testing.assert_close(made["u"], scale.detach() * g1 @ v.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(made["v"], scale.detach() * g1.t() @ u.detach(), rtol=1e-9, atol=1e-12)


@every_plan
@pytest.mark.parametrize("which", ["x", "w", "b"])
def test_a_frozen_operand_changes_nothing_for_the_others(which, plan):
    made, _, leaves, y = run(plan, "popular", 2.0**-5)
    frozen = [t.detach().requires_grad_(name != which) for name, t in zip("xwb", leaves, strict=True)]
    with tiles(*TILE):
        some = gradients(loss_of(plan, *frozen, y, 2.0**-5), *[t for t in frozen if t.requires_grad])
    for a, e in zip(some, [m for name, m in zip("xwb", made, strict=True) if name != which], strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("plan", PLANS[:2])
def test_a_confident_token_in_a_quiet_tile_keeps_its_z_loss_gradient(plan):
    """Pitfall 2: p - 1 is 0 there, and all that reaches the token's column is 2 z LSE p."""
    x, w, b, y = draw("onehot", N, C, C, identity=True)
    coefficient = 1e-3
    with tiles(8, 16, 4):
        dx, db = gradients(loss_of(plan, x, w, b, y, 2.0**-4, z_loss=coefficient, reduction="sum"), x, b)
    s = x.detach() + b.detach()
    lse = s.logsumexp(1)
    z_part = 2.0 * coefficient * lse * (s.gather(1, y[:, None])[:, 0] - lse).exp()
    torch.testing.assert_close(dx.gather(1, y[:, None])[:, 0], z_part, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(db.index_select(0, y.unique()), torch.zeros_like(b).index_add(0, y, z_part)[y.unique()], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("plan", PLANS[:2])
def test_row_weights_are_part_of_the_gradient_that_is_promised(plan):
    """Pitfall 2, its beginning: a filter that sees |p - onehot| before the row's weight. Here a heavy row decides what its block keeps."""
    x, w, b, y = draw("popular", 16, C, C, identity=True)
    heavy = torch.ones(16, dtype=torch.float64).index_fill(0, torch.tensor([3]), 1e6)
    with tiles(16, 64, 16):
        losses = [loss_of(plan, x, w, b, y, t, reduction="none") for t in (2.0**-8, None)]
        made, exact = (gradients((loss * heavy).sum(), x)[0] for loss in losses)
    row = left_out(made, exact)[3]
    g = without_picks(exact, y[:, None])[3]
    assert (g * row).norm() <= 2.0**-8 * g.norm()
    assert left_out(made, exact).any()


@every_plan
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_leaves_nothing_out_of_its_block(value, plan):
    x, w, b, y = draw("popular", 40, C, 12)
    with torch.no_grad():
        x[5] = value
    with tiles(40, 64, 8):
        made, exact = (gradients(loss_of(plan, x, w, b, y, t), x)[0] for t in (2.0**-6, None))
    assert exact[5].isnan().all() and made[5].isnan().all()
    assert torch.equal(made[:8].nan_to_num(), exact[:8].nan_to_num())
    assert not torch.equal(made[8:], exact[8:]), "nothing was left out elsewhere"


@pytest.mark.parametrize("plan", PLANS[:2])
def test_rows_that_are_ignored_contribute_nothing_and_belong_to_no_block(plan):
    """Pitfall 48. The rows between them come out as if the ignored were not there."""
    x, w, b, y = draw("popular", N, C, 12)
    some = torch.arange(N) % 3 != 1
    marked = torch.where(some, y, -100)
    with torch.no_grad():
        holes = x.detach().clone()
        holes[~some] = math.nan
    holes.requires_grad_()
    short = x.detach()[some].requires_grad_()
    with tiles(16, 64, 8):
        made = gradients(loss_of(plan, holes, w, b, marked, 2.0**-6), holes, w, b)
        expected = gradients(loss_of(plan, short, w, b, y[some], 2.0**-6), short, w, b)
        exact = gradients(loss_of(plan, short, w, b, y[some], None), short, w, b)
    assert not torch.equal(expected[1], exact[1])
    assert not made[0][~some].any()
    for a, e in zip((made[0][some], *made[1:]), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)


@every_plan
def test_classes_at_minus_infinity_take_no_part(plan):
    x, w, b, y = draw("popular", N, C, 12)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    gone = torch.ones(C, dtype=torch.bool).index_fill(0, y, False) & (torch.arange(C) % 5 == 0)
    b = b.detach().masked_fill(gone, -math.inf).requires_grad_()
    with tiles(24, 50, 8):
        made, exact = (gradients(loss_of(plan, x, w, b, y, t, logit_scale=scale), x, w, b, scale) for t in (2.0**-5, None))
    assert all(t.isfinite().all() for t in made) and not made[1][gone].any()
    assert (made[0] - exact[0]).norm() > 1e-3 * exact[0].norm()
    torch.testing.assert_close(made[2], exact[2], rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(made[3], exact[3], rtol=1e-10, atol=1e-13)


@register_map
@dataclass(frozen=True, eq=False)
class Leaning(Map):
    """s = z + tanh z, whose gradient is a new tensor."""

    name: ClassVar[str] = "tests.leaning"

    @staticmethod
    def forward(z, numbers, tensors, out=None):
        return torch.add(z, torch.tanh(z), out=out)

    @staticmethod
    def backward(g, z, s, numbers, tensors):
        return g * (2.0 - torch.tanh(z).square())


def test_a_map_may_make_its_gradient_anew():
    x, w, b, y = draw("popular", N, C, C, identity=True)

    def made(t):
        stream = Stream(((x, w),), bias=b, maps=(Leaning(),), grad_filter=t)
        (state,), picked = reduce_logits(stream, y[:, None], (LogSumExp(exclude_picks=True),), engine="tiled")
        return gradients(F.softplus(state[0] + state[1].log() - picked[:, 0]).sum(), x)[0]

    with tiles(*TILE):
        some, exact = made(2.0**-5), made(0.0)
    assert 0.0 < max(ratios(some, exact, y[:, None], blocks(N, *TILE[::2]))) <= 2.0**-5


@every_plan
@pytest.mark.parametrize("shape", [(0, 50), (1, 50), (9, 1), (1, 1), (9, 50)])
def test_least_problems(shape, plan):
    x, w, b, y = draw("popular", *shape, 6)
    for target in (y, torch.full_like(y, -100)) if plan != "slabs" else (y,):
        losses = [loss_of(plan, x, w, b, target, t) for t in (2.0**-4, None)]
        made, exact = (gradients(loss, x, w, b) for loss in losses)
        assert torch.equal(losses[0].nan_to_num(), losses[1].nan_to_num())
        for a, e in zip(made, exact, strict=True):
            assert a.shape == e.shape and (a.isnan() == e.isnan()).all()
            assert (a - e).nan_to_num().norm() <= 0.1 * e.nan_to_num().norm()


@every_plan
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_and_single_precision(dtype, plan):
    """No exact reference is as short as these types: the filtered gradient is as far from it as the tolerance allows, and not further."""
    x, w, b, y = draw("popular", 200, 600, 32, dtype)
    tolerance = 2.0**-5
    made, rounded = (gradients(loss_of(plan, x, w, b, y, t), x, w, b) for t in (tolerance, None))
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    exact = gradients(loss_of(plan, *wide, y, tolerance), *wide)
    for a, r, e, like in zip(made, rounded, exact, (x, w, b), strict=True):
        assert a.dtype == like.dtype and not (a.double() - e).norm() > 0.02 * e.norm()
        assert like is b or not torch.equal(a, r), "nothing was left out"
    assert torch.equal(made[2], rounded[2])


@every_plan
def test_a_second_backward_and_a_second_run_give_the_same_bits(plan):
    x, w, b, y = draw("popular", N, C, 12)
    with tiles(24, 50, 8):
        loss = loss_of(plan, x, w, b, y, 2.0**-6)
        first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
        first = [t.clone() for t in first]
        second = torch.autograd.grad(loss, (x, w, b))
        again = gradients(loss_of(plan, x, w, b, y, 2.0**-6), x, w, b)
    for a, other, last in zip(first, second, again, strict=True):
        assert torch.equal(a, other) and torch.equal(a, last)


@every_plan
@pytest.mark.parametrize("factor", [1e-24, 1e-12, 1e25])
def test_a_loss_of_any_size_keeps_the_promise(factor, plan):
    """Squares of what reaches a logit may leave the range of float32; what cannot be measured is kept."""
    x, w, b, y = draw("popular", 60, C, C, torch.float32, identity=True)
    options = {"reduction": "none"}
    with tiles(24, 50, 8):
        if plan == "slabs":
            made, exact = (gradients(factor * BCE(x, w, y, linear_bias=b, grad_filter=t, engine="tiled", **options).sum(), x)[0]
                           for t in (2.0**-6, None))  # fmt: skip
        else:
            made, exact = (gradients(factor * loss_of(plan, x, w, b, y, t, **options).sum(), x)[0] for t in (2.0**-6, None))
    assert made.isfinite().all()
    assert max(ratios(made.double(), exact.double(), y[:, None], blocks(60, 24, 8))) <= 2.0**-6


def test_a_scale_of_zero_learns():
    """Its gradient cannot be read off logits of which it left nothing but the bias."""
    x, w, b, y = draw("popular", N, C, 12)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def slope(t):
        stream = Stream(((x, w),), bias=b, scale_tensor=scale, bias_last=True, grad_filter=t)
        ((m, mass),), picked = reduce_logits(stream, y[:, None], (LogSumExp(exclude_picks=True),), engine="tiled")
        return gradients(F.softplus(m + mass.log() - picked[:, 0]).sum(), scale)[0]

    with tiles(24, 50, 8):
        made, exact = slope(2.0**-4), slope(0.0)
    torch.testing.assert_close(made, exact, rtol=1e-10, atol=0.0)
    assert made != 0


def test_two_streams_stay_exact():
    """No entries of a divergence can be set apart, so that a head's filter is not used there."""
    x, w, b, _ = draw("popular", N, C, 12)
    teacher = Stream(((torch.randn(N, 5, dtype=torch.float64), torch.randn(C, 5, dtype=torch.float64)),))
    g = torch.ones(N, dtype=torch.float64)
    made, exact = (
        gradients(compare_sum(Stream(((x, w),), bias=b, grad_filter=t), teacher, Forward(), g, engine="tiled"), x, w)
        for t in (2.0**-4, 0.0)
    )
    assert torch.equal(made[0], exact[0]) and torch.equal(made[1], exact[1])

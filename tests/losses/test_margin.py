"""Margin losses: values and gradients against the whole matrix of cosines in float64, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.demo.memory import peak_extra_bytes, resident_peak
from bigclass.losses.margin import KINDS, linear_margin_loss, target_cosines
from tests.losses.margin_support import dense_margin_loss
from tests.support import ROADS, error

every_road = pytest.mark.parametrize("road", ROADS, ids="-".join)

# kind, margin as given, (m1, m2, m3)
MARGINS = [
    ("arcface", None, (1.0, 0.5, 0.0)),
    ("arcface", 1.2, (1.0, 1.2, 0.0)),
    ("cosface", None, (1.0, 0.0, 0.4)),
    ("combined", None, (1.0, 0.3, 0.2)),
    ("combined", (1.35, 0.0, 0.0), (1.35, 0.0, 0.0)),
    ("combined", (3.0, 0.2, 0.1), (3.0, 0.2, 0.1)),
]


def draw(n, c, d, centres=1, dtype=torch.float64, seed=0, near=None):
    """x (N, D) and w (C K, D) of many lengths, y (N,). near: the angle between a row and its class's first centre."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, d, generator=g).double(), torch.randn(c * centres, d, generator=g).double()
    y = torch.randint(c, (n,), generator=g)
    if near is not None:
        at = F.normalize(w[y * centres])
        aside = F.normalize(x - (x * at).sum(1, keepdim=True) * at)
        x = math.cos(near) * at + math.sin(near) * aside
    x, w = x * torch.rand(n, 1, generator=g).add(0.1) * 7, w * torch.rand(c * centres, 1, generator=g).add(0.1)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y


def ours(x, w, y, road, **options):
    with bigclass.planning(gradients=road[1], workspace=1 << 20):
        return linear_margin_loss(x, w, y, engine=road[0], **options)


def doubled(*leaves):
    return [t.detach().double().requires_grad_() for t in leaves]


@every_road
@settings(max_examples=50)
@given(data=st.data())
def test_every_kind_is_its_formula(road, data):
    """Value and gradients, to the rounding of float64, over many tiles."""
    kind, given_margin, margins = data.draw(st.sampled_from(MARGINS))
    beyond_pi = data.draw(st.sampled_from(["plain", "easy", "monotone", "clip", None] + (["linear"] if margins[0] == 1 else [])))
    centres = data.draw(st.sampled_from([1, 1, 2, 3]))
    t = data.draw(st.sampled_from([None, 0.3])) if centres == 1 else None
    straight_through = data.draw(st.booleans())
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    scale = data.draw(st.sampled_from([64.0, 8.0]))
    n, c, d = data.draw(st.integers(1, 130)), data.draw(st.integers(2, 900)), data.draw(st.integers(3, 20))
    x, w, y = draw(n, c, d, centres, seed=data.draw(st.integers(0, 999)))
    kept = torch.arange(n) % 3 != 1 if data.draw(st.booleans()) and n > 1 else torch.ones(n, dtype=torch.bool)
    target = torch.where(kept, y, 7 if data.draw(st.booleans()) and bool((y[kept] != 7).all()) else -100)
    ignore_index = 7 if bool((target[~kept] == 7).any()) else None

    loss = ours(
        x, w, target, road, kind=kind, margin=given_margin, beyond_pi=beyond_pi, subcenters=centres, logit_scale=scale, curriculum=t,
        gradient="straight_through" if straight_through else "differentiated", reduction=reduction, ignore_index=ignore_index,
    )  # fmt: skip
    if beyond_pi is None:
        beyond_pi = "linear" if margins[0] == 1 else "monotone"
    rows = dense_margin_loss(
        x, w, y, margins, scale=scale, centres=centres, beyond_pi=beyond_pi, straight_through=straight_through, t=t
    )  # fmt: skip
    rows = torch.where(kept, rows, 0.0)
    want = rows if reduction == "none" else rows.sum() / (kept.sum() if reduction == "mean" else 1)
    assert error(loss, want) <= 1e-12
    up = torch.randn(loss.shape, dtype=torch.float64)
    for g, e in zip(torch.autograd.grad(loss, (x, w), up), torch.autograd.grad(want, (x, w), up), strict=True):
        assert error(g, e) <= 1e-12


@every_road
@pytest.mark.parametrize("options", [{}, {"kind": "combined", "margin": (1.3, 0.2, 0.1), "subcenters": 2}, {"curriculum": 0.2}], ids=str)
def test_the_gradient_is_that_of_finite_differences(road, options):
    x, w, y = draw(4, 6, 4, options.get("subcenters", 1), seed=3)
    assert torch.autograd.gradcheck(lambda x, w: ours(x, w, y, road, logit_scale=4.0, **options), (x, w))


@every_road
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("near", [None, 0.6, 0.05])
@pytest.mark.parametrize("options", [{}, {"subcenters": 2, "kind": "combined"}, {"curriculum": 0.4}], ids=str)
def test_single_and_half_precision_keep_to_float64(road, dtype, near, options):
    """Gradients are as exact as the type they come in. near = 0.05: the fp32 cosine knows the angle only to 1e-5."""
    centres = options.get("subcenters", 1)
    x, w, y = draw(80, 700, 24, centres, dtype, near=near)
    exact = doubled(x, w)
    margins = KINDS["combined"] if centres > 1 else (1.0, 0.5, 0.0)
    want = dense_margin_loss(*exact, y, margins, scale=16.0, centres=centres, beyond_pi="linear", t=options.get("curriculum")).mean()
    loss = ours(x, w, y, road, logit_scale=16.0, **options)
    assert loss.dtype == torch.float32 and error(loss, want) <= 2e-6
    limit = {torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    for g, e in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(want, exact), strict=True):
        assert g.dtype == dtype and error(g, e) <= limit


@every_road
def test_losses_of_certain_rows_keep_their_digits(road):
    """e^-20 and less, where plain fp32 cross-entropy gives 0."""
    g = torch.Generator().manual_seed(0)
    w = F.normalize(torch.randn(400, 64, generator=g))
    y = torch.randint(400, (30,), generator=g)
    x = (w[y] + 0.01 * torch.randn(30, 64, generator=g)).requires_grad_()
    w.requires_grad_()
    exact = doubled(x, w)
    loss, want = ours(x, w, y, road, margin=0.2, reduction="none"), dense_margin_loss(*exact, y, (1.0, 0.2, 0.0))
    assert float(want.detach().max()) < 1e-6 and bool(
        (F.relu(loss - want) <= 2e-4 * want).all() and (F.relu(want - loss) <= 2e-4 * want).all()
    )
    for g_, e in zip(torch.autograd.grad(loss.sum(), (x, w)), torch.autograd.grad(want.sum(), exact), strict=True):
        assert error(g_, e) <= 5e-4


def test_the_margin_of_a_small_angle_is_made_of_the_angle_and_not_of_its_rounded_cosine():
    """At theta = 2e-3 an fp32 cosine is off by a hundredth of 1 - cos, and the plain formula in fp32 with it; ours is made in float64."""
    x, w, y = draw(64, 500, 32, dtype=torch.float32, near=2e-3)
    exact = doubled(x, w)
    want = dense_margin_loss(*exact, y, (1.0, 0.5, 0.0), scale=8.0)
    dense = dense_margin_loss(x, w, y, (1.0, 0.5, 0.0), scale=8.0)
    loss = ours(x, w, y, ("tiled", "auto"), logit_scale=8.0, reduction="none")
    assert error(loss, want) < 1e-6 and error(dense, want) > 2e-5
    sums = [torch.autograd.grad(t.sum(), at) for t, at in ((loss, (x, w)), (dense, (x, w)), (want, exact))]
    for got, plain, true in zip(*sums, strict=True):
        assert error(got, true) < 1e-3 < 5e-3 < error(plain, true)


@every_road
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_at_the_class_itself_and_opposite_to_it_everything_is_finite(road, dtype):
    w = torch.randn(300, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20)
    x = torch.cat((3.0 * w[:10], -0.5 * w[10:20])).requires_grad_()
    w.requires_grad_()
    for kind in KINDS:
        for beyond_pi in (None, "plain", "easy", "clip"):
            loss = ours(x, w, y, road, kind=kind, beyond_pi=beyond_pi)
            assert all(bool(t.isfinite().all()) for t in (loss, *torch.autograd.grad(loss, (x, w))))


@every_road
def test_margins_may_differ_from_row_to_row(road):
    x, w, y = draw(12, 500, 6)
    m2, m3 = torch.rand(12).double() - 0.3, torch.rand(12).double() * 0.3
    loss = ours(x.view(3, 4, 6), w, y.view(3, 4), road, kind="combined", margin=(1.0, m2.view(3, 4), m3.view(3, 4)), beyond_pi="clip")
    want = torch.stack([dense_margin_loss(x[i : i + 1], w, y[i : i + 1], (1.0, m2[i], m3[i]), beyond_pi="clip") for i in range(12)]).mean()
    for a, b in zip((loss, *torch.autograd.grad(loss, (x, w))), (want, *torch.autograd.grad(want, (x, w))), strict=True):
        assert error(a, b) <= 1e-12
    one = ours(x[:5], w, y[:5], road, kind="cosface", margin=m3[:5], reduction="none")
    assert error(one, torch.cat([dense_margin_loss(x[i : i + 1], w, y[i : i + 1], (1.0, 0.0, m3[i])) for i in range(5)])) <= 1e-12


@every_road
def test_ignored_rows_contribute_exactly_nothing(road):
    """Even if they hold NaN (pitfall 48); with all of them ignored the mean is NaN, as torch's, and gradients are 0."""
    x, w, y = draw(20, 300, 6, dtype=torch.float32)
    kept = torch.arange(20) % 4 > 0
    holed = torch.where(kept[:, None], x.detach(), torch.nan).requires_grad_()
    loss = ours(holed, w, torch.where(kept, y, -100), road)
    want = ours(x.detach()[kept].requires_grad_(), w, y[kept], road)
    dx, dw = torch.autograd.grad(loss, (holed, w))
    assert error(loss, want) < 1e-6 and error(dw, torch.autograd.grad(want, w)[0]) < 1e-6
    assert bool((dx[~kept] == 0).all()) and bool(dx[kept].any(1).all())
    none = torch.full((20,), -100)
    assert bool(ours(x, w, none, road).isnan()) and float(ours(x, w, none, road, reduction="sum").detach()) == 0.0
    assert bool((ours(x, w, none, road, reduction="none") == 0).all())
    assert not any(bool(g.any()) for g in torch.autograd.grad(ours(x, w, none, road), (x, w)))
    assert bool(ours(x[:0], w, none[:0], road).isnan()) and ours(x[:0], w, none[:0], road, reduction="none").shape == (0,)


@every_road
def test_frozen_operands_get_no_gradient_and_change_nothing(road):
    x, w, y = draw(30, 400, 6)
    whole = torch.autograd.grad(ours(x, w, y, road), (x, w))
    for i in range(2):
        leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate((x, w))]
        loss = ours(*leaves, y, road)
        loss.backward()
        assert leaves[1 - i].grad is None and error(leaves[i].grad, whole[i]) <= 1e-12
    assert error(ours(x.detach(), w.detach(), y, road), ours(x, w, y, road)) <= 1e-12


@every_road
def test_a_class_of_zeros_has_cosine_zero_and_the_gradient_of_normalize(road):
    x, w, y = draw(10, 300, 5)
    w = w.detach().index_fill(0, torch.tensor([7]), 0.0).requires_grad_()
    loss, want = ours(x, w, y, road), dense_margin_loss(x, w, y, (1.0, 0.5, 0.0), beyond_pi="linear").mean()
    assert error(loss, want) <= 1e-12
    got, true = torch.autograd.grad(loss, w)[0], torch.autograd.grad(want, w)[0]
    others = torch.arange(300) != 7
    assert error(got[7], true[7]) <= 1e-12 and error(got[others], true[others]) <= 1e-12


def test_equal_centres_give_their_gradient_to_the_first():
    x, w, y = draw(10, 40, 5)
    twice = w.detach().repeat_interleave(2, 0).requires_grad_()
    for road in ROADS:
        dw = torch.autograd.grad(ours(x, twice, y, road, subcenters=2), twice)[0]
        assert not bool(dw[1::2].any()) and bool(dw[::2].any(1).all())


def test_autocast_chooses_the_products_and_nothing_else():
    x, w, y = draw(30, 400, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(x, w, y, ("tiled", "auto"))
    assert loss.dtype == torch.float32 and error(loss, ours(x, w, y, ("tiled", "auto"))) <= 1e-6


@pytest.mark.parametrize(
    ("engine", "options"),
    [("dense", {}), ("tiled", {"subcenters": 2}), ("tiled", {"reduction": "none", "curriculum": torch.tensor(0.3)})],
    ids=["dense", "in the forward", "recompute"],
)
def test_it_compiles_to_one_graph(engine, options):
    x, w, y = draw(20, 300, 8, options.get("subcenters", 1), dtype=torch.float32)
    y[3] = -100

    def loss(x, w, y):
        return linear_margin_loss(x, w, y, engine=engine, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(x, w, y), loss(x, w, y)
    for a, b in zip((got, *torch.autograd.grad(got, (x, w))), (want, *torch.autograd.grad(want, (x, w))), strict=True):
        assert error(a, b) <= 1e-6
    y[0] = 300
    with pytest.raises(IndexError, match=r"target .*\[0, 300\), got 300 or a negative one"):
        compiled(x, w, y)
    y[0] = -1
    with pytest.raises(IndexError, match=r"\[0, 300\), got 300 or a negative one"):
        compiled(x, w, y)
    y[0] = 301
    with pytest.raises(IndexError, match=r"\[0, 300\), got 301"):
        compiled(x, w, y)


@pytest.mark.parametrize("name", ["m2", "m3"])
def test_margins_of_rows_are_looked_at(name):
    x, w, y = draw(6, 50, 4)
    kind = {"m2": "arcface", "m3": "cosface"}[name]
    for bad in (math.nan, math.inf, *((-0.1, 4.0) if name == "m2" else ())):
        margins = torch.full((6,), 0.3).index_fill(0, torch.tensor([4]), bad)
        with pytest.raises(ValueError, match=f"margin: expected .* for {name}, got .* in row 4"):
            linear_margin_loss(x, w, y, kind=kind, margin=margins)
        ignored = linear_margin_loss(x, w, y.index_fill(0, torch.tensor([4]), -100), kind=kind, margin=margins)
        rest = [0, 1, 2, 3, 5]  # an ignored row may hold anything
        assert error(ignored, linear_margin_loss(x[rest], w, y[rest], kind=kind, margin=0.3)) <= 1e-7
    negative = torch.full((6,), -0.3)
    if name == "m3":
        assert linear_margin_loss(x, w, y, kind=kind, margin=negative).isfinite()
    else:  # a negative angle is AdaFace's, and cut off at 0
        assert (
            error(
                linear_margin_loss(x, w, y, margin=negative, beyond_pi="clip"), linear_margin_loss(x, w, y, margin=-0.3, beyond_pi="clip")
            )
            <= 1e-7
        )
    with pytest.raises(ValueError, match=r"margin: expected an angle in \[-pi, pi\], got -4"):
        linear_margin_loss(x, w, y, margin=-4.0, beyond_pi="clip")


def test_target_cosines_pass_opcheck_and_come_in_float64():
    x, w, y = draw(9, 30, 5, 2, dtype=torch.bfloat16)
    picks = torch.stack((2 * y, 2 * y + 1), 1)
    torch.library.opcheck(target_cosines, (x.detach(), w.detach(), picks))
    want = (F.normalize(x.double()) @ F.normalize(w.double()).t()).gather(1, picks)
    assert error(target_cosines(x.detach(), w.detach(), picks), want) <= 1e-14


@every_road
def test_a_second_derivative_is_refused(road):
    x, w, y = draw(6, 50, 4)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(ours(x, w, y, road), x, create_graph=True)


BAD = [
    (ValueError, "kind", {"kind": "softmax"}),
    (ValueError, "margin", {"kind": "combined", "margin": 0.5}),
    (ValueError, "margin", {"margin": (1.0, 0.5, 0.0)}),
    (ValueError, "margin", {"margin": math.nan}),
    (ValueError, "margin", {"margin": 4.0}),
    (ValueError, "margin", {"kind": "combined", "margin": (0.0, 0.5, 0.0)}),
    (ValueError, "margin", {"margin": torch.rand(7)}),
    (ValueError, "margin", {"margin": torch.rand(6, requires_grad=True)}),
    (ValueError, "beyond_pi", {"beyond_pi": "never"}),
    (ValueError, "beyond_pi", {"kind": "combined", "margin": (2.0, 0.1, 0.0), "beyond_pi": "linear"}),
    (ValueError, "gradient", {"gradient": "none"}),
    (ValueError, "logit_scale", {"logit_scale": 0.0}),
    (ValueError, "logit_scale", {"logit_scale": torch.tensor(64.0)}),
    (ValueError, "subcenters", {"subcenters": 7}),
    (TypeError, "subcenters", {"subcenters": 2.0}),
    (ValueError, "curriculum", {"curriculum": 0.1, "subcenters": 2}),
    (ValueError, "curriculum", {"curriculum": torch.rand(2)}),
    (ValueError, "curriculum", {"curriculum": math.inf}),
    (ValueError, "reduction", {"reduction": "all"}),
    (ValueError, "engine", {"engine": "fast"}),
    (TypeError, "ignore_index", {"ignore_index": 1.5}),
    (ValueError, "target", {"target": torch.zeros(5, dtype=torch.long)}),
    (TypeError, "target", {"target": torch.zeros(6)}),
    (IndexError, "target", {"target": torch.full((6,), 50)}),
    (IndexError, "target", {"target": torch.full((6,), -1)}),
    (IndexError, "target", {"target": torch.full((6,), 25), "subcenters": 2}),
    (ValueError, "linear_weight", {"linear_weight": torch.zeros(50, 3)}),
    (TypeError, "input", {"input": torch.zeros(6, 4, dtype=torch.long)}),
    (ValueError, "input: .* row 2", {"input": torch.ones(6, 4).index_fill(0, torch.tensor([2]), 0.0)}),
]


@pytest.mark.parametrize(("kind", "words", "given"), BAD, ids=[f"{i} {b[1]}" for i, b in enumerate(BAD)])
def test_what_does_not_fit_is_refused_by_name(kind, words, given):
    usual = {"input": torch.ones(6, 4), "linear_weight": torch.randn(50, 4), "target": torch.arange(6)}
    with pytest.raises(kind, match=words):
        linear_margin_loss(**{**usual, **given})


def step(n: int, c: int, d: int, dtype: torch.dtype, options: dict):
    """A loss and its gradients, in 8 MiB of workspace."""

    def make(n: int, c: int):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
        w = torch.empty(c * options.get("subcenters", 1), d, dtype=dtype).normal_(generator=g).requires_grad_()
        return x, w, torch.randint(c, (n,), generator=g)

    def run(x, w, y):
        with bigclass.planning(workspace=8 << 20):
            linear_margin_loss(x, w, y, engine="tiled", **options).backward()
        return x.grad, w.grad

    for _ in range(2):
        run(*make(16, 900))
    problem = make(n, c)
    return lambda: run(*problem)


@pytest.mark.skipif(resident_peak() is None, reason="this system does not tell a process's peak memory")
@pytest.mark.parametrize(
    ("n", "dtype", "options"),
    [
        (12, torch.float32, {}),  # gradients in the forward
        (256, torch.bfloat16, {}),
        (256, torch.float32, {"subcenters": 2}),
    ],
    ids=str,
)
def test_no_second_tensor_of_the_weights_size_is_made(n, dtype, options):
    """Here dw is 39 MiB in fp32, 20 in bf16; F.normalize would make one more in the forward and one in the backward."""
    c = 40000 // options.get("subcenters", 1)
    measured = peak_extra_bytes(step, n, c, 256, dtype, options)
    assert measured is not None and measured <= 14 << 20

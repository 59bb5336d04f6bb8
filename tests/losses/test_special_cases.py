"""Special cases: as PyTorch's own dense computation, on every road, values and gradients, down to where NaN and infinities lie.

The reference is torch.nn.functional.cross_entropy in float64 over dense logits (`dense`); sizes "small" fit one tile, "tiles" takes
several chunks and slabs of a 1 MiB workspace, ragged in both directions.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass
from tests.support import ROADS, error

INF, NAN = math.inf, math.nan
SIZES = {"small": (7, 11, 5), "tiles": (70, 5003, 7)}
REDUCTIONS = ("mean", "sum", "none")
CE, LSE, LOGP, TOPK = bigclass.linear_cross_entropy, bigclass.linear_logsumexp, bigclass.linear_log_prob, bigclass.linear_topk

ALL_ROADS = (*ROADS, ("auto", "auto"))  # small plain losses have a short cut of their own
every_road = pytest.mark.parametrize("road", ALL_ROADS, ids="-".join)
either_engine = pytest.mark.parametrize("road", (ROADS[0], ROADS[2]), ids="-".join)
every_size = pytest.mark.parametrize("size", SIZES)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def draw(n: int, c: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, D), w (C, D), b (C,) and y (N,)"""
    g = torch.Generator().manual_seed(seed)
    x, w, b = torch.randn(n, d, generator=g), torch.randn(c, d, generator=g), torch.randn(c, generator=g)
    return x.to(dtype), w.to(dtype), b.to(dtype), torch.randint(c, (n,), generator=g)


def on(road, function, *args, **options):
    """function on this road, in a workspace of 1 MiB."""
    engine, gradients = road
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        return function(*args, engine=engine, **options)


def logits(x, w, b=None, softcap=None, logit_scale=None, temperature=1.0):
    """s (..., C, [d_1, ..., d_K]), dense."""
    s = torch.tensordot(x, w, ([-1], [-1]))
    s = s if b is None else s + b
    s = s if logit_scale is None else s * logit_scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    return s / temperature


def dense(
    x,
    w,
    y,
    *,
    linear_bias=None,
    softcap=None,
    logit_scale=None,
    shift=0,
    z_loss=0.0,
    reduction="mean",
    ignore_index=None,
    weight=None,
    **options,
):
    """The same loss by torch.nn.functional.cross_entropy, in float64."""
    wide = [None if t is None else t.double() for t in (x, w, linear_bias)]
    s = logits(*wide, softcap, logit_scale.double().reshape(()) if isinstance(logit_scale, Tensor) else logit_scale)
    if shift:
        s, y = s[..., : max(s.shape[-2] - shift, 0), :], y[..., shift:]
    options |= {"weight": None if weight is None else weight.double(), "reduction": "none"}
    k_dimensional = w.dim() > 2
    lead = s.shape[:1] + s.shape[2:] if k_dimensional else s.shape[:-1]
    flat = s if k_dimensional else s.reshape(-1, s.shape[-1])
    if y.is_floating_point():
        y, ignore, kept, mass = y.double().reshape(flat.shape), None, None, math.prod(lead)
    else:
        y, ignore = y.long().reshape(flat.shape[:1] + flat.shape[2:]), -100 if ignore_index is None else ignore_index
        kept = y != ignore
        mass = kept.sum() if weight is None else torch.where(kept, weight.double()[y.clamp(0, w.shape[0] - 1)], 0.0).sum()
        options["ignore_index"] = ignore
    rows = F.cross_entropy(flat, y, **options)
    z = z_loss * flat.logsumexp(1).square() if z_loss else torch.zeros_like(rows)
    z = z if kept is None else torch.where(kept, z, 0.0)
    if reduction == "none":
        return (rows + z).reshape(lead)
    if reduction == "sum":
        return rows.sum() + z.sum()
    return rows.sum() / mass + (z.sum() / (rows.numel() if kept is None else kept.sum()) if z_loss else 0.0)


def same(mine: Tensor, theirs: Tensor, tolerance: float = 3e-6, label: str = "") -> None:
    """NaN and infinities in the same places; elsewhere the relative error is below tolerance, and zeros are zeros."""
    assert mine.shape == theirs.shape, f"{label}: {tuple(mine.shape)} against {tuple(theirs.shape)}"
    mine, theirs = mine.detach().double(), theirs.detach().double()
    assert torch.equal(mine.isnan(), theirs.isnan()), f"{label}: NaN at {mine.isnan().sum()} against {theirs.isnan().sum()} places"
    for infinity in (INF, -INF):
        assert torch.equal(mine == infinity, theirs == infinity), f"{label}: {infinity} elsewhere"
    finite = theirs.isfinite()
    e = error(mine[finite], theirs[finite])
    assert e <= tolerance, f"{label}: error {e:.2e}"


def gradients(loss: Tensor, leaves: dict[str, Tensor], upstream: Tensor | None = None) -> dict[str, Tensor]:
    names = [name for name, t in leaves.items() if t.requires_grad]
    if not names or not loss.requires_grad:
        return {}
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return dict(zip(names, torch.autograd.grad(loss, [leaves[name] for name in names], upstream), strict=True))


def check(road, x, w, y, b=None, *, tolerance: float = 3e-6, frozen=(), upstream="random", **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of x, w, b, a scale tensor and probabilities, against `dense`; returns ours."""
    leaves = {"x": x, "w": w} | ({} if b is None else {"b": b})
    if isinstance(options.get("logit_scale"), Tensor):
        leaves["scale"] = options.pop("logit_scale")
    if y.is_floating_point():
        leaves["y"] = y
    leaves = {name: t.detach().requires_grad_(name not in frozen) for name, t in leaves.items()}

    def run(function):
        extra = options | ({"logit_scale": leaves["scale"]} if "scale" in leaves else {})
        return function(leaves["x"], leaves["w"], leaves.get("y", y), linear_bias=leaves.get("b"), **extra)

    mine, theirs = run(partial(on, road, CE)), run(dense)
    assert mine.dtype == (torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32)
    same(mine, theirs, tolerance, "loss")
    if upstream == "random" and mine.dim():
        upstream = torch.rand(mine.shape, generator=torch.Generator().manual_seed(5)) + 0.5
    else:
        upstream = None
    made, exact = gradients(mine, leaves, upstream), gradients(theirs, leaves, upstream)
    assert made.keys() == exact.keys() == {name for name in leaves if name not in frozen}
    for name, g in made.items():
        assert g.dtype == leaves[name].dtype
        same(g, exact[name], tolerance, f"gradient of {name}")
    return mine, made


# --- sizes ----------------------------------------------------------------------------------------------------------------------


@every_road
@every_reduction
@pytest.mark.parametrize(
    "shape", [(0, 11, 5), (0, 5003, 7), (4, 1, 5), (4, 11, 1), (1, 1, 1), (1, 70001, 2), (2, 64, 3), (3, 65, 3)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}], ids=["plain", "all"])
def test_no_rows_one_class_and_one_feature_are_as_in_torch(road, reduction, shape, options):
    x, w, b, y = draw(*shape)
    check(road, x, w, y, b, reduction=reduction, tolerance=2e-5, **options)


@every_road
def test_no_rows_behind_leading_axes(road):
    for lead in ((0, 3), (3, 0)):
        x, w, y = torch.randn(*lead, 5, requires_grad=True), torch.randn(11, 5), torch.zeros(lead, dtype=torch.long)
        assert on(road, CE, x, w, y, reduction="none").shape == lead
        loss, stats = on(road, CE, x, w, y, reduction="sum", shift=1, return_stats=True)
        assert loss == 0 and stats.lse.shape == (lead[0], max(lead[1] - 1, 0))
        lse, at = on(road, LSE, x, w, index=y)
        assert lse.shape == at.shape == lead
        assert all(t.shape == (*lead, 2) for t in on(road, TOPK, x, w, 2))


@every_road
@every_reduction
@every_size
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"weight": True}], ids=str)
def test_all_rows_ignored_is_nan_zero_or_zeros_with_zero_gradients(road, reduction, size, options):
    """Pitfall 8."""
    x, w, b, y = draw(*SIZES[size])
    options = {**options, "weight": torch.rand(w.shape[0])} if "weight" in options else options
    loss, made = check(road, x, w, torch.full_like(y, -100), b, reduction=reduction, **options)
    assert loss.isnan() if reduction == "mean" else not loss.any()
    assert len(made) == 3 and not any(g.any() for g in made.values())


@every_road
def test_all_rows_ignored_with_stats_has_zero_gradients(road):
    x, w, _, y = draw(*SIZES["small"])
    x, w = x.requires_grad_(), w.requires_grad_()
    loss, stats = on(road, CE, x, w, torch.full_like(y, -100), return_stats=True)
    loss.backward()
    assert loss.isnan() and not stats.lse.any() and not stats.correct.any()
    assert not x.grad.any() and not w.grad.any()


@every_road
@every_reduction
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "softcap": 3.0, "z_loss": 1e-2}], ids=["plain", "all"])
def test_an_unbatched_row_gives_a_scalar(road, reduction, options):
    x, w, b, y = draw(1, 11, 5)
    loss, _ = check(road, x[0], w, y[0], b, reduction=reduction, **options)
    assert loss.shape == ()
    check(road, x[0], w, torch.rand(11), b, reduction=reduction, **options)


@every_road
@every_reduction
def test_leading_axes_are_rows(road, reduction):
    x, w, b, y = draw(70, 5003, 7)
    loss, _ = check(road, x.view(2, 5, 7, 7), w, y.view(2, 5, 7), b, reduction=reduction)
    assert loss.shape == ((2, 5, 7) if reduction == "none" else ())
    check(road, x[:6].view(2, 3, 7), w[:11], torch.rand(2, 3, 11), b[:11], reduction=reduction)


# --- infinities and NaN -----------------------------------------------------------------------------------------------------------


@every_road
@every_reduction
@every_size
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"z_loss": 0.01}, {"logit_scale": torch.tensor(0.7)}], ids=str)
def test_classes_masked_by_an_infinite_bias_are_as_in_torch(road, reduction, size, options):
    """A few, a run of them longer than any tile, and a target among them (infinite loss, finite gradients)."""
    x, w, b, y = draw(*SIZES[size])
    c = w.shape[0]
    b[: c // 2] = -INF  # whole tiles
    b[-2:] = -INF
    frozen = ("scale", "b") if "softcap" in options or "logit_scale" in options else ()
    check(road, x, w, y.clamp(c // 2, c - 3), b, reduction=reduction, frozen=frozen, **options)
    check(road, x, w, y, b, reduction=reduction, frozen=frozen, **options)


@every_road
@pytest.mark.parametrize("last", [0, 5002])
def test_only_one_class_unmasked_is_certain(road, last):
    x, w, _, y = draw(*SIZES["tiles"])
    b = torch.full((5003,), -INF)
    b[last] = 0.5
    loss, made = check(road, x, w, torch.full_like(y, last), b)
    assert loss == 0 and not any(g.any() for g in made.values())


@every_road
@every_reduction
@every_size
def test_rows_of_minus_infinity_are_nan_as_in_torch(road, reduction, size):
    x, w, b, y = draw(*SIZES[size])
    check(road, x, w, y, torch.full_like(b, -INF), reduction=reduction)
    x = x.abs()
    x[2, 0] = -INF  # this row only
    check(road, x, w.abs() + 0.1, y, b, reduction=reduction, tolerance=1e-5)


@every_road
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "size, options",
    [("small", {}), ("small", {"label_smoothing": 0.1}), ("small", {"z_loss": 0.01}), ("small", "probabilities"), ("tiles", {})],
    ids=str,
)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", ["x", "w", "b", "b of a target"])
def test_nan_and_infinite_operands_spread_as_in_torch(road, reduction, size, options, value, place):
    x, w, b, y = draw(*SIZES[size])
    y[y == 3] = 4
    if place.endswith("target"):
        y[1] = 3
    {"x": x, "w": w}.get(place, b[:, None])[3, 0] = value
    if options == "probabilities":
        y = torch.softmax(torch.randn(x.shape[0], w.shape[0], generator=torch.Generator().manual_seed(1)), 1)
        options = {"frozen": ("y",)}
    check(road, x, w, y, b, reduction=reduction, **options)


@every_road
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_infinite_operands_under_a_soft_cap_are_as_in_torch(road, value):
    x, w, b, y = draw(*SIZES["small"])
    b[3] = value
    check(road, x, w, y, b, softcap=3.0)


@either_engine
@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
def test_lse_and_picks_of_infinite_logits_are_as_in_torch(road, value):
    x, w, b, y = draw(*SIZES["small"])
    b[3], y[2] = value, 3
    lse, at = on(road, LSE, x, w, linear_bias=b, index=y)
    s = logits(x, w, b).double()
    same(lse, s.logsumexp(1))
    same(at, s.gather(1, y[:, None])[:, 0])
    same(on(road, LSE, x, w, linear_bias=torch.full_like(b, -INF)), torch.full((7,), -INF))


@either_engine
@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_log_prob_and_entropy_of_infinite_logits_are_as_in_torch(road, value, k):
    x, w, b, y = draw(*SIZES["small"])
    b[3], y[2] = value, 3
    index = y if k == 1 else torch.stack((y, y.flip(0)), 1)
    logp, h = on(road, LOGP, x, w, index, linear_bias=b, return_entropy=True)
    exact = logits(x, w, b).double().log_softmax(1)
    same(logp, exact.gather(1, index.view(7, -1)).view(index.shape))
    same(h, -(exact.exp() * exact).nansum(1) if value == -INF else torch.full((7,), NAN))


@either_engine
def test_log_prob_and_entropy_of_rows_of_minus_infinity_are_nan(road):
    x, w, b, y = draw(*SIZES["small"])
    logp, h = on(road, LOGP, x, w, y, linear_bias=torch.full_like(b, -INF), return_entropy=True)
    assert logp.isnan().all() and h.isnan().all()


# --- ignored rows -----------------------------------------------------------------------------------------------------------------

EXTRAS = {
    "plain": {}, "smoothing": {"label_smoothing": 0.1}, "z": {"z_loss": 0.1}, "weights": {"weight": True}, "softcap": {"softcap": 3.0},
    "all": {"label_smoothing": 0.1, "z_loss": 0.1, "weight": True, "softcap": 3.0},
}  # fmt: skip


@every_road
@every_reduction
@pytest.mark.parametrize("size, extra", [*(("small", e) for e in EXTRAS), ("tiles", "plain"), ("tiles", "all")])
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_ignored_rows_contribute_exactly_nothing_whatever_they_hold(road, reduction, size, extra, stats):
    """Pitfall 48: the same bits whether an ignored row holds NaN, infinities or zeros, and the value without those rows."""
    x, w, b, y = draw(*SIZES[size])
    options = EXTRAS[extra] | ({"weight": torch.rand(w.shape[0]) + 0.1} if "weight" in EXTRAS[extra] else {})
    out = torch.zeros_like(y, dtype=torch.bool)
    out[[0, 3, 4, -1]] = True
    y[out] = -100

    def run(x, y, upstream):
        leaves = {"x": x.requires_grad_(), "w": w.detach().requires_grad_(), "b": b.detach().requires_grad_()}
        loss = on(road, CE, leaves["x"], leaves["w"], y, linear_bias=leaves["b"], reduction=reduction, return_stats=stats, **options)
        total = loss
        if stats:
            loss, s = loss
            total = loss.sum() + 0.1 * s.lse.sum()
            assert not s.lse[y == -100].any() and not s.correct[y == -100].any()
        return loss, gradients(total, leaves, upstream if total.dim() else None)

    up = torch.rand(len(y)) + 0.5
    poison = torch.tensor([NAN, INF, -INF, 1e30])[:, None].expand(-1, x.shape[1])
    dirty, clean = x.clone(), x.clone()
    dirty[out], clean[out] = poison, 0.0
    (loss, made), (expected, exact) = run(dirty, y, torch.where(out, NAN, up)), run(clean, y, up)
    assert torch.equal(loss, expected)
    for name in made:
        assert torch.equal(made[name], exact[name]), name
        assert made[name].isfinite().all() and made[name].any(), name
    assert not made["x"][out].any()
    if reduction == "none":
        assert not loss[out].any()
    (short, fewer) = run(x[~out].clone(), y[~out], up[~out])
    same(loss[~out] if loss.dim() else loss, short, 1e-6)
    for name in fewer:
        same(made[name][~out] if name == "x" else made[name], fewer[name], 1e-6, name)


@either_engine
def test_ignored_picks_of_log_prob_contribute_exactly_nothing(road):
    x, w, _, y = draw(*SIZES["small"])
    x[[0, 3]] = NAN
    x, w = x.requires_grad_(), w.requires_grad_()
    y[[0, 3]] = -100
    logp, h = on(road, LOGP, x, w, y, return_entropy=True)
    assert not logp[[0, 3]].any() and not h[[0, 3]].any()
    (logp.sum() + h.sum()).backward()
    assert not x.grad[[0, 3]].any() and x.grad.isfinite().all() and w.grad.isfinite().all() and w.grad.any()


@every_road
def test_an_infinite_weight_of_an_unused_class_reaches_no_gradient(road):
    x, w, b, y = draw(*SIZES["small"])
    v = torch.ones(11)
    v[0] = INF
    y = y.clamp_min(1)
    y[2] = -100
    check(road, x, w, y, b, weight=v)


@every_road
@every_reduction
@pytest.mark.parametrize(
    "ignore, dtype",
    [
        (0, torch.int64),
        (4, torch.int32),
        (10, torch.int64),
        (-1, torch.int64),
        (11, torch.int32),
        (2**40, torch.int64),
        (2**40, torch.int32),
    ],
)
def test_ignore_index_may_be_a_class_or_any_other_number(road, reduction, ignore, dtype):
    x, w, b, y = draw(*SIZES["small"])
    if ignore < 2**40:
        y[[1, 5]] = ignore
    check(road, x, w, y.to(dtype), b, reduction=reduction, ignore_index=ignore, weight=torch.rand(11) + 0.1)


# --- dtypes and layouts -----------------------------------------------------------------------------------------------------------


@every_road
@every_size
@pytest.mark.parametrize(
    "dtypes, tolerance",
    [
        ("ddd", 1e-13),
        ("fff", 3e-6),
        ("fdf", 1e-6),
        ("dff", 1e-6),
        ("hff", 2e-3),
        ("fhh", 2e-3),
        ("bfb", 1e-2),
        ("bhf", 1e-2),
        ("bbb", 1e-2),
    ],
)
def test_operands_of_different_dtypes_are_summed_in_the_widest(road, size, dtypes, tolerance):
    """Each gradient has its operand's dtype, and only that rounding."""
    kinds = {"d": torch.float64, "f": torch.float32, "h": torch.float16, "b": torch.bfloat16}
    x, w, b, y = (t if k is None else t.to(kinds[k]) for t, k in zip(draw(*SIZES[size]), (*dtypes, None), strict=True))
    check(road, x, w, y.int(), b, tolerance=tolerance, label_smoothing=0.1, weight=torch.rand(w.shape[0]).double() + 0.1)


@every_road
@every_reduction
@every_size
def test_strides_do_not_matter(road, reduction, size):
    """Transposed, sliced and expanded (stride 0) operands, targets, class weights and upstream gradients."""
    n, c, d = SIZES[size]
    x, w, b, y = draw(2 * n, 2 * c, 2 * d)
    y = y % c
    check(
        road,
        x.t().contiguous().t()[::2, ::2],
        w.t().contiguous().t()[1::2, ::2],
        y[::2],
        b[::2],
        weight=torch.rand(2 * c)[::2],
        reduction=reduction,
    )
    check(
        road,
        x[:1, :d].expand(n, d),
        w[:c, :1].expand(c, d),
        y[:1].expand(n),
        b[:1].expand(c),
        weight=torch.rand(1).expand(c),
        reduction=reduction,
    )
    probabilities = torch.rand(c, generator=torch.Generator().manual_seed(2)).expand(n, c)
    check(road, x[::2, ::2], w[:c, ::2], probabilities, b[:c], reduction=reduction)


@every_road
def test_an_expanded_upstream_gradient_weighs_every_row(road):
    x, w, b, y = draw(*SIZES["tiles"])
    for upstream in (torch.tensor(0.3).expand(70), torch.rand(140)[::2], torch.zeros(70).index_fill(0, torch.tensor([5]), 2.0)):
        made = []
        for function in (partial(on, road, CE), dense):
            leaves = {"x": x.detach().requires_grad_(), "w": w.detach().requires_grad_(), "b": b.detach().requires_grad_()}
            loss = function(leaves["x"], leaves["w"], y, linear_bias=leaves["b"], reduction="none")
            made.append(gradients(loss, leaves, upstream.to(loss.dtype)))
        for name in made[0]:
            same(made[0][name], made[1][name], label=name)


@every_road
@every_reduction
@pytest.mark.parametrize("learns", ["x", "w", "b", "scale", "xw", "wb"])
def test_frozen_operands_get_no_gradient_and_the_others_the_same(road, reduction, learns):
    """Pitfall 17."""
    x, w, b, y = draw(*SIZES["tiles"])
    names = {"x", "w", "b", "scale"}
    learns = {learns} if learns in names else set(learns)
    check(road, x, w, y, b, logit_scale=torch.tensor(0.8), reduction=reduction, frozen=names - learns, label_smoothing=0.1)
    leaves = {name: t.detach().requires_grad_(name in learns) for name, t in zip("xwb", (x, w, b), strict=True)}
    if learns & set("xwb"):
        on(road, CE, leaves["x"], leaves["w"], y, linear_bias=leaves["b"], reduction=reduction).sum().backward()
        assert {name for name, t in leaves.items() if t.grad is not None} == learns & set("xwb")


@every_road
@every_reduction
def test_without_grad_the_value_is_the_same_and_no_graph_is_kept(road, reduction):
    x, w, b, y = draw(*SIZES["tiles"])
    x = x.requires_grad_()
    expected = on(road, CE, x, w, y, linear_bias=b, reduction=reduction)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss, stats = on(road, CE, x, w, y, linear_bias=b, reduction=reduction, return_stats=True)
            plain = on(road, CE, x, w, y, linear_bias=b, reduction=reduction)
            logp, h = on(road, LOGP, x, w, y, return_entropy=True)
        assert not any(t.requires_grad for t in (loss, plain, logp, h, stats.lse))
        same(loss, expected, 1e-6)
        same(plain, expected, 1e-6)


# --- options ----------------------------------------------------------------------------------------------------------------------


@every_road
@every_reduction
@every_size
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.3, 1.0])
def test_everything_together_is_as_composed_in_torch(road, reduction, size, probabilities, smoothing):
    x, w, b, y = draw(*SIZES[size])
    g = torch.Generator().manual_seed(3)
    v = torch.rand(w.shape[0], generator=g) + 0.1
    y = torch.rand(len(y), len(v), generator=g) if probabilities else y.index_fill(0, torch.tensor([1, 4]), -100)
    options = {
        "softcap": 3.0,
        "logit_scale": torch.tensor(1.3),
        "z_loss": 0.02,
        "weight": v,
        "label_smoothing": smoothing,
        "reduction": reduction,
    }
    check(road, x, w, y, b, tolerance=2e-5, **options)


@every_road
@every_reduction
def test_probabilities_that_are_learnt_get_their_gradient(road, reduction):
    x, w, b, _ = draw(*SIZES["tiles"])
    p = torch.softmax(torch.randn(70, 5003, generator=torch.Generator().manual_seed(1)), 1)
    check(road, x, w, p, b, reduction=reduction, tolerance=1e-5)
    check(
        road,
        x,
        w,
        p,
        b,
        reduction=reduction,
        tolerance=1e-5,
        frozen=("x", "w", "b"),
        weight=torch.rand(5003),
        label_smoothing=0.1,
        z_loss=0.01,
    )


@every_road
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_size
@pytest.mark.parametrize("shape, value", [((), 1.0), ((), 0.0), ((1,), 0.0), ((), -1.5), ((1,), 20.0)], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_learnt_scale_gets_its_gradient(road, reduction, size, shape, value, softcap):
    x, w, b, y = draw(*SIZES[size])
    _, made = check(road, x, w, y, b, logit_scale=torch.full(shape, value), softcap=softcap, reduction=reduction, tolerance=1e-4)
    assert made["scale"].shape == shape and made["scale"].any()
    check(road, x, w, y, logit_scale=value, softcap=softcap, reduction=reduction, tolerance=1e-5)


@every_road
@every_reduction
def test_huge_logits_neither_overflow_nor_lose_the_gradient(road, reduction):
    """Logits of size 1e4, targets from certain to hopeless; float64 operands, so that dense rounding is no excuse."""
    x, w, b, y = draw(70, 5003, 7, torch.float64)
    y[::2] = (x @ w.T * 3e3).argmax(1)[::2]
    loss, made = check(road, x * 3e3, w, y, b, reduction=reduction, tolerance=1e-12)
    assert loss.max() > 1e3 and made["w"].any()
    x, w, b, y = draw(70, 5003, 7)
    check(road, (x * 3e3).round(), (w * 8).round() / 8, y, b.round(), reduction=reduction, tolerance=1e-5)


@every_road
@every_reduction
def test_duplicate_rows_and_classes_add_up(road, reduction):
    x, w, b, _ = draw(*SIZES["tiles"])
    y = torch.tensor([3, 4802]).repeat(35)
    twice = torch.arange(5003) % 2502
    check(road, x[:2].repeat(35, 1), w[twice], y, b[twice], reduction=reduction, tolerance=2e-5)
    check(road, x, w, torch.full((70,), 4802), b, reduction=reduction)


@every_road
@every_reduction
@pytest.mark.parametrize("positions", [(1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_k_dimensional_weights_are_a_classifier_at_each_position(road, reduction, positions, bias):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 5, generator=g), torch.randn(11, *positions, 5, generator=g)
    b = torch.randn(11, *positions, generator=g) if bias else None
    y = torch.randint(11, (4, *positions), generator=g)
    v = torch.rand(11, generator=g) + 0.1
    for options in ({}, {"weight": v, "label_smoothing": 0.1}):
        mine = on(road, CE, x, w, y, linear_bias=b, reduction=reduction, **options)
        same(mine, F.linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, **options), 1e-6)
    y.view(-1)[::3] = 7
    check(road, x, w, y, b, reduction=reduction, ignore_index=7, weight=v, label_smoothing=0.1, z_loss=0.1, softcap=4.0)
    check(road, x, w, torch.rand(4, 11, *positions, generator=g), b, reduction=reduction, weight=v)
    loss, stats = on(road, CE, x, w, y, linear_bias=b, reduction="none", return_stats=True)
    assert loss.shape == stats.lse.shape == stats.correct.shape == (4, *positions)
    same(stats.lse, logits(x, w, b).logsumexp(1), 1e-6)


@every_road
@every_reduction
@pytest.mark.parametrize("length, shift", [(7, 1), (7, 3), (7, 6), (7, 7), (7, 9), (1, 1), (0, 1)])
@pytest.mark.parametrize("lead, ignore", [((), None), ((2, 3), None), ((2,), 3)], ids=str)
def test_shift_is_slicing_without_the_copies(road, reduction, length, shift, ignore, lead):
    g = torch.Generator().manual_seed(0)
    x, w, y = torch.randn(*lead, length, 5, generator=g), torch.randn(11, 5, generator=g), torch.randint(11, (*lead, length), generator=g)
    y[..., 2::4] = -100 if ignore is None else ignore
    loss, made = check(road, x, w, y, reduction=reduction, shift=shift, ignore_index=ignore)
    assert reduction != "none" or loss.shape == (*lead, max(length - shift, 0))
    assert not made["x"][..., max(length - shift, 0) :, :].any()
    _, stats = on(road, CE, x, w, y, reduction=reduction, shift=shift, ignore_index=ignore, return_stats=True)
    assert stats.lse.shape == stats.correct.shape == (*lead, max(length - shift, 0))


@every_road
@every_reduction
@every_size
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_stats_are_the_lse_and_whether_the_target_leads(road, reduction, size, probabilities):
    x, w, b, y = draw(*SIZES[size])
    s = logits(x.double(), w.double(), b.double())
    y[::2] = s.argmax(1)[::2]
    keep = torch.ones(len(y), dtype=torch.bool)
    if probabilities:
        target = F.one_hot(y, w.shape[0]) * 0.9 + 0.1 / w.shape[0]
    else:
        keep[[0, 3]] = False
        target = torch.where(keep, y, -100)
    leaves = {"x": x.detach().requires_grad_(), "w": w.detach().requires_grad_(), "b": b.detach().requires_grad_()}
    loss, stats = on(road, CE, leaves["x"], leaves["w"], target, linear_bias=leaves["b"], reduction=reduction, return_stats=True)
    same(loss, on(road, CE, x, w, target, linear_bias=b, reduction=reduction), 1e-6)
    same(stats.lse, torch.where(keep, s.logsumexp(1), 0.0), 1e-6)
    assert torch.equal(stats.correct, (y == s.argmax(1)) & keep) and stats.correct.any() and not stats.correct.all()
    assert stats.kept_share == 1.0 and stats.promised_error == 0.0
    u = torch.rand(len(y), generator=torch.Generator().manual_seed(4))
    exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    lse = logits(*exact.values()).logsumexp(1)
    reference = gradients(
        (lse * u * keep).sum() + dense(exact["x"], exact["w"], target, linear_bias=exact["b"], reduction=reduction).sum(), exact
    )
    made = gradients((stats.lse * u).sum() + loss.sum(), leaves)
    for name in made:
        same(made[name], reference[name], label=name)


# --- log-sum-exp, log-probabilities, top-k ------------------------------------------------------------------------------------------


@either_engine
@every_size
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"logit_scale": torch.tensor([-1.2])}, {"softcap": 3.0, "logit_scale": 0.5}], ids=str
)
@pytest.mark.parametrize("k, dtype", [(None, torch.int32), (0, torch.int64), (1, torch.int64), (3, torch.int64), (3, torch.int32)])
def test_logsumexp_and_picks_are_differentiable_in_any_shape(road, size, options, k, dtype):
    x, w, b, y = draw(*SIZES[size])
    index = y if k is None else torch.randint(-1, w.shape[0], (len(y), k), generator=torch.Generator().manual_seed(1))
    if k == 3:
        index[:, 2] = index[:, 1]  # twice the same class
    made = []
    for wide in (False, True):
        leaves = {name: (t.double() if wide else t).detach().requires_grad_() for name, t in zip("xwb", (x, w, b), strict=True)}
        if wide:
            s = logits(*leaves.values(), **options)
            lse = s.logsumexp(1)
            at = s.gather(1, index.view(len(y), -1).clamp_min(0)).view(index.shape).masked_fill(index < 0, 0.0)
        else:
            lse, at = on(
                road, LSE, leaves["x"].view(1, -1, x.shape[1]), leaves["w"], linear_bias=leaves["b"], index=index[None].to(dtype), **options
            )
            assert at.shape == (1, *index.shape)
            assert k == 0 or (at.view(len(y), -1) <= lse.view(-1, 1)).logical_or(index.view(len(y), -1) < 0).all()  # pitfall 12
            lse, at = lse[0], at[0]
        total = (lse * torch.linspace(-1, 2, len(y))).sum() + (at * 0.3).sum()
        made.append({"lse": lse, "at": at} | gradients(total, leaves))
    for name in made[0]:
        same(made[0][name], made[1][name], 2e-5, name)


@either_engine
@every_size
@pytest.mark.parametrize("softcap, temperature", [(None, 1.0), (None, 0.3), (3.0, 1.0), (3.0, 2.5)])
@pytest.mark.parametrize("k", [None, 0, 1, 4])
def test_log_prob_and_entropy_are_differentiable_with_temperature_after_the_cap(road, size, softcap, temperature, k):
    x, w, b, y = draw(*SIZES[size])
    index = y if k is None else torch.randint(w.shape[0], (len(y), k), generator=torch.Generator().manual_seed(1))
    if k == 4:
        index[::3, 2] = -100
    options = {"softcap": softcap, "temperature": temperature}
    made = []
    for wide in (False, True):
        scale = torch.tensor(0.7, dtype=torch.float64 if wide else torch.float32).requires_grad_()
        leaves = {name: (t.double() if wide else t).detach().requires_grad_() for name, t in zip("xwb", (x, w, b), strict=True)}
        if wide:
            lp = logits(*leaves.values(), logit_scale=scale, **options).log_softmax(1)
            logp = lp.gather(1, index.view(len(y), -1).clamp_min(0)).view(index.shape).masked_fill(index < 0, 0.0)
            h = -(lp.exp() * lp).sum(1)
        else:
            logp, h = on(
                road, LOGP, leaves["x"], leaves["w"], index, linear_bias=leaves["b"], logit_scale=scale, return_entropy=True, **options
            )
            assert (logp <= 0).all() and (h >= 0).all()
        total = (logp * 0.7).sum() + (h * torch.linspace(-1, 2, len(y))).sum()
        made.append({"logp": logp, "h": h} | gradients(total, {**leaves, "scale": scale}))
    for name in made[0]:
        same(made[0][name], made[1][name], 2e-5, name)


@either_engine
@pytest.mark.parametrize("lead", [2.0, 12.0, 20.0, 60.0])
def test_the_entropy_of_near_certain_rows_keeps_its_digits(road, lead):
    """Pitfall 43: LSE - sum of p s would be all rounding. The reference sums the terms without the largest, in float64."""
    c, d = 5003, 4
    x = torch.eye(d)[torch.tensor([0, 1, 2])].requires_grad_()
    w = (torch.randn(c, d, generator=torch.Generator().manual_seed(0)) * 0.25).requires_grad_()
    with torch.no_grad():
        for row, best in enumerate((0, 2501, 5002)):  # the largest in the first, a middle and the last slab
            w[best, row] = lead + math.log(c)
    _, h = on(road, LOGP, x, w, torch.tensor([0, 2501, 5002]), return_entropy=True)
    xd, wd = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    s = xd @ wd.T
    u = s - s.gather(1, torch.tensor([[0], [2501], [5002]]))
    rest = torch.ones_like(s).scatter(1, torch.tensor([[0], [2501], [5002]]), 0.0)
    mass = (u.exp() * rest).sum(1)
    exact = torch.log1p(mass) - (u.exp() * u * rest).sum(1) / (1 + mass)
    same(h, exact, 1e-5, "entropy")
    for mine, theirs in zip(torch.autograd.grad(h.sum(), (x, w)), torch.autograd.grad(exact.sum(), (xd, wd)), strict=True):
        assert mine.any()
        same(mine, theirs, 1e-4, "gradient")


@either_engine
@pytest.mark.parametrize("c", [1, 3, 63, 64, 65, 200, 5003])
@pytest.mark.parametrize("k", ["1", "2", "all"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": -0.8}], ids=["", "bent"])
def test_topk_is_torchs_for_every_number_of_classes(road, c, k, options):
    n = 40 if c == 5003 else 4
    x, w, b, _ = draw(n, c, 3, torch.float64)
    k = c if k == "all" else min(int(k), c)
    if k == 5003:
        x = x[:2]
    s = logits(x, w, b, **options)
    values, classes, logp = on(road, TOPK, x, w, k, linear_bias=b, return_log_probs=True, **options)
    exact = s.topk(k)
    same(values, exact.values, 1e-12)
    same(s.gather(1, classes), exact.values, 1e-12)
    same(logp.exp(), s.softmax(1).gather(1, exact.indices), 1e-12)
    assert (classes.sort(1).values.diff(dim=1) > 0).all()
    assert not values.requires_grad and classes.dtype == torch.int64


@either_engine
@pytest.mark.parametrize("c", [20, 1000, 5003])
@pytest.mark.parametrize("finite", [0, 1, 3])
def test_topk_gives_distinct_classes_where_logits_are_masked_or_equal(road, c, finite):
    """With fewer than k finite logits the rest is -inf, at real classes; equal logits come at different classes."""
    x, w, _, _ = draw(70, c, 3)
    b = torch.full((c,), -INF)
    b[c // 2 : c // 2 + finite] = 0.0
    for bias, weights in ((b, w), (torch.zeros(c), w * 0)):
        values, classes = on(road, TOPK, x, weights, 5, linear_bias=bias)
        s = logits(x, weights, bias)
        same(values, s.topk(5).values)
        assert classes.min() >= 0 and classes.max() < c
        same(s.gather(1, classes), values)
        assert (classes.sort(1).values.diff(dim=1) > 0).all()


@either_engine
@pytest.mark.parametrize("c", [20, 1000, 5003])
def test_topk_puts_nan_first_as_torch_does(road, c):
    x, w, b, _ = draw(70, c, 3)
    b[[c // 3, c - 1]] = NAN
    x[5] = NAN
    values, classes = on(road, TOPK, x, w, 4, linear_bias=b)
    same(values, logits(x, w, b).topk(4).values)
    assert (classes[:5, :2].sort(1).values == torch.tensor([c // 3, c - 1])).all()
    b[c // 2] = INF
    same(on(road, TOPK, x, w, 4, linear_bias=b)[0], logits(x, w, b).topk(4).values)


@either_engine
def test_topk_of_one_row_and_of_leading_axes(road):
    x, w, b, _ = draw(6, 100, 3)
    values, classes = on(road, TOPK, x.view(2, 3, 3), w, 4, linear_bias=b)
    assert values.shape == classes.shape == (2, 3, 4)
    one, at = on(road, TOPK, x[0], w, 4, linear_bias=b)
    assert one.shape == (4,) and torch.equal(at, classes[0, 0])

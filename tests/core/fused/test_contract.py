"""The numeric contract of cross-entropy on the fused engine, in Triton's interpreter (on a GPU: tests/gpu)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.core import LogSumExp, ShiftedMoment, Softcap, Stream, entropy, log_sum_exp, reduce_logits, stream_loss
from bigclass.core.engines import tiles
from tests.losses.test_contract import check_draw, check_pooled, exact, ours, with_gradients
from tests.support import KINDS, draw, error

pytest.importorskip("triton", reason="Triton is not installed")
launch = pytest.importorskip("bigclass.core.engines.fused.launch")

ROADS = (("fused", "forward"), ("fused", "recompute"), ("fused", "saved"))
every_road = pytest.mark.parametrize("road", ROADS, ids="-".join)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@every_road
@every_dtype
@settings(max_examples=8, phases=[Phase.generate])
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(64, 100),
    c=st.integers(257, 600),
    d=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    bias=st.booleans(),
)
def test_a_single_draw_is_as_exact_as_dense_and_gradients_survive_confident_rows(road, dtype, kind, n, c, d, seed, bias):
    check_draw(road, dtype, kind, n, c, d, seed, bias)


@every_road
@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_pooled_over_draws_no_output_and_no_gradient_is_less_exact_than_dense(road, dtype, kind):
    check_pooled(road, dtype, kind, 64, 300, 48, draws=8)


@every_road
@pytest.mark.parametrize("options", [{"softcap": 20.0, "label_smoothing": 0.1}, {"z_loss": 1e-3}, {"reduction": "sum"}], ids=str)
def test_options_give_what_the_tiled_engine_gives_and_the_same_bits_each_time(road, options):
    x, w, b, y = draw("peaked", 70, 300, 40, torch.float32, 1)
    y[3] = -100
    runs = [with_gradients(ours(x, w, b, y, road, **options), (x, w, b)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    other = with_gradients(ours(x, w, b, y, ("tiled", "recompute"), **options), (x, w, b))
    for a, t in zip(runs[0], other, strict=True):
        assert error(a, t) < 2e-6


@pytest.mark.parametrize("n", [1, 20])
def test_no_pick_exceeds_its_own_log_sum_exp(n):
    """Pitfall 12: picks that a fold counts are read from its own tile."""
    for seed in range(6):
        x, w, b, y = draw("onehot", n, 300, 32, torch.float32, seed)
        lse, at = bigclass.linear_logsumexp(x, w, linear_bias=b, index=torch.stack((y, y.flip(0)), -1), engine="fused")
        assert bool((at <= lse[:, None]).all())
        lse, at = bigclass.linear_logsumexp(x, w, linear_bias=b, index=y, engine="fused")
        assert bool((at <= lse).all())


@every_road
def test_frozen_operands_get_no_gradient_and_change_nothing(road):
    """Pitfall 17."""
    x, w, b, y = draw("flat", 70, 200, 20, torch.float32, 2)
    whole = with_gradients(ours(x, w, b, y, road), (x, w, b))
    for i in range(3):
        leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate((x, w, b))]
        ours(*leaves, y, road).backward()
        assert [t.grad is None for t in leaves] == [j != i for j in range(3)]
        assert error(leaves[i].grad, whole[1 + i]) < 1e-6


@every_road
def test_ignored_rows_that_hold_nan_contribute_exactly_nothing(road):
    """Pitfall 48."""
    x, w, b, y = draw("peaked", 70, 200, 20, torch.float32, 3)
    y[::7] = -100
    clean = with_gradients(ours(x, w, b, y, road), (x, w, b))
    poisoned = x.detach().clone()
    poisoned[::7] = float("nan")
    got = with_gradients(ours(poisoned.requires_grad_(), w, b, y, road), (poisoned, w, b))
    assert torch.equal(got[0], clean[0]) and not bool(got[1][::7].any())
    for g, t in zip(got[1:], clean[1:], strict=True):
        assert error(g, t) < 1e-6


@every_road
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["features", "bias"])
def test_nan_and_infinities_come_out_as_from_the_tiled_engine(road, value, where):
    x, w, b, y = (t.detach() for t in draw("flat", 20, 90, 8, torch.float32, 4))
    (x[5:6] if where == "features" else b[40:41]).fill_(value)
    results = []
    for r in (road, ("tiled", road[1])):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        results.append(with_gradients(ours(*leaves, y, r, reduction="sum"), leaves))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite()) and torch.equal(got.isnan(), want.isnan())
        there = want.isfinite()
        assert torch.allclose(got[there], want[there], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["features", "bias"])
def test_nan_and_infinities_reach_the_entropy_as_on_the_tiled_engine(value, where):
    """A row of NaN has no largest logit, and a row of equal ones has many."""
    x, w, b, y = (t.detach() for t in draw("flat", 20, 90, 8, torch.float32, 4))
    (x[5:6] if where == "features" else b[40:41]).fill_(value)
    x[7] = 0.0
    b[:40] = 1.0
    results = []
    for engine in ("fused", "tiled"):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        stream = Stream(((leaves[0], leaves[1]),), bias=leaves[2])
        states, picked = reduce_logits(stream, y[:, None], (LogSumExp(exclude_picks=True), ShiftedMoment()), engine=engine)
        h = entropy(states[1])
        loss = (log_sum_exp(states[0]) + h + picked[:, 0]).sum()
        results.append((h, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        there = want.isfinite()
        assert torch.allclose(got[there], want[there], rtol=1e-4, atol=1e-5)


@every_road
def test_autocast_casts_slabs_of_a_float32_weight(road):
    """Operands in bf16, sums in fp32; the weight is never cast whole."""
    x, w, b, y = draw("peaked", 40, 900, 24, torch.float32, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(ours(x, w, b, y, road), (x, w, b))
    half = [t.detach().bfloat16().requires_grad_() for t in (x, w)]
    want = exact(*half, b, y)
    for g, t in zip(got, want, strict=True):
        assert g.dtype == torch.float32 and error(g, t) < 6e-3


@pytest.mark.parametrize(("n", "c", "d"), [(1, 1, 1), (0, 5, 3), (3, 1, 70), (65, 64, 32), (64, 65, 33), (2, 130, 31)])
@every_road
def test_shapes_on_and_off_every_block(road, n, c, d):
    torch.manual_seed(0)
    x, w, b, y = (
        torch.randn(n, d, requires_grad=True),
        torch.randn(c, d, requires_grad=True),
        torch.randn(c, requires_grad=True),
        torch.randint(c, (n,)),
    )
    got = with_gradients(ours(x, w, b, y, road, reduction="sum"), (x, w, b))
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    want = with_gradients(ours(*leaves, y, ("dense", "auto"), reduction="sum"), leaves)
    for g, t in zip(got, want, strict=True):
        assert error(g, t) < 2e-5 or float((g - t).abs().max()) < 1e-6


def test_strided_class_vectors_and_transposed_picks_are_read_as_they_are():
    torch.manual_seed(0)
    n, c, d = 20, 90, 8
    x, w = torch.randn(n, d), torch.randn(c, d)
    picks = torch.randint(-1, c, (3, n)).t()
    for vector in (torch.randn(c, 2)[:, 0], torch.randn(1).expand(c)):
        stream = Stream(((x, w),), bias=vector, class_scale=vector)
        (got, at), (want, there) = (_lse(stream, picks, engine) for engine in ("fused", "tiled"))
        assert error(got, want) < 1e-6 and error(at, there) < 1e-6


def _lse(stream, picks, engine):
    states, picked = reduce_logits(stream, picks, (LogSumExp(exclude_picks=True),), engine=engine)
    return log_sum_exp(states[0]), picked


def test_no_pick_exceeds_a_log_sum_exp_that_counts_it_beside_one_that_does_not():
    x, w, _, y = draw("onehot", 60, 200, 24, torch.float32, 0)
    picks = torch.stack((y, y.flip(0), y.roll(1), y.roll(2)), -1)
    states, picked = reduce_logits(Stream(((x, w),)), picks, (LogSumExp(), LogSumExp(exclude_picks=True)), engine="fused")
    assert picked is not None and bool((picked <= log_sum_exp(states[0])[:, None]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lead", [3.0, 7.0, 10.0])
def test_the_gradient_at_a_counted_pick_is_rounded_once(dtype, lead):
    """Pitfall 4: p rounded before the pick's own gradient arrives would erase that of a confident row."""
    torch.manual_seed(0)
    n, c = 20, 90
    y = torch.randint(c, (n, 2))
    y[::3, 1] = y[::3, 0]
    x = torch.zeros(n, c).scatter(1, y[:, :1], lead).to(dtype).requires_grad_()
    lse, at = bigclass.linear_logsumexp(x, torch.eye(c, dtype=dtype), index=y, engine="fused")
    (got,) = torch.autograd.grad((lse - at[:, 0]).mean(), x)
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad((wide.logsumexp(1) - wide.gather(1, y[:, :1])[:, 0]).mean(), wide)
    assert error(got, want) < (4e-3 if dtype == torch.bfloat16 else 4e-3 if lead > 9 else 1e-3)


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
def test_nothing_of_an_ignored_row_reaches_any_gradient(gradients):
    """Pitfall 48, also through a given tensor, under a map, and to the arguments of the row loss."""
    torch.manual_seed(0)
    n, c = 20, 90
    keep = torch.arange(n) % 3 > 0
    x, w, given = torch.randn(n, 8), torch.randn(c, 8), torch.randn(n, c)
    x[~keep] = given[~keep] = float("nan")
    leaves = [t.requires_grad_() for t in (x, w, torch.rand(n, dtype=torch.float64))]
    results = []
    for engine in ("fused", "tiled"):
        with bigclass.planning(gradients=gradients):
            stream = Stream(((x, w),), given=given, maps=(Softcap.at(5.0),))
            args = (leaves[2],)
            picks = torch.randint(c, (n, 1), generator=torch.Generator().manual_seed(0))
            folds = (LogSumExp(exclude_picks=True),)
            loss = stream_loss(stream, picks, folds, "cross_entropy", args, (0.0, 0.0, 0.0, 0.0), keep=keep, engine=engine)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*results, strict=True):
        assert bool(got.isfinite().all()) and error(got, want) < 1e-5


@every_road
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_road_of_devices_that_multiply_half_types_into_fp32(road, dtype, monkeypatch):
    """Operands stay 16 bits wide up to the products, fp16 gradients are boosted (emulated: products widen them)."""
    monkeypatch.setattr(tiles, "WIDE_OUTPUT", ("cpu",))
    plain = tiles._product
    monkeypatch.setattr(tiles, "_product", lambda a, b, out, beta, alpha: plain(a.to(out.dtype), b.to(out.dtype), out, beta, alpha))
    x, w, b, y = draw("peaked", 300, 200, 24, dtype, 6)
    got = with_gradients(ours(x, w, b, y, road), (x, w, b))
    for g, t in zip(got, exact(x, w, b, y), strict=True):
        assert error(g, t) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


def test_the_newer_tf32_switch_is_read():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for asked, given in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "tf32x3")):
            matmul.fp32_precision = asked
            assert launch.precision(torch.float32) == given and launch.precision(torch.bfloat16) == "ieee"
            assert (launch.config("sm_90", torch.float32, 0) is launch.IEEE) == (asked == "ieee")
            assert launch.config("sm_90", torch.float32, 0, products=False) is not launch.IEEE
    finally:
        matmul.fp32_precision = before


def test_log_probabilities_of_several_ids_and_multi_token_losses_are_those_of_the_tiled_engine():
    x, w, b, y = draw("onehot", 70, 300, 40, torch.float32, 5)
    several = torch.stack((y.roll(1), y, y), 1).view(7, 10, 3)
    several[0] = -100

    def everything(engine):
        holes = x.detach().clone().view(7, 10, 40)
        holes[0] = float("nan")
        holes.requires_grad_()
        options = {"linear_bias": b, "softcap": 60.0, "engine": engine}
        logp, h = bigclass.linear_log_prob(holes, w, several, return_entropy=True, temperature=0.8, shift=1, **options)
        whole = bigclass.linear_sequence_log_prob(holes, w, several[..., 1], **options)
        total = (logp * torch.linspace(-1, 1, 27).view(9, 3)).sum() + h.sum() + whole.square().sum()
        targets = y.view(7, 10)
        multi = bigclass.linear_multi_token_cross_entropy(
            [x.view(7, 10, 40), x.view(7, 10, 40) * 0.5], w, targets, shifts=(0, 2), **options
        )
        one = bigclass.linear_multi_token_cross_entropy(x.view(7, 10, 40), w, targets, shifts=(0, 2), label_smoothing=0.1, **options)
        return [logp, h, whole, multi, one, *torch.autograd.grad(total + multi + one, (holes, x, w, b))]

    for mine, theirs in zip(everything("fused"), everything("tiled"), strict=True):
        assert error(mine, theirs) < 1e-5

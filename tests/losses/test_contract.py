"""The numeric contract of cross-entropy: errors against float64, measured beside PyTorch's own dense computation in the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from tests.support import KINDS, ROADS, draw, error, exact_nll

SLACK = 4 * 2.0**-24
NAMES = ("loss", "dx", "dw", "db")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def with_gradients(loss, leaves, upstream=1.0):
    return [loss, *torch.autograd.grad(loss, leaves, torch.as_tensor(upstream, dtype=loss.dtype))]


def ours(x, w, b, y, road, **options):
    engine, gradients = road
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        return bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine=engine, **options)


def exact(x, w, b, y):
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    return with_gradients(exact_nll(F.linear(*leaves), y).mean(), leaves)


@pytest.mark.parametrize("road", ROADS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@settings(max_examples=12)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(64, 150),
    c=st.integers(257, 1500),
    d=st.integers(1, 130),
    seed=st.integers(0, 2**31),
    bias=st.booleans(),
)
def test_a_single_draw_is_as_exact_as_dense_and_gradients_survive_confident_rows(road, dtype, kind, n, c, d, seed, bias):
    check_draw(road, dtype, kind, n, c, d, seed, bias)


def check_draw(road, dtype, kind, n, c, d, seed, bias):
    """One draw: no output and no gradient less exact than dense, gradients of confident rows right."""
    x, w, b, y = draw(kind, n, c, d, dtype, seed)
    truth = exact(x, w, b if bias else b * 0, y)
    leaves = (x, w, b) if bias else (x, w)
    mine = with_gradients(ours(x, w, b if bias else None, y, road), leaves)
    dense = with_gradients(F.cross_entropy(F.linear(x, w, b if bias else None), y), leaves)
    for name, z, t, reference in zip(NAMES, mine, dense, truth, strict=False):
        assert z.dtype == (dtype if name != "loss" or dtype == torch.float64 else torch.float32)
        if not bool(t.isfinite().all()):  # the dense form's fp16 logits overflowed
            assert bool(z.isfinite().all()) == bool(reference.isfinite().all())
            continue
        limit = 1e-12 if dtype == torch.float64 else 1.1 * error(t, reference) + SLACK
        assert error(z, reference) <= limit, f"{name}: {error(z, reference):.2e}, dense {error(t, reference):.2e}"
        if kind == "onehot" and d >= 16 and dtype in (torch.float32, torch.bfloat16):
            assert error(z, reference) <= (1e-4 if dtype == torch.float32 else 4e-3), name


@pytest.mark.parametrize("road", ROADS[1:], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pooled_over_30_draws_no_output_and_no_gradient_is_less_exact_than_dense(road, dtype, kind):
    check_pooled(road, dtype, kind, 96, 700, 48)


def check_pooled(road, dtype, kind, n, c, d, draws=30):
    """Draws pooled: the contract's 1.1 x dense, without slack."""
    pooled: dict[str, list[list[torch.Tensor]]] = {name: [[], [], []] for name in NAMES}
    for seed in range(draws):
        x, w, b, y = draw(kind, n, c, d, dtype, seed)
        leaves = (x, w, b)
        mine = with_gradients(ours(x, w, b, y, road), leaves)
        dense = with_gradients(F.cross_entropy(F.linear(x, w, b), y), leaves)
        for name, *zs in zip(NAMES, mine, dense, exact(x, w, b, y), strict=True):
            for column, z in zip(pooled[name], zs, strict=True):
                column.append(z.detach().double().flatten())
    for name, (mine, dense, truth) in ((n, [torch.cat(p) for p in ps]) for n, ps in pooled.items()):
        assert error(mine, truth) <= 1.1 * error(dense, truth), f"{name}: {error(mine, truth):.3e} against dense {error(dense, truth):.3e}"


@pytest.mark.parametrize("road", ROADS[1:], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_accumulate_in_fp32_over_many_tiles(road, dtype):
    """Pitfalls 4 and 45: the error does not grow with the number of chunks, and a small upstream factor does not underflow."""
    x, w, b, y = draw("peaked", 512, 3000, 32, dtype, 0)
    truth = exact(x, w, b, y)
    few = with_gradients(bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine="tiled"), (x, w, b))
    many = with_gradients(ours(x, w, b, y, road), (x, w, b))
    for a, m, t in zip(few[1:], many[1:], truth[1:], strict=True):
        assert error(m, t) <= 1.05 * error(a, t) + SLACK
    tiny = with_gradients(ours(x, w, b, y, road, reduction="sum"), (x, w, b), upstream=2.0**-24 if dtype == torch.float16 else 2.0**-100)
    whole = with_gradients(ours(x, w, b, y, road, reduction="sum"), (x, w, b))
    scale = 2.0**-24 if dtype == torch.float16 else 2.0**-100
    for a, m in zip(tiny[1:], whole[1:], strict=True):
        # rounding once, at the end: what fp16 can hold of the product, it holds
        assert error(a.double(), (m.double() * scale).to(dtype).double()) <= (0.05 if dtype == torch.float16 else 1e-7)


@pytest.mark.parametrize("road", ROADS[1:], ids="-".join)
def test_same_inputs_same_bits(road):
    x, w, b, y = draw("peaked", 300, 2000, 40, torch.float32, 1)
    runs = [with_gradients(ours(x, w, b, y, road, softcap=20.0, label_smoothing=0.1), (x, w, b)) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("road", ROADS, ids="-".join)
def test_no_pick_exceeds_its_own_log_sum_exp(road):
    """Pitfall 12."""
    for seed in range(20):
        x, w, b, y = draw("onehot", 64, 300, 32, torch.float32, seed)
        with bigclass.planning(workspace=1 << 20):
            lse, at = bigclass.linear_logsumexp(x, w, linear_bias=b, index=y, engine=road[0])
        assert bool((at <= lse).all())


@pytest.mark.parametrize("road", ROADS, ids="-".join)
def test_frozen_operands_get_no_gradient_and_change_nothing(road):
    """Pitfall 17."""
    x, w, b, y = draw("flat", 70, 400, 20, torch.float32, 2)
    whole = with_gradients(ours(x, w, b, y, road), (x, w, b))
    for i in range(3):
        leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate((x, w, b))]
        loss = ours(*leaves, y, road)
        loss.backward()
        for j, t in enumerate(leaves):
            assert (t.grad is None) == (j != i)
        assert error(leaves[i].grad, whole[1 + i]) < 1e-6


@pytest.mark.parametrize("road", ROADS, ids="-".join)
@settings(max_examples=15)
@given(data=st.data())
def test_per_row_upstream_gradients_reach_every_operand(road, data):
    """Pitfall 1: reduction="none" with arbitrary upstream gradients."""
    n, c, d = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 600)), data.draw(st.integers(1, 40))
    kind = data.draw(st.sampled_from(KINDS))
    x, w, b, y = draw(kind, n, c, d, torch.float32, data.draw(st.integers(0, 10**6)))
    up = torch.randn(n)
    loss = ours(x, w, b, y, road, reduction="none")
    got = torch.autograd.grad(loss, (x, w, b), up)
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = exact_nll(F.linear(*leaves), y)
    want = torch.autograd.grad(truth, leaves, up.double())
    assert error(loss, truth) < 2e-5
    for g, t in zip(got, want, strict=True):
        assert error(g, t) < 1e-4 or float(t.norm()) < 1e-30

"""Low-rank adapters: x w^T + alpha (x A^T) B^T as two operand pairs equals the layer whose weight is w + alpha B A."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigclass
from bigclass.losses.lora import Lora
from tests.support import ROADS, draw, error, errors

roads = pytest.mark.parametrize(("engine", "gradients"), ROADS)


def adapters(c: int, d: int, ranks: tuple[int, ...], dtype=torch.float64, seed: int = 0, learnt: bool = False) -> list[Lora]:
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) / math.sqrt(shape[-1])).to(dtype).requires_grad_()

    made = []
    for r in ranks:
        alpha = torch.tensor(0.7, dtype=dtype, requires_grad=True) if learnt else 1.7
        made.append(Lora(leaf(r, d), leaf(c, r), alpha))
    return made


def adapted(w: Tensor, lora: list[Lora]) -> Tensor:
    """The weight with its adapters merged, in float64."""
    w = w.double()
    for a, b, alpha in lora:
        w = w + (alpha.double() if isinstance(alpha, Tensor) else alpha) * (b.double() @ a.double())
    return w


def leaves(x: Tensor, lora: list[Lora]) -> list[Tensor]:
    return [x, *[t for triple in lora for t in triple if isinstance(t, Tensor)]]


@roads
@settings(max_examples=25)
@given(data=st.data())
def test_loss_and_gradients_are_those_of_the_merged_weight(engine, gradients, data):
    n, c, d = (data.draw(st.integers(1, most), label=name) for name, most in (("n", 70), ("c", 90), ("d", 20)))
    if data.draw(st.booleans(), label="many tiles"):
        n, c = n + 250, c + 900
    ranks = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="ranks"))
    learnt, biased, frozen = (data.draw(st.booleans(), label=name) for name in ("learnt alpha", "bias", "frozen"))
    options = {
        "reduction": data.draw(st.sampled_from(("mean", "sum", "none")), label="reduction"),
        "label_smoothing": data.draw(st.sampled_from((0.0, 0.1)), label="smoothing"),
    }
    softcap, scale = data.draw(st.sampled_from(((None, None), (2.0, None), (None, 0.6), (3.0, 1.4))), label="maps")
    x, w, b, y = draw(data.draw(st.sampled_from(("flat", "peaked")), label="kind"), n, c, d, torch.float64, seed=n + c + d)
    y = torch.where(torch.arange(n) % 4 == 3, -100, y)
    w.requires_grad_(not frozen)
    lora = adapters(c, d, ranks, learnt=learnt)
    s = F.linear(x, adapted(w, lora), b if biased else None) * (scale or 1.0)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    exact = F.cross_entropy(s, y, **options)
    given = lora[0] if len(lora) == 1 and data.draw(st.booleans(), label="one triple") else lora
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        loss = bigclass.linear_cross_entropy(
            x, w, y, linear_bias=b if biased else None, softcap=softcap, logit_scale=scale, lora=given, engine=engine, **options
        )
    assert error(loss, exact) < 1e-10
    wanted = [*leaves(x, lora), *([] if frozen else [w]), *([b] if biased else [])]
    mine, theirs = (torch.autograd.grad(z.sum(), wanted) for z in (loss, exact))
    assert all(e < 1e-10 for e in errors(mine, theirs))


@roads
def test_log_probabilities_entropy_and_poly_loss_take_adapters(engine, gradients):
    x, w, b, y = draw("peaked", 160, 1500, 16, torch.float64, seed=1)
    lora = adapters(1500, 16, (4, 2))
    common = {"linear_bias": b, "softcap": 4.0, "logit_scale": 1.2, "engine": engine}

    def outputs(w: Tensor, **more):
        with bigclass.planning(gradients=gradients, workspace=1 << 20):
            logp, entropy = bigclass.linear_log_prob(x, w, y, temperature=0.8, return_entropy=True, **common, **more)
            lse, at = bigclass.linear_logsumexp(x, w, index=y, **common, **more)
            return logp, entropy, lse, at, bigclass.linear_poly_cross_entropy(x, w, y, epsilon=1.5, **common, **more)

    for mine, theirs in zip(outputs(w, lora=lora), outputs(adapted(w, lora)), strict=True):
        assert error(mine, theirs) < 1e-12
        gradients_ = [torch.autograd.grad(z.sum(), leaves(x, lora), retain_graph=True) for z in (mine, theirs)]
        assert all(e < 1e-10 for e in errors(*gradients_))
    mine, theirs = (
        bigclass.linear_topk(x, v, 5, return_log_probs=True, **common, **m) for v, m in ((w, {"lora": lora}), (adapted(w, lora), {}))
    )
    assert torch.equal(mine[1], theirs[1]) and error(mine[0], theirs[0]) < 1e-12 and error(mine[2], theirs[2]) < 1e-12


def test_a_problem_of_the_smallest_size_is_adapted_too():
    """The short cut of small plain problems knows no adapters."""
    x, w, _, y = draw("flat", 4, 10, 8, torch.float32, seed=2)
    lora = adapters(10, 8, (2,), torch.float32)
    exact = F.cross_entropy(x.double() @ adapted(w, lora).t(), y)
    assert error(bigclass.linear_cross_entropy(x, w, y, lora=lora), exact) < 1e-6


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_wide_adapters_of_a_half_precision_base_keep_their_digits(base, autocast):
    """PEFT keeps adapters in fp32 over a bf16 model. Dense rounds x A^T, the adapter's logits or their sum; here only given tensors are."""
    x, w, _, y = draw("peaked", 256, 600, 64, base, seed=3)
    w.requires_grad_(False)
    lora = adapters(600, 64, (8,), torch.float32)
    (a, b, alpha), args = lora[0], leaves(x, lora)
    exact = F.cross_entropy(F.linear(x.double(), adapted(w, lora)), y)
    truth = torch.autograd.grad(exact, args)

    def dense() -> Tensor:
        s = F.linear(x, w)
        return F.cross_entropy((s + F.linear(F.linear(x.to(a.dtype), a), b) * alpha).to(s.dtype).float(), y)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = dense()
        mine = bigclass.linear_cross_entropy(x, w, y, lora=lora, engine="tiled")
    assert mine.dtype == torch.float32 and error(mine, exact) < 1e-6
    assert error(plain, exact) > 1e-5 or (base == torch.float32 and not autocast)
    for z, theirs, true in zip(torch.autograd.grad(mine, args), torch.autograd.grad(plain, args), truth, strict=True):
        assert z.dtype == theirs.dtype and z.any()
        assert error(z, true) <= 1.1 * error(theirs, true) + 4 * 2**-24


@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_half_precision_adapters_are_no_worse_than_dense(engine):
    pooled = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(10):
        x, w, _, y = draw("peaked", 128, 300, 32, torch.bfloat16, seed=seed)
        lora = adapters(300, 32, (4,), torch.bfloat16, seed)
        (a, b, alpha), args = lora[0], leaves(x, lora)
        exact = F.cross_entropy(F.linear(x.double(), adapted(w, lora)), y)
        mine = bigclass.linear_cross_entropy(x, w, y, lora=lora, engine=engine)
        plain = F.cross_entropy(F.linear(x, w) + F.linear(F.linear(x, a), b) * alpha, y)
        truth = [exact, *torch.autograd.grad(exact, args)]
        for i, z in enumerate((mine, plain)):
            made = errors([z, *torch.autograd.grad(z, args)], truth)
            pooled[i] += torch.tensor(made, dtype=torch.float64).square()
    assert (pooled[0].sqrt() <= 1.1 * pooled[1].sqrt()).all()


@roads
def test_ignored_rows_contribute_nothing_even_if_they_hold_nan(engine, gradients):
    """Pitfall 48: dA = du^T x, and 0 times NaN is NaN."""
    x, w, _, y = draw("flat", 50, 80, 8, torch.float64, seed=4)
    lora, ignored = adapters(80, 8, (3,)), torch.arange(50) % 5 == 2
    y = torch.where(ignored, -100, y)
    hurt = x.detach().masked_fill(ignored[:, None], math.nan).requires_grad_()
    made = []
    for features in (x, hurt):
        with bigclass.planning(gradients=gradients, workspace=1 << 20):
            loss = bigclass.linear_cross_entropy(features, w, y, lora=lora, engine=engine)
        made.append([loss, *torch.autograd.grad(loss, leaves(features, lora))])
    assert all(e < 1e-14 for e in errors(made[1], made[0]))


def test_it_compiles_to_one_graph_and_dense_keeps_the_other_transforms():
    x, w, _, y = draw("flat", 40, 300, 8, torch.float64, seed=5)
    lora = adapters(300, 8, (3,))
    loss = lambda x, engine="tiled": bigclass.linear_cross_entropy(x, w, y, lora=lora, engine=engine)  # noqa: E731
    eager = torch.autograd.grad(loss(x), leaves(x, lora))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(e < 1e-14 for e in errors(torch.autograd.grad(compiled(x), leaves(x, lora)), eager))
    assert error(torch.func.grad(lambda x: loss(x, "dense"))(x), eager[0]) < 1e-12
    first = torch.autograd.grad(loss(x, "dense"), lora[0].a, create_graph=True)[0]
    merged = F.cross_entropy(F.linear(x, adapted(w, lora)), y)
    exact = torch.autograd.grad(merged, lora[0].a, create_graph=True)[0]
    assert error(*(torch.autograd.grad(z.square().sum(), lora[0].b)[0] for z in (first, exact))) < 1e-10
    _, tangent = torch.func.jvp(lambda x: loss(x, "dense"), (x.detach(),), (torch.ones_like(x),))
    assert error(tangent, eager[0].sum()) < 1e-10


A, B = torch.zeros(2, 8), torch.zeros(30, 2)
WRONG = {
    "shape of A": (((torch.zeros(8, 2), B, 1.0),), ValueError, r"lora\[0\]: expected A of shape \(R, 8\), got \(8, 2\)"),
    "classes of B": ((A, torch.zeros(31, 2), 1.0), ValueError, r"lora: expected B of shape \(30, 2\), got \(31, 2\)"),
    "ranks": ([(A, B, 1.0), (A, torch.zeros(30, 3), 1.0)], ValueError, r"lora\[1\]: expected B of shape \(30, 2\), got \(30, 3\)"),
    "dtype": ((A.long(), B, 1.0), TypeError, "lora: expected A in a floating-point dtype, got torch.int64"),
    "device": ((A, B.to("meta"), 1.0), ValueError, "lora: expected B on device cpu .that of input., got meta"),
    "pair": ((A, B), TypeError, r"lora: expected \(A \(R, D\), B \(C, R\), alpha\), or a sequence of such triples, got 2 values"),
    "tensor": (A, TypeError, "such triples, got Tensor"),
    "alpha": ((A, B, "2"), TypeError, "expected alpha, a number or a scalar tensor, got str"),
    "alphas": ((A, B, torch.ones(2)), ValueError, r"lora: alpha: expected a number or a floating-point tensor of shape \(\) or \(1,\)"),
    "no tensor": ((A, None, 1.0), TypeError, "lora: B: expected a tensor, got NoneType"),
    "rank 0": ((A[:0], B[:, :0], 1.0), ValueError, r"expected A of shape \(R, 8\), got \(0, 8\)"),
}


@pytest.mark.parametrize(("lora", "kind", "words"), WRONG.values(), ids=WRONG)
def test_adapters_that_do_not_fit_are_refused(lora, kind, words):
    x, w, y = torch.randn(5, 8), torch.randn(30, 8), torch.randint(30, (5,))
    for call in (
        lambda: bigclass.linear_cross_entropy(x, w, y, lora=lora),
        lambda: bigclass.linear_log_prob(x, w, y, lora=lora),
        lambda: bigclass.linear_topk(x, w, 2, lora=lora),
    ):
        with pytest.raises(kind, match=words):
            call()


def test_a_weight_with_positions_and_updates_of_one_weight_take_no_adapters():
    x, y = torch.randn(5, 8), torch.randint(30, (5, 2))
    with pytest.raises(ValueError, match=r"lora: adapts a weight \(C, D\), not one with positions, \(30, 2, 8\)"):
        bigclass.linear_cross_entropy(x, torch.randn(30, 2, 8), y, lora=(A, B, 1.0))
    w = torch.nn.Parameter(torch.randn(30, 8))
    with pytest.raises(ValueError, match="update: expected logits of one weight, got a stream of 2 operand pairs"):
        bigclass.linear_cross_entropy(x, w, y[:, 0], lora=(A, B, 1.0), update=bigclass.optim.SlabSGD([w], lr=0.1))

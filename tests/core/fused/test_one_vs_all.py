"""One-vs-all losses on the fused engine: the plan by slabs, and the one that makes logits again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.core import LogSumExp, Stream, log_sum_exp, plan
from bigclass.core.op import observed_loss
from bigclass.losses.one_vs_all import LOSSES
from tests.losses.test_multilabel import CASES, csr_of, draw, hot
from tests.support import error

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("gradients", ["auto", "recompute"])
@pytest.mark.parametrize("name", ["bce", "focal", "asymmetric", "asymmetric, no margin", "squared hinge", "poly"])
@settings(max_examples=4, phases=[Phase.generate])
@given(
    n=st.integers(1, 70), c=st.integers(2, 300), k=st.integers(1, 4), seed=st.integers(0, 99), low=st.sampled_from([0.0, -5.0]),
    weighted=st.booleans(), form=st.sampled_from(["padded", "csr", "dense"]),
)  # fmt: skip
def test_losses_and_gradients(name, gradients, n, c, k, seed, low, weighted, form):
    loss, options, term = CASES[name]
    x, w, b, positives = draw(n, c, k, seed, 1.0, low)
    leaves = [t.detach().float().requires_grad_() for t in (x, w, b)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    vectors = {"weight": torch.rand(c) + 0.5, "pos_weight": torch.rand(c) + 0.5} if weighted else {}
    targets = {"padded": positives, "csr": csr_of(positives), "dense": hot(positives, c).float()}[form]
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        got = bigclass.linear_elementwise_loss(
            leaves[0], leaves[1], targets, loss=loss, linear_bias=leaves[2], engine="fused", reduction="batchmean", **vectors, **options
        )
        grads = torch.autograd.grad(got * 0.5, leaves)
    terms = term(exact[0] @ exact[1].t() + exact[2], hot(positives, c), vectors.get("pos_weight", 1.0), *options.values())
    want = (terms * vectors.get("weight", 1.0)).sum(1).mean()
    assert error(got, want) < 3e-6 or float((got - want).abs()) < 1e-9
    for g, e in zip(grads, torch.autograd.grad(want * 0.5, exact), strict=True):
        assert error(g, e) < 1e-5 or float((g - e).abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_over_several_slabs(dtype, monkeypatch):
    monkeypatch.setattr(plan, "SLAB_ELEMENTS", 70 * 256)
    x, w, b, positives = draw(70, 900, 3, 0, 1.0, -2.0)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    assert bigclass.explain(70, 900, 5, dtype=dtype, engine="fused").engine == "fused"
    got = bigclass.linear_asymmetric_loss(leaves[0], leaves[1], positives, linear_bias=leaves[2], engine="fused")
    want = (
        CASES["asymmetric"][2](exact[0] @ exact[1].t() + exact[2], hot(positives, 900), 1.0, *CASES["asymmetric"][1].values()).sum(1).mean()
    )
    assert got.dtype == torch.float32 and error(got, want) < 1e-5
    for g, e in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, exact), strict=True):
        assert g.dtype == dtype and error(g, e) < (6e-3 if dtype == torch.bfloat16 else 1.5e-3)


def test_zlpr_and_updates_in_the_backward():
    x, w, b, positives = (t.detach().float().requires_grad_() if t.is_floating_point() else t for t in draw(40, 700, 3, 0))
    results = []
    for engine in ("fused", "tiled"):
        loss = bigclass.linear_zlpr_loss(x, w, positives, linear_bias=b, engine=engine)
        results.append([loss, *torch.autograd.grad(loss, (x, w, b))])
        weight = torch.nn.Parameter(w.detach().clone())
        slabs = bigclass.optim.SlabSGD([weight], lr=1.0)
        bigclass.linear_binary_cross_entropy(x, weight, positives, linear_bias=b, update=slabs, engine=engine).backward()
        results[-1] += [weight, x.grad, b.grad]
        x.grad = b.grad = None
    for a, e in zip(*results, strict=True):
        assert error(a, e) < 1e-5


def test_a_loss_of_one_s_own_runs_fused():
    from tests.losses.test_multilabel import Logarithmic

    x, w, b, positives = (t.detach().float().requires_grad_() if t.is_floating_point() else t for t in draw(40, 700, 3, 0))
    results = []
    for engine in ("fused", "tiled"):
        loss = bigclass.linear_elementwise_loss(x, w, positives, loss=Logarithmic.name, rate=0.5, linear_bias=b, engine=engine)
        results.append((loss, *torch.autograd.grad(loss, (x, w, b))))
    for a, e in zip(*results, strict=True):
        assert error(a, e) < 1e-5


@pytest.mark.parametrize("loss", ["bce", "focal", "asymmetric", "poly", "squared_hinge"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf")], ids=str)
def test_a_picked_class_may_have_an_infinite_bias(loss, value):
    """Where its stored logit is -inf, so that no sum sees it, a bias of inf would make NaN of it."""
    torch.manual_seed(0)
    positives = torch.tensor([[1], [1], [1]])
    results = []
    for engine in ("fused", "tiled"):
        generator = torch.Generator().manual_seed(1)
        x, w = (torch.randn(n, 2, generator=generator).requires_grad_() for n in (3, 300))
        b = torch.zeros(300)
        b[1] = value
        b.requires_grad_()
        made = bigclass.linear_elementwise_loss(x, w, positives, loss=loss, linear_bias=b, reduction="sum", engine=engine)
        results.append([made, *torch.autograd.grad(made, (x, w, b))])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        there = want.isfinite()
        assert torch.allclose(got[there], want[there], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "c"), [(40, 300), (5, 1), (3, 256)])
def test_an_observed_fold_that_is_no_sum_sees_the_classes_alone(n, c):
    """A tile's ragged end, which a sum masks, must not be a logit of 0."""
    torch.manual_seed(2)
    x, w = torch.randn(n, 8, requires_grad=True), torch.randn(c, 8, requires_grad=True)
    fold = LOSSES["bce"].negatives[0]()
    results = []
    for engine in ("fused", "tiled"):
        loss, (state,) = observed_loss(Stream(((x, w),)), None, (fold,), (LogSumExp(),), "fold_sum", [torch.ones(n)], engine=engine)
        results.append((loss, log_sum_exp(state)))
    for got, want in zip(*results, strict=True):
        assert error(got, want) < 1e-5

"""Margin losses on the fused engine, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.core import LogSumExp
from bigclass.core.engines.support import fused_reason
from bigclass.losses.margin import linear_margin_loss
from tests.core.test_norms import LIMIT, check, normalised
from tests.losses.margin_support import dense_margin_loss
from tests.losses.test_margin import doubled, draw
from tests.support import error

pytest.importorskip("triton", reason="Triton is not installed")

HALF_TOO = [torch.float32, torch.bfloat16, torch.float16]
every_plan = pytest.mark.parametrize("gradients", ["forward", "recompute"])


@every_plan
@settings(max_examples=12, phases=[Phase.generate])
@given(
    n=st.integers(1, 80), c=st.integers(2, 300), d=st.integers(3, 70), dtype=st.sampled_from(HALF_TOO), bias=st.booleans(),
    learnt=st.booleans(),
)  # fmt: skip
def test_the_gradient_goes_through_the_norm(gradients, n, c, d, dtype, bias, learnt):
    b = torch.randn(c).to(dtype).requires_grad_() if bias else None
    a = torch.tensor([1.3], dtype=dtype, requires_grad=True) if learnt else None
    stream, picks = normalised(n, c, d, dtype, bias=b, scale=2.0, scale_tensor=a)
    assert fused_reason(stream, (LogSumExp(),)) is None
    check(("fused", gradients), stream, picks, 2 * LIMIT[dtype])


@every_plan
@settings(max_examples=10, phases=[Phase.generate])
@given(
    n=st.integers(1, 80), c=st.integers(2, 200), d=st.integers(3, 40), centres=st.sampled_from([1, 1, 2, 4, 8]), curricular=st.booleans(),
    kind=st.sampled_from(["arcface", "cosface"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_kind_is_its_formula(gradients, n, c, d, centres, curricular, kind, seed):
    x, w, y = draw(n, c, d, centres, torch.float32, seed)
    kept = torch.arange(n) % 5 != 1
    t = 0.3 if curricular and centres == 1 else None
    exact = doubled(x, w)
    margins, beyond_pi = ((1.0, 0.5, 0.0), "linear") if kind == "arcface" else ((1.0, 0.0, 0.4), "plain")
    rows = dense_margin_loss(*exact, y, margins, scale=16.0, centres=centres, beyond_pi=beyond_pi, t=t)
    want = rows[kept].mean()
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        target = torch.where(kept, y, -100)
        loss = linear_margin_loss(x, w, target, kind=kind, logit_scale=16.0, subcenters=centres, curriculum=t, engine="fused")
        got = torch.autograd.grad(loss, (x, w))
    assert error(loss, want) <= 2e-6
    for g, e in zip(got, torch.autograd.grad(want, exact), strict=True):
        assert error(g, e) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_plan
def test_half_precision_features_are_rounded_once_for_their_product(dtype, gradients):
    x, w, y = draw(70, 300, 64, dtype=dtype)
    exact = doubled(x, w)
    want = dense_margin_loss(*exact, y, (1.0, 0.5, 0.0), scale=16.0, beyond_pi="linear").mean()
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        loss = linear_margin_loss(x, w, y, logit_scale=16.0, engine="fused")
        got = torch.autograd.grad(loss, (x, w))
    plain = dense_margin_loss(x, w, y, (1.0, 0.5, 0.0), scale=16.0, beyond_pi="linear").mean()
    for z, t, e in zip((loss, *got), (plain, *torch.autograd.grad(plain, (x, w))), (want, *torch.autograd.grad(want, exact)), strict=True):
        assert error(z, e) <= 1.1 * error(t, e) + 1e-5


def test_three_centres_are_refused_with_the_reason_and_taken_by_another_engine():
    x, w, y = draw(10, 60, 8, 3, torch.float32)
    with pytest.raises(ValueError, match="groups of 3 classes, which do not divide its tiles"):
        linear_margin_loss(x, w, y, subcenters=3, engine="fused")
    linear_margin_loss(x, w, y, subcenters=3)


@pytest.mark.parametrize("centres", [2, 4])
def test_nan_features_give_a_nan_loss_and_reach_no_other_row(centres):
    """The maximum of a group skips NaN in Triton."""
    x, w, y = draw(6, 40, 8, centres, torch.float32)
    x = x.detach().clone()
    x[2, 3] = torch.nan
    for t in (x, x.requires_grad_()):
        loss = linear_margin_loss(t, w, y, subcenters=centres, reduction="none", engine="fused")
        assert loss.isnan().tolist() == [i == 2 for i in range(6)]
    from bigclass.core import Stream, reduce_logits
    from bigclass.losses.margin_folds import GroupedLogSumExp

    w = w.detach().clone()
    w[5] = torch.nan
    ((_, l),), _ = reduce_logits(Stream(((x.detach(), w),)), None, (GroupedLogSumExp((float(centres),)),), engine="fused")  # noqa: E741
    assert bool(l.isnan().all())

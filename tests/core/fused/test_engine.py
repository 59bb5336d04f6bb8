"""The fused engine in Triton's interpreter: the same contract as the other engines, on the same cases."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.core import Dot, LogSumExp, ShiftedMoment, Stream, SumFold, log_sum_exp, problem, reduce_logits, register_fold, stream_loss
from bigclass.core.engines.support import form_reason, fused_reason
from bigclass.core.engines.tiles import Pool
from bigclass.core.plan import Work, saved_size
from bigclass.core.topk import TopK
from tests.core.test_op import cases, check_folds, check_loss
from tests.support import error

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=30, phases=[Phase.generate])
@given(case=cases(dtypes=DTYPES, most_picks=12, most_classes=200), exclude=st.booleans(), seed=st.integers(0, 1000))
def test_folds_picks_and_gradients_are_those_of_the_definition(case, exclude, seed):
    assume(fused_reason(case.stream, (LogSumExp(), ShiftedMoment())) is None)
    check_folds("fused", True, case, exclude, seed)


@pytest.mark.parametrize("gradients", ["forward", "recompute", "saved"])
@settings(max_examples=20, phases=[Phase.generate])
@given(case=cases(dtypes=DTYPES, most_picks=12, most_classes=200), exclude=st.booleans())
def test_a_loss_made_in_the_forward_equals_one_made_from_the_folds(gradients, case, exclude):
    assume(fused_reason(case.stream, (LogSumExp(),)) is None)
    check_loss(("fused", gradients), True, case, exclude)


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@pytest.mark.parametrize("of_w", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=str)
def test_work_buffers_take_no_more_than_planned(of_x, of_w, gradients, monkeypatch):
    """Mixed operands multiply in fp32, so that G is made in it."""
    torch.manual_seed(0)
    buffers, plans = {}, []
    get, plan = Pool.get, problem.make_plan

    def noted(pool, name, rows, cols):
        t = get(pool, name, rows, cols)
        buffers[name] = max(buffers.get(name, 0), t.nbytes)
        return t

    monkeypatch.setattr(Pool, "get", noted)
    monkeypatch.setattr(problem, "make_plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    x, w = torch.randn(256, 16, dtype=of_x, requires_grad=True), torch.randn(1500, 16, dtype=of_w, requires_grad=True)
    with bigclass.planning(workspace=1 << 20, gradients=gradients):
        bigclass.linear_cross_entropy(x, w, torch.randint(1500, (256,)), engine="fused").backward()
    assert plans[-1].gradients == gradients
    if plans[-1].saved:  # beside the buffers
        assert saved_size(256, 1500) + sum(buffers.values()) <= plans[-1].workspace <= 1 << 20
        return
    assert plans[-1].class_block * 256 * 2 <= sum(buffers.values()) <= plans[-1].workspace <= 1 << 20


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
def test_n_x_c_tensors_may_be_expanded_transposed_or_cut(gradients):
    """Expanded and cut ones are read where they lie."""
    torch.manual_seed(0)
    n, c = 40, 150
    x, w = torch.randn(n, 8, requires_grad=True), torch.randn(c, 8, requires_grad=True)
    for full in (torch.rand(1, c).expand(n, c), torch.rand(c, n).t(), torch.rand(n, c + 3)[:, 1:-2], torch.rand(1, 1).expand(n, c)):
        results = []
        for engine in ("fused", "tiled"):
            with bigclass.planning(gradients=gradients):
                stream, folds = Stream(((x, w),), given=full), (LogSumExp(), Dot(tensors=(full,)))
                args = (torch.ones(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64))
                loss = stream_loss(stream, None, folds, "cross_entropy_probabilities", args, (0.0, 0.0, 0.0, 0.0), engine=engine)
            results.append((loss, *torch.autograd.grad(loss, (x, w))))
        for got, want in zip(*results, strict=True):
            assert error(got, want) < 1e-5


def test_what_needs_no_gradient_is_not_refused_for_one():
    x, w, given = torch.randn(40, 8), torch.randn(60, 8), torch.randn(40, 60, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    for stream, words in (
        (Stream(((x, w),), given=given), "a given N x C tensor gets no gradient"),
        (Stream(((x, w),), given=given.detach(), scale_tensor=scale), "a learnable scale over a given N x C tensor"),
    ):
        assert words in str(fused_reason(stream, (LogSumExp(),)))
        with torch.no_grad():
            (got,), _ = reduce_logits(stream, None, (LogSumExp(),), engine="fused")
            (want,), _ = reduce_logits(stream, None, (LogSumExp(),), engine="tiled")
        assert error(log_sum_exp(got), log_sum_exp(want)) < 1e-5


def test_a_fall_to_tiled_for_a_form_of_the_users_own_is_said_once(monkeypatch):
    monkeypatch.setattr(problem, "_said", set())
    stream, own = Stream(((torch.randn(2, 1), torch.randn(1 << 20, 1)),)), (Formless(),)
    work = Work(n=2, c=1 << 20, d=1, device="cuda", not_fused=form_reason((), own))
    with pytest.warns(UserWarning, match=r"not the fused engine but the tiled one, for fold 'tests\.formless' has no Triton form"):
        assert problem.engine_for(work, "auto", stream, own) == "tiled"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.engine_for(work, "auto", stream, own)  # said already
        problem.engine_for(work, "tiled", stream, (Plain(),))
        problem.engine_for(replace(work, not_fused=form_reason((), (TopK((1,)),))), "auto", stream, (TopK((1,)),))  # not the user's
        with pytest.warns(UserWarning, match="plain"):
            problem.engine_for(replace(work, not_fused=form_reason((), (Plain(),))), "auto", stream, (Plain(),))


@register_fold
@dataclass(frozen=True, eq=False)
class Formless(SumFold):
    name: ClassVar[str] = "tests.formless"


@register_fold
@dataclass(frozen=True, eq=False)
class Plain(SumFold):
    name: ClassVar[str] = "tests.formless.plain"

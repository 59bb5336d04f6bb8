"""Folds over groups of adjacent classes, and the fold of hard negatives, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.core import LogSumExp, Stream, log_sum_exp, reduce_logits
from bigclass.core.engines.support import form_reason
from bigclass.core.plan import MIB, Settings, Work, make_plan
from bigclass.losses.margin_folds import CurricularLogSumExp, GroupedLogSumExp, GroupedTopK
from tests.support import error

every_engine = pytest.mark.parametrize("engine", ["dense", "tiled"])


@every_engine
@settings(max_examples=40)
@given(
    n=st.integers(1, 60), groups=st.integers(1, 400), k=st.integers(1, 7), picks=st.booleans(), exclude=st.booleans(),
    seed=st.integers(0, 999), ties=st.booleans(),
)  # fmt: skip
@example(n=30, groups=1001, k=3, picks=True, exclude=True, seed=0, ties=False)  # several tiles, and 64 is no multiple of 3
def test_a_group_counts_with_its_largest(engine, n, groups, k, picks, exclude, seed, ties):
    """Tiles are cut between groups, whatever their size; of equal logits the first takes the gradient."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, 4, generator=g).double(), torch.randn(groups * k, 4, generator=g).double()
    if ties:
        w[1::2] = w[: w.shape[0] - 1 : 2]
    x.requires_grad_(), w.requires_grad_()
    at = torch.randint(-1, groups * k, (n, 2), generator=g) if picks else None  # of a group that is left out in part, the rest counts
    with bigclass.planning(workspace=1 << 20):
        (state, top), _ = reduce_logits(
            Stream(((x, w),)), at, (GroupedLogSumExp((float(k),), exclude_picks=exclude), GroupedTopK((3.0, float(k)))), engine=engine
        )
        got = log_sum_exp(state)
        up = torch.randn(n, generator=g).double()
        s = x @ w.t()
        if exclude and at is not None:
            mask = torch.zeros(n, groups * k + 1, dtype=torch.bool).scatter_(1, torch.where(at < 0, groups * k, at), True)[:, :-1]
            rest = s.masked_fill(mask, -torch.inf)
        else:
            rest = s
        best = rest.view(n, groups, k).max(2).values
        there = best.isfinite().any(1)
        want = best[there].logsumexp(1)
        assert error(got[there], want) <= 1e-12 and bool((got[~there] == -torch.inf).all())
        if bool(there.any()):
            grads = torch.autograd.grad(got[there], (x, w), up[there]), torch.autograd.grad(want, (x, w), up[there])
            assert all(error(a, b) <= 1e-12 for a, b in zip(*grads, strict=True))
    whole = s.detach().view(n, groups, k).amax(2)
    count = min(3, groups)
    assert torch.equal(top[0][:, :count], whole.topk(count).values)
    assert torch.equal(whole.gather(1, top[1][:, :count]), top[0][:, :count]) and bool((top[1][:, count:] == -1).all())


@every_engine
def test_of_equal_logits_the_first_takes_the_gradient(engine):
    x = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[1.0], [2.0], [2.0], [3.0], [3.0], [3.0]], dtype=torch.float64, requires_grad=True)
    (state,), _ = reduce_logits(Stream(((x, w),)), None, (GroupedLogSumExp((3.0,)),), engine=engine)
    (dw,) = torch.autograd.grad(log_sum_exp(state).sum(), w)
    p = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(dw[:, 0], 2 * torch.stack((p * 0, 1 - p, p * 0, p, p * 0, p * 0)))


@every_engine
@settings(max_examples=30)
@given(n=st.integers(1, 60), c=st.integers(2, 900), exclude=st.booleans(), t=st.floats(-1, 2), seed=st.integers(0, 999))
def test_hard_negatives_count_as_they_are_bent(engine, n, c, exclude, t, seed):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, 4, generator=g).double(), torch.randn(c, 4, generator=g).double()
    r, at = torch.randn(n, generator=g).double(), torch.randint(c, (n, 1), generator=g)
    x.requires_grad_(), w.requires_grad_()
    fold = CurricularLogSumExp((4.0,), (r, torch.full((), t, dtype=torch.float64).expand(n)), exclude_picks=exclude)
    with bigclass.planning(workspace=1 << 20):
        (state,), _ = reduce_logits(Stream(((x, w),)), at, (fold,), engine=engine)
        got = log_sum_exp(state)
        s = x @ w.t()
        phi = torch.where(s > r[:, None], s * (t + 0.25 * s), s)
        want = (phi.scatter(1, at, -torch.inf) if exclude else phi).logsumexp(1)
        assert error(got, want) <= 1e-12
        for a, b in zip(torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(want.sum(), (x, w)), strict=True):
            assert error(a, b) <= 1e-12


@settings(max_examples=100)
@given(
    n=st.integers(1, 10**5), groups=st.integers(1, 10**6), group=st.integers(1, 12), workspace=st.integers(1, 256), grad=st.booleans(),
    scalar=st.booleans(), engine=st.sampled_from(["tiled", "fused"]),
)  # fmt: skip
def test_no_plan_parts_a_group(n, groups, group, workspace, grad, scalar, engine):
    work = Work(n=n, c=groups * group, d=64, grad=grad, scalar=scalar, group=group, buffers=3)
    plan = make_plan(work, engine, Settings(workspace * MIB))
    assert plan.class_block % group == 0 and 1 <= plan.class_block <= groups * group


def test_groups_that_do_not_fit_are_refused():
    stream = Stream(((torch.randn(4, 3), torch.randn(7, 3)),))
    for fold, words in (
        (GroupedLogSumExp((3.0,)), "whole groups of 3 classes along each row, got axis 'rows' and 7 classes"),
        (GroupedLogSumExp((7.0,), axis="columns"), "axis 'columns'"),
    ):
        for engine in ("dense", "tiled"):
            with pytest.raises(ValueError, match=words):
                reduce_logits(stream, None, (fold,), engine=engine)
    assert form_reason((), (GroupedLogSumExp((4.0,)), LogSumExp())) is None
    assert "groups of 3 classes, which do not divide its tiles" in str(form_reason((), (GroupedLogSumExp((3.0,)),)))
    assert "groups of 64 classes" in str(form_reason((), (GroupedLogSumExp((64.0,)),)))
    assert "tiled" in bigclass.explain(10, 3 << 20, 8, device="cuda", folds=(GroupedLogSumExp((3.0,)),)).engine

"""Folds of single losses: many tiles and merges, and the gradients written beside them, are what autograd makes of one formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.core import Stream, reduce_logits, stream_loss
from bigclass.core.folds import FOLDS, LogSumExp
from bigclass.core.row_losses import ROW_LOSSES
from bigclass.heads import criteria  # noqa: F401  (its row loss)
from bigclass.losses.classwise import binary_cross_entropy
from bigclass.losses.folds import TemperedMoment, WeightedExp
from bigclass.losses.one_vs_all import LOSSES
from tests.support import ROADS, error

every_road = pytest.mark.parametrize("road", ROADS, ids="-".join)


def bce(s, t, w=1.0, p=1.0):
    return -w * ((1 - t) * F.logsigmoid(-s) + t * p * F.logsigmoid(s))


def asymmetric(s, t, gamma_neg, gamma_pos, clip, eps, constant, p=1.0):
    """timm's AsymmetricLossMultiLabel, line by line, but that no probability is taken from 1."""
    xs_pos, xs_neg = torch.sigmoid(s), torch.sigmoid(-s)
    if clip > 0:
        xs_neg = (xs_neg + clip).clamp(max=1)
    q = (xs_pos - clip).clamp(min=0)
    precise = torch.where(q < 0.5, torch.log1p(-q.clamp(max=0.5)), xs_neg.log()) if clip > 0 else F.logsigmoid(-s)
    negative = torch.where(xs_neg < eps, math.log(eps), precise)
    loss = t * F.logsigmoid(s).clamp(min=math.log(eps)) * p + (1 - t) * negative
    if gamma_neg > 0 or gamma_pos > 0:
        with torch.set_grad_enabled(not constant):
            missing = torch.sigmoid(-s) * t + q * (1 - t)
            weight = torch.pow(missing, gamma_pos * t + gamma_neg * (1 - t))
        loss = loss * weight
    return -loss


def poly(s, t, epsilon, gamma, alpha):
    """timm's PolyBinaryCrossEntropy, with alpha < 0 for none."""
    ce = F.binary_cross_entropy_with_logits(s, t, reduction="none")
    missing = t * torch.sigmoid(-s) + (1 - t) * torch.sigmoid(s)
    if gamma > 0:
        ce = ce * missing.pow(gamma) + epsilon * missing.pow(gamma + 1)
    else:
        ce = ce + epsilon * missing
    return ce if alpha < 0 else ce * (t * alpha + (1 - t) * (1 - alpha))


BCE, ASL = LOSSES["bce"], LOSSES["asymmetric"]

# name: (fold, numbers, tensors from (n, c), term(s, numbers, tensors) (N, C))
SUMS = {
    "bce": (BCE.negatives[0], (), lambda n, c: (), lambda s, a, t: bce(s, 0.0)),
    "bce, weighted": (BCE.negatives[1], (), lambda n, c: (v(c),), lambda s, a, t: bce(s, 0.0, t[0])),
    "bce to 0.3": (BCE.floor[0], (0.3,), lambda n, c: (), lambda s, a, t: bce(s, a[0])),
    "bce to 1": (BCE.floor[0], (1.0,), lambda n, c: (), lambda s, a, t: bce(s, 1.0)),
    "bce to 0.2, weighted": (BCE.floor[1], (0.2,), lambda n, c: (v(c), v(c)), lambda s, a, t: bce(s, a[0], *t)),
    "dense": (BCE.dense[0], (), lambda n, c: (v(n, c),), lambda s, a, t: bce(s, t[0])),
    "dense, weighted": (BCE.dense[1], (), lambda n, c: (v(n, c), v(c), v(c)), lambda s, a, t: bce(s, *t)),
    "asymmetric": (ASL.dense[0], (4.0, 1.0, 0.05, 1e-8, 0.0), lambda n, c: (hard(n, c),), lambda s, a, t: asymmetric(s, t[0], *a)),
    "asymmetric, constant focus": (
        ASL.dense[0], (4.0, 1.0, 0.0, 1e-8, 1.0), lambda n, c: (v(n, c),), lambda s, a, t: asymmetric(s, t[0], *a),
    ),
    "asymmetric, weighted": (
        ASL.dense[1], (2.0, 0.0, 0.05, 1e-8, 0.0), lambda n, c: (hard(n, c), v(c), v(c)),
        lambda s, a, t: asymmetric(s, t[0], *a, p=t[2]) * t[1],
    ),
    "poly": (LOSSES["poly"].dense[0], (1.0, 0.0, -1.0), lambda n, c: (v(n, c),), lambda s, a, t: poly(s, t[0], *a)),
    "poly, focal": (LOSSES["poly"].dense[0], (0.7, 2.0, 0.25), lambda n, c: (v(n, c),), lambda s, a, t: poly(s, t[0], *a)),
}  # fmt: skip


def v(*size):
    return torch.rand(size, dtype=torch.float64) * 0.9 + 0.05


def hard(*size):
    return (torch.rand(size) < 0.2).double()


problems = {
    "n": st.integers(1, 12), "c": st.sampled_from([1, 2, 30, 9000]), "spread": st.sampled_from([0.0, 0.1, 1.0, 6.0]),
    "exclude": st.booleans(), "seed": st.integers(0, 999),
}  # fmt: skip


def problem(n, c, spread, seed):
    torch.manual_seed(seed)
    x, w = (torch.randn(n, 4, dtype=torch.float64) * spread).requires_grad_(), torch.randn(c, 4, dtype=torch.float64, requires_grad=True)
    return x, w, torch.randint(-1, c, (n, 2))


def without(t, picks):
    mask = torch.zeros(t.shape[0], t.shape[1] + 1, dtype=torch.bool).scatter(1, torch.where(picks < 0, t.shape[1], picks), True)
    return mask[:, :-1]


@every_road
@pytest.mark.parametrize("name", SUMS)
@settings(max_examples=15)
@given(**problems)
def test_sums_over_classes(name, road, n, c, spread, exclude, seed):
    cls, numbers, make, term = SUMS[name]
    x, w, picks = problem(n, c, spread, seed)
    tensors, (engine, gradients) = make(n, c), road
    fold = cls(numbers, tensors, exclude)
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        factor = torch.rand(n, dtype=torch.float64) + 0.5
        loss = stream_loss(Stream(((x, w),)), picks, (fold,), "fold_sum", (factor,), engine=engine)
        got = torch.autograd.grad(loss, (x, w))
    terms = term(x @ w.t(), numbers, tensors)
    terms = terms.masked_fill(without(terms, picks), 0.0) if exclude else terms
    exact = (factor * terms.sum(1)).sum()
    assert error(loss, exact) < 1e-12
    for g, e in zip(got, torch.autograd.grad(exact, (x, w)), strict=True):
        assert error(g, e) < 4e-12 or float((g - e).abs().max()) < 1e-15


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@settings(max_examples=40)
@given(**problems)
def test_the_mass_of_a_target(engine, n, c, spread, exclude, seed):
    x, w, picks = problem(n, c, spread, seed)
    t = v(n, c)
    with bigclass.planning(workspace=1 << 20):
        ((m, mass),), _ = reduce_logits(Stream(((x, w),)), picks, (WeightedExp((), (t,), exclude),), engine=engine)
        up = torch.rand(n, dtype=torch.float64)
        got = torch.autograd.grad((mass * up).sum(), (x, w))
    s = x @ w.t()
    s = s.masked_fill(without(s, picks), -math.inf) if exclude else s
    e = torch.exp(s - torch.where(m > -math.inf, m, 0.0)[:, None])  # all classes may be picks
    exact = (e * t).sum(1)
    assert error(mass, exact) < 1e-12
    for g, q in zip(got, torch.autograd.grad((exact * up).sum(), (x, w)), strict=True):
        assert error(g, q) < 4e-12 or float((g - q).abs().max()) < 1e-15


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@settings(max_examples=60)
@given(**problems, power=st.sampled_from([0.25, 1.0, 2.0, 4.0]))
def test_tempered_moments(engine, n, c, spread, exclude, seed, power):
    """sum p^a and sum p^a log p, from the state and the log-sum-exp; with gradients through both."""
    x, w, picks = problem(n, c, spread, seed)
    with bigclass.planning(workspace=1 << 20):
        states, _ = reduce_logits(Stream(((x, w),)), picks, (TemperedMoment((power,), (), exclude), LogSumExp()), engine=engine)
        (m, mass, moment), (top, l) = states  # noqa: E741
        down = m - power * (top + l.log())
        scale = torch.exp(down)
        sums = scale * mass, scale * (moment + down.clamp_min(-1e300) * mass) / power
        ups = torch.rand(2, n, dtype=torch.float64)
        got = torch.autograd.grad((sums[0] * ups[0] + sums[1] * ups[1]).nansum(), (x, w))
    logp = F.log_softmax(x @ w.t(), 1)
    terms = [(power * logp).exp(), (power * logp).exp() * logp]
    terms = [t.masked_fill(without(t, picks), 0.0) if exclude else t for t in terms]
    exact = [t.sum(1) for t in terms]
    there = mass > 0  # all classes may be picks
    for a, b in zip(sums, exact, strict=True):
        assert error(a[there], b[there]) < 1e-11 or float((a - b)[there].abs().max()) < 1e-14
    if bool(there.all()):
        want = torch.autograd.grad((exact[0] * ups[0] + exact[1] * ups[1]).sum(), (x, w))
        for g, e in zip(got, want, strict=True):
            assert error(g, e) < 1e-10 or float((g - e).abs().max()) < 1e-14


@every_road
@pytest.mark.parametrize("gammas", [(0.0, 4.0), (1.0, 2.0), (0.0, 0.5)])
def test_the_single_label_asymmetric_row_loss_is_timms(road, gammas):
    engine, gradients = road
    (gamma_pos, gamma_neg), n, c, eps = gammas, 12, 9000, 0.1
    x, w, _ = problem(n, c, 1.0, 0)
    y = torch.randint(c, (n, 1))
    floor = eps / c
    on = 1.0 - eps + floor
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        folds = (LogSumExp(exclude_picks=True), TemperedMoment((gamma_neg,), (), True))
        numbers = (gamma_pos, gamma_neg, on, floor)
        loss = stream_loss(
            Stream(((x, w),)), y, folds, "asymmetric_single", (torch.full((n,), 1 / n, dtype=torch.float64),), numbers, engine=engine
        )
        got = torch.autograd.grad(loss, (x, w))
    logp = F.log_softmax(x @ w.t(), -1)  # timm's AsymmetricLossSingleLabel
    hot = torch.zeros_like(logp).scatter_(1, y, 1)
    targets, anti = hot, 1 - hot
    xs_pos, xs_neg = logp.exp() * targets, (1 - logp.exp()) * anti
    weight = torch.pow(1 - xs_pos - xs_neg, gamma_pos * targets + gamma_neg * anti)
    smoothed = hot * (1 - eps) + eps / c
    exact = -(smoothed * (logp * weight)).sum(-1).mean()
    assert error(loss, exact) < 1e-11
    for g, e in zip(got, torch.autograd.grad(exact, (x, w)), strict=True):
        assert error(g, e) < 1e-9


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@every_road
@settings(max_examples=15)
@given(n=st.integers(1, 9), c=st.sampled_from([3, 60, 9000]), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_binary_cross_entropy_of_few_classes(road, weighted, floor, n, c, k, seed):
    engine, gradients = road
    x, w, _ = problem(n, c, 1.0, seed)
    t = bigclass.SparseTarget(torch.randint(-1, c, (n, k)), v(n, k) / k, c, floor)
    vectors = {"weight": v(c), "pos_weight": v(c)} if weighted else {}
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        for reduction in ("mean", "sum", "none", "batchmean"):
            mine = binary_cross_entropy(Stream(((x, w),)), (n,), t, reduction=reduction, engine=engine, **vectors)
            dense = binary_cross_entropy(Stream(((x, w),)), (n,), t.dense(), reduction=reduction, engine=engine, **vectors)
            terms = bce(x @ w.t(), t.dense(), *vectors.values()).sum(1)
            exact = {"none": terms, "sum": terms.sum(), "batchmean": terms.mean(), "mean": terms.mean() / c}[reduction]
            want = torch.autograd.grad(exact.sum(), (x, w))
            for made in (mine, dense):
                assert error(made, exact) < 1e-12
                for g, e in zip(torch.autograd.grad(made.sum(), (x, w)), want, strict=True):
                    assert error(g, e) < 4e-12


@pytest.mark.parametrize("name", ["logsumexp", "shifted_moment", "weighted_exp", "tempered_moment"])
@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_classes_that_are_never_there_count_for_nothing(name, engine):
    """-inf biases. (The folds that are sums over all classes are infinite there, as torch's.)"""
    cls = FOLDS[name]
    x, w, _ = problem(5, 40, 1.0, 0)
    b = torch.zeros(40, dtype=torch.float64)
    b[[3, 17]] = -math.inf
    axes = {"kept": (5,), "folded": (40,), "grid": (5, 40)}
    fold = cls((0.7,) if name == "tempered_moment" else (), tuple(v(*axes[a]) for a in cls.tensor_axes))
    (state,), _ = reduce_logits(Stream(((x, w),), bias=b), None, (fold,), engine=engine)
    parts = [t for t, d in zip(state, fold.differentiable, strict=True) if d]
    grads = torch.autograd.grad(sum(t.sum() for t in parts), (x, w))
    assert all(t.isfinite().all() for t in (*state, *grads)) and not grads[1][[3, 17]].any()


def test_every_row_loss_of_the_library_is_known():
    """One that is new belongs into a test like these."""
    known = {name for name in ROW_LOSSES if not name.startswith("tests.")}
    assert {"cross_entropy", "cross_entropy_probabilities", "cross_entropy_sparse", "fold_sum", "asymmetric_single"} <= known
    assert {f"one_vs_all_{name}" for name in LOSSES} <= known

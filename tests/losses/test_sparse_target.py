"""A SparseTarget is its dense form: in every option of the losses, in precision where rows are confident, and in what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from bigclass import SparseTarget
from tests.support import ROADS, draw, error

REDUCTIONS = ("mean", "sum", "none")
every_road = pytest.mark.parametrize("road", ROADS, ids="-".join)


def sparse(n, c, k, *, seed=0, floor=0.0, dtype=torch.float64, none=True, duplicates=True):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(c, (n, k), generator=g)
    weights = torch.rand(n, k, generator=g, dtype=torch.float64).to(dtype)
    if duplicates and k > 1:
        index[::2, 1] = index[::2, 0]
    if none:
        index[::3, -1] = -1
    weights[1::4, 0] = 0.0
    return SparseTarget(index, weights, c, floor)


def by_hand(t: SparseTarget) -> torch.Tensor:
    """The dense target, entry by entry."""
    out = torch.full((t.indices.shape[0], t.num_classes), t.floor, dtype=torch.float64)
    for i, (row, values) in enumerate(zip(t.indices.tolist(), t.weights.double().tolist(), strict=True)):
        for j, v in zip(row, values, strict=True):
            if j >= 0:
                out[i, j] += v
    return out


def exact_loss(s, t, v=None, smoothing=0.0, z=0.0, poly=0.0, reduction="mean"):
    """The formula on float64 logits, with t dense; rows are right where they are confident only to rounding."""
    c = s.shape[1]
    v = torch.ones(c, dtype=s.dtype) if v is None else v.double()
    soft = (1.0 - smoothing) * t + smoothing / c
    rows = -(v * soft * F.log_softmax(s, 1)).sum(1) + z * s.logsumexp(1).square()
    rows = rows + poly * (1.0 - (soft * s.softmax(1)).sum(1))
    return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]


@every_road
@settings(max_examples=60)
@given(
    n=st.integers(1, 9),
    c=st.sampled_from([1, 2, 7, 60, 9000]),
    k=st.integers(1, 6),
    floor=st.sampled_from([0.0, 0.0, 1e-3]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z=st.sampled_from([0.0, 0.01]),
    weighted=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    needs=st.booleans(),
    capped=st.booleans(),
    int32=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cross_entropy_is_that_of_the_dense_form(road, n, c, k, floor, smoothing, z, weighted, reduction, needs, capped, int32, seed):
    engine, gradients = road
    x, w, b, _ = draw("flat", n, c, 5, torch.float64, seed)
    t = sparse(n, c, k, seed=seed, floor=floor)
    weights = t.weights.clone().requires_grad_(needs)
    t = SparseTarget(t.indices.int() if int32 else t.indices, weights, c, floor)
    assert torch.equal(t.dense().detach(), by_hand(t)) or error(t.dense(), by_hand(t)) < 1e-15
    v = torch.rand(c, dtype=torch.float64) + 0.1 if weighted else None
    options = {"softcap": 3.0, "logit_scale": 1.5} if capped else {}
    leaves = (x, w, b, weights) if needs else (x, w, b)
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        loss = bigclass.linear_cross_entropy(
            x, w, t, linear_bias=b, weight=v, label_smoothing=smoothing, z_loss=z, reduction=reduction, engine=engine, **options
        )
        s = F.linear(x, w, b)
        s = 3.0 * torch.tanh(1.5 * s / 3.0) if capped else s
        exact = exact_loss(s, t.dense(), v, smoothing, z, 0.0, reduction)
        up = torch.rand(loss.shape, dtype=torch.float64) + 0.5
        got = torch.autograd.grad((loss * up).sum(), leaves)
    want = torch.autograd.grad((exact * up).sum(), leaves)
    # with one class the loss is 0, whatever the logits; and a class-weighted row may nearly cancel
    assert error(loss, exact) < 1e-12 or float((loss - exact).abs().max()) < 1e-14
    for g, e in zip(got, want, strict=True):
        assert error(g, e) < 4e-12 or float((g - e).abs().max()) < 1e-15


@every_road
@settings(max_examples=25)
@given(
    n=st.integers(1, 6),
    c=st.sampled_from([2, 60, 5000]),
    k=st.integers(1, 4),
    floor=st.sampled_from([0.0, 1e-3]),
    smoothing=st.sampled_from([0.0, 0.1]),
    epsilon=st.sampled_from([-1.0, 0.5, 2.0]),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 99),
)
def test_poly_1_is_that_of_the_dense_form(road, n, c, k, floor, smoothing, epsilon, reduction, seed):
    engine, gradients = road
    x, w, b, _ = draw("flat", n, c, 5, torch.float64, seed)
    t = sparse(n, c, k, seed=seed, floor=floor)
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        loss = bigclass.linear_poly_cross_entropy(
            x, w, t, linear_bias=b, epsilon=epsilon, label_smoothing=smoothing, reduction=reduction, engine=engine
        )
        got = torch.autograd.grad(loss.sum(), (x, w, b))
    exact = exact_loss(F.linear(x, w, b), t.dense(), None, smoothing, 0.0, epsilon, reduction)
    assert error(loss, exact) < 1e-12
    for g, e in zip(got, torch.autograd.grad(exact.sum(), (x, w, b)), strict=True):
        assert error(g, e) < 4e-12


@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_the_statistics_are_those_of_the_dense_form(engine):
    x, w, b, _ = draw("peaked", 40, 60, 5, torch.float64, 0)
    t = sparse(40, 60, 3, none=False)
    loss, stats = bigclass.linear_cross_entropy(x, w, t, linear_bias=b, reduction="none", return_stats=True, engine=engine)
    s = F.linear(x, w, b)
    assert error(stats.lse, s.logsumexp(1)) < 1e-12 and error(loss, exact_loss(s, t.dense(), reduction="none")) < 1e-12
    assert torch.equal(stats.correct, t.dense().argmax(1) == s.argmax(1)) and stats.correct.any() and not stats.correct.all()


@every_road
@pytest.mark.parametrize("k", [1, 2, 4])
def test_confident_rows_keep_their_gradient_in_float32(road, k):
    """Pitfall 43: at a loss of 1e-5, LSE - s_y is off by percents. All picks but the target have weight near 0."""
    engine, gradients = road
    n, c, d = 64, 500, 32
    x, w, b, y = draw("flat", n, c, d, torch.float32, 1)
    with torch.no_grad():  # losses of about e^-17
        x *= 0.1
        x += (math.log(c) + torch.linspace(18.5, 19.5, n))[:, None] * F.normalize(w[y], dim=1) / w[y].norm(dim=1, keepdim=True)
    g = torch.Generator().manual_seed(0)
    index = torch.cat((y[:, None], torch.randint(c, (n, k - 1), generator=g)), 1)
    weights = torch.cat((torch.ones(n, 1), torch.zeros(n, k - 1)), 1)
    t = SparseTarget(index, weights, c)
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        loss = bigclass.linear_cross_entropy(x, w, t, linear_bias=b, reduction="mean", engine=engine)
        got = torch.autograd.grad(loss, (x, w, b))
    leaves = [q.detach().double().requires_grad_() for q in (x, w, b)]
    s = F.linear(*leaves)
    rest = s.scatter(1, y[:, None], -math.inf).logsumexp(1)
    exact = -F.logsigmoid(s.gather(1, y[:, None])[:, 0] - rest).mean()
    want = torch.autograd.grad(exact, leaves)
    assert error(loss, exact) < 1e-5
    for q, e in zip(got, want, strict=True):
        assert error(q, e) < 1e-4
    plain = [q.detach().requires_grad_() for q in (x, w, b)]
    s = F.linear(*plain)
    (s.logsumexp(1) - s.gather(1, y[:, None])[:, 0]).mean().backward()
    assert error(plain[0].grad, want[0]) > 5e-4  # what this is about


@every_road
def test_nearly_one_hot_mixtures_in_float32(road):
    """Two picks that share the mass: each is confident against the other classes, not against its partner."""
    engine, gradients = road
    n, c, d = 64, 500, 48
    x, w, b, y = draw("flat", n, c, d, torch.float32, 2)
    z = (y + 1) % c
    with torch.no_grad():
        for target in (y, z):
            x += (math.log(c) + 9.0) * F.normalize(w[target], dim=1) / w[target].norm(dim=1, keepdim=True)
    t = SparseTarget(torch.stack((y, z), 1), torch.tensor([0.6, 0.4]).expand(n, 2), c)
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        loss = bigclass.linear_cross_entropy(x, w, t, linear_bias=b, engine=engine)
        got = torch.autograd.grad(loss, (x, w, b))
    leaves = [q.detach().double().requires_grad_() for q in (x, w, b)]
    exact = exact_loss(F.linear(*leaves), t.dense().double())
    assert error(loss, exact) < 1e-6
    for q, e in zip(got, torch.autograd.grad(exact, leaves), strict=True):
        assert error(q, e) < 1e-5


@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_rows_without_a_class_and_extreme_logits(engine):
    x, w, b, _ = draw("flat", 4, 30, 5, torch.float64, 0)
    t = SparseTarget(torch.tensor([[-1, -1], [3, -1], [4, 4], [29, 0]]), torch.ones(4, 2, dtype=torch.float64), 30)
    loss = bigclass.linear_cross_entropy(x, w, t, linear_bias=b, reduction="none", engine=engine)
    assert loss[0] == 0.0 and error(loss, exact_loss(F.linear(x, w, b), by_hand(t), reduction="none")) < 1e-12
    g = torch.autograd.grad(loss[0], (x, w), retain_graph=True)
    assert not any(q.any() for q in g)
    with torch.no_grad():
        b[7] = -math.inf  # a class that is never there
    loss = bigclass.linear_cross_entropy(x, w, t, linear_bias=b, engine=engine)
    assert loss.isfinite() and all(q.isfinite().all() for q in torch.autograd.grad(loss, (x, w)))
    everything = SparseTarget(torch.arange(30).expand(4, 30), torch.rand(4, 30, dtype=torch.float64), 30)
    b = torch.zeros(30, dtype=torch.float64)
    loss = bigclass.linear_cross_entropy(x, w, everything, linear_bias=b, engine=engine)
    exact = exact_loss(F.linear(x, w, b), everything.dense())
    assert error(loss, exact) < 1e-12
    for q, e in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(exact, (x, w)), strict=True):
        assert error(q, e) < 1e-12
    empty = SparseTarget(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), 30)
    assert bigclass.linear_cross_entropy(x[:0], w, empty, engine=engine).isnan()
    assert bigclass.linear_cross_entropy(x[:0], w, empty, engine=engine, reduction="sum") == 0.0
    nothing = SparseTarget(torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0, dtype=torch.float64), 30, 0.1)
    assert error(bigclass.linear_cross_entropy(x, w, nothing, engine=engine), exact_loss(x @ w.t(), nothing.dense())) < 1e-12


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_and_features(engine, dtype):
    x, w, b, _ = draw("flat", 8, 60, 16, dtype, 0)
    t = sparse(8, 60, 2, dtype=dtype)
    loss = bigclass.linear_cross_entropy(x, w, t, linear_bias=b, engine=engine)
    exact = exact_loss(F.linear(x.double(), w.double(), b.double()), by_hand(t))
    assert loss.dtype == torch.float32 and error(loss, exact) < 1e-6


def test_one_graph_and_the_same_gradients_under_compile():
    x, w, _, _ = draw("flat", 6, 60, 5, torch.float64, 0)
    t = sparse(6, 60, 3, floor=1e-3)

    def loss(x, w, t):
        return bigclass.linear_cross_entropy(x, w, t, engine="tiled", label_smoothing=0.1)

    want = torch.autograd.grad(loss(x, w, t), (x, w))
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x, w, t), (x, w))
    for a, e in zip(got, want, strict=True):
        assert error(a, e) < 1e-12


# --- the object


def test_it_answers_as_the_dense_target_would():
    t = sparse(6, 60, 3)
    dense = t.dense()
    assert t.shape == dense.shape and t.ndim == t.dim() == 2 and len(t) == 6 and t.size() == dense.shape and t.size(-1) == 60
    assert t.dtype == dense.dtype and t.device == dense.device
    for rows in (slice(1, 4), 2, torch.tensor([3, 0]), torch.tensor([True, False] * 3), [1, 2], None, ..., torch.tensor(1)):
        assert torch.equal(t[rows].dense(), dense[rows])
    for made, exact in ((t * 2, dense * 2), (0.5 * t, dense * 0.5), (-t, -dense), (t + 0.1, dense + 0.1), (0.1 + t, dense + 0.1)):
        assert error(made.dense(), exact) < 1e-15
    assert error(t * torch.ones(6, 60, dtype=torch.float64), dense) < 1e-15
    for threshold in (0.0, 0.3, 0.9):
        assert torch.equal((t > threshold).dense(), (dense > threshold).double()) and torch.equal(
            t.gt(threshold).dense(), t.gt(threshold).dense()
        )
    assert torch.equal((t + 0.5).gt(0.4).dense(), (dense + 0.5 > 0.4).double())
    half = t.to(torch.bfloat16)
    assert (
        half.dtype == torch.bfloat16
        and half.indices is t.indices
        and t.to("cpu").dtype == torch.float64
        and t.to("meta").device.type == "meta"
    )
    batch = sparse(6, 60, 3)
    three = SparseTarget(batch.indices.view(2, 3, 3), batch.weights.view(2, 3, 3), 60)
    assert (
        three.shape == (2, 3, 60)
        and torch.equal(three.dense().view(6, 60), batch.dense())
        and torch.equal(three[1].dense(), three.dense()[1])
    )
    x, w, _, _ = draw("flat", 6, 60, 5, torch.float64, 0)
    both = [bigclass.linear_cross_entropy(q, w, u, reduction="none") for q, u in ((x, batch), (x.view(2, 3, 5), three))]
    assert torch.equal(both[0], both[1].view(-1)) and both[1].shape == (2, 3)


def test_duplicates_merge_to_their_sum_and_the_first_of_them_stays():
    t = SparseTarget(torch.tensor([[4, 7, 4, -1, 7]], dtype=torch.int32), torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]), 9)
    index, weights = t.merged()
    assert index.tolist() == [[4, 7, -1, -1, -1]] and weights.tolist() == [[5.0, 18.0, 0.0, 0.0, 0.0]]
    assert torch.equal(SparseTarget(index, weights, 9).dense(), t.dense())


def test_it_is_a_pytree():
    t = sparse(4, 60, 2, floor=0.1)
    leaves, spec = pytree.tree_flatten([t])
    assert leaves[0] is t.indices and leaves[1] is t.weights and spec == pytree.tree_structure([sparse(2, 60, 3, floor=0.1)])
    again = pytree.tree_unflatten(leaves, spec)[0]
    assert isinstance(again, SparseTarget) and again.num_classes == 60 and again.floor == 0.1
    moved = pytree.tree_map(lambda q: q[:2], t)
    assert torch.equal(moved.dense(), t.dense()[:2])
    pytree.tree_map(lambda q: None, t)


def test_what_cannot_be_a_target_is_refused():
    i, v = torch.zeros(4, 2, dtype=torch.long), torch.rand(4, 2)
    for broken, kind, words in (
        (lambda: SparseTarget(i.float(), v, 9), TypeError, "indices: expected int64 or int32.*float32"),
        (lambda: SparseTarget(i, i, 9), TypeError, "weights: expected a floating-point tensor, got torch.int64"),
        (lambda: SparseTarget(i, v[:3], 9), ValueError, r"weights.*\(4, 2\), got \(3, 2\)"),
        (lambda: SparseTarget(i[0, 0], v[0, 0], 9), ValueError, r"weights.*\(\.\.\., K\)"),
        (lambda: SparseTarget(i, v, 0), ValueError, "num_classes: expected.*got 0"),
        (lambda: SparseTarget(i, v, 9.0), (TypeError, ValueError), "num_classes: expected.*got 9.0"),
        (lambda: SparseTarget(i, v.to("meta"), 9), ValueError, "weights: expected device cpu.*meta"),
        (lambda: SparseTarget(i, v, 9)[0, 1], ValueError, "only rows"),
        (lambda: SparseTarget(i[0], v[0], 9)[:1], ValueError, "only rows"),
        (lambda: SparseTarget(i, v, 9)[torch.ones(4, 2).bool()], ValueError, "only rows"),
        (lambda: SparseTarget(i, v, 9).to(torch.int64), TypeError, "weights.*int64"),
    ):
        with pytest.raises(kind, match=words):
            broken()


@pytest.mark.parametrize("engine", ["dense", "tiled", "auto"])
def test_what_does_not_fit_a_layer_is_refused(engine):
    x, w, _, _ = draw("flat", 4, 9, 5, torch.float32, 0)
    i, v = torch.zeros(4, 2, dtype=torch.long), torch.rand(4, 2)
    for t, options, kind, words in (
        (SparseTarget(i, v, 10), {}, ValueError, r"target: expected a SparseTarget of shape \(4, 9\), got \(4, 10\)"),
        (SparseTarget(i[:3], v[:3], 9), {}, ValueError, r"target.*\(4, 9\), got \(3, 9\)"),
        (SparseTarget(i + 9, v, 9), {}, IndexError, r"\[0, 9\), got 9"),
        (SparseTarget(i - 2, v, 9), {}, IndexError, "-2"),
        (SparseTarget(i, v, 9), {"ignore_index": 0}, ValueError, "ignore_index"),
        (SparseTarget(i, v, 9), {"shift": 1}, ValueError, "shift"),
        (SparseTarget(i, v, 9), {"weight": torch.ones(8)}, ValueError, "weight"),
        (SparseTarget(i, v, 9).to("meta"), {}, ValueError, "target: expected device cpu"),
    ):
        with pytest.raises(kind, match=words):
            bigclass.linear_cross_entropy(x, w, t, engine=engine, **options)


def test_beside_real_logits_it_is_its_dense_form():
    t = SparseTarget(torch.tensor([[1, 2], [0, -1]]), torch.tensor([[0.3, 0.5], [1.0, 0.0]]), 5, 0.01)
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.nn.functional.cross_entropy(logits, t), torch.nn.functional.cross_entropy(logits, t.dense()))
    assert t.float().dtype == t.cpu().dtype == torch.float32 and not t.detach().weights.requires_grad

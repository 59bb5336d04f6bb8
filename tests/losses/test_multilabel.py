"""One-vs-all losses equal their dense formulas in float64 and torch's and timm's own, whatever form the positives come in."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.losses.elementwise import LOSSES
from tests.support import ROADS, error

if TYPE_CHECKING:
    import triton.language as tl

every_road = pytest.mark.parametrize("road", ROADS, ids="-".join)


def _bce(s, t, p):
    return -(1 - t) * F.logsigmoid(-s) - t * p * F.logsigmoid(s)


def _focal(s, t, p, alpha, gamma):
    """torchvision's sigmoid_focal_loss, no probability taken from 1."""
    missing = t * torch.sigmoid(-s) + (1 - t) * torch.sigmoid(s)
    loss = _bce(s, t, p) * missing**gamma
    return loss if alpha < 0 else loss * (alpha * t + (1 - alpha) * (1 - t))


def _asymmetric(s, t, p, gamma_neg, gamma_pos, clip, eps):
    """Equations 4 and 5 of arXiv:2009.14119, with timm's clamps."""
    q = (torch.sigmoid(s) - clip).clamp(min=0)
    low = torch.tensor(eps, dtype=s.dtype).log()
    positive = -torch.maximum(F.logsigmoid(s), low) * torch.sigmoid(-s) ** gamma_pos
    negative = torch.where(q < 0.5, torch.log1p(-q.clamp(max=0.5)), (torch.sigmoid(-s) + clip).log()) if clip else F.logsigmoid(-s)
    return t * p * positive - (1 - t) * q**gamma_neg * torch.maximum(negative, low)


def _hinge(s, t, p, margin):
    return t * p * (margin - s).clamp(min=0) ** 2 + (1 - t) * (margin + s).clamp(min=0) ** 2


def _poly(s, t, p, epsilon, gamma, alpha):
    missing = t * torch.sigmoid(-s) + (1 - t) * torch.sigmoid(s)
    return (_bce(s, t, p) + epsilon * missing * (1 - t + t * p)) * missing**gamma


# name: (loss, options, dense term(s, t, p, *options))
CASES = {
    "bce": ("bce", {}, _bce),
    "focal": ("focal", {"alpha": 0.25, "gamma": 2.0}, _focal),
    "focal, no factors": ("focal", {"alpha": -1.0, "gamma": 0.5}, _focal),
    "focal, gamma 0": ("focal", {"alpha": 0.5, "gamma": 0.0}, _focal),
    "asymmetric": ("asymmetric", {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05, "eps": 1e-8}, _asymmetric),
    "asymmetric, wide": ("asymmetric", {"gamma_neg": 2.5, "gamma_pos": 0.0, "clip": 0.3, "eps": 1e-8}, _asymmetric),
    "asymmetric, gamma 1": ("asymmetric", {"gamma_neg": 1.0, "gamma_pos": 2.0, "clip": 0.1, "eps": 1e-8}, _asymmetric),
    "asymmetric, gamma 0": ("asymmetric", {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.1, "eps": 1e-8}, _asymmetric),
    "asymmetric, no margin": ("asymmetric", {"gamma_neg": 3.0, "gamma_pos": 1.0, "clip": 0.0, "eps": 1e-3}, _asymmetric),
    "squared hinge": ("squared_hinge", {"margin": 1.0}, _hinge),
    "squared hinge, far": ("squared_hinge", {"margin": -0.5}, _hinge),
    "asymmetric, small margin": ("asymmetric", {"gamma_neg": 2.0, "gamma_pos": 1.0, "clip": 1e-6, "eps": 1e-8}, _asymmetric),
    "asymmetric, eps above clip": ("asymmetric", {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.01, "eps": 0.1}, _asymmetric),
    "asymmetric, both above": ("asymmetric", {"gamma_neg": 0.5, "gamma_pos": 1.0, "clip": 0.01, "eps": 0.1}, _asymmetric),
    "poly": ("poly", {"epsilon": 1.5, "gamma": 2.0, "alpha": -1.0}, _poly),
}


def draw(n, c, k, seed, spread=1.0, low=0.0):
    """x, w, b in float64 and positives (N, K) without duplicates."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, 5, generator=g, dtype=torch.float64) * spread, torch.randn(c, 5, generator=g, dtype=torch.float64)
    b = torch.randn(c, generator=g, dtype=torch.float64) * 0.3 + low
    positives = torch.stack([torch.randperm(c, generator=g)[: min(k, c)] for _ in range(n)]) if n else torch.zeros(0, k, dtype=torch.long)
    positives = positives.masked_fill(torch.rand(positives.shape, generator=g) < 0.4, -1)
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), positives


def hot(positives, c):
    t = torch.zeros(positives.shape[0], c + 1, dtype=torch.float64)
    return t.scatter(1, torch.where(positives < 0, c, positives), 1.0)[:, :-1]


def csr_of(positives):
    there = positives >= 0
    return torch.cat((torch.zeros(1, dtype=torch.long), there.sum(1).cumsum(0))), positives[there]


def forms(positives, c):
    """The same targets in every form."""
    indptr, indices = csr_of(positives)
    order = torch.cat([indices[a:b].sort().values for a, b in itertools.pairwise(indptr)])
    ones = torch.ones(len(indices), dtype=torch.float64)
    return {
        "padded": positives,
        "duplicates": torch.cat((positives, positives.flip(1)), 1).int(),
        "csr": (indptr, indices),
        "csr, valued": (indptr.int(), indices.int(), ones),
        "sparse csr": torch.sparse_csr_tensor(indptr, order, ones, (len(positives), c)),
        "sparse coo": torch.sparse_csr_tensor(indptr, order, ones, (len(positives), c)).to_sparse_coo(),
        "target": bigclass.SparseTarget(positives, torch.ones(positives.shape, dtype=torch.float64), c),
        "dense": hot(positives, c),
        "dense, bool": hot(positives, c).bool(),
    }


def check(loss, leaves, exact, bound=1e-12, gradients=4e-12):
    assert error(loss, exact) < bound
    want = torch.autograd.grad(exact.sum(), leaves)
    for g, e in zip(torch.autograd.grad(loss.sum(), leaves), want, strict=True):
        assert error(g, e) < gradients or float((g - e).abs().max()) < 1e-15


problems = {
    "n": st.integers(1, 9), "c": st.sampled_from([1, 7, 60, 9000]), "k": st.integers(1, 5), "seed": st.integers(0, 999),
    "spread": st.sampled_from([0.0, 0.3, 3.0]), "low": st.sampled_from([0.0, -8.0]),
}  # fmt: skip


@every_road
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12)
@given(**problems, reduction=st.sampled_from(["mean", "sum", "batchmean", "none"]), weighted=st.booleans(), dense=st.booleans())
def test_every_loss_and_all_gradients_are_those_of_the_formula(name, road, n, c, k, seed, spread, low, reduction, weighted, dense):
    loss, options, term = CASES[name]
    x, w, b, positives = draw(n, c, k, seed, spread, low)
    vectors = {"weight": torch.rand(c).double() + 0.5, "pos_weight": torch.rand(c).double() + 0.5} if weighted else {}
    engine, gradients = road
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        got = bigclass.linear_elementwise_loss(
            x, w, hot(positives, c) if dense else positives, loss=loss, linear_bias=b, reduction=reduction, engine=engine,
            **vectors, **options,
        )  # fmt: skip
        terms = term(x @ w.t() + b, hot(positives, c), vectors.get("pos_weight", 1.0), *options.values()) * vectors.get("weight", 1.0)
        rows = terms.sum(1)
        exact = {"none": rows, "sum": rows.sum(), "batchmean": rows.mean(), "mean": terms.mean()}[reduction]
        check(got, (x, w, b), exact)


@every_road
@settings(max_examples=15)
@given(**problems, reduction=st.sampled_from(["mean", "sum", "none"]))
def test_zlpr(road, n, c, k, seed, spread, low, reduction):
    x, w, b, positives = draw(n, c, k, seed, spread, low)
    engine, gradients = road
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        got = bigclass.linear_zlpr_loss(x, w, positives, linear_bias=b, reduction=reduction, engine=engine)
        s, t = x @ w.t() + b, hot(positives, c)
        zero = s.new_zeros(n, 1)
        rows = torch.cat((s - t * 1e300, zero), 1).logsumexp(1) + torch.cat((-s - (1 - t) * 1e300, zero), 1).logsumexp(1)
        check(got, (x, w, b), {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction], gradients=1e-11)


@every_road
@pytest.mark.parametrize("loss", ["bce", "asymmetric", "squared_hinge"])
@settings(max_examples=8)
@given(n=st.integers(1, 6), c=st.sampled_from([7, 9000]), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_form_of_the_positives_gives_the_same_numbers(road, loss, n, c, k, seed):
    x, w, b, positives = draw(n, c, k, seed)
    engine, gradients = road
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        first = None
        for form in forms(positives, c).values():
            got = bigclass.linear_elementwise_loss(x, w, form, loss=loss, linear_bias=b, engine=engine)
            numbers = (got, *torch.autograd.grad(got, (x, w, b)))
            first = numbers if first is None else first
            for a, e in zip(numbers, first, strict=True):
                assert error(a, e) < 1e-13


@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_soft_targets_mixup_and_smoothing(engine):
    """timm's conventions: smoothing e gives (1 - e) t + e / C; mixup is a SparseTarget; one label a row is an index."""
    n, c = 6, 9000
    x, w, b, _ = draw(n, c, 1, 3)
    y, lam, e = torch.randint(c, (n,)), 0.3, 0.1
    one_hot = F.one_hot(y, c).double()
    mixed = lam * one_hot + (1 - lam) * one_hot.flip(0)
    sparse = bigclass.SparseTarget(torch.stack((y, y.flip(0)), 1), torch.tensor([lam, 1 - lam], dtype=torch.float64).expand(n, 2), c)
    for positives, target in [(y, one_hot), (sparse, mixed), (mixed, mixed)]:
        for smoothing in (0.0, e):
            got = bigclass.linear_binary_cross_entropy(x, w, positives, linear_bias=b, label_smoothing=smoothing, engine=engine)
            check(got, (x, w, b), _bce(x @ w.t() + b, (1 - smoothing) * target + smoothing / c, 1.0).mean())


def test_torch_s_own_values_and_gradients():
    n, c, k = 33, 5000, 4
    x, w, b, positives = (t.detach().float().requires_grad_() if t.is_floating_point() else t for t in draw(n, c, k, 0))
    weight, pos_weight = torch.rand(c) + 0.5, torch.rand(c) + 0.5
    target = hot(positives, c).float()
    with bigclass.planning(workspace=1 << 20):
        got = bigclass.linear_binary_cross_entropy(
            x, w, positives, linear_bias=b, weight=weight, pos_weight=pos_weight, engine="tiled"
        )  # fmt: skip
    own = F.binary_cross_entropy_with_logits(F.linear(x, w, b), target, weight, pos_weight=pos_weight)
    check(got, (x, w, b), own, 2e-6, 2e-6)
    got = bigclass.linear_elementwise_loss(x, w, positives, loss="squared_hinge", linear_bias=b, reduction="sum", engine="tiled")
    signed = 2 * target - 1
    own = F.relu(1 - signed * F.linear(x, w, b)).square().sum()
    check(got, (x, w, b), own, 2e-6, 2e-6)


@pytest.mark.parametrize("low", [0.0, -4.0])
def test_classes_whose_loss_is_exactly_zero_are_skipped_exactly(low):
    """Their gradients are zeros, and those of the others are the same numbers as without skipping."""
    n, c = 40, 12000
    x, w, b, positives = draw(n, c, 3, 1, 0.2, low)
    b = (b.detach() - 6.0 * (torch.arange(c) % 3 > 0)).requires_grad_()  # two classes of three lie below every margin
    for loss in ("asymmetric", "squared_hinge"):
        with bigclass.planning(workspace=4 << 20):
            got = bigclass.linear_elementwise_loss(x, w, positives, loss=loss, linear_bias=b, engine="tiled", reduction="sum")
            dw, db = torch.autograd.grad(got, (w, b))
        _, options, term = CASES["asymmetric" if loss == "asymmetric" else "squared hinge"]
        exact = term(x @ w.t() + b, hot(positives, c), 1.0, *options.values()).sum()
        want = torch.autograd.grad(exact, (w, b))
        assert error(got, exact) < 1e-12 and error(dw, want[0]) < 1e-12 and error(db, want[1]) < 1e-12
        quiet = ((x @ w.t() + b).amax(0) < -3.5) & (hot(positives, c).sum(0) == 0)
        assert quiet.sum() > c / 2 and not dw[quiet].any() and not db[quiet].any()


def test_skipping_is_felt(monkeypatch):
    """The products of a tile are made of its live classes alone."""
    from bigclass.core.engines import slabs

    shares = []
    whole = slabs.live_classes

    def watched(s, below, where):
        live = whole(s, below, where)
        shares.append(1.0 if live is None else live.numel() / s.shape[1])
        return live

    monkeypatch.setattr(slabs, "live_classes", watched)
    x, w, b, positives = draw(16, 9000, 2, 0, 0.1, -5.0)
    for loss, most in [("bce", 1.0), ("asymmetric", 0.02), ("squared_hinge", 0.02)]:
        shares.clear()
        bigclass.linear_elementwise_loss(x, w, positives, loss=loss, linear_bias=b, engine="tiled").backward()
        assert shares and (max(shares) <= most if most < 1 else min(shares) == 1.0)


@bigclass.register_elementwise_loss
class Logarithmic(bigclass.ElementwiseLoss):
    """A loss from outside, in ten lines: a (log(1 + e^s))^2 for negatives, its mirror image for positives."""

    name, vanishes, options = "tests.logarithmic", True, {"rate": 1.0}

    @staticmethod
    def negative(s, rate):
        return rate * F.logsigmoid(-s).square()

    @staticmethod
    def positive(s, rate):
        return rate * F.logsigmoid(s).square()

    @bigclass.triton_form
    def negative_triton(s, rate):
        u = tl.log(1.0 + tl.exp(s))
        return rate * u * u

    @bigclass.triton_form
    def negative_slope_triton(s, rate):
        return 2.0 * rate * tl.log(1.0 + tl.exp(s)) * tl.sigmoid(s)


@every_road
@pytest.mark.parametrize("dense", [False, True])
def test_a_loss_of_one_s_own(road, dense):
    x, w, b, positives = draw(9, 9000, 3, 4)
    engine, gradients = road
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        target = hot(positives, 9000)
        got = bigclass.linear_elementwise_loss(
            x, w, target if dense else positives, loss="tests.logarithmic", rate=0.5, linear_bias=b, engine=engine
        )
        s = x @ w.t() + b
        check(got, (x, w, b), (0.5 * (target * F.softplus(-s) ** 2 + (1 - target) * F.softplus(s) ** 2)).mean(), 1e-9, 1e-9)


@pytest.mark.parametrize("loss", [*LOSSES, "zlpr"])
@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_the_best_classes_come_from_the_same_pass(loss, engine):
    x, w, b, positives = draw(11, 9000, 3, 7)
    with bigclass.planning(workspace=1 << 20):
        call = bigclass.linear_zlpr_loss if loss == "zlpr" else bigclass.linear_elementwise_loss
        named = {} if loss == "zlpr" else {"loss": loss}
        for reduction in ("mean", "none"):
            plain = call(x, w, positives, linear_bias=b, engine=engine, reduction=reduction, **named)
            got, top = call(x, w, positives, linear_bias=b, engine=engine, return_topk=4, reduction=reduction, **named)
            values, indices = (x @ w.t() + b).topk(4)
            assert torch.equal(top.indices, indices) and error(top.values, values) < 1e-14 and not top.values.requires_grad
            assert error(got, plain) < 1e-14
            for a, e in zip(torch.autograd.grad(got.sum(), (x, w, b)), torch.autograd.grad(plain.sum(), (x, w, b)), strict=True):
                assert error(a, e) < 1e-12


def test_one_graph_under_compile():
    x, w, b, positives = draw(11, 9000, 3, 7)

    def step(x, w, b, positives):
        loss, top = bigclass.linear_asymmetric_loss(x, w, positives, linear_bias=b, return_topk=3, engine="tiled")
        return loss * 0.5, top.indices

    torch._dynamo.reset()
    loss, indices = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, b, positives)
    want, expected = step(x, w, b, positives)
    assert error(loss, want) < 1e-14 and torch.equal(indices, expected)
    for a, e in zip(torch.autograd.grad(loss, (x, w, b)), torch.autograd.grad(want, (x, w, b)), strict=True):
        assert error(a, e) < 1e-12


def test_a_class_below_none_is_an_error_inside_a_graph_too():
    x, w, _, positives = draw(4, 9000, 3, 7)
    positives[2, 1] = -2
    torch._dynamo.reset()
    for target in (positives, bigclass.SparseTarget(positives, torch.ones(4, 3), 9000)):
        for loss in (bigclass.linear_binary_cross_entropy, bigclass.linear_cross_entropy):
            if loss is bigclass.linear_binary_cross_entropy or target is not positives:
                with pytest.raises(IndexError, match="got -2"):
                    torch.compile(lambda t, f=loss: f(x, w, t), backend="aot_eager")(target)


def test_what_no_graph_can_hold_breaks_it_and_is_named_where_it_must_not():
    x, w, _, positives = draw(11, 9000, 3, 7)
    csr, want = csr_of(positives), bigclass.linear_binary_cross_entropy(x, w, positives)

    def step(x, w):
        return bigclass.linear_binary_cross_entropy(x * 1.0, w, csr) * 1.0

    torch._dynamo.reset()
    assert error(torch.compile(step, backend="aot_eager")(x, w), want) < 1e-14
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"CSR positives are padded .* for fullgraph=True pad them"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(x, w)
    weight, y = torch.nn.Parameter(torch.randn(9000, 5)), torch.arange(11)
    for loss in (bigclass.linear_binary_cross_entropy, bigclass.linear_cross_entropy, bigclass.linear_margin_loss):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"update= writes to the weight .* leave it None"):
            torch.compile(lambda x, f=loss: f(x, weight, y, update=bigclass.GradAccumulator()), fullgraph=True)(torch.randn(11, 5))


def test_lists_are_padded():
    lists = [[3, 17, 5], [], [4]]
    padded = bigclass.pad_positives(lists)
    assert padded.dtype == torch.int64 and padded.tolist() == [[3, 17, 5], [-1, -1, -1], [4, -1, -1]]
    assert bigclass.pad_positives([]).shape == (0, 1) and bigclass.pad_positives([[], []]).tolist() == [[-1], [-1]]
    assert bigclass.pad_positives([torch.tensor([2, 1]), (0,)]).tolist() == [[2, 1], [0, -1]]
    x, w, _, _ = draw(3, 20, 1, 0)
    indptr, indices = torch.tensor([0, 3, 3, 4]), torch.tensor([3, 17, 5, 4])
    assert error(bigclass.linear_focal_loss(x, w, padded), bigclass.linear_focal_loss(x, w, (indptr, indices))) < 1e-15
    for wrong in ([[1.5]], [3], ["a"], None):
        with pytest.raises(TypeError, match="positives: expected lists of class indices"):
            bigclass.pad_positives(wrong)
    with pytest.raises(IndexError, match="got -2"):
        bigclass.pad_positives([[1], [-2]])


def test_an_option_of_timm_s_may_be_none():
    x, w, _, positives = draw(5, 900, 3, 1)
    for loss, name, value in (("asymmetric", "clip", 0.0), ("poly", "alpha", -1.0)):
        plain = bigclass.linear_elementwise_loss(x, w, positives, loss=loss, **{name: value})
        assert torch.equal(bigclass.linear_elementwise_loss(x, w, positives, loss=loss, **{name: None}), plain)
        head = bigclass.MultiLabelHead(5, 900, bias=False, dtype=torch.float64, loss=loss, reduction="mean", **{name: None})
        head.weight = torch.nn.Parameter(w.detach())
        assert error(head(x, positives), plain) < 1e-14 and f"{name}={value:g}" in repr(head)
    assert torch.equal(
        bigclass.linear_asymmetric_loss(x, w, positives, clip=None), bigclass.linear_asymmetric_loss(x, w, positives, clip=0.0)
    )
    with pytest.raises(TypeError, match="gamma_neg: expected a number, got None"):
        bigclass.linear_asymmetric_loss(x, w, positives, gamma_neg=None)


def test_leading_axes_frozen_operands_no_rows_and_no_positives():
    x, w, b, positives = draw(12, 900, 3, 2)
    flat = bigclass.linear_focal_loss(x, w, positives, linear_bias=b, reduction="none", engine="tiled")
    shaped = bigclass.linear_focal_loss(x.view(3, 4, 5), w, positives.view(3, 4, 3), linear_bias=b, reduction="none", engine="tiled")
    assert shaped.shape == (3, 4) and torch.equal(shaped.flatten(), flat)
    frozen = bigclass.linear_focal_loss(x, w.detach(), positives, linear_bias=b.detach(), engine="tiled")
    whole = bigclass.linear_focal_loss(x, w, positives, linear_bias=b, engine="tiled")
    assert error(torch.autograd.grad(frozen, x)[0], torch.autograd.grad(whole, x)[0]) < 1e-14
    for engine in ("dense", "tiled"):
        nothing = bigclass.linear_binary_cross_entropy(x[:0], w, positives[:0], linear_bias=b, engine=engine)
        assert nothing.isnan()
        assert not torch.autograd.grad(bigclass.linear_binary_cross_entropy(
            x[:0], w, positives[:0], linear_bias=b, reduction="sum", engine=engine), w)[0].any()  # fmt: skip
        none = bigclass.linear_binary_cross_entropy(x, w, torch.full((12, 2), -1), linear_bias=b, reduction="sum", engine=engine)
        assert error(none, -F.logsigmoid(-(x @ w.t() + b)).sum()) < 1e-13


def test_upstream_factors_and_second_backwards():
    x, w, b, positives = draw(12, 9000, 3, 2)
    loss = bigclass.linear_asymmetric_loss(x, w, positives, linear_bias=b, engine="tiled")
    first = torch.autograd.grad(loss * 0.25, (x, w, b), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w, b))
    for a, e in zip(first, second, strict=True):
        assert error(a * 4, e) < 1e-14


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_types_keep_the_digits_of_fp32_sums(half):
    x, w, b, positives = (t.detach().to(half).requires_grad_() if t.is_floating_point() else t for t in draw(40, 9000, 3, 2, 1.0, -2.0))
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    s = exact[0] @ exact[1].t() + exact[2]
    for loss, (_, options, term) in {k: v for k, v in CASES.items() if k in ("bce", "focal", "asymmetric")}.items():
        with bigclass.planning(workspace=1 << 20):
            got = bigclass.linear_elementwise_loss(x, w, positives, loss=loss, linear_bias=b, engine="tiled", **options)
        want = term(s, hot(positives, 9000), 1.0, *options.values()).mean()
        assert got.dtype == torch.float32 and error(got, want) < 1e-5
        wants = torch.autograd.grad(want, exact, retain_graph=True)
        for g, e in zip(torch.autograd.grad(got, (x, w, b)), wants, strict=True):
            assert g.dtype == half and error(g, e) < 4e-3


X, W = torch.randn(4, 6), torch.randn(50, 6)
BAD: dict[str, tuple] = {
    "class too high": (torch.tensor([[50]] * 4), {}, IndexError, r"expected class indices in \[0, 50\).* got 50"),
    "class below -1": (torch.tensor([[-2]] * 4), {}, IndexError, "got -2"),
    "wrong rows": (torch.zeros(3, 2, dtype=torch.long), {}, ValueError, r"shape \(4,\) or \(4,\) \+ \(K,\), got \(3, 2\)"),
    "wrong dense": (torch.zeros(4, 49), {}, ValueError, r"shape of the logits, \(4, 50\)"),
    "wrong dtype": (torch.zeros(4, 2, dtype=torch.int16), {}, TypeError, "int16"),
    "no form": ("cat", {}, TypeError, "a CSR pair"),
    "pointers too few": ((torch.tensor([0, 1, 2]), torch.tensor([3, 4])), {}, ValueError, "expected 5 pointers"),
    "pointers beyond": ((torch.tensor([0, 1, 2, 3, 9]), torch.tensor([3, 4])), {}, ValueError, "rise from 0 to 2"),
    "pointers falling": ((torch.tensor([0, 2, 1, 2, 2]), torch.tensor([3, 4])), {}, ValueError, "falling"),
    "csr class": ((torch.tensor([0, 1, 2, 2, 2]), torch.tensor([3, -1])), {}, IndexError, "got -1"),
    "csr values": ((torch.tensor([0, 1, 2, 2, 2]), torch.tensor([3, 4]), torch.ones(3)), {}, ValueError, "a value for each of 2"),
    "negative soft": ((torch.tensor([0, 1, 2, 2, 2]), torch.tensor([3, 4]), torch.tensor([0.5, -0.5])), {}, ValueError, r"in \[0, 1\]"),
    "negative dense": (torch.full((4, 50), -0.1), {}, ValueError, r"targets in \[0, 1\], got values from -0.1"),
    "NaN dense": (torch.full((4, 50), torch.nan), {}, ValueError, r"targets in \[0, 1\]"),
    "above 1": (bigclass.SparseTarget(torch.zeros(4, 1, dtype=torch.long), torch.full((4, 1), 1.5), 50), {}, ValueError, r"in \[0, 1\]"),
    "summed above 1": (
        bigclass.SparseTarget(torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), 0.7), 50), {}, ValueError, r"in \[0, 1\]"),
    "negative floor": (
        bigclass.SparseTarget(torch.zeros(4, 1, dtype=torch.long), torch.full((4, 1), 0.7), 50, -0.1), {}, ValueError, "a floor in"),
    "integer values": ((torch.tensor([0, 1, 2, 2, 2]), torch.tensor([3, 4]), torch.tensor([1, 2])), {}, ValueError, r"in \[0, 1\]"),
    "integer multi-hot": (torch.eye(4, 50).long(), {}, ValueError, "looks like a multi-hot"),
    "learnt targets": (torch.zeros(4, 50, requires_grad=True), {}, ValueError, "targets are constants"),
    "twice with values": ((torch.tensor([0, 2, 2, 2, 2]), torch.tensor([3, 3]), torch.ones(2)), {}, ValueError, "stands twice in a row"),
    "sparse shape": (torch.eye(4).to_sparse_csr(), {}, ValueError, r"sparse tensor of shape \(4, 50\)"),
    "smoothing": (torch.zeros(4, 1, dtype=torch.long), {"label_smoothing": 2.0}, ValueError, "label_smoothing"),
    "weight": (torch.zeros(4, 1, dtype=torch.long), {"weight": torch.ones(7)}, ValueError, r"weight: expected a factor"),
    "learnt weight": (torch.zeros(4, 1, dtype=torch.long), {"pos_weight": torch.ones(50, requires_grad=True)}, ValueError, "constants"),
    "reduction": (torch.zeros(4, 1, dtype=torch.long), {"reduction": "average"}, ValueError, "reduction: expected one of"),
    "topk": (torch.zeros(4, 1, dtype=torch.long), {"return_topk": 51}, ValueError, "return_topk: expected 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_named(name):
    positives, options, kind, words = BAD[name]
    for engine in ("dense", "tiled"):
        with pytest.raises(kind, match=words):
            bigclass.linear_binary_cross_entropy(X, W, positives, engine=engine, **options)


def test_bad_options_are_refused_and_named():
    y = torch.zeros(4, 1, dtype=torch.long)
    for call, words in [
        (lambda: bigclass.linear_focal_loss(X, W, y, gamma=-1.0), "gamma: expected a finite exponent"),
        (lambda: bigclass.linear_focal_loss(X, W, y, alpha=1.5), "alpha: expected a share"),
        (lambda: bigclass.linear_asymmetric_loss(X, W, y, clip=1.0), "clip: expected a margin"),
        (lambda: bigclass.linear_asymmetric_loss(X, W, y, eps=0.7), "eps: expected a probability"),
        (lambda: bigclass.linear_elementwise_loss(X, W, y, loss="nothing"), "loss: expected one of"),
        (lambda: bigclass.linear_zlpr_loss(X, W, torch.zeros(4, 50)), "ZLPR takes sparse positives"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="unexpected option 'gamma'; known: margin"):
        bigclass.linear_elementwise_loss(X, W, y, loss="squared_hinge", gamma=1.0)
    with pytest.raises(TypeError, match="gamma: expected a number"):
        bigclass.linear_focal_loss(X, W, y, gamma="2")
    with pytest.raises(ValueError, match="taken"):
        bigclass.register_elementwise_loss(type("Other", (bigclass.ElementwiseLoss,), {"name": "bce"}))


@pytest.mark.parametrize("name", ["bce", "focal", "focal, gamma 0", "asymmetric", "squared hinge", "poly"])
@every_road
def test_classes_that_can_never_be_cost_nothing(name, road):
    """A bias of -inf: padded classes."""
    loss, options, term = CASES[name]
    x, w, b, positives = draw(9, 9000, 3, 4)
    positives = positives.clamp(max=8000)
    with torch.no_grad():
        b[8500:] = -torch.inf
    engine, gradients = road
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        got = bigclass.linear_elementwise_loss(x, w, positives, loss=loss, linear_bias=b, engine=engine, reduction="sum", **options)
        exact = term(x @ w[:8500].t() + b[:8500], hot(positives, 8500), 1.0, *options.values()).sum()
        grads, want = torch.autograd.grad(got, (x, w)), torch.autograd.grad(exact, (x, w))
    assert error(got, exact) < 1e-12 and error(grads[0], want[0]) < 1e-11 and error(grads[1], want[1]) < 1e-11


def test_the_in_place_terms_are_the_others_fp32_digits():
    s = torch.cat((torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, -torch.inf]))).view(1, -1)
    for name, (loss, options, _) in CASES.items():
        cls, numbers = LOSSES[loss].loss, [float(v) for v in {**LOSSES[loss].loss.options, **options}.values()]
        buffers = {}

        def work(i, buffers=buffers):
            return buffers.setdefault(i, torch.empty_like(s))

        exact = s.double().requires_grad_()
        value = cls.negative(exact, *numbers)
        (slope,) = torch.autograd.grad(value[value.isfinite()].sum(), exact)
        there = slope.isfinite()
        made = s.clone()
        in_place = cls.negative_in_place(made, work, *numbers)
        pairs = [cls.negative_with_slope(s, *numbers)] + ([] if in_place is None else [(in_place, made)])
        for a, b in pairs:
            assert error(a, value.detach()) < 2e-6, name
            assert error(b[there], slope[there]) < 2e-6, name


def test_a_negative_that_costs_nothing():
    @bigclass.register_elementwise_loss
    class Positives(bigclass.ElementwiseLoss):
        name, vanishes = "tests.positives", True

        @staticmethod
        def positive(s):
            return -s

        @staticmethod
        def negative(s):
            return torch.zeros_like(s)

    x, w, b, positives = draw(9, 9000, 3, 4)
    for engine in ("dense", "tiled"):
        got = bigclass.linear_elementwise_loss(x, w, positives, loss="tests.positives", linear_bias=b, engine=engine, reduction="sum")
        check(got, (x, w, b), -((x @ w.t() + b) * hot(positives, 9000)).sum())


def test_the_best_classes_of_no_rows():
    x, w, _, positives = draw(4, 9000, 3, 4)
    for engine in ("dense", "tiled"):
        for k in (1, 3):
            _, top = bigclass.linear_binary_cross_entropy(x[:0], w, positives[:0], return_topk=k, engine=engine, reduction="sum")
            assert top.values.shape == top.indices.shape == (0, k)

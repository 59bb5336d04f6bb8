"""Distillation from a streamed teacher and from its stored best classes: definitions in float64, the numeric contract, training loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigclass
from bigclass.core import Scale, Softcap, Stream, compare
from bigclass.core.divergences import DIVERGENCES
from bigclass.core.engines import tiles
from tests.support import KINDS, ROADS, draw, error, errors

KL, TOPK = bigclass.linear_kl_div, bigclass.linear_topk_kl_div
DIVERGED = (("forward", 0.5), ("reverse", 0.5), ("jensen_shannon", 0.5), ("jensen_shannon", 0.1))
every_road = pytest.mark.parametrize("road", ROADS, ids="-".join)
streamed = pytest.mark.parametrize("road", ROADS[1:], ids="-".join)
every_divergence = pytest.mark.parametrize("divergence", DIVERGED, ids=str)


def on(road, function, *args, **options):
    with bigclass.planning(gradients=road[1], workspace=1 << 20):
        return function(*args, engine=road[0], **options)


def dense(s: Tensor, t: Tensor, divergence, temperature: float = 1.0) -> Tensor:
    """The rows' divergences as they are written in PyTorch, from written-out logits."""
    (name, beta), log_q, log_p = divergence, (s / temperature).log_softmax(1), (t / temperature).log_softmax(1)

    def kl(log_a, log_b):
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(1)

    if name == "jensen_shannon":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        d = beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)
    else:
        d = kl(log_p, log_q) if name == "forward" else kl(log_q, log_p)
    return d * temperature**2


def reduced(d: Tensor, reduction: str, mask: Tensor | None) -> Tensor:
    if reduction == "none":
        return d if mask is None else torch.where(mask, d, 0.0)
    d = d if mask is None else d[mask]
    return d.sum() if reduction == "sum" else d.mean()


def layers(kind: str, n: int, c: int, d: int, e: int, dtype: torch.dtype, seed: int, agree: float = 0.0):
    """Student (x, w, b) and teacher (u, v, vb), both leaning to the same classes; agree: the teacher is the student, so much moved."""
    x, w, b, y = draw(kind, n, c, d, dtype, seed)
    if agree:
        noise = agree * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
        return x, w, b, (x.detach() + noise).to(dtype), w.detach().clone(), b.detach().clone()
    g = torch.Generator().manual_seed(seed + 1)
    v, u = torch.randn(c, e, generator=g) / math.sqrt(e), torch.randn(n, e, generator=g)
    if kind in ("peaked", "onehot"):
        lead = 3.0 + 3.0 * torch.randn(n, generator=g) if kind == "peaked" else 12.0 + 25.0 * torch.rand(n, generator=g)
        u += (math.log(c) + lead)[:, None] * F.normalize(v[y], dim=1) / v[y].norm(dim=1, keepdim=True)
    u = u * 0.03 if kind == "early" else u
    return x, w, b, u.to(dtype), v.to(dtype), (0.1 * torch.randn(c, generator=g)).to(dtype)


def double(tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


# --- values and gradients -----------------------------------------------------------------------------------------------------------


@every_road
@settings(max_examples=30)
@given(data=st.data())
def test_loss_and_gradients_are_those_of_the_definition(road, data):
    """Shapes, options, masks and frozen parts drawn together; the smallest workspace, so that chunks and tiles are many."""
    n, c = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([1, 2, 17, 300, 2501]))
    d, e = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    divergence, reduction = data.draw(st.sampled_from(DIVERGED)), data.draw(st.sampled_from(["none", "sum", "mean"]))
    temperature = data.draw(st.sampled_from([1.0, 0.5, 3.0]))
    caps = [data.draw(st.sampled_from([None, 2.5])) for _ in range(2)]
    scaled, biased, stored = (data.draw(st.booleans()) for _ in range(3))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x, w, b, u, v, vb = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((n, d), (c, d), (c,), (n, e), (c, e), (c,)))
    a, a_t = (torch.rand((), generator=g, dtype=torch.float64) + 0.5 for _ in range(2))
    needs = [data.draw(st.booleans()) for _ in range(4)]
    for t, need in zip((x, w, b, a), needs, strict=True):
        t.requires_grad_(need)
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(n, generator=g) < 0.7
        mask[0] = True
        with torch.no_grad():
            x[~mask], u[~mask] = torch.nan, torch.inf
    clean = [t if mask is None else torch.where(mask[:, None], t, 0.0) for t in (x, u)]

    def capped(z, cap):
        return z if cap is None else cap * torch.tanh(z / cap)

    s = capped((clean[0] @ w.t() + (b if biased else 0.0)) * (a if scaled else 1.0), caps[0])
    raw = clean[1] @ v.t() + (vb if biased else 0.0)
    want = reduced(dense(s, capped(raw * (a_t if scaled else 1.0), caps[1]), divergence, temperature), reduction, mask)
    options = {"divergence": divergence[0], "beta": divergence[1], "temperature": temperature, "reduction": reduction, "mask": mask}
    options |= {"softcap": caps[0], "teacher_softcap": caps[1]}
    options |= {"logit_scale": a, "teacher_logit_scale": a_t} if scaled else {}
    options |= {"linear_bias": b} if biased else {}
    if stored:
        held = raw if mask is None else torch.where(mask[:, None], raw, torch.nan)
        got = on(road, KL, x, w, held, **options)
    else:
        got = on(road, KL, x, w, u, v, **options, **({"teacher_bias": vb} if biased else {}))
    assert float((got - want).detach().norm()) <= 1e-12 * (1.0 + float(want.detach().norm()))
    leaves = [t for t, used in ((x, True), (w, True), (b, biased), (a, scaled)) if used and t.requires_grad]
    assert got.requires_grad == bool(leaves)
    if leaves:
        up = torch.randn(got.shape, generator=g, dtype=torch.float64)
        for z, t in zip(torch.autograd.grad(got, leaves, up), torch.autograd.grad(want, leaves, up), strict=True):
            assert float((z - t).norm()) <= 1e-10 * float(t.norm()) + 1e-13


@every_road
def test_any_leading_axes_and_a_loss_in_the_shape_of_the_rows(road):
    x, w, u, v = torch.randn(3, 4, 5), torch.randn(40, 5), torch.randn(3, 4, 7), torch.randn(40, 7)
    rows = on(road, KL, x, w, u, v, reduction="none")
    assert rows.shape == (3, 4)
    assert error(rows.flatten(), on(road, KL, x.view(12, 5), w, u.view(12, 7), v, reduction="none")) < 1e-6
    assert on(road, KL, x[0, 0], w, u[0, 0], v, reduction="none").shape == ()
    stored = on(road, KL, x, w, u @ v.t(), reduction="none", mask=torch.ones(3, 4, dtype=torch.bool))
    assert error(stored, rows) < 1e-5


def test_the_divergence_between_its_ends_approaches_both_kullback_leibler_divergences():
    """As GKD puts it: JSD(beta) / beta for beta near 0, JSD(beta) / (1 - beta) for beta near 1."""
    x, w, _, u, v, _ = (t.detach() for t in layers("flat", 20, 50, 6, 7, torch.float64, 0))
    for name, beta, share in (("forward", 1e-7, 1e-7), ("reverse", 1.0 - 1e-7, 1e-7)):
        got = KL(x, w, u, v, divergence="jensen_shannon", beta=beta, engine="tiled") / share
        assert error(got, KL(x, w, u, v, divergence=name)) < 1e-5


@streamed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pooled_over_30_draws_nothing_is_less_exact_than_dense(road, dtype, kind):
    for divergence in DIVERGED[:3]:
        pools = [[[], [], []] for _ in range(4)]
        for seed in range(30):
            x, w, b, u, v, vb = problem = layers(kind, 64, 500, 40, 24, dtype, seed, agree=0.02 if seed % 2 else 0.0)

            def made(rows, leaves):
                return [rows, *torch.autograd.grad(rows.mean(), leaves)]

            exact = double(problem)
            mine = on(road, KL, x, w, u, v, linear_bias=b, teacher_bias=vb, divergence=divergence[0], reduction="none")
            if road[1] == "forward":
                scalar = on(road, KL, x, w, u, v, linear_bias=b, teacher_bias=vb, divergence=divergence[0])
                mine = [mine, *torch.autograd.grad(scalar, (x, w, b))]
            else:
                mine = made(mine, (x, w, b))
            theirs = made(dense(F.linear(x, w, b), F.linear(u, v, vb), divergence), (x, w, b))
            truth = made(dense(F.linear(*exact[:3]), F.linear(*exact[3:]), divergence), exact[:3])
            for pool, *zs in zip(pools, mine, theirs, truth, strict=True):
                for column, z in zip(pool, zs, strict=True):
                    column.append(z.detach().double().flatten())
        for name, pool in zip(("loss", "dx", "dw", "db"), pools, strict=True):
            got, other, right = (torch.cat(column) for column in pool)
            if not bool(other.isfinite().all()):
                continue  # the dense form's fp16 sums overflowed
            mine, theirs = error(got, right), error(other, right)
            assert mine <= 1.1 * theirs, f"{divergence}, {name}: {mine:.2e} against dense {theirs:.2e}"


@streamed
@every_divergence
def test_confident_layers_that_nearly_agree_keep_their_digits(road, divergence):
    """Losses of 1e-4 to 1e-20, where the logits' own rounding moves a gradient by 1e-4: a log-softmax has nothing left there."""
    options = {"divergence": divergence[0], "beta": divergence[1]}
    for seed in range(4):
        x, w, b, u, v, vb = problem = layers("onehot", 64, 2900, 40, 40, torch.float32, seed, agree=0.02)
        wide = double(problem)
        # in float64 the tiled engine, for the dense form loses even that one's digits
        want = on(road, KL, wide[0], wide[1], wide[3], wide[4], linear_bias=wide[2], teacher_bias=wide[5], **options)
        got = on(road, KL, x, w, u, v, linear_bias=b, teacher_bias=vb, **options)
        assert error(got, want) < 2e-3
        assert max(errors(torch.autograd.grad(got, (x, w, b)), torch.autograd.grad(want, wide[:3]))) < 2e-3


@streamed
@every_divergence
@pytest.mark.parametrize("kinds", [("flat", "onehot"), ("onehot", "flat")], ids="-".join)
def test_one_that_is_certain_beside_one_that_is_not(road, divergence, kinds):
    """Sums of e^(s - m) near 1 and near C."""
    (x, w, *_), (u, v, *_) = (draw(kind, 16, 40000, 20, torch.float32, 0) for kind in kinds)
    wide = double((x, w, u, v))
    want = dense(wide[0] @ wide[1].t(), wide[2] @ wide[3].t(), divergence)
    got = on(road, KL, x, w, u, v, divergence=divergence[0], beta=divergence[1], reduction="none")
    assert error(got, want) < 1e-6
    assert max(errors(torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(want.sum(), wide[:2]))) < 3e-5


@streamed
@every_divergence
def test_a_student_that_is_its_teacher_has_a_loss_and_gradients_of_zero(road, divergence):
    x, w, b, _ = draw("peaked", 70, 900, 16, torch.float32, 0)
    for reduction in ("mean", "none"):
        loss = on(road, KL, x, w, x, w, linear_bias=b, teacher_bias=b, divergence=divergence[0], beta=divergence[1], reduction=reduction)
        assert float(loss.detach().abs().max()) == 0.0
        for g in torch.autograd.grad(loss.sum(), (x, w, b)):
            assert float(g.abs().max()) == 0.0


@every_road
@every_divergence
def test_classes_without_mass_are_left_out(road, divergence):
    """-inf in both is as if the class were not there; in the student alone it is infinitely far from the teacher."""
    (name, beta), inf = divergence, math.inf
    x, w, b, u, v, vb = layers("flat", 12, 700, 6, 5, torch.float64, 0)
    some = torch.arange(700) % 7 > 0
    gone = torch.where(some, 0.0, -inf).double()

    def run(*biases, reduction="sum"):
        return on(road, KL, x, w, u, v, linear_bias=biases[0], teacher_bias=biases[1], divergence=name, beta=beta, reduction=reduction)

    got = run(b.detach() + gone, vb + gone)
    want = dense(F.linear(x, w[some], b[some]), F.linear(u, v[some], vb[some]), divergence).sum()
    assert error(got, want) < 1e-12
    for z, t in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, (x, w)), strict=True):
        assert error(z, t) < 1e-11
    for biases, infinite in (((b.detach() + gone, vb), "forward"), ((b.detach(), vb + gone), "reverse")):
        rows = run(*biases, reduction="none")
        assert bool((rows == inf).all()) if name == infinite else bool(rows.isfinite().all())
        if name != infinite:  # torch's own gradient is NaN here
            assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(rows.sum(), (x, w)))
    nowhere = torch.full_like(vb, -inf)
    assert bool(run(nowhere, vb, reduction="none").isnan().all()) and bool(run(b, nowhere, reduction="none").isnan().all())


@every_road
@every_divergence
def test_a_nan_is_never_hidden(road, divergence):
    x, w, u, v = (torch.randn(s) for s in ((5, 3), (900, 3), (5, 4), (900, 4)))
    x[1, 0], u[3, 0] = torch.nan, torch.inf
    w.requires_grad_()
    loss = on(road, KL, x, w, u, v, divergence=divergence[0], beta=divergence[1], reduction="none")
    assert loss.isnan().tolist() == [False, True, False, True, False]
    assert bool(torch.autograd.grad(loss.sum(), w)[0].isnan().any())


# --- rows that do not count ---------------------------------------------------------------------------------------------------------


@every_road
@pytest.mark.parametrize("compact", [True, False], ids=["left out", "masked"])
@every_divergence
def test_ignored_rows_that_hold_nan_contribute_exactly_nothing(road, compact, divergence, monkeypatch):
    """Pitfall 48; masked is the road of GPUs, where leaving rows out would be a host sync."""
    monkeypatch.setattr(tiles.Rows, "COMPACT", ("cpu",) if compact else ())
    x, w, b, u, v, vb = layers("flat", 30, 900, 6, 5, torch.float32, 0)
    mask = torch.arange(30) % 3 > 0
    with torch.no_grad():
        x[0], u[3], x[6, 0] = torch.nan, torch.nan, torch.inf
    options = {"divergence": divergence[0], "beta": divergence[1], "linear_bias": b, "teacher_bias": vb}
    for reduction in ("mean", "none"):
        got = on(road, KL, x, w, u, v, mask=mask, reduction=reduction, **options)
        want = on(road, KL, x[mask], w, u[mask], v, reduction=reduction, **options)
        if reduction == "none":
            assert bool((got[~mask] == 0.0).all())
            got = got[mask]
        assert error(got, want) < 1e-5
        one, two = torch.autograd.grad(got.sum(), (x, w, b)), torch.autograd.grad(want.sum(), (x, w, b))
        assert bool((one[0][~mask] == 0.0).all())
        assert max(errors(one, two)) < 1e-5


@streamed
def test_a_masked_row_whose_own_divergence_would_be_infinite_contributes_nothing(road, monkeypatch):
    """Its features are zeros on a GPU, which gives a class mass that the rows that count do not give it."""
    monkeypatch.setattr(tiles.Rows, "COMPACT", ())
    x, w, bias = torch.ones(4, 1), torch.zeros(900, 1), torch.zeros(900)
    w[7], bias[7] = -1000.0, -math.inf
    mask = torch.tensor([True, False, True, True])
    for reduction in ("sum", "none"):
        leaf, mine = w.clone().requires_grad_(), x.clone().requires_grad_()
        loss = on(road, KL, mine, leaf, x, w, teacher_bias=bias, divergence="reverse", mask=mask, reduction=reduction)
        assert bool(loss.isfinite().all())
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss.sum(), (leaf, mine)))


@every_road
def test_no_row_that_counts_gives_a_mean_of_nan_and_no_gradient(road):
    """Pitfall 8; the mean is that of linear_cross_entropy."""
    x, w, u, v = torch.randn(4, 3, requires_grad=True), torch.randn(90, 3, requires_grad=True), torch.randn(4, 2), torch.randn(90, 2)
    none = torch.zeros(4, dtype=torch.bool)
    index = torch.zeros(4, 2, dtype=torch.long)
    for reduction in ("mean", "sum", "none"):
        for loss in (
            on(road, KL, x, w, u, v, mask=none, reduction=reduction),
            on(road, TOPK, x, w, index, torch.full((4, 2), -1.0), mask=none, reduction=reduction),
        ):
            assert bool(loss.isnan()) if reduction == "mean" else bool((loss == 0.0).all())
            assert all(bool((g == 0.0).all()) for g in torch.autograd.grad(loss.sum(), (x, w)))
    empty = on(road, KL, x[:0], w, u[:0], v, reduction="sum")
    assert float(empty) == 0.0 and bool((torch.autograd.grad(empty, w)[0] == 0.0).all())


# --- in training loops --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["forward", "recompute"])
def step(request):
    """x, w, a streamed loss and the exact gradients of its mean."""
    x, w, _, u, v, _ = layers("peaked", 30, 2000, 12, 9, torch.float32, 1)
    wide = double((x, w, u, v))
    truth = torch.autograd.grad(dense(wide[0] @ wide[1].t(), wide[2] @ wide[3].t(), ("reverse", 0.5)).mean(), wide[:2])

    def loss(x=x, w=w, **options):
        return KL(x, w, u, v, divergence="reverse", engine="tiled", **options)

    with bigclass.planning(gradients=request.param, workspace=1 << 20):
        yield x, w, loss, truth
    torch._dynamo.reset()


def test_upstream_factors_second_backwards_and_sums_of_losses(step):
    """Pitfalls 20, 21 and 46."""
    x, w, loss, truth = step
    value = loss()
    value.backward(torch.tensor(0.25), retain_graph=True)
    first = w.grad.clone()
    value.backward(torch.tensor(-3.0), retain_graph=True)
    (value + loss(reduction="none").mean() * 2.0).backward()
    assert error(first, 0.25 * truth[1]) < 1e-5
    assert error(w.grad, 0.25 * truth[1]) < 1e-5 and error(x.grad, 0.25 * truth[0]) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_under_torch_compile(step, reduction):
    x, w, loss, truth = step
    compiled = torch.compile(lambda x, w: loss(x, w, reduction=reduction).mean() * 0.5, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert max(errors(torch.autograd.grad(compiled(x, w), (x, w)), [0.5 * t for t in truth])) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_the_tiled_engine_cannot_differentiate_raises(step, reduction):
    """Pitfall 47."""
    x, w, loss, _ = step
    for attempt in (
        lambda: torch.autograd.grad(loss(reduction=reduction).sum(), x, create_graph=True),
        lambda: torch.func.grad(lambda t: loss(t, w, reduction=reduction).sum())(x),
        lambda: torch.func.vmap(lambda t: loss(x * t, w, reduction=reduction))(torch.ones(2)),
    ):
        with pytest.raises(RuntimeError, match="engine='dense'"):
            attempt()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode AD"):
        loss(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()), w, reduction=reduction)


@every_divergence
def test_the_dense_engine_differentiates_twice(divergence):
    x, w, u, v = (torch.randn(s, dtype=torch.float64) for s in ((4, 3), (9, 3), (4, 2), (9, 2)))
    leaves = [x.requires_grad_(), w.requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda x, w: KL(x, w, u, v, divergence=divergence[0], beta=divergence[1], engine="dense"), leaves)


def test_the_teacher_is_a_constant():
    x, w, u, v = (torch.randn(s, requires_grad=True) for s in ((4, 3), (900, 3), (4, 2), (900, 2)))
    for engine in ("dense", "tiled"):
        loss = KL(x, w, u, v, engine=engine)
        assert torch.autograd.grad(loss, (u, v), allow_unused=True, retain_graph=True) == (None, None)
        assert not KL(x.detach(), w.detach(), u, v, engine=engine).requires_grad


@pytest.mark.parametrize(("name", "numbers", "keep"), [("forward", (), None), ("jensen_shannon", (0.3,), torch.arange(9) % 3 > 0)])
def test_the_custom_ops_pass_opcheck(name, numbers, keep):
    x, w, b, u, v = (torch.randn(s) for s in ((9, 5), (80, 5), (80,), (9, 3), (80, 3)))
    student = Stream(((x.requires_grad_(), w.requires_grad_()),), bias=b.requires_grad_(), maps=(Softcap.at(3.0),))
    tensors, described, needs = compare.packed_pair(student, Stream(((u, v),)), DIVERGENCES[name](numbers), "tiled", "auto")
    torch.library.opcheck(compare.rows_op, (*tensors, keep, *described, needs))
    torch.library.opcheck(compare.sum_op, (*tensors, keep, torch.rand(9, dtype=torch.float64), *described, needs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_never_rounds_logits(dtype):
    x, w, b, u, v, vb = problem = layers("peaked", 64, 900, 24, 16, torch.float32, 3)
    wide = double(problem)
    truth = dense(F.linear(*wide[:3]), F.linear(*wide[3:]), DIVERGED[0]).mean()
    for engine in ("dense", "tiled"):
        with torch.autocast("cpu", dtype):
            loss = KL(x, w, u, v, linear_bias=b, teacher_bias=vb, engine=engine)
        got = torch.autograd.grad(loss, (x, w, b))
        assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in got)
        assert error(loss, truth) < 1e-5
        assert max(errors(got, torch.autograd.grad(truth, wide[:3], retain_graph=True))) < 1e-5


@pytest.mark.parametrize("road", ROADS, ids="-".join)
@pytest.mark.parametrize(
    "types", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float16)], ids=str
)
def test_student_and_teacher_may_differ_in_dtype(road, types):
    x, w = torch.randn(20, 6).to(types[0]).requires_grad_(), torch.randn(900, 6).to(types[0]).requires_grad_()
    u, v = torch.randn(20, 4).to(types[1]), torch.randn(900, 4).to(types[1])
    wide = double((x, w, u, v))
    want = dense(wide[0] @ wide[1].t(), wide[2] @ wide[3].t(), DIVERGED[1]).mean()
    got = on(road, KL, x, w, u, v, divergence="reverse")
    assert got.dtype == (torch.float64 if types[0] == torch.float64 else torch.float32) and error(got, want) < 1e-5
    for g, t in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, wide[:2]), strict=True):
        assert g.dtype == types[0] and error(g, t) < (4e-3 if types[0] == torch.bfloat16 else 1e-5)


def test_the_same_inputs_give_the_same_bits():
    x, w, b, u, v, _ = layers("peaked", 100, 3000, 16, 12, torch.float32, 0)
    for road in ROADS[1:]:
        runs = []
        for _ in range(2):
            loss = on(road, KL, x, w, u, v, linear_bias=b, divergence="jensen_shannon")
            runs.append([loss, *torch.autograd.grad(loss, (x, w, b))])
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_streams_of_several_pairs_and_maps_are_compared_too():
    """A LoRA head against a stored teacher, with maps that keep their inputs."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((20, 5), (900, 5), (20, 2), (900, 2))]
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    given = torch.randn(20, 900, generator=g)
    x, w, z, r = tensors
    s = torch.tanh((x @ w.t() + z @ r.t()) / 3.0) * 3.0 * a
    want = dense(s, given.double() * 0.5, ("reverse", 0.5))
    student = Stream(((x, w), (z, r)), maps=(Softcap.at(3.0), Scale.by(a)))
    with bigclass.planning(workspace=1 << 20):
        rows = compare.compare_rows(student, Stream(given=given, scale=0.5), DIVERGENCES["reverse"](), engine="tiled")
        total = compare.compare_sum(student, Stream(given=given, scale=0.5), DIVERGENCES["reverse"](), torch.ones(20), engine="tiled")
    right = torch.autograd.grad(want.sum(), (*tensors, a))
    assert error(rows, want) < 1e-12 and error(total, want.sum()) < 1e-12
    for loss in (rows.sum(), total):
        assert max(errors(torch.autograd.grad(loss, (*tensors, a)), right)) < 1e-11


@every_road
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_may_have_run_in_inference_mode(road, stored, reduction):
    x, w, _, u, v, _ = layers("flat", 40, 600, 5, 4, torch.float32, 0)
    with torch.inference_mode():
        fast = (u @ v.t())[::2] if stored else u.clone()[::2], None if stored else v.clone(), torch.arange(20) % 3 > 0
    plain = tuple([None if t is None else t.clone() for t in fast])
    losses = [on(road, KL, x[::2], w, *of, mask=mask, reduction=reduction).sum() for *of, mask in (fast, plain)]
    assert torch.equal(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, (x, w)) for loss in losses), strict=True):
        assert torch.equal(a, b) and float(a.norm()) > 0


@streamed
@pytest.mark.parametrize("kept", [False, True])
def test_a_learnt_scale_beside_biases_of_minus_infinity_gets_a_gradient(road, kept):
    """An empty batch has the gradient 0, and classes that are masked out have no part in that of any."""
    x, w, b, u, v, _ = layers("flat", 40, 600, 5, 4, torch.float64, 0)
    b = b.detach().masked_fill(torch.arange(600) % 3 > 0, -math.inf)
    s, mask = torch.tensor(1.3, dtype=torch.float64, requires_grad=True), torch.full((40,), kept)
    got = on(road, KL, x, w, u, v, linear_bias=b, teacher_bias=b, logit_scale=s, mask=mask, reduction="sum")
    want = on(road, KL, x, w[::3], u, v[::3], linear_bias=b[::3], teacher_bias=b[::3], logit_scale=s, mask=mask, reduction="sum")
    (slope,), (exact,) = torch.autograd.grad(got, s), torch.autograd.grad(want, s)
    assert torch.allclose(slope, exact, rtol=1e-10, atol=0) and bool(slope != 0) == kept


# --- a teacher's stored best classes ------------------------------------------------------------------------------------------------


def written_out(s: Tensor, index: Tensor, log_p: Tensor, rest: str, temperature: float) -> Tensor:
    """The formulas of `linear_topk_kl_div`, class by class."""
    p = torch.zeros_like(s).scatter_add_(1, index.clamp_min(0), log_p.exp().masked_fill(index < 0, 0.0))
    log_q = (s / temperature).log_softmax(1)
    if rest == "renormalize":
        p = p / p.sum(1, keepdim=True)
    rows = (torch.xlogy(p, p) - p * log_q).sum(1)
    if rest == "tail":
        others = torch.where(p > 0, 0.0, log_q.exp()).sum(1)
        tail = 1.0 - p.sum(1)
        rows = rows + torch.where(tail > 1e-14, tail * (tail / others).log(), 0.0)
    return rows * temperature**2


@every_road
@settings(max_examples=20)
@given(data=st.data())
def test_stored_classes_give_the_loss_of_their_formula(road, data):
    n, c = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([3, 40, 1500]))
    d, k = data.draw(st.integers(1, 8)), data.draw(st.integers(1, min(c - 1, 12)))
    rest, reduction = data.draw(st.sampled_from(["tail", "renormalize"])), data.draw(st.sampled_from(["none", "sum", "mean"]))
    temperature, biased, masked = data.draw(st.sampled_from([1.0, 2.0])), data.draw(st.booleans()), data.draw(st.booleans())
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((n, d), (c, d), (c,)))
    t = torch.randn(n, c, generator=g, dtype=torch.float64).log_softmax(1)
    log_p, index = t.topk(k, 1)
    if data.draw(st.booleans()) and k > 2:  # a class that stands twice, and none
        index[:, 1], index[:, 2] = index[:, 0], -1
    mask = (torch.rand(n, generator=g) < 0.7) | (torch.arange(n) == 0) if masked else None
    want = reduced(written_out(x @ w.t() + (b if biased else 0.0), index, log_p, rest, temperature), reduction, mask)
    if mask is not None:
        index, log_p = index.masked_fill(~mask[:, None], -7), log_p.masked_fill(~mask[:, None], torch.nan)
    moved = log_p + 3.0 if rest == "renormalize" else log_p
    options = {"linear_bias": b} if biased else {}
    got = on(road, TOPK, x, w, index, moved, rest=rest, temperature=temperature, reduction=reduction, mask=mask, **options)
    assert float((got - want).detach().norm()) <= 1e-11 * (1.0 + float(want.detach().norm()))
    leaves = [x, w, b] if biased else [x, w]
    up = torch.randn(got.shape, generator=g, dtype=torch.float64)
    for z, e in zip(torch.autograd.grad(got, leaves, up), torch.autograd.grad(want, leaves, up), strict=True):
        assert float((z - e).norm()) <= 1e-10 * float(e.norm()) + 1e-13


@every_road
@pytest.mark.parametrize("rest", ["tail", "renormalize"])
def test_all_classes_stored_are_the_whole_divergence(road, rest):
    x, w, _, u, v, _ = layers("flat", 10, 30, 5, 4, torch.float64, 0)
    log_p = (u @ v.t() / 2.0).log_softmax(1)
    index = torch.arange(30).expand(10, 30)
    got = on(road, TOPK, x, w, index, log_p, rest=rest, temperature=2.0)
    want = on(road, KL, x, w, u, v, temperature=2.0)
    assert error(got, want) < 1e-12
    assert max(errors(torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, (x, w)))) < 1e-11


@every_road
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("rest", ["tail", "renormalize"])
def test_a_teacher_s_nan_and_nothing_to_renormalise_are_nan_and_not_0(road, rest, reduction):
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    index, log_p = torch.arange(10).view(5, 2), torch.full((5, 2), -1.5)
    log_p[1, 0], log_p[2] = torch.nan, -math.inf  # a NaN; classes without any mass
    index[3] = -1
    wrong = torch.tensor([False, True, rest == "renormalize", rest == "renormalize", False])
    got = on(road, TOPK, x, w, index, log_p, rest=rest, reduction=reduction)
    assert torch.equal(got.isnan(), wrong if reduction == "none" else wrong.any())
    kept = on(road, TOPK, x, w, index, log_p, rest=rest, reduction=reduction, mask=~wrong)
    assert not kept.isnan().any() and all(torch.isfinite(z).all() for z in torch.autograd.grad(kept.sum(), (x, w)))


@streamed
def test_the_student_s_tail_does_not_cancel(road):
    """1 - Q of 1e-9, which fp32 cannot hold beside 1."""
    x, w = (
        torch.tensor([[1.0, 0.0]], requires_grad=True),
        torch.cat((torch.tensor([[27.0, 0.0]]), torch.randn(900, 2) * 0.01)).requires_grad_(),
    )
    index, log_p = torch.zeros(1, 1, dtype=torch.long), torch.log1p(torch.tensor([[-(2.0**-20)]]))
    got = on(road, TOPK, x, w, index, log_p)
    wide = double((x, w))
    want = on(road, TOPK, *wide, index, log_p.double())
    assert error(got, want) < 1e-5
    assert max(errors(torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, wide))) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_stored_classes_compile_to_one_graph(reduction):
    x, w, index = torch.randn(12, 5, requires_grad=True), torch.randn(2000, 5, requires_grad=True), torch.randint(2000, (12, 4))
    log_p, mask = torch.full((12, 4), -2.0), torch.arange(12) % 4 > 0

    def run(x, w):
        return TOPK(x, w, index, log_p, mask=mask, reduction=reduction, engine="tiled").sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, w)
    plain = run(x, w)
    assert error(compiled, plain) < 1e-6
    assert max(errors(torch.autograd.grad(compiled, (x, w)), torch.autograd.grad(plain, (x, w)))) < 1e-6
    torch._dynamo.reset()


# --- bad input ----------------------------------------------------------------------------------------------------------------------

X, W, U, V = torch.randn(6, 5), torch.randn(11, 5), torch.randn(6, 4), torch.randn(11, 4)
VALUE, TYPE = (ValueError, RuntimeError), (TypeError, RuntimeError)
INDEX, LOG_P = torch.arange(12).view(6, 2) % 11, torch.full((6, 2), -1.0)
META = torch.device("meta")

SHARED = {
    "input int": (TYPE, "input: expected a floating-point", {"input": X.long()}),
    "features differ": (VALUE, "linear_weight: expected 5 features", {"linear_weight": W[:, :4]}),
    "bias": (VALUE, r"linear_bias: expected shape \(11,\)", {"linear_bias": torch.zeros(12)}),
    "reduction": (VALUE, "reduction: expected one of .* got 'batchmean'", {"reduction": "batchmean"}),
    "temperature": (VALUE, "temperature: expected .* greater than 0, got 0.0", {"temperature": 0.0}),
    "mask int": (TYPE, "mask: expected a bool tensor, got torch.int64", {"mask": torch.ones(6).long()}),
    "mask shape": (VALUE, r"mask: expected shape \(6,\), got \(5,\)", {"mask": torch.ones(5, dtype=torch.bool)}),
    "mask elsewhere": (VALUE, "mask: expected device cpu", {"mask": torch.ones(6, dtype=torch.bool, device=META)}),
    "softcap": (VALUE, "softcap must be finite", {"softcap": -1.0}),
    "scale": (VALUE, "logit_scale: expected", {"logit_scale": torch.ones(2)}),
    "engine": (VALUE, "engine: expected one of", {"engine": "fast"}),
}
OF_TEACHER = {
    "a list": (TYPE, "teacher_input: expected a tensor, got list", {"teacher_input": [1.0]}),
    "leading axes": (VALUE, r"teacher_input: expected leading axes \(6,\)", {"teacher_input": U[1:]}),
    "elsewhere": (VALUE, "teacher_input: expected device cpu", {"teacher_input": U.to(META)}),
    "features": (VALUE, "teacher_weight: expected 4 features in its last axis .as teacher_input", {"teacher_weight": W}),
    "classes": (VALUE, "teacher_weight: expected 11 classes .as linear_weight., got 10", {"teacher_weight": V[1:]}),
    "weight int": (TYPE, "teacher_weight: expected a floating-point tensor", {"teacher_weight": V.int()}),
    "bias": (VALUE, r"teacher_bias: expected shape \(11,\), got \(12,\)", {"teacher_bias": torch.zeros(12)}),
    "bias of stored": (VALUE, "teacher_bias: belongs to a teacher_weight", {"teacher_weight": None, "teacher_bias": torch.zeros(11)}),
    "stored int": (TYPE, "teacher_input: expected a floating-point", {"teacher_input": U.long(), "teacher_weight": None}),
    "stored classes": (VALUE, "teacher_input: expected logits of 11 classes", {"teacher_weight": None}),
    "softcap": (VALUE, "teacher_softcap: expected", {"teacher_softcap": 0.0}),
    "scale": (VALUE, "teacher_logit_scale: expected", {"teacher_logit_scale": torch.ones(3)}),
    "divergence": (VALUE, "divergence: expected one of .* got 'kl'", {"divergence": "kl"}),
    "beta alone": (VALUE, "beta: belongs to divergence='jensen_shannon'", {"beta": 0.3}),
    "beta": (VALUE, "beta: expected 0 < beta < 1 .* got 1.0", {"beta": 1.0, "divergence": "jensen_shannon"}),
    "fused": (VALUE, "engine: 'fused' cannot run this, for a loss of two streams has no Triton form", {"engine": "fused"}),
}
OF_STORED = {
    "index float": (TYPE, "teacher_index: expected int64 or int32", {"teacher_index": INDEX.float()}),
    "index shape": (VALUE, r"teacher_index: expected shape \(6, 'K'\)", {"teacher_index": INDEX[:, 0]}),
    "log-probabilities int": (TYPE, "teacher_log_prob: expected a floating-point", {"teacher_log_prob": LOG_P.long()}),
    "log-probabilities shape": (VALUE, "teacher_log_prob: expected the shape of teacher_index", {"teacher_log_prob": LOG_P[:, :1]}),
    "log-probabilities elsewhere": (VALUE, "teacher_log_prob: expected device cpu", {"teacher_log_prob": LOG_P.to(META)}),
    "logits": (VALUE, "teacher_log_prob: expected log-probabilities, .* got 14", {"teacher_log_prob": LOG_P + 3.0}),
    "rest": (VALUE, "rest: expected one of .* got 'drop'", {"rest": "drop"}),
    "class too large": (
        (IndexError,),
        r"teacher_index: expected class indices in \[0, 11\), got 11",
        {"teacher_index": INDEX.clamp_min(11)},
    ),
    "class negative": (
        (IndexError,),
        r"teacher_index: expected class indices in \[0, 11\), got -2",
        {"teacher_index": INDEX.clamp_max(-2)},
    ),
}


@pytest.mark.parametrize("case", [*SHARED.values(), *OF_TEACHER.values()], ids=[*SHARED, *(f"teacher {name}" for name in OF_TEACHER)])
def test_bad_input_is_refused_by_name(case):
    types, message, given = case
    with pytest.raises(types[0], match=f"^{message}") as caught:
        KL(**({"input": X, "linear_weight": W, "teacher_input": U, "teacher_weight": V} | given))
    assert all(isinstance(caught.value, kind) for kind in types)


@pytest.mark.parametrize("case", [*SHARED.values(), *OF_STORED.values()], ids=[*SHARED, *OF_STORED])
def test_bad_stored_classes_are_refused_by_name(case):
    types, message, given = case
    with pytest.raises(types[0], match=f"^{message}") as caught:
        TOPK(**({"input": X, "linear_weight": W, "teacher_index": INDEX, "teacher_log_prob": LOG_P} | given))
    assert all(isinstance(caught.value, kind) for kind in types)


def test_streams_that_do_not_fit_are_refused():
    student, kind = Stream(((X, W),)), DIVERGENCES["forward"]()
    with pytest.raises(ValueError, match=r"teacher: expected \(6, 11\) rows and classes"):
        compare.compare_rows(student, Stream(((U[1:], V),)), kind)
    with pytest.raises(ValueError, match=r"teacher: expected device cpu"):
        compare.compare_rows(student, Stream(((U.to(META), V.to(META)),)), kind)
    with pytest.raises(ValueError, match=r"g: expected shape \(6,\)"):
        compare.compare_sum(student, Stream(((U, V),)), kind, torch.ones(5))

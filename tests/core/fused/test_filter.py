"""The certified filter on the fused engine. With w = 1 (C = D) dx is dL/dz itself, so that what was dropped can be seen: zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigclass
from bigclass.core import LogSumExp, Softcap, Stream, Total, log_sum_exp, problem, reduce_logits
from bigclass.core.engines import filter as chooser
from bigclass.core.engines.support import filter_reason
from bigclass.core.engines.tail import Tail
from bigclass.core.engines.tiles import Pool, Span, spans
from tests.filter_support import no_tail
from tests.losses.test_lora import adapters, leaves
from tests.support import error, exact_nll

filtered = pytest.importorskip("bigclass.core.engines.fused.filtered", reason="Triton is not installed")
Problem = pytest.importorskip("bigclass.core.engines.fused.problem").Problem

tail_of = Tail.of
BAND, CLASSES, CHUNK = 17, 48, 30  # rows of a block at most; classes of a slab; rows of a chunk where gradients come with the loss
TILE = 64  # classes of a slab whose logits are saved: whole tiles
BACK = -12.0  # added to the logits of one-vs-all losses: sigmoids near 1 would be spread evenly
TOLERANCES = {torch.float32: (-10, -8, -6, -4), torch.float16: (-10, -6), torch.bfloat16: (-8, -4)}  # as powers of 2
LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # of a product of 16-bit numbers: their rounding


@pytest.fixture(autouse=True)
def many_small_blocks(monkeypatch):
    """Several blocks of rows, slabs of classes and chunks of rows; columns are chosen as on a GPU, without the host's looking."""
    make = problem.make_plan

    def small(*args):
        plan = make(*args)
        classes = TILE if plan.saved else CLASSES
        return replace(
            plan, class_block=min(plan.class_block, classes), saved_block=min(plan.saved_block, classes), chunk=min(plan.chunk, CHUNK)
        )

    monkeypatch.setattr(problem, "make_plan", small)
    monkeypatch.setattr(filtered, "FILTER_BAND", BAND)
    monkeypatch.setattr(chooser, "_kept_on_cpu", chooser._kept)
    monkeypatch.setattr(Tail, "of", classmethod(no_tail))


@pytest.fixture
def tails(monkeypatch, many_small_blocks):
    """What is dropped comes back as outer products, as ever."""
    monkeypatch.setattr(Tail, "of", tail_of)


def uneven(n: int, c: int, d: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (N, D), w (C, D), whose classes differ by e^8 in the gradients they get; d None: w = 1, and x are the logits."""
    g = torch.Generator().manual_seed(seed)
    common = 3.0 * torch.randn(c, generator=g)
    if d is None:
        x, w = common + torch.randn(n, c, generator=g), torch.eye(c)
    else:
        x, w = torch.randn(n, d, generator=g), torch.randn(c, d, generator=g) / d**0.5
        x[:, 0], w[:, 0] = 1.0, common
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()


@dataclass
class Case:
    """A loss by one form of its gradient: of the library, and exact in float64 from logits. picks: (N, K), -1 for none."""

    gradients: str
    chunk: int
    loss: Callable[..., Tensor]
    exact: Callable[[Tensor], Tensor]
    picks: Tensor


def softmax_case(gradients: str, n: int, c: int, rows: Tensor | None) -> Case:
    """Cross-entropy with a z-loss; with row factors they reach a loss of each row."""
    y = torch.randint(c, (n,), generator=torch.Generator().manual_seed(3))
    y[1] = -100

    def loss(x: Tensor, w: Tensor, tolerance: float | None, **options) -> Tensor:
        reduction = "sum" if rows is None else "none"
        made = bigclass.linear_cross_entropy(x, w, y, z_loss=0.01, reduction=reduction, grad_filter=tolerance, engine="fused", **options)
        return made if rows is None else (made * rows).sum()

    def exact(z: Tensor) -> Tensor:
        factor = torch.ones(n) if rows is None else rows
        return ((F.cross_entropy(z, y, reduction="none") + 0.01 * z.logsumexp(1).square()) * factor)[y >= 0].sum()

    return Case(gradients, CHUNK if gradients == "forward" else n, loss, exact, y.clamp(min=-1)[:, None])


def binary_case(n: int, c: int) -> Case:
    picks = torch.randint(-1, c // 4, (n, 3), generator=torch.Generator().manual_seed(3))
    picks[:, 2] = picks[:, 1]  # of equal picks one counts

    def loss(x: Tensor, w: Tensor, tolerance: float | None, **options) -> Tensor:
        options = options or {"linear_bias": torch.full((c,), BACK)}
        return bigclass.linear_binary_cross_entropy(x, w, picks, reduction="sum", grad_filter=tolerance, engine="fused", **options)

    def exact(z: Tensor) -> Tensor:
        target = torch.zeros(n, c + 1).scatter_(1, picks % (c + 1), 1.0)[:, :c].to(z.dtype)
        return F.binary_cross_entropy_with_logits(z + BACK, target, reduction="sum")

    return Case("forward", n, loss, exact, picks)


def case_of(form: str, n: int, c: int) -> Case:
    if form == "slab_loss":
        return binary_case(n, c)
    if form == "stream_loss":
        return softmax_case("forward", n, c, None)
    return softmax_case("recompute", n, c, torch.linspace(0.2, 3.0, n))


def gradient(case: Case, x: Tensor, w: Tensor, tolerance: float | None, wanted: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    with bigclass.planning(gradients=case.gradients):
        return torch.autograd.grad(case.loss(x, w, tolerance, **options), wanted)


def blocks(n: int, chunk: int) -> list[Span]:
    """Rows of each block of the filter."""
    return [Span(r.start + b.start, r.start + b.stop) for r in spans(n, chunk) for b in filtered.bands(r.size)]


def dropped(got: Tensor, exact: Tensor, picks: Tensor, tolerance: float, chunk: int, dtype: torch.dtype) -> float:
    """Check the promise for each block of rows; the share of columns that were dropped."""
    at_picks = torch.zeros(exact.shape[0], exact.shape[1] + 1, dtype=torch.bool).scatter_(1, picks % (exact.shape[1] + 1), True)[:, :-1]
    assert torch.equal(got.isfinite(), torch.ones_like(at_picks))
    count = 0
    for r in blocks(len(exact), chunk):
        g, want, chosen = (t[r.start : r.stop] for t in (got.double(), exact, at_picks))
        gone = (g == 0.0).all(0)
        assert not (gone & chosen.any(0)).any()
        assert error(g[:, ~gone], want[:, ~gone]) < LIMIT[dtype]
        rest = want.masked_fill(chosen, 0.0)
        assert rest[:, gone].norm() <= tolerance * rest.norm()
        count += int(gone.sum())
    return count / (len(blocks(len(exact), chunk)) * exact.shape[1])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", ["stream_loss", "reduce_backward", "slab_loss"])
def test_what_is_dropped_of_each_block_is_within_the_tolerance(form, dtype):
    n, c = 33, 85
    case = case_of(form, n, c)
    x, w = uneven(n, c, dtype=dtype)
    with torch.no_grad():
        x[1] = torch.nan if form != "slab_loss" else 0.0  # an ignored row
    logits = x.detach().double().nan_to_num(0.0).requires_grad_()
    (exact,) = torch.autograd.grad(case.exact(logits), logits)
    shares = []
    for power in TOLERANCES[dtype]:
        (got,) = gradient(case, x, w, 2.0**power, (x,))
        shares.append(dropped(got, exact, case.picks, 2.0**power, case.chunk, dtype))
    assert shares == sorted(shares) and shares[-1] > 0.3 and shares[0] > 0.1


@pytest.mark.parametrize("form", ["stream_loss", "reduce_backward", "slab_loss"])
def test_the_bias_keeps_its_exact_gradient_and_two_runs_give_the_same_bits(form):
    n, c = 40, 100
    case = case_of(form, n, c)
    (x, w), b = uneven(n, c, 12), torch.full((c,), BACK, requires_grad=True)
    exact = gradient(case, x, w, None, (x, w, b), linear_bias=b)
    once, again = (gradient(case, x, w, 2.0**-5, (x, w, b), linear_bias=b) for _ in range(2))
    assert all(torch.equal(a, t) for a, t in zip(once, again, strict=True))
    assert torch.equal(once[2], exact[2])
    assert 1e-6 < error(once[0], exact[0]) < 0.1 and 1e-6 < error(once[1], exact[1]) < 0.1


@pytest.mark.parametrize("form", ["stream_loss", "reduce_backward", "slab_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_products_are_those_of_the_kept_columns(form, dtype, monkeypatch):
    """Against float64, with either operand frozen, too. An odd number of rows, of classes, of features."""
    n, c = 35, 99
    case, slabs = case_of(form, n, c), []
    x, w = uneven(n, c, 21, dtype)
    multiply = filtered.multiply

    def noted(g, kept, *rest):
        whole = g.double()
        for b, r in enumerate(filtered.bands(len(g))):
            whole[r.start : r.stop, kept.columns[b, kept.counts[b] : g.shape[1]].long()] = 0.0
        slabs.append(whole)
        multiply(g, kept, *rest)

    monkeypatch.setattr(filtered, "multiply", noted)
    dx, dw = gradient(case, x, w, 2.0**-5, (x, w))
    per_chunk = -(-c // CLASSES)
    masked = torch.cat([torch.cat(slabs[i : i + per_chunk], 1) for i in range(0, len(slabs), per_chunk)])
    assert masked.shape == (n, c) and float((masked == 0.0).double().mean()) > 0.2
    limit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]  # gradients are cast once
    assert error(dx, masked @ w.double()) < limit and error(dw, masked.t() @ x.double()) < limit
    assert torch.equal(gradient(case, x, w.detach(), 2.0**-5, (x,))[0], dx)
    assert torch.equal(gradient(case, x.detach(), w, 2.0**-5, (w,))[0], dw)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", ["stream_loss", "reduce_backward", "slab_loss"])
def test_what_was_dropped_comes_back_as_outer_products(form, dtype, tails):
    """Each block is off by less than the tolerance (and its numbers' rounding), each row's sum is right, dw has the same tail."""
    n, c = 33, 85
    case = case_of(form, n, c)
    x, w = uneven(n, c, dtype=dtype)
    with torch.no_grad():
        x[1] = torch.nan if form != "slab_loss" else 0.0  # an ignored row
    logits = x.detach().double().nan_to_num(0.0).requires_grad_()
    (exact,) = torch.autograd.grad(case.exact(logits), logits)
    rest = exact.scatter(1, picks, 0.0) if (picks := case.picks.clamp_min(0)).numel() else exact
    for power in TOLERANCES[dtype]:
        got, dw = gradient(case, x, w, 2.0**power, (x, w))
        for r in blocks(n, case.chunk):
            off = (got.double() - exact)[r.start : r.stop]
            assert off.norm() <= 2.0**power * rest[r.start : r.stop].norm() + LIMIT[dtype] * exact[r.start : r.stop].norm()
        assert error(got.double().sum(1), exact.sum(1)) < 4 * LIMIT[dtype] * float(exact.abs().sum(1).norm() / exact.sum(1).norm())
        assert error(dw, got.double().t() @ x.detach().double().nan_to_num(0.0)) < 2 * LIMIT[dtype]
    assert error(got, exact) > 1e-3  # something was dropped


def test_a_row_that_is_not_finite_keeps_its_block_and_harms_no_other(tails):
    x, w = uneven(34, 100, 12)
    with torch.no_grad():
        x[3] = torch.nan
    y = torch.arange(34)
    exact, got = [torch.autograd.grad(bigclass.linear_cross_entropy(x, w, y, grad_filter=f, engine="fused"), x)[0] for f in (None, 2.0**-5)]
    assert torch.equal(got.isnan(), exact.isnan()) and error(got[17:], exact[17:]) < 0.1


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
def test_where_the_gradient_is_spread_evenly_nothing_is_dropped(gradients):
    case = softmax_case(gradients, 40, 100, None)
    x = (0.1 * torch.randn(40, 100, generator=torch.Generator().manual_seed(0))).requires_grad_()
    w = torch.eye(100)
    logits = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(case.exact(logits), logits)
    (got,) = gradient(case, x, w, 2.0**-4, (x,))
    assert error(got, exact) < 1e-6 and int((got == 0.0).sum()) == 100  # of the ignored row


def test_adapters_are_two_pairs_of_which_each_has_its_products():
    n, c = 37, 90
    (x, w), lora = uneven(n, c, 16), adapters(c, 16, (3,), torch.float32)
    y = torch.randint(c, (n,), generator=torch.Generator().manual_seed(1))
    made = []
    for tolerance in (None, 2.0**-9, 2.0**-5):
        loss = bigclass.linear_cross_entropy(x, w, y, lora=lora, reduction="none", grad_filter=tolerance, engine="fused").sum()
        made.append(torch.autograd.grad(loss, [*leaves(x, lora), w]))
    for exact, fine, coarse in zip(*made, strict=True):
        assert error(fine, exact) < 0.02 and 1e-6 < error(coarse, exact) < 0.2


def test_folds_that_count_the_picks_and_maps_leave_them_out_of_the_choice():
    """Several folds, one of which counts the pick; a soft cap; several picks a row, some of them equal or none."""
    n, c, tolerance = 40, 101, 2.0**-5
    x, w = uneven(n, c)
    picks = torch.randint(-1, c, (n, 3), generator=torch.Generator().manual_seed(4))
    stream = Stream(((x, w),), maps=(Softcap.at(30.0),), grad_filter=tolerance)
    report = torch.empty(2)
    (state, rest), picked = reduce_logits(stream, picks, (LogSumExp(), LogSumExp(exclude_picks=True)), engine="fused", report=report)
    assert picked is not None
    (log_sum_exp(state).sum() + log_sum_exp(rest).sum() - 0.3 * picked.sum()).backward()
    z = x.detach().double().requires_grad_()
    s = 30.0 * torch.tanh(z / 30.0)
    there = torch.zeros(n, c + 1, dtype=torch.bool).scatter_(1, picks % (c + 1), True)[:, :c]
    at = torch.where(picks >= 0, s.gather(1, picks.clamp(min=0)), 0.0)
    (exact,) = torch.autograd.grad(s.logsumexp(1).sum() + s.masked_fill(there, -torch.inf).logsumexp(1).sum() - 0.3 * at.sum(), z)
    assert x.grad is not None
    share = dropped(x.grad, exact, picks, tolerance, n, torch.float32)
    assert share > 0.2 and abs(float(report[0]) - (1.0 - share)) < 1e-6 and 0.0 < float(report[1]) <= tolerance


def test_what_makes_a_gradient_exact_is_said_and_does():
    x, w = uneven(40, 100, 12)
    y, scale = torch.randint(100, (40,)), torch.tensor(0.8, requires_grad=True)
    learnt, frozen = Stream(((x, w),), scale_tensor=scale, grad_filter=0.1), Stream(((x, w),), scale_tensor=scale.detach(), grad_filter=0.1)
    assert "learnable scale" in str(filter_reason(learnt, (True, True, True)))
    assert filter_reason(frozen, (True, False, False)) is filter_reason(frozen, (False, True, False)) is None
    assert "no product" in str(filter_reason(replace(frozen, bias=torch.zeros(100)), (False, False, True, False)))
    assert "class scale" in str(filter_reason(replace(frozen, class_scale=torch.ones(100)), (True, True, False, False)))
    assert "given" in str(filter_reason(replace(frozen, given=torch.zeros(40, 100)), (True, True, True, False)))
    made = []
    for tolerance in (None, 2.0**-5):
        with bigclass.planning(gradients="recompute"):
            loss = bigclass.linear_cross_entropy(x, w, y, logit_scale=scale, grad_filter=tolerance, engine="fused")
        made.append(torch.autograd.grad(loss, (x, w, scale)))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    report = torch.empty(2)
    (state,), _ = reduce_logits(learnt, None, (LogSumExp(),), engine="fused", report=report)
    log_sum_exp(state).sum().backward()
    assert report.tolist() == [1.0, 0.0]


def test_a_gradient_that_is_not_finite_is_dropped_nowhere():
    x, w = uneven(40, 100)
    with torch.no_grad():
        x[5, 7] = torch.nan
    (state, _), _ = reduce_logits(Stream(((x, w),), grad_filter=2.0**-4), None, (LogSumExp(), Total()), engine="fused")
    (got,) = torch.autograd.grad(log_sum_exp(state).sum(), x)
    mine = next(r for r in blocks(40, 40) if r.start <= 5 < r.stop)
    assert got[5].isnan().all() and not (got[mine.start : mine.stop] == 0.0).all(0).any() and (got[mine.stop :] == 0.0).all(0).any()


@settings(max_examples=12, phases=[Phase.generate])
@given(data=st.data())
def test_products_of_listed_columns_are_those_of_a_masked_gradient(data):
    """Lists of none, some and all columns; sums that hold something already; factors, as fp16 has them."""
    n, c, d = (data.draw(st.integers(1, most), label=name) for name, most in (("n", 60), ("c", 90), ("d", 80)))
    dtype, kept = data.draw(st.sampled_from(list(TOLERANCES)), label="dtype"), data.draw(st.sampled_from((0.0, 0.3, 1.0)), label="kept")
    make = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    stride = -(-c // 8) * 8
    g, x, w = (torch.randn(*size, generator=make).to(dtype) for size in ((n, stride), (n, d), (c, d)))
    keep = torch.rand(len(filtered.bands(n)), c, generator=make) < kept
    lists = filtered.Kept.of(keep)
    for row, columns, count in zip(keep, lists.columns, lists.counts.tolist(), strict=True):
        assert columns[:count].tolist() == row.nonzero().squeeze(-1).tolist() and sorted(columns[:c].tolist()) == list(range(c))
    dx, dw = torch.randn(n, d, generator=make), torch.randn(c, d, generator=make)
    whole = g[:, :c].double()
    for b, r in enumerate(filtered.bands(n)):
        whole[r.start : r.stop, ~keep[b]] = 0.0
    want = dx + 2.0**-7 * whole @ w.double(), dw + 0.7 * whole.t() @ x.double()
    filtered.multiply(g[:, :c], lists, [x], [w], [dx], [dw], 2.0**-7, 0.7, Pool(x, torch.float32))
    assert error(dx, want[0]) < 1e-6 and error(dw, want[1]) < 1e-6


def test_targets_that_lead_are_no_reason_to_drop_the_rest():
    """Pitfall 44: beside the targets' entries those of all others would pass for negligible."""
    n, c = 40, 100
    x, w = uneven(n, c)
    y = torch.arange(n)
    with torch.no_grad():
        x -= 6.0 * F.one_hot(y, c)  # far behind: the targets' entries are -1, the largest there are
    logits = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(exact_nll(logits, y).sum(), logits)
    (got,) = torch.autograd.grad(bigclass.linear_cross_entropy(x, w, y, reduction="none", grad_filter=2.0**-4, engine="fused").sum(), x)
    assert dropped(got, exact, y[:, None], 2.0**-4, n, torch.float32) > 0.1


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
def test_work_buffers_take_no_more_than_planned(gradients, monkeypatch, tails):
    buffers, plans = {}, []
    get, make = Pool.get, problem.make_plan

    def noted(pool, name, rows, cols):
        t = get(pool, name, rows, cols)
        buffers[name] = max(buffers.get(name, 0), t.nbytes)
        return t

    monkeypatch.setattr(Pool, "get", noted)
    monkeypatch.setattr(problem, "make_plan", lambda *args: plans.append(make(*args)) or plans[-1])
    monkeypatch.setattr(filtered, "FILTER_BAND", chooser.FILTER_BAND)  # as the planner knows it
    x, w = uneven(100, 300, 16, torch.bfloat16)
    with bigclass.planning(workspace=1 << 20, gradients=gradients):
        loss = bigclass.linear_cross_entropy(x, w, torch.arange(100), grad_filter=2.0**-5, engine="fused")
        assert isinstance(loss, Tensor)
        loss.backward()
    assert "kept columns" in buffers and sum(buffers.values()) <= plans[-1].workspace <= 1 << 20


def test_nothing_is_read_on_the_host(monkeypatch, tails):
    """On the meta device nothing can be."""
    n, c, d = 40, 100, 12
    monkeypatch.setattr(filtered.launch, "start", lambda *_: None)
    with torch.device("meta"):
        g, x, w, picks = torch.empty(n, c), torch.empty(n, d), torch.empty(c, d), torch.empty(n, 2, dtype=torch.int32)
        columns, pool = chooser.ColumnFilter(0.01, n, c, torch.empty(0)), Pool(x, torch.float32)
        kept = filtered.choose(Problem(Stream(((x, w),)), (), (), n, c, picks), g, 0, columns, pool)
        filtered.multiply(g, kept, [x], [w], [torch.empty(n, d)], [torch.empty(c, d)], 1.0, 1.0, pool)
        assert columns.report().shape == chooser.exact_report(x).shape == (2,)

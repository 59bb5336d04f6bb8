"""reduce_logits and stream_loss against plain float64 formulas, over everything a stream and its folds can be made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigclass
from bigclass.core import (
    Dot,
    LogSumExp,
    Scale,
    ShiftedMoment,
    Softcap,
    Stream,
    TopK,
    Total,
    entropy,
    log_sum_exp,
    reduce_logits,
    register_row_loss,
    stream_loss,
)
from bigclass.core.engines import tiles
from tests.support import ROADS, error

LIMIT = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Case:
    """A drawn stream with its picks, and what its parameters are."""

    stream: Stream
    picks: Tensor | None
    keep: Tensor | None
    leaves: list[Tensor] = field(default_factory=list)

    def logits(self, leaves: list[Tensor]) -> Tensor:
        """The definition, in float64."""
        s = self.stream.with_tensors([t.double() for t in leaves])
        z = sum(x @ w.t() for x, w in s.pairs)
        z = z if s.class_scale is None else z * s.class_scale
        z = z if s.given is None else z + s.given
        z = z if s.bias is None or s.bias_last else z + s.bias
        z = z * s.scale * (1.0 if s.scale_tensor is None else s.scale_tensor.reshape(()))
        z = z + s.bias if s.bias is not None and s.bias_last else z
        for m in s.maps:
            if isinstance(m, Softcap):
                z = m.numbers[0] * torch.tanh(z / m.numbers[0])
            else:
                z = z * (m.tensors[0].reshape(()) if m.tensors else m.numbers[0])
        return z


@st.composite
def cases(draw, dtypes=(torch.float64, torch.float32), most_picks=4, most_classes=700) -> Case:
    dtype = draw(st.sampled_from(dtypes))
    n, c = draw(st.integers(1, 70)), draw(st.integers(1, most_classes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_(draw(st.booleans()))

    pairs = []
    for _ in range(draw(st.integers(1, 2))):
        d = draw(st.integers(1, 40))
        x, w = normal(n, d), normal(c, d, scale=d**-0.5)
        if draw(st.booleans()):  # non-contiguous: columns of wider tensors
            x = torch.cat((x, x), 1)[:, ::2][:, :d].detach().requires_grad_(x.requires_grad)
            w = w.t().contiguous().t().detach().requires_grad_(w.requires_grad)
        pairs.append((x, w))
    maps = draw(
        st.sampled_from(
            [
                (),
                ("cap",),
                ("scale",),
                ("learnt",),
                ("learnt", "cap"),
                ("cap", "scale"),
                ("cap", "learnt"),
                ("learnt", "cap", "learnt", "scale"),
            ]
        )
    )
    make = {
        "cap": lambda: Softcap.at(2.0),
        "scale": lambda: Scale.by(1.7),
        "learnt": lambda: Scale.by(torch.tensor([draw(st.sampled_from([0.6, -1.3, 0.0]))], dtype=dtype, requires_grad=True)),
    }
    stream = Stream(
        tuple(pairs),
        bias=normal(c) if draw(st.booleans()) else None,
        class_scale=normal(c) if draw(st.booleans()) else None,
        given=normal(n, c) if draw(st.booleans()) else None,
        scale=draw(st.sampled_from([1.0, 0.5])),
        maps=tuple(make[m]() for m in maps),
    )
    stream = replace(stream, bias_last=draw(st.booleans()))  # behind the scale that the maps have been absorbed into
    picks = keep = None
    if draw(st.booleans()):
        k = draw(st.integers(1, most_picks))
        picks = torch.randint(-1, c, (n, k), generator=g)  # -1 and repeated picks among them
    if draw(st.booleans()):
        keep = torch.rand(n, generator=g) < 0.7
    return Case(stream, picks, keep, stream.tensors)


def without_picks(s: Tensor, picks: Tensor | None) -> Tensor:
    if picks is None:
        return s
    mask = torch.zeros(s.shape[0], s.shape[1] + 1, dtype=torch.bool)
    mask[torch.arange(s.shape[0])[:, None], torch.where(picks < 0, s.shape[1], picks)] = True
    return s.masked_fill(mask[:, :-1], -math.inf)


def plain_entropy(s: Tensor, dim: int) -> Tensor:
    """-sum p log p in the shifted form, exact for peaked rows."""
    u = s - s.amax(dim, keepdim=True).detach()
    p = torch.exp(u)
    total = p.sum(dim)
    return total.log() - (p * u).sum(dim) / total


@pytest.mark.parametrize("compact", [True, False], ids=["ignored rows left out", "ignored rows masked"])
@pytest.mark.parametrize("engine", ["dense", "tiled"])
@settings(max_examples=60)
@given(case=cases(), exclude=st.booleans(), seed=st.integers(0, 1000))
def test_folds_picks_and_all_their_gradients_are_those_of_the_definition(engine, compact, case, exclude, seed):
    """Rows and columns folded from the same tiles; ignored rows, absent and repeated picks, every operand of a stream."""
    check_folds(engine, compact, case, exclude, seed)


def check_folds(engine, compact, case, exclude, seed):
    """Every fold, the picks and every gradient of a case against float64."""
    torch.manual_seed(seed)
    n, c = case.stream.shape
    v = torch.rand(c, dtype=case.leaves[0].dtype)
    grid = torch.rand(n, c, dtype=case.leaves[0].dtype).requires_grad_(case.leaves[0].requires_grad and engine != "fused")
    folds = [LogSumExp(exclude_picks=exclude), ShiftedMoment(), Total(tensors=(v,), exclude_picks=exclude), Dot(tensors=(grid,))]
    if case.keep is None:
        folds += [LogSumExp(axis="columns"), ShiftedMoment(axis="columns"), Total(axis="columns", exclude_picks=exclude)]
    before = tiles.Rows.COMPACT
    tiles.Rows.COMPACT = before if compact else ()
    try:
        with bigclass.planning(workspace=1 << 20):
            states, picked = reduce_logits(case.stream, case.picks, folds, keep=case.keep, engine=engine)
        leaves = [*case.leaves, grid]
        exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        s = case.logits(exact[:-1])
        rest = without_picks(s, case.picks) if exclude else s
        finite = torch.where(rest == -math.inf, 0.0, rest)
        kept = torch.ones(n, dtype=torch.bool) if case.keep is None else case.keep
        # what came, what is right, where it counts, how many terms it sums
        table = [
            (log_sum_exp(states[0]), rest.logsumexp(1), kept, 1),
            (entropy(states[1]), plain_entropy(s, 1), kept, 1),
            (states[2][0], (finite * v.double()).sum(1), kept, c),
            (states[3][0], (s * exact[-1]).sum(1), kept, c),
        ]
        if case.keep is None:
            every = torch.ones(c, dtype=torch.bool)
            table += [
                (log_sum_exp(states[4]), s.logsumexp(0), every, 1),
                (entropy(states[5]), plain_entropy(s, 0), every, 1),
                (states[6][0], finite.sum(0), every, n),
            ]
        if case.picks is not None:
            table.append((picked, s.gather(1, case.picks.clamp_min(0)).masked_fill(case.picks < 0, 0.0), kept, 1))
        limit = LIMIT[case.leaves[0].dtype]
        largest = max(float(s.detach().abs().max()), 1.0)
        got, want = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        for name, (o, t, where, terms) in enumerate(table):
            o, t = o[where], t[where]
            there = t.isfinite()
            o, t = o[there], t[there]
            assert not t.numel() or float((o.double() - t).detach().abs().max()) <= limit * largest * terms, f"output {name}"
            up = torch.randn(t.shape, dtype=torch.float64) / (t.numel() or 1)
            got, want = got + (o * up.to(o.dtype)).sum(), want + (t * up).sum()
        wanted = [i for i, t in enumerate(leaves) if t.requires_grad]
        if not wanted:
            return
        gs = torch.autograd.grad(got, [leaves[i] for i in wanted], allow_unused=True)
        ts = torch.autograd.grad(want, [exact[i] for i in wanted], allow_unused=True)
    finally:
        tiles.Rows.COMPACT = before
    for i, g, t in zip(wanted, gs, ts, strict=True):
        if t is None or not bool(t.any()):
            assert g is None or not bool(g.any())
        elif t.numel() > 1:
            assert error(g, t) <= 20 * limit, f"gradient {i} of shape {tuple(t.shape)}: {error(g, t):.1e}"
        else:  # one number: a sum over N x C that may cancel
            assert abs(float(g) - float(t)) <= 20 * limit * max(1.0, abs(float(t))), f"gradient {i}"


@register_row_loss("tests.squared")
def squared(folds, picked, args, numbers):
    """Uses everything a row loss may use."""
    lse = log_sum_exp(folds[0])
    return numbers[0] * args[0] * (lse - picked[:, 0]).square() + args[1] * folds[1][0]


@pytest.mark.parametrize("compact", [True, False], ids=["ignored rows left out", "ignored rows masked"])
@pytest.mark.parametrize("road", ROADS, ids="-".join)
@settings(max_examples=30)
@given(case=cases(), exclude=st.booleans())
def test_a_loss_made_in_the_forward_equals_one_made_from_the_folds(road, compact, case, exclude):
    """The two forms of the op cannot drift apart: one row loss serves both. Args of a row loss get gradients, too."""
    check_loss(road, compact, case, exclude)


def check_loss(road, compact, case, exclude):
    """A row loss through `stream_loss` against the same through dense folds."""
    if case.picks is None or (exclude and int(case.stream.shape[1]) <= case.picks.shape[1]):
        return
    n = case.stream.shape[0]
    args = (torch.rand(n, dtype=torch.float64, requires_grad=True), torch.rand(n))
    leaves = [t for t in (*case.leaves, args[0]) if t.requires_grad]
    folds = (LogSumExp(exclude_picks=exclude), Total())
    engine, gradients = road
    before = tiles.Rows.COMPACT
    tiles.Rows.COMPACT = before if compact else ()
    try:
        with bigclass.planning(gradients=gradients, workspace=1 << 20):
            loss = stream_loss(case.stream, case.picks, folds, "tests.squared", args, (0.5,), keep=case.keep, engine=engine)
            got = torch.autograd.grad(loss, leaves, allow_unused=True)
    finally:
        tiles.Rows.COMPACT = before
    states, picked = reduce_logits(case.stream, case.picks, folds, keep=case.keep, engine="dense")
    rows = squared(states, picked, args, (0.5,))
    reference = (rows if case.keep is None else torch.where(case.keep, rows, 0.0)).sum()
    want = torch.autograd.grad(reference, leaves, allow_unused=True)
    limit = 50 * LIMIT[case.leaves[0].dtype]
    assert abs(float(loss.detach()) - float(reference.detach())) <= limit * max(1.0, abs(float(reference.detach())))
    for g, t in zip(got, want, strict=True):
        if t is None or not bool(t.any()):
            assert g is None or not bool(g.any())
        else:
            assert error(g, t) <= limit or t.numel() == 1


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@settings(max_examples=30)
@given(
    n=st.integers(1, 40), c=st.integers(1, 3000), k=st.integers(1, 12), ascending=st.booleans(), axis=st.sampled_from(["rows", "columns"])
)
def test_top_k_is_that_of_the_definition(engine, n, c, k, ascending, axis):
    torch.manual_seed(n * c)
    given = torch.randn(n, c)
    if ascending:
        given = given.sort(1).values
    with bigclass.planning(workspace=1 << 20), torch.no_grad():
        ((values, classes),), _ = reduce_logits(Stream(given=given), None, (TopK((float(k),), axis=axis),), engine=engine)
    s = given if axis == "rows" else given.t()
    values, classes = values.reshape(s.shape[0], k), classes.reshape(s.shape[0], k)
    there = min(k, s.shape[1])
    want = s.topk(there, -1)
    assert torch.equal(values[:, :there], want.values) and torch.equal(s.gather(1, classes[:, :there]), want.values)
    assert bool((values[:, there:] == -math.inf).all()) and bool((classes[:, there:] == -1).all())


def small_stream(dtype=torch.float32):
    torch.manual_seed(0)
    x, w, b = torch.randn(9, 5, dtype=dtype), torch.randn(80, 5, dtype=dtype), torch.randn(80, dtype=dtype)
    return Stream(((x.requires_grad_(), w.requires_grad_()),), bias=b.requires_grad_(), maps=(Softcap.at(3.0),))


@pytest.mark.parametrize("keep", [None, torch.arange(9) % 3 > 0])
def test_the_custom_ops_pass_opcheck(keep):
    from bigclass.core import custom_ops
    from bigclass.core.recipe import pack

    stream = small_stream()
    picks = torch.randint(0, 80, (9, 1))
    recipe, numbers, tensors = pack(stream, (LogSumExp(exclude_picks=True), ShiftedMoment()))
    needs = [True] * len(tensors)
    torch.library.opcheck(custom_ops.fold_op, (tensors, picks, keep, recipe, numbers, f"tiled,recompute,{1 << 20},0", needs))
    recipe, numbers, tensors = pack(stream, (LogSumExp(exclude_picks=True),))
    args = [torch.rand(9, dtype=torch.float64)]
    plan = f"tiled,forward,{1 << 20},0"
    torch.library.opcheck(
        custom_ops.loss_op,
        (tensors, picks, keep, args, recipe, numbers, "cross_entropy", [0.0, 0.0, 0.0, 0.0, 0.0], plan, [*needs, False]),
        # the backward consumes the forward's gradients in place, which the comparison of traced with eager runs allows
    )  # fmt: skip


def test_bad_streams_are_refused_with_the_name_of_what_is_wrong():
    x, w = torch.randn(4, 3), torch.randn(7, 3)
    fold = (LogSumExp(),)
    for stream, picks, folds, keep, match in [
        (Stream(), None, fold, None, "at least one operand pair"),
        (Stream(((x, torch.randn(7, 2)),)), None, fold, None, "pair 0"),
        (Stream(((x, w), (torch.randn(5, 2), torch.randn(7, 2)))), None, fold, None, "pair 1"),
        (Stream(((x, w),), bias=torch.randn(6)), None, fold, None, "bias: expected shape"),
        (Stream(((x, w),), class_scale=torch.randn(6)), None, fold, None, "class_scale"),
        (Stream(((x, w),), given=torch.randn(4, 6)), None, fold, None, "given"),
        (Stream(((x, w),), scale_tensor=torch.randn(2)), None, fold, None, "scale"),
        (Stream(((x, w.long()),)), None, fold, None, "floating point"),
        (Stream(((x, w),)), torch.zeros(4, dtype=torch.long), fold, None, "picks"),
        (Stream(((x, w),)), torch.zeros(4, 1), fold, None, "picks"),
        (Stream(((x, w),)), None, fold, torch.ones(4), "keep"),
        (Stream(((x, w),)), None, (LogSumExp(axis="up"),), None, "axis"),
        (Stream(((x, w),)), None, (LogSumExp(axis="columns"),), torch.ones(4, dtype=torch.bool), "column fold"),
        (Stream(((x, w),)), None, (Total(tensors=(torch.randn(4),)),), None, "total"),
    ]:
        for engine in ("dense", "tiled"):
            with pytest.raises((ValueError, TypeError), match=match):
                reduce_logits(stream, picks, folds, keep=keep, engine=engine)
    with pytest.raises(IndexError, match=r"\[0, 7\), got 7"):
        reduce_logits(Stream(((x, w),)), torch.full((4, 1), 7), fold, engine="tiled")
    with pytest.raises(ValueError, match="engine: expected one of"):
        reduce_logits(Stream(((x, w),)), None, fold, engine="fast")
    with pytest.raises(KeyError, match="no 'nothing' is registered"):
        stream_loss(Stream(((x, w),)), None, fold, "nothing")


def test_a_picked_grid_entry_excluded_from_a_dot_gets_no_gradient():
    torch.manual_seed(0)
    x, w, t, y = torch.randn(8, 4), torch.randn(90, 4), torch.rand(8, 90, requires_grad=True), torch.randint(90, (8, 2))
    grads = []
    for engine in ("dense", "tiled"):
        ((total,),), _ = reduce_logits(Stream(((x, w),)), y, (Dot(tensors=(t,), exclude_picks=True),), engine=engine)
        grads.append(torch.autograd.grad(total.square().sum(), t)[0])
    assert error(grads[1], grads[0]) < 1e-6 and not bool(grads[1].gather(1, y).any())


@pytest.mark.parametrize("road", ROADS[1:], ids="-".join)
def test_masked_rows_under_a_large_bias_stay_finite(road, monkeypatch):
    """On GPUs ignored rows stay in the tiles with zero features; their own maximum must keep them from overflowing."""
    monkeypatch.setattr(tiles.Rows, "COMPACT", ())
    x, w, y = torch.randn(6, 4, requires_grad=True), torch.randn(200, 4, requires_grad=True), torch.randint(200, (6,))
    y[2], b = -100, torch.full((200,), 100.0)
    with bigclass.planning(gradients=road[1]):
        loss = bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine="tiled", reduction="none" if road[1] == "recompute" else "mean")
    got = torch.autograd.grad(loss.sum(), (x, w))
    want = torch.autograd.grad(
        torch.nn.functional.cross_entropy(x @ w.t() + b, y, reduction="none").sum() / (1 if loss.dim() else 5), (x, w)
    )
    assert error(got[0], want[0]) < 1e-5 and error(got[1], want[1]) < 1e-5


def test_both_plans_hand_a_row_loss_the_same_numbers():
    seen = []

    @register_row_loss("tests.numbers")
    def numbers_seen(folds, picked, args, numbers):
        seen.append(tuple(numbers))
        return log_sum_exp(folds[0]) * len(numbers)

    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(40, 3)
    for gradients in ("forward", "recompute"):
        with bigclass.planning(gradients=gradients):
            stream_loss(Stream(((x, w),)), None, (LogSumExp(),), "tests.numbers", (), (2.0, 3.0), engine="tiled")
    assert set(seen) == {(2.0, 3.0)}


def test_fp16_gradients_made_in_the_forward_do_not_underflow_before_the_loss_scale_arrives(monkeypatch):
    """Pitfalls 5 and 45, on the road of devices that multiply fp16 operands into fp32 (emulated: operands widened in the product)."""
    monkeypatch.setattr(tiles, "WIDE_OUTPUT", ("cpu",))
    plain = tiles.product

    def widened(a, b, out, **options):
        return plain(a.to(out.dtype), b.to(out.dtype), out, **options)

    monkeypatch.setattr(tiles, "product", widened)
    monkeypatch.setattr("bigclass.core.engines.sink.product", widened)
    torch.manual_seed(0)
    n, c = 2048, 2000
    x, w, y = torch.randn(n, 32).half().requires_grad_(), (torch.randn(c, 32) * 0.2).half().requires_grad_(), torch.randint(100, (n,))
    with bigclass.planning(gradients="forward"):
        loss = bigclass.linear_cross_entropy(x, w, y, engine="tiled")
    got = torch.autograd.grad(loss * 65536, (x, w))
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    want = torch.autograd.grad(torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), y) * 65536, exact)
    assert error(got[0], want[0]) < 2e-3 and error(got[1], want[1]) < 2e-3
    assert error(got[1][100:], want[1][100:]) < 2e-3  # classes that are no target: only small entries

"""Normalised streams: logits and gradients of x (w/||w||)^T, without the normalised weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.core import LogSumExp, ShiftedMoment, Softcap, Stream, custom_ops, log_sum_exp, norms, reduce_logits, stream_loss
from bigclass.core.engines import sink
from bigclass.core.norms import adapted_norms, inverse_norms, through_norms
from bigclass.core.recipe import pack, unpack
from tests.support import ROADS, error

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def normalised(n, c, d, dtype, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(c, d, generator=g) * (torch.rand(c, 1, generator=g) + 0.1)).to(dtype).requires_grad_()
    return Stream(((x, w),), class_scale=inverse_norms(w), normalized=True, **options), torch.randint(c, (n, 1), generator=g)


def check(road, stream, picks, limit):
    """A loss and its gradients against plain autograd in float64."""
    leaves = [t for t in stream.tensors if t.requires_grad]
    exact = {id(t): t.detach().double().requires_grad_() for t in leaves}
    (x, w), b, a = stream.pairs[0], stream.bias, stream.scale_tensor
    s = F.linear(exact[id(x)], F.normalize(exact[id(w)]), None if b is None else exact[id(b)]) * stream.scale
    s = s if a is None else s * exact[id(a)]
    s = 3.0 * torch.tanh(s / 3.0) if stream.maps else s
    want = F.cross_entropy(s, picks[:, 0], reduction="sum")
    ones = torch.ones(x.shape[0], dtype=torch.float64)
    with bigclass.planning(gradients=road[1], workspace=1 << 20):
        fold = LogSumExp(exclude_picks=True)
        loss = stream_loss(stream, picks, (fold,), "cross_entropy", [ones], (0.0, 0.0, 0.0, 0.0), engine=road[0])
        got = torch.autograd.grad(loss, leaves)
    assert error(loss, want) <= limit
    for g, t, e in zip(got, leaves, torch.autograd.grad(want, list(exact.values())), strict=True):
        assert g.dtype == t.dtype and (error(g, e) <= limit or (t.numel() == 1 and abs(float(g - e)) <= limit * 100))


@pytest.mark.parametrize("road", ROADS, ids="-".join)
@settings(max_examples=25)
@given(data=st.data())
def test_the_gradient_goes_through_the_norm(road, data):
    """In every dtype, over many slabs; with all a stream may have beside: bias, a learnt scale, a map."""
    dtype = data.draw(st.sampled_from(list(LIMIT)))
    n, c, d = data.draw(st.integers(1, 90)), data.draw(st.integers(2, 900)), data.draw(st.integers(3, 40))
    bias = torch.randn(c).to(dtype).requires_grad_() if data.draw(st.booleans()) else None
    scale = torch.tensor([1.3], dtype=dtype, requires_grad=True) if data.draw(st.booleans()) else None
    maps = (Softcap.at(3.0),) if data.draw(st.booleans()) else ()
    check(road, *normalised(n, c, d, dtype, bias=bias, scale=2.0, scale_tensor=scale, maps=maps), LIMIT[dtype])


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("piece", [1, 100, 1 << 17])
def test_norms_are_made_in_pieces_in_at_least_fp32(dtype, piece, monkeypatch):
    monkeypatch.setattr(norms, "_PIECE", {"cpu": piece, "other": piece})
    w = torch.randn(57, 13).to(dtype)
    w[3], w[4] = 0.0, 1e-20
    r = inverse_norms(w.requires_grad_())
    assert r.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not r.requires_grad
    want = 1.0 / torch.linalg.vector_norm(w.detach().double(), dim=1).clamp_min(1e-12)
    assert error(r, want) <= 1e-7 and error(r[5:], want[5:]) <= 1e-6
    u = torch.randn(57, 13).to(r.dtype)
    exact = w.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(F.normalize(exact), exact, u.double())
    through_norms(u, w.detach(), r)
    ordinary = torch.arange(57) > 4
    assert error(u[ordinary], want[ordinary]) <= 1e-5 and error(u[3:5], want[3:5]) <= 1e-5


def test_a_class_scale_that_is_no_norm_keeps_its_own_gradient():
    stream, picks = normalised(9, 50, 4, torch.float64)
    plain = Stream(stream.pairs, class_scale=stream.class_scale.clone().requires_grad_())
    results = []
    for s in (stream, plain):
        (state,), picked = reduce_logits(s, picks, (LogSumExp(),), engine="tiled")
        results.append(torch.autograd.grad((log_sum_exp(state) - picked[:, 0]).sum(), [t for t in s.tensors if t.requires_grad]))
    r, w = stream.class_scale, stream.pairs[0][1]
    by_norm = -(r**3 * results[1][2]).unsqueeze(1) * w
    assert len(results[0]) == 2 and error(results[0][1], results[1][1] + by_norm) <= 1e-12


def test_it_crosses_the_custom_ops():
    stream, picks = normalised(9, 80, 5, torch.float32)
    folds = (LogSumExp(exclude_picks=True), ShiftedMoment())
    recipe, numbers, tensors = pack(stream, folds)
    again, _ = unpack(recipe, numbers, tensors)
    assert again.normalized and again.class_scale is stream.class_scale
    needs = [t.requires_grad for t in tensors]
    assert needs == [True, True, False]
    torch.library.opcheck(custom_ops.fold_op, (tensors, picks, None, recipe, numbers, f"tiled,recompute,{1 << 20},0", needs))
    torch.library.opcheck(norms._inverse_norms, (stream.pairs[0][1].detach(),))
    recipe, numbers, tensors = pack(stream, folds[:1])
    args, plan = [torch.ones(9, dtype=torch.float64)], f"tiled,forward,{1 << 20},0"
    torch.library.opcheck(
        custom_ops.loss_op, (tensors, picks, None, args, recipe, numbers, "cross_entropy", [0.0, 0.0, 0.0, 0.0, 0.0], plan, [*needs, False])
    )


def test_a_normalised_stream_that_cannot_be_is_refused():
    x, w = torch.randn(4, 3), torch.randn(7, 3)
    r = inverse_norms(w)
    for stream, words in (
        (Stream(((x, w),), normalized=True), "class_scale None"),
        (Stream(((x, w), (x, w)), class_scale=r, normalized=True), "2 pairs"),
        (Stream(((x, w),), class_scale=r.clone().requires_grad_(), normalized=True), "that requires one"),
    ):
        with pytest.raises(ValueError, match=f"normalized: expected one operand pair.*{words}"):
            reduce_logits(stream, None, (LogSumExp(),), engine="tiled")
    with pytest.raises(ValueError, match=r"w: expected shape \(C, D\)"):
        inverse_norms(x[0])


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("piece", [1, 100, 1 << 17])
def test_norms_of_an_adapted_weight_are_summed_wide_in_any_pieces(dtype, piece, monkeypatch):
    monkeypatch.setitem(norms._PIECE, "cpu", piece)
    w, a, b = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((70, 9), (3, 9), (70, 3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = adapted_norms(w, a, b, 0.7)
    assert made.dtype == torch.promote_types(dtype, torch.float32) and not made.requires_grad
    assert error(made, (w.double() + 0.7 * b.double() @ a.double()).norm(dim=1)) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_norms_of_an_adapted_weight_pass_opcheck_and_refuse_other_shapes():
    w, a, b = torch.randn(7, 4), torch.randn(2, 4), torch.randn(7, 2)
    torch.library.opcheck(norms._adapted_norms, (w, a, b, 0.7))
    with pytest.raises(ValueError, match=r"expected shapes \(C, D\), \(R, D\) and \(C, R\), got \(7, 4\), \(4, 2\), \(7, 2\)"):
        adapted_norms(w, a.t(), b, 0.7)


@pytest.mark.parametrize("gradients", ["auto", "recompute"])
def test_a_scale_that_learns_over_a_frozen_weight_keeps_no_sum_of_classes_by_features(gradients, monkeypatch):
    """Its gradient is read off G^T x: over chunks of rows that would be C x D, though the weight gets none."""
    x, w, scale = torch.randn(300, 6).double(), torch.randn(2000, 6).double(), torch.rand(2000).double().add(0.5).requires_grad_()
    u, b, y = torch.randn(300, 2).double(), torch.randn(2000, 2).double().requires_grad_(), torch.randint(2000, (300, 1))
    made = []
    fresh = sink.fresh
    monkeypatch.setattr(sink, "fresh", lambda like, shape, *how, **more: made.append(tuple(shape)) or fresh(like, shape, *how, **more))
    with bigclass.planning(gradients=gradients, workspace=16 << 20):
        loss = stream_loss(
            Stream(((x, w), (u, b)), class_scale=scale), y, (LogSumExp(exclude_picks=True),), "cross_entropy",
            [torch.ones(300).double()], (0.0, 0.0, 0.0, 0.0), engine="tiled",
        )  # fmt: skip
        got = torch.autograd.grad(loss, (scale, b))
    assert (2000, 6) not in made
    want = F.cross_entropy((x @ w.t() + u @ b.t()) * scale, y[:, 0], reduction="sum")
    for g, e in zip(got, torch.autograd.grad(want, (scale, b)), strict=True):
        assert error(g, e) < 1e-12

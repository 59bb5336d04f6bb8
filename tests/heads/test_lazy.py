"""Lazy logits under loss functions: values and gradients are those of the same lines on F.linear's logits, and nothing is written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bigclass
from bigclass import LMHead, SparseTarget
from bigclass.heads.lazy import LazyLogits
from tests.heads.lazy_support import ENGINES, check, dense_logits, features, make_head, small_workspace
from tests.support import error

REDUCTIONS = ("mean", "sum", "none")

sizes = {"n": st.integers(1, 9), "c": st.sampled_from([1, 2, 3, 17, 300, 20_000]), "d": st.integers(1, 6), "seed": st.integers(0, 99)}
layers = st.fixed_dictionaries(
    {
        "bias": st.booleans(), "engine": st.sampled_from(ENGINES), "dtype": st.sampled_from([torch.float64] * 3 + [torch.float32]),
        "softcap": st.sampled_from([None, None, 2.5]), "logit_scale": st.sampled_from([None, None, 0.7, -2.0]),
    }
)  # fmt: skip


def indices(n: tuple[int, ...] | int, c: int, seed: int) -> Tensor:
    return torch.randint(c, (n,) if isinstance(n, int) else n, generator=torch.Generator().manual_seed(seed))


def rand(*size: int, seed: int = 1) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(operation, n: int, c: int, d: int, seed: int, layer: dict[str, Any], extra=(), **options) -> None:
    head, x = make_head(c, d, seed=seed, **layer), features(n, d=d, dtype=layer["dtype"], seed=seed)
    extra = [t.to(layer["dtype"]).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in extra]
    with small_workspace():
        check(operation, head, x, extra, **options)


# --- cross-entropy


@settings(max_examples=120)
@given(
    **sizes, layer=layers, weighted=st.booleans(), smoothing=st.sampled_from([0.0, 0.1, 1.0]), reduction=st.sampled_from(REDUCTIONS),
    ignore=st.sampled_from([None, -100, 0]), module=st.booleans(),
)  # fmt: skip
def test_cross_entropy_of_indices(n, c, d, seed, layer, weighted, smoothing, reduction, ignore, module):
    y = indices(n, c, seed)
    if ignore is not None and n > 1:
        y[0] = ignore
        y[1] = c - 1
    options = {"ignore_index": -100 if ignore is None else ignore, "reduction": reduction, "label_smoothing": smoothing}
    v = rand(c) + 0.1 if weighted else None
    if (y == options["ignore_index"]).all() and reduction == "mean":
        return  # NaN; a test of its own

    def loss(s, *vs):
        weight = vs[0] if vs else None
        return nn.CrossEntropyLoss(weight, **options)(s, y) if module else F.cross_entropy(s, y, weight, **options)

    run(loss, n, c, d, seed, layer, () if v is None else (v,))


@settings(max_examples=60)
@given(
    **sizes, layer=layers, weighted=st.booleans(), smoothing=st.sampled_from([0.0, 0.1]), reduction=st.sampled_from(REDUCTIONS),
    normal=st.booleans(),
)  # fmt: skip
def test_cross_entropy_of_probabilities(n, c, d, seed, layer, weighted, smoothing, reduction, normal):
    p = rand(n, c, seed=seed)
    p = p / p.sum(1, keepdim=True) if normal else p
    extra = (p, rand(c) + 0.1) if weighted else (p,)
    run(lambda s, p, v=None: F.cross_entropy(s, p, v, label_smoothing=smoothing, reduction=reduction), n, c, d, seed, layer, extra)


@settings(max_examples=60)
@given(
    lead=st.sampled_from([(2, 3), (4, 1), (1, 2, 3)]), c=st.sampled_from([2, 9, 2000]), engine=st.sampled_from(ENGINES),
    reduction=st.sampled_from(REDUCTIONS), soft=st.booleans(), smoothing=st.sampled_from([0.0, 0.2]), weighted=st.booleans(),
    how=st.sampled_from(["permute", "transpose", "movedim"]),
)  # fmt: skip
def test_cross_entropy_over_the_second_axis(lead, c, engine, reduction, soft, smoothing, weighted, how):
    head, x = make_head(c, engine=engine), features(*lead)
    y = rand(lead[0], c, *lead[1:]) if soft else indices(lead, c, 3)
    if not soft:
        y.view(-1)[0] = -100
    order = (0, len(lead), *range(1, len(lead)))

    def loss(s, y, v=None):
        if how == "permute" or (how == "transpose" and len(lead) > 2):
            s = s.permute(order)
        else:
            s = s.transpose(1, 2) if how == "transpose" else s.movedim(-1, 1)
        assert s.shape == (lead[0], c, *lead[1:])
        return F.cross_entropy(s, y, v, reduction=reduction, label_smoothing=smoothing)

    with small_workspace():
        check(loss, head, x, (y, rand(c) + 0.1) if weighted else (y,))


def test_the_second_axis_goes_back_where_it_came_from():
    head, x = make_head(7), features(2, 3)
    for there in (lambda s: s.permute(0, 2, 1).permute(0, 2, 1), lambda s: s.transpose(1, 2).transpose(-1, -2), lambda s: s.mT.mT):
        check(there, head, x, streams="mT" not in there.__code__.co_names)
    check(lambda s: s.permute(1, 0, 2).permute(1, 2, 0), head, x)
    check(lambda s: s.permute(1, 2, 0).permute(2, 0, 1), head, x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_single_row_without_a_batch_axis(engine, reduction):
    head, x = make_head(30, engine=engine), features()
    y, p = torch.tensor(3), rand(30)
    check(lambda s: F.cross_entropy(s, y, reduction=reduction), head, x)
    check(lambda s, p: F.cross_entropy(s, p, reduction=reduction, label_smoothing=0.1), head, x, (p,))
    check(lambda s: F.nll_loss(F.log_softmax(s, -1), y, reduction=reduction), head, x)
    check(lambda s: s.logsumexp(-1), head, x)
    check(lambda s, p: F.binary_cross_entropy_with_logits(s, p), head, x, (p,))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batches_and_ignored_rows_that_hold_nan(engine, reduction):
    head = make_head(30, engine=engine)
    x, y = features(0), indices(0, 30, 0)
    for loss in (
        lambda s: F.cross_entropy(s, y, reduction=reduction),
        lambda s: F.nll_loss(F.log_softmax(s, -1), y, reduction=reduction),
        lambda s: (
            F.binary_cross_entropy_with_logits(s, torch.zeros(0, 30, dtype=s.dtype), reduction=reduction).sum(-1)
            if reduction == "none"
            else F.binary_cross_entropy_with_logits(s, torch.zeros(0, 30, dtype=s.dtype), reduction=reduction)
        ),
    ):
        made, (real, _) = loss(head(x)), dense_logits(head, x)
        assert torch.equal(made.isnan(), loss(real).isnan()) and torch.equal(made.nan_to_num(7.0), loss(real).nan_to_num(7.0))
        made.sum().backward()
        assert not head.weight.grad.any()
    with torch.no_grad():
        x = features(4)
        x[1] = math.nan
    x.requires_grad_()
    y = torch.tensor([3, -100, 4, 29])
    head.zero_grad()
    F.cross_entropy(head(x), y, reduction=reduction).sum().backward()
    kept = x.detach()[[0, 2, 3]].requires_grad_()
    exact, leaves = dense_logits(head, kept)
    F.cross_entropy(exact, y[[0, 2, 3]], reduction=reduction).sum().backward()
    assert error(head.weight.grad, leaves[1].grad) < 1e-12 and not x.grad[1].any()
    everything = F.cross_entropy(head(x), torch.full((4,), -100), reduction=reduction)
    assert bool(everything.isnan().all()) == (reduction == "mean") and (reduction == "mean" or not everything.any())


# --- log_softmax and what follows it


@settings(max_examples=60)
@given(
    **sizes, layer=layers, weighted=st.booleans(), reduction=st.sampled_from(REDUCTIONS), how=st.sampled_from(["F", "method", "modules"])
)
def test_nll_of_log_softmax(n, c, d, seed, layer, weighted, reduction, how):
    y = indices(n, c, seed)
    y[-1] = -100 if n > 1 else y[-1]

    def loss(s, *v):
        v = v[0] if v else None
        if how == "modules":
            return nn.NLLLoss(v, reduction=reduction)(nn.LogSoftmax(1)(s), y)
        return F.nll_loss(F.log_softmax(s, dim=1) if how == "F" else s.log_softmax(-1), y, v, reduction=reduction)

    run(loss, n, c, d, seed, layer, (rand(c) + 0.1,) if weighted else ())


def timm_label_smoothing(s, y, smoothing=0.1):
    logprobs = F.log_softmax(s, dim=-1)
    nll_loss = -logprobs.gather(dim=-1, index=y.unsqueeze(1))
    nll_loss = nll_loss.squeeze(1)
    smooth_loss = -logprobs.mean(dim=-1)
    return ((1.0 - smoothing) * nll_loss + smoothing * smooth_loss).mean()


def timm_soft_target(s, t):
    return torch.sum(-t * F.log_softmax(s, dim=-1), dim=-1).mean()


def timm_binary(s, y, smoothing=0.1, sum_classes=False, threshold=None, pos_weight=None):
    if y.shape != s.shape:
        num_classes = s.shape[-1]
        off = smoothing / num_classes
        on = 1.0 - smoothing + off
        y = torch.full((y.size(0), num_classes), off, dtype=s.dtype).scatter_(1, y.long().view(-1, 1), on)
    y = y.gt(threshold).to(dtype=y.dtype) if threshold is not None else y
    loss = F.binary_cross_entropy_with_logits(s, y, None, pos_weight=pos_weight, reduction="none")
    return loss.sum(-1).mean() if sum_classes else loss.mean()


# name: (operation, what it takes beside the logits)
ROWS = {
    "gather": (lambda s, y: F.log_softmax(s, -1).gather(-1, y[:, None]).squeeze(-1), "index"),
    "gather of three": (lambda s, y: F.log_softmax(s, -1).gather(1, torch.stack((y, y.flip(0), y), 1)), "index"),
    "subscript": (lambda s, y: F.log_softmax(s, -1)[torch.arange(len(y)), y], "index"),
    "subscript from the end": (lambda s, y: F.log_softmax(s, -1)[torch.arange(len(y)), y - s.shape[-1]], "index"),
    "negated mean": (lambda s: -F.log_softmax(s, -1).mean(-1), ""),
    "mean of all": (lambda s: 3.0 * F.log_softmax(s, -1).mean(), ""),
    "sum, kept": (lambda s: F.log_softmax(s, -1).sum(-1, keepdim=True) / 7.0, ""),
    "some rows": (lambda s: F.log_softmax(s, -1)[:2].sum(dim=-1), ""),
    "label smoothing": (timm_label_smoothing, "index"),
    "soft target": (timm_soft_target, "probabilities"),
    "probabilities, negated late": (lambda s, t: -(t * F.log_softmax(s, -1)).sum(1), "probabilities"),
    "probabilities, mean": (lambda s, t: -(F.log_softmax(s, -1) * t).mean(), "probabilities"),
    "one-hot of integers": (lambda s, y: -(F.one_hot(y, s.shape[-1]) * F.log_softmax(s, -1)).sum(-1), "index"),
    "logsumexp": (lambda s: torch.logsumexp(s, -1, keepdim=True), ""),
    "gathered logits": (lambda s, y: s.gather(1, torch.stack((y, y.flip(0)), 1)), "index"),
    "logits at": (lambda s, y: s[torch.arange(len(y)), y], "index"),
    "logits at, from the end": (lambda s, y: s[torch.arange(len(y)), y - s.shape[-1]], "index"),
    "max": (lambda s: s.max(-1).values, ""),
    "max, kept": (lambda s: torch.max(s, dim=1, keepdim=True)[0], ""),
    "topk": (lambda s: s.topk(min(3, s.shape[-1]))[0], ""),
    "kl sum": (lambda s, t: F.kl_div(F.log_softmax(s, -1), t, reduction="sum"), "probabilities"),
    "kl batchmean": (lambda s, t: F.kl_div(F.log_softmax(s, -1), t, reduction="batchmean"), "probabilities"),
    "kl of log": (lambda s, t: F.kl_div(F.log_softmax(s, -1), t.log(), reduction="batchmean", log_target=True), "probabilities"),
    "kl module": (lambda s, t: nn.KLDivLoss(reduction="batchmean")(F.log_softmax(s, -1), t), "probabilities"),
    "binary": (timm_binary, "index"),
    "binary, summed": (lambda s, y: timm_binary(s, y, sum_classes=True, threshold=0.3), "index"),
    "binary, pos_weight": (lambda s, y: timm_binary(s, y, pos_weight=torch.tensor(3.0, dtype=torch.float64).to(s.dtype)), "index"),
    "binary, negated": (lambda s, t: -F.binary_cross_entropy_with_logits(s, t, reduction="none").sum(-1) / 3.0, "probabilities"),
}


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=12)
@given(**sizes, layer=layers)
def test_losses_over_log_probabilities_and_over_rows(name, n, c, d, seed, layer):
    operation, takes = ROWS[name]
    if c == 20_000 and name.startswith("binary"):
        c = 5000
    extra = {"index": (indices(n, c, seed),), "probabilities": (rand(n, c, seed=seed).softmax(1),), "": ()}[takes]
    if name.startswith("kl") and layer["dtype"] == torch.float32:
        layer = {**layer, "dtype": torch.float64}  # a difference of two sums: its value is right to the last bits of those
    run(operation, n, c, d, seed, layer, extra)


@settings(max_examples=60)
@given(
    **sizes, layer=layers, weight=st.sampled_from([None, "scalar", "classes", "row"]),
    pos_weight=st.sampled_from([None, "scalar", "classes"]), reduction=st.sampled_from(REDUCTIONS), module=st.booleans(),
)  # fmt: skip
def test_binary_cross_entropy(n, c, d, seed, layer, weight, pos_weight, reduction, module):
    c = min(c, 5000)
    shapes = {"scalar": (), "classes": (c,), "row": (1, c)}
    extra = [rand(n, c, seed=seed), *[rand(*shapes[k]) + 0.1 for k in (weight, pos_weight) if k is not None]]

    def loss(s, t, *v):
        v = list(v)
        w = None if weight is None else v.pop(0)
        p = None if pos_weight is None else v.pop(0)
        if module:
            made = nn.BCEWithLogitsLoss(w, reduction=reduction, pos_weight=p)(s, t)
        else:
            made = F.binary_cross_entropy_with_logits(s, t, w, reduction=reduction, pos_weight=p)
        return made.sum(-1) if reduction == "none" else made

    run(loss, n, c, d, seed, layer, extra)


@pytest.mark.parametrize("engine", ENGINES)
def test_binary_cross_entropy_starts_from_a_head_of_zeros(engine):
    """At s = 0 the softplus has slope 1/2, whatever |s| and relu have."""
    head, x, t = make_head(50, engine=engine), features(4), rand(4, 50)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    for loss in (
        lambda s, t: F.binary_cross_entropy_with_logits(s, t),
        lambda s, t: F.binary_cross_entropy_with_logits(s, t, pos_weight=2.0 * t[0]),
        lambda s, t: F.binary_cross_entropy_with_logits(s, t, reduction="none").sum(-1),
    ):
        check(loss, head, x, (t,))


@pytest.mark.parametrize("engine", ENGINES)
def test_binary_cross_entropy_keeps_its_digits_far_out(engine):
    """F.softplus drops e^-s above 20; float64 sees that."""
    head, x, t = make_head(50, engine=engine, logit_scale=30.0), features(4), rand(4, 50)
    exact_terms = lambda s, t: -(t * F.logsigmoid(s) + (1 - t) * F.logsigmoid(-s))  # noqa: E731
    for hard in (t, (t > 0.5).double()):
        lazy_loss = F.binary_cross_entropy_with_logits(head(x), hard)
        s, leaves = dense_logits(head, x)
        exact = exact_terms(s, hard).mean()
        assert error(lazy_loss, exact) < 1e-12
        for g, e in zip(torch.autograd.grad(lazy_loss, (x, head.weight)), torch.autograd.grad(exact, leaves[:2]), strict=True):
            assert error(g, e) < 1e-12


# --- sparse targets


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25)
@given(
    n=st.integers(1, 6), c=st.sampled_from([2, 30, 3000]), k=st.integers(1, 4), floor=st.sampled_from([0.0, 0.01]), seed=st.integers(0, 99)
)
def test_sparse_targets_are_their_dense_form(engine, n, c, k, floor, seed):
    head, x = make_head(c, engine=engine), features(n)
    index, weights = indices((n, k), c, seed), rand(n, k, seed=seed)
    index[0, 0] = -1
    t = SparseTarget(index, weights, c, floor)
    y = index.clamp_min(0)[:, 0]

    def either(loss):
        return lambda s: loss(s, t if isinstance(s, LazyLogits) else t.dense())

    with small_workspace():
        for reduction in REDUCTIONS:
            check(either(lambda s, t, r=reduction: F.cross_entropy(s, t, reduction=r, label_smoothing=0.1)), head, x)
        check(either(lambda s, t: F.cross_entropy(s, t, rand(c))), head, x)
        check(either(timm_soft_target), head, x)
        check(either(lambda s, t: -(F.log_softmax(s, -1) * t).sum(-1)), head, x)
        check(either(lambda s, t: F.binary_cross_entropy_with_logits(s, t)), head, x)
        check(either(lambda s, t: F.binary_cross_entropy_with_logits(s, t, reduction="none").sum(-1)), head, x)
        check(either(lambda s, t: F.binary_cross_entropy_with_logits(s, t, rand(c), pos_weight=rand(c))), head, x)
    assert y.shape == (n,)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_of_sparse_targets_get_their_gradient(engine):
    head, x, index = make_head(40, engine=engine), features(3), indices((3, 2), 40, 0)
    weights = rand(3, 2).requires_grad_()
    for loss in (lambda s, t: F.cross_entropy(s, t), timm_soft_target):
        (mine,) = torch.autograd.grad(loss(head(x), SparseTarget(index, weights, 40)), weights)
        (exact,) = torch.autograd.grad(loss(dense_logits(head, x)[0], SparseTarget(index, weights, 40).dense()), weights)
        assert error(mine, exact) < 1e-12


# --- a language model's head


@pytest.mark.parametrize("engine", ENGINES)
def test_a_language_models_own_lines(engine):
    """What transformers and nanoGPT do with logits (B, T, C) and labels (B, T)."""
    head, x, y = make_head(90, kind=LMHead, bias=False, engine=engine), features(2, 5), indices((2, 5), 90, 0)
    y[0, 3] = -100

    def shifted(s):
        return F.cross_entropy(s[..., :-1, :].contiguous().view(-1, s.size(-1)), y[..., 1:].contiguous().view(-1))

    def padded(s):
        labels = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
        return F.cross_entropy(s.float().view(-1, s.shape[-1]).double(), labels.view(-1), ignore_index=-100, reduction="sum") / 8

    def over_second_axis(s):
        return F.cross_entropy(s[:, :-1].transpose(1, 2), y[:, 1:])

    for lines in (shifted, over_second_axis, lambda s: F.cross_entropy(s.flatten(0, 1), y.flatten())):
        check(lines, head, x)
    check(padded, head, x, tol=1e-6)


# --- what does not fit


def test_wrong_targets_are_refused_in_words():
    head, x = make_head(10), features(4)
    s, y = head(x), indices(4, 10, 0)
    for broken, kind, words in (
        (lambda: F.cross_entropy(s, y[:3]), ValueError, r"target.*\(4,\).*got \(3,\)"),
        (lambda: F.cross_entropy(s, y.float()), (ValueError, TypeError), "target.*got torch.float32"),
        (lambda: F.cross_entropy(s, y + 10), IndexError, r"target.*\[0, 10\)"),
        (lambda: F.cross_entropy(s, -1 - y), IndexError, r"target.*\[0, 10\)"),
        (lambda: F.cross_entropy(s, rand(4, 9)), ValueError, r"target.*\(4, 9\)"),
        (lambda: F.cross_entropy(s, y, rand(9)), ValueError, r"weight.*10.*\(9,\)"),
        (lambda: F.cross_entropy(s, y, reduction="average"), ValueError, "reduction.*'average'"),
        (lambda: F.cross_entropy(s, y, label_smoothing=1.5), ValueError, "label_smoothing.*1.5"),
        (lambda: F.cross_entropy(s, SparseTarget(y[:, None], rand(4, 1), 11)), ValueError, r"target.*\(4, 10\).*\(4, 11\)"),
        (lambda: F.cross_entropy(s, rand(4, 10), ignore_index=3), ValueError, "ignore_index"),
        (lambda: F.nll_loss(F.log_softmax(s, -1), y + 10), IndexError, r"target.*\[0, 10\)"),
        (lambda: F.nll_loss(F.log_softmax(s, -1), rand(4, 10)), TypeError, "target.*float64"),
        (lambda: F.log_softmax(s, 2), IndexError, "dim"),
        (lambda: F.log_softmax(s, -1).gather(-1, y[:, None] + 10), IndexError, r"index.*\[0, 10\)"),
        (lambda: s.gather(-1, y[:, None] - 10), IndexError, r"index.*\[0, 10\)"),
        (lambda: s[torch.arange(4), y + 10], IndexError, r"index.*\[0, 10\)"),
        (lambda: s[torch.arange(4), y - 20], IndexError, r"index.*\[0, 10\)"),
        (lambda: F.binary_cross_entropy_with_logits(s, rand(4)), ValueError, r"target.*\(4, 10\).*\(4,\)"),
        (lambda: F.binary_cross_entropy_with_logits(s, rand(4, 10), reduction="all"), ValueError, "reduction.*'all'"),
        (lambda: F.binary_cross_entropy_with_logits(s, rand(4, 10), pos_weight=rand(10).requires_grad_()), ValueError, "pos_weight"),
        (lambda: head(features(4, d=6)), ValueError, "linear_weight.*6"),
        (lambda: s.split([1, 2]), ValueError, r"add up to 4.*\[1, 2\]"),
        (lambda: s.transpose(0, 2), IndexError, "dim.*got 2"),
    ):
        with bigclass.planning(logits_limit=0), pytest.raises(kind, match=words):
            broken()

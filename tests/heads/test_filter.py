"""`grad_filter=` as an option of the heads: of their own losses, and of the lazy logits that an unchanged criterion reads."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn

import bigclass
from tests.filter_support import draw, gradients

N, C, D, TOLERANCE = 64, 9000, 16, 2.0**-5  # logits of 2.2 MiB (float32): "auto" runs them tiled


def filled(head, w, b):
    with torch.no_grad():
        head.weight.copy_(w)
        if head.bias is not None:
            head.bias.copy_(b)
    return head


def pair_of(make, **options):
    """(the head with a filter, without), features, targets"""
    x, w, b, y = draw("popular", N, C, D, torch.float32)
    return filled(make(grad_filter=TOLERANCE, **options), w, b), filled(make(**options), w, b), x, y


def cce(**options):
    return bigclass.CCEHead(D, C, **options)


def multilabel(**options):
    return bigclass.MultiLabelHead(D, C, **options)


def lm(**options):
    return bigclass.LMHead(D, C, bias=True, **options)


def close_not_equal(made, exact):
    assert not torch.equal(made, exact), "nothing was left out"
    assert float((made - exact).norm() / exact.norm()) < 0.1


CRITERIA = {
    "F.cross_entropy": lambda s, y: F.cross_entropy(s, y),
    "nn.CrossEntropyLoss, smoothed": lambda s, y: nn.CrossEntropyLoss(label_smoothing=0.1)(s.float(), y),
    "log_softmax, nll_loss": lambda s, y: F.nll_loss(F.log_softmax(s, -1), y, reduction="none").mean(),
    "log_probs gathered": lambda s, y: -F.log_softmax(s, -1).gather(-1, y[:, None]).mean(),
    "scaled and capped": lambda s, y: F.cross_entropy(20.0 * torch.tanh(s / 20.0), y),
    "a slice of the classes": lambda s, y: F.cross_entropy(s[:, : C - 1], y.clamp_max(C - 2)),
    "rows in another order": lambda s, y: F.cross_entropy(s[torch.arange(N).flip(0)], y.flip(0)),
    "a sparse target": lambda s, y: F.cross_entropy(s, bigclass.SparseTarget(y[:, None], torch.ones(N, 1), C)),
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_an_unchanged_criterion_gets_filtered_gradients_of_lazy_logits(criterion):
    some, every, x, y = pair_of(cce)
    assert isinstance(some(x), bigclass.LazyLogits)
    losses = [criterion(head(x), y) for head in (some, every)]
    assert torch.equal(*losses)
    (dw, db), (exact_w, exact_b) = (gradients(loss, head.weight, head.bias) for loss, head in zip(losses, (some, every), strict=True))
    close_not_equal(dw, exact_w)
    torch.testing.assert_close(db, exact_b, rtol=1e-5, atol=1e-8)


def test_lazy_logits_and_explicit_targets_give_the_same():
    some, _, x, y = pair_of(cce, softcap=30.0)
    for lazy, explicit in zip(gradients(F.cross_entropy(some(x), y), some.weight, x), gradients(some(x, y), some.weight, x), strict=True):
        assert torch.equal(lazy, explicit)


EXPLICIT = {
    "CCEHead": (cce, {}, lambda head, x, y: head(x, y)),
    "LMHead": (lm, {"shift": 0}, lambda head, x, y: head(x.view(4, -1, D), y.view(4, -1))),
    "LMHead.log_prob": (lm, {}, lambda head, x, y: head.log_prob(x.view(4, -1, D), y.view(4, -1), shift=0).sum()),
    "LMHead.sequence_log_prob": (lm, {}, lambda head, x, y: head.sequence_log_prob(x.view(4, -1, D), y.view(4, -1), shift=0).sum()),
    "LMHead.multi_token_loss": (lm, {}, lambda head, x, y: head.multi_token_loss(x.view(4, -1, D), y.view(4, -1), (0, 1))),
    "MultiLabelHead": (multilabel, {}, lambda head, x, y: head(x, y[:, None])),
    "MultiLabelHead, zlpr": (multilabel, {"loss": "zlpr"}, lambda head, x, y: head(x, y[:, None])),
}


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_heads_own_loss_is_filtered(name):
    make, options, loss = EXPLICIT[name]
    some, every, x, y = pair_of(make, **options)
    close_not_equal(*[gradients(loss(head, x, y), head.weight)[0] for head in (some, every)])


@pytest.mark.parametrize("kind", ["arcface", "adaface", "curricular"])
def test_a_margin_head_is_filtered(kind):
    x, w, _, y = draw("popular", N, C, D, torch.float32)
    heads = [bigclass.MarginHead(D, C, kind=kind, scale=32.0, grad_filter=t) for t in (TOLERANCE, None)]
    for head in heads:
        filled_weight = head.weight.detach().copy_(w)
        assert filled_weight.shape == (C, D)
    close_not_equal(*[gradients(head(4.0 * x, y), head.weight)[0] for head in heads])


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_contrastive_head_is_filtered(loss):
    g = torch.Generator().manual_seed(0)
    texts = torch.randn(800, D, generator=g) + torch.tensor([1.0, -1.0]).repeat_interleave(400)[:, None]  # two topics, far apart
    images = (texts + 0.3 * torch.randn(800, D, generator=g)).requires_grad_()
    heads = [bigclass.ContrastiveHead(loss, init_scale=20.0, grad_filter=t) for t in (0.2, None)]
    made, exact = (gradients(head(images, texts), images, head.logit_scale) for head in heads)
    assert not torch.equal(made[0], exact[0])
    assert float((made[0] - exact[0]).norm() / exact[0].norm()) < 0.5
    torch.testing.assert_close(made[1], exact[1], rtol=1e-4, atol=1e-7)


def test_stats_of_a_head():
    some, _, x, y = pair_of(cce)
    loss, stats = some(x, y, return_stats=True)
    loss.backward()
    assert 0.0 < float(stats.kept_share) < 0.6 and 0.0 < float(stats.promised_error) <= TOLERANCE


HEADS = {
    "CCEHead": lambda t: bigclass.CCEHead(4, 9, grad_filter=t),
    "LMHead": lambda t: bigclass.LMHead(4, 9, grad_filter=t),
    "MultiLabelHead": lambda t: bigclass.MultiLabelHead(4, 9, grad_filter=t),
    "MarginHead": lambda t: bigclass.MarginHead(4, 9, grad_filter=t),
    "ContrastiveHead": lambda t: bigclass.ContrastiveHead(grad_filter=t),
    "CCEHead.adopt": lambda t: bigclass.CCEHead.adopt(nn.Linear(4, 9), grad_filter=t),
    "LMHead.adopt": lambda t: bigclass.LMHead.adopt(nn.Linear(4, 9), grad_filter=t),
}  # fmt: skip
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())


@every_head
def test_a_head_shows_its_filter_and_keeps_it_when_copied(make):
    head = make(2.0**-8)
    assert "grad_filter=0.00390625" in repr(head) and "grad_filter" not in repr(make(None))
    for copied in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert copied.grad_filter == 2.0**-8


@every_head
@pytest.mark.parametrize(
    ("value", "error"), [(0.0, ValueError), (1.0, ValueError), (float("nan"), ValueError), (True, TypeError), ("8", TypeError)]
)
def test_a_head_refuses_what_is_no_tolerance(value, error, make):
    with pytest.raises(error, match=r"^grad_filter: expected None"):
        make(value)


def test_a_released_head_has_no_filter_left():
    linear = nn.Linear(4, 9)
    bigclass.CCEHead.adopt(linear, grad_filter=0.1).release()
    assert "grad_filter" not in vars(linear)
    assert bigclass.CCEHead.adopt(linear).grad_filter is None


def test_lazy_logits_keep_their_filter_through_a_pytree():
    """So that wrappers and compiled graphs, which take a module's output apart, do not lose it."""
    some, _, x, _ = pair_of(cce)
    leaves, spec = pytree.tree_flatten(some(x))
    assert pytree.tree_unflatten(leaves, spec).stream.grad_filter == TOLERANCE


def test_a_compiled_head_and_an_eager_criterion():
    some, every, x, y = pair_of(cce)
    compiled = torch.compile(some, backend="aot_eager")
    made = gradients(F.cross_entropy(compiled(x), y), some.weight)[0]
    assert torch.equal(made, gradients(F.cross_entropy(some(x), y), some.weight)[0])
    close_not_equal(made, gradients(F.cross_entropy(every(x), y), every.weight)[0])


@pytest.mark.parametrize("criterion", [
    lambda s, t: F.cross_entropy(s, t), lambda s, t: F.kl_div(F.log_softmax(s, -1), t, reduction="batchmean"),
    lambda s, t: F.binary_cross_entropy_with_logits(s, t),
])  # fmt: skip
def test_a_criterion_with_a_dense_target_is_told(criterion):
    """Pitfall 44."""
    some, _, x, y = pair_of(cce)
    with pytest.raises(ValueError, match=r"^grad_filter: .*SparseTarget"):
        criterion(some(x), F.one_hot(y, C).float())

"""Heads: an `nn.Linear` in everything but its loss, which is `linear_cross_entropy` with the head's options, run as a forward."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigclass
from bigclass import CCEHead, LMHead
from tests.support import error

D, C = 6, 40
CAPPED = {"softcap": 3.0, "logit_scale": 1.5}
OPTIONS = {**CAPPED, "label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 7, "engine": "tiled"}
every_head = pytest.mark.parametrize("kind", [CCEHead, LMHead])


def batch(lead=(3, 5)):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(C, lead, generator=g)
    y.view(-1)[1] = 7
    return torch.randn(*lead, D, generator=g, requires_grad=True), y


@every_head
def test_a_head_is_a_linear_layer_with_its_initialisation_and_state(kind):
    torch.manual_seed(3)
    head = kind(D, C, bias=True)
    torch.manual_seed(3)
    linear = nn.Linear(D, C)
    assert isinstance(head, nn.Linear) and list(head.state_dict()) == ["weight", "bias"]
    assert torch.equal(head.weight, linear.weight) and torch.equal(head.bias, linear.bias)
    x, _ = batch()
    assert torch.equal(head(x), linear(x))
    head.load_state_dict(nn.Linear(D, C).state_dict(), strict=True)
    assert CCEHead(D, C).bias is not None and LMHead(D, C).bias is None
    assert CCEHead(D, C).num_classes == C


@every_head
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device_are_those_asked_for(kind, dtype):
    head = kind(D, C, True, "meta", dtype)
    assert all(p.device.type == "meta" and p.dtype == dtype for p in head.parameters())
    head = kind(D, C, True, dtype=dtype).to(torch.float32)
    assert head.weight.dtype == torch.float32


@every_head
@pytest.mark.parametrize("options", [{}, CAPPED, OPTIONS], ids=["plain", "capped", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_cross_entropy_of_the_heads_own_logits(kind, options, reduction):
    head, (x, y) = kind(D, C, bias=True, **options).double(), batch()
    x = x.detach().double().requires_grad_()
    s, t = head(x), y
    if kind is LMHead:
        s, t = s[:, :-1], y[:, 1:]
    rows = F.cross_entropy(
        s.reshape(-1, C), t.reshape(-1), reduction="none", label_smoothing=head.label_smoothing, ignore_index=head.ignore_index
    ) + head.z_loss * s.reshape(-1, C).logsumexp(1).square() * (t.reshape(-1) != head.ignore_index)
    exact = {"none": rows.view(t.shape), "sum": rows.sum(), "mean": rows.sum() / (t != head.ignore_index).sum()}[reduction]
    loss = head(x, y, reduction=reduction)
    assert error(loss, exact) < 1e-12
    leaves = (x, head.weight, head.bias)
    for mine, theirs in zip(torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(exact.sum(), leaves), strict=True):
        assert mine.any() and error(mine, theirs) < 1e-11


@every_head
@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
def test_predict_gives_the_top_of_the_heads_own_logits(kind, options):
    head, (x, _) = kind(D, C, bias=True, **options), batch()
    exact = head(x).topk(4)
    values, classes = head.predict(x, 4)
    assert values.shape == classes.shape == (3, 5, 4) and not values.requires_grad
    assert torch.equal(classes, exact.indices) and error(values, exact.values) < 1e-6
    assert head.predict(x)[1].shape == (3, 5, 1)


@every_head
def test_stats_class_weights_and_reduction_pass_through(kind):
    head, (x, y) = kind(D, C, bias=True, ignore_index=7), batch()
    v = torch.rand(C, generator=torch.Generator().manual_seed(1)) + 0.1
    shift = int(kind is LMHead)
    loss, stats = head(x, y, weight=v, reduction="sum", return_stats=True)
    exact = bigclass.linear_cross_entropy(
        x, head.weight, y, linear_bias=head.bias, weight=v, reduction="sum", ignore_index=7, shift=shift, return_stats=True
    )
    assert torch.equal(loss, exact[0]) and torch.equal(stats.lse, exact[1].lse) and torch.equal(stats.correct, exact[1].correct)
    assert stats.lse.shape == (3, 5 - shift)


def test_cce_takes_class_probabilities_whatever_its_ignore_index():
    head, (x, _) = CCEHead(D, C, ignore_index=7, label_smoothing=0.1), batch()
    p = torch.rand(3, 5, C)
    assert error(head(x, p), F.cross_entropy(head(x).view(-1, C), p.view(-1, C), label_smoothing=0.1)) < 1e-6


def test_lm_refuses_class_probabilities():
    head, (x, _) = LMHead(D, C), batch()
    with pytest.raises(ValueError, match=r"labels: expected token indices.*float32"):
        head(x, torch.rand(3, 5, C))


@pytest.mark.parametrize("own", [0, 1, 2])
def test_lm_shifts_labels_by_its_shift_or_the_calls(own):
    head, (x, y) = LMHead(D, C, shift=own), batch()
    for given in (None, 0, 1, 2, 5):
        k = own if given is None else given
        loss = head(x, y, shift=given, reduction="none")
        exact = F.cross_entropy(head(x)[:, : 5 - k].reshape(-1, C), y[:, k:].reshape(-1), reduction="none").view(3, 5 - k)
        assert error(loss, exact) < 1e-6


@every_head
def test_loss_is_a_forward_so_hooks_and_wrappers_run(kind):
    """Pitfalls 18 and 32: FSDP2 and ZeRO-3 gather weights in forward hooks."""
    head, (x, y) = kind(D, C, ignore_index=7), batch()
    seen = []
    head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    head.register_forward_hook(lambda module, args, out: seen.append("after"))
    head.register_full_backward_hook(lambda module, given, got: seen.append("backward"))
    assert torch.equal(head.loss(x, y, reduction="sum"), head(x, y, reduction="sum"))
    assert seen == ["before", "after"] * 2
    head.loss(x, y).backward()
    assert seen[4:] == ["before", "after", "backward"]
    doubled = head.register_forward_hook(lambda module, args, out: out * 2)
    twice = head.loss(x, y)
    doubled.remove()
    assert torch.equal(twice, head.loss(x, y) * 2)


@every_head
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
def test_copies_pickles_and_saved_heads_are_the_same_head(kind, options):
    head, (x, y) = kind(D, C, **options, **({"shift": 2} if kind is LMHead else {})), batch()
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    fresh = kind(D, C, **options, **({"shift": 2} if kind is LMHead else {}))
    fresh.load_state_dict(head.state_dict())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(file, weights_only=False), fresh):
        assert type(other) is kind and repr(other) == repr(head) and other.weight is not head.weight
        assert torch.equal(other(x, y), head(x, y))


def test_a_tied_head_is_the_embedding_and_gathers_both_gradients():
    embedding, head = nn.Embedding(C, D), LMHead(D, C)
    assert head.tie(embedding) is head and head.weight is embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert len(list(model.parameters())) == 1 and set(model.state_dict()) == {"embedding.weight", "head.weight"}
    _, y = batch()
    head(torch.tanh(embedding(y)), y).backward()
    made, embedding.weight.grad = embedding.weight.grad, None
    s = F.linear(torch.tanh(embedding(y)), embedding.weight)[:, :-1]
    F.cross_entropy(s.reshape(-1, C), y[:, 1:].reshape(-1)).backward()
    assert made.any() and error(made, embedding.weight.grad) < 1e-6
    copied = copy.deepcopy(model)
    assert copied["head"].weight is copied["embedding"].weight is not embedding.weight
    with pytest.raises(ValueError, match=r"embedding: expected a weight of shape \(40, 6\), got \(41, 6\)"):
        head.tie(nn.Embedding(C + 1, D))


@every_head
def test_a_frozen_head_gets_no_gradient_and_passes_one_on(kind):
    """Pitfall 17."""
    head, (x, y) = kind(D, C, bias=True).requires_grad_(False), batch()
    head(x, y).backward()
    assert head.weight.grad is None and head.bias.grad is None and x.grad.any()
    with torch.no_grad():
        assert not head(x, y).requires_grad


@every_head
def test_an_optimizer_trains_it(kind):
    torch.manual_seed(0)
    head, (x, y) = kind(D, C, shift=0) if kind is LMHead else kind(D, C), batch()
    optimizer = torch.optim.Adam(head.parameters(), 0.1)
    first = head(x, y).item()
    for _ in range(30):
        optimizer.zero_grad()
        head(x, y).backward()
        optimizer.step()
    assert head(x, y).item() < 0.2 * first and head(x, y, return_stats=True)[1].correct.all()


def test_the_representation_says_what_differs_from_the_default():
    assert repr(CCEHead(D, C)) == "CCEHead(in_features=6, out_features=40, bias=True)"
    assert repr(LMHead(D, C)) == "LMHead(in_features=6, out_features=40, bias=False)"
    assert repr(LMHead(D, C, shift=0, softcap=30.0)) == "LMHead(in_features=6, out_features=40, bias=False, softcap=30.0, shift=0)"
    for name, value in OPTIONS.items():
        assert f"{name}={value!r}" in repr(CCEHead(D, C, **OPTIONS))


@every_head
@pytest.mark.parametrize(
    "given, words",
    [
        ({"softcap": 0.0}, r"softcap.*greater than 0.*0\.0"),
        ({"label_smoothing": 1.1}, r"label_smoothing.*\[0, 1\].*1\.1"),
        ({"z_loss": -1.0}, r"z_loss.*>= 0.*-1\.0"),
        ({"engine": "fast"}, r"engine.*dense.*'fast'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_options_that_cannot_work_are_refused_when_the_head_is_made(kind, given, words):
    with pytest.raises(ValueError, match=words):
        kind(D, C, **given)


@every_head
def test_features_and_targets_that_do_not_fit_are_refused(kind):
    head, (x, y) = kind(D, C), batch()
    for features, target, words in ((x[..., :-1], y, "linear_weight"), (x, y[:2], "target.*got"), (x, y + C, "target.*40")):
        with pytest.raises((ValueError, IndexError), match=words):
            head(features, target)
    with pytest.raises(TypeError, match=r"(target|labels): expected a tensor, got list"):
        head(x, [1, 2])
    with pytest.raises(ValueError, match="k: expected 1 <= k <= 40"):
        head.predict(x, C + 1)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
def test_log_probabilities_and_multi_token_losses_are_those_of_the_heads_own_logits(options):
    head, (x, y) = LMHead(D, C, bias=True, **options).double(), batch()
    x = x.detach().double().requires_grad_()
    lp = (head.logits(x) / 0.7).log_softmax(-1)
    used = y != head.ignore_index
    picked = torch.where(used[:, 1:], lp[:, :-1].gather(-1, y[:, 1:, None]).squeeze(-1), 0.0)
    logp, h = head.log_prob(x, y, temperature=0.7, return_entropy=True)
    assert error(logp, picked) < 1e-11 and error(h, torch.where(used[:, 1:], -(lp.exp() * lp).sum(-1)[:, :-1], 0.0)) < 1e-11
    assert error(head.log_prob(x, y, temperature=0.7), picked) < 1e-11
    several = torch.stack((y, y.roll(1)), -1)
    aligned = torch.where(several != head.ignore_index, lp.gather(-1, several), 0.0)
    assert error(head.log_prob(x, several, shift=0, temperature=0.7), aligned) < 1e-11
    assert error(head.sequence_log_prob(x, y, temperature=0.7), picked.sum(-1)) < 1e-11
    mean = picked.sum(-1) / used[:, 1:].sum(-1)
    assert error(head.sequence_log_prob(x, y, temperature=0.7, average=True), mean) < 1e-11
    loss, losses = head.multi_token_loss([x, x * 2.0], y, (1, 2), loss_weights=(1.0, 0.5), return_losses=True)
    exact = torch.stack([head(x, y, shift=1), head(x * 2.0, y, shift=2)])
    assert error(losses, exact) < 1e-11 and error(loss, exact[0] + 0.5 * exact[1]) < 1e-11
    assert error(head.multi_token_loss(x, y, (1, 2)), head(x, y, shift=1) + head(x, y, shift=2)) < 1e-11


def test_log_probabilities_and_multi_token_losses_are_forwards_so_hooks_and_wrappers_run():
    """Pitfall 32."""
    head, (x, y) = LMHead(D, C), batch()
    seen = []
    head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    head.register_forward_hook(lambda module, args, out: seen.append("after"))
    for call in (head.log_prob, head.sequence_log_prob, head.multi_token_loss):
        assert call(x, y).requires_grad and seen == ["before", "after"]
        seen.clear()
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"):
        head.sequence_log_prob(x, [1])
    with pytest.raises(TypeError, match="index: expected int64 or int32"):
        head.log_prob(x, y.float())


def test_a_forward_assigned_to_the_module_is_refused_and_accelerates_hooks_are_followed():
    """Either would silently go on returning real logits."""
    linear = nn.Linear(4, 9)
    linear.forward = linear.forward  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"Linear has a forward of its own.*nothing would stream"):
        bigclass.CCEHead.adopt(linear)
    assert type(linear) is nn.Linear
    hooks = pytest.importorskip("accelerate", reason="accelerate is not installed").hooks
    linear = nn.Linear(4, 9)
    hooks.add_hook_to_module(linear, hooks.AlignDevicesHook("cpu", io_same_device=True))
    head, x = bigclass.CCEHead.adopt(linear), torch.randn(3, 4)
    for each in (head, copy.deepcopy(head)):
        assert isinstance(each(x), bigclass.LazyLogits) and isinstance(each.eval()(x), torch.Tensor)
        each.train()
    assert isinstance(head.release()(x), torch.Tensor)
    head = hooks.remove_hook_from_module(bigclass.CCEHead.adopt(linear))
    assert isinstance(head(x), bigclass.LazyLogits)


@every_head
def test_a_replica_of_data_parallel_returns_no_lazy_logits(kind):
    """Gathering them failed with a TypeError about missing arguments."""
    head, (x, y) = kind(D, C), batch()
    replica = head._replicate_for_data_parallel()
    replica.weight = head.weight
    replica.bias = head.bias
    with pytest.raises(ValueError, match=r"nn\.DataParallel cannot gather lazy logits.*DistributedDataParallel"):
        replica(x)
    assert error(replica(x, y), head(x, y)) == 0.0
    replica.training = False
    assert isinstance(replica(x), torch.Tensor)

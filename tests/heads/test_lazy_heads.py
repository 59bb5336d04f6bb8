"""When a head gives lazy logits, in which precision, under torch.compile, and how an nn.Linear becomes a head and is one no more."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import bigclass
from bigclass import CCEHead, LMHead, SparseTarget
from bigclass.heads.lazy import LazyLogits, LogitsWarning
from tests.heads.lazy_support import ENGINES, check, dense_logits, features, make_head
from tests.support import error

C = 40
every_engine = pytest.mark.parametrize("engine", ENGINES)


def labels(n=6, c=C):
    return torch.randint(c, (n,), generator=torch.Generator().manual_seed(3))


# --- when


@pytest.mark.parametrize("kind", [CCEHead, LMHead])
def test_real_logits_in_evaluation_under_no_grad_and_on_request(kind):
    head, x = make_head(C, kind=kind, softcap=3.0), features(2, 6)
    exact = dense_logits(head, x)[0]
    assert isinstance(head(x), LazyLogits)
    with torch.no_grad():
        assert type(head(x)) is torch.Tensor and not head(x).requires_grad
    with torch.inference_mode():
        assert type(head(x)) is torch.Tensor
    for real in (head.eval()(x), make_head(C, kind=kind, softcap=3.0, lazy=False)(x), head.train().logits(x)):
        assert type(real) is torch.Tensor and real.requires_grad and error(real, exact) < 1e-14


@every_engine
def test_a_frozen_weight_frozen_features_and_no_bias(engine):
    y = labels()
    for frozen in ("weight", "bias", "features", "weight and bias"):
        head, x = make_head(C, engine=engine), features(6)
        head.weight.requires_grad_("weight" not in frozen)
        head.bias.requires_grad_("bias" not in frozen)
        x.requires_grad_(frozen != "features")
        s = head(x)
        assert s.requires_grad
        for loss in (F.cross_entropy(s, y), F.log_softmax(s, -1).mean(), F.cross_entropy(s, y, reduction="none").sum()):
            leaves = [t for t in (x, head.weight, head.bias) if t.requires_grad]
            assert all(g.any() for g in torch.autograd.grad(loss, leaves))
    head = make_head(C, engine=engine).requires_grad_(False)
    assert not F.cross_entropy(head(x.detach()), y).requires_grad
    check(lambda s: F.cross_entropy(s, y), make_head(C, engine=engine, bias=False), features(6))


def test_hooks_run_and_may_change_what_a_head_gives():
    head, x, y = make_head(C), features(6), labels()
    seen = []
    head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    removed = head.register_forward_hook(lambda module, args, out: out * 2.0)
    loss = F.cross_entropy(head(x), y)
    assert error(loss, F.cross_entropy(2 * dense_logits(head, x)[0], y)) < 1e-12 and seen == ["before"]
    removed.remove()
    assert isinstance(nn.Sequential(nn.Identity(), head)(x), LazyLogits)


def test_gradients_accumulate_over_two_losses_of_the_same_logits():
    head, x, y = make_head(C), features(6), labels()

    def loss(s):
        return F.cross_entropy(s, y) + 0.1 * s.logsumexp(-1).square().mean() + F.log_softmax(s, -1).mean()

    check(loss, head, x)


# --- precision


@every_engine
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_heads_give_float32_losses_of_unrounded_logits(engine, dtype):
    head, x, y = make_head(C, dtype=dtype, engine=engine), features(6, dtype=dtype), labels()
    s = head(x)
    assert s.dtype == dtype
    exact, leaves = dense_logits(head, x)
    for loss in (
        lambda s: F.cross_entropy(s, y),
        lambda s: F.cross_entropy(s.float(), y, reduction="none").mean(),
        lambda s: F.nll_loss(F.log_softmax(s, -1), y),
        lambda s: F.binary_cross_entropy_with_logits(s, F.one_hot(y, C).to(s.dtype)),
        lambda s: -F.log_softmax(s, -1).mean(),
    ):
        made, truth = loss(head(x)), loss(exact)
        assert made.dtype == torch.float32 and error(made, truth) < 2e-6
        truths = torch.autograd.grad(truth, leaves[:2], retain_graph=True)
        for g, e in zip(torch.autograd.grad(made, (x, head.weight)), truths, strict=True):
            assert g.dtype == dtype and error(g, e) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@every_engine
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_of_the_head_is_remembered_by_the_loss(engine, inside, dtype):
    """Pitfall 33."""
    head, x, y = make_head(C, dtype=torch.float32, engine=engine), features(6, dtype=torch.float32), labels()
    with torch.autocast("cpu", dtype):
        s = head(x)
        plain = F.linear(x, head.weight, head.bias)
        made = [F.cross_entropy(s, y), F.log_softmax(s, -1).sum(-1), s.logsumexp(-1)] if inside else None
    assert s.dtype == plain.dtype == dtype
    made = made or [F.cross_entropy(s, y), F.log_softmax(s, -1).sum(-1), s.logsumexp(-1)]
    exact = dense_logits(head, x)[0]
    truth = [F.cross_entropy(exact, y), F.log_softmax(exact, -1).sum(-1), exact.logsumexp(-1)]
    for a, b in zip(made, truth, strict=True):
        assert a.dtype == torch.float32 and error(a, b) < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    mine, theirs = torch.autograd.grad(made[0], head.weight)[0], torch.autograd.grad(F.cross_entropy(plain.float(), y), head.weight)[0]
    assert mine.dtype == torch.float32 and error(mine, theirs) < 3e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert s.softmax(-1).dtype in (dtype, torch.float32) and error(s.materialize(), exact) < 1e-2


def test_a_class_vector_added_to_half_precision_logits_is_not_rounded():
    """Logit adjustment: log priors of about -9 would lose two digits in bfloat16."""
    head, x, y = make_head(C, dtype=torch.float32), features(6, dtype=torch.float32), labels()
    prior = -9.0 - torch.rand(C)
    with torch.autocast("cpu", torch.bfloat16):
        s = head(x) + prior
    assert s.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rounded = F.linear(x, head.weight)
    assert float((s.materialize() - (rounded.float() + (head.bias + prior))).detach().abs().max()) < 4e-2
    assert error(F.cross_entropy(s, y), F.cross_entropy(dense_logits(head, x)[0] + prior, y)) < 1e-2


def test_features_of_another_dtype_than_the_weights():
    head, x, y = make_head(C, dtype=torch.float32), features(6, dtype=torch.bfloat16), labels()
    s = head(x)
    assert s.dtype == torch.float32
    assert error(F.cross_entropy(s, y), F.cross_entropy(dense_logits(head, x)[0], y)) < 2e-6


# --- torch.compile


class Classifier(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body, self.head = nn.Linear(5, 5, dtype=torch.float64), head

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


LOSSES = {
    "cross-entropy": lambda s, y: F.cross_entropy(s, y, label_smoothing=0.1),
    "module": nn.CrossEntropyLoss(ignore_index=3),
    "nll": lambda s, y: F.nll_loss(F.log_softmax(s, -1), y),
    "label smoothing": lambda s, y: -F.log_softmax(s, -1).gather(-1, y[:, None]).mean() - F.log_softmax(s, -1).mean(-1).mean(),
    "soft target": lambda s, y: torch.sum(-F.one_hot(y, C).double() * F.log_softmax(s, -1), -1).mean(),
    "binary": lambda s, y: F.binary_cross_entropy_with_logits(s, F.one_hot(y, C).double()),
    "scaled and sliced": lambda s, y: F.cross_entropy((s * 2.0 + 1.0)[1:].view(-1, C), y[1:]),
    "sparse": lambda s, y: F.cross_entropy(s, SparseTarget(torch.stack((y, y.flip(0)), 1), torch.full((len(y), 2), 0.5, dtype=s.dtype), C)),
    "logsumexp": lambda s, y: s.logsumexp(-1).square().mean(),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_of_model_and_criterion(name, engine):
    torch.manual_seed(0)
    model, x, y = Classifier(make_head(C, engine=engine)), features(6), labels()

    def step(x, y):
        return LOSSES[name](model(x), y)

    exact = step(x, y)
    want = torch.autograd.grad(exact, (x, *model.parameters()))
    made = torch.compile(step, backend="aot_eager", fullgraph=True)(x, y)
    got = torch.autograd.grad(made, (x, *model.parameters()))
    assert error(made, exact) < 1e-12
    for g, e in zip(got, want, strict=True):
        assert e.any() and error(g, e) < 1e-12


@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_a_compiled_model_gives_lazy_logits_to_a_plain_criterion(engine):
    torch.manual_seed(0)
    model, x, y = Classifier(make_head(C, engine=engine, softcap=4.0)), features(6), labels()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for loss in (LOSSES["cross-entropy"], LOSSES["soft target"], LOSSES["scaled and sliced"]):
        s = compiled(x)
        assert isinstance(s, LazyLogits) and s.shape == (6, C) and s.dtype == torch.float64
        made, exact = loss(s, y), loss(model(x), y)
        assert error(made, exact) < 1e-12
        got = torch.autograd.grad(made, (x, *model.parameters()))
        for g, e in zip(got, torch.autograd.grad(exact, (x, *model.parameters())), strict=True):
            assert e.any() and error(g, e) < 1e-12
    assert type(torch.compile(model.eval(), backend="aot_eager", fullgraph=True)(x)) is torch.Tensor


def test_a_compiled_operation_that_needs_the_numbers_has_them():
    model, x = Classifier(make_head(C)), features(6)
    step = torch.compile(lambda x: model(x).softmax(-1).square().sum(), backend="aot_eager", fullgraph=True)
    with pytest.warns(LogitsWarning, match=r"softmax needs the logits themselves: \(6, 40\)"):
        made = step(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LogitsWarning)
        step(x)  # said once, when it was traced
    exact = dense_logits(model.head, torch.tanh(model.body(x)))[0].softmax(-1).square().sum()
    assert error(made, exact) < 1e-12


def test_the_limit_holds_in_a_compiled_graph():
    """Pitfall 22: an eager step raises here; a compiled one must not write in silence."""
    model, x = Classifier(make_head(C)), features(6)
    with bigclass.planning(logits_limit=100), pytest.raises(Exception, match=r"softmax needs the logits themselves.*above the limit"):
        torch.compile(lambda x: model(x).softmax(-1).square().sum(), backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()


@pytest.mark.parametrize("engine", ["auto", "dense"])
def test_transforms_get_real_logits_where_the_dense_engine_serves_them(engine):
    head, x, y = make_head(C, engine=engine), features(6), labels()
    loss = lambda p: F.cross_entropy(torch.func.functional_call(head, p, (x,)), y)  # noqa: E731
    made = torch.func.grad(loss)(dict(head.named_parameters()))
    F.cross_entropy(head.logits(x), y).backward()
    assert max(error(made[name], p.grad) for name, p in head.named_parameters()) < 1e-12
    per_row = torch.vmap(lambda x: head(x).sum())(x)
    assert error(per_row, head.logits(x).sum(-1)) < 1e-12


# --- an nn.Linear that becomes a head


def test_a_parametrized_head_is_left_as_it_is():
    head = make_head(C)
    torch.nn.utils.parametrizations.weight_norm(head)
    kind, x = type(head), features(6)
    before = head.logits(x)
    for change in (head.release, lambda: CCEHead.adopt(head)):
        with pytest.raises(TypeError, match="parametrized"):
            change()
    assert type(head) is kind and torch.equal(head.logits(x), before)


@pytest.mark.parametrize("kind", [CCEHead, LMHead])
def test_adopt_and_release_keep_the_module_and_all_that_hangs_on_it(kind):
    torch.manual_seed(0)
    linear, y = nn.Linear(5, C), labels()
    weight, bias, before = linear.weight, linear.bias, copy.deepcopy(linear.state_dict())
    seen = []
    linear.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    linear.extra = "kept"
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), linear)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x = features(6, dtype=torch.float32)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    state = optimizer.state[weight]
    own = {"shift": 0} if kind is LMHead else {}
    head = kind.adopt(linear, softcap=9.0, engine="tiled", **own)
    assert head is linear is model[2] and type(head) is kind and head.softcap == 9.0 and head.engine == "tiled" and head.extra == "kept"
    assert head.weight is weight and head.bias is bias and list(head.state_dict()) == list(before) and optimizer.state[weight] is state
    assert not own or head.shift == 0
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    was = weight.detach().clone()
    optimizer.step()
    assert seen[-1] is LazyLogits and weight.grad.any() and not torch.equal(weight, was)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(kind.adopt(nn.Linear(5, C), **own)))):
        assert type(twin) is kind and twin.weight is not weight
    plain = head.release()
    assert plain is linear and type(plain) is nn.Linear and plain.weight is weight and plain.extra == "kept"
    assert repr(plain) == repr(nn.Linear(5, C)) and type(plain(x)) is torch.Tensor and seen[-1] is torch.Tensor
    assert not {"softcap", "engine", "lazy", "shift"} & set(plain.__dict__)
    plain._forward_hooks.clear()
    assert b"bigclass" not in pickle.dumps(plain)  # a checkpoint of the whole module needs no bigclass


def test_a_head_may_be_adopted_again_with_other_options():
    head = LMHead.adopt(nn.Linear(5, C), shift=3, softcap=2.0)
    again = CCEHead.adopt(head, z_loss=0.1)
    assert again is head and type(head) is CCEHead and head.softcap is None and head.z_loss == 0.1 and "shift" not in head.__dict__


def test_what_is_not_a_plain_linear_layer_is_refused_and_left_as_it_was():
    class Own(nn.Linear):
        pass

    parametrized = nn.Linear(5, C)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, C))
    for module in (Own(5, C), parametrized, normed, nn.Conv2d(5, C, 1), nn.Identity(), nn.LazyLinear(C), nn.Bilinear(2, 2, 3), None):
        kind, state = type(module), dict(getattr(module, "__dict__", {}))
        with pytest.raises(TypeError, match=r"linear: expected an nn.Linear, got"):
            CCEHead.adopt(module)
        assert type(module) is kind and dict(getattr(module, "__dict__", {})) == state
    linear = nn.Linear(5, C)
    for options, raised, words in (
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing"),
        ({"engine": "fast"}, ValueError, "engine"),
        ({"sofcap": 1.0}, TypeError, "sofcap.*known: softcap"),
        ({"shift": 1}, TypeError, "shift"),
    ):
        state = dict(linear.__dict__)
        with pytest.raises(raised, match=words):
            CCEHead.adopt(linear, **options)
        assert type(linear) is nn.Linear and linear.__dict__ == state


def test_a_head_pickled_before_it_had_an_option_has_the_default():
    head = make_head(C)
    del head.__dict__["lazy"]
    assert isinstance(pickle.loads(pickle.dumps(head))(features(2)), LazyLogits)


def test_explicit_and_lazy_losses_are_one_loss():
    head, x, y = make_head(C, softcap=3.0, logit_scale=1.5, engine="tiled"), features(6), labels()
    t = SparseTarget(torch.stack((y, y.flip(0)), 1), torch.full((6, 2), 0.5, dtype=torch.float64), C)
    for target in (y, t, t.dense()):
        for reduction in ("mean", "sum", "none"):
            assert torch.equal(head(x, target, reduction=reduction), F.cross_entropy(head(x), target, reduction=reduction))
    with pytest.warns(LogitsWarning):
        head(x).softmax(-1)
    with bigclass.planning(logits_limit=0):
        head(x, y)

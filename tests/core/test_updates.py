"""A weight's gradient handed on slab by slab is the gradient: updates in the backward equal the two-step form."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.optim import SlabRowAdam, SlabSGD
from tests.support import error

MAKE = {
    "sgd": lambda p: SlabSGD(p, lr=0.3, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "row adam": lambda p: SlabRowAdam(p, lr=0.02, weight_decay=0.1),
    "row adam, momentum": lambda p: SlabRowAdam(p, lr=0.02, betas=(0.9, 0.99)),
}


def train(c, n, name, loss, in_backward, dtype, steps=3, scale=1.0):
    """Weights, biases, losses and gradients of the features after some steps."""
    torch.manual_seed(0)
    head = bigclass.MultiLabelHead(6, c, loss=loss, engine="tiled", dtype=dtype)
    slabs, rest = MAKE[name]([head.weight]), torch.optim.SGD([head.bias], lr=0.1)
    seen = []
    for _ in range(steps):
        x, positives = torch.randn(n, 6, dtype=dtype, requires_grad=True), torch.randint(-1, c, (n, 3))
        value = head(x, positives, reduction="batchmean", update=slabs if in_backward else None)
        (value * scale).backward()
        assert (head.weight.grad is None) == in_backward
        for o in (slabs, rest):
            o.step()
            o.zero_grad()
        seen += [value.detach(), x.grad]
    return [head.weight.detach(), head.bias.detach(), *seen, *slabs.state[head.weight].values()]


@pytest.mark.parametrize("loss", ["bce", "asymmetric", "zlpr"])
@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=5)
@given(c=st.sampled_from([3, 500, 40000]), n=st.integers(1, 20), scale=st.sampled_from([1.0, 0.125]), wide=st.booleans())
def test_updates_in_the_backward_equal_the_two_step_form(name, loss, c, n, scale, wide):
    dtype = torch.float64 if wide else torch.float32
    with bigclass.planning(workspace=1 << 20):
        pairs = zip(*[train(c, n, name, loss, road, dtype, scale=scale) for road in (True, False)], strict=True)
        for i, (a, b) in enumerate(pairs):  # the weights first
            if isinstance(a, torch.Tensor):
                bound = 1e-11 if wide else 1e-6 if i == 0 and name == "sgd" else 5e-6
                assert error(a, b) < bound or float((a - b).abs().max()) < 1e-7
            else:
                assert a == b


def soft(c, n):
    return bigclass.SparseTarget(torch.randint(c, (n, 2)), torch.tensor([0.3, 0.7]).expand(n, 2), c)


# name: (options of the head, options of the call, targets of N rows over C classes)
SOFTMAX = {
    "index": ({}, {}, lambda c, n: torch.randint(c, (n,)).index_fill(0, torch.tensor([0]), -100)),
    "all terms": ({"label_smoothing": 0.1, "z_loss": 0.3, "softcap": 3.0}, {"reduction": "sum"}, lambda c, n: torch.randint(c, (n,))),
    "probabilities": ({}, {}, lambda c, n: torch.randn(n, c).softmax(1)),
    "mixup": ({"label_smoothing": 0.1, "logit_scale": 2.0}, {}, soft),
}


def train_softmax(kind, c, n, name, in_backward, dtype):
    """Weights, biases, losses and gradients of the features after some steps of a softmax head."""
    torch.manual_seed(0)
    made, call, targets = SOFTMAX[kind]
    head = bigclass.CCEHead(6, c, dtype=dtype, **made)  # the default engine: small problems too must not run dense
    slabs, rest = MAKE[name]([head.weight]), torch.optim.SGD([head.bias], lr=0.1)
    seen = []
    for _ in range(3):
        x = torch.randn(n, 6, dtype=dtype, requires_grad=True)
        value = head(x, targets(c, n), weight=torch.linspace(0.5, 2.0, c, dtype=dtype), update=slabs if in_backward else None, **call)
        (value * 0.5).backward()
        assert (head.weight.grad is None) == in_backward
        for o in (slabs, rest):
            o.step()
            o.zero_grad()
        seen += [value.detach(), x.grad]
    return [head.weight.detach(), head.bias.detach(), *seen]


@pytest.mark.parametrize("kind", SOFTMAX)
@pytest.mark.parametrize(("name", "dtype"), [("sgd", torch.float32), ("sgd", torch.float64), ("row adam", torch.float64)])
@pytest.mark.parametrize(("c", "n"), [(30, 5), (40000, 20)])
def test_cross_entropy_updated_in_the_backward_equals_the_two_step_form(kind, name, dtype, c, n):
    with bigclass.planning(workspace=1 << 20):
        pairs = zip(*[train_softmax(kind, c, n, name, road, dtype) for road in (True, False)], strict=True)
        for a, b in pairs:
            assert error(a, b) < (1e-11 if dtype == torch.float64 else 1e-6)


def test_language_models_and_poly_1_take_updates_too():
    torch.manual_seed(0)
    head, labels, x = bigclass.LMHead(6, 9000), torch.randint(9000, (2, 7)), torch.randn(2, 7, 6)
    twin = copy.deepcopy(head)
    head(x, labels, update=bigclass.GradAccumulator()).backward()
    twin(x, labels).backward()
    assert error(head.weight.grad, twin.weight.grad) < 1e-6
    head.weight.grad = None
    y = labels[0]
    bigclass.linear_poly_cross_entropy(x[0], head.weight, y, update=bigclass.GradAccumulator()).backward()
    (want,) = torch.autograd.grad(bigclass.linear_poly_cross_entropy(x[0], twin.weight, y), twin.weight)
    assert error(head.weight.grad, want) < 1e-6


def test_softmax_losses_that_cannot_hand_on_say_so():
    head, x, y = bigclass.CCEHead(6, 900), torch.randn(4, 6), torch.arange(4)
    slabs = SlabSGD([head.weight], lr=1.0)
    for options, words in [
        ({"reduction": "none"}, "reduction: 'none' has no one loss"),
        ({"return_stats": True}, "return_stats: the log-sum-exp has a gradient of its own"),
    ]:
        with pytest.raises(ValueError, match=words):
            head(x, y, update=slabs, **options)
    with pytest.raises(ValueError, match="'dense' makes the whole C x D gradient"):
        bigclass.linear_cross_entropy(x, head.weight, y, update=slabs, engine="dense")
    with pytest.raises(ValueError, match=r"update: expected a weight \(C, D\), got one with positions \(3,\)"):
        bigclass.linear_cross_entropy(x, torch.randn(9, 3, 6, requires_grad=True), torch.zeros(4, 3, dtype=torch.long), update=slabs)
    with pytest.raises(ValueError, match="own tensors"):
        head(x, torch.rand(4, 900, requires_grad=True), update=slabs)
    head.weight.requires_grad_(False)
    for other in (head, bigclass.MultiLabelHead.adopt(head)):
        with pytest.raises(ValueError, match="leave None where it is frozen"):
            other(x, y, update=slabs)


def test_a_frozen_backbone_still_trains_the_weight():
    head = bigclass.MultiLabelHead(6, 900, bias=False)
    before = head.weight.detach().clone()
    head(torch.randn(4, 6), torch.zeros(4, 1, dtype=torch.long), update=SlabSGD([head.weight], lr=1.0)).backward()
    assert not torch.equal(before, head.weight) and head.weight.grad is None


def test_gradients_accumulate_where_they_are():
    torch.manual_seed(0)
    x, positives = torch.randn(8, 6), torch.randint(0, 9000, (8, 3))
    head = bigclass.MultiLabelHead(6, 9000, engine="tiled")
    plain = copy.deepcopy(head)
    with bigclass.planning(workspace=1 << 20):
        for _ in range(3):
            head(x, positives, update=bigclass.GradAccumulator()).backward()
            plain(x, positives).backward()
        first = head.weight.grad
        head(x, positives, update=bigclass.GradAccumulator()).backward()
        plain(x, positives).backward()
    assert head.weight.grad is first
    assert error(head.weight.grad, plain.weight.grad) < 1e-6 and error(head.bias.grad, plain.bias.grad) < 1e-6


def test_the_loss_alone_changes_nothing_and_a_second_backward_is_refused():
    head = bigclass.MultiLabelHead(6, 900)
    slabs, x, y = SlabSGD([head.weight], lr=1.0), torch.randn(4, 6, requires_grad=True), torch.zeros(4, 1, dtype=torch.long)
    before = head.weight.detach().clone()
    loss = head(x, y, update=slabs)
    with torch.no_grad():
        assert error(head(x, y, update=slabs), loss) == 0.0
    assert torch.equal(before, head.weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_best_classes_beside_an_update():
    head = bigclass.MultiLabelHead(6, 9000, engine="tiled")
    x, y = torch.randn(4, 6), torch.zeros(4, 1, dtype=torch.long)
    want = head.predict(x, 3)[1]
    loss, top = head(x, y, return_topk=3, update=SlabSGD([head.weight], lr=1.0))
    assert torch.equal(top.indices, want) and loss.requires_grad and not top.values.requires_grad


def test_rows_that_are_none_and_compiled_models():
    head = bigclass.MultiLabelHead(6, 900)
    before = head.weight.detach().clone()
    head(torch.randn(0, 6), torch.zeros(0, 1, dtype=torch.long), reduction="sum", update=SlabSGD([head.weight], lr=1.0)).backward()
    assert torch.equal(before, head.weight)
    x, y = torch.randn(4, 6), torch.zeros(4, 1, dtype=torch.long)
    torch._dynamo.reset()
    slabs = SlabSGD([head.weight], lr=1.0)
    torch.compile(lambda x: head(torch.relu(x), y, update=slabs) * 1.0, backend="aot_eager")(x).backward()
    assert not torch.equal(before, head.weight)


def test_what_cannot_work_is_refused_and_named(monkeypatch):
    head = bigclass.MultiLabelHead(6, 900)
    x, y = torch.randn(4, 6), torch.zeros(4, 1, dtype=torch.long)
    slabs = SlabSGD([head.weight], lr=1.0)
    with pytest.raises(ValueError, match="update: expected a SlabOptimizer"):
        head(x, y, update=torch.optim.SGD([head.weight], lr=1.0))
    with pytest.raises(ValueError, match="reduction: 'none' has no one loss"):
        head(x, y, reduction="none", update=slabs)
    with pytest.raises(ValueError, match="'dense' makes the whole C x D gradient"):
        bigclass.linear_binary_cross_entropy(x, head.weight, y, update=slabs, engine="dense")
    with pytest.raises(ValueError, match="expected a weight that is a parameter"):
        bigclass.linear_binary_cross_entropy(x, head.weight * 1.0, y, update=slabs)
    with pytest.raises(ValueError, match="update: expected an optimizer that holds the weight"):
        head(x, y, update=SlabSGD([head.bias], lr=1.0))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="several ranks"):
        head(x, y, update=slabs)


@pytest.mark.parametrize("way", ["checkpoint", "save on cpu"])
def test_saved_tensors_may_come_back_as_other_objects(way):
    head = bigclass.MultiLabelHead(6, 900, dtype=torch.float64)
    twin = copy.deepcopy(head)
    x, y = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.zeros(4, 1, dtype=torch.long)
    twin(x, y).backward()
    want, x.grad = x.grad, None
    accumulate = bigclass.GradAccumulator()
    if way == "checkpoint":
        torch.utils.checkpoint.checkpoint(lambda z: head(z, y, update=accumulate), x, use_reentrant=False).backward()
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = head(x, y, update=accumulate)
        loss.backward()
    assert error(x.grad, want) < 1e-12 and error(head.weight.grad, twin.weight.grad) < 1e-12


def test_features_that_are_the_weight_itself():
    w = torch.nn.Parameter(torch.randn(10, 6, dtype=torch.float64))
    plain = torch.autograd.grad(bigclass.linear_binary_cross_entropy(w, w, torch.arange(10)), w)[0]
    bigclass.linear_binary_cross_entropy(w, w, torch.arange(10), update=bigclass.GradAccumulator()).backward()
    assert error(w.grad, plain) < 1e-12


def test_wide_features_update_an_fp32_weight():
    w = torch.nn.Parameter(torch.randn(900, 6))
    before = w.detach().clone()
    bigclass.linear_binary_cross_entropy(
        torch.randn(4, 6).double(), w, torch.zeros(4, 1, dtype=torch.long), update=SlabSGD([w], lr=1.0)
    ).backward()
    assert not torch.equal(before, w)

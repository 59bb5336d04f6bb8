"""The margin head: its loss, its running statistics, its logits and predictions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import bigclass
from bigclass.heads.margin import ADAPTIVE, MarginHead
from bigclass.losses.margin import KINDS, linear_margin_loss
from tests.losses.margin_support import dense_margin_loss
from tests.support import error

D, C = 8, 300
every_kind = pytest.mark.parametrize("kind", [*KINDS, *ADAPTIVE])
every_engine = pytest.mark.parametrize("engine", ["dense", "tiled"])


def batch(n=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g).double() * (torch.rand(n, 1, generator=g) * 8 + 0.1)
    return x.requires_grad_(), torch.randint(C, (n,), generator=g)


def head(**options):
    torch.manual_seed(1)
    return MarginHead(D, C, dtype=torch.float64, **options)


@every_engine
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "cosface", "margin": 0.3, "scale": 30.0},
        {"kind": "combined", "subcenters": 3, "gradient": "straight_through", "beyond_pi": "plain"},
        {"beyond_pi": "easy", "ignore_index": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_is_the_functional_one_with_the_heads_options(options, engine, reduction):
    made, (x, y) = head(engine=engine, **options), batch()
    y[3] = options.get("ignore_index", -100)
    loss = made(x.view(4, 5, D), y.view(4, 5), reduction=reduction)
    named = {("logit_scale" if k == "scale" else k): v for k, v in options.items()}
    want = linear_margin_loss(x, made.weight, y, reduction=reduction, engine="dense", **named)
    assert error(loss, want.view(loss.shape)) <= 1e-12
    grads = [torch.autograd.grad(t.sum(), (x, made.weight)) for t in (loss, want)]
    assert all(error(a, b) <= 1e-12 for a, b in zip(*grads, strict=True))


def exact_adaface(x, w, y, mean, std, m=0.4, h=0.333, scale=64.0):
    """One z for each row, from norms held in [0.001, 100]."""
    z = ((x.norm(dim=1).clamp(0.001, 100.0).detach() - mean) / (std + 1e-3) * h).clamp(-1, 1)
    return torch.stack(
        [
            dense_margin_loss(x[i : i + 1], w, y[i : i + 1], (1.0, -m * z[i], m + m * z[i]), scale=scale, beyond_pi="clip")[0]
            for i in range(x.shape[0])
        ]
    )


@every_engine
def test_adaface_margins_follow_the_lengths_and_their_running_statistics(engine):
    made = head(kind="adaface", momentum=0.2, engine=engine).double()
    mean, std = 20.0, 100.0
    for step in range(3):
        x, y = batch(seed=step)
        kept = torch.arange(20) % 4 > 0
        lengths = x.detach()[kept].norm(dim=1)
        mean, std = mean + 0.2 * (float(lengths.mean()) - mean), std + 0.2 * (float(lengths.std()) - std)
        holed = torch.where(kept[:, None], x, torch.nan) if step == 2 else x  # what ignored rows hold moves nothing
        loss = made(holed, torch.where(kept, y, -100))
        want = exact_adaface(x[kept], made.weight, y[kept], mean, std).mean()
        assert math.isclose(float(made.batch_mean), mean, rel_tol=1e-12) and math.isclose(float(made.batch_std), std, rel_tol=1e-12)
        assert error(loss, want) <= 1e-12
        for a, b in zip(torch.autograd.grad(loss, (x, made.weight)), torch.autograd.grad(want, (x, made.weight)), strict=True):
            assert error(a, b) <= 1e-11
    before = copy.deepcopy(made.state_dict())
    made.eval()
    x, y = batch(seed=9)
    assert error(made(x, y), exact_adaface(x, made.weight, y, mean, std).mean()) <= 1e-12
    made.train()
    with torch.no_grad():
        made(x[:1] / x[:1].norm() * made.batch_mean, y[:1])  # one row has no deviation, and its length is the mean
        made(x, torch.full_like(y, -100))
    assert all(error(v, before[k]) <= 1e-12 for k, v in made.state_dict().items())


@every_engine
def test_curricular_negatives_follow_the_running_mean_of_target_cosines(engine):
    made, t = head(kind="curricular", momentum=0.3, scale=16.0, engine=engine).double(), 0.0
    for step in range(3):
        x, y = batch(seed=step)
        x = (x.detach() + 600.0 * made.weight.detach()[y]).requires_grad_()
        kept = torch.arange(20) % 4 > 0
        cos = F.cosine_similarity(x, made.weight[y]).detach()[kept]
        t += 0.3 * (float(cos.mean()) - t)
        holed = torch.where(kept[:, None], x, torch.nan) if step == 2 else x
        loss = made(holed, torch.where(kept, y, -100))
        want = dense_margin_loss(x[kept], made.weight, y[kept], (1.0, 0.5, 0.0), scale=16.0, beyond_pi="linear", t=t).mean()
        assert math.isclose(float(made.t), t, rel_tol=1e-9) and error(loss, want) <= 1e-12
        for a, b in zip(torch.autograd.grad(loss, (x, made.weight)), torch.autograd.grad(want, (x, made.weight)), strict=True):
            assert error(a, b) <= 1e-11
    assert t > 0.1
    made.eval()(x, y)
    with torch.no_grad():
        made.train()(x, torch.full_like(y, -100))
    assert math.isclose(float(made.t), t, rel_tol=1e-9)


@pytest.mark.parametrize("centres", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_without_a_target_come_the_cosines_times_the_scale(centres, training):
    made, (x, _) = head(subcenters=centres, scale=32.0).train(training), batch()
    want = 32.0 * (F.normalize(x) @ F.normalize(made.weight).t()).view(20, C, centres).amax(2)
    got = made(x.view(4, 5, D))
    assert got.shape == (4, 5, C) and error(got.view(20, C), want) <= 1e-12
    for a, b in zip(*[torch.autograd.grad(t.square().sum(), (x, made.weight)) for t in (got, want)], strict=True):
        assert error(a, b) <= 1e-11
    with torch.no_grad():
        assert error(made(x), want) <= 1e-12
    single = copy.deepcopy(made).bfloat16()
    assert single(x.bfloat16()).dtype == torch.bfloat16 and error(single(x.bfloat16()), want) < 2e-2


@every_engine
@pytest.mark.parametrize("centres", [1, 3])
@pytest.mark.parametrize("k", [1, 7, C])
def test_the_prediction_is_the_top_of_the_logits_and_names_each_class_once(engine, centres, k):
    made, (x, _) = head(subcenters=centres, engine=engine), batch()
    with bigclass.planning(workspace=1 << 20):
        values, classes = made.predict(x.view(4, 5, D), k)
    want = made(x).topk(k)
    assert values.shape == classes.shape == (4, 5, k) and not values.requires_grad
    assert error(values.view(20, k), want.values) <= 1e-12 and torch.equal(classes.view(20, k), want.indices)
    assert all(len(set(row.tolist())) == k for row in classes.view(20, k))


@every_kind
def test_state_survives_a_round_trip_and_begins_anew(kind):
    made, (x, y) = head(kind=kind), batch()
    made(x, y)
    again = head(kind=kind)
    again.load_state_dict(made.state_dict(), strict=True)
    names = {"adaface": ["batch_mean", "batch_std"], "curricular": ["t"]}.get(kind, [])
    assert list(made.state_dict()) == ["weight", *names]
    assert error(again.eval()(x, y), made.eval()(x, y)) == 0.0
    if names:
        assert any(not torch.equal(a, b) for a, b in zip(made.buffers(), head(kind=kind).buffers(), strict=True))
    made.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), head(kind=kind).buffers(), strict=True))
    assert 0.009 < float(made.weight.detach().std()) < 0.011


@pytest.mark.parametrize("kind", ["arcface", *ADAPTIVE])
def test_it_compiles_to_one_graph(kind):
    made, (x, y) = head(kind=kind, engine="tiled"), batch()
    for scale in (9.0, 16.0):  # the second time a number that changed is one that the graph takes
        made.scale = scale
        other = copy.deepcopy(made)
        results = [torch.compile(made, fullgraph=True, backend="aot_eager")(x, y), other(x, y)]
        grads = [torch.autograd.grad(t, (x, m.weight)) for t, m in zip(results, (made, other), strict=True)]
        assert error(*results) <= 1e-12 and all(error(a, b) <= 1e-12 for a, b in zip(*grads, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(made.buffers(), other.buffers(), strict=True))


@every_kind
def test_it_trains(kind):
    torch.manual_seed(0)
    made = MarginHead(D, 50, kind=kind, scale=16.0, engine="tiled")
    x, y = torch.randn(40, D, requires_grad=True), torch.randint(50, (40,))
    first = float(made(x, y).detach())
    optimizer = torch.optim.SGD([made.weight, x], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        made(x, y).backward()
        optimizer.step()
    assert float(made(x, y).detach()) < 0.8 * first


def test_what_it_says_of_itself():
    assert repr(MarginHead(8, 30)) == "MarginHead(in_features=8, num_classes=30, kind='arcface', margin=0.5, scale=64)"
    text = repr(MarginHead(8, 30, kind="adaface", subcenters=2, gradient="straight_through"))
    assert "margin=0.4" in text and "subcenters=2, gradient='straight_through', momentum=0.01, h=0.333" in text
    made = MarginHead(8, 30, subcenters=2, device="meta", dtype=torch.bfloat16)
    assert made.weight.shape == (60, 8) and made.weight.device.type == "meta" and made.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        (ValueError, "kind", {"kind": "softmax"}),
        (ValueError, "margin", {"margin": (1.0, 0.5, 0.0)}),
        (ValueError, "margin", {"kind": "adaface", "margin": (1.0, 0.5, 0.0)}),
        (ValueError, "margin", {"margin": torch.rand(3)}),
        (ValueError, "beyond_pi", {"kind": "adaface", "beyond_pi": "linear"}),
        (ValueError, "beyond_pi", {"beyond_pi": "sometimes"}),
        (ValueError, "gradient", {"gradient": "half"}),
        (ValueError, "subcenters", {"subcenters": 0}),
        (TypeError, "subcenters", {"subcenters": 1.5}),
        (ValueError, "subcenters", {"kind": "curricular", "subcenters": 2}),
        (ValueError, "num_classes", {"num_classes": 0}),
        (ValueError, "scale", {"scale": -1.0}),
        (ValueError, "momentum", {"momentum": 2.0}),
        (ValueError, "h", {"h": 0.0}),
        (ValueError, "engine", {"engine": "fast"}),
    ],
)
def test_options_that_cannot_work_are_refused_when_the_head_is_made(kind, words, options):
    with pytest.raises(kind, match=words):
        MarginHead(**{"in_features": 4, "num_classes": 9, **options})


def test_features_targets_and_k_that_do_not_fit_are_refused():
    for kind in ("arcface", "adaface", "curricular"):
        made = MarginHead(4, 9, kind=kind)
        x, y = torch.randn(3, 4), torch.arange(3)
        for error_type, words, arguments in [
            (ValueError, "linear_weight", (torch.randn(3, 5), y)),
            (ValueError, "target", (x, y[:2])),
            (TypeError, "target", (x, y.float())),
            (TypeError, "target", (x, [0, 1, 2])),
            (IndexError, "target", (x, y + 7)),
            (ValueError, "zeros only in row 1", (x.index_fill(0, torch.tensor([1]), 0.0), y)),
        ]:
            with pytest.raises(error_type, match=words):
                made(*arguments)
        with pytest.raises(ValueError, match="reduction: expected one of"):
            made(x, y, reduction="all")
        assert made(x.index_fill(0, torch.tensor([1]), torch.nan), y).isnan()  # no margin of the user's is to blame
    for k, error_type in ((0, ValueError), (10, ValueError), (2.0, TypeError)):
        with pytest.raises(error_type, match="k: expected"):
            made.predict(x, k)


@pytest.mark.parametrize("options", [{}, {"kind": "curricular"}, {"subcenters": 3}, {"kind": "adaface"}])
def test_updates_in_the_backward_equal_the_two_step_form(options):
    torch.manual_seed(0)
    head = MarginHead(6, 900, engine="tiled", dtype=torch.float64, **options)
    twin = copy.deepcopy(head)
    x, y = torch.randn(20, 6, dtype=torch.float64, requires_grad=True), torch.randint(900, (20,))
    slabs, ordinary = (bigclass.optim.SlabSGD([m.weight], lr=0.01, momentum=0.9) for m in (head, twin))
    with bigclass.planning(workspace=1 << 20):
        for _ in range(3):
            head(x, y, update=slabs).backward()
            first, x.grad = x.grad, None
            twin(x, y).backward()
            assert head.weight.grad is None and error(first, x.grad) < 1e-12
            x.grad = None
            ordinary.step()
            ordinary.zero_grad()
    assert error(head.weight, twin.weight) < 1e-12
    with pytest.raises(ValueError, match="reduction: 'none' has no one loss"):
        head(x, y, reduction="none", update=slabs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "cosface", "margin": [0.3]}, "margin: expected one margin for kind 'cosface'"),
        ({"margin": (1, 2)}, "margin: expected one margin"),
        ({"kind": "combined", "margin": (1.0, 0.2)}, r"margin: expected \(m1, m2, m3\)"),
        ({"scale": "64"}, "scale: expected a finite number > 0, got '64'"),
        ({"scale": math.inf}, "scale: expected a finite number"),
    ],
)
def test_margins_and_scales_of_the_wrong_kind_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        MarginHead(4, 3, **options)

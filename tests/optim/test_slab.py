"""The slab optimizers are torch optimizers in all else: groups, schedulers, checkpoints, scaled losses, little memory."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from bigclass.demo.memory import peak_extra_bytes, resident_peak
from bigclass.optim import SlabOptimizer, SlabRowAdam, SlabSGD, slab
from tests.optim.support import gradients, parameter, step_in_slabs, step_whole

MIB = 1 << 20
MAKERS = {
    "sgd": lambda p, **more: SlabSGD(p, **{"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, **more}),
    "sgd, plain": lambda p, **more: SlabSGD(p, **{"lr": 0.1, **more}),
    "row adam": lambda p, **more: SlabRowAdam(p, **{"lr": 0.1, "weight_decay": 0.01, **more}),
    "row adam, first moment": lambda p, **more: SlabRowAdam(p, **{"lr": 0.1, "betas": (0.9, 0.99), **more}),
}
every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
KINDS = ("state_dict", "saved", "pickle", "deepcopy")


def resumed(kind, make, optimizer, p):
    """(optimizer, parameter) as another process would have them, or a copy."""
    q = nn.Parameter(p.detach().clone())
    if kind == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
        return other, other.param_groups[0]["params"][0]
    if kind == "deepcopy":
        other = copy.deepcopy(optimizer)
        return other, other.param_groups[0]["params"][0]
    state = copy.deepcopy(optimizer.state_dict())
    if kind == "saved":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    other = make([q], lr=123.0)  # the loaded one counts
    if optimizer.generator is not None:
        other.generator = torch.Generator()
        other.generator.set_state(optimizer.generator.get_state())
    other.load_state_dict(state)
    return other, q


@every_kind
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_goes_on_exactly_from_where_it_was(make, kind, stochastic):
    more = {"stochastic_rounding": True, "momentum_dtype": torch.float32} if stochastic else {}
    p = parameter(dtype=torch.bfloat16 if stochastic else torch.float32)
    optimizer = make([p], **more, generator=torch.Generator().manual_seed(1) if stochastic else None)
    for g in gradients(p, 3):
        step_in_slabs(optimizer, p, g, 2)
    other, q = resumed(kind, make, optimizer, p)
    assert q is not p and torch.equal(p, q)
    before = p.detach().clone()
    for g in gradients(p, 3, seed=7):
        step_in_slabs(optimizer, p, g, 2)
        step_in_slabs(other, q, g, 2)
    assert not torch.equal(p, before)
    assert torch.equal(p, q)
    mine, theirs = (o.state_dict() for o in (optimizer, other))
    assert mine["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(mine["state"], theirs["state"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_bf16_parameters_is_not_rounded_when_loaded(kind):
    """Optimizer.load_state_dict casts floating-point state to the parameter's dtype."""
    p = parameter(dtype=torch.bfloat16)

    def make(p, **more):
        return SlabRowAdam(p, **{"lr": 0.1, "betas": (0.9, 0.999), "momentum_dtype": torch.float32, **more})

    optimizer = make([p])
    step_whole(optimizer, p, next(gradients(p, 1)))
    other, q = resumed(kind, make, optimizer, p)
    for name in ("exp_avg", "row_exp_avg_sq"):
        assert other.state[q][name].dtype == torch.float32
        assert torch.equal(other.state[q][name], optimizer.state[p][name])
    assert not torch.equal(optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg"].bfloat16().float())


def test_loading_goes_through_the_users_hooks_and_leaves_their_dict_alone():
    p = parameter(dtype=torch.bfloat16)
    optimizer = SlabRowAdam([p], 0.1)
    step_whole(optimizer, p, next(gradients(p, 1)))
    state, seen = optimizer.state_dict(), []

    def double(_, state):
        moved = {k: {**v, "row_exp_avg_sq": v["row_exp_avg_sq"] * 2} for k, v in state["state"].items()}
        return {**state, "state": moved}

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["row_exp_avg_sq"].clone()))
    for _ in range(2):  # our own hook is gone after each
        optimizer.load_state_dict(state)
    assert all(torch.equal(t, 2 * state["state"][0]["row_exp_avg_sq"]) for t in seen) and len(seen) == 2


@every_kind
@pytest.mark.parametrize("scheduler", ["cosine", "step", "cycle"])
def test_schedulers_set_the_rate(make, scheduler):
    p, q = parameter(), parameter()
    ours, plain = make([p]), make([q])
    schedule = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(ours, 5),
        "step": lambda: torch.optim.lr_scheduler.StepLR(ours, 2, 0.1),
        "cycle": lambda: torch.optim.lr_scheduler.CyclicLR(ours, 0.01, 0.5, step_size_up=2, cycle_momentum=False),
    }[scheduler]()
    rates = []
    for g in gradients(p, 5):
        rates.append(ours.param_groups[0]["lr"])
        plain.param_groups[0]["lr"] = rates[-1]
        step_in_slabs(ours, p, g.clone(), 3)
        ours.step()
        schedule.step()
        step_whole(plain, q, g)
        assert torch.equal(p, q)
    assert len(set(rates)) > 1


@every_kind
def test_step_in_slabs_is_step_whole_and_leaves_the_gradients(make, monkeypatch):
    p, q = parameter((37, 5), torch.float32), parameter((37, 5), torch.float32)
    ours, whole = make([p]), make([q])
    for g in gradients(p, 3):
        for optimizer, w, size in ((ours, p, 3 * 5 * 4), (whole, q, 1 << 30)):
            monkeypatch.setattr(slab, "SLAB_BYTES", size)
            w.grad = g.clone()
            optimizer.step()
            assert torch.equal(w.grad, g)
        assert torch.equal(p, q)


@every_kind
def test_groups_and_parameters_without_gradient(make):
    """Parameters updated in the backward have no .grad: step passes over them."""
    w, b, c = parameter((7, 3)), parameter((7,)), parameter((2,))
    optimizer = make([{"params": [w], "lr": 0.0}, {"params": [b]}])
    optimizer.add_param_group({"params": [c], "lr": 1.0})
    before = [t.detach().clone() for t in (w, b, c)]
    step_in_slabs(optimizer, w, torch.ones(7, 3), 2)
    b.grad = torch.ones(7, dtype=b.dtype)
    optimizer.step()
    assert torch.equal(w, before[0]) and not torch.equal(b, before[1]) and torch.equal(c, before[2])
    step_in_slabs(optimizer, c, torch.ones(2), 1)
    assert not torch.equal(c, before[2])
    assert isinstance(optimizer, torch.optim.Optimizer) and isinstance(optimizer, SlabOptimizer)


def test_named_parameters_closures_and_hooks():
    layer, calls = nn.Linear(3, 4), []
    optimizer = SlabSGD(layer.named_parameters(), 0.1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[0] > losses[-1] and len(calls) == 3


class LinearUpdatedInBackward(torch.autograd.Function):
    """x w^T, whose backward updates w slab by slab, as the losses are to."""

    @staticmethod
    def forward(ctx, x, w, optimizer):
        ctx.save_for_backward(x, w)
        ctx.optimizer = optimizer
        return x @ w.t()

    @staticmethod
    def backward(ctx, *grads):
        x, w = ctx.saved_tensors
        dx = grads[0] @ w
        ctx.optimizer.begin_step(w)
        for start in range(0, w.shape[0], 3):
            ctx.optimizer.update_slab(w, start, min(start + 3, w.shape[0]), grads[0][:, start : start + 3].t() @ x)
        return dx, None, None


@every_kind
def test_a_backward_that_updates_trains_like_two_steps(make):
    torch.manual_seed(0)
    x, y = torch.randn(20, 5), torch.randint(8, (20,))
    p, q = parameter((8, 5), torch.float32), parameter((8, 5), torch.float32)
    ours, plain = make([p]), make([q])
    for _ in range(4):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        nn.functional.cross_entropy(LinearUpdatedInBackward.apply(a, p, ours), y).backward()
        ours.step()
        nn.functional.cross_entropy(b @ q.t(), y).backward()
        plain.step()
        plain.zero_grad()
        assert p.grad is None and a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(p, q)


@every_kind
@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0), torch.tensor([1024.0])])
def test_scaled_losses(make, scale):
    """Slabs are divided by grad_scale; .grad is not, which a scaler has unscaled."""
    p, q, r = (parameter() for _ in range(3))
    scaled, plain, ordinary = make([p]), make([q]), make([r])
    scaled.grad_scale = ordinary.grad_scale = scale
    for g in gradients(p, 3):
        step_in_slabs(scaled, p, 1024.0 * g, 2)
        step_in_slabs(plain, q, g, 2)
        step_whole(ordinary, r, g)
    assert torch.equal(p, q) and torch.equal(r, q)
    assert copy.deepcopy(scaled).grad_scale == scale


def test_under_a_gradient_scaler():
    """w is updated in the backward, by the scale the scaler will have used; b has a .grad, which the scaler unscales itself."""
    x, y = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 8
    made = [(parameter((8, 5), torch.float32), parameter((8,), torch.float32)) for _ in range(2)]
    for scaled, (w, b) in enumerate(made):
        optimizer = SlabSGD([w, b], 0.1, 0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=2, enabled=bool(scaled))
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.grad_scale = scaler.scale(torch.ones(()))
            loss = nn.functional.cross_entropy(LinearUpdatedInBackward.apply(x.clone().requires_grad_(), w, optimizer) + b, y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (4 * 4096.0 if scaled else 1.0)
    for mine, plain in zip(*made, strict=True):
        torch.testing.assert_close(mine, plain)


def test_parameters_that_are_views_or_strided_are_updated_in_place():
    buffer = torch.randn(3, 14)
    p = nn.Parameter(buffer[:, ::2].t())
    expected = p.detach().clone() - 0.1
    step_in_slabs(SlabSGD([p], 0.1), p, torch.ones(7, 3), 2)
    torch.testing.assert_close(buffer[:, ::2].t(), expected)


def test_learning_rates_may_be_tensors_on_the_cpu():
    p, q = parameter(), parameter()
    ours, plain = SlabRowAdam([p], torch.tensor(0.25)), SlabRowAdam([q], 0.25)
    for g in gradients(p, 2):
        step_in_slabs(ours, p, g, 3)
        step_in_slabs(plain, q, g, 3)
    assert torch.equal(p, q)


def slab_of(c, d, dtype, kind, options):
    """One slab of all rows."""

    def call(c):
        p = nn.Parameter(torch.ones(c, d, dtype=dtype))
        optimizer = (SlabSGD if kind == "sgd" else SlabRowAdam)([p], 0.1, **options)
        for _ in range(2):
            optimizer.begin_step(p)
            optimizer.update_slab(p, 0, c, torch.ones(c, d))
        optimizer.begin_step(p)
        g = torch.ones(c, d)
        return lambda: [] if optimizer.update_slab(p, 0, c, g) is None else None

    call(10)()
    return call(c)


def whole_of(c, d, dtype):
    def call(c):
        p = nn.Parameter(torch.ones(c, d, dtype=dtype))
        p.grad = torch.ones_like(p)
        optimizer = SlabSGD([p], 0.1, 0.9)
        optimizer.step()
        return lambda: [] if optimizer.step() is None else None

    call(10)()
    return call(c)


measured = pytest.mark.skipif(resident_peak() is None, reason="this system does not tell a process's peak memory")


@measured
@pytest.mark.parametrize(
    ("dtype", "kind", "options", "slabs"),
    [
        (torch.float32, "sgd", {"momentum": 0.9, "weight_decay": 0.1}, 0.0),
        (torch.float32, "adam", {"betas": (0.9, 0.99), "weight_decay": 0.1}, 0.0),
        (torch.bfloat16, "sgd", {"momentum": 0.9, "weight_decay": 0.1, "stochastic_rounding": True}, 2.0),
        (torch.bfloat16, "adam", {"betas": (0.9, 0.99), "weight_decay": 0.1, "stochastic_rounding": True}, 2.0),
    ],
)
def test_a_slab_takes_at_most_two_more(dtype, kind, options, slabs):
    """A slab of 64 MiB."""
    extra = peak_extra_bytes(slab_of, 1 << 16, 256, dtype, kind, options)
    assert extra is not None and extra <= slabs * 64 * MIB + 8 * MIB


@measured
def test_an_ordinary_step_makes_no_temporary_of_the_whole():
    """The parameter has 128 MiB in bf16."""
    extra = peak_extra_bytes(whole_of, 1 << 18, 256, torch.bfloat16)
    assert extra is not None and extra <= 24 * MIB

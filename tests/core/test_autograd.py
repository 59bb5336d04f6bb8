"""How the op behaves in training loops: scaling, repeated and summed backwards, checkpoints, autocast, torch.compile, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import bigclass
from tests.support import draw, error, exact_nll

STREAMED = ["forward", "recompute"]


@pytest.fixture(params=STREAMED)
def problem(request):
    """x, w, y with an ignored row, a streamed loss and the exact gradients."""
    x, w, _, y = draw("peaked", 40, 900, 24, torch.float32, 3)
    y[5] = -100

    def loss(x=x, w=w, **options):
        return bigclass.linear_cross_entropy(x, w, y, engine="tiled", **options)

    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    keep = y != -100
    truth = exact_nll(F.linear(*leaves)[keep], y[keep]).mean()
    with bigclass.planning(gradients=request.param, workspace=1 << 20):
        yield x, w, loss, truth, torch.autograd.grad(truth, leaves)
    torch._dynamo.reset()


def assert_gradients(loss, x, w, truth, grads, scale=1.0, limit=1e-5):
    assert error(loss, truth * scale) < limit
    for g, t in zip(torch.autograd.grad(loss, (x, w)), grads, strict=True):
        assert error(g, t * scale) < limit


@pytest.mark.parametrize("scale", [0.25, -3.0, 0.0])
def test_a_scaled_loss_scales_every_gradient(problem, scale):
    """Pitfall 20."""
    x, w, loss, _, grads = problem
    (loss() * scale).backward()
    for leaf, t in zip((x, w), grads, strict=True):
        assert error(leaf.grad, t * scale) < 1e-5


def test_a_second_backward_with_retain_graph_adds_the_same_gradients_again(problem):
    """Pitfalls 21 and 46: the gradients made in the forward are consumed in place, once."""
    x, w, loss, _, grads = problem
    value = loss()
    value.backward(retain_graph=True)
    first = w.grad.clone()
    value.backward(torch.tensor(0.5), retain_graph=True)
    value.backward()
    assert error(w.grad, 2.5 * grads[1]) < 1e-5 and error(x.grad, 2.5 * grads[0]) < 1e-5
    assert error(first, grads[1]) < 1e-5


def test_a_backward_after_the_weight_changed_raises_instead_of_using_the_new_weight(problem):
    _, w, loss, *_ = problem
    value = loss()
    with torch.no_grad():
        w.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_two_losses_on_one_head_and_one_loss_used_twice_add_up(problem):
    x, w, loss, _, grads = problem
    value = loss()
    (value * 0.5 + value * 0.25 + loss(reduction="sum") * 0.0 + loss(reduction="none").sum() * 0.25 / 39).backward()
    assert error(w.grad, grads[1]) < 1e-5 and error(x.grad, grads[0]) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(problem, reentrant):
    x, w, loss, truth, grads = problem
    value = checkpoint(loss, x, w, use_reentrant=reentrant)
    value.backward()
    assert error(value, truth) < 1e-5
    assert error(w.grad, grads[1]) < 1e-5 and error(x.grad, grads[0]) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_under_torch_compile_forward_and_backward(problem, reduction):
    x, w, loss, truth, grads = problem
    compiled = torch.compile(
        lambda x, w: loss(x, w, reduction=reduction).sum() / (1 if reduction == "mean" else 39), fullgraph=True, backend="aot_eager"
    )
    for _ in range(2):
        assert_gradients(compiled(x, w), x, w, truth, grads)
        assert_gradients(compiled(x, w) * 0.5, x, w, truth, grads, 0.5)


def test_compiled_options_keep_their_meaning():
    """Pitfall 15: ignore_index and the rest survive tracing."""
    x, w, b, y = draw("flat", 30, 400, 8, torch.float32, 4)
    y[::4] = 7
    options = dict(linear_bias=b, ignore_index=7, label_smoothing=0.1, softcap=5.0, z_loss=1e-3, weight=torch.rand(400), return_stats=True)
    for engine in ("tiled", "dense"):
        run = lambda x, w: bigclass.linear_cross_entropy(x, w, y, engine=engine, **options)  # noqa: B023, E731
        loss, stats = torch.compile(run, fullgraph=True, backend="aot_eager")(x, w)
        plain, plain_stats = run(x, w)
        assert error(loss, plain) < 1e-6 and error(stats.lse, plain_stats.lse) < 1e-6 and torch.equal(stats.correct, plain_stats.correct)
        assert error(torch.autograd.grad(loss, w)[0], torch.autograd.grad(plain, w)[0]) < 1e-6
        torch._dynamo.reset()


def test_inductor_compiles_a_training_step(problem):
    x, w, loss, truth, grads = problem
    assert_gradients(torch.compile(loss, fullgraph=True)(x, w), x, w, truth, grads)


def test_compiled_with_dynamic_shapes_serves_several_batch_sizes():
    w = torch.randn(700, 16, requires_grad=True)
    step = torch.compile(
        lambda x, y: bigclass.linear_cross_entropy(x, w, y, engine="tiled"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (20, 33, 64):
        x, y = torch.randn(n, 16, requires_grad=True), torch.randint(700, (n,))
        got = torch.autograd.grad(step(x, y), (x, w))
        want = torch.autograd.grad(F.cross_entropy(x.double() @ w.double().t(), y), (x, w))
        assert error(got[0], want[0]) < 1e-5 and error(got[1], want[1]) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("engine", ["auto", "dense", "tiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_never_rounds_logits_and_keeps_master_gradients_in_their_dtype(engine, dtype):
    x, w, b, y = draw("peaked", 64, 900, 24, torch.float32, 3)
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = exact_nll(F.linear(*leaves), y).mean()
    grads = torch.autograd.grad(truth, leaves)
    with torch.autocast("cpu", dtype):
        loss = bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine=engine)
        rounded = F.cross_entropy(F.linear(x, w, b), y)
    got, dense = torch.autograd.grad(loss, (x, w, b)), torch.autograd.grad(rounded, (x, w, b))
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in got)
    for g, d, t in zip(got, dense, grads, strict=True):
        assert error(g, t) <= error(d, t)


@pytest.mark.parametrize("gradients", STREAMED)
@pytest.mark.parametrize("features", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_another_dtype_than_the_input_get_gradients_in_their_own(gradients, features, weights):
    x, w, _, y = draw("flat", 30, 300, 9, torch.float64, 1)
    x, w = x.detach().to(features).requires_grad_(), w.detach().to(weights).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = torch.autograd.grad(F.cross_entropy(F.linear(*exact), y), exact)
    with bigclass.planning(gradients=gradients):
        got = torch.autograd.grad(bigclass.linear_cross_entropy(x, w, y, engine="tiled"), (x, w))
    for g, t, leaf in zip(got, truth, (x, w), strict=True):
        assert g.dtype == leaf.dtype and error(g, t) < (4e-3 if leaf.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda f, x, w: torch.autograd.grad(f(), x, create_graph=True),
        lambda f, x, w: torch.func.grad(lambda t: f(t, w))(x),
        lambda f, x, w: torch.func.jvp(lambda t: f(t, w), (x,), (x,)),
        lambda f, x, w: torch.func.vmap(lambda t: f(x * t, w))(torch.ones(2)),
        lambda f, x, w: torch.autograd.functional.hessian(lambda t: f(t, w.detach()), x.detach()),
    ],
    ids=["create_graph", "func.grad", "func.jvp", "func.vmap", "hessian"],
)
def test_what_a_streaming_engine_cannot_differentiate_raises(problem, attempt):
    """Pitfall 47. The message names the way out."""
    x, w, loss, *_ = problem
    with pytest.raises(RuntimeError, match="engine='dense'"):
        attempt(loss, x, w)


def test_forward_mode_raises(problem):
    x, w, loss, *_ = problem
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward-mode AD .* engine='dense'"):
        loss(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()), w)


def test_the_dense_engine_differentiates_twice():
    x, w, _, y = draw("flat", 6, 50, 4, torch.float64, 0)
    assert torch.autograd.gradgradcheck(lambda x, w: bigclass.linear_cross_entropy(x, w, y, engine="dense"), (x, w))

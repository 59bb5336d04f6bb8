"""`grad_filter=`: which losses take it, what they refuse, what they report. The promise itself: tests/core/test_filter.py."""

from __future__ import annotations

import inspect
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import bigclass
from tests.filter_support import blocks, draw, gradients, ratios, tiles
from tests.ranks import run_ranks

N, C, D, TOLERANCE = 64, 300, 24, 2.0**-5
CE = bigclass.linear_cross_entropy


def sequences(function, x, w, y, **options):
    """A loss of token positions, of 4 sequences of as many rows."""
    return function(x.view(4, -1, x.shape[1]), w, y.view(4, -1), **options)


def images(function, x, w, y, *, linear_bias, **options):
    """A contrastive loss of x among w, whose row is an image's text; a text's popularity is a feature of its own."""
    x, w = torch.cat((x, torch.ones_like(x[:, :1])), 1), torch.cat((w, linear_bias.unsqueeze(1)), 1)
    return function(x, w, 1.0, positives=y, **options)


def margin(kind, x, w, y, *, linear_bias, **options):
    return bigclass.linear_margin_loss(x, w, y, kind=kind, logit_scale=24.0, **options) + 0.0 * linear_bias.sum()


# loss(x, w, y, linear_bias=, grad_filter=, engine=)
LOSSES = {
    "cross_entropy": CE,
    "cross_entropy, rows": lambda *a, **k: (CE(*a, reduction="none", **k) * torch.linspace(0.1, 2, N, dtype=a[0].dtype)).sum(),
    "cross_entropy, a few classes": lambda x, w, y, **k: CE(
        x, w, bigclass.SparseTarget(torch.stack((y, (y + 1) % C), 1), torch.tensor([[0.7, 0.3]]).expand(N, 2).to(x.dtype), C), **k
    ),
    "poly": bigclass.linear_poly_cross_entropy,
    "logsumexp": lambda x, w, y, **k: torch.sub(*[t.sum() for t in bigclass.linear_logsumexp(x, w, index=y, **k)]),
    "log_prob": lambda x, w, y, **k: sum(t.sum() for t in bigclass.linear_log_prob(x, w, y, return_entropy=True, **k)),
    "sequence_log_prob": lambda *a, **k: sequences(bigclass.linear_sequence_log_prob, *a, **k).sum(),
    "multi_token": partial(sequences, partial(bigclass.linear_multi_token_cross_entropy, shifts=(0, 1))),
    "multi_token, heads": lambda x, w, y, linear_bias, **k: sequences(
        bigclass.linear_multi_token_cross_entropy, x, [w, 0.5 * w], y, linear_bias=[linear_bias, linear_bias], shifts=(0, 1), **k
    ),
    "bce": bigclass.linear_binary_cross_entropy,
    "bce, rows": lambda *a, **k: bigclass.linear_binary_cross_entropy(*a, reduction="none", **k).sum(),
    "focal": bigclass.linear_focal_loss,
    "asymmetric": partial(bigclass.linear_asymmetric_loss, clip=0.0, gamma_neg=1.0),
    "squared_hinge": partial(bigclass.linear_squared_hinge_loss, margin=6.0),
    "elementwise": partial(bigclass.linear_elementwise_loss, loss="poly"),
    "zlpr": bigclass.linear_zlpr_loss,
    "contrastive": partial(images, bigclass.contrastive_loss),
    "contrastive, images": partial(images, partial(bigclass.contrastive_loss, direction="image")),
    "contrastive, texts": partial(images, partial(bigclass.contrastive_loss, direction="text")),
    "sigmoid_contrastive": partial(images, bigclass.sigmoid_contrastive_loss),
    "arcface": partial(margin, "arcface"),
    "cosface": partial(margin, "cosface"),
}  # fmt: skip

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def operands(dtype=torch.float64, kind="popular"):
    """Leaves x, w, b and targets, with what margin and contrastive losses need to have negligible classes too."""
    return draw(kind, N, C, D, dtype, seed=3)


@every_loss
@pytest.mark.parametrize("plan", ["forward", "recompute"])
def test_every_loss_leaves_out_what_is_small_and_nothing_else(loss, plan):
    x, w, b, y = operands()
    with tiles(32, 128, 16), bigclass.planning(gradients=plan):
        values = [loss(x, w, y, linear_bias=b, grad_filter=t, engine="tiled") for t in (0.25, None)]
        made, exact = (gradients(v.sum(), x, w, b) for v in values)
    assert torch.equal(*values)
    errors = [float((a - e).norm() / e.norm()) for a, e in zip(made[:2], exact[:2], strict=True)]
    assert 0.0 < max(errors) < 0.5, "nothing was left out, or too much"


@every_loss
def test_the_dense_engine_and_small_problems_are_exact(loss):
    x, w, b, y = operands()
    for engine in ("dense", "auto"):
        made, exact = (gradients(loss(x, w, y, linear_bias=b, grad_filter=t, engine=engine).sum(), x, w) for t in (0.25, None))
        for a, e in zip(made, exact, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-14)


BAD = {
    "0": 0, "0.0": 0.0, "negative": -0.1, "NaN": math.nan, "1": 1.0, "above 1": 2.0, "infinite": math.inf,
    "True": True, "string": "2**-8", "tensor": torch.tensor(0.1), "list": [0.1],
}  # fmt: skip


@every_loss
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_tolerance_is_refused(name, loss):
    x, w, b, y = operands()
    value = BAD[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    with pytest.raises(ValueError if number else TypeError, match=r"^grad_filter: expected None") as caught:
        loss(x, w, y, linear_bias=b, grad_filter=value)
    assert isinstance(caught.value, RuntimeError) and repr(value) in str(caught.value)


@pytest.mark.parametrize("engine", ["auto", "dense", "tiled"])
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 2.0**-24)])
def test_below_the_rounding_of_products_nothing_can_be_promised(dtype, least, engine):
    x, w, b, y = operands(dtype)
    with pytest.raises(ValueError, match=r"^grad_filter: products of .* round by up to .* cannot be promised.*None"):
        CE(x, w, y, linear_bias=b, grad_filter=least / 2, engine=engine)
    CE(x, w, y, linear_bias=b, grad_filter=least, engine=engine)


def test_autocast_decides_what_products_round_to():
    x, w, b, y = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"^grad_filter: products of bfloat16"):
        CE(x, w, y, linear_bias=b, grad_filter=2.0**-10)


DENSE = {
    "cross_entropy": lambda x, w, t, **k: CE(x, w, t, **k),
    "smoothed": lambda x, w, t, **k: CE(x, w, t, label_smoothing=0.1, **k),
    "bce": lambda x, w, t, **k: bigclass.linear_binary_cross_entropy(x, w, t, **k),
    "asymmetric, bool": lambda x, w, t, **k: bigclass.linear_asymmetric_loss(x, w, t > 0.5, **k),
}


@pytest.mark.parametrize("loss", DENSE.values(), ids=DENSE.keys())
@pytest.mark.parametrize("engine", ["auto", "dense", "tiled"])
def test_dense_targets_are_refused(loss, engine):
    """Pitfall 44: which entries are the targets' is not known there, and beside them the rest of a uniform row is negligible."""
    x, w, _, y = operands()
    with pytest.raises(ValueError, match=r"^grad_filter: .*dense target.*SparseTarget"):
        loss(x, w, F.one_hot(y, C).double(), grad_filter=2.0**-6, engine=engine)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_contrastive_losses_keep_the_promise_for_blocks_of_images(sigmoid):
    """Texts are the identity, so that the images' gradient is that of the logits, of both directions together."""
    x, w, _, y = draw("peaked", 48, 48, 48, identity=True, seed=5)
    function = bigclass.sigmoid_contrastive_loss if sigmoid else bigclass.contrastive_loss
    with tiles(20, 30, 8):
        made, exact = (
            gradients(function(x, w, 2.0, logit_bias=-6.0, positives=y, grad_filter=t, engine="tiled"), x)[0] / 2.0 for t in (0.125, None)
        )
    assert 0.0 < max(ratios(made, exact, y[:, None], blocks(48, 20, 8))) <= 0.125


@pytest.mark.parametrize("bits", [torch.float64, torch.bfloat16])
def test_adapters_are_filtered_with_the_weight(bits):
    x, w, b, y = operands(bits)
    g = torch.Generator().manual_seed(0)
    a, v = torch.randn(4, D, generator=g).to(bits).requires_grad_(), torch.randn(C, 4, generator=g).to(bits).requires_grad_()
    w = w.detach()

    def made(t):
        return gradients(CE(x, w, y, linear_bias=b, lora=(a, v, 0.5), grad_filter=t, engine="tiled"), x, a, v, b)

    some, exact = made(TOLERANCE), made(None)
    for s, e in zip(some[:3], exact[:3], strict=True):
        assert 0.0 < float((s - e).norm() / e.norm()) < 0.1
    assert torch.equal(some[3], exact[3])


# --- update=


@pytest.mark.parametrize("loss", [CE, partial(bigclass.linear_binary_cross_entropy, reduction="batchmean"), partial(margin, "arcface")])
def test_a_weight_that_is_updated_slab_by_slab_gets_the_filtered_gradient(loss):
    x, w, b, y = operands()
    with tiles(32, 64, 16):
        with bigclass.planning(gradients="recompute"):
            dx, dw = gradients(loss(x, w, y, linear_bias=b, grad_filter=TOLERANCE, engine="tiled"), x, w)
        exact = gradients(loss(x, w, y, linear_bias=b, engine="tiled"), w)[0]
        loss(x, w, y, linear_bias=b, grad_filter=TOLERANCE, engine="tiled", update=bigclass.GradAccumulator()).backward()
    assert w.grad is not None and x.grad is not None and not torch.equal(w.grad, exact)
    torch.testing.assert_close(w.grad, dw, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(x.grad, dx, rtol=1e-10, atol=1e-14)


# --- what it says


def test_stats_without_a_filter_are_numbers():
    x, w, b, y = operands()
    _, stats = CE(x, w, y, linear_bias=b, return_stats=True, engine="tiled")
    assert (stats.kept_share, stats.promised_error) == (1.0, 0.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_stats_are_filled_in_by_the_backward(reduction):
    x, w, b, y = operands()
    loss, stats = CE(x, w, y, linear_bias=b, grad_filter=TOLERANCE, reduction=reduction, return_stats=True, engine="tiled")
    assert stats.kept_share.shape == stats.promised_error.shape == () and stats.kept_share.isnan() and stats.promised_error.isnan()
    assert not stats.kept_share.requires_grad
    loss.sum().backward(retain_graph=True)
    first = float(stats.kept_share), float(stats.promised_error)
    assert 0.0 < first[0] < 0.5 and 0.0 < first[1] <= TOLERANCE
    loss.sum().backward()
    assert (float(stats.kept_share), float(stats.promised_error)) == first


@pytest.mark.parametrize("engine", ["auto", "dense"])
def test_stats_of_a_problem_that_runs_dense_say_that_it_is_exact(engine):
    x, w, b, y = operands()
    loss, stats = CE(x, w, y, linear_bias=b, grad_filter=TOLERANCE, return_stats=True, engine=engine)
    loss.backward()
    assert (float(stats.kept_share), float(stats.promised_error)) == (1.0, 0.0)


def test_stats_under_activation_checkpointing_are_those_of_the_loss_that_is_returned():
    x, w, b, y = operands()

    def block(x):
        return CE(x, w, y, linear_bias=b, grad_filter=TOLERANCE, return_stats=True, engine="tiled")

    loss, stats = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    loss.backward()
    assert 0.0 < float(stats.kept_share) < 0.5


@pytest.mark.parametrize("engine", ["tiled", "dense"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_stats_of_a_compiled_loss_are_filled_in_too(backend, engine):
    """The tensor that a graph returned is written to by its backward, which no graph can say."""
    if backend == "inductor" and engine == "dense":
        return
    torch._dynamo.reset()

    def step(x, w, b, y):
        loss, stats = CE(x, w, y, linear_bias=b, grad_filter=TOLERANCE, return_stats=True, engine=engine)
        return 2.0 * loss, stats.kept_share, stats.promised_error

    x, w, b, y = operands(torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    expected = step(x, w, b, y)
    exact = gradients(expected[0], x, w, b)
    for _ in range(2):
        loss, share, error = compiled(x, w, b, y)
        assert engine == "dense" or share.isnan()
        made = gradients(loss, x, w, b)
        assert (float(share), float(error)) == pytest.approx((float(expected[1]), float(expected[2])))
        for a, e in zip(made, exact, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-7)
    assert engine == "dense" or float(share) < 0.5


def test_a_k_dimensional_loss_is_filtered_but_has_no_report():
    x, w, b, y = operands()
    ws, bs, ys = torch.stack((w, 0.5 * w), 1), torch.stack((b, b), 1), torch.stack((y, y.flip(0)), 1)
    with pytest.raises(ValueError, match=r"^return_stats: of a K-dimensional loss"):
        CE(x, ws, ys, linear_bias=bs, grad_filter=TOLERANCE, return_stats=True)
    made, exact = (gradients(CE(x, ws, ys, linear_bias=bs, grad_filter=t, engine="tiled"), x)[0] for t in (TOLERANCE, None))
    assert 0.0 < float((made - exact).norm() / exact.norm()) < 0.1


def test_every_loss_over_a_layer_has_the_argument():
    named = [name for name in bigclass.__all__ if name.startswith("linear_") or name.endswith("contrastive_loss")]
    exempt = {"linear_topk", "linear_kl_div", "linear_topk_kl_div"}  # no gradient; two streams; a teacher's
    exempt |= {name for name in named if "options" in inspect.signature(getattr(bigclass, name)).parameters}  # hands them on
    without = [name for name in named if "grad_filter" not in inspect.signature(getattr(bigclass, name)).parameters]
    assert set(without) <= exempt


# --- ranks


def of_a_rank(rank: int, world: int) -> dict[str, float]:
    """||G' left out|| / ||G'|| of a rank's worst block."""
    found = {}
    x, w, _, _ = draw("peaked", 48, 48, 48, identity=True, seed=5)
    own = slice(24 * rank, 24 * (rank + 1))
    y = torch.arange(48)[own]
    x = (x.detach() + 8.0 * torch.eye(48, dtype=torch.float64))[own]
    for sigmoid in (False, True):
        function = bigclass.sigmoid_contrastive_loss if sigmoid else bigclass.contrastive_loss
        for exchange in ("gather", "ring"):
            made = []
            for tolerance in (0.125, None):
                a, b = x.clone().requires_grad_(), w.detach()[own].clone().requires_grad_()
                with tiles(16, 20, 8):
                    loss = function(
                        a, b, 2.0, logit_bias=-9.0, grad_filter=tolerance, group=dist.group.WORLD, exchange=exchange, engine="tiled"
                    )
                    loss.backward()
                made.append((loss.detach(), a.grad, b.grad))
            assert torch.equal(made[0][0], made[1][0])
            found[f"{exchange} {sigmoid}"] = max(ratios(made[0][1], made[1][1], y[:, None], blocks(24, 16, 8)))
    return found


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_each_rank_keeps_the_promise_over_the_texts_of_all():
    for found in run_ranks(of_a_rank, 2):
        for name, worst in found.items():
            assert 0.0 < worst <= 0.125, name

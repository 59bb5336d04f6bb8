"""Sizes that only a GPU has room for: more than 2^31 elements, and memory that stays within what is planned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bigclass

from .support import DEVICE, ENGINES, at, every_engine, every_road, needs_cuda, peak

GIB = 1 << 30
# 2.4e9 logits, 2.56e9 weights, each beyond 2^31 = 2.15e9
N_C = at((40000, 60000, 64), (40, 150, 16))
C_D = at((64, 5_000_000, 512), (16, 200, 16))
PAIRS = at(50000, 60)


def need(gib: int) -> None:
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < gib * GIB:
        pytest.skip(f"needs {gib} GiB of device memory")


def last_class(n: int, c: int, d: int) -> tuple[Tensor, Tensor]:
    """Leaves whose logits are 8 at the last class and 0 elsewhere."""
    x = torch.zeros(n, d, device=DEVICE, dtype=torch.bfloat16)
    w = torch.zeros(c, d, device=DEVICE, dtype=torch.bfloat16)
    x[:, 0], w[-1, 0] = 1.0, 8.0
    return x.requires_grad_(), w.requires_grad_()


def check_gradients(x: Tensor, w: Tensor, last: float, other: float) -> None:
    """last, other: the sums over rows of the gradients of logits at the last class and elsewhere. Pitfall 11: the ends are right, too."""
    assert x.grad is not None and w.grad is not None
    found = [float(t) for t in (w.grad[-1, 0], w.grad[0, 0], w.grad[-2, 0], x.grad[0, 0], x.grad[-1, 0])]
    per_row = 8.0 * last / len(x)
    for got, want in zip(found, (last, other, other, per_row, per_row), strict=True):
        assert math.isclose(got, want, rel_tol=2e-2), (found, last, other, per_row)


@every_road
@pytest.mark.parametrize(("n", "c", "d"), [N_C, C_D], ids=["N x C", "C x D"])
def test_cross_entropy_of_more_than_two_to_the_31_elements(road, n, c, d):
    need(40)
    x, w = last_class(n, c, d)
    y = torch.full((n,), c - 1, device=DEVICE)
    y[0] = 0
    rows = bigclass.linear_cross_entropy(x.detach(), w.detach(), y, engine=road[0], reduction="none")
    assert isinstance(rows, Tensor)
    lse = math.log(c - 1 + math.exp(8.0))
    assert math.isclose(float(rows[-1]), lse - 8.0, rel_tol=1e-5) and math.isclose(float(rows[0]), lse, rel_tol=1e-5)
    y[0] = c - 1
    with bigclass.planning(gradients=road[1]):
        loss = bigclass.linear_cross_entropy(x, w, y, engine=road[0], reduction="sum")
    assert isinstance(loss, Tensor)
    loss.backward()
    check_gradients(x, w, n * (math.exp(8.0 - lse) - 1.0), n * math.exp(-lse))


@every_engine
def test_one_vs_all_of_more_than_two_to_the_31_logits(engine):
    need(40)
    n, c, d = N_C
    x, w = last_class(n, c, d)
    loss = bigclass.linear_binary_cross_entropy(x, w, torch.full((n, 1), c - 1, device=DEVICE), reduction="sum", engine=engine)
    assert math.isclose(float(loss), n * ((c - 1) * math.log(2.0) + math.log1p(math.exp(-8.0))), rel_tol=1e-5)
    loss.backward()
    check_gradients(x, w, -n / (1.0 + math.exp(8.0)), 0.5 * n)


@every_engine
def test_log_probabilities_and_the_largest_of_more_than_two_to_the_31_logits(engine):
    need(40)
    n, c, d = N_C
    x, w = last_class(n, c, d)
    index = torch.tensor([0, c - 1], device=DEVICE).expand(n, 2)
    with torch.no_grad():
        logp, entropy = bigclass.linear_log_prob(x, w, index, return_entropy=True, engine=engine)
        values, best = bigclass.linear_topk(x, w, 1)
    lse = math.log(c - 1 + math.exp(8.0))
    for row in (0, -1):
        assert math.isclose(float(logp[row, 0]), -lse, rel_tol=1e-5) and math.isclose(float(logp[row, 1]), 8.0 - lse, rel_tol=1e-5)
        assert math.isclose(float(entropy[row]), lse - 8.0 * math.exp(8.0 - lse), rel_tol=1e-4)
        assert int(best[row, 0]) == c - 1 and float(values[row, 0]) == 8.0


@every_engine
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_contrastive_losses_of_more_than_two_to_the_31_pairs(engine, sigmoid):
    """All images point the same way, and the last text alone with them."""
    need(40)
    n = PAIRS
    image, text = last_class(n, n, 64)
    if sigmoid:
        loss = bigclass.sigmoid_contrastive_loss(image, text, 1.0, logit_bias=0.0, engine=engine)
        positive = math.log1p(math.exp(-8.0)) + (n - 1) * math.log(2.0)  # the last pair, the others
        negative = (n - 1) * math.log1p(math.exp(8.0)) + (n - 1) * (n - 1) * math.log(2.0)
        expected = (positive + negative) / n
    else:
        loss = bigclass.contrastive_loss(image, text, 1.0, engine=engine)
        expected = (math.log(n - 1 + math.exp(8.0)) - 8.0 / n + math.log(n)) / 2
    assert math.isclose(float(loss), expected, rel_tol=1e-4)
    loss.backward()
    assert image.grad is not None and text.grad is not None
    assert image.grad.isfinite().all() and text.grad.isfinite().all() and text.grad[-1].any() and image.grad[-1].any()


# Memory

MEMORY = (4096, 128256, 2048)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    n, c, d = MEMORY
    x = torch.randn(n, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(c, d, device=DEVICE, dtype=torch.bfloat16) * d**-0.5).requires_grad_()
    return x, w, torch.randint(c, (n,), device=DEVICE)


@needs_cuda
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gradients", ["forward", "recompute", "saved"])
def test_memory_stays_within_what_is_planned(engine, gradients):
    n, c, d = MEMORY
    x, w, y = operands()
    with bigclass.planning(gradients=gradients):
        workspace = bigclass.explain(n, c, d, dtype=torch.bfloat16, device="cuda", engine=engine).workspace
    # "forward" makes them in fp32, and casts them when its workspace is free again
    made = 4 * (x.numel() + w.numel()) if gradients == "forward" else x.nbytes + w.nbytes
    limit = workspace + made + (16 << 20)

    def run() -> None:
        with bigclass.planning(gradients=gradients):
            loss = bigclass.linear_cross_entropy(x, w, y, engine=engine)
        torch.autograd.grad(loss, (x, w))  # pyright: ignore[reportArgumentType, reportCallIssue]

    run()  # what tunes itself on first sight of a shape allocates for it
    extra = peak(run)
    assert extra <= limit, f"{extra / 2**20:.0f} MiB, at most {limit / 2**20:.0f}"


@needs_cuda
@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_alone_takes_its_workspace_and_no_more(engine):
    n, c, d = MEMORY
    x, w, y = operands()
    limit = bigclass.explain(n, c, d, dtype=torch.bfloat16, device="cuda", requires_grad=False, engine=engine).workspace + (4 << 20)
    with torch.no_grad():
        bigclass.linear_cross_entropy(x, w, y, engine=engine)
        extra = peak(lambda: bigclass.linear_cross_entropy(x, w, y, engine=engine))
    assert extra <= limit, f"{extra / 2**20:.1f} MiB, at most {limit / 2**20:.1f}"


@needs_cuda
@pytest.mark.parametrize("engine", ENGINES)
def test_a_weight_that_is_updated_in_the_backward_has_no_gradient(engine):
    """Slabs of a C x D gradient, one at a time; frozen weights have none either."""
    x, w, y = operands()
    optimizer = bigclass.optim.SlabSGD([w], lr=1e-3)

    def run() -> None:
        loss = bigclass.linear_cross_entropy(x, w, y, engine=engine, update=optimizer)
        assert isinstance(loss, Tensor)
        torch.autograd.grad(loss, x)

    run()
    updated = peak(run)
    frozen = peak(lambda: bigclass.linear_cross_entropy(x, w.detach(), y, engine=engine))
    whole = 4 * w.numel()
    assert updated < 1.3 * GIB or updated < 0.5 * whole, f"{updated / 2**20:.0f} MiB"
    assert frozen < 1.2 * GIB, f"{frozen / 2**20:.0f} MiB"

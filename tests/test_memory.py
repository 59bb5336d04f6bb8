"""Peak memory above inputs and returned gradients, measured in processes of their own."""

from __future__ import annotations

import pytest
import torch

import bigclass
from bigclass.demo.memory import peak_extra_bytes, resident_peak

MIB = 1 << 20

pytestmark = pytest.mark.skipif(resident_peak() is None, reason="this system does not tell a process's peak memory")


def loss_and_gradients(n: int, c: int, d: int, dtype: torch.dtype, gradients: str, options: dict):
    """The call to be measured, warmed up on a small problem of its own kind (the first use of a custom op imports much)."""

    def make(n: int, c: int, d: int):
        x = torch.randn(n, d, dtype=dtype, requires_grad=True)
        w = (torch.randn(c, d) * 0.1).to(dtype).requires_grad_()
        return x, w, torch.randint(0, c, (n,))

    def run(x, w, y):
        with bigclass.planning(gradients=gradients):
            bigclass.linear_cross_entropy(x, w, y, engine="tiled", **options).backward()
        return x.grad, w.grad

    for _ in range(2):
        run(*make(64, 3000, d))
    problem = make(n, c, d)
    return lambda: run(*problem)


def topk(n: int, c: int, d: int, k: int):
    x, w = torch.randn(n, d), torch.randn(c, d)
    bigclass.linear_topk(x[:8], w[:70000], k, engine="tiled")
    return lambda: bigclass.linear_topk(x, w, k)


def peak(*args) -> float:
    measured = peak_extra_bytes(*args)
    assert measured is not None
    return measured / MIB


def test_the_default_workspace_holds_at_4096_by_256000():
    """Dense needs over 8 GB here."""
    assert peak(loss_and_gradients, 4096, 256000, 256, torch.float32, "auto", {}) <= 96


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@pytest.mark.parametrize(("n", "c"), [(512, 20000), (4096, 20000), (512, 160000)])
def test_memory_does_not_grow_with_rows_or_classes(gradients, n, c):
    assert peak(loss_and_gradients, n, c, 32, torch.float32, gradients, {}) <= 96


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1}, {"softcap": 5.0, "z_loss": 1e-4}, {"reduction": "sum", "return_stats": False}]
)
def test_options_stay_within_the_workspace(options):
    assert peak(loss_and_gradients, 2048, 60000, 32, torch.float32, "auto", options) <= 96


def test_half_types_add_one_fp32_dw_in_the_forward_plan_and_nothing_in_the_recompute_plan():
    c, d = 60000, 256
    wide = c * d * 4 / MIB
    assert peak(loss_and_gradients, 1024, c, d, torch.bfloat16, "recompute", {}) <= 96
    assert wide * 0.5 <= peak(loss_and_gradients, 1024, c, d, torch.bfloat16, "forward", {}) <= 96 + wide


def no_gradients(n: int, c: int, d: int, dtype: torch.dtype):
    def run(n: int, c: int):
        x, w, y = torch.randn(n, d).to(dtype), torch.randn(c, d).to(dtype), torch.randint(0, c, (n,))
        return lambda: (bigclass.linear_cross_entropy(x, w, y, engine="tiled"), *bigclass.linear_topk(x, w, 3, engine="tiled"))

    run(64, 3000)()
    return run(n, c)


@pytest.mark.parametrize(("n", "c", "d"), [(4, 100000, 256), (140, 60000, 1024)])
def test_no_half_precision_weight_is_widened_whole(n, c, d):
    """Few rows would make a slab of many classes; its fp32 copy counts."""
    assert peak(no_gradients, n, c, d, torch.bfloat16) <= 64


def test_prediction_over_three_million_classes_needs_under_64_mib():
    assert peak(topk, 256, 3_000_000, 64, 5) <= 64


def lazy_step(n: int, c: int, d: int, case: str):
    """One step of an unchanged loop: features -> head -> criterion -> backward."""

    def make(n: int, c: int):
        head, x, y = bigclass.CCEHead(d, c, engine="tiled"), torch.randn(n, d, requires_grad=True), torch.randint(0, c, (n,))
        if case == "mixup":
            lam = torch.rand(n, 1)
            return head, x, bigclass.SparseTarget(torch.stack((y, y.flip(0)), 1), torch.cat((lam, 1 - lam), 1), c, 1e-6)
        return head, x, y

    def run(head, x, y):
        logits = head(x)
        if case == "soft cap":
            logits = torch.tanh(logits.float() / 30.0) * 30.0
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1 if case == "smoothed" else 0.0)
        if case == "log-softmax":  # as timm writes label smoothing
            logp = torch.nn.functional.log_softmax(logits, dim=-1)
            loss = (-0.9 * logp.gather(dim=-1, index=y.unsqueeze(1)).squeeze(1) - 0.1 * logp.mean(dim=-1)).mean()
        else:
            loss = criterion(logits, y)
        loss.backward()
        return x.grad, head.weight.grad, head.bias.grad

    for _ in range(2):
        run(*make(64, 3000))
    problem = make(n, c)
    return lambda: run(*problem)


@pytest.mark.parametrize("case", ["plain", "smoothed", "soft cap", "mixup", "log-softmax"])
def test_a_lazy_step_over_a_hundred_thousand_classes_holds(case):
    """Dense keeps several times 900 MiB here."""
    assert peak(lazy_step, 2048, 115217, 256, case) <= 96

"""The certified filter on a GPU, where the fused engine has it: the promise, what stays exact, that it acts, and that nothing waits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass
from tests.support import error

from .support import DEVICE, at, captured, needs_cuda, no_sync, same_bits, wide

PLANS = ("forward", "recompute")
every_plan = pytest.mark.parametrize("plan", PLANS)
# (dtype, tolerance): bf16 can promise nothing below 2^-8
TOLERANCES = [
    (torch.bfloat16, 2.0**-8),
    (torch.bfloat16, 2.0**-6),
    (torch.float16, 2.0**-8),
    (torch.float32, 2.0**-10),
    (torch.float32, 2.0**-6),
]
every_tolerance = pytest.mark.parametrize(
    ("dtype", "tolerance"), TOLERANCES, ids=lambda v: f"2^{math.log2(v):g}" if isinstance(v, float) else str(v)
)

N, C, D = at((5000, 20000, 256), (40, 150, 24))  # more rows than one block of the filter has


def popular(n: int, c: int, d: int | None, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Peaked leaves x, w, b and targets y: few classes are likely, of all others the gradient is small. d None: w = 1 (C = D)."""
    g = torch.Generator().manual_seed(seed)
    likely = 4.0 * torch.randn(c, generator=g)
    y = torch.multinomial(likely.exp(), n, replacement=True, generator=g)
    w = torch.eye(c) if d is None else torch.randn(c, d, generator=g) * d**-0.5
    x = torch.randn(n, w.shape[1], generator=g)
    if d is None:
        x, b = x + likely, torch.zeros(c)
    else:
        x, b = x + 2.0 * F.normalize(w[y], dim=1), likely
    y[::9] = -100
    return *(t.to(DEVICE, dtype).requires_grad_() for t in (x, w, b)), y.to(DEVICE)


def filtered(x: Tensor, w: Tensor, b: Tensor, y: Tensor, plan: str, tolerance: float | None, engine: str = "fused") -> list[Tensor]:
    """Loss, dx, dw, db, kept share, promised error."""
    with bigclass.planning(gradients=plan):
        loss, stats = bigclass.linear_cross_entropy(
            x, w, y, linear_bias=b, reduction="sum", z_loss=1e-3, grad_filter=tolerance, engine=engine, return_stats=True
        )
    made = torch.autograd.grad(loss, (x, w, b))
    return [loss.detach(), *made, *(torch.as_tensor(t, device=DEVICE) for t in (stats.kept_share, stats.promised_error))]


@every_plan
@every_tolerance
def test_what_is_lost_of_the_gradient_is_within_the_promise(plan, dtype, tolerance):
    """With w = 1 the features' gradient is that of the logits, which float64 knows: without its targets' entries what is lost is at most
    the tolerance, beside what rounding loses without a filter; the targets' own entries lose nothing."""
    x, w, b, y = popular(at(4500, 40), at(2048, 150), None, dtype)
    truth = filtered(wide(x), wide(w), wide(b), y, "auto", None, "dense")[1]
    targets = torch.zeros_like(truth, dtype=torch.bool).scatter_(1, y.clamp_min(0)[:, None], True)
    g = truth.masked_fill(targets, 0.0)
    plain = filtered(x, w, b, y, plan, None)[1]
    loss, dx, *_, kept, promised = filtered(x, w, b, y, plan, tolerance)
    assert float(kept) < 0.6 and 0.0 < float(promised) <= tolerance, f"kept {float(kept):.2f}, promised {float(promised):.1e}"
    lost, rounding = (float((t.double() - truth).masked_fill(targets, 0.0).norm() / g.norm()) for t in (dx, plain))
    assert lost <= float(promised) * 1.001 + 1.1 * rounding + 1e-6, f"lost {lost:.2e}, of rounding {rounding:.2e}"
    assert lost > rounding, "the filter did not act"
    at_targets = [error(t[targets], truth[targets]) for t in (dx, plain)]
    assert at_targets[0] <= 1.1 * at_targets[1] + 1e-6
    assert loss.isfinite()


@every_plan
@every_tolerance
def test_the_loss_and_the_bias_keep_what_they_are_and_both_products_are_close(plan, dtype, tolerance):
    x, w, b, y = popular(N, C, D, dtype)
    truth = filtered(wide(x), wide(w), wide(b), y, "auto", None, "dense")
    plain = filtered(x, w, b, y, plan, None)
    made = filtered(x, w, b, y, plan, tolerance)
    assert float(made[4]) < 0.6 and 0.0 < float(made[5]) <= tolerance
    for i in (0, 3):
        assert error(made[i], truth[i]) <= 1.1 * error(plain[i], truth[i]) + 1e-6
    for i in (1, 2):
        assert made[i].any() and error(made[i], truth[i]) <= 8 * tolerance + error(plain[i], truth[i])


@every_plan
def test_nothing_is_left_out_where_the_gradient_is_spread_evenly(plan):
    x, w, b, y = popular(N, C, D, torch.bfloat16)
    with torch.no_grad():
        x.mul_(0.03), b.zero_()
    made, plain = filtered(x, w, b, y, plan, 2.0**-6), filtered(x, w, b, y, plan, None)
    assert float(made[4]) == 1.0 and float(made[5]) == 0.0
    for a, t in zip(made[:4], plain[:4], strict=True):
        assert error(a, t) < 4e-3


@every_plan
def test_the_same_bits_every_run_and_nothing_waits(plan):
    p = popular(N, C, D, torch.bfloat16)
    first = filtered(*p, plan, 2.0**-6)
    with no_sync():
        again = filtered(*p, plan, 2.0**-6)
    assert same_bits(first, again)


@needs_cuda
@every_plan
def test_a_cuda_graph_replays_with_other_columns_kept(plan):
    """How many are kept is data: none of it may be frozen in the graph."""
    x, w, b, y = popular(N, C, D, torch.bfloat16)
    graph, made = captured(lambda: filtered(x, w, b, y, plan, 2.0**-6))
    for scale in (1.0, 0.03):  # other classes; then nothing to leave out
        other = popular(N, C, D, torch.bfloat16, seed=1)
        with torch.no_grad():
            for t, new in zip((x, w, b, y), other, strict=True):
                t.copy_(new)
            x.mul_(scale), b.mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(made, filtered(x, w, b, y, plan, 2.0**-6))


def log_probability(x: Tensor, w: Tensor, b: Tensor, y: Tensor, **options) -> Tensor:
    logp, entropy = bigclass.linear_log_prob(x, w, y, linear_bias=b, return_entropy=True, **options)
    return logp.sum() - 0.1 * entropy.sum()


CE, FOCAL = bigclass.linear_cross_entropy, bigclass.linear_focal_loss
LOSSES = {
    "rows": lambda x, w, b, y, **o: bigclass.linear_cross_entropy(x, w, y, linear_bias=b, reduction="none", **o).sum(),
    "smoothed, capped": lambda x, w, b, y, **o: CE(x, w, y, linear_bias=b, label_smoothing=1e-4, softcap=30.0, **o),
    "log-probability, entropy": log_probability,
    "multi-token": lambda x, w, b, y, **o: bigclass.linear_multi_token_cross_entropy(
        x.view(4, -1, x.shape[1]), w, y.view(4, -1), linear_bias=b, shifts=(1, 2), **o
    ),
    "bce": lambda x, w, b, y, **o: bigclass.linear_binary_cross_entropy(
        x, w, y.clamp_min(-1)[:, None], linear_bias=b - 8.0, reduction="batchmean", **o
    ),
    "focal": lambda x, w, b, y, **o: FOCAL(x, w, y.clamp_min(-1)[:, None], linear_bias=b - 4.0, reduction="batchmean", **o),
    "zlpr": lambda x, w, b, y, **o: bigclass.linear_zlpr_loss(x, w, y.clamp_min(-1)[:, None], linear_bias=b - 8.0, **o),
    "contrastive": lambda x, w, b, y, **o: bigclass.contrastive_loss(
        torch.cat((x, torch.ones_like(x[:, :1])), 1), torch.cat((w, b[:, None]), 1), 1.0, positives=y.clamp_min(-1), direction="image", **o
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_that_takes_a_filter_is_close_the_same_bits_and_does_not_wait(loss):
    leaves = popular(at(1000, 40), at(20000, 150), D, torch.bfloat16)
    x, w, b, y = leaves

    def gradients(leaves, **options):
        made = loss(*leaves, y, **options)
        return [made, *torch.autograd.grad(made, leaves)]

    truth = gradients([wide(t) for t in (x, w, b)], engine="dense")
    first = gradients((x, w, b), grad_filter=2.0**-6, engine="fused")
    with no_sync():
        again = gradients((x, w, b), grad_filter=2.0**-6, engine="fused")
    assert same_bits(first, again)
    assert error(first[0], truth[0]) < 1e-3
    for got, want in zip(first[1:3], truth[1:3], strict=True):
        assert got.any() and error(got, want) < 8 * 2.0**-6

"""The numeric contract on a GPU: no less exact than dense in the same dtype, on every kind of data; what only the core can ask for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bigclass
from bigclass.core import LogSumExp, ShiftedMoment, Softcap, Stream, Total, entropy, log_sum_exp, reduce_logits
from bigclass.losses.margin import linear_margin_loss
from tests.losses.margin_support import dense_margin_loss
from tests.support import KINDS, error, exact_nll

from .cases import factors
from .support import DEVICE, ON_CPU, at, check_close, every_dtype, every_engine, every_road, ours, problem, wide

# Aligned and ragged: the last takes descriptors throughout, the second none (a row of 70 half floats is not 16 bytes wide).
SHAPES = at([(1000, 5003, 320), (257, 30000, 70), (512, 4096, 768)], [(70, 300, 40), (65, 257, 7)])


def exact(x, w, b, y):
    leaves = [wide(t, True) for t in (x, w, b)]
    loss = exact_nll(F.linear(*leaves), y).mean()
    return [loss, *torch.autograd.grad(loss, leaves)]


def dense(x, w, b, y):
    loss = F.cross_entropy(F.linear(x, w, b), y)
    return [loss, *torch.autograd.grad(loss, (x, w, b))]


@every_road
@every_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_output_and_no_gradient_is_less_exact_than_dense(road, dtype, kind, shape):
    pools = [[[], [], []] for _ in range(4)]
    for seed in range(at(3, 1)):
        p = problem(kind, *shape, dtype, seed)
        for pool, *zs in zip(pools, ours(*p, road), dense(*p), exact(*p), strict=True):
            for column, z in zip(pool, zs, strict=True):
                column.append(z.detach().double().flatten())
    for name, pool in zip(("loss", "dx", "dw", "db"), pools, strict=True):
        mine, other, truth = (torch.cat(part) for part in pool)
        if not other.isfinite().all():
            assert mine.isfinite().all(), name  # fp16 logits of the dense form overflow
            continue
        assert error(mine, truth) <= 1.1 * error(other, truth) + 4 * 2.0**-24, (
            f"{name}: {error(mine, truth):.2e}, dense {error(other, truth):.2e}"
        )
        if kind == "onehot" and dtype != torch.float16 and shape[2] >= 16:
            assert error(mine, truth) <= (1e-4 if dtype == torch.float32 else 4e-3), name


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folds_columns_picks_and_pairs(engine, dtype):
    torch.manual_seed(0)
    n, c = at((333, 2050), (33, 90))
    made = [(torch.randn(n, d) * d**-0.5, torch.randn(c, d)) for d in (96, 8)]
    pairs = tuple((x.to(DEVICE, dtype).requires_grad_(), w.to(DEVICE, dtype).requires_grad_()) for x, w in made)
    scale, bias = (torch.rand(c) + 0.5).to(DEVICE), torch.randn(c).to(DEVICE)
    picks = torch.randint(-1, c, (n, 40)).to(DEVICE)
    folds = (LogSumExp(exclude_picks=True), ShiftedMoment(), Total(), LogSumExp(axis="columns"))

    def run(pairs, scale, bias, engine):
        stream = Stream(pairs, bias=bias, class_scale=scale, scale=0.7, maps=(Softcap.at(5.0),))
        states, picked = reduce_logits(stream, picks, folds, engine=engine)
        outputs = [log_sum_exp(states[0]), entropy(states[1]), states[2][0] / c, log_sum_exp(states[3]), picked]
        return [*outputs, *torch.autograd.grad(sum((t * factors(t)).sum() for t in outputs), [t for pair in pairs for t in pair])]

    truth = run(tuple((wide(x), wide(w)) for x, w in pairs), scale.double(), bias.double(), "dense")
    check_close(run(pairs, scale, bias, engine), truth, 2e-5 if dtype == torch.float32 else 1e-2)


@every_road
@every_dtype
@pytest.mark.parametrize("options", [{}, {"subcenters": 4}, {"curriculum": torch.tensor(0.3)}, {"kind": "cosface"}], ids=str)
def test_margin_losses_are_their_formula(road, dtype, options):
    centres, t = options.get("subcenters", 1), options.get("curriculum")
    n = at(500, 40)
    x, w, _, y = problem("flat", n, at(3000, 80) * centres, at(256, 24), dtype)
    y = y // centres
    margins, beyond_pi = ((1.0, 0.0, 0.4), "plain") if "kind" in options else ((1.0, 0.5, 0.0), "linear")
    if t is not None:
        options = {**options, "curriculum": t.to(DEVICE)}
    target = torch.where(torch.arange(n, device=DEVICE) % 5 > 0, y, -100)
    kept = target >= 0

    def plain(x, w):
        rows = dense_margin_loss(x, w, y, margins, scale=16.0, centres=centres, beyond_pi=beyond_pi, t=None if t is None else float(t))
        return [rows[kept].mean(), *torch.autograd.grad(rows[kept].mean(), (x, w))]

    with bigclass.planning(gradients=road[1]):
        loss = linear_margin_loss(x, w, target, logit_scale=16.0, engine=road[0], **options)
    truth = plain(wide(x), wide(w))
    for z, other, true in zip([loss, *torch.autograd.grad(loss, (x, w))], plain(x, w), truth, strict=True):
        assert error(z, true) <= 1.1 * error(other, true) + 2e-6


@every_engine
@every_dtype
def test_no_pick_exceeds_its_own_log_sum_exp(engine, dtype):
    """Pitfall 12: a probability above 1 breaks policy gradients."""
    for seed in range(at(6, 1)):
        x, w, b, y = problem("onehot", at(500, 20), at(3000, 150), at(128, 32), dtype, seed)
        index = torch.stack((y, y.flip(0)), -1)
        lse, at_index = bigclass.linear_logsumexp(x, w, linear_bias=b, index=index, engine=engine)
        assert bool((at_index <= lse[:, None]).all())
        logp = bigclass.linear_log_prob(x, w, index, linear_bias=b, engine=engine)
        assert isinstance(logp, torch.Tensor) and bool((logp <= 0).all())


@every_road
@pytest.mark.skipif(ON_CPU, reason="of tensor cores")
def test_fp32_products_are_not_rounded_to_tf32(road):
    """Unless torch's own switch allows it."""
    x, w, b, y = problem("flat", 500, 3000, 1024, torch.float32)
    truth = exact(x, w, b, y)
    check_close(ours(x, w, b, y, road), truth, 3e-6)

"""Every loss of the public surface, its options, engines, plans and dtypes on a GPU: exact, the same bits, without waiting, in graphs."""

from __future__ import annotations

import pytest
import torch

from tests.support import error

from .cases import CASES, Case, outcome
from .support import LIMITS, Road, captured, check_close, needs_cuda, no_sync, same_bits, wide

WORKSPACE = 1 << 20  # several chunks of rows, several slabs of classes

# bf16, which is trained in, on every road; the others where the products differ: each engine, each plan
GRID = [
    pytest.param(case, (engine, plan), dtype, id=f"{name}-{engine}-{plan}-{str(dtype).removeprefix('torch.')}")
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
    for name, case in CASES.items()
    for engine in reversed(case.engines)
    for plan in case.plans
    if dtype == torch.bfloat16 or engine == "fused" or plan == case.plans[-1]
]
BY_ENGINE = [
    pytest.param(case, engine, id=f"{name}-{engine}") for name, case in CASES.items() for engine in reversed(case.engines) if not case.waits
]


@pytest.mark.parametrize(("case", "road", "dtype"), GRID)
def test_a_loss_is_that_of_float64_the_same_bits_every_run_and_nothing_waits_for_the_device(case: Case, road: Road, dtype: torch.dtype):
    leaves, run = case.make(dtype)
    truth = outcome([wide(t) for t in leaves], run, "dense", "auto")
    first = outcome(leaves, run, *road)  # compiles
    check_close(first, truth, LIMITS[dtype])
    if case.waits:
        again = outcome(leaves, run, *road)
    else:
        with no_sync():
            again = outcome(leaves, run, *road)
    assert same_bits(first, again)
    check_close(outcome(leaves, run, *road, WORKSPACE), truth, LIMITS[dtype])


@needs_cuda
@pytest.mark.parametrize(("case", "engine"), BY_ENGINE)
def test_a_cuda_graph_of_a_loss_replays_with_other_features(case: Case, engine: str):
    """Outputs and gradients are of what the features are at the replay."""
    leaves, run = case.make(torch.bfloat16)
    plan = case.plans[0]
    graph, made = captured(lambda: outcome(leaves, run, engine, plan))
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(made, outcome(leaves, run, engine, plan))


TRACED = [
    "cross-entropy, capped, smoothed, z-loss, scaled", "cross-entropy, class weights", "cross-entropy, mixup", "cross-entropy, statistics",
    "cross-entropy, adapters of a frozen weight", "cross-entropy, scale that learns", "log-probability, entropy", "log-sum-exp, picks",
    "top-k", "multi-token, sets", "bce", "asymmetric", "zlpr", "contrastive", "sigmoid contrastive", "arcface", "distillation",
    "distillation, stored",
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "engine"), [pytest.param(CASES[name], e, id=f"{name}-{e}") for name in TRACED for e in reversed(CASES[name].engines)]
)
def test_a_loss_compiles_to_one_graph(case: Case, engine: str):
    """Inductor's code for cross-entropy is in test_runs.py: here is what is traced, for every kind of loss."""
    leaves, run = case.make(torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(lambda leaves: run(leaves, engine), fullgraph=True, backend="aot_eager")
    made = outcome(leaves, lambda leaves, _: compiled(leaves), engine, "auto")
    check_close(made, outcome(leaves, run, engine, "auto"), 2e-3)


@pytest.mark.parametrize(
    ("case", "engine"), [pytest.param(CASES[name], e, id=f"{name}-{e}") for name in TRACED for e in reversed(CASES[name].engines)]
)
def test_autocast_multiplies_in_half_precision(case: Case, engine: str):
    """As on operands that were rounded before; outputs and gradients stay as wide as they are."""
    leaves, run = case.make(torch.float32)
    with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16):
        made = outcome(leaves, run, engine, "auto")
    truth = outcome([wide(t.bfloat16() if t.dim() == 2 else t, True) for t in leaves], run, "dense", "auto")
    for got in made:
        assert got.dtype not in (torch.bfloat16, torch.float16)
    check_close(made, truth, LIMITS[torch.bfloat16])


@pytest.mark.parametrize("engine", ["tiled", "fused"])
@pytest.mark.parametrize("name", ["cross-entropy", "log-probability, entropy", "bce", "contrastive", "arcface"])
def test_operands_that_are_frozen_transposed_or_expanded(name: str, engine: str):
    """Any strides; and what is frozen gets no gradient."""
    leaves, run = CASES[name].make(torch.bfloat16)
    truth = outcome([wide(t) for t in leaves], run, "dense", "auto")
    turned = [t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t for t in leaves]
    check_close(outcome(turned, run, engine, "auto"), truth, LIMITS[torch.bfloat16])
    apart = [torch.stack((t.detach(), t.detach()), -1)[..., 0].requires_grad_() for t in leaves]  # every other element
    assert not apart[0].is_contiguous()
    check_close(outcome(apart, run, engine, "auto"), truth, LIMITS[torch.bfloat16])
    for i in range(2):
        frozen = [t.detach().requires_grad_(j == i) for j, t in enumerate(leaves)]
        made = run(frozen, engine)
        total = sum(t.sum() for t in made if t.requires_grad)
        (gradient,) = torch.autograd.grad(total, [frozen[i]])
        whole = torch.autograd.grad(sum(t.sum() for t in run(leaves, engine) if t.requires_grad), [leaves[i]])
        assert gradient.any() and error(gradient, whole[0]) <= LIMITS[torch.bfloat16]

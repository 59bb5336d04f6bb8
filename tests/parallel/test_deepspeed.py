"""Every head under DeepSpeed's ZeRO-1, 2 and 3 on two gloo processes: the gradients and the training of one process."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigclass
from tests.parallel.engine_support import HEADS, build, gradients, llama, loss_of, moved, pairs, part, texts, whole, worst
from tests.support import error

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

STAGES = (1, 2, 3)
CLIP, RATE = 0.02, 5.0  # of gradients whose norms are 0.1 and more, but for those of the multi-label head


def start_deepspeed(rank: int, world: int) -> None:
    """DeepSpeed's communication over the process group that is there."""
    import deepspeed

    # On CPUs it would first compile an all-reduce of its own, which takes minutes and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # what a launcher would have set
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT="29500")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def engine_of(net: nn.Module, stage: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # small parameters are partitioned, too
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": CLIP,
    }
    return deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=RATE), config=config)[0]


def parameters_of(net: nn.Module) -> list[Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        return [whole(p) for p in net.parameters()]


def train(net: nn.Module, stage: int, loss: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Three steps: the first gradients, and how far the parameters moved."""
    from deepspeed.utils import safe_get_full_grad

    before = [whole(p) for p in net.parameters()]
    engine, first = engine_of(net, stage), {}
    for _ in range(3):
        engine.backward(loss(engine))
        first = first or {name: safe_get_full_grad(p) for name, p in net.named_parameters()}
        engine.step()
    after = parameters_of(net)
    return first, moved(after, before)


def every_stage(rank: int, world: int) -> dict[Any, Any]:
    warnings.simplefilter("error", bigclass.LogitsWarning)
    made: dict[Any, Any] = {}
    for stage in STAGES:
        for kind, explicit in pairs():
            net, x, targets = build(kind, dtype=torch.float32)
            x, targets = part(x, rank, world), part(targets, rank, world)
            made[stage, kind, explicit] = train(net, stage, lambda e, x=x, t=targets, k=kind, f=explicit: loss_of(e, x, t, k, f))
        for tied in (False, True):
            ids = part(texts(), rank, world)
            model = bigclass.convert_head(llama(tied).float(), engine="tiled")
            # under ZeRO-3 the linear layers gather their weights for every chunk
            bigclass.mini_sequence(model, chunk_tokens=5, group=dist.group.WORLD if stage == 3 else None)
            made[stage, "llama", tied] = train(model, stage, lambda e, ids=ids: e(input_ids=ids, labels=ids).loss)
    made["predictions"] = predictions(rank, world)
    return made


def predictions(rank: int, world: int) -> dict[str, Any]:
    """The best classes of all rows by heads that ZeRO-3 partitioned, and what is said where nobody gathered them."""
    import deepspeed

    made: dict[str, Any] = {}
    for kind in HEADS:
        net, x, _ = build(kind, dtype=torch.float32)
        head: Any = net.heads[kind]
        engine_of(net, 3)
        try:
            made[kind, "error"] = str(head.predict(x, 3))
        except ValueError as e:
            made[kind, "error"] = str(e)
        with deepspeed.zero.GatheredParameters(list(head.parameters())):
            made[kind] = head.predict(x, 3)[1]
    return made


@pytest.fixture
def zero(deepspeed_ranks) -> list[dict[Any, Any]]:
    return [made["zero"] for made in deepspeed_ranks]


def of_one_process(net: nn.Module, loss: Any) -> tuple[dict[str, Tensor], Tensor]:
    before, first = [whole(p) for p in net.parameters()], {}
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(3):
        optimizer.zero_grad()
        loss(net).backward()
        first = first or gradients(net)
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
    return first, moved(net.parameters(), before)


def check(mine: Any, exact: tuple[dict[str, Tensor], Tensor]) -> None:
    assert worst(mine[0], exact[0]) < 1e-6
    assert error(mine[1], exact[1]) < 1e-5  # differences of rounded parameters


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "explicit"), list(pairs()))
def test_two_ranks_train_as_one_process(zero, stage, kind, explicit):
    """Pitfall 18: under ZeRO-3 the weight of a module that is not running is empty, so lazy logits are in danger."""
    net, x, targets = build(kind, dtype=torch.float32)
    exact = of_one_process(net.double(), lambda net: loss_of(net, x.double(), targets, kind, explicit))
    for rank in zero:
        check(rank[stage, kind, explicit], exact)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tied", [False, True])
def test_converted_models_with_mini_sequences_train_as_one_process(zero, stage, tied):
    model = llama(tied)
    exact = of_one_process(model.float().double(), lambda model: model(input_ids=texts(), labels=texts()).loss)
    for rank in zero:
        check(rank[stage, "llama", tied], exact)


@pytest.mark.parametrize("kind", HEADS)
def test_predictions_of_a_partitioned_head_are_those_of_one_process(zero, kind):
    net, x, _ = build(kind, dtype=torch.float32)
    head: Any = net.heads[kind]
    for rank in zero:
        assert torch.equal(rank["predictions"][kind], head.predict(x, 3)[1])
        assert "GatheredParameters" in rank["predictions"][kind, "error"]

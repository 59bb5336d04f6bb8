"""Distributed checkpoints of every head, sharded on its own by FSDP2: saved on two ranks, loaded on three and on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.engine_support import HEADS, C, D, Net, build, moved, part, whole
from tests.ranks import run_ranks
from tests.support import error

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def sharded(net: Net, mesh: Any = None) -> Net:
    from torch.distributed.fsdp import fully_shard

    for module in (*net.blocks, *net.heads.values(), net):
        fully_shard(module, mesh=mesh)
    return net


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.05)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, targets: Any, count: int = 2) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        net(x, targets).backward()
        optimizer.step()


def save(rank: int, mesh: Any, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    net, x, targets = build(*HEADS)
    net = sharded(net, mesh)
    optimizer = optimizer_of(net)
    steps(net, optimizer, part(x, rank, 2), part(targets, rank, 2))
    weights, state = get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, process_group=mesh.get_group())


def resume(rank: int, world: int, folder: str, alone: bool = False) -> list[Tensor]:
    """Two more steps of a net that knew nothing; its parameters."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net, x, targets = build(*HEADS)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.5)  # where loading forgot something training would begin here
    net = net if alone else sharded(net)
    optimizer = optimizer_of(net)
    weights, state = get_state_dict(net, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)
    steps(net, optimizer, part(x, rank, world), part(targets, rank, world))
    return [whole(p) for p in net.parameters()]


def save_on_two_and_resume(rank: int, world: int, folder: str) -> list[Tensor]:
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", [0, 1])
    if rank < 2:
        save(rank, mesh, folder)
    dist.barrier()
    return resume(rank, world, folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[list[Tensor]]]:
    """The folder of what the first two of three ranks saved, and what all three made of it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, run_ranks(save_on_two_and_resume, 3, str(folder))


def of_one_process() -> tuple[list[Tensor], list[Tensor]]:
    """Parameters before and after four steps."""
    net, x, targets = build(*HEADS)
    before = [whole(p) for p in net.parameters()]
    steps(net, optimizer_of(net), x, targets, 4)
    return before, [whole(p) for p in net.parameters()]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
@pytest.mark.parametrize("world", [3, 1])
def test_training_goes_on_where_two_ranks_left_it(saved, world):
    before, exact = of_one_process()
    folder, on_three = saved
    for parameters in on_three if world == 3 else [resume(0, 1, str(folder), alone=True)]:
        assert error(moved(parameters, before), moved(exact, before)) < 1e-9


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_layers_load_what_heads_saved(saved):
    """A head's keys are those of the `nn.Linear` that it is."""
    import torch.distributed.checkpoint as dcp

    net, x, targets = build(*HEADS)
    steps(net, optimizer_of(net), x, targets)
    plain = nn.Linear(D, C).double()
    dcp.load({"model": {f"heads.cce.{name}": p.data for name, p in plain.named_parameters()}}, checkpoint_id=str(saved[0]))
    head: Any = net.heads["cce"]
    assert error(plain.weight, head.weight) < 1e-12 and error(plain.bias, head.bias) < 1e-12

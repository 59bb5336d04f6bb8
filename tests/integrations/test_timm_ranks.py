"""Converted timm models on two gloo processes: the training of one."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="timm is not installed")

import bigclass  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.support import error  # noqa: E402

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

C, N = 300, 4
MODES = ("default", "static_graph", "find_unused_parameters", "fsdp root", "fsdp blocks")


def build() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=C, img_size=32).double().train()
    return model, torch.randn(2 * N, 3, 32, 32, dtype=torch.float64), torch.randint(C, (2 * N,))


def train(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Three steps of SGD with clipped gradients; the parameters after them."""
    criterion, optimizer = nn.CrossEntropyLoss(label_smoothing=0.1), torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def all_modes(rank: int, world: int) -> dict[str, list[Tensor]]:
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("error", bigclass.LogitsWarning)
    made = {}
    for mode in MODES:
        model, x, y = build()
        bigclass.convert_head(model, engine="tiled")
        if mode == "fsdp blocks":
            for block in model.blocks:
                fully_shard(block)
        if mode.startswith("fsdp"):
            whole = fully_shard(model)
        else:
            whole = nn.parallel.DistributedDataParallel(model, **({} if mode == "default" else {mode: True}))
        made[mode] = train(whole, x[rank * N : (rank + 1) * N], y[rank * N : (rank + 1) * N])
    return made


@pytest.fixture(scope="module")
def made() -> list[dict[str, list[Tensor]]]:
    return run_ranks(all_modes, 2)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_as_one_process_without_the_conversion(made, mode):
    expected = train(*build())
    for rank in made:
        assert max(error(a, b) for a, b in zip(rank[mode], expected, strict=True)) < 1e-12

"""Streamed heads under PEFT's adapters on two gloo processes: the training of one."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")

import bigclass  # noqa: E402
from bigclass.integrations.peft import adopt  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.support import error  # noqa: E402

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

C, D, N = 300, 16, 8
MODES = (
    ("default", False), ("default", True), ("static_graph", False), ("find_unused_parameters", False), ("fsdp root", False),
    ("fsdp body", True), ("fsdp head apart", True),
)  # fmt: skip


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor, y: Tensor | None = None):
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) if y is None else self.head(hidden, y, shift=0)


def build(streamed: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """Two adapters active, one of them DoRA."""
    torch.manual_seed(3)
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=3, target_modules=["body", "head"])).double()
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["head"], use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    model = model.get_base_model().double().train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    if streamed:
        adopt(model.head, engine="tiled")
    return model, torch.randn(2 * N, D, dtype=torch.float64), torch.randint(C, (2 * N,))


def train(model: nn.Module, x: Tensor, y: Tensor, explicit: bool) -> list[Tensor]:
    """Three steps of SGD; the trained parameters after them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x, y) if explicit else F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in parameters]


def all_modes(rank: int, world: int) -> dict[tuple[str, bool], list[Tensor]]:
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("error", bigclass.LogitsWarning)
    made = {}
    for mode, explicit in MODES:
        model, x, y = build(streamed=True)
        if mode.startswith("fsdp"):
            for part in {"fsdp root": (), "fsdp body": (model.body,), "fsdp head apart": (model.body, model.head)}[mode]:
                fully_shard(part)
            whole = fully_shard(model)
        else:
            whole = nn.parallel.DistributedDataParallel(model, **({} if mode == "default" else {mode: True}))
        made[mode, explicit] = train(whole, x[rank * N : (rank + 1) * N], y[rank * N : (rank + 1) * N], explicit)
    return made


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, bool], list[Tensor]]]:
    return run_ranks(all_modes, 2)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_two_processes_train_adapters_as_one_dense_one_does(ranks, mode):
    model, x, y = build(streamed=False)
    exact = train(model, x, y, explicit=False)
    start = [p.detach() for p in build(streamed=False)[0].parameters() if p.requires_grad]
    for made in ranks:
        assert len(made[mode]) == len(exact) > 5
        for mine, theirs, before in zip(made[mode], exact, start, strict=True):
            assert error(mine - before, theirs - before) < 1e-9

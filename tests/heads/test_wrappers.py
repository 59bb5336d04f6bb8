"""Heads inside DistributedDataParallel and FSDP2, on two gloo processes: the gradients of one process."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigclass
from tests.ranks import run_ranks
from tests.support import error

C, D, N = 300, 16, 8

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)
        self.unused = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Model(nn.Module):
    """Two blocks and a classifier; `forward(x, y)` gives the head its targets."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = bigclass.CCEHead(D, C, engine="tiled", softcap=20.0)
        if not unused:
            for block in self.blocks:
                del block.unused

    def forward(self, x: Tensor, y: Tensor | None = None):
        for block in self.blocks:
            x = block(x)
        return self.head(x, y)


class Policy(nn.Module):
    """A block and a language model's head, asked for log-probabilities and several tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = bigclass.LMHead(D, C, engine="tiled")
        del self.block.unused

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.block(x)
        logp, h = self.head.log_prob(x, y, return_entropy=True, temperature=0.8)
        return (
            (logp + 0.1 * h).mean()
            + self.head.sequence_log_prob(x, y, average=True).mean()
            - self.head.multi_token_loss([x, -x], y, (1, 2))
        )


def train_policy(sharded: bool, rank: int = 0, world: int = 1) -> list[Tensor]:
    torch.manual_seed(4)
    model, x, y = Policy().double(), torch.randn(2, 6, D, dtype=torch.float64), torch.randint(C, (2, 6))
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.head)
        fully_shard(model)
    each = 2 // world
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (-model(x[rank * each : (rank + 1) * each], y[rank * each : (rank + 1) * each])).backward()
        optimizer.step()
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def build(unused: bool) -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(3)
    return Model(unused).double(), torch.randn(2 * N, D, dtype=torch.float64), torch.randint(C, (2 * N,))


def train(model: nn.Module, parameters, x: Tensor, y: Tensor, explicit: bool) -> list[Tensor]:
    """Three steps; the parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        if explicit:
            loss = model(x, y)
        else:
            logits = model(x)
            assert isinstance(logits, bigclass.LazyLogits)
            loss = F.cross_entropy(logits, y, label_smoothing=0.1) + F.cross_entropy(logits.float() / 2, y)
        loss.backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return [p.detach().clone() for p in whole]


def of_one_process(unused: bool, explicit: bool) -> list[Tensor]:
    model, x, y = build(unused)
    return train(model, model.parameters(), x, y, explicit)


def wrapped(rank: int, world: int, mode: str, explicit: bool) -> list[Tensor]:
    warnings.simplefilter("error", bigclass.LogitsWarning)
    model, x, y = build(unused=mode == "find_unused_parameters")
    x, y = x[rank * N : (rank + 1) * N], y[rank * N : (rank + 1) * N]
    parameters = list(model.parameters())
    if mode.startswith("fsdp"):
        from torch.distributed.fsdp import fully_shard

        if mode != "fsdp root":
            for block in model.blocks:
                fully_shard(block)
        if mode == "fsdp head apart":
            fully_shard(model.head)
        fully_shard(model)
        return train(model, model.parameters(), x, y, explicit)
    options = {} if mode == "default" else {mode: True}
    return train(nn.parallel.DistributedDataParallel(model, **options), parameters, x, y, explicit)


MODES = (
    ("default", False), ("default", True), ("static_graph", False), ("static_graph", True), ("find_unused_parameters", False),
    ("fsdp root", False), ("fsdp blocks", False), ("fsdp blocks", True), ("fsdp head apart", True), ("fsdp head apart", False),
)  # fmt: skip


def all_modes(rank: int, world: int) -> dict[tuple[str, bool], list[Tensor] | str]:
    """What each mode came to: the parameters, or the error in words. One start of the processes for all of them."""
    made: dict[tuple[str, bool], list[Tensor] | str] = {}
    for mode in MODES:
        try:
            made[mode] = wrapped(rank, world, *mode)
        except RuntimeError as e:
            made[mode] = str(e)
    made["policy", True] = train_policy(True, rank, world)
    return made


@pytest.fixture(scope="module")
def made():
    return run_ranks(all_modes, 2)


@pytest.mark.parametrize(("mode", "explicit"), MODES[:-1])
def test_gradients_are_those_of_one_process(made, mode, explicit):
    """Pitfall 32: an opaque lazy object is silently wrong under static_graph and crashes with find_unused_parameters."""
    expected = of_one_process(mode == "find_unused_parameters", explicit)
    for rank in made:
        assert isinstance(rank[mode, explicit], list), rank[mode, explicit]
        # half of the implicit loss comes back in float32
        assert max(error(a, b) for a, b in zip(rank[mode, explicit], expected, strict=True)) < (1e-13 if explicit else 1e-7)


def test_lazy_logits_of_a_head_that_fsdp_resharded_say_so(made):
    for rank in made:
        assert "FSDP2 resharded it" in rank["fsdp head apart", False] and "head(features, target)" in rank["fsdp head apart", False]


def test_log_probabilities_and_multi_token_losses_of_a_sharded_head_are_those_of_one_process(made):
    """Pitfall 32: as a method that is no forward they would meet a DTensor."""
    expected = train_policy(False)
    for rank in made:
        assert max(error(a, b) for a, b in zip(rank["policy", True], expected, strict=True)) < 1e-13

"""Mini-sequences under DistributedDataParallel and FSDP2 on two gloo processes: the gradients of one process without chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigclass
from tests.ranks import run_ranks
from tests.support import error

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

D, H, N = 16, 40, 24
MODES = (
    "ddp", "ddp static_graph", "ddp find_unused_parameters",
    "fsdp root", "fsdp blocks", "fsdp mlps", "fsdp converted after", "fsdp linear layers",
)  # fmt: skip
IN_FLOAT32 = ("ddp", "ddp static_graph", "fsdp root", "fsdp blocks")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mix, self.norm2, self.mlp = nn.LayerNorm(D), nn.Linear(D, D), nn.LayerNorm(D), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x)).cumsum(-2) / x.shape[-2]
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def build(dtype: torch.dtype) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().to(dtype), torch.randn(4, N, D, dtype=torch.float64).to(dtype)


def gradients(net: nn.Module, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the second of two steps: what the first leaves behind counts, too."""
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
    return [(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone() for p in net.parameters()]  # pyright: ignore


def every_mode(rank: int, world: int) -> dict[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    made: dict[Any, Any] = {}
    for dtype in (torch.float64, torch.float32):
        for mode in MODES if dtype == torch.float64 else IN_FLOAT32:
            net, x = build(dtype)
            group = dist.group.WORLD if mode == "fsdp linear layers" else None
            if mode != "fsdp converted after":
                bigclass.mini_sequence(net, 10, group=group)
            if mode.startswith("ddp"):
                model: nn.Module = nn.parallel.DistributedDataParallel(net, **({mode[4:]: True} if mode != "ddp" else {}))
            else:
                for block in net.blocks:
                    shards = {
                        "fsdp blocks": [block], "fsdp mlps": [block.mlp], "fsdp converted after": [block.mlp, block],
                        "fsdp linear layers": [block.mlp.fc1, block.mlp.fc2],
                    }.get(mode, [])  # fmt: skip
                    for module in shards:
                        fully_shard(module)
                model = fully_shard(net)
            if mode == "fsdp converted after":
                bigclass.mini_sequence(net, 10)
            calls = count_calls(net, "fc2")
            made[dtype, mode] = gradients(net, model, x[2 * rank : 2 * rank + 2]), calls
    return made


def count_calls(net: Any, name: str) -> list[int]:
    calls: list[int] = []
    getattr(net.blocks[0].mlp, name).register_forward_hook(lambda m, args, out: calls.append(out.numel() // out.shape[-1]))
    return calls


def uneven(rank: int, world: int) -> dict[str, Any]:
    """Ranks with 30 and 7 tokens (and with 30 and none), whose linear layers gather their parameters once a chunk."""
    from torch.distributed.fsdp import fully_shard

    made: dict[str, Any] = {}
    for tokens in (7, 0):
        net, x = build(torch.float64)
        model = bigclass.mini_sequence(net.blocks[0].mlp, 10, group=dist.group.WORLD)
        for linear in (model.fc1, model.fc2):
            fully_shard(linear)
        calls = count_calls(net, "fc1")
        x = x.reshape(-1, D)[:30] if rank == 0 else x.reshape(-1, D)[30 : 30 + tokens]
        model(x.requires_grad_()).square().sum().backward()
        made[str(tokens)] = [p.grad.full_tensor() for p in model.parameters()], calls
        bigclass.mini_sequence(model, 10)
        with pytest.raises(ValueError, match=r"group: Mlp has parts that gather their own parameters \('fc1.weight'\), once a chunk"):
            model(x)
        bigclass.mini_sequence(model, 10, group=dist.group.WORLD, fp32_gradients=True)
        with pytest.raises(ValueError, match="fp32_gradients: expected whole parameters inside Mlp"):
            model(x)
    return made


def mixed(rank: int, world: int) -> list[Tensor]:
    """FSDP2's bf16 parameters, their gradients summed over chunks in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    made = []
    for tokens, fp32 in ((10**6, False), (8, True), (8, False)):
        net, x = build(torch.float32)
        bigclass.mini_sequence(net, tokens, fp32_gradients=fp32)
        for block in net.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(net, mp_policy=policy)
        x = x[2 * rank : 2 * rank + 2].repeat(1, 20, 1)
        made.append(torch.cat([g.flatten() for name, g in zip_names(net, gradients(net, net, x)) if "blocks.1.mlp" in name]))
    return made


def zip_names(net: nn.Module, tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, t) for (name, _), t in zip(net.named_parameters(), tensors, strict=True)]


def restored(rank: int, world: int) -> bool:
    """Under FSDP2's own class ours stays, and does nothing."""
    from torch.distributed.fsdp import fully_shard

    net, x = build(torch.float64)
    bigclass.mini_sequence(net, 10)
    for block in net.blocks:
        fully_shard(block.mlp)
    bigclass.restore_mini_sequence(net)
    calls = count_calls(net, "fc2")
    gradients(net, net, x)
    assert calls == [4 * N, 4 * N]
    bigclass.mini_sequence(net, 32)
    gradients(net, net, x)
    assert calls[2:] == [32, 32, 32] * 2
    return True


def everything(rank: int, world: int) -> dict[str, Any]:
    """One start of the processes for all that follows."""
    return {
        "modes": every_mode(rank, world), "uneven": uneven(rank, world), "mixed": mixed(rank, world), "restored": restored(rank, world),
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"),
    [*[(mode, torch.float64, 1e-12) for mode in MODES], *[(mode, torch.float32, 1e-6) for mode in IN_FLOAT32]],
)
def test_gradients_are_those_of_one_process(ranks, mode, dtype, tolerance):
    """The float32 ones, too, against float64."""
    net, x = build(torch.float64)
    expected = gradients(net, net, x)
    for made in ranks:
        got, calls = made["modes"][dtype, mode]
        assert max(error(g, e) for g, e in zip(got, expected, strict=True)) <= tolerance
        assert sum(calls) == 2 * 2 * N and max(calls) <= 10


@pytest.mark.parametrize("tokens", ["7", "0"])
def test_ranks_with_other_numbers_of_tokens_run_as_many_chunks(ranks, tokens):
    """Else the one with more waits for ever for the others' parameters (40). FSDP averages over the ranks."""
    net, x = build(torch.float64)
    mlp, rows = net.blocks[0].mlp, x.reshape(-1, D)[: 30 + int(tokens)]
    assert isinstance(mlp, nn.Module)
    mlp(rows).square().sum().backward()
    for made in ranks:
        got = made["uneven"][tokens][0]
        assert max(error(2 * g, p.grad) for g, p in zip(got, mlp.parameters(), strict=True)) <= 1e-12  # pyright: ignore
    forward = [made["uneven"][tokens][1][:3] for made in ranks]
    assert forward == [[10, 10, 10], [3, 2, 2] if tokens == "7" else [0, 0, 0]]


def test_fp32_gradients_under_mixed_precision(ranks):
    net, x = build(torch.float64)
    exact = gradients(net, net, x.repeat(1, 20, 1))
    exact = torch.cat([g.flatten() for name, g in zip_names(net, exact) if "blocks.1.mlp" in name])
    single, fp32, plain = [error(g, exact) for g in ranks[0]["mixed"]]
    assert fp32 <= 1.1 * single, (fp32, single)
    assert plain >= 1.5 * single, "otherwise this shows nothing"


def test_restored_below_fsdp_the_class_stays_and_does_nothing(ranks):
    assert all(made["restored"] for made in ranks)

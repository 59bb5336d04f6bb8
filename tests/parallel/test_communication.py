"""What travels between ranks in a step, counted; what they must agree in, refused on all of them; reduced precision; one graph."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bigclass
from tests.parallel.class_support import relative
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

N, D, C = 12, 8, 30


class Counted(TorchDispatchMode):
    """Bytes that go into each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "c10d_functional" in name and not any(inner in name for inner in ("wait_tensor", "_wrap")):
            self.bytes[name.split(".")[1].removesuffix("_into_tensor").removesuffix("_tensor")].append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def counted(step: Any) -> dict[str, list[int]]:
    with Counted() as mode:
        step()
    return {name: sorted(sizes) for name, sizes in mode.bytes.items()}


def what_travels(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    w = torch.randn(C // world, D, requires_grad=True)
    x, y = torch.randn(N, D, requires_grad=True), torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))
    several = torch.stack((y, (y + 1) % C), 1)
    mine = slice(rank * N // world, (rank + 1) * N // world)
    group, both = dist.group.WORLD, bigclass.Spread(classes=dist.group.WORLD, batch=dist.group.WORLD)
    frozen = x.detach()

    def step(loss: Any) -> Any:
        return counted(lambda: loss().backward())

    return {
        "ce": step(lambda: bigclass.linear_cross_entropy(x, w, y, group=group)),
        "ce frozen features": step(lambda: bigclass.linear_cross_entropy(frozen, w, y, group=group)),
        "ce both": step(lambda: bigclass.linear_cross_entropy(x[mine], w, y[mine], group=both)),
        "bce": step(lambda: bigclass.linear_binary_cross_entropy(x, w, several, group=group)),
        "batch": step(lambda: bigclass.linear_cross_entropy(x, w, y % (C // world), group=bigclass.Spread(batch=group))),
        "topk": counted(lambda: bigclass.linear_topk(x, w, 4, group=group)),
    }


def test_a_step_sends_what_is_written_down(on_two_ranks):
    world = 2
    for found in on_two_ranks("what_travels"):
        rows, dx = 4 * N, 4 * N * D
        told = found["ce"].pop("all_gather")  # a few numbers that ranks must agree in
        assert len(told) == 1 and told[0] <= 128
        assert found["ce"] == {"all_reduce": [rows, rows, rows, dx]}  # largest logit, sum, picked logit; dx
        assert found["ce frozen features"] == {"all_gather": told, "all_reduce": [rows, rows, rows]}
        own = N // world
        # labels, what they must be alike in, features in their own dtype, and what the layers must be alike in
        assert found["ce both"].pop("all_gather") == sorted([8 * own, 64, 4 * own * D, told[0] - 8])
        assert found["ce both"] == {
            "all_reduce": [rows, rows, rows],
            "reduce_scatter": [dx],
        }
        assert found["bce"] == {"all_gather": told, "all_reduce": [4, dx]}  # the loss, dx
        assert found["batch"] == {"all_reduce": [4, 8, 8]}  # the loss; what the mean divides by, of weights and of rows
        assert found["topk"] == {"all_gather": sorted([told[0], 4 * 4 * N, 8 * 4 * N])}


def everything(rank: int, world: int) -> dict[str, Any]:
    """All that two ranks show, by its function: a process costs seconds to start."""
    triton = importlib.util.find_spec("triton") is not None
    return {part.__name__: part(rank, world) for part in (what_travels, in_bf16, compiled, *([fused] if triton else []))}


@pytest.fixture(scope="module")
def on_two_ranks():
    results = run_ranks(everything, 2)
    return lambda name: [found[name] for found in results]


def refusals(rank: int, world: int) -> dict[str, str]:
    x, w, y = torch.randn(N, D), torch.randn(10, D), torch.zeros(N, dtype=torch.int64)
    group = dist.group.WORLD
    pair, both = dist.new_group([0, 1]), bigclass.Spread(classes=group, batch=group)
    calls = {
        "rows": lambda: bigclass.linear_cross_entropy(x[: N - rank], w, y[: N - rank], group=group),
        "features": lambda: bigclass.linear_cross_entropy(x[:, : D - rank], w[:, : D - rank], y, group=group),
        "dtypes": lambda: bigclass.linear_cross_entropy(x, w.to((torch.float32, torch.bfloat16, torch.float64)[rank]), y, group=group),
        "bias": lambda: bigclass.linear_cross_entropy(x, w, y, linear_bias=torch.zeros(10) if rank else None, group=group),
        "sizes": lambda: bigclass.linear_cross_entropy(x, w, y, group=bigclass.Spread(classes=group, class_sizes=(10, 10))),
        "sum": lambda: bigclass.linear_cross_entropy(x, w, y, group=bigclass.Spread(classes=group, class_sizes=(10, 10, 11))),
        "target": lambda: bigclass.linear_cross_entropy(x, w, y + 10 * world, group=group),
        "member": lambda: bigclass.linear_cross_entropy(x, w, y, group=pair) if rank == 2 else 1 / 0,
        "type": lambda: bigclass.linear_cross_entropy(x, w, y, group="tp"),
        "lora": lambda: bigclass.linear_cross_entropy(x, w, y, lora=(torch.ones(2, D), torch.ones(10, 2), 1.0), group=group),
        "update": lambda: bigclass.linear_cross_entropy(x, w.requires_grad_(), y, update=bigclass.GradAccumulator(), group=group),
        "target rows": lambda: bigclass.linear_cross_entropy(x, w, y[: N - rank], group=both),
        "target dtype": lambda: bigclass.linear_cross_entropy(x, w, y if rank else torch.rand(N, 10 * world), group=both),
        "no class": lambda: bigclass.linear_cross_entropy(x, w[:0], y, group=group),
        "gradient": lambda: bigclass.linear_cross_entropy(x.clone().requires_grad_(rank == 0), w, y, group=group),
        "shift": lambda: bigclass.linear_cross_entropy(x, w, y, shift=1, reduction="none", group=both),
        "columns": lambda: bigclass.linear_margin_loss(x, w[:9], y, subcenters=2, group=group),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_what_ranks_disagree_in_is_refused_on_all_of_them():
    results = run_ranks(refusals, 3)
    for rank, found in enumerate(results):
        for name, text in {
            "rows": "got input.shape[0] [12, 11, 10]",
            "features": "got features [8, 7, 6]",
            "dtypes": "['torch.float32', 'torch.bfloat16', 'torch.float64']",
            "bias": "bias or none [0, 1, 1]",
            "sizes": "class_sizes",
            "sum": "class_sizes: expected the shards that the ranks have, [10, 10, 10]",
            "target": "IndexError",
            "type": "expected a ProcessGroup or a DeviceMesh",
            "lora": "lora: is not offered with group=",
            "update": "update:",
            "columns": "divides the 9 rows",
            "target rows": "[12, 12, 12], got [12, 11, 10]",
            "target dtype": "alike on all ranks",
            "no class": "at least one class",
            "gradient": "input that requires a gradient [1, 0, 0]",
            "shift": "shift the labels before they are spread",
        }.items():
            assert text in found[name], (rank, name, found[name])
    assert "is no member" in results[2]["member"]


def in_bf16(rank: int, world: int) -> dict[str, list[float]]:
    """Against float64 of the same rounded operands, and rounded once: by dx summed over ranks in fp32."""
    torch.manual_seed(3)
    x, w, y = torch.randn(64, 32).bfloat16(), (torch.randn(96, 32) * 0.3).bfloat16(), torch.randint(96, (64,))
    a, b = x.double().requires_grad_(), w.double().requires_grad_()
    exact = bigclass.linear_cross_entropy(a, b, y)
    exact.backward()
    assert a.grad is not None and b.grad is not None
    share = 96 // world
    mine, rows = slice(rank * share, (rank + 1) * share), slice(rank * 64 // world, (rank + 1) * 64 // world)
    found = {}
    for name, group, at in (
        ("same", dist.group.WORLD, slice(None)),
        ("spread", bigclass.Spread(classes=dist.group.WORLD, batch=dist.group.WORLD, gradients="sum"), rows),
    ):
        leaves = x[at].clone().requires_grad_(), w[mine].clone().requires_grad_()
        loss = bigclass.linear_cross_entropy(*leaves, y[at], group=group)
        loss.backward()
        assert loss.dtype == torch.float32 and leaves[0].grad is not None and leaves[1].grad is not None
        made = loss.double(), leaves[0].grad.double(), leaves[1].grad.double()
        found[name] = [relative(p, q) for p, q in zip(made, (exact, a.grad[at], b.grad[mine]), strict=True)]
    return found


def test_half_precision_is_rounded_once(on_two_ranks):
    for found in on_two_ranks("in_bf16"):
        for name, (loss, dx, dw) in found.items():
            assert loss < 1e-6, name
            assert max(dx, dw) < 3.5e-3, (name, dx, dw)  # one rounding of a bf16 number is 2^-9 at most, 1.7e-3 on average; of G, too


def fused(rank: int, world: int) -> dict[str, list[float]]:
    """The fused engine in Triton's interpreter, fp32."""
    torch.manual_seed(5)
    x, w, b, y = torch.randn(9, 16), torch.randn(50, 16), torch.randn(50), torch.randint(50, (9,))
    mine, found = slice(0, 31) if rank == 0 else slice(31, 50), {}
    several = torch.stack((y, (y + 7) % 50), 1)
    for name, call in {
        "ce": lambda x, w, b, **o: bigclass.linear_cross_entropy(x, w, y, linear_bias=b, label_smoothing=0.1, **o),
        "bce": lambda x, w, b, **o: bigclass.linear_binary_cross_entropy(x, w, several, linear_bias=b, **o),
        "entropy": lambda x, w, b, **o: sum(t.sum() for t in bigclass.linear_log_prob(x, w, y, linear_bias=b, return_entropy=True, **o)),
    }.items():
        made = []
        for cut, dtype, options in (
            (slice(None), torch.float64, {}),
            (mine, torch.float32, {"engine": "fused", "group": dist.group.WORLD}),
        ):
            leaves = [t.to(dtype).requires_grad_() for t in (x.clone(), w[cut].clone(), b[cut].clone())]
            loss: Any = call(*leaves, **options)
            loss.backward()
            made.append([loss.detach().double(), *[t.grad.double() for t in leaves]])  # type: ignore[union-attr]
        exact = [made[0][0], made[0][1], made[0][2][mine], made[0][3][mine]]
        found[name] = [relative(p, q) for p, q in zip(made[1], exact, strict=True)]
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter")
def test_the_fused_engine_folds_shards_too(on_two_ranks):
    for found in on_two_ranks("fused"):
        assert all(max(e) < 3e-6 for e in found.values()), found


def compiled(rank: int, world: int) -> dict[str, list[float]]:
    torch.manual_seed(4)
    x, w, y = torch.randn(N, D, dtype=torch.float64), torch.randn(C, D, dtype=torch.float64), torch.randint(C, (N,))
    mine, rows = slice(rank * C // world, (rank + 1) * C // world), slice(rank * N // world, (rank + 1) * N // world)
    found = {}
    for name, group, at in (
        ("same", dist.group.WORLD, slice(None)),
        ("both", bigclass.Spread(classes=dist.group.WORLD, batch=dist.group.WORLD, gradients="sum"), rows),
        ("batch", bigclass.Spread(batch=dist.group.WORLD, gradients="sum"), rows),
    ):

        def loss(x: Tensor, w: Tensor, y: Tensor, group: Any = group) -> Any:
            return bigclass.linear_cross_entropy(x, w, y, group=group, label_smoothing=0.1, engine="tiled")

        made = []
        for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = x[at].clone().requires_grad_(), w[mine if name != "batch" else slice(None)].clone().requires_grad_()
            value = call(*leaves, y[at])
            value.backward()
            made.append([value.detach(), *[t.grad for t in leaves]])
        found[name] = [relative(a, b) for a, b in zip(made[1], made[0], strict=True)]  # type: ignore[arg-type]
    return found


def test_a_spread_loss_is_one_graph(on_two_ranks):
    for found in on_two_ranks("compiled"):
        assert all(max(e) < 1e-12 for e in found.values()), found

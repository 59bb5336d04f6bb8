"""What the GPU tests share.

To write them without a GPU: `BIGCLASS_GPU_TESTS=cpu python -m pytest tests/gpu` runs the same bodies on CPU tensors, smaller, the fused
engine in Triton's interpreter; what only CUDA has (graphs, streams, allocators) is skipped. `BIGCLASS_GPU_TESTS=small` takes those sizes on
a GPU, as the sanitizer's runs do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import bigclass
from tests.support import draw, error

ON_CPU = os.environ.get("BIGCLASS_GPU_TESTS") == "cpu"
SMALL = ON_CPU or os.environ.get("BIGCLASS_GPU_TESTS") == "small"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")

T = TypeVar("T")


def at(full: T, small: T) -> T:
    """The size of a problem on a GPU, and where it must be small."""
    return small if SMALL else full


Road = tuple[str, str]  # engine, plan
ROADS: tuple[Road, ...] = (("tiled", "forward"), ("tiled", "recompute"), ("fused", "forward"), ("fused", "recompute"), ("fused", "saved"))
ENGINES = ("tiled", "fused")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the products' operands gradients are rounded to: half an ulp of G's tile and half of the gradient, with room for what cancels.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}

every_road = pytest.mark.parametrize("road", ROADS, ids="-".join)
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
needs_cuda = pytest.mark.skipif(ON_CPU, reason="of CUDA alone")


def problem(kind: str, n: int, c: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves x (N, D), w (C, D), b (C,), and y (N,), on the device."""
    x, w, b, y = draw(kind, n, c, d, dtype, seed)
    x, w, b = (t.detach().to(DEVICE).requires_grad_() for t in (x, w, b))
    return x, w, b, y.to(DEVICE)


def ours(x: Tensor, w: Tensor, b: Tensor | None, y: Any, road: Road, **options: Any) -> list[Tensor]:
    """Cross-entropy and the gradients of its leaves."""
    with bigclass.planning(gradients=road[1]):
        loss = bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine=road[0], **options)
    leaves = [t for t in (x, w, b) if t is not None and t.requires_grad]
    return [loss, *torch.autograd.grad(loss.sum(), leaves)]


def wide(t: Tensor, grad: bool | None = None) -> Tensor:
    """A float64 leaf of the same values."""
    return t.detach().double().requires_grad_(t.requires_grad if grad is None else grad)


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """NaN equals NaN here."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


def check_close(made: Sequence[Tensor], truth: Sequence[Tensor], limit: float) -> None:
    """Relative errors of floating-point tensors; the others are equal. A gradient of zeros is never right for one that is not."""
    for i, (got, want) in enumerate(zip(made, truth, strict=True)):
        if not want.is_floating_point():
            assert torch.equal(got.to(want.dtype), want), f"output {i}"
            continue
        assert error(got, want) <= limit, f"output {i}, shape {tuple(want.shape)}: error {error(got, want):.2e}"


@contextmanager
def no_sync() -> Iterator[None]:
    """Raises where the host waits for the device."""
    if ON_CPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of run, warmed up on a side stream as torch's manual has it, and the tensors it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    return graph, made


def peak(run: Callable[[], object]) -> int:
    """Bytes that run allocates at most beyond what is there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before

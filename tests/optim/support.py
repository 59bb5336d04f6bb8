"""What the optimizers' tests share: parameters, gradients, and a step made of slabs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

SHAPES = ((7, 3), (1, 1), (5,), (4, 2, 3), (), (0, 3), (3, 0))


def parameter(shape=(7, 3), dtype=torch.float64, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype))


def gradients(p: Tensor, steps: int, seed: int = 1, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """One gradient a step, the same whenever asked."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype or p.dtype)


def step_in_slabs(optimizer, p: Tensor, gradient: Tensor, size: int, *, backwards: bool = False) -> None:
    """One step as a backward makes it. The gradient may be used up."""
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    gradient = gradient.reshape(p.shape or (1,)).to(wide)
    optimizer.begin_step(p)
    starts = list(range(0, gradient.shape[0], size))
    for start in reversed(starts) if backwards else starts:
        stop = min(start + size, gradient.shape[0])
        optimizer.update_slab(p, start, stop, gradient[start:stop].clone())


def step_whole(optimizer, p: Tensor, gradient: Tensor) -> None:
    """One step of the ordinary form."""
    p.grad = gradient.to(p.dtype, copy=True)
    optimizer.step()
    p.grad = None

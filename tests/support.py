"""What the tests share: data of four kinds, exact references in float64, relative errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("flat", "peaked", "early", "onehot")

# (engine, where gradients are made): every road an exact loss can take
ROADS = (("dense", "auto"), ("tiled", "forward"), ("tiled", "recompute"))


def draw(kind: str, n: int, c: int, d: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, D), w (C, D), b (C,), y (N,): leaves rounded to dtype.

    flat: logits are standard normal. early: nearly uniform. peaked: most targets lead by a few nats, some are wrong.
    onehot: losses between e^-40 and e^-10.
    """
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(c, d, generator=g) / math.sqrt(d)
    y = torch.randint(c, (n,), generator=g)
    x = torch.randn(n, d, generator=g)
    if kind == "early":
        x *= 0.03
    elif kind in ("peaked", "onehot"):
        lead = 3.0 + 3.0 * torch.randn(n, generator=g) if kind == "peaked" else 12.0 + 25.0 * torch.rand(n, generator=g)
        x += (math.log(c) + lead)[:, None] * F.normalize(w[y], dim=1) / w[y].norm(dim=1, keepdim=True)
    b = 0.1 * torch.randn(c, generator=g)
    return *(t.to(dtype).requires_grad_() for t in (x, w, b)), y


def exact_nll(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy (N,) of float64 logits with the target left out of the sum: right where plain float64 is 0."""
    rest = logits.scatter(1, y[:, None], -math.inf).logsumexp(1)
    gap = rest - logits.gather(1, y[:, None])[:, 0]
    return torch.logaddexp(gap, torch.zeros_like(gap))


def error(z: Tensor, exact: Tensor) -> float:
    """||z - exact|| / ||exact||, and exactly 0 only for equal tensors (an all-zero z is never right for a non-zero exact)."""
    assert z.shape == exact.shape, f"expected shape {tuple(exact.shape)}, got {tuple(z.shape)}"
    z, exact = z.detach().double(), exact.detach().double()
    difference = torch.linalg.vector_norm(z - exact)
    norm = torch.linalg.vector_norm(exact)
    return float(difference / norm) if float(norm) > 0 else float(difference)


def errors(zs: Sequence[Tensor], exacts: Sequence[Tensor]) -> list[float]:
    """`error` of each pair."""
    return [error(z, e) for z, e in zip(zs, exacts, strict=True)]

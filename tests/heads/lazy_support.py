"""What the tests of lazy logits share: a head, the dense logits of the same numbers in float64, and what both give."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass
from bigclass import CCEHead, LMHead
from bigclass.heads.lazy import LazyLogits, LogitsWarning
from tests.support import error

ENGINES = ("dense", "tiled", "auto")


def make_head(
    c: int, d: int = 5, *, dtype: torch.dtype = torch.float64, seed: int = 0, kind: type = CCEHead, bias: bool = True, **options: Any
) -> CCEHead | LMHead:
    """A head in training, with weights that give logits of about one."""
    torch.manual_seed(seed)
    head = kind(d, c, bias, dtype=dtype, **options)
    with torch.no_grad():
        head.weight.normal_()
        if bias:
            head.bias.normal_()
    return head


def features(*lead: int, d: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*lead, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def dense_logits(head: Any, x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """The head's logits in float64, by F.linear, and their leaves."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *head.parameters())]
    s = F.linear(*leaves)
    s = s if head.logit_scale is None else s * head.logit_scale
    return (s if head.softcap is None else torch.tanh(s / head.softcap) * head.softcap), leaves


def leaves_of(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for t in out if t.is_floating_point()]


def check(
    operation: Callable[..., Any], head: Any, x: Tensor, extra: Sequence[Tensor] = (), *, tol: float = 1e-12, streams: bool = True
) -> None:
    """operation(lazy logits, *extra) is operation(dense logits, *extra), and so are the gradients of a random projection of it.

    extra: tensors that are given to both (in float64 to the dense one), with gradients where they require them.
    streams: is nothing written out? tol: in float64. In float32: 2e-6 beyond what torch's own float32 is off by.
    """
    lazy = head(x)
    assert isinstance(lazy, LazyLogits)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if streams else "ignore", LogitsWarning)
        mine = _everything(operation, lazy, extra, [x, *head.parameters()])
    exact = _of_dense(operation, head, x, extra, torch.float64)
    peer = exact if x.dtype == torch.float64 else _of_dense(operation, head, x, extra, torch.float32)
    assert len(mine) == len(exact)
    for i, (a, b, c) in enumerate(zip(mine, exact, peer, strict=True)):
        if b.any():
            limit = tol if x.dtype == torch.float64 else 2e-6 + 1.5 * error(c, b)
            assert error(a, b) <= limit, f"tensor {i}: off by {error(a, b):.1e}, allowed {limit:.1e}"
        else:
            assert a.shape == b.shape and not a.isnan().any(), f"tensor {i}: not a number"
            assert float(a.abs().sum()) < 64 * torch.finfo(x.dtype).eps, f"tensor {i}: not zero"


def _of_dense(operation: Callable[..., Any], head: Any, x: Tensor, extra: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    real, leaves = dense_logits(head, x, dtype)
    extra = [t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in extra]
    return _everything(operation, real, extra, leaves)


def _everything(operation: Callable[..., Any], logits: Any, extra: Sequence[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """What operation gives, and the gradients of a projection of it."""
    out = operation(logits, *extra)
    out = leaves_of(out.materialize() if hasattr(out, "materialize") else out)
    values = [t.detach() for t in out]
    out = [t for t in out if t.requires_grad]
    if not out:
        return values
    ups = [torch.randn(t.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) for t in out]
    total = sum((t.double() * u).sum() for t, u in zip(out, ups, strict=True))
    leaves = [*leaves, *[t for t in extra if t.requires_grad]]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return values + [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def small_workspace():
    """Several tiles where C is large."""
    return bigclass.planning(workspace=1 << 20)

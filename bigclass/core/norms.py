"""Norms of the classes, for heads whose logits are cosines: made, and differentiated, without a second C x D tensor.

    r_j = 1 / max(||w_j||, EPSILON)              as torch.nn.functional.normalize: a row of zeros stays one, its cosines are 0
    n_j = ||w_j + alpha B_j A||                  of a weight with a low-rank adapter (DoRA, arXiv:2402.09353), a constant to gradients

Normalised logits are the stream's products times r (`Stream.normalized`). Autograd of r would hand w a C x D gradient of its own, beside
that of the products; here one is turned into the other where it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.core.guards import autocast_off

EPSILON = 1e-12

# Elements that are worked on at once: they stay in a core's cache (CPU), or fill the device.
_PIECE = {"cpu": 1 << 17, "other": 1 << 24}


def _pieces(w: Tensor) -> range:
    size = _PIECE["cpu" if w.device.type == "cpu" else "other"]
    return range(0, w.shape[0], max(size // max(w.shape[1], 1), 1))


@torch.library.custom_op("bigclass::inverse_norms", mutates_args=())
def _inverse_norms(w: Tensor) -> Tensor:
    wide = torch.promote_types(w.dtype, torch.float32)
    out = w.new_empty(w.shape[0], dtype=wide)
    pieces = _pieces(w)
    for at in pieces:
        part = w[at : at + pieces.step]
        out[at : at + pieces.step] = torch.linalg.vector_norm(part.to(wide), dim=1)
    return out.clamp_min_(EPSILON).reciprocal_()


@_inverse_norms.register_fake
def _(w):
    return w.new_empty(w.shape[0], dtype=torch.promote_types(w.dtype, torch.float32))


def inverse_norms(w: Tensor) -> Tensor:
    """r (C,) for w (C, D), in fp32 (float64 for float64). Without a gradient: that of w goes through `Stream.normalized`."""
    if w.dim() != 2:
        raise ArgumentError(f"w: expected shape (C, D), got {tuple(w.shape)}")
    return _inverse_norms(w.detach())


@torch.library.custom_op("bigclass::adapted_norms", mutates_args=())
def _adapted_norms(w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    wide = torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32)
    a, out = a.to(wide), w.new_empty(w.shape[0], dtype=wide)
    pieces = _pieces(w)
    for at in pieces:
        part = slice(at, at + pieces.step)
        out[part] = torch.linalg.vector_norm(torch.addmm(w[part].to(wide), b[part].to(wide), a, alpha=alpha), dim=1)
    return out


@_adapted_norms.register_fake
def _(w, a, b, alpha):
    return w.new_empty(w.shape[0], dtype=torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32))


def adapted_norms(w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """||w_j + alpha (B A)_j|| (C,) for w (C, D), a (R, D), b (C, R), in fp32 or wider, a slab of classes at a time. Without a gradient."""
    if w.dim() != 2 or tuple(a.shape) != (b.shape[-1], w.shape[1]) or b.shape[0] != w.shape[0]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (w, a, b))
        raise ArgumentError(f"w, a, b: expected shapes (C, D), (R, D) and (C, R), got {shapes}")
    with autocast_off(w.device):
        return _adapted_norms(w.detach(), a.detach(), b.detach(), float(alpha))


def through_norms(u: Tensor, w: Tensor, r: Tensor) -> None:
    """In place, from u (c, D), the gradient by w_j r_j, that by w_j: r_j (u_j - r_j^2 <w_j, u_j> w_j). w (c, D), r (c,).

    Where the norm was clamped r is a constant, and so r_j u_j is all.
    """
    pieces = _pieces(w)
    r = r.to(u.dtype)
    free = r < r.new_full((), 1.0 / EPSILON)
    for at in pieces:
        part = slice(at, at + pieces.step)
        wide, out, factor = w[part].to(u.dtype), u[part], r[part]
        along = torch.where(free[part], (wide * out).sum(1) * factor * factor, 0.0)
        out.addcmul_(wide, along.unsqueeze(-1), value=-1.0).mul_(factor.unsqueeze(-1))

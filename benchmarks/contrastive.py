"""Contrastive losses: who computes them, and what they are.

With s = 1/0.07 a b^T, of images a (N, D) and texts b (N, D), pairs on the diagonal:

    clip      the mean of the cross-entropy of the rows of s and of its columns
    siglip    -sum log sigmoid(z (s - 10)) / N,  z = 1 on the diagonal and -1 elsewhere

The dense form is written as training code writes it (open_clip's own is a peer): clip multiplies twice, for rows and for columns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass

Loss = Callable[[Tensor, Tensor], Tensor]  # image_features (N, D), text_features (N, D) -> loss ()

SCALE, BIAS = 1 / 0.07, -10.0


def dense_loss(kind: str) -> Loss:
    """Plain torch."""

    def clip(a: Tensor, b: Tensor) -> Tensor:
        pairs = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(SCALE * a @ b.T, pairs) + F.cross_entropy(SCALE * b @ a.T, pairs)) / 2

    def siglip(a: Tensor, b: Tensor) -> Tensor:
        signs = 2 * torch.eye(len(a), dtype=a.dtype, device=a.device) - 1
        return -F.logsigmoid(signs * (SCALE * a @ b.T + BIAS)).sum() / len(a)

    return clip if kind == "clip" else siglip


def open_clip_loss(kind: str) -> Loss:
    """open_clip's module. Raises ImportError where there is no open_clip."""
    module = importlib.import_module("open_clip.loss")
    own = module.ClipLoss() if kind == "clip" else module.SigLipLoss()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return own(a, b, a.new_tensor(SCALE), None if kind == "clip" else a.new_tensor(BIAS))

    return loss


def streamed_loss(kind: str, engine: str) -> Loss:
    """bigclass' function."""

    def clip(a: Tensor, b: Tensor) -> Tensor:
        return bigclass.contrastive_loss(a, b, SCALE, engine=engine)

    def siglip(a: Tensor, b: Tensor) -> Tensor:
        return bigclass.sigmoid_contrastive_loss(a, b, SCALE, BIAS, engine=engine)

    return clip if kind == "clip" else siglip


def reference(kind: str, a: Tensor, b: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradients by a and b) of float64 features, `step` rows at a time."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    total = a.new_zeros(())
    sides = ((a, b), (b, a)) if kind == "clip" else ((a, b),)
    for rows, columns in sides:
        for start in range(0, len(a), step):
            s = SCALE * rows[start : start + step] @ columns.T
            pairs = torch.arange(start, start + len(s), device=a.device)
            if kind == "clip":
                part = F.cross_entropy(s, pairs, reduction="sum") / (2 * len(a))
            else:
                signs = -torch.ones_like(s)
                signs[torch.arange(len(s), device=a.device), pairs] = 1.0
                part = -F.logsigmoid(signs * (s + BIAS)).sum() / len(a)
            part.backward()
            total += part.detach()
    assert a.grad is not None and b.grad is not None
    return total, a.grad, b.grad

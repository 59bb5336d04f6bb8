"""One-vs-all losses: who computes them, and what they are.

With t_ij = 1 where class j is among row i's few labels, s = x w^T, sigma = sigmoid(s), q = max(sigma - 0.05, 0), means over all N C terms:

    bce          -t log sigma - (1 - t) log(1 - sigma)
    asymmetric   -t (1 - sigma) log max(sigma, 1e-8) - (1 - t) q^4 log max(1 - q, 1e-8)          (ASL with timm's defaults)

The dense candidates are given the N x C targets as an input: neither the time nor the memory of writing them is counted.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass

Dense = Callable[[Tensor, Tensor], Tensor]  # logits (N, C), targets (N, C) -> mean loss ()


def dense_targets(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(N, C): 1 at the labels (N, K)."""
    return torch.zeros(len(labels), classes, dtype=dtype, device=labels.device).scatter_(1, labels, 1.0)


def dense_asymmetric(logits: Tensor, t: Tensor) -> Tensor:
    """As it is usually written (and differentiated: the focusing weights too)."""
    sigma = torch.sigmoid(logits.float() if logits.dtype.itemsize == 2 else logits)  # 16 bits would lose 1 - sigma
    rest = (1.0 - sigma + 0.05).clamp(max=1.0)
    terms = t * torch.log(sigma.clamp(min=1e-8)) + (1.0 - t) * torch.log(rest.clamp(min=1e-8))
    return -(terms * torch.pow(1.0 - (sigma * t + rest * (1.0 - t)), t + 4.0 * (1.0 - t))).mean()


DENSE: dict[str, Dense] = {"bce": F.binary_cross_entropy_with_logits, "asymmetric": dense_asymmetric}


def timm_loss(kind: str) -> Dense:
    """timm's module. Raises ImportError where there is no timm."""
    module = importlib.import_module("timm.loss")
    if kind == "bce":
        return module.BinaryCrossEntropy(smoothing=0.0)
    return module.AsymmetricLossMultiLabel(reduction="mean")


def streamed_loss(kind: str, engine: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """bigclass' function of (input, linear_weight, labels (N, K))."""
    function = bigclass.linear_binary_cross_entropy if kind == "bce" else bigclass.linear_asymmetric_loss
    return functools.partial(function, reduction="mean", engine=engine)

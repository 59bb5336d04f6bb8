"""Targets that stay small: a few classes a row instead of N x C probabilities."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.repeats import Repeats


@dataclass(frozen=True, eq=False)
class SparseTarget:
    r"""Soft targets with few classes a row: t_ij = floor + sum_k weights_ik [indices_ik = j].

    Mixup and cutmix are two classes a row, label smoothing is the floor, several positives are K of them. It goes where class
    probabilities go: `linear_cross_entropy`, a head's `target`, `F.cross_entropy` and timm's SoftTargetCrossEntropy on lazy logits.

    Args:
        indices: (..., K) class indices, int64 or int32; -1 is none. A class that stands twice in a row gets the sum of its weights.
        weights: (..., K), floating point.
        num_classes: C.
        floor: what every class of every row gets beside.

    Example:
        >>> y, lam = torch.randint(1000, (8,)), 0.3  # mixup: each image with the last, the one before ...
        >>> t = SparseTarget(torch.stack((y, y.flip(0)), 1), torch.tensor([lam, 1 - lam]).expand(8, 2), num_classes=1000)
        >>> loss = bigclass.linear_cross_entropy(features, weight, t)
    """

    indices: Tensor
    weights: Tensor
    num_classes: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.indices, Tensor) or not isinstance(self.weights, Tensor):
            return  # while a pytree is taken apart its leaves may be anything
        if self.indices.dtype not in (torch.int64, torch.int32):
            raise ArgumentTypeError(f"indices: expected int64 or int32 class indices, got {self.indices.dtype}")
        if not self.weights.is_floating_point():
            raise ArgumentTypeError(f"weights: expected a floating-point tensor, got {self.weights.dtype}")
        if self.indices.dim() < 1 or self.indices.shape != self.weights.shape:
            raise ArgumentError(
                f"weights: expected the shape of indices, (..., K) = {tuple(self.indices.shape)}, got {tuple(self.weights.shape)}"
            )
        if self.weights.device != self.indices.device:
            raise ArgumentError(f"weights: expected device {self.indices.device} (that of indices), got {self.weights.device}")
        if isinstance(self.num_classes, float) or self.num_classes < 1:
            raise ArgumentError(f"num_classes: expected an integer >= 1, got {self.num_classes}")

    @property
    def shape(self) -> torch.Size:
        """(..., C), the shape of the dense target."""
        return torch.Size((*self.indices.shape[:-1], self.num_classes))

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def ndim(self) -> int:
        return self.indices.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.indices.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> SparseTarget:
        """Moved or cast as `Tensor.to` would; the indices keep their dtype."""
        weights = self.weights.to(*args, **kwargs)
        indices = self.indices.to(weights.device, non_blocking=kwargs.get("non_blocking", False))
        return replace(self, indices=indices, weights=weights)

    def cuda(self, device: Any = None, non_blocking: bool = False) -> SparseTarget:
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def cpu(self) -> SparseTarget:
        return self.to("cpu")

    def float(self) -> SparseTarget:
        return self.to(torch.float32)

    def detach(self) -> SparseTarget:
        return replace(self, weights=self.weights.detach())

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Beside real tensors (a model in evaluation, a dense baseline) it is its dense form; lazy logits know what to do with it."""
        if not all(issubclass(t, Tensor | cls) for t in types):
            return NotImplemented
        real = functools.partial(pytree.tree_map, lambda a: a.dense() if isinstance(a, cls) else a, is_leaf=lambda a: isinstance(a, cls))
        return func(*real(list(args)), **real(kwargs or {}))

    def __getitem__(self, rows: Any) -> SparseTarget:
        """Some of the rows: an index of the first axis."""
        masked = isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.dim() >= self.ndim
        if isinstance(rows, tuple) or masked or (self.ndim == 1 and rows is not None and rows is not Ellipsis):
            raise ArgumentError(f"SparseTarget: only rows can be indexed, got {rows}")
        return replace(self, indices=self.indices[rows], weights=self.weights[rows])

    def pin_memory(self) -> SparseTarget:
        return replace(self, indices=self.indices.pin_memory(), weights=self.weights.pin_memory())

    def __mul__(self, factor: Any) -> Any:
        if isinstance(factor, int | float):
            return replace(self, weights=self.weights * factor, floor=self.floor * factor)
        if isinstance(factor, Tensor) and factor.shape == self.shape:
            return self.dense() * factor  # real log-probabilities, written out already
        return NotImplemented  # lazy log-probabilities know what to do

    __rmul__ = __mul__

    def __add__(self, constant: Any) -> Any:
        return replace(self, floor=self.floor + constant) if isinstance(constant, int | float) else NotImplemented

    __radd__ = __add__

    def gt(self, threshold: float) -> SparseTarget:
        """1 where the target is above threshold, else 0."""
        index, weights = self.merged()
        floor = float(self.floor > threshold)
        above = (weights + self.floor > threshold).to(self.dtype) - floor
        above = above.masked_fill(index < 0, 0.0)
        shape = (*self.indices.shape[:-1], index.shape[1])
        return SparseTarget(index.reshape(shape), above.reshape(shape), self.num_classes, floor)

    __gt__ = gt

    def __neg__(self) -> SparseTarget:
        return self * -1.0

    def dense(self) -> Tensor:
        """(..., C) probabilities, written out. For small C and for tests."""
        index = torch.where(self.indices < 0, self.num_classes, self.indices).long()
        t = self.weights.new_full((*self.shape[:-1], self.num_classes + 1), self.floor)
        return t.scatter_add(-1, index, self.weights)[..., :-1]

    def merged(self) -> tuple[Tensor, Tensor]:
        """(indices (N, K), weights (N, K)) with no class twice in a row: its first entry has the sum, the others are -1 and 0."""
        n, k = math.prod(self.indices.shape[:-1]), self.indices.shape[-1]
        index, weights = self.indices.reshape(n, k).long(), self.weights.reshape(n, k)
        if k == 0:
            return index.new_full((n, 1), -1), weights.new_zeros((n, 1))
        # 16 bits would round the sums
        weights = (weights if weights.dtype.itemsize >= 4 else weights.float()).masked_fill(index == -1, 0.0)
        if k == 1:
            return index, weights
        repeats = Repeats.of(index)
        return repeats.distinct.gather(1, repeats.place), repeats.summed(weights).gather(1, repeats.place)


def _flatten(t: SparseTarget):
    return [t.indices, t.weights], (t.num_classes, t.floor)


def _unflatten(children, context):
    return SparseTarget(*children, *context)


pytree.register_pytree_node(SparseTarget, _flatten, _unflatten, serialized_type_name="bigclass.SparseTarget")

"""What lazy logits do when their axes are moved, cut or indexed: the same to the features, or to the weight for the class axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.core.stream import Stream
from bigclass.heads.lazy.base import Lazy, plain_number
from bigclass.heads.lazy.shapes import axis, from_start, is_list_of_ints, spread_index, whole_shape


class Axes(Lazy):
    """Views, permutations, pieces and indices of `LazyLogits` (..., C)."""

    stream: Stream
    class_first: bool

    def _rows(self, operation: Callable[[Tensor], Any]) -> Any:
        """operation on the batch axes: what it does to a tensor (*lead, D)."""
        raise NotImplementedError

    def _classes(self, index: Any) -> Any:
        """Some of the classes: an index of the first axis of the weight that keeps it."""
        raise NotImplementedError

    def view(self, *shape: Any) -> Any:
        if len(shape) == 1 and isinstance(shape[0], torch.dtype):
            return self.written_out("view").view(shape[0])
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        whole = whole_shape(shape, self.numel())
        if not whole or self.class_first or whole[-1] != self.stream.shape[1] or math.prod(whole) != self.numel():
            return self.written_out("view").reshape(shape)
        return self._rows(lambda t: t.reshape(*whole[:-1], t.shape[-1]))

    reshape = view

    def view_as(self, other: Any) -> Any:
        return self.view(*other.shape)

    reshape_as = view_as

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        n = self.ndim
        start, end = axis(start_dim, n), axis(end_dim, n)
        if start == end:
            return self
        if self.class_first or end == n - 1:
            return self.written_out("flatten").flatten(start_dim, end_dim)
        return self._rows(lambda t: t.flatten(start, end))

    def unsqueeze(self, dim: int) -> Any:
        at = axis(dim, self.ndim + 1)
        if self.class_first or at == self.ndim:
            return self.written_out("unsqueeze").unsqueeze(dim)
        return self._rows(lambda t: t.unsqueeze(at))

    def squeeze(self, dim: Any = None) -> Any:
        axes = [a for a in range(self.ndim) if self.shape[a] == 1]
        if dim is not None:
            asked = [axis(d, self.ndim) for d in ((dim,) if isinstance(dim, int) else dim)]
            axes = [a for a in axes if a in asked]
        if self.class_first or self.ndim - 1 in axes:
            return self.written_out("squeeze").squeeze() if dim is None else self.written_out("squeeze").squeeze(dim)
        return self._rows(lambda t: t.squeeze(tuple(axes))) if axes else self

    def permute(self, *dims: Any) -> Any:
        dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], Sequence) else dims
        n, lazy = self.ndim, cast(Any, self)  # a dataclass, as all that inherit this
        order = tuple(axis(d, n) for d in dims)
        if self.class_first:
            order = tuple((*range(n)[:1], n - 1, *range(n)[1 : n - 1])[d] for d in order)  # in axes of (*lead, C)
        if len(order) == n and order[-1] == n - 1:
            return replace(lazy, class_first=False)._rows(lambda t: t.permute(order))
        if len(order) == n and n > 2 and order[0] != n - 1 and order[1] == n - 1:
            batch = tuple(a for a in order if a != n - 1)
            return replace(replace(lazy, class_first=False)._rows(lambda t: t.permute(*batch, n - 1)), class_first=True)
        return self.written_out("permute").permute(dims)

    def transpose(self, dim0: int, dim1: int) -> Any:
        n = self.ndim
        order = list(range(n))
        a, b = axis(dim0, n), axis(dim1, n)
        order[a], order[b] = order[b], order[a]
        return self.permute(order)

    swapaxes = swapdims = transpose

    def movedim(self, source: int, destination: int) -> Any:
        if not isinstance(source, int) or not isinstance(destination, int):
            return self.written_out("movedim").movedim(source, destination)
        moved = axis(source, self.ndim)
        order = [a for a in range(self.ndim) if a != moved]
        order.insert(axis(destination, self.ndim), moved)
        return self.permute(order)

    moveaxis = movedim

    def t(self) -> Any:
        return self.written_out("t").t()

    def split(self, split_size: Any = None, dim: int = 0, *, split_size_or_sections: Any = None) -> Any:
        size = split_size if split_size is not None else split_size_or_sections
        at = axis(dim, self.ndim)
        if self.class_first:
            return self.written_out("split").split(size, dim)
        total = self.shape[at]
        sizes = [min(size, total - a) for a in range(0, total, size) or (0,)] if isinstance(size, int) else list(size)
        if sum(sizes) != total:
            raise ArgumentError(f"split_size: expected sizes that add up to {total} (axis {dim}), got {sizes}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(at, a, k) for a, k in zip(starts, sizes, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        return self.split(max(-(-self.shape[dim] // chunks), 1), dim)

    def unbind(self, dim: int = 0) -> Any:
        at = axis(dim, self.ndim)
        if self.class_first or at == self.ndim - 1:
            return self.written_out("unbind").unbind(dim)
        return tuple(self._rows(lambda t, i=i: t.select(at, i)) for i in range(self.shape[dim]))

    def narrow(self, dim: int, start: Any, length: int) -> Any:
        at = axis(dim, self.ndim)
        if self.class_first or not isinstance(start, int):
            return self.written_out("narrow").narrow(dim, start, length)
        if at < self.ndim - 1:
            return self._rows(lambda t: t.narrow(at, start, length))
        self.stream.pairs[0][1].narrow(0, start, length)  # raises as torch does
        start += self.shape[-1] if start < 0 else 0
        return self._classes(slice(start, start + length))

    def select(self, dim: int, index: int) -> Any:
        return self[(*[slice(None)] * axis(dim, self.ndim), index)]

    def __getitem__(self, index: Any) -> Any:
        if self.class_first:
            return self.written_out("indexing")[index]
        index = index if isinstance(index, tuple) else (index,)
        index = tuple(torch.tensor(i, device=self.device) if is_list_of_ints(i) else plain_number(i) for i in index)
        spread = spread_index(index, self.ndim)
        if spread is None:
            return self.written_out("indexing")[index]
        batch, classes = spread
        if isinstance(classes, slice):
            lazy = self if classes == slice(None) else self._classes(classes)
            return lazy if all(isinstance(i, slice) and i == slice(None) for i in batch) else lazy._rows(lambda t: t[(*batch, slice(None))])
        picks = [i for i in (*batch, classes) if isinstance(i, Tensor)]
        if len(picks) == self.ndim and all(i.dim() == 1 and not i.is_floating_point() and i.dtype != torch.bool for i in picks):
            rows = self._rows(lambda t: t[tuple(batch)])  # logits[arange(N), y]
            n = max(rows.shape[0], classes.shape[0])
            rows = rows if rows.shape[0] == n else rows._rows(lambda t: t.expand(n, -1))
            return rows.gather(-1, from_start(classes, self.shape[-1]).expand(n).unsqueeze(-1)).squeeze(-1)
        return self.written_out("indexing")[(*batch, classes)]

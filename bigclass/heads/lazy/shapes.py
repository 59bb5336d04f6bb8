"""Shapes and indices of lazy logits, as torch reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def axis(dim: int, ndim: int) -> int:
    """dim counted from the start. Raise where there is no such axis."""
    if not -ndim <= dim < ndim:
        raise IndexError(f"dim: expected an axis in [{-ndim}, {ndim - 1}] of lazy logits, got {dim}")
    return dim % ndim


def from_start(index: Tensor, size: int) -> Tensor:
    """An index in which -1 is the last, as subscripts have it, counted from the start."""
    return torch.where(index < 0, index + size, index).long()


def is_list_of_ints(i: Any) -> bool:
    return isinstance(i, list) and bool(i) and all(isinstance(k, int) and not isinstance(k, bool) for k in i)


def whole_shape(shape: Sequence[Any], total: int) -> tuple | None:
    """shape with its -1 worked out; None if it does not fit."""
    if not all(isinstance(s, int | torch.SymInt) for s in shape):
        return None
    if -1 in shape:
        known = math.prod([s for s in shape if s != -1])
        if known == 0:
            return None
        shape = [total // known if s == -1 else s for s in shape]
    return tuple(shape)


def spread_index(index: tuple, ndim: int) -> tuple[tuple, Any] | None:
    """(index of the batch axes, index of the class axis); None for an index that is not understood."""
    taken = 0
    for i in index:
        if isinstance(i, Tensor):
            taken += i.dim() if i.dtype in (torch.bool, torch.uint8) else 1
        elif i is None or i is Ellipsis:
            pass
        elif isinstance(i, slice | int) and not isinstance(i, bool):
            taken += 1
        else:
            return None
    if taken > ndim:
        raise IndexError(f"too many indices for lazy logits of {ndim} axes")
    missing = (slice(None),) * (ndim - taken)
    if any(i is Ellipsis for i in index):
        at = next(p for p, i in enumerate(index) if i is Ellipsis)
        index = (*index[:at], *missing, *index[at + 1 :])
    else:
        index = (*index, *missing)
    last = index[-1]
    if last is None or (isinstance(last, Tensor) and last.dtype in (torch.bool, torch.uint8)):
        return None
    return index[:-1], last

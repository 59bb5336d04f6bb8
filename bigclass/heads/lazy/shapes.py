"""Shapes and indices of lazy logits, as torch reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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

"""Row losses: what makes one loss differ from another.

A row loss is a few lines of plain PyTorch on N-vectors, differentiable by plain autograd:

    loss_i = row_loss(folds, picked, args, numbers)

folds: the state of each row fold, its parts (n,) (or (n, k) where a fold keeps k numbers a row). picked: (n, K), 0 where the pick is -1.
args: tensors whose first axis is the row (targets, weights); those that require gradients get them. numbers: constants.
It is applied to a chunk of rows at a time, so row i must depend on row i alone. Column folds do not reach it.
It crosses the custom op by name: register it with `@register_row_loss("name")`.

affine: loss_i = sum of a(args_i) state_i + b(picked_i, args_i). Its derivatives then wait for no state: the gradient of a tile can be made
with the tile itself, and gradients come a slab of classes at a time, at 3 passes, whatever C is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from bigclass.core.errors import ArgumentError

# picked is None only where a loss asks for no picks, so it is left untyped
RowLoss = Callable[[Sequence[tuple[Tensor, ...]], Any, Sequence[Tensor], Sequence[float]], Tensor]

ROW_LOSSES: dict[str, RowLoss] = {}
AFFINE: set[str] = set()


def register_row_loss(name: str, *, affine: bool = False) -> Callable[[RowLoss], RowLoss]:
    """Make a row loss known under `name`. affine: is it, in the states of its folds (module docstring)?"""

    def decorate(function: RowLoss) -> RowLoss:
        taken = ROW_LOSSES.get(name)
        if taken is not None and taken.__qualname__ != function.__qualname__:  # type: ignore[attr-defined]
            raise ArgumentError(f"row loss {name!r} is taken by {taken}; choose another name")
        ROW_LOSSES[name] = function
        (AFFINE.add if affine else AFFINE.discard)(name)
        return function

    return decorate

"""The positives of multi-label targets, in the forms that people have them in, as a few class indices a row.

    padded       (..., K) integers, -1 where a row has fewer; (...) for one positive a row
    CSR          (indptr (N + 1,), indices (P,)) or (indptr, indices, values (P,))
    sparse       a torch sparse CSR (or COO) tensor (N, C): its values are the targets
    SparseTarget (..., C) with its weights and its floor
    dense        (..., C), floating point or bool

The first four become picks (N, K) and, where there are values, targets of the same shape. A class that stands twice in a row counts once;
with values it is refused (of a SparseTarget, whose definition is a sum, the sum is taken). Dense targets stay what they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.losses.inputs import INDEX_DTYPES, check_range
from bigclass.losses.targets import SparseTarget

_FORMS = (
    "class indices padded with -1 (..., K), a CSR pair (indptr, indices) or triple with values, a torch sparse CSR tensor (N, C), "
    "a SparseTarget, or a dense multi-hot tensor (..., C) of floating point or bool"
)


@dataclass(frozen=True)
class Positives:
    """picks: (N, K) int64, -1 for none, no class twice in a row. values: (N, K) targets, None for 1. floor: the target of all others."""

    picks: Tensor
    values: Tensor | None = None
    floor: float = 0.0


def read_positives(positives: Any, lead: Sequence[int], classes: int, device: torch.device) -> Positives | Tensor:
    """`Positives`, or a dense target (..., C), checked.

    Raises:
        TypeError: for something that is none of the forms. ValueError: shapes, devices, pointers or values that do not fit.
        IndexError: a class outside [0, C) (on CUDA: a device-side assertion).
    """
    n = math.prod(lead)
    if isinstance(positives, SparseTarget):
        made = of_sparse_target("positives", positives, lead, classes, device)
        assert made.values is not None
        _check_values(made.values.masked_fill(made.picks < 0, 0.0))
        if not 0.0 <= made.floor <= 1.0:
            raise ArgumentError(f"positives: expected a floor in [0, 1], got {made.floor}")
        return made
    if isinstance(positives, tuple | list):
        if len(positives) not in (2, 3) or not all(isinstance(t, Tensor) for t in positives):
            raise ArgumentTypeError(f"positives: expected {_FORMS}, got a {type(positives).__name__} of {len(positives)}")
        _check_device(device, *positives)
        return _of_csr(*positives, n=n, classes=classes)
    if not isinstance(positives, Tensor):
        raise ArgumentTypeError(f"positives: expected {_FORMS}, got {type(positives).__name__}")
    _check_device(device, positives)
    if positives.layout != torch.strided:
        if positives.layout == torch.sparse_coo:
            positives = positives.coalesce().to_sparse_csr()
        if positives.layout != torch.sparse_csr:
            raise ArgumentTypeError(f"positives: expected a sparse tensor of CSR or COO layout, got {positives.layout}")
        if tuple(positives.shape) != (n, classes):
            raise ArgumentError(f"positives: expected a sparse tensor of shape {(n, classes)}, got {tuple(positives.shape)}")
        return _of_csr(positives.crow_indices(), positives.col_indices(), positives.values(), n=n, classes=classes)
    if positives.is_floating_point() or positives.dtype == torch.bool:
        if tuple(positives.shape) != (*lead, classes):
            raise ArgumentError(f"positives: expected dense targets in the shape of the logits, {(*lead, classes)}, "
                                f"got {tuple(positives.shape)}")  # fmt: skip
        if positives.requires_grad:
            raise ArgumentError("positives: targets are constants and get no gradient; pass positives.detach()")
        _check_values(positives)
        return positives
    if positives.dtype not in INDEX_DTYPES:
        raise ArgumentTypeError(f"positives: expected int64 or int32 class indices, or floating-point or bool dense targets, "
                                f"got {positives.dtype}")  # fmt: skip
    if tuple(positives.shape) != tuple(lead) and tuple(positives.shape[:-1]) != tuple(lead):
        raise ArgumentError(f"positives: expected class indices of shape {tuple(lead)} or {tuple(lead)} + (K,), "
                            f"got {tuple(positives.shape)}")  # fmt: skip
    k = 1 if tuple(positives.shape) == tuple(lead) else positives.shape[-1]
    picks = positives.reshape(n, k).long()
    check_range("positives", picks, picks != -1, classes)
    if k == classes > 2 and not torch.compiler.is_compiling() and picks.device.type == "cpu" and n:
        low, high = picks.aminmax()
        if int(low) >= 0 and int(high) <= 1:
            raise ArgumentError(f"positives: integers are class indices, and {tuple(positives.shape)} of 0 and 1 looks like a multi-hot "
                                "target; pass it as .bool() or .float()")  # fmt: skip
    return Positives(_once(picks))


def pad_positives(positives: Iterable[Iterable[int]]) -> Tensor:
    """Lists of classes, one a row, as the (N, K) int64 that the one-vs-all losses take: K the longest's length (at least 1), -1 the rest.

    Raises:
        TypeError: for anything but lists of integers. IndexError: for a class below 0.

    Example:
        >>> bigclass.pad_positives([[3, 17], [], [5]]).tolist()
        [[3, 17], [-1, -1], [5, -1]]
    """
    try:
        rows = [[operator.index(j) for j in row] for row in positives]
    except TypeError as reason:
        raise ArgumentTypeError(f"positives: expected lists of class indices, one for each row, got others ({reason})") from None
    least = min([min(row) for row in rows if row], default=0)
    if least < 0:
        raise IndexError(f"positives: expected classes >= 0 (padding is added here), got {least}")
    k = max([1, *map(len, rows)])
    return torch.tensor([row + [-1] * (k - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), k)


def of_sparse_target(name: str, target: SparseTarget, lead: Sequence[int], classes: int, device: torch.device) -> Positives:
    """A `SparseTarget` (..., C) as `Positives`, its shape, device and classes checked."""
    if tuple(target.shape) != (*lead, classes):
        raise ArgumentError(f"{name}: expected a SparseTarget of shape {(*lead, classes)}, got {tuple(target.shape)}")
    if target.device != device:
        raise ArgumentError(f"{name}: expected device {device} (that of input), got {target.device}")
    picks, weights = target.merged()
    check_range(name, picks, picks != -1, classes)
    return Positives(picks, weights + target.floor, target.floor)


@torch.compiler.disable(reason="CSR positives are padded to their longest row, which the host must read; for fullgraph=True pad them")
def _of_csr(indptr: Tensor, indices: Tensor, values: Tensor | None = None, *, n: int, classes: int) -> Positives:
    """Padded to the longest row, whose length is read on the host (a sync on a GPU; padded indices need none)."""
    for name, t in (("indptr", indptr), ("indices", indices)):
        if t.dtype not in INDEX_DTYPES or t.dim() != 1:
            raise ArgumentTypeError(f"positives: expected {name} as a vector of int64 or int32, got {t.dtype} {tuple(t.shape)}")
    if values is not None and values.shape != indices.shape:
        raise ArgumentError(f"positives: expected a value for each of {indices.numel()} indices, got {tuple(values.shape)}")
    if indptr.numel() != n + 1:
        raise ArgumentError(f"positives: expected {n + 1} pointers (one more than rows), got {indptr.numel()}")
    counts = indptr.diff().long()
    first, last = int(indptr[0]), int(indptr[-1])
    if first != 0 or last != indices.numel() or (n and int(counts.min()) < 0):
        raise ArgumentError(f"positives: expected pointers that rise from 0 to {indices.numel()} (the number of indices), "
                            f"got {first} to {last}{'' if int(counts.min()) >= 0 else ', falling in between'}")  # fmt: skip
    k = max(int(counts.max()) if n else 0, 1)
    row = torch.repeat_interleave(counts, output_size=indices.numel())
    place = torch.arange(indices.numel(), device=indices.device) - indptr.long()[row]
    indices = indices.long()
    wrong = (indices < 0) | (indices >= classes)
    if indices.device.type == "cpu" and bool(wrong.any()):
        raise IndexError(f"positives: expected class indices in [0, {classes}), got {int(indices[wrong][0])}")
    picks = indices.new_full((n, k), -1).index_put_((row, place), torch.where(wrong, classes, indices))
    if values is None:
        return Positives(_once(picks))
    values = values if values.is_floating_point() else values.float()
    _check_values(values)
    padded = values.new_zeros((n, k)).index_put_((row, place), values)
    if k > 1:
        ordered = picks.sort(1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()
        message = "positives: a class stands twice in a row, with values; add them up first (coalesce), or leave the values out"
        if picks.device.type == "cpu":
            if bool(twice):
                raise ArgumentError(message)
        else:
            torch._assert_async(~twice, f"bigclass: {message}")  # pyright: ignore[reportPrivateImportUsage]
    return Positives(picks, padded)


def _once(picks: Tensor) -> Tensor:
    """picks (N, K) with each class of a row once, ascending."""
    if picks.shape[1] < 2:
        return picks
    ordered = picks.sort(1).values
    return ordered.masked_fill(repeated(ordered), -1)


def repeated(ordered: Tensor) -> Tensor:
    """Where a class of a row (N, K), whose classes are in order, stood just before."""
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return again


def _check_values(values: Tensor) -> None:
    """Targets must lie in [0, 1]: a negative one would reward what it should punish. Looked at on a CPU only."""
    if torch.compiler.is_compiling() or values.device.type != "cpu" or values.numel() == 0 or not values.is_floating_point():
        return
    low, high = values.detach().aminmax()
    if not (float(low) >= 0.0 and float(high) <= 1.0):
        raise ArgumentError(f"positives: expected targets in [0, 1], got values from {float(low):g} to {float(high):g}")


def _check_device(device: torch.device, *tensors: Tensor) -> None:
    for t in tensors:
        if t.device != device:
            raise ArgumentError(f"positives: expected device {device} (that of input), got {t.device}")

"""Collectives with gradients, in two conventions.

What follows a merge is computed alike on every rank (each holds the whole loss), so that its gradient is known everywhere already:

    sum_over, merge_states      forward: all-reduce     backward: nothing to send

What each rank uses for a part of the loss of its own gets the parts added up:

    gather_rows                 forward: all-gather     backward: reduce-scatter, each row's gradient is wanted by its owner alone
    replicated                  forward: nothing        backward: all-reduce of a parameter that all ranks hold

With these the gradients on a rank are those of the one global loss by what the rank holds. Data parallelism then averages those of the
parameters over ranks, and would divide them by their number: `scaled_gradient` multiplies by it first.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.core.folds import Fold, LogSumExp, State, SumFold
from bigclass.parallel.groups import Ranks

# a torch without torch.distributed has no groups either, and gets no further than groups.py
functional: Any = importlib.import_module("torch.distributed._functional_collectives") if dist.is_available() else None
# new names from torch 2.13 on
_all_gather: Any = getattr(functional, "all_gather_single", None) or getattr(functional, "all_gather_tensor", None)
_reduce_scatter: Any = getattr(functional, "reduce_scatter_single", None) or getattr(functional, "reduce_scatter_tensor", None)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)


def batch_sizes(t: Tensor, ranks: Ranks) -> list[int]:
    """How many rows of t (n, D) each rank has: `row_counts` of one tensor."""
    return row_counts((t,), ranks)[0]


def row_counts(tensors: Sequence[Tensor], ranks: Ranks) -> list[list[int]]:
    """How many rows of each of the tensors (n, D) each rank has. The first is the one that travels.

    Raises:
        ValueError: ranks differ in D or in dtype; on each of them, where what follows would hang or mix up bytes."""
    own, t = [t.shape[0] for t in tensors], tensors[0]
    if torch.compiler.is_compiling():
        _assert_alike(own, t.device, ranks, "batches of the same size")
        return [[n] * ranks.size for n in own]
    told = _told([t.shape[1], _kind(t), *own], t.device, ranks)
    for label, values in (("widths", [row[0] for row in told]), ("dtypes", [_KINDS[row[1]] for row in told])):
        if len(set(values)) > 1:
            raise ArgumentError(f"group: expected features of one width and one dtype on all ranks, got {label} {values}")
    return [[row[2 + i] for row in told] for i in range(len(own))]


def counts_of(own: Sequence[int], alike: dict[str, int], tensors: dict[str, Tensor], ranks: Ranks) -> list[list[int]]:
    """Of each number of this rank's the numbers that all ranks have. alike: what must be the same on all, besides the tensors' dtypes.

    Their exchange is a few numbers a rank, which the host waits for. In a traced graph, which cannot wait, `own` must be alike, too: an
    assertion (on CUDA: on the device) fails where it is not.

    Raises:
        ValueError: ranks differ in what must be alike; on each of them."""
    device = next(iter(tensors.values())).device
    if torch.compiler.is_compiling():
        _assert_alike([*own, *alike.values()], device, ranks, "the same number of classes and rows each")
        return [[n] * ranks.size for n in own]
    told = _told([*own, *alike.values(), *[_kind(t) for t in tensors.values()]], device, ranks)
    checked: dict[str, list[Any]] = {name: [row[len(own) + i] for row in told] for i, name in enumerate(alike)}
    checked |= {f"dtypes of {name}": [str(_KINDS[row[i - len(tensors)]]) for row in told] for i, name in enumerate(tensors)}
    for name, values in checked.items():
        if len(set(values)) > 1:
            raise ArgumentError(f"group: expected the same on all ranks, got {name} {values}")
    return [[row[i] for row in told] for i in range(len(own))]


def agreed_rows(t: Tensor | None, axis: int, device: torch.device, ranks: Ranks) -> list[int]:
    """How many rows t has along the axis on each rank, -1 where it is no tensor, once all else about it is alike.

    Raises:
        ValueError: ranks differ in its dtype or its other axes; on each of them."""
    room, there = 6, isinstance(t, Tensor) and t.dim() > axis
    others = [n for i, n in enumerate(t.shape) if i != axis] if isinstance(t, Tensor) and there else []
    mine = [t.shape[axis], _kind(t), *others[:room]] if isinstance(t, Tensor) and there else [-1, -1]
    told = _told([*mine, *[-1] * (room + 2 - len(mine))], device, ranks)
    some = [row[1:] for row in told if row[0] >= 0]
    if any([row != some[0] for row in some]):
        texts = ["none" if row[0] < 0 else f"{_KINDS[row[1]]} with other axes {[n for n in row[2:] if n >= 0]}" for row in told]
        raise ArgumentError(f"group: expected targets (or what else goes with the rows) that are alike on all ranks, got {texts}")
    return [row[0] for row in told]


_KINDS = (*_DTYPES, "another")


def _kind(t: Tensor) -> int:
    return _DTYPES.index(t.dtype) if t.dtype in _DTYPES else len(_DTYPES)


def _told(numbers: Sequence[int], device: torch.device, ranks: Ranks) -> list[list[int]]:
    """The numbers of each rank."""
    return all_of(torch.tensor(numbers, device=device), ranks).tolist()


def _assert_alike(numbers: Sequence[int], device: torch.device, ranks: Ranks, what: str) -> None:
    most = functional.all_reduce(torch.tensor([*numbers, *[-n for n in numbers]], device=device), "max", ranks.name)
    torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
        (most[: len(numbers)] == -most[len(numbers) :]).all(), f"bigclass: under torch.compile all ranks of a group must have {what}"
    )


def wait(t: Tensor) -> Tensor:
    """t, once it has arrived."""
    return functional.wait_tensor(t)


def summed(t: Tensor, ranks: Ranks) -> Tensor:
    """The sum of t over the ranks; no gradient."""
    return wait(functional.all_reduce(t, "sum", ranks.name))


def all_of(t: Tensor, ranks: Ranks) -> Tensor:
    """(W, *t.shape), t of all ranks, which has one shape; no gradient."""
    return wait(_all_gather(t.contiguous(), 0, ranks.name)).view(ranks.size, *t.shape)


def padded(t: Tensor, rows: int) -> Tensor:
    """t (n, ...) with zero rows up to `rows`, contiguous."""
    if t.shape[0] == rows:
        return t.contiguous()
    out = t.new_zeros((rows, *t.shape[1:]))
    out[: t.shape[0]] = t
    return out


def unpadded(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows that count of t (W most, ...), of which rank q has the first sizes[q] of its `most`."""
    most = max(sizes)
    if all(n == most for n in sizes):
        return t
    return torch.cat([t[q * most : q * most + n] for q, n in enumerate(sizes)])


def start_gather(t: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """All ranks' rows, in order, padded (`unpadded` undoes it), perhaps still on their way: the first use waits."""
    return _all_gather(padded(t.detach(), max(sizes)), 0, ranks.name)


def gathered(t: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """The rows of all ranks, rank after rank; no gradient."""
    return unpadded(wait(start_gather(t, sizes, ranks)), sizes)


def scatter_sum(t: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """The sum over ranks of t (sum of sizes, ...), of which this rank gets its own rows."""
    most = max(sizes)
    if any(n != most for n in sizes):
        t = torch.cat([padded(part, most) for part in t.split(list(sizes))])
    return wait(_reduce_scatter(t.contiguous(), "sum", 0, ranks.name))[: sizes[ranks.rank]]


def shift(t: Tensor, ranks: Ranks) -> Tensor:
    """t of the rank before this one, perhaps still on its way."""
    to, source = [0] * ranks.size, [0] * ranks.size
    to[(ranks.rank + 1) % ranks.size] = source[(ranks.rank - 1) % ranks.size] = t.shape[0]
    return functional.all_to_all_single(t, source, to, ranks.name)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, sizes, ranks):
        ctx.sizes, ctx.ranks, ctx.dtype = sizes, ranks, t.dtype
        return gathered(t, sizes, ranks).to(_wide(t))

    @staticmethod
    def backward(ctx, grad):
        return scatter_sum(grad, ctx.sizes, ctx.ranks).to(ctx.dtype), None, None


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def gather_rows(t: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """(sum of sizes, ...): the rows of all ranks, rank after rank. Each rank's gradient is the sum of what reached its rows anywhere.

    They travel in their own dtype and come in fp32 (float64), so that gradients, too, are summed in it and rounded once."""
    return _GatherRows.apply(t, list(sizes), ranks)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, ranks):
        return summed(t, ranks)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_over(t: Tensor, ranks: Ranks) -> Tensor:
    """The sum of t over the ranks, each of which goes on to compute the same with it."""
    return _SumOver.apply(t, ranks)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, ranks, factor):
        ctx.ranks, ctx.factor = ranks, factor
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return summed(grad * ctx.factor, ctx.ranks), None, None


def replicated(t: Tensor, ranks: Ranks, factor: float = 1.0) -> Tensor:
    """t, which all ranks hold and each uses for its part: the gradient is the sum of the parts (times factor), on every rank."""
    return _Replicated.apply(t, ranks, factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, factor):
        ctx.factor = factor
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def scaled_gradient(t: Tensor, factor: float) -> Tensor:
    """t, with factor times its gradient."""
    return t if factor == 1.0 else _ScaledGradient.apply(t, factor)


class _GatherClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, sizes, ranks):
        ctx.start, ctx.count = sum(sizes[: ranks.rank]), sizes[ranks.rank]
        return gathered(s.t(), sizes, ranks).t()

    @staticmethod
    def backward(ctx, grad):
        return grad[:, ctx.start : ctx.start + ctx.count], None, None


def gather_classes(s: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """(n, C) of each rank's columns s (n, M), with which every rank goes on to compute the same."""
    return _GatherClasses.apply(s, list(sizes), ranks)


class _GatherAlike(torch.autograd.Function):
    """(W, *t.shape) of all ranks, each of which goes on to compute the same with it."""

    @staticmethod
    def forward(ctx, t, ranks):
        ctx.rank = ranks.rank
        return all_of(t, ranks)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.rank], None


def merge_states(fold: Fold, state: State, ranks: Ranks) -> State:
    """The state of what all ranks folded.

    A log-sum-exp by two all-reduces (largest, then sum), a sum by one, two numbers a row; other monoids by gathering all states and
    merging them in the order of the ranks, which is the same on each. Differentiable: merging is plain arithmetic, and a state's
    reference point counts as a constant in it, as it does in the fold."""
    if isinstance(fold, LogSumExp) and type(fold).merge is LogSumExp.merge:
        m, mass = state
        top = wait(functional.all_reduce(m.detach(), "max", ranks.name))
        down = (m.detach() - top.clamp_min(torch.finfo(top.dtype).min)).exp()
        return top, sum_over(mass * down, ranks)
    if isinstance(fold, SumFold):
        return tuple([sum_over(t, ranks) for t in state])
    every = [_GatherAlike.apply(t if d else t.detach(), ranks) for t, d in zip(state, fold.differentiable, strict=True)]
    merged = tuple([t[0] for t in every])
    for q in range(1, ranks.size):
        merged = fold.merge(merged, tuple([t[q] for t in every]))
    return tuple([t if d else t.detach() for t, d in zip(merged, fold.differentiable, strict=True)])

r"""A share of the classes for each step: every class that a row of the batch has for its target, and some of the others.

Of the M classes on a rank, P are targets of the batch; m - P of the rest are drawn, uniformly and without repeats, so that each has the
chance pi = (m - P) / (M - P). With every drawn logit moved by log(1/pi) the sum of exponentials over the sample has that over all classes
for its expectation (`corrected`); the log-sum-exp and the gradients are then right up to its relative variance, about (M - P) / (m M)
times that of the exponentials, and exactly where every class is taken. Without, negatives weigh pi times what they should: Partial FC.

Flops: those of m classes instead of M. Nothing of size M x D is made (`sparse`): w[index] (m, D), and its gradient as a sparse tensor of
m rows, so that an optimizer for such (torch.optim.SparseAdam, SGD, Adagrad) touches these alone. m is known without looking at the
targets: as many as `rate` asks for, but no fewer than there are rows, so that a GPU tells the host nothing.

Bengio and Senécal, "Adaptive importance sampling to accelerate training of a neural probabilistic language model", 2008 (the correction);
An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC", arXiv:2203.15565.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.problem import exact_dtype
from bigclass.core.shards import Shards
from bigclass.parallel.collectives import counts_of
from bigclass.parallel.layer import Layer


@dataclass(frozen=True)
class ClassSampling:
    """Train on a share of the classes each step: `sample=` of losses and heads.

    Args:
        rate: share of a rank's classes, in (0, 1]. All of them: the full loss, exactly.
        generator: draws the negatives, on the weight's device; on each rank another (torch.Generator().manual_seed(seed + rank)). None: the
            global one of the device.
        corrected: move the logits of drawn negatives by log(1/pi), for the full loss's gradients in expectation. False: as Partial FC.
        sparse: the weight's gradient as a sparse tensor of the rows that were used. False: a dense one, zeros elsewhere (DTensors, AdamW).

    Example:
        >>> head = bigclass.MarginHead(512, shard, group=bigclass.Spread(classes=group, batch=group))
        >>> loss = head(features, labels, sample=bigclass.ClassSampling(0.1, generator=torch.Generator().manual_seed(rank)))
    """

    rate: float
    generator: torch.Generator | None = None
    corrected: bool = True
    sparse: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.rate, int | float) or isinstance(self.rate, bool) or not 0.0 < self.rate <= 1.0:
            raise ArgumentError(f"rate: expected a share of the classes in (0, 1], got {self.rate!r}")

    def size(self, classes: int, targets: int) -> int:
        """How many of a rank's classes are taken in a batch with so many targets."""
        return min(classes, max(math.ceil(self.rate * classes), targets))


@dataclass(frozen=True)
class Sample:
    """layer: of the classes that were taken. target (N,): counted among them, all ranks'; those of other ranks are some class there.
    shift (m centres,): what their logits are moved by."""

    layer: Layer
    target: Tensor
    shift: Tensor


def sampled(layer: Layer, target: Tensor, keep: Tensor | None, sampling: Any, centres: int = 1) -> Sample:
    """Draw the classes of a step. target (N,): classes of all ranks; keep (N,): which rows count. centres: rows of w for each class."""
    if not isinstance(sampling, ClassSampling):
        raise ArgumentTypeError(f"sample: expected a ClassSampling or None, got {type(sampling).__name__}")
    if torch.compiler.is_compiling():
        raise ArgumentError("sample: draws are not offered under torch.compile; call the loss outside of the graph")
    w, layout = layer.weight, layer.layout
    shards = None if layout is None else layout.classes
    rows = (w.shape[0],) if shards is None else shards.sizes
    if any(n % centres for n in rows):
        raise ArgumentError(f"linear_weight: expected shards of whole classes of {centres} rows each, got {list(rows)} rows on the ranks")
    sizes = [n // centres for n in rows]
    if sampling.sparse and layer.distributed:
        raise ArgumentError("sample: a DTensor weight takes no sparse gradient; use ClassSampling(sparse=False), or plain shards (group=)")
    rank = 0 if shards is None else shards.ranks.rank
    m = sampling.size(sizes[rank], target.shape[0])
    taken = [m] if shards is None else counts_of([m], {}, {"input": layer.input}, shards.ranks)[0]
    counted = target if keep is None else torch.where(keep, target, -1)
    start = sum(sizes[:rank])
    index, shift = _draw(counted, start, sizes[rank], m, sampling)
    # where a class went: of another rank's any, for that rank alone looks
    starts = _on_device([0, *sizes], target.device).cumsum(0)
    owner = (torch.bucketize(target.clamp_min(0), starts, right=True) - 1).clamp(0, len(sizes) - 1)
    to = _on_device([0, *taken[:-1]], target.device).cumsum(0)[owner]
    mine = (target >= start) & (target < start + sizes[rank])
    to = torch.where(mine, sum(taken[:rank]) + torch.searchsorted(index, (target - start).contiguous()), to)
    to = to if keep is None else torch.where(keep, to, target)
    if centres > 1:
        index = (index.unsqueeze(1) * centres + torch.arange(centres, device=index.device)).reshape(-1)
        shift = shift.repeat_interleave(centres)
    pick = _Rows.apply if sampling.sparse else _dense_rows
    bias = None if layer.bias is None else _dense_rows(layer.bias, index)
    made = None if layout is None else replace(layout, classes=None if shards is None else Shards(shards.ranks, _times(taken, centres)))
    return Sample(replace(layer, weight=pick(w, index), bias=bias, layout=made), to, shift)


def _times(taken: list[int], centres: int) -> tuple[int, ...]:
    return tuple([n * centres for n in taken])


def _on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64 filled in there: a copy from the host's ordinary memory would wait for the device."""
    return torch.cat([torch.full((1,), value, device=device) for value in values])


def _draw(target: Tensor, start: int, classes: int, m: int, sampling: ClassSampling) -> tuple[Tensor, Tensor]:
    """(which m of this rank's classes, in order; log(1/pi) (m,), 0 for those that are targets)."""
    here = (target >= start) & (target < start + classes)
    wanted = torch.zeros(classes + 1, dtype=torch.bool, device=target.device)
    wanted[torch.where(here, target - start, classes)] = True  # all others go to the spare one
    wanted = wanted[:classes]
    draws = torch.rand(classes, generator=sampling.generator, device=target.device)
    index = (draws + 2.0 * wanted).topk(m).indices.sort().values
    if not sampling.corrected or m == classes:
        return index, torch.zeros(m, dtype=exact_dtype(target.device), device=target.device)
    there = wanted.sum(dtype=exact_dtype(target.device))
    move = torch.log((classes - there) / (m - there).clamp_min(1.0))
    return index, torch.where(wanted[index], 0.0, move)


def _dense_rows(t: Tensor, index: Tensor) -> Tensor:
    return t.index_select(0, index)


class _Rows(torch.autograd.Function):
    """t[index] of different rows, whose gradient is a sparse tensor of them."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.shape = t.shape
        return t.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(index.unsqueeze(0), grad, ctx.shape, is_coalesced=True, check_invariants=False), None

"""The one op over classes that are spread over ranks (`Stream.layout.classes`).

Each rank folds its own classes, and the states, being monoids, are merged: a log-sum-exp by two all-reduces (largest, then sum), a sum by
one, any other fold by gathering the states; picked logits by one, each from its owner. What follows is computed alike on every rank, so the
gradient of the merged numbers is known everywhere, and each rank makes that of its own classes: dw, db and a class scale are complete, dx
is a part, which is added up where x came in (layer.py).

    flops    2NMD + 6NMD on a rank with M classes: the whole row is not known before the merge, so tiles are made again. Sums that need no
             merge before they have a gradient (one-vs-all losses) take 2NMD + 4NMD.
    bytes    4N a sum, 8N a log-sum-exp, 4NK for picks, 4ND for dx; all-reduces of these, twice that over a ring. (8 for float64.)

Without a layout these are the functions of core/op.py, from which losses import nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bigclass.core import op
from bigclass.core.custom_ops import checked_in_graph
from bigclass.core.engines.filter import exact_report
from bigclass.core.errors import ArgumentError
from bigclass.core.folds import Fold, State
from bigclass.core.problem import assert_picks, exact_dtype, squeezed
from bigclass.core.shards import Shards
from bigclass.core.stream import Stream
from bigclass.core.topk import TopK
from bigclass.core.updates import SlabUpdate
from bigclass.parallel.collectives import merge_states, replicated, scaled_gradient, sum_over


def shards_of(stream: Stream) -> Shards | None:
    """Which classes of the stream are this rank's; None: all."""
    return None if stream.layout is None else stream.layout.classes


def reduce_logits(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], *, keep: Tensor | None = None, engine: str = "auto",
    report: Tensor | None = None,
) -> tuple[list[State], Tensor | None]:  # fmt: skip
    """`core.op.reduce_logits` over all classes, wherever they are. picks count them from the first rank's first on.

    A report tells of this rank's classes."""
    shards = shards_of(stream)
    if shards is None:
        return op.reduce_logits(stream, picks, folds, keep=keep, engine=engine, report=report)
    if any(f.axis != "rows" for f in folds):
        raise ArgumentError("reduce_logits: classes that are spread over ranks have no column folds")
    mine = [_own_fold(f, shards) for f in folds]
    here = None if picks is None else own_picks(stream, picks)
    states, picked = _own_states(own(stream), here, mine, keep, engine, report)
    whole = [squeezed(merged(f, state, shards)) for f, state in zip(folds, states, strict=True)]
    return whole, None if picked is None else sum_over(picked, shards.ranks)


def observed_loss(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], observed: Sequence[Fold], row_loss: str, args: Sequence[Tensor] = (),
    numbers: Sequence[float] = (), *, keep: Tensor | None = None, update: SlabUpdate | None = None, engine: str = "auto",
) -> tuple[Tensor, list[State]]:  # fmt: skip
    """`core.op.observed_loss` over all classes, wherever they are."""
    shards = shards_of(stream)
    if shards is None:
        return op.observed_loss(stream, picks, folds, observed, row_loss, args, numbers, keep=keep, update=update, engine=engine)
    if update is not None:
        raise ArgumentError("update: slabs are handed on where the loss is made with its gradients, which over shards of classes (group=) "
                            "it is not; leave one of them out")  # fmt: skip
    states, picked = reduce_logits(stream, picks, [*folds, *observed], keep=keep, engine=engine)
    return op.loss_of_states(stream, states, picked, len(folds), row_loss, args, numbers, keep)


def stream_loss(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], row_loss: str, args: Sequence[Tensor] = (), numbers: Sequence[float] = (),
    *, keep: Tensor | None = None, engine: str = "auto",
) -> Tensor:  # fmt: skip
    """`core.op.stream_loss` over all classes, wherever they are."""
    return observed_loss(stream, picks, folds, (), row_loss, args, numbers, keep=keep, engine=engine)[0]


def own(stream: Stream) -> Stream:
    """The stream over this rank's classes. What all ranks hold (scales, parameters of maps) gets the sum of the parts of its gradient."""
    shards = shards_of(stream)
    assert shards is not None
    shared = lambda t: replicated(t, shards.ranks) if t.requires_grad and torch.is_grad_enabled() else t  # noqa: E731
    maps = tuple([replace(m, tensors=tuple([shared(t) for t in m.tensors])) for m in stream.maps])
    scale = stream.scale_tensor
    return replace(stream, layout=None, scale_tensor=None if scale is None else shared(scale), maps=maps)


def over_classes(t: Tensor, stream: Stream) -> Tensor:
    """The sum over ranks of t, each rank's of its own classes; t where all are here."""
    shards = shards_of(stream)
    return t if shards is None else sum_over(t, shards.ranks)


def over_batch(count: float | Tensor, stream: Stream) -> float | Tensor:
    """The sum over the ranks that the batch is spread over of what their rows count; no gradient."""
    layout = stream.layout
    if layout is None or layout.batch is None:
        return count
    exact = exact_dtype(stream.device)
    t = count if isinstance(count, Tensor) else stream.tensors[0].new_full((), count, dtype=exact)
    return sum_over(t.detach(), layout.batch)


def whole_batch(loss: Tensor, stream: Stream) -> Tensor:
    """The sum over ranks of the loss of their rows, and this rank's part of its gradient: times the number of ranks if gradients of
    what all of them hold are averaged."""
    layout = stream.layout
    if layout is None or layout.batch is None:
        return loss
    return sum_over(scaled_gradient(loss, layout.factor), layout.batch)


def rows_of(stream: Stream) -> float | Tensor:
    """N, of all ranks."""
    return over_batch(float(stream.shape[0]), stream)


def own_picks(stream: Stream, picks: Tensor) -> Tensor:
    """The picks that are this rank's, all of which must be classes of some rank, or -1."""
    shards = shards_of(stream)
    assert shards is not None
    if torch.compiler.is_compiling():
        return shards.picks(checked_in_graph(picks, shards.total))
    assert_picks(picks, shards.total)
    return shards.picks(picks)


def nothing(stream: Stream) -> Tensor:
    """0, on which autograd hangs zeros for gradients: what a rank without classes adds."""
    wide = stream.accumulate_dtype
    return torch.stack([t.reshape(-1)[:0].sum().to(wide) for t in stream.tensors]).sum()


def _own_fold(fold: Fold, shards: Shards) -> Fold:
    """The fold with its tensors over this rank's classes."""
    if shards.sizes[shards.ranks.rank] % fold.group:
        raise ArgumentError(
            f"linear_weight: expected shards of whole classes of {fold.group} rows each, got {list(shards.sizes)} rows on the ranks"
        )

    def part(t: Tensor, axis: str) -> Tensor:
        if axis in ("folded", "grid"):
            return shards.vector(t)
        return replicated(t, shards.ranks) if t.requires_grad and torch.is_grad_enabled() else t

    return replace(fold, tensors=tuple([part(t, axis) for t, axis in zip(fold.tensors, fold.tensor_axes, strict=False)]))


def _own_states(
    stream: Stream, picks: Tensor | None, folds: Sequence[Fold], keep: Tensor | None, engine: str, report: Tensor | None
) -> tuple[list[State], Tensor | None]:
    """States and picks over this rank's classes, of which there may be none: then these are neutral, and their gradients zeros."""
    if stream.shape[1]:
        return op.reduce_logits(stream, picks, folds, keep=keep, engine=engine, report=report)
    zero, n = nothing(stream), stream.shape[0]
    if report is not None:
        report.copy_(exact_report(report))
    neutral = [f.identity(n, zero.detach()) for f in folds]
    states = [tuple([t + zero if d else t for t, d in zip(s, f.differentiable, strict=True)]) for f, s in zip(folds, neutral, strict=True)]
    return states, None if picks is None else zero.expand(picks.shape)


def merged(fold: Fold, state: State, shards: Shards) -> State:
    """The state of a fold over the classes of all ranks, each part (N, k)."""
    wide = tuple([t.unsqueeze(-1) if t.dim() == 1 else t for t in state])
    if isinstance(fold, TopK):
        values, classes = wide
        wide = values, torch.where(classes >= 0, classes + shards.start // fold.group, classes)
    return merge_states(fold, wide, shards.ranks)

"""A linear layer whose classes, or whose rows, are spread over ranks: what the user gave, as what the losses work on.

    classes    w (M_r, D) and b (M_r,) are rank r's shard of the classes. The rows are the same on all of these ranks, or spread over them:
               then features and targets are gathered, and every rank makes its classes' part for all rows.
    batch      rows spread over ranks that hold the same classes each: means are over the rows of all of them.

Features enter once: `replicated` (backward: all-reduce of dx) or gathered (backward: reduce-scatter), in fp32 at least, so that dx is added
up over ranks before it is rounded; the products run in their own dtype as ever. Bytes a rank moves, e an element's, N rows of all ranks:
replicated 4ND in the backward; gathered eND in the forward, 4ND in the backward; targets 8NK.

DTensors say themselves how they lie: a weight `Shard(0)` along one axis of its mesh is a shard over the classes, features `Replicate()`
there are the same on all ranks and `Shard(d)` spread over them; their gradients come back with the same placements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.shards import Layout, Shards
from bigclass.parallel.collectives import agreed_rows, counts_of, gather_rows, gathered, replicated, scaled_gradient
from bigclass.parallel.groups import Ranks

GRADIENTS = ("mean", "sum")


@dataclass(frozen=True)
class Spread:
    """How a linear layer and its batch lie over ranks: the `group=` of losses and heads.

    Args:
        classes: a ProcessGroup, or a DeviceMesh of one axis: linear_weight (M, D) and linear_bias (M,) are this rank's shard of the
            classes, those of the first rank first. Shards may differ in size and be empty. None: every rank has all classes.
        batch: the ranks over which the rows are spread, each rank having others, any number of them; means are over the rows of all.
            The same group as `classes`: features and targets are gathered. Another one (another axis of a mesh), or without `classes`:
            every rank keeps its rows. None: the same rows on all ranks.
        gradients: how the gradients of what all ranks of `batch` hold (the layers below, a scale, a whole weight) will be combined:
            "mean", as DistributedDataParallel and FSDP do, or "sum".
        class_sizes: how many classes each rank has. None: the ranks tell each other at every call, which on a GPU the host waits for
            (in a traced graph all must have as many).

    Raises:
        ValueError, TypeError: at construction for options, at the call for groups that do not fit.

    Example:
        >>> mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("dp", "tp"))
        >>> group = bigclass.Spread(classes=mesh["tp"], batch=mesh["dp"])
        >>> loss = bigclass.linear_cross_entropy(x, w_shard, y, group=group)
    """

    classes: Any = None
    batch: Any = None
    gradients: str = "mean"
    class_sizes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, group: Any) -> Spread | None:
        """A user's `group=`: None, a `Spread`, or the group that the classes are spread over."""
        if group is None or isinstance(group, Spread):
            return group
        if type(group).__name__ not in ("ProcessGroup", "DeviceMesh") and not isinstance(
            group, getattr(torch.distributed, "ProcessGroup", ())
        ):
            if isinstance(group, int):  # what torch.distributed.new_group gives those outside of it
                Ranks.of(group)
            raise ArgumentTypeError(f"group: expected a ProcessGroup or a DeviceMesh (or a Spread), got {type(group).__name__}")
        return cls(classes=group)

    def __deepcopy__(self, memo: Any) -> Spread:
        return self  # of a copied head: process groups cannot be copied

    def __post_init__(self) -> None:
        if self.gradients not in GRADIENTS:
            raise ArgumentError(f"gradients: expected one of {GRADIENTS}, got {self.gradients!r}")
        if self.class_sizes is not None and (self.classes is None or any(n < 0 for n in self.class_sizes)):
            raise ArgumentError(f"class_sizes: expected the number of classes of each rank of `classes`, got {self.class_sizes}")


@dataclass(frozen=True)
class Rows:
    """Rows that were gathered along an axis. sizes: how many each rank has along it. scale: of the gradient of a rank's own results."""

    ranks: Ranks
    sizes: tuple[int, ...]
    axis: int
    scale: float

    def gather(self, t: Tensor) -> Tensor:
        """t of all ranks; no gradient."""
        return gathered(t.movedim(self.axis, 0), self.sizes, self.ranks).movedim(0, self.axis)

    def own(self, t: Tensor) -> Tensor:
        """This rank's rows of what every rank made of all."""
        return _OwnRows.apply(t, self)


class _OwnRows(torch.autograd.Function):
    """A slice, whose gradient every rank needs of every rank's rows."""

    @staticmethod
    def forward(ctx, t, rows):
        ctx.rows = rows
        start = sum(rows.sizes[: rows.ranks.rank])
        return t.narrow(rows.axis, start, rows.sizes[rows.ranks.rank]).clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.rows.gather(grad) * ctx.rows.scale, None


@dataclass(frozen=True)
class Layer:
    """A layer as this rank's part of the work. input: all rows it works on. compute_dtype: of its products, where `input` is wider.

    rows: they were gathered; None: they are this rank's own, or everyone's. distributed: are weight and bias of DTensors?"""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    layout: Layout | None = None
    compute_dtype: torch.dtype | None = None
    rows: Rows | None = None
    distributed: bool = False

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(input, weight, bias)"""
        return self.input, self.weight, self.bias

    @property
    def classes(self) -> int:
        """C, of all ranks."""
        shards = None if self.layout is None else self.layout.classes
        return self.weight.shape[0] if shards is None else shards.total

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of the caller's rows."""
        lead = list(self.input.shape[:-1])
        if self.rows is not None:
            lead[self.rows.axis] = self.rows.sizes[self.rows.ranks.rank]
        return tuple(lead)

    def gather_padded(self, t: Tensor, fill: float) -> tuple[Tensor, int]:
        """(t (*lead, K) for all rows that the layer works on, K): the largest K of a rank, the rest filled."""
        assert self.rows is not None
        (widths,) = counts_of([t.shape[-1]], {}, {"positives": t}, self.rows.ranks)
        most = max(widths)
        if t.shape[-1] < most:
            t = torch.cat((t, t.new_full((*t.shape[:-1], most - t.shape[-1]), fill)), -1)
        return self.rows.gather(t), most

    def whole(self, argument: str) -> None:
        """Raise where the layer is spread over ranks, for an argument that is not."""
        if self.layout is not None:
            raise ArgumentError(f"{argument}: is not offered with group= (or DTensors); leave one of them out")

    def gather(self, t: Any) -> Any:
        """What goes with the rows (a target, a mask), for all rows the layer works on. Tensors of all rows stay as they are."""
        if isinstance(t, Tensor) and _is_dtensor(t):
            t = t.to_local()  # pyright: ignore[reportAttributeAccessIssue]
        if self.rows is None:
            return t
        rows, own = self.rows, self.rows.sizes[self.rows.ranks.rank]
        t = t.long() if isinstance(t, Tensor) and t.dtype == torch.int32 else t
        if not torch.compiler.is_compiling():
            given = agreed_rows(t, rows.axis, self.input.device, rows.ranks)
            if given == [self.input.shape[rows.axis]] * len(given) != list(rows.sizes):
                return t  # all rows, on every rank
            if given != [-1] * len(given) and given != list(rows.sizes):
                raise ArgumentError(
                    f"target (or what else goes with the rows): expected as many rows as input has on each rank, {list(rows.sizes)}, got "
                    f"{given} (-1: none)"
                )
        elif isinstance(t, Tensor) and t.shape[rows.axis] != own:
            raise ArgumentError(f"target: expected {own} rows along axis {rows.axis} (as input), got shape {tuple(t.shape)}")
        return rows.gather(t) if isinstance(t, Tensor) else t

    def refuse_cut(self, axis: int) -> None:
        """Raise if the rows were gathered along this axis, of whose positions a result leaves out the last."""
        if self.rows is not None and self.rows.axis == axis:
            raise ArgumentError(
                "shift: of positions that are spread over ranks, results of single positions would lack the last of the whole sequence; "
                "shift the labels before they are spread, and leave shift=0"
            )

    def finish(self, out: Any, reduction: str) -> Any:
        """A loss, or (loss, a named tuple with a tensor for each row), of all rows that the layer works on, as its caller has them."""
        if self.rows is None:
            return out
        loss, *more = out if isinstance(out, tuple) else (out,)
        loss = self.own(loss) if reduction == "none" else loss
        return (loss, more[0]._make([self.own(t) if isinstance(t, Tensor) and t.dim() else t for t in more[0]])) if more else loss

    def own(self, t: Tensor) -> Tensor:
        """This rank's rows of a result (..., k) of all."""
        return t if self.rows is None else self.rows.own(t)


def layer_of(input: Any, weight: Any, bias: Any, group: Any) -> Layer:
    """The layer of a call with `group=`, or with DTensors.

    Raises:
        ValueError, TypeError: groups that this rank is no member of, placements that cannot be taken, ranks that differ in what must be
        alike (on all of them, where what follows would hang).
    """
    if group is None and not any([_is_dtensor(t) for t in (input, weight, bias)]):
        return Layer(input, weight, bias)
    for name, t, least in (("input", input, 1), ("linear_weight", weight, 2)):
        if not isinstance(t, Tensor) or t.dim() < least:
            raise ArgumentTypeError(f"{name}: expected a tensor with at least {least} axes, got {getattr(t, 'shape', type(t).__name__)}")
    spread = Spread.of(group) or Spread()
    classes, batch, sizes = Ranks.of(spread.classes), Ranks.of(spread.batch), spread.class_sizes
    distributed = _is_dtensor(weight)
    if distributed and batch is not None:
        _check_apart(weight, batch)
    if distributed:
        weight, bias, classes, sizes = _of_dtensors(weight, bias, classes)
    elif _is_dtensor(bias):
        raise ArgumentError("linear_bias: a DTensor beside a linear_weight that is none; distribute both, or neither")
    same, axis = batch is not None and classes is not None and batch.name == classes.name, 0
    if _is_dtensor(input):
        input, found = _local_input(input, classes, batch)
        if found is None and same:
            raise ArgumentError("input: a DTensor that is the same on all ranks, but group= spreads the batch over them; leave batch=None")
        if found is not None:
            batch, same, axis = classes, True, found
    elif distributed and classes is not None and group is None:
        raise ArgumentError(
            "linear_weight: a DTensor beside an input that is none. If FSDP sharded it, call the module that owns it, whose forward "
            "gathers it; if its classes are sharded, say how the batch lies: group=Spread(classes=mesh['tp']) for the same rows on all "
            "these ranks, Spread(classes=mesh['tp'], batch=mesh['tp']) for rows spread over them"
        )
    if same and input.dim() < 2:
        raise ArgumentError(f"input: expected at least two axes (..., D) where rows are spread, got shape {tuple(input.shape)}")
    factor = float(batch.size) if batch is not None and spread.gradients == "mean" else 1.0
    if classes is None:
        return Layer(input, weight, bias, None if batch is None else Layout(None, batch, factor), distributed=distributed)
    of_rank, rows = _agreed(input, weight, bias, classes, axis, same, sizes)
    layout = Layout(Shards(classes, of_rank), None if same else batch, 1.0 if same else factor)
    dtype = torch.promote_types(input.dtype, weight.dtype)
    if same:
        x = gather_rows(scaled_gradient(input, factor).movedim(axis, 0), rows, classes).movedim(0, axis)
        return Layer(x, weight, bias, layout, _narrow(dtype, x), Rows(classes, rows, axis, 1.0 / factor), distributed)
    if input.requires_grad and torch.is_grad_enabled():
        input = replicated(input.to(torch.promote_types(input.dtype, torch.float32)), classes)
    return Layer(input, weight, bias, layout, _narrow(dtype, input), None, distributed)


def _narrow(dtype: torch.dtype, x: Tensor) -> torch.dtype | None:
    """What the products are to run in, if x came in a wider type than that; None: as ever."""
    return None if dtype == torch.promote_types(dtype, x.dtype) else dtype


def _is_dtensor(t: Any) -> bool:
    # by name: torch.distributed.tensor takes a while to import, and who has a DTensor has imported it
    return isinstance(t, Tensor) and type(t).__name__ == "DTensor" and hasattr(t, "placements")


def _check_apart(weight: Any, batch: Ranks) -> None:
    """Raise for a DTensor that claims to be replicated over ranks with different rows: its gradient there would be different, too."""
    for i, p in enumerate(weight.placements):
        here = Ranks.of(weight.device_mesh.get_group(i)) if p.is_replicate() else None
        if here is not None and here.name == batch.name:
            raise ArgumentError(
                "linear_weight: a DTensor with Replicate() over the ranks that the batch is spread over, whose gradients no placement "
                "describes; keep that axis out of its mesh, and let FSDP (fully_shard with mesh=) or DistributedDataParallel combine them"
            )


def _of_dtensors(weight: Any, bias: Any, group: Ranks | None) -> tuple[Tensor, Any, Ranks | None, tuple[int, ...] | None]:
    """(this rank's weight, its bias, the ranks that share the classes, how many each has) of DTensors."""
    mesh, places = weight.device_mesh, weight.placements
    axes = [i for i, p in enumerate(places) if not p.is_replicate()]
    if any(not (type(places[i]).__name__ == "Shard" and places[i].dim == 0) for i in axes) or len(axes) > 1:
        raise ArgumentError(
            f"linear_weight: expected a DTensor with Shard(0) (over the classes) along at most one axis of its mesh and Replicate() along "
            f"the others, got placements {tuple(places)}; redistribute it"
        )
    if bias is not None and (not _is_dtensor(bias) or bias.device_mesh != mesh or tuple(bias.placements) != tuple(places)):
        got = f"placements {tuple(bias.placements)}" if _is_dtensor(bias) else "a plain tensor"
        raise ArgumentError(f"linear_bias: expected a DTensor on linear_weight's mesh with its placements {tuple(places)}, got {got}")
    w, b = weight.to_local(grad_placements=places), None if bias is None else bias.to_local(grad_placements=places)
    if not axes:
        if group is not None:
            raise ArgumentError(
                "linear_weight: a DTensor that is whole on every rank, but group= says that its classes are spread; leave classes=None"
            )
        return w, b, None, None
    found = Ranks.of(mesh.get_group(axes[0]))
    if group is not None and (found is None or found.name != group.name):
        raise ArgumentError("group: its classes are another group than the mesh axis that linear_weight, a DTensor, is sharded along")
    total, count = weight.shape[0], 1 if found is None else found.size
    step = -(-total // count)
    sizes = tuple([max(min(step, total - q * step), 0) for q in range(count)])
    if w.shape[0] != sizes[0 if found is None else found.rank]:
        raise ArgumentError(f"linear_weight: expected chunks of {step} classes, as Shard(0) makes them, got {w.shape[0]} of {total} here")
    return w, b, found, sizes


def _local_input(input: Any, classes: Ranks | None, batch: Ranks | None) -> tuple[Tensor, int | None]:
    """(this rank's rows, the axis they are spread along; None: they are the same on all of these ranks) of a DTensor."""
    mesh, places = input.device_mesh, input.placements
    if any(p.is_partial() for p in places):
        raise ArgumentError(
            f"input: expected Replicate() or Shard placements, got {tuple(places)}, of which partial sums are not added up yet"
        )
    found: int | None = None
    for i, p in enumerate(places):
        if p.is_replicate():
            continue
        if p.dim == input.dim() - 1:
            raise ArgumentError(f"input: expected whole features on each rank, got placements {tuple(places)}; redistribute it")
        here = Ranks.of(mesh.get_group(i))
        if here is None:
            continue
        if classes is not None and here.name == classes.name:
            found = p.dim
        elif batch is None or here.name != batch.name:
            raise ArgumentError(
                f"input: its rows are sharded, {tuple(places)}, along an axis of its mesh that is not that of the classes; say that the "
                "batch is spread there, group=Spread(classes=..., batch=mesh[axis])"
            )
    return input.to_local(grad_placements=places), found


def _agreed(
    x: Tensor, w: Tensor, b: Tensor | None, ranks: Ranks, axis: int, spread: bool, sizes: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(classes of each rank, rows of each rank along the axis), once the ranks agree in all that must be alike."""
    if sizes is not None and not spread and (x.device.type != "cpu" or torch.compiler.is_compiling()):
        return _checked(sizes, w, ranks), ()  # nothing to ask, so nothing for the host to wait for
    alike = {
        "features": w.shape[1],
        "features of input": x.shape[-1],
        "bias or none": int(b is not None),
        "a bias that fits": int(b is None or b.shape[0] == w.shape[0]),
        "input that requires a gradient": int(x.requires_grad and torch.is_grad_enabled()),
        "axes": x.dim(),
    }
    for i, n in enumerate(x.shape[:-1]):
        if not spread or i != axis:
            alike[f"input.shape[{i}]"] = n
    classes, length = counts_of([w.shape[0], x.shape[axis]], alike, {"input": x, "linear_weight": w}, ranks)
    found = tuple(classes)
    if not any(found):
        raise ArgumentError("linear_weight: expected at least one class on one of the ranks, got none")
    if sizes is not None and tuple(sizes) != found:
        raise ArgumentError(f"class_sizes: expected the shards that the ranks have, {list(found)}, got {list(sizes)}")
    return found, tuple(length)


def _checked(sizes: Sequence[int], w: Tensor, ranks: Ranks) -> tuple[int, ...]:
    if len(sizes) != ranks.size or sizes[ranks.rank] != w.shape[0]:
        raise ArgumentError(
            f"class_sizes: expected {ranks.size} numbers, one a rank, with {w.shape[0]} (the rows of linear_weight) for rank {ranks.rank}, "
            f"got {list(sizes)}"
        )
    return tuple(sizes)

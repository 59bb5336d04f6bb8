"""Heads whose classes are spread over ranks: the weight becomes a DTensor, and the head is told how its batch lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.heads.linear import LinearHead
from bigclass.heads.margin import MarginHead
from bigclass.parallel.groups import Ranks
from bigclass.parallel.layer import GRADIENTS, Spread

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

Head = TypeVar("Head", bound=LinearHead | MarginHead)


def shard_classes(head: Head, group: Any, *, batch: Any = None, gradients: str = "mean") -> Head:
    """Spread a head's classes over ranks, in place: its weight (and bias) become DTensors, Shard(0), of which each rank has a chunk.

    All ranks call it with the same head; the values are those of the first rank. Before the optimizer is made (the parameters are new
    ones), and before fully_shard or DistributedDataParallel. Checkpoints of torch.distributed.checkpoint load on any number of ranks.

    Args:
        head: a `CCEHead`, `LMHead`, `MultiLabelHead` or `MarginHead` that is whole on every rank (or on the meta device). A weight that an
            embedding shares comes apart from it: for a transformers model see `bigclass.integrations.transformers.shard_vocabulary`.
        group: the ranks: a DeviceMesh of one axis, or a ProcessGroup.
        batch, gradients: as in `Spread`; batch=group for rows that are spread over the same ranks.

    Returns:
        The head. `head(features, target)` is the loss of the whole, `head(features)` and `head.predict` are of all classes.

    Raises:
        TypeError: no such head. ValueError: a group that this rank is no member of; sub-centres of one class on two ranks.

    Example:
        >>> head = bigclass.MarginHead(512, 10_000_000)
        >>> bigclass.shard_classes(head, mesh["tp"], batch=mesh["tp"])  # Partial FC's layout: a batch and a share of classes a rank
        >>> loss = head(features, labels)
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not isinstance(head, LinearHead | MarginHead):
        raise ArgumentTypeError(f"head: expected a head of this library, got {type(head).__module__}.{type(head).__qualname__}")
    if gradients not in GRADIENTS:
        raise ArgumentError(f"gradients: expected one of {GRADIENTS}, got {gradients!r}")
    ranks, centres = Ranks.of(group), getattr(head, "subcenters", 1)
    if type(head.weight).__name__ == "DTensor":
        raise ArgumentError("head: its weight is a DTensor already; shard_classes comes first, then fully_shard")
    if group is None or isinstance(group, Spread):
        raise ArgumentTypeError("group: expected a DeviceMesh of one axis or a ProcessGroup; how the batch lies goes to batch=")
    if ranks is not None and -(-head.weight.shape[0] // ranks.size) % centres:
        raise ArgumentError(
            f"head: {head.weight.shape[0] // centres} classes of {centres} centres do not fall on {ranks.size} ranks whole; take a "
            f"number of classes that {ranks.size} divides"
        )
    mesh = group if isinstance(group, DeviceMesh) else DeviceMesh.from_group(group, head.weight.device.type)
    for name, parameter in list(head.named_parameters(recurse=False)):
        sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        head.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
    head.group = Spread(classes=mesh, batch=mesh if batch is group else batch, gradients=gradients)
    return head


def class_parallel(*, batch: Any = None, gradients: str = "mean") -> ParallelStyle:
    """`shard_classes` as a style for `torch.distributed.tensor.parallel.parallelize_module`.

    Args:
        batch: None: the same rows on all ranks of the mesh (tensor parallelism); "mesh": rows spread over them; or another group.

    Example:
        >>> parallelize_module(model, mesh["tp"], {"head": bigclass.class_parallel()})
    """
    from torch.distributed.tensor.parallel import ParallelStyle

    class ClassParallel(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
            return shard_classes(module, device_mesh, batch=device_mesh if batch == "mesh" else batch, gradients=gradients)  # type: ignore[type-var]

    if batch is not None and isinstance(batch, str) and batch != "mesh":
        raise ArgumentError(f"batch: expected None, 'mesh' or a group, got {batch!r}")
    if not dist.is_available():
        raise ArgumentError("class_parallel: this torch has no torch.distributed")
    return ClassParallel()

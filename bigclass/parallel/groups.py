"""Which ranks work together: a user's `group=` as name, rank and size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from bigclass.core.errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True)
class Ranks:
    """A process group by the name that collectives know it by (a string crosses custom ops), this rank in it, its size."""

    name: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> Ranks | None:
        """The ranks of a ProcessGroup or a DeviceMesh of one axis; None for None and for a group of one.

        Raises:
            ValueError: this rank is no member, or the mesh has several axes. TypeError: it is neither.
        """
        if group is None:
            return None
        if not dist.is_available() or not dist.is_initialized():
            raise ArgumentError("group: torch.distributed is not initialised; call torch.distributed.init_process_group first")
        from torch.distributed.device_mesh import DeviceMesh  # not there in a torch without torch.distributed

        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ArgumentError(f"group: rank {dist.get_rank()} is no member of it; call this on its members alone")
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ArgumentError(
                    f"group: expected a mesh of one axis, got axes {group.mesh_dim_names or group.ndim}; choose one: mesh['dp']"
                )
            if group.get_coordinate() is None:
                raise ArgumentError(f"group: rank {dist.get_rank()} is no member of the mesh {group.mesh.tolist()}")
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise ArgumentTypeError(f"group: expected a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
        rank = dist.get_rank(group)
        if rank < 0:
            raise ArgumentError(f"group: rank {dist.get_rank()} is no member of it; call this on its members alone")
        size = dist.get_world_size(group)
        return None if size == 1 else cls(group.group_name, rank, size)


def ranks_named(name: Any) -> Ranks:
    """The ranks of a process group by its name, as custom ops are handed it."""
    group = dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage]
    return Ranks(name, dist.get_rank(group), dist.get_world_size(group))

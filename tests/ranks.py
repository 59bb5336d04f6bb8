"""Several gloo processes on one machine, for tests."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """[function(rank, world, *args) for each rank], each in a process of its own with a process group. Raises what a rank raised."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (function, world, folder, args), nprocs=world, start_method="spawn")
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for rank, (value, error) in enumerate(results):
        if error is not None:
            raise AssertionError(f"rank {rank}:\n{error}")
        assert value is not None, f"rank {rank} returned nothing"
    return [value for value, _ in results]


def _rank(rank: int, function: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    value = error = None
    try:
        value = function(rank, world, *args)
    except Exception:
        error = traceback.format_exc()
    torch.save((value, error), Path(folder) / f"{rank}.pt")
    if error is None:
        dist.destroy_process_group()

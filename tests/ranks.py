"""Several gloo processes on one machine, for tests.

A process that starts anew imports torch and bigclass for seconds, longer than most tests need it. Where that is safe, ranks are forked from
one server that has imported both and has run nothing: no thread was started there that a fork would lose, no state is shared between runs.
On other systems (macOS, whose frameworks do not outlive a fork) each rank is a fresh interpreter.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

START = "forkserver" if sys.platform == "linux" else "spawn"
if START == "forkserver":
    multiprocessing.get_context(START).set_forkserver_preload(["torch", "bigclass", "pytest", "hypothesis"])


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """[function(rank, world, *args) for each rank], each in a process of its own with a process group. Raises what a rank raised."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (function, world, folder, args), nprocs=world, start_method=START)
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

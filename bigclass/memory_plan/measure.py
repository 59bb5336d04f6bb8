"""Peaks that are counted, to hold a plan against: every block that torch's allocator hands out.

On a CPU the allocator reports each block and each release to torch's profiler, from Python or from within an operator; their running sum
is the memory of tensors, to the byte, the same in every run. It is not the process's resident memory: scratch space of the GEMM library
and the Python heap are not tensors. (`bigclass.demo.memory` measures those as well.) On CUDA it is torch's own peak.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

from bigclass.core.engines import pages
from bigclass.core.errors import ArgumentError


def peak_bytes(prepare: Callable[[], Callable[[], Any]], *, steps: int = 2, device: str | torch.device = "cpu") -> int:
    """The most bytes of tensors alive at once in the last of some steps.

    Args:
        prepare: makes what a step needs (a model, an optimizer, a batch), which counts, and returns the step.
        steps: how often the step is run; the first may make optimizer states, the last is measured.
        device: "cpu", or a CUDA device.

    Returns:
        Bytes: all that `prepare` made and that is still there, and what the step takes beyond.

    Raises:
        ArgumentError: for another device.

    Example:
        >>> def prepare():
        ...     x = torch.zeros(1000)
        ...     return lambda: (x + 1).exp().sum()
        >>> peak_bytes(prepare)
        12000
    """
    device = torch.device(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        step = prepare()
        for i in range(steps):
            if i == steps - 1:
                torch.cuda.reset_peak_memory_stats(device)
            step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ArgumentError(f"device: expected a CPU or CUDA device, got {device}; no other allocator tells each of its blocks")
    with pages._lock:
        pages._shelf.clear()  # a buffer kept from an earlier call would be used without being counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False, with_stack=False) as profiler:
        step = prepare()
        for i in range(steps):
            with record_function(_MEASURED if i == steps - 1 else "bigclass: a step before"):
                step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None, "a profile that has ended has its results"
    events: list[Any] = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == _MEASURED)
    live = peak = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
        if event.start_ns() >= start:
            peak = max(peak, live)
    return peak


_MEASURED = "bigclass: the step that is measured"


def saved_bytes(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Bytes that a forward keeps for its backward, parameters not counted: each storage once.

    Args:
        model: run as `model(*args, **kwargs)`.

    Returns:
        The bytes. Divided by the batch they are the `row_bytes` of `shape_of`; the logits that a dense head makes are not among them (its
        loss keeps them).

    Example:
        >>> saved_bytes(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()), torch.zeros(2, 4))
        96
    """
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda t: t):
        kept = model(*args, **kwargs)  # bound, or its graph would be freed, and addresses used again
    del kept
    return sum(found.values())

"""Which tile on which GPU, and how a kernel is started.

Tiles are fixed per architecture, never tuned while a training run waits. Registers, stack and shared memory are those of the compiled
kernels (tests/core/fused/test_compile.py holds every entry to zero spills).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bigclass.core.engines.support import interpreting


@dataclass(frozen=True, slots=True)
class Config:
    """A tile of BM rows x BN classes, BK features at a time; warps and pipeline stages; TMA: operands by descriptors where they allow it.

    group: bands of rows that run side by side, so that a tile of w is read once for all of them and their x stays in L2.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    tma: bool
    group: int = 16


# (architecture, bytes of an operand's element) -> (light, heavy). Light: a lone fold of at most two numbers a row, whose registers leave
# room for a large tile. Heavy: everything else (several folds, three-part states, columns, several picks a row).
TABLE: dict[tuple[str, int], tuple[Config, Config]] = {
    ("sm_80", 2): (Config(128, 128, 32, 8, 3, False), Config(64, 128, 32, 8, 3, False)),
    ("sm_80", 4): (Config(64, 64, 32, 8, 3, False), Config(64, 32, 32, 8, 3, False)),
    ("sm_90", 2): (Config(128, 256, 64, 8, 3, True), Config(128, 128, 64, 8, 3, True)),
    ("sm_90", 4): (Config(128, 128, 32, 8, 3, True), Config(128, 64, 32, 8, 3, True)),
    ("sm_100", 2): (Config(128, 128, 64, 8, 3, True), Config(128, 128, 64, 8, 3, True)),
    ("sm_100", 4): (Config(64, 64, 32, 8, 3, True), Config(64, 64, 32, 8, 3, True)),
    # small, so that small tests have ragged ends in every direction
    ("interpreter", 2): (Config(64, 64, 32, 4, 1, False, 2), Config(32, 64, 32, 4, 1, False, 2)),
    ("interpreter", 4): (Config(64, 64, 32, 4, 1, False, 2), Config(32, 64, 32, 4, 1, False, 2)),
}

MERGE_BLOCK = 128  # states merged by one program: one for each of its threads
ROWS = Config(32, 0, 64, 4, 2, False)  # rows of a program that reads or adds picks, features at a time


def architecture(device: torch.device) -> str:
    """The table's name for a device: the oldest architecture whose kernels it runs."""
    if _target is not None:
        return _target
    if device.type != "cuda":
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def config(device: torch.device, dtype: torch.dtype, *, heavy: bool) -> Config:
    """The tile of a recipe."""
    return TABLE[architecture(device), dtype.itemsize][heavy]


def processors(device: torch.device) -> int:
    """Programs that run at the same time."""
    if _target is not None:
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: three tf32 products (about fp32's accuracy), unless torch's own switch allows one."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def split_classes(bands: int, tiles: int, group: int, device: torch.device) -> tuple[int, int]:
    """(class splits, tiles to a split) so that GROUP bands x splits fill the device."""
    splits = max(1, min(processors(device) // min(bands, group), tiles))
    each = -(-tiles // splits)
    return -(-tiles // each), each


def operand(t: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """A descriptor of t (R, D) for blocks of rows x columns, or t itself."""
    if not tma:
        return t
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(t, [rows, columns])


def describable(tensors: Sequence[Tensor]) -> bool:
    """Can the hardware's tensor descriptors address these? (16-byte rows and base)"""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(1) == 1 for t in tensors)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel that was compiled instead of run. config: None for a kernel without a tile."""

    kernel: Any
    config: Config | None


_target: str | None = None
_compiled: list[Compiled] = []


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Compile for an architecture ("sm_90") instead of running; yields the list that collects the compiled kernels.

    Tensors may lie on the CPU and results mean nothing. Triton's active driver must name the same target."""
    global _target
    _target = target
    _compiled.clear()
    try:
        yield _compiled
    finally:
        _target = None


def start(
    kernel: Any, programs: int, device: torch.device, arguments: Sequence[Any], constants: dict[str, Any], config: Config | None = None
):
    """Launch `programs` instances on the tensors' device, which need not be the current one."""
    options: dict[str, Any] = {} if config is None else {"num_warps": config.warps, "num_stages": config.stages}
    if not interpreting():
        options |= _fusion()
    if _target is not None:
        _compiled.append(Compiled(kernel.warmup(*arguments, **constants, **options, grid=(programs,)), config))
        return
    with _on(device):
        kernel[(programs,)](*arguments, **constants, **options)


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=1)
def _fusion() -> dict[str, Any]:
    """From Triton 3.10 on a multiply and an add are fused only where asked for (131 instructions more an epilogue without)."""
    import triton.backends.nvidia.compiler as compiler

    return {"enable_fp_fusion": True} if hasattr(compiler.CUDAOptions, "enable_fp_fusion") else {}

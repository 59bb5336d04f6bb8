"""Which tile on which GPU, and how a kernel is started.

Tiles are fixed per architecture, never tuned while a training run waits. They are the largest of those tried that spill in
no recipe, by Triton 3.6, 3.8 and 3.9 (tests/core/fused/test_compile.py sees to it). As `python -m benchmarks.kernels --dtype bf16` prints
them, compiled by Triton 3.9 and not timed: registers of a thread / arithmetic instructions of the epilogue a logit.

                          sm_80                       sm_90                       sm_100
                          fold         gradient       fold         gradient       fold         gradient
    log-sum-exp           157 /  8.5   128 /  8.2     188 /  6.5   167 /  6.0     101 /  6.4   126 /  6.4
    cross-entropy         168 / 10.6   128 /  8.2     196 /  8.7   167 /  6.0     173 /  9.8   126 /  6.4
    with bias             170 / 11.7   128 /  9.3     224 / 10.1   207 /  7.8     220 / 13.1   126 / 10.2
    smoothed              219 / 12.6   144 / 20.3     176 / 11.7   142 / 19.8     118 / 12.7    86 / 17.8
    under a soft cap      164 / 30.6   167 / 31.5     205 / 28.7   128 / 29.6     210 / 24.9    63 / 31.4
    with entropy          127 / 39.8    80 / 30.5     130 / 29.5   119 / 24.3     128 / 24.8   112 / 22.2
    4 picks a row         223 / 27.5   128 /  8.2     171 / 23.1   167 /  6.0     105 / 23.5   126 /  6.4
    rows and columns      224 / 16.7   144 / 12.6     209 / 19.9   181 / 12.4     176 / 26.2   128 / 14.3
    plus given N x C      128 / 36.5    64 / 14.4     229 / 35.7    88 / 10.3     226 / 27.5   174 / 15.3
    N x C targets         108 / 23.4    64 / 14.7     166 / 18.6   120 / 12.9     145 / 17.0   139 / 13.1
    hard negatives        216 / 14.9   154 / 19.5     236 / 13.4   255 / 15.0     226 / 15.6   176 / 18.4
    4 centres a class     234 / 32.3   195 / 34.0     211 / 26.7   198 / 46.4     199 / 26.2   104 / 39.2

Where logits are saved in 16 bits (`SAVING`; by Triton 3.8), and all instructions of the gradient that reads them, a logit:

    cross-entropy         226 / 13.9    46 / 10.5     208 / 10.3    46 / 10.8     255 /  9.5    46 / 10.8
    under a soft cap      223 / 34.9    51 / 25.8     215 / 31.9    43 / 26.3     227 / 29.2    44 / 20.3
    smoothed, with bias   184 / 19.4    96 / 22.3     207 / 16.5   106 / 24.8     196 / 18.4   113 / 24.8
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bigclass.core.engines.support import interpreting
from bigclass.core.folds import Fold


@dataclass(frozen=True, slots=True)
class Config:
    """A tile of BM rows x BN classes, BK features at a time; warps and pipeline stages; TMA: operands by descriptors where they allow it.

    group: bands of rows that run side by side, so that a tile of w is read once for all of them and their x stays in L2.
    registers: how many a thread may take, said to the assembler; None leaves it to weigh spills against the programs that fit beside.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    tma: bool
    group: int = 16
    registers: int | None = None


def _laden(BM: int, BN: int, BK: int, stages: int, tma: bool) -> Config:
    """A tile of 8 logits a thread, with all the registers they want: the assembler would stop at 80 or 128 and spill one to four."""
    return Config(BM, BN, BK, 8, stages, tma, registers=255)


# (architecture, bytes of an operand's element) -> (light, heavy, heaviest, laden), see `weight`.
# sm_90: 256x128 rather than 128x256, for a thread then meets half as many classes, whose bias spilled.
# Not served, and asked for by no public function: an N x C tensor added to the logits beside a fold of three numbers spills up to 1.4 KB;
# added beside several picks or columns, or stored logits under a cap beside entropy, up to 24 bytes on one architecture or the other.
_SMALL = Config(32, 64, 32, 4, 1, False, 2)
TABLE: dict[tuple[str, int], tuple[Config, ...]] = {
    ("sm_80", 2): (
        Config(128, 128, 32, 8, 3, False), Config(64, 128, 32, 4, 3, False),
        Config(64, 64, 32, 8, 3, False), _laden(64, 32, 32, 3, False),
    ),
    ("sm_80", 4): (
        Config(64, 64, 32, 8, 3, False), Config(64, 32, 32, 8, 3, False, registers=255),
        Config(64, 32, 32, 8, 3, False, registers=255), _laden(64, 32, 32, 3, False),
    ),
    ("sm_90", 2): (
        Config(256, 128, 64, 8, 3, True, 8), Config(128, 128, 64, 8, 3, True),
        Config(128, 64, 64, 8, 3, True), _laden(64, 32, 64, 3, True),
    ),
    ("sm_90", 4): (
        Config(128, 128, 32, 8, 3, True), Config(128, 64, 32, 8, 3, True),
        Config(64, 64, 32, 8, 3, True), _laden(64, 32, 32, 3, True),
    ),
    ("sm_100", 2): (
        Config(128, 128, 64, 8, 3, True), Config(128, 64, 64, 8, 2, True),
        Config(128, 32, 64, 8, 2, True, registers=255), _laden(64, 32, 64, 3, True),
    ),
    ("sm_100", 4): (
        Config(128, 128, 32, 8, 3, True), Config(128, 64, 32, 8, 3, True, registers=255),
        Config(128, 32, 32, 8, 3, True, registers=255), _laden(64, 32, 32, 3, True),
    ),
    # small, so that small tests have ragged ends in every direction
    ("interpreter", 2): (Config(64, 64, 32, 4, 1, False, 2), _SMALL, _SMALL, _SMALL),
    ("interpreter", 4): (Config(64, 64, 32, 4, 1, False, 2), _SMALL, _SMALL, _SMALL),
}  # fmt: skip

# Bytes of an element -> the same four, on every architecture, where rows are no whole 16 bytes: pointers then take the registers of a large
# tile. (Registers are said here and for sm_100's heavy fp32 tiles because Triton 3.6 spilled 8 to 40 bytes. Heavy is 64x64 for bf16: of
# 128x64 Triton 3.9 spilled 16 on sm_100 for columns beside several picks a row.)
POINTERS = {
    2: (
        Config(128, 64, 32, 8, 3, False, registers=255), Config(64, 64, 32, 8, 3, False, registers=255),
        Config(64, 64, 32, 8, 3, False, registers=255), _laden(64, 32, 32, 3, False),
    ),
    4: (
        Config(64, 32, 32, 8, 3, False, registers=255), Config(64, 32, 32, 8, 3, False, registers=255),
        Config(64, 32, 32, 8, 3, False), _laden(64, 32, 32, 3, False),
    ),
}  # fmt: skip

# Laden folds of products that lie in memory: nothing is multiplied, so nothing is lost by a small tile.
STORED = _laden(32, 64, 32, 1, False)

# fp32 products by fused multiply-adds, which use no tensor cores and hold their operands in registers: one small tile for all (larger
# ones spill hundreds on sm_90). Left to itself the assembler stops at 64 to 80 registers, for the sake of more programs, and spills three.
IEEE = Config(64, 32, 16, 8, 2, False, registers=255)

# The products of the gradient's kept columns (filtered.py): rows or kept classes x features, classes or rows of the sum at a time. One
# tile for aligned operands and others. Registers of a thread for dx / dw, compiled by Triton 3.8 and not timed: sm_80 170 / 150, in fp32
# 244 / 170; sm_90 202 / 216, 185 / 176; sm_100 126 / 128, 182 / 170. 128x256 spilled in dx on sm_90 and sm_100, 128x128 by 4 warps too.
PRODUCTS: dict[tuple[str, int], Config] = {
    ("sm_80", 2): Config(128, 128, 32, 8, 3, False),
    ("sm_80", 4): Config(64, 64, 32, 8, 3, False),
    ("sm_90", 2): Config(256, 128, 64, 8, 3, True, 8),
    ("sm_90", 4): Config(128, 128, 32, 8, 3, True),
    ("sm_100", 2): Config(128, 128, 64, 8, 3, True),
    ("sm_100", 4): Config(128, 128, 32, 8, 3, True),
    ("interpreter", 2): _SMALL,
    ("interpreter", 4): _SMALL,
}
COLUMNS = Config(
    128, 32, 0, 4, 2, False
)  # rows x classes of G for a program that sums squares of columns; one that copies takes as many numbers

# The fold that saves logits (saved.py), of products in bf16: (light, heavy). All of one width, that of the gradient's tile, which reads
# them.
SAVING: dict[str, tuple[Config, Config]] = {
    "sm_80": (Config(128, 128, 32, 8, 3, False), Config(64, 128, 32, 8, 3, False)),
    "sm_90": (Config(256, 128, 64, 8, 3, True, 8), Config(128, 128, 64, 8, 3, True)),
    "sm_100": (Config(128, 128, 64, 8, 3, True), Config(64, 128, 64, 8, 3, True)),
    "interpreter": (Config(64, 64, 32, 4, 1, False, 2), Config(32, 64, 32, 4, 1, False, 2)),
}
SAVED_ROWS = 32

MERGE_BLOCK = 128  # states merged by one program: one for each of its threads
ROWS = Config(16, 0, 64, 4, 2, False)  # rows of a program that reads or adds picks, features at a time


def architecture(device: torch.device) -> str:
    """The table's name for a device: the oldest architecture whose kernels it runs."""
    if _target is not None:
        return _target
    if device.type != "cuda":
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def weight(folds: Sequence[Fold], *, given: bool = False, searched: bool = False, mapped: bool = False, bent: bool = False) -> int:
    """What the registers must hold beside the logits: 0 (light), 1 (heavy), 2 (heaviest) or 3 (laden).

    Light: a lone fold of at most two numbers a row. Heavy: several folds, columns, a tile searched for its picks (a fold counts them, even
    one, or there are several a row), bent: the gradient under a map, which keeps z beside s and G. Heaviest: an N x C tensor is read,
    or a fold has three numbers or more (entropy). Laden: a fold says so of its own terms (`Fold.weight`), or says heaviest and is mapped
    or reads two class vectors.
    """
    own = max([f.weight for f in folds], default=0)
    vectors = any(f.tensor_axes[: len(f.tensors)].count("folded") > 1 for f in folds)
    if own == 3 or (own == 2 and (mapped or vectors)):
        return 3
    if given or any("grid" in f.tensor_axes[: len(f.tensors)] or len(f.differentiable) > 2 for f in folds):
        return 2
    return max(own, int(len(folds) != 1 or folds[0].axis != "rows" or searched or bent))


def config(name: str, dtype: torch.dtype, weight: int, *, described: bool = True, products: bool = True) -> Config:
    """The tile on an architecture. described: can descriptors address the operands? products: are there any, or are logits stored?"""
    if products and dtype == torch.float32 and precision(dtype) == "ieee" and name != "interpreter":
        return IEEE
    if not products and weight == 3 and name != "interpreter":
        return STORED
    if described or name == "interpreter":
        return TABLE[name, dtype.itemsize][weight]
    return POINTERS[dtype.itemsize][weight]


def product_config(name: str, dtype: torch.dtype) -> Config:
    """The tile of the products of kept columns."""
    if dtype == torch.float32 and precision(dtype) == "ieee" and name != "interpreter":
        return IEEE
    return PRODUCTS[name, dtype.itemsize]


def saving_config(name: str, weight: int = 0) -> Config:
    """The tile of a fold that saves logits."""
    return SAVING[name][min(weight, 1)]


def saved_width(device: torch.device) -> int:
    """Classes of a tile that is saved, light or heavy."""
    return saving_config(architecture(device)).BN


def saved_config(width: int) -> Config:
    """The tile of a gradient that reads logits saved in tiles of so many classes. Nothing is multiplied."""
    return Config(SAVED_ROWS, width, 32, 4, 1, False)


def deeper(config: Config, stages: int) -> Config:
    """The same with so many pipeline stages more."""
    return replace(config, stages=config.stages + stages)


def processors(device: torch.device) -> int:
    """Programs that run at the same time."""
    if _target is not None:
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: three tf32 products (about fp32's accuracy), unless torch's own switch asks for "tf32" or "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    # not allow_tf32, which raises once somebody has used this newer switch
    asked = torch.backends.cuda.matmul.fp32_precision
    return asked if asked in ("tf32", "ieee") else "tf32x3"


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
    """Can the hardware's tensor descriptors address these? (base and rows of whole 16 bytes, no row over another)"""
    return all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(0) >= t.shape[1] and t.stride(1) == 1
        for t in tensors
    )


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
        if config is not None and config.registers is not None:
            options["maxnreg"] = config.registers
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

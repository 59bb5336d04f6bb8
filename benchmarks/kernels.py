"""What the fused engine's kernels compile to: `python -m benchmarks.kernels --help`. Needs Triton, and no GPU.

Every kernel of every recipe is compiled for the architectures asked for, and its binary is read with the disassembler that Triton brings:

    registers, stack, spills   of a thread; bytes of stack; stores to local memory (STL). Anything but 0 of the last two costs bandwidth
    shared                     bytes of shared memory of a program, dynamic and static
    matrix instructions        wgmma, tcgen05 or mma.sync, as they stand in the PTX
    TMA, cp.async              loads by tensor descriptor and asynchronous copies of at most 16 bytes, as they stand in the PTX
    instructions               of the whole kernel, as they stand in the text of the binary
    per logit                  of fold and gradient: the arithmetic around the matrix products, see below

The features D are a run-time argument: what is compiled depends on what divides D and the rows' bytes, on nothing else. Widths that share a
binary share a row. 72 is no multiple of a tile's depth, and the rows of 70 are no multiple of 16 bytes: descriptors cannot address them.

Instructions per logit is an estimate: every instruction of `ARITHMETIC` (floating point, special functions, comparisons, selections,
logic on masks) divided by the logits of a thread (BM BN / threads) and by the copies of the tile's code (`COPIES`: fold has two, for whole
tiles and for the ragged last, of which the second masks). A loop over picks counts as one turn. Of these the loop of the matrix products
holds next to none for half types whose rows are aligned; elsewhere it does (fp32 operands are split there), and no figure is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigclass.core import Dot, Fold, LogSumExp, Map, ShiftedMoment, Softcap, Stream, SumFold, Total
from bigclass.core.engines.filter import ColumnFilter
from bigclass.core.engines.tiles import Pool
from bigclass.extras import require
from bigclass.losses.margin_folds import CurricularLogSumExp, GroupedLogSumExp
from bigclass.losses.one_vs_all import LOSSES

if TYPE_CHECKING:
    from rich.table import Table

    from bigclass.core.engines.fused.launch import Compiled

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FEATURES = (64, 768, 2304, 4096, 4608, 72, 70)
ROWS, CLASSES = 1024, 8192  # enough for several programs to share a row, and so for states to be merged

# fmt: off
ARITHMETIC = frozenset((
    "FADD", "FADD2", "FADD32I", "FMUL", "FMUL2", "FMUL32I", "FFMA", "FFMA2", "FFMA32I", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "FCHK",
    "MUFU", "F2F", "F2FP", "HADD2", "HMUL2", "HFMA2", "HMNMX2", "ISETP", "SEL", "LOP3", "PLOP3", "P2R", "R2P",
))
UNITS = {
    "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma_sync": r"\bmma\.sync",
    "tma": r"\bcp\.async\.bulk\.tensor\.\dd\.shared::", "cp_async": r"\bcp\.async\.c[ag]\.",
}
# fmt: on
COPIES = {"fold": 2, "gradient": 1}
PRODUCTS = ("add_dx", "add_dw")  # tiles, too, of a filtered gradient's kept columns


@dataclass(frozen=True, slots=True)
class Recipe:
    """A stream, its folds, the picks of a row.

    bias_last: the bias, then fp32, is added behind the scale. learnt_scale: a parameter multiplies the logits. given: an N x C tensor is
    added to them. weights: folds read class vectors, where they may. stored: the products lie in memory, as when gradients are made in the
    forward. filtered: products of the gradient are of chosen columns. All gradients leave rows out (`keep`); of stored products they are
    boosted, as for fp16."""

    folds: tuple[Fold, ...]
    picks: int = 0
    maps: tuple[Map, ...] = ()
    pairs: int = 1
    bias: bool = False
    bias_last: bool = False
    class_scale: bool = False
    given: bool = False
    weights: bool = False
    stored: bool = False
    learnt_scale: bool = False
    filtered: bool = False
    saved: bool = False


_REST = LogSumExp(exclude_picks=True)  # of the classes that a row did not pick
_CAP = (Softcap.at(30.0),)


def _one_vs_all(name: str, weighted: int, kind: str = "negatives") -> Fold:
    """A fold of a one-vs-all loss with its default options."""
    made = LOSSES[name]
    floor = (0.1,) if kind == "floor" else ()
    return getattr(made, kind)[weighted](numbers=(*floor, *made.loss.options.values()), exclude_picks=kind != "dense")


RECIPES = {
    "ce": Recipe((_REST,), picks=1),
    "log-sum-exp": Recipe((LogSumExp(),)),
    "cap": Recipe((_REST,), picks=1, maps=_CAP),
    "smoothing": Recipe((_REST, Total()), picks=1),
    "cap smoothing": Recipe((_REST, Total()), picks=1, maps=_CAP),
    "entropy": Recipe((_REST, ShiftedMoment()), picks=1),
    "4 picks": Recipe((_REST,), picks=4),
    "3 picks read": Recipe((LogSumExp(),), picks=3),
    "columns": Recipe((LogSumExp(), LogSumExp(axis="columns"))),
    "contrastive": Recipe((_REST, LogSumExp(exclude_picks=True, axis="columns")), picks=1, learnt_scale=True),
    "contrastive 4 picks": Recipe((_REST, LogSumExp(exclude_picks=True, axis="columns")), picks=4, learnt_scale=True),
    "two pairs": Recipe((_REST,), picks=1, pairs=2),
    "bias": Recipe((_REST,), picks=1, bias=True),
    "bias smoothing": Recipe((_REST, Total()), picks=1, bias=True),
    "class scale": Recipe((_REST,), picks=1, class_scale=True),
    "given": Recipe((_REST,), picks=1, given=True),
    "probabilities": Recipe((LogSumExp(), Dot())),
    "probabilities weights bias cap": Recipe((LogSumExp(), Dot(), Total()), maps=_CAP, bias=True, weights=True),
    "entropy bias cap": Recipe((_REST, ShiftedMoment()), picks=1, maps=_CAP, bias=True),
    "bce": Recipe((_one_vs_all("bce", 0),), picks=4, bias=True),
    "bce smoothing weights": Recipe((_one_vs_all("bce", 1, "floor"),), picks=4, bias=True, weights=True),
    "siglip": Recipe((_one_vs_all("bce", 0),), picks=1, bias=True, bias_last=True, learnt_scale=True),
    "focal": Recipe((_one_vs_all("focal", 0),), picks=4, bias=True),
    "asymmetric": Recipe((_one_vs_all("asymmetric", 0),), picks=4, bias=True),
    "hinge cap": Recipe((_one_vs_all("squared_hinge", 1),), picks=4, maps=_CAP, bias=True, weights=True),
    "poly": Recipe((_one_vs_all("poly", 0),), picks=4, bias=True),
    "asymmetric dense": Recipe((_one_vs_all("asymmetric", 0, "dense"),), bias=True),
    "focal dense weights": Recipe((_one_vs_all("focal", 1, "dense"),), bias=True, weights=True),
    "stored bce": Recipe((_one_vs_all("bce", 0),), picks=4, bias=True, stored=True),
    "stored siglip": Recipe((_one_vs_all("bce", 0),), picks=1, bias=True, bias_last=True, learnt_scale=True, stored=True),
    "stored asymmetric": Recipe((_one_vs_all("asymmetric", 0),), picks=4, bias=True, stored=True),
    "stored asymmetric dense": Recipe((_one_vs_all("asymmetric", 1, "dense"),), bias=True, weights=True, stored=True),
    "curricular": Recipe((CurricularLogSumExp((64.0,), exclude_picks=True),), picks=1, class_scale=True),
    "4 centres": Recipe((GroupedLogSumExp((4.0,), exclude_picks=True),), picks=4, class_scale=True),
    "stored curricular": Recipe((CurricularLogSumExp((64.0,), exclude_picks=True),), picks=1, class_scale=True, stored=True),
    "stored 4 centres": Recipe((GroupedLogSumExp((4.0,), exclude_picks=True),), picks=4, class_scale=True, stored=True),
    "stored": Recipe((_REST,), picks=1, stored=True),
    "filtered": Recipe((_REST,), picks=1, filtered=True),
    "saved": Recipe((_REST,), picks=1, saved=True),
    "saved cap bias": Recipe((_REST,), picks=1, maps=_CAP, bias=True, saved=True),
    "saved smoothing weights bias": Recipe((_REST, Total()), picks=1, weights=True, bias=True, saved=True),
    "saved 4 picks": Recipe((_REST, Total()), picks=4, saved=True),
    "stored entropy": Recipe((_REST, ShiftedMoment()), picks=1, bias=True, stored=True),
}


@dataclass(frozen=True, slots=True)
class Binary:
    """What the compiled kernel says of itself (module docstring). What only its disassembly tells is None where that was not asked for."""

    registers: int
    stack: int
    shared: int
    wgmma: int
    tcgen05: int
    mma_sync: int
    tma: int
    cp_async: int
    spills: int | None = None
    instructions: int | None = None
    arithmetic: int | None = None  # of them


@dataclass(frozen=True, slots=True)
class Row:
    """One binary: where it is used, and what it is. features: the widths that share it."""

    arch: str
    dtype: str
    recipe: str
    kernel: str
    features: tuple[int, ...]
    tile: str
    per_logit: float | None
    binary: Binary


class _Driver:
    """As much of a Triton driver as compiling asks for. It names the GPU that is not there."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps target and binaries for each device number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _All(ColumnFilter):
    """A filter that keeps everything, of norms that nobody computed."""

    def __init__(self) -> None:
        pass

    def choose(self, norms: Tensor, forced: Tensor | None, blocks: Tensor) -> Tensor:
        return torch.ones(norms.shape, dtype=torch.bool)

    def returned(self, block: int, back: Tensor) -> None:
        pass


def compile_recipe(recipe: Recipe, dtype: torch.dtype, features: int, arch: str) -> list[Compiled]:
    """Every kernel of a forward and a backward. Triton's driver must name the same architecture."""
    from bigclass.core.engines.fused import filtered, launch
    from bigclass.core.engines.fused.problem import Problem
    from bigclass.core.engines.fused.saved import Saved, empty

    n, c, k = ROWS, CLASSES, recipe.picks
    rows, columns, at_picks = torch.empty(n), torch.empty(c), torch.empty(n, k) if k else None
    pairs = tuple([(torch.empty(n, features, dtype=dtype), torch.empty(c, features, dtype=dtype)) for _ in range(recipe.pairs)])
    bias = torch.empty(c, dtype=None if recipe.bias_last else dtype) if recipe.bias else None
    grid = torch.empty(n, c + 1)[:, :c]  # rows of no whole 16 bytes, which take more registers
    scale = columns if recipe.class_scale else None
    given, learnt = grid if recipe.given else None, torch.empty((), requires_grad=True) if recipe.learnt_scale else None
    stream = Stream(pairs, bias=bias, bias_last=recipe.bias_last, class_scale=scale, given=given, scale_tensor=learnt, maps=recipe.maps)
    picks = torch.empty(n, k, dtype=torch.int32) if k else None
    stored = torch.empty(n, c) if recipe.stored else None

    def with_tensors(f: Fold) -> Fold:
        at = {"grid": grid, "kept": rows, "folded": columns}
        return replace(f, tensors=tuple([at[a] for a in f.tensor_axes if a != "folded" or recipe.weights]))

    folds = tuple([with_tensors(f) for f in recipe.folds])
    width = launch.saving_config(arch).BN
    saved = Saved.of(empty(rows, n, c, width), c, width) if recipe.saved else None
    problem = Problem(stream, folds, () if recipe.stored else pairs, n, c, picks, stored=stored, saved=saved)

    def vectors(f: Fold) -> list[Tensor]:
        return [rows if f.axis == "rows" else columns for _ in f.differentiable]

    states = [tuple(vectors(f)) for f in folds]
    grads = [[v if d else None for v, d in zip(vectors(f), f.differentiable, strict=True)] for f in folds]
    keep, boost = torch.empty(n, dtype=torch.uint8), 256.0 if recipe.stored else 1.0
    with launch.compiling_for(arch) as compiled:
        problem.fold(at_picks)
        g = torch.empty(n, c, dtype=dtype) if saved is None else saved.codes.view(dtype)
        problem.add_picks(at_picks, problem.gradient(states, grads, keep, g, boost), g, boost)
        if all(isinstance(f, SumFold) and (f.exclude_picks or not k) for f in folds) and recipe.stored:
            problem.gradient(states, grads, keep, g, boost, found=[])
        if recipe.filtered:
            kept = filtered.choose(problem, g, 0, _All(), Pool(g, torch.float32))
            xs, ws = zip(*pairs, strict=True)
            dxs, dws = ([torch.empty(t.shape) for t in ts] for ts in (xs, ws))
            filtered.multiply(g, kept, xs, ws, dxs, dws, 1.0, 1.0, Pool(g, torch.float32))
        return list(compiled)


def inspect(arch: str, dtype: str, names: Sequence[str], features: Sequence[int], brief: bool = False) -> list[Row]:
    """The kernels of these recipes, one row for each binary. brief: nothing is disassembled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(_Driver(GPUTarget("cuda", ARCHITECTURES[arch], 32)))  # type: ignore[arg-type]
    widths: dict[tuple[str, str], list[int]] = {}
    found: dict[tuple[str, str], Compiled] = {}
    for name in names:
        for d in features:
            for made in compile_recipe(RECIPES[name], DTYPES[dtype], d, arch):
                key = (name, made.kernel.hash)
                found[key] = made
                if d not in widths.setdefault(key, []):
                    widths[key].append(d)
    return [_row(arch, dtype, key[0], tuple(widths[key]), made, brief) for key, made in found.items()]


def _row(arch: str, dtype: str, recipe: str, features: tuple[int, ...], made: Compiled, brief: bool) -> Row:
    kernel, config = made.kernel.metadata.name, made.config
    binary = read_binary(made.kernel.asm["cubin"], made.kernel.asm["ptx"], made.kernel.metadata.shared, brief)
    tile, per_logit = "", None
    if config is not None and kernel in (*COPIES, *PRODUCTS):
        tile = f"{config.BM}x{config.BN}x{config.BK}, {config.warps}w {config.stages}s"
    if config is not None and kernel in COPIES:
        logits = config.BM * config.BN / (32 * config.warps)
        aligned = all(d % 8 == 0 for d in features)
        if binary.arithmetic is not None and (RECIPES[recipe].stored or (dtype != "fp32" and aligned)):
            per_logit = round(binary.arithmetic / logits / COPIES[kernel], 1)
    return Row(arch, dtype, recipe, kernel, features, tile, per_logit, binary)


@lru_cache(maxsize=4096)
def read_binary(cubin: bytes, ptx: str, shared: int, brief: bool = False) -> Binary:
    """The figures of a compiled kernel. shared: what the compiler reserved for it. brief: without those of its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        text = "" if brief else _tool("nvdisasm", "-c", "-ndf", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"expected cuobjdump to name registers and stack, got {usage!r}")
    units = {name: len(re.findall(pattern, ptx)) for name, pattern in UNITS.items()}
    found = Binary(registers=int(resources[1]), stack=int(resources[2]), shared=shared, **units)
    if brief:
        return found
    count = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", text, re.MULTILINE))
    return replace(
        found,
        spills=count["STL"],
        instructions=sum(count.values()),
        arithmetic=sum(v for op, v in count.items() if op in ARITHMETIC),
    )


def _tool(name: str, *arguments: str) -> str:
    """What a tool that Triton brings prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows of one architecture and dtype."""
    from rich import box
    from rich.table import Table

    out = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("recipe", "kernel", "D", "tile"):
        out.add_column(head, no_wrap=head != "D")
    for head in ("registers", "stack", "spills", "shared", "MMA", "TMA", "cp.async", "instructions", "per logit"):
        out.add_column(head, justify="right")
    last = ""
    for row in rows:
        b = row.binary
        products = next((f"{v} {name}" for v, name in ((b.wgmma, "wgmma"), (b.tcgen05, "tcgen05"), (b.mma_sync, "mma")) if v), "")
        fault = "[bold red]" if b.stack or b.spills else ""
        unknown = ["" if v is None else str(v) for v in (b.spills, b.instructions, row.per_logit)]
        out.add_row(
            "" if row.recipe == last else row.recipe, fault + row.kernel, " ".join(map(str, row.features)), row.tile,
            *(str(b.registers), str(b.stack), unknown[0], str(b.shared), products, str(b.tma or ""), str(b.cp_async or "")), *unknown[1:],
        )  # fmt: skip
        last = row.recipe
    return out


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Compile the fused kernels without a GPU and read their binaries.",
        allow_abbrev=False,
    )
    parser.add_argument("--arch", nargs="+", choices=tuple(ARCHITECTURES), default=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="of the operands (default: all)")
    parser.add_argument("--recipe", nargs="+", choices=tuple(RECIPES), default=list(RECIPES), help="default: all")
    parser.add_argument(
        "--features", nargs="+", type=int, default=list(FEATURES), metavar="D", help=f"default: {' '.join(map(str, FEATURES))}"
    )
    parser.add_argument("--ieee", action="store_true", help="fp32 products by plain fp32 arithmetic, as torch's switch may ask for")
    parser.add_argument("--brief", action="store_true", help="no disassembly: no count of instructions or of spills, whose stack is named")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compile and print; 1 if a kernel spills, 2 if a package is missing."""
    options = parse_arguments(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined: the interpreter's cannot be compiled
    try:
        require("triton", *([] if options.json else ["rich"]), extra="test")
    except ModuleNotFoundError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    version = importlib.import_module("triton").__version__
    if options.ieee:
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    rows: list[Row] = []
    for arch in options.arch:
        for dtype in options.dtype:
            some = inspect(arch, dtype, options.recipe, options.features, options.brief)
            rows += some
            if not options.json:
                from rich.console import Console

                console = Console()
                if not console.is_terminal:
                    console = Console(width=170)
                console.print(table(some, f"[bold]{arch}[/], {dtype}, Triton {version}"))
    if options.json:
        print(json.dumps({"triton": version, "kernels": [dataclasses.asdict(row) for row in rows]}))
    return 1 if any(row.binary.stack or row.binary.spills for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

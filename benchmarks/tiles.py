"""Tile shapes of the fused kernels side by side on a GPU: `python -m benchmarks.tiles`.

For each named shape the fold kernel (one pass of 2NCD flops), the gradient kernel on one slab of classes and the whole of each plan, with
every tile of `VARIANTS` in place of the table's, beside a bare GEMM of the same product in the same rounds. What wins belongs into
the table of bigclass/core/engines/fused/launch.py, by hand: a training run never tunes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import bigclass
from bigclass.core.engines.support import device_reason, interpreting

from .data import make_problem
from .machine import describe_machine, describe_versions
from .shapes import SHAPES, Shape
from .timing import interleave

RESULTS = Path(__file__).parent / "results"
ROUNDS = 7

# Changes to the table's own tiles, light and heavy: BM, BN, BK (powers of 2), warps, stages, group.
VARIANTS: tuple[dict[str, int], ...] = (
    {},
    {"stages": 2},
    {"stages": 4},
    {"group": 8},
    {"group": 32},
    {"BM": 256, "BN": 128},
    {"BM": 128, "BN": 128},
    {"BM": 128, "BN": 128, "warps": 4},
    {"BM": 128, "BN": 128, "warps": 4, "stages": 4},
    {"BM": 128, "BN": 64},
    {"BM": 64, "BN": 256, "warps": 4},
)


def main() -> int:
    """Measure, print and write JSON; 2 without a device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["llama3-8b", "gemma2-2b", "vit-l-in21k"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file (default: benchmarks/results)")
    options = parser.parse_args()
    if not torch.cuda.is_available() or interpreting():
        print("tiles are timed on a CUDA device, with TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    reason = device_reason(device)
    if reason is not None:
        print(f"no fused engine here, for {reason}", file=sys.stderr)
        return 2
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    found = [measure(SHAPES[name], device, options.rounds) for name in options.shapes]
    options.out.mkdir(exist_ok=True)
    path = options.out / f"tiles-{started}.json"
    path.write_text(json.dumps({"machine": describe_machine(device), "versions": describe_versions(), "shapes": found}, indent=1))
    print(f"figures: {path}")
    return 0


def measure(shape: Shape, device: torch.device, rounds: int) -> dict[str, object]:
    """Median milliseconds of every variant on one shape (bf16, flat), each with its ratio to the bare GEMM's pass."""
    from bigclass.core.engines.fused import launch
    from bigclass.core.engines.fused.saved import ALIGNED

    problem = make_problem(shape, "flat", torch.bfloat16, device)
    x, w, y = problem.input.detach().requires_grad_(), problem.linear_weight.detach().requires_grad_(), problem.target
    logits = torch.empty(min(x.shape[0], 2048), w.shape[0], dtype=torch.bfloat16, device=device)
    passes = x.shape[0] / logits.shape[0]

    def gemm() -> None:
        with torch.no_grad():
            for part in x.split(logits.shape[0]):
                torch.mm(part, w.T, out=logits[: part.shape[0]])

    architecture = launch.architecture(device)

    def with_tiles(variant: dict[str, int], tables: dict[Any, Any], key: tuple[str, int] | str, call: Callable[[], None]):
        """call, with the light and the heavy tile changed (a soft cap's gradient runs the heavy one)."""
        light, heavy, *rest = table = tables[key]

        def run() -> None:
            tables[key] = (replace(light, **variant), replace(heavy, **variant), *rest)
            try:
                call()
            finally:
                tables[key] = table

        return run

    def forward() -> None:
        with torch.no_grad():
            bigclass.linear_cross_entropy(x, w, y, softcap=shape.softcap, engine="fused")

    def backward(gradients: str):
        def call() -> None:
            with bigclass.planning(gradients=gradients):
                loss = bigclass.linear_cross_entropy(x, w, y, softcap=shape.softcap, engine="fused")
            torch.autograd.grad(loss, (x, w))  # pyright: ignore[reportArgumentType, reportCallIssue]

        return call

    calls, names, failures = [gemm], ["bare GEMM"], {}
    for variant in VARIANTS:
        # the fold that saves logits, a whole number of whose tiles is as wide as rows are aligned, has a table of its own
        in_registers = launch.TABLE, (architecture, 2)
        roads: list[tuple[str, dict[Any, Any], Any, Callable[[], None]]] = [
            ("forward", *in_registers, forward),
            ("recompute", *in_registers, backward("recompute")),
        ]
        if ALIGNED % variant.get("BN", 1) == 0:
            roads.append(("saved", launch.SAVING, architecture, backward("saved")))
        for what, tables, key, call in roads:
            title = f"{what} {variant or 'table'}"
            run = with_tiles(variant, tables, key, call)
            try:
                run()
            except Exception as error:  # a tile that does not fit the device is a finding
                failures[title] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            calls.append(run)
            names.append(title)
    tables = {"in registers": launch.TABLE[architecture, 2], "saving": launch.SAVING[architecture]}
    tiles = {name: [asdict(t) for t in table] for name, table in tables.items()}
    times = interleave(calls, [1] * len(calls), rounds, device)
    medians = {name: 1e3 * sorted(seconds)[len(seconds) // 2] for name, seconds in zip(names, times, strict=True)}
    floor = medians["bare GEMM"]
    for name, milliseconds in medians.items():
        print(f"{shape.name:14} {name:60} {milliseconds:8.2f} ms   {milliseconds / floor:5.2f} x one GEMM", flush=True)
    for name, why in failures.items():
        print(f"{shape.name:14} {name:60} {why}", flush=True)
    return {"shape": asdict(shape), "gemm_chunks": passes, "table": tiles, "milliseconds": medians, "failures": failures}


if __name__ == "__main__":
    sys.exit(main())

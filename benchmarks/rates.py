"""What a GPU does at best: `python -m benchmarks.rates`. Rates of library products, of a copy, and what a launch costs.

Every figure is the median of interleaved rounds, on random numbers (a GPU multiplies zeros faster, for it draws less power). The bare
GEMM of each benchmark's own run is what ratios are made with; these say whether the device is in the state that one expects.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import bigclass

from .machine import GIB, describe_machine, describe_versions
from .timing import choose_repeats, estimate_seconds, interleave

RESULTS = Path(__file__).parent / "results"
ROUNDS = 7
# N x C x D of (N, D) with (D, C)
SHAPES = ((8192, 8192, 8192), (8192, 128256, 4096), (8192, 4096, 4096), (4096, 16384, 2304))
COPIED = 2 * GIB
LAUNCHES = 200


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write JSON; 2 without a device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("rates are measured on a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    figures = measure(device, options.rounds)
    for name, value in figures.items():
        print(f"{name:60} {value:10.4g}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"rates-{started}.json"
    path.write_text(json.dumps({"machine": describe_machine(device), "versions": describe_versions(), "figures": figures}, indent=1))
    print(f"figures: {path}")
    return 0


def measure(
    device: torch.device, rounds: int, shapes: tuple[tuple[int, int, int], ...] = SHAPES, copied: int = COPIED, launches: int = LAUNCHES
) -> dict[str, float]:
    """TFLOP/s of products, TB/s of a copy (read and written), microseconds of launches and of the smallest calls."""
    figures = {}
    for n, c, d in shapes:
        flops = 2 * n * c * d
        calls: dict[str, Callable[[], object]] = {}
        for dtype in (torch.bfloat16, torch.float32):
            x, w = torch.randn(n, d, device=device, dtype=dtype), torch.randn(c, d, device=device, dtype=dtype)
            out = torch.empty(n, c, device=device, dtype=dtype)
            g = torch.randn(n, c, device=device, dtype=dtype)
            name = f"{n} x {c} x {d} {str(dtype).removeprefix('torch.')}, TFLOP/s"
            calls[f"x w^T   {name}"] = _product(x, w.T, out)
            calls[f"g w     {name}"] = _product(g, w, torch.empty_like(x))
            calls[f"g^T x   {name}"] = _product(g.T, x, torch.empty_like(w))
        figures |= {name: flops / seconds / 1e12 for name, seconds in _medians(calls, rounds, device).items()}
        del calls
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    one = torch.zeros(1, device=device)
    x, w = torch.randn(8, 64, device=device, requires_grad=True), torch.randn(128, 64, device=device, requires_grad=True)
    y = torch.zeros(8, dtype=torch.long, device=device)
    calls = {
        "copy, TB/s": lambda: target.copy_(source),
        "sum, TB/s": lambda: source.sum(),
        f"launch of one of {launches} kernels in a row, microseconds": lambda: [one.add_(1.0) for _ in range(launches)],
    }
    for engine in ("dense", "tiled", "fused"):

        def step(engine: str = engine) -> None:
            loss = bigclass.linear_cross_entropy(x, w, y, engine=engine)
            torch.autograd.grad(loss, (x, w))  # pyright: ignore[reportArgumentType, reportCallIssue]

        calls[f"8 x 128 x 64, {engine}, forward+backward, microseconds"] = step
    for name, seconds in _medians(calls, rounds, device).items():
        if "TB/s" in name:
            figures[name] = copied * (2 if "copy" in name else 1) / seconds / 1e12
        else:
            figures[name] = seconds * 1e6 / (launches if "launch" in name else 1)
    return figures


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(a, b, out=out)


def _medians(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of each call that runs."""
    kept: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # whoever does not run here is said, and the others go on
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        kept[name] = call
    repeats = [choose_repeats(estimate_seconds(call, device)) for call in kept.values()]
    times = interleave(list(kept.values()), repeats, rounds, device)
    return {name: statistics.median(seconds) for name, seconds in zip(kept, times, strict=True)}


if __name__ == "__main__":
    sys.exit(main())

"""Which kernels a loss spends its time in: `python -m benchmarks.kernel_times`.

torch.profiler over one forward and backward of each plan, on one shape (bf16): time, count and share of each kernel by name. With `--once`
a plan is run and nothing is measured, for another profiler to look at (Nsight Compute: `python -m benchmarks.gpu profile`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch._C._autograd import DeviceType

import bigclass

from .data import Problem, make_problem
from .floors import FLOOR, floors_for
from .limits import IN_FORWARD, RECOMPUTE, SAVED, of_candidate
from .machine import describe_machine, describe_versions
from .shapes import SHAPES
from .timing import seconds_a_call

RESULTS = Path(__file__).parent / "results"
# name: (engine, plan, filter, data)
PLANS: dict[str, tuple[str, str, float | None, str]] = {
    "fused-saved": ("fused", "saved", None, "flat"),
    "fused-forward": ("fused", "forward", None, "flat"),
    "fused-recompute": ("fused", "recompute", None, "flat"),
    "tiled-forward": ("tiled", "forward", None, "flat"),
    "tiled-recompute": ("tiled", "recompute", None, "flat"),
    "filter-2^-8": ("auto", "auto", 2.0**-8, "peaked"),
    "filter-2^-6": ("auto", "auto", 2.0**-6, "peaked"),
}
CANDIDATES = {"fused-saved": SAVED, "fused-forward": IN_FORWARD, "fused-recompute": RECOMPUTE}  # whose limit is printed beside
LONGEST_NAME = 70


def main(arguments: list[str] | None = None) -> int:
    """Profile, print and write JSON; 2 without a device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_times", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["llama3-8b"])
    parser.add_argument("--plans", nargs="+", choices=tuple(PLANS), default=list(PLANS))
    parser.add_argument("--once", action="store_true", help="run each plan once, and measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernels are timed on a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    head = {"machine": describe_machine(device), "versions": describe_versions()}
    path, found = options.out / f"kernel-times-{started}.json", []
    for name in options.shapes:
        for plan in options.plans:
            engine, gradients, tolerance, data = PLANS[plan]
            problem = make_problem(SHAPES[name], data, torch.bfloat16, device)
            call = step(problem, engine, gradients, tolerance)
            call()
            if options.once:
                torch.cuda.synchronize()
                continue
            rows, floor = profile(call, DeviceType.CUDA), floor_milliseconds(problem)
            total = sum(row["milliseconds"] for row in rows)
            found.append({"shape": name, "plan": plan, FLOOR: floor, "milliseconds": total, "kernels": rows})
            print(f"{name}, {plan}: {total:.2f} ms, {total / floor:.2f} x three bare GEMMs{_limit(plan)}")
            for row in rows[:20]:
                print(
                    f"  {row['milliseconds']:9.3f} ms {row['share']:6.1%} {row['count']:6d} x  {row['kernel'][:LONGEST_NAME]}", flush=True
                )
            options.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**head, "plans": found}, indent=1))
    if found:
        print(f"figures: {path}")
    return 0


def floor_milliseconds(problem: Problem) -> float:
    """Of the three bare products, by events: the profiler, too, counts what the device was busy."""
    call = floors_for(problem.shape, torch.bfloat16)[0].prepare(problem, "forward+backward", None)
    call()
    return 1e3 * min(seconds_a_call(call, problem.input.device, 3) for _ in range(3))


def _limit(plan: str) -> str:
    limit = of_candidate(CANDIDATES.get(plan, ""))
    return f" (at most {limit.most:g} x {limit.of})" if limit and plan in CANDIDATES else ""


def step(problem: Problem, engine: str, gradients: str, tolerance: float | None) -> Callable[[], None]:
    """One forward and backward."""
    x, w = problem.input.detach().requires_grad_(), problem.linear_weight.detach().requires_grad_()

    def call() -> None:
        with bigclass.planning(gradients=gradients):
            loss = bigclass.linear_cross_entropy(x, w, problem.target, softcap=problem.shape.softcap, grad_filter=tolerance, engine=engine)
        torch.autograd.grad(loss, (x, w))  # pyright: ignore[reportArgumentType, reportCallIssue]

    return call


def profile(call: Callable[[], None], device: DeviceType) -> list[dict]:
    """What ran on the device during one call, the longest first: {kernel, milliseconds, count, share}."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == DeviceType.CUDA:
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        call()
        if device == DeviceType.CUDA:
            torch.cuda.synchronize()
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for event in seen.events() or ():
        if event.device_type == device and not getattr(event, "is_user_annotation", False):
            taken[event.name].append(event.time_range.elapsed_us() / 1e3)
    total = sum(map(sum, taken.values())) or 1.0
    rows = [{"kernel": k, "milliseconds": sum(t), "count": len(t), "share": sum(t) / total} for k, t in taken.items()]
    return sorted(rows, key=lambda row: -row["milliseconds"])


if __name__ == "__main__":
    sys.exit(main())

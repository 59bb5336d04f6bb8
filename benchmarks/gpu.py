"""Everything a GPU can tell, in stages that each end in time: `python -m benchmarks.gpu <stage>`.

    check     the tests that need a GPU (pytest -m gpu)
    rates     what the device does at best: products, copies, launches
    peers     cross-entropy of three language models beside liger, quack, cce and torch: flat data, then filtered on peaked data
    shapes    contrastive pairs, one-vs-all, image classifiers
    tiles     tile shapes of the fused kernels
    profile   which kernels the time goes to; with Nsight Compute on the path, why
    all       the six, in this order, each in its own time

A stage is a list of commands. Each writes its JSON itself, so that what was measured stays when the time is up; a command that then runs is
stopped, and those left are named: `--steps 4-6` runs them in the next call, `check --resume` the tests that have not ended yet. Beside the
figures stand the limits of limits.py, on bare products of the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .limits import BOTH, CCE, EXACT, FILTERED_COARSE, FORWARD, QUACK, verdicts
from .ours import FILTERED
from .shapes import Shape, parse_shape

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
STAGES = ("check", "rates", "peers", "shapes", "tiles", "profile")
MINUTES = 9.0
WORKERS = min(os.cpu_count() or 1, 16)  # of pytest-xdist, which mostly compile kernels; on the device each takes 0.6 GB and more
NO_TESTS = 5  # the exit code of pytest
LEAST = 20  # seconds that a command is started for at all
GRACE = 15  # seconds in which an interrupted command writes what it has

# Modules that stages import, by the names of their packages; what is missing is said before anything is run
NEEDED = {
    "pytest": "pytest", "hypothesis": "hypothesis", "xdist": "pytest-xdist", "rich": "rich",
    "liger_kernel": "liger-kernel", "quack": "quack-kernels", "cut_cross_entropy": "cut-cross-entropy",
}  # fmt: skip
LANGUAGE_MODELS = ("llama3-8b", "qwen2.5-7b", "gemma2-2b")
PEERS = ("dense", "torch chunked", "liger", QUACK, CCE, "cce, unfiltered")
PAIRS, LABELS, IMAGES = ("32768x32768x768:clip",), ("bce", "4096x131072x768:bce"), ("vit-l-in21k", "bamboo")
# Sections that say whether a kernel waits for memory, for tensor cores or for nothing that is in sight; few, for each is another replay.
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats", "ComputeWorkloadAnalysis")
OUR_KERNELS = "regex:^(fold|gradient|saved_gradient|add_dx|add_dw)"


@dataclass(frozen=True, slots=True)
class Step:
    """A command line after `python -m` (or of a tool), and about how many seconds it takes on an H200."""

    command: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return shlex.join(self.command)


def main(arguments: list[str] | None = None) -> int:
    """Run a stage; 1 if a command failed or there was no time for it, 2 without a device."""
    options = parse(arguments)
    stages = STAGES if options.stage == "all" else (options.stage,)
    steps = {stage: steps_of(stage, options) for stage in stages}
    for stage, commands in steps.items():
        if options.dry_run:
            print(f"{stage}: about {sum(step.seconds for step in commands) / 60:.1f} of at most {options.minutes:g} minutes")
            for i, step in enumerate(commands, 1):
                print(f"  {i:2}  {step.seconds:5.0f} s  {step}")
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here", file=sys.stderr)
        return 2
    if options.dry_run:
        return 0
    return max(run_stage(stage, commands, options) for stage, commands in steps.items())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of each stage (default: {MINUTES:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON files (default: benchmarks/results)")
    parser.add_argument("--steps", type=numbers, help="which commands of the stage, such as 4-6 or 1,3 (default: all)")
    parser.add_argument("--shapes", nargs="+", help="of peers, tiles and profile, in place of their own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resume", action="store_true", help="check: leave out the tests that ended before, by the files in --out")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and the seconds they should take")
    return parser.parse_args(arguments)


def numbers(text: str) -> set[int]:
    """ "1,3-5" as {1, 3, 4, 5}."""
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        return {n for part in ends for n in range(part[0], part[-1] + 1)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 4-6 or 1,3; got {text!r}") from None


# What a stage runs


def steps_of(stage: str, options: argparse.Namespace) -> list[Step]:
    """The commands of a stage, those first that would be missed most."""
    steps = {"check": _check, "rates": _rates, "peers": _peers, "shapes": _shapes, "tiles": _tiles, "profile": _profile}[stage](options)
    return [step for i, step in enumerate(steps, 1) if options.steps is None or i in options.steps]


def _module(name: str, *arguments: str, seconds: float) -> Step:
    return Step((sys.executable, "-m", name, *arguments), seconds)


def _check(options: argparse.Namespace) -> list[Step]:
    workers = ("-n", str(WORKERS), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    return [
        _module("pytest", "-m", "gpu", "tests/gpu", "-q", "-p", "no:cacheprovider", *workers, seconds=8000 / WORKERS if workers else 8000)
    ]


def _rates(options: argparse.Namespace) -> list[Step]:
    return [_module("benchmarks.rates", "--rounds", str(options.rounds), "--out", str(options.out), seconds=60)]


def _peers(options: argparse.Namespace) -> list[Step]:
    names = options.shapes or LANGUAGE_MODELS
    flat = [_benchmark(options, name, "flat", (*EXACT, *PEERS)) for name in names]
    return flat + [_benchmark(options, name, "peaked", (*EXACT[:1], FILTERED, FILTERED_COARSE, QUACK, CCE), (BOTH,)) for name in names]


def _shapes(options: argparse.Namespace) -> list[Step]:
    special = ("bigclass", "bigclass fused", "bigclass tiled", "bigclass tiled, recompute", "dense")
    return [
        *(_benchmark(options, name, None, special) for name in (*PAIRS, *LABELS)),
        *(_benchmark(options, name, "flat", (*EXACT, "dense", QUACK, CCE)) for name in IMAGES),
    ]


def _tiles(options: argparse.Namespace) -> list[Step]:
    names, rounds = options.shapes or ("llama3-8b", "gemma2-2b", "vit-l-in21k"), max(options.rounds // 2, 1)
    common = ("--rounds", str(rounds), "--out", str(options.out))
    # 11 tiles, 4 ways, each compiled (3 s) and run twice a round: a fold, and about 4 passes for the gradients
    return [_module("benchmarks.tiles", "--shapes", n, *common, seconds=150 + 11 * 12 * (2 * rounds + 1) * pass_seconds(n)) for n in names]


def _profile(options: argparse.Namespace) -> list[Step]:
    names = options.shapes or ("llama3-8b", "gemma2-2b")
    steps = [_module("benchmarks.kernel_times", "--shapes", name, "--out", str(options.out), seconds=60) for name in names]
    ncu = shutil.which("ncu")
    if ncu is None:
        return steps
    sections = [word for section in SECTIONS for word in ("--section", section)]
    for plan in ("fused-saved", "fused-recompute"):
        # a fold comes first, then gradients; what is found of one slab goes for all
        chosen = ["--clock-control", "none", "--kernel-name", OUR_KERNELS, "--launch-count", "6", *sections]
        report = ["--force-overwrite", "--export", str(options.out / f"ncu-{plan}"), "--log-file", str(options.out / f"ncu-{plan}.txt")]
        call = [sys.executable, "-m", "benchmarks.kernel_times", "--once", "--shapes", names[0], "--plans", plan]
        steps.append(Step((ncu, *chosen, *report, *call), 90))
    return steps


def _benchmark(
    options: argparse.Namespace, name: str, data: str | None, who: Sequence[str], passes: Sequence[str] = (FORWARD, BOTH)
) -> Step:
    """`python -m benchmarks` on one shape: a process each, so that the file of one is there when the time of the next is up."""
    command = ["--device", "cuda", "--dtype", "bf16", "--shapes", name, "--passes", *passes, "--rounds", str(options.rounds)]
    command += ["--out", str(options.out), "--no-plot", "--only", *who, *(["--data", data] if data else [])]
    kinds = 1 if data else 2
    # to start, to compile, to check and to weigh; then everyone twice a round, about 4 passes, more where logits are written
    calls = len(who) * (2 * options.rounds + 6) * len(passes) * kinds
    return _module("benchmarks", *command, seconds=20 + 3 * len(who) * kinds + calls * 5 * pass_seconds(name))


def pass_seconds(shape: str | Shape) -> float:
    """Of one bare product on an H200, in bf16."""
    return (parse_shape(shape) if isinstance(shape, str) else shape).pass_flops / 7e14


# Running it


def run_stage(name: str, steps: Sequence[Step], options: argparse.Namespace) -> int:
    """Run the commands in the stage's time, say what became of them, and write it down."""
    deadline = time.monotonic() + 60 * options.minutes
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    options.out.mkdir(parents=True, exist_ok=True)
    before = set(options.out.glob("*.json"))
    record = []
    for step in steps:
        print(f"== {step}", flush=True)
        code, seconds = run_check(step, options, deadline) if name == "check" else run(step, deadline)
        record.append({"command": str(step), "exit_code": code, "seconds": seconds, "predicted": step.seconds})
        made = sorted(set(options.out.glob("*.json")) - before)
        found = [str(verdict) for verdict in verdicts(json.loads(path.read_text()) for path in made)]
        content = {"stage": name, "minutes": options.minutes, "steps": record, "files": [p.name for p in made], "limits": found}
        (options.out / f"gpu-{name}-{started}.json").write_text(json.dumps(content, indent=1))
        before.add(options.out / f"gpu-{name}-{started}.json")
    print(f"\n{name}:")
    for i, row in enumerate(record, 1):
        ended = {0: "done", None: "no time left: not run, or stopped"}.get(row["exit_code"], f"exit code {row['exit_code']}")
        print(f"  {i:2}  {row['seconds']:5.0f} s  {ended}  {row['command']}")
    for line in record and found:
        print(f"  {line}")
    return 0 if all(row["exit_code"] == 0 for row in record) else 1


def run(step: Step, deadline: float, environment: dict[str, str] | None = None) -> tuple[int | None, float]:
    """(exit code, seconds) of a command; None where its time was up, before or while it ran."""
    begin = time.monotonic()
    if deadline - begin < LEAST:
        return None, 0.0
    # In a group of its own, which ends whole: workers and whatever they started
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=deadline - begin - GRACE)
    except subprocess.TimeoutExpired:
        code = None
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return code, round(time.monotonic() - begin, 1)


def run_check(step: Step, options: argparse.Namespace, deadline: float) -> tuple[int | None, float]:
    """The tests; and those that are left once more, wherever one of them took the process with it."""
    begin = time.time() - 1
    environment = {**os.environ, "BIGCLASS_GPU_RESULTS": str(options.out.resolve())}
    since, failed = 0.0 if options.resume else begin, False
    left_out = options.out.resolve() / "gpu-tests-left-out.txt"
    while True:
        ended = ended_tests(options.out, since)
        left_out.write_text("".join(f"--deselect={test}\n" for test in ended))
        code, _ = run(Step((*step.command, f"@{left_out}"), step.seconds), deadline, environment)
        left_out.unlink()
        failed |= code not in (0, NO_TESTS)
        if code is None or finished(code, options.out, begin) or ended == ended_tests(options.out, since):
            return None if code is None else int(failed), round(time.time() - begin, 1)


def finished(code: int, out: Path, since: float) -> bool:
    """Did the last process of tests see them all to their end?"""
    files = _files(out, since)
    return code == NO_TESTS or (code in (0, 1) and (not files or bool(files[-1].get("complete"))))


def _files(out: Path, since: float) -> list[dict]:
    paths = [path for path in out.glob("gpu-tests-*.json") if path.stat().st_mtime >= since]
    return [json.loads(path.read_text()) for path in sorted(paths, key=lambda path: path.stat().st_mtime)]


def ended_tests(out: Path, since: float) -> list[str]:
    """Tests that need not run again: those that passed, were skipped, failed, or never ended and took the process with them."""
    return sorted({test for file in _files(out, since) for test in file["tests"]})


if __name__ == "__main__":
    sys.exit(main())

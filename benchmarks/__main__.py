"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from bigclass.extras import require

from .data import LOSS_KINDS, SEED, kinds_for
from .shapes import CROSS_ENTROPY, SHAPES, Shape, parse_shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Defaults:
    """What is run where the command line does not say."""

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    scale: Fraction
    rounds: int


USUAL = tuple(name for name, shape in SHAPES.items() if shape.loss == CROSS_ENTROPY)  # those run when they are asked for

DEFAULTS = {
    # At 1/8 of each dimension a pass of the largest shapes is 20 GFLOP, a fraction of a second on two cores.
    ("cpu", False): Defaults(USUAL, ("fp32", "bf16"), Fraction(1, 8), 5),
    ("cpu", True): Defaults(("gemma2-2b", "vit-l-in21k", "small", "tiny"), ("fp32",), Fraction(1, 16), 3),
    ("cuda", False): Defaults(USUAL, ("bf16",), Fraction(1), 7),  # meant to take less than eight minutes on an H200
    ("cuda", True): Defaults(("gemma2-2b", "llama3-8b", "small"), ("bf16",), Fraction(1, 2), 5),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults of the device filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time and weigh classification losses side by side.", allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="default: fp32 and bf16 on a CPU, bf16 on a GPU")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="SHAPE",
        help=f"of {', '.join(SHAPES)}, NxCxD, NxCxD:bce (:asymmetric, :clip, :siglip), or NxCxDxK for the K best classes",
    )
    parser.add_argument(
        "--data", nargs="+", choices=LOSS_KINDS, default=["flat"], help="what the logits of losses look like (default: flat)"
    )
    parser.add_argument(
        "--scale", type=_scale, help="times each of N, C and D of the models' shapes, as 1/8 or 0.125 (default: 1/8 on a CPU, 1 on a GPU)"
    )
    parser.add_argument("--rounds", type=_count, help="times everyone is timed (default: 5 on a CPU, 7 on a GPU)")
    parser.add_argument("--threads", type=_count, help="CPU threads (default: torch's)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory, a process each")
    parser.add_argument("--keep-memory", action=argparse.BooleanOptionalAction, default=True, help="glibc keeps freed memory between calls")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with a float64 reference")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the plot (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="few shapes, smaller, fewer rounds: about a minute")
    options = parser.parse_args(arguments)

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = DEFAULTS[options.device, options.quick]
    options.shapes = options.shapes or [SHAPES[name] for name in defaults.shapes]
    options.dtype = options.dtype or list(defaults.dtypes)
    options.scale = options.scale or defaults.scale
    options.rounds = options.rounds or defaults.rounds
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 if one of bigclass' own candidates failed or was wrong, 2 if a package is missing."""
    options = parse_arguments(arguments)
    try:
        require("rich", "matplotlib", extra="bench")
    except ModuleNotFoundError as error:
        print(f"the benchmark {error}", file=sys.stderr)
        return 2
    return run(options, shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)]))


def run(options: argparse.Namespace, command: str) -> int:
    """Measure, print as it goes, and write the files."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from . import report
    from .machine import describe_machine, describe_versions, hardware_name, keep_freed_memory
    from .measure import Case, add_memory, copy_memory, measure_case

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    console = Console()
    if not console.is_terminal:  # a log file has no width; a table cut to 80 columns has no use
        console = Console(width=150)
    machine = describe_machine(device)
    if options.keep_memory:
        machine["keeps_freed_memory"] = keep_freed_memory()
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    head = {
        "command": command,
        "started": started,
        "machine": machine,
        "versions": describe_versions(),
        "settings": {"rounds": options.rounds, "scale": str(options.scale), "data": options.data, "seed": SEED},
    }
    json_path = options.out / f"{_file_name(hardware_name(device))}-{started}.json"
    console.print(f"[bold]{hardware_name(device)}[/], {_units(machine)}; torch {torch.__version__}; {options.rounds} rounds")

    grid = [(shape.scaled(float(options.scale)), DTYPES[name]) for shape in options.shapes for name in options.dtype]
    total = sum(len(kinds_for(shape, tuple(options.data))) for shape, _ in grid)
    cases: list[Case] = []
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with progress:
        task = progress.add_task("", total=total)
        for shape, dtype in grid:
            first: Case | None = None
            for kind in kinds_for(shape, tuple(options.data)):

                def tell(what: str, label: str = f"{shape.name} {dtype} {kind}".replace("torch.", "")) -> None:
                    progress.update(task, description=f"{label}: {what}")

                case = measure_case(shape, dtype, kind, device, rounds=options.rounds, check=options.check, tell=tell)
                if options.memory and first is None:
                    add_memory(case, device, tell)
                    first = case
                elif first is not None:
                    copy_memory(first, case)
                cases.append(case)
                progress.advance(task)
                report.print_case(case, console)
                report.write_json(report.as_json(cases, head), json_path)  # a run that is interrupted has not been for nothing
    report.print_absences(cases, console)

    console.print(f"figures: {json_path}", soft_wrap=True)
    plot_path = json_path.with_suffix(".png")
    if report.plot_cases(cases, f"{hardware_name(device)}, torch {torch.__version__}", plot_path):
        console.print(f"plot:    {plot_path}", soft_wrap=True)
    else:
        console.print("no plot: it shows time against memory, which was not measured")

    ours = [absence for case in cases for absence in case.absences if absence.failed and absence.candidate.role == "bigclass"]
    wrong = [c for case in cases for c in case.candidates if c.role == "bigclass" and case.is_wrong(c.name)]
    return 1 if ours or wrong else 0


def _units(machine: dict[str, object]) -> str:
    words = {True: "yes", False: "no", None: "unknown"}
    return f"{machine['cpu_capability']}, bf16 units: {words[machine['bf16_units']]}"  # type: ignore[index]


def _file_name(text: str) -> str:
    """Lower case words joined by hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _scale(text: str) -> Fraction:
    try:
        scale = Fraction(text)
    except (ValueError, ZeroDivisionError):
        scale = Fraction(0)
    if not 0 < scale <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, such as 1/8; got {text!r}")
    return scale


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m benchmarks --help`, `python -m benchmarks compare --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigclass.extras import require

from . import trained
from .candidate import LOSS_PASSES
from .candidates import candidates_for
from .data import LOSS_KINDS, SEED, TRAINED, kinds_for, own_shape
from .floors import FLOOR
from .shapes import CROSS_ENTROPY, SHAPES, Shape, parse_shape

if TYPE_CHECKING:
    from rich.console import Console

    from .measure import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Defaults:
    """What is run where the command line does not say."""

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    scale: Fraction
    rounds: int


# The rest run when they are asked for.
USUAL = tuple(name for name, shape in SHAPES.items() if shape.loss == CROSS_ENTROPY and name != "filter")

DEFAULTS = {
    # At 1/8 of each dimension a pass of the largest shapes is 20 GFLOP, a fraction of a second on two cores.
    ("cpu", False): Defaults(USUAL, ("fp32", "bf16"), Fraction(1, 8), 5),
    ("cpu", True): Defaults(("gemma2-2b", "vit-l-in21k", "small", "tiny"), ("fp32",), Fraction(1, 16), 3),
    ("cuda", False): Defaults(USUAL, ("bf16",), Fraction(1), 7),  # meant to take less than eight minutes on an H200
    ("cuda", True): Defaults(("gemma2-2b", "llama3-8b", "small"), ("bf16",), Fraction(1, 2), 5),
}

# The middle of the series of `--scaling`, by device and `--quick`.
SCALING_BASE = {
    ("cpu", False): "1024x16384x256",
    ("cpu", True): "256x4096x64",
    ("cuda", False): "4096x65536x2048",
    ("cuda", True): "2048x32768x1024",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults of the device filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and weigh classification losses side by side.",
        epilog="python -m benchmarks compare A.json B.json compares two result files.",
        allow_abbrev=False,
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
        "--data", nargs="+", choices=LOSS_KINDS, help="what the logits of losses look like (default: flat; with --scaling: peaked)"
    )
    parser.add_argument("--passes", nargs="+", choices=LOSS_PASSES, help="what is timed (default: all; with --scaling: forward+backward)")
    parser.add_argument("--only", nargs="+", metavar="CANDIDATE", help=f"these candidates beside {FLOOR!r} (default: everyone)")
    parser.add_argument("--scaling", action="store_true", help="time and memory against N and against C, around one shape, with its plot")
    parser.add_argument(
        "--scale", type=_scale, help="times each of N, C and D of the models' shapes, as 1/8 or 0.125 (default: 1/8 on a CPU, 1 on a GPU)"
    )
    parser.add_argument("--rounds", type=_count, help="times everyone is timed (default: 5 on a CPU, 7 on a GPU)")
    parser.add_argument("--threads", type=_count, help="CPU threads (default: torch's)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory, a process each")
    parser.add_argument("--keep-memory", action=argparse.BooleanOptionalAction, default=True, help="glibc keeps freed memory between calls")
    parser.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw time against memory (needs matplotlib)")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with a float64 reference")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the plot (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="few shapes, smaller, fewer rounds: about a minute")
    options = parser.parse_args(arguments)

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = DEFAULTS[options.device, options.quick]
    if options.scaling:
        _settle_scaling(options, parser)
    options.shapes = options.shapes or [SHAPES[name] for name in defaults.shapes]
    options.dtype = options.dtype or list(defaults.dtypes)
    options.data = options.data or ["flat"]
    options.passes = [which for which in LOSS_PASSES if which in (options.passes or LOSS_PASSES)]
    options.scale = options.scale or defaults.scale
    options.rounds = options.rounds or defaults.rounds
    if options.only:
        known = {c.name for shape in options.shapes for dtype in options.dtype for c in candidates_for(shape, DTYPES[dtype])}
        if not known.issuperset(options.only):
            parser.error(f"--only: expected some of {', '.join(sorted(known))}; got {', '.join(options.only)}")
        options.only = [FLOOR, *options.only]
    return options


def _settle_scaling(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The defaults of `--scaling`; it is about one shape, dtype and kind of data, whose gradients are wanted."""
    options.shapes = options.shapes or [parse_shape(SCALING_BASE[options.device, options.quick])]
    options.dtype = options.dtype or DEFAULTS[options.device, options.quick].dtypes[:1]
    options.data = options.data or ["peaked"]
    for name in ("shapes", "dtype", "data"):
        if len(getattr(options, name)) > 1:
            parser.error(f"--scaling: expected one of --{name}, got {len(getattr(options, name))}")
    if options.shapes[0].k or options.shapes[0].loss != CROSS_ENTROPY:
        parser.error(f"--scaling: expected a shape of cross-entropy, got {options.shapes[0]}")
    if options.data == [TRAINED]:
        parser.error("--scaling: the trained model has one C; expected another --data")
    if options.passes not in (None, ["forward+backward"]):
        parser.error("--scaling: times forward+backward only; leave --passes out")
    options.passes = ["forward+backward"]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 if one of bigclass' own candidates failed or was wrong, 2 if a package is missing."""
    arguments = sys.argv[1:] if arguments is None else arguments
    comparing = arguments[:1] == ["compare"]
    options = argparse.Namespace(data=(), plot=True) if comparing else parse_arguments(arguments)
    try:
        require("rich", *(["matplotlib"] if options.plot else []), extra="bench")
        if TRAINED in options.data and not trained.is_cached():
            require("tokenizers")
    except ModuleNotFoundError as error:
        print(f"the benchmark {error}", file=sys.stderr)
        return 2
    if comparing:
        from . import compare

        return compare.main(arguments[1:])
    return run(options, shlex.join(["python", "-m", "benchmarks", *arguments]))


def run(options: argparse.Namespace, command: str) -> int:
    """Measure, print as it goes, and write the files."""
    from rich.console import Console

    from . import report, scaling
    from .machine import describe_machine, describe_versions, hardware_name, keep_freed_memory

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    console = Console()
    if not console.is_terminal:  # a log file has no width; a table cut to 80 columns has no use
        console = Console(width=180)
    machine = describe_machine(device)
    if options.keep_memory:
        machine["keeps_freed_memory"] = keep_freed_memory()
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    settings = {"rounds": options.rounds, "scale": str(options.scale), "data": options.data, "passes": options.passes, "seed": SEED}
    head = {"command": command, "started": started, "machine": machine, "versions": describe_versions(), "settings": settings}
    name = f"{_file_name(hardware_name(device))}-{started}" + ("-scaling" if options.scaling else "")
    json_path = options.out / f"{name}.json"
    console.print(f"[bold]{hardware_name(device)}[/], {_units(machine)}; torch {torch.__version__}; {options.rounds} rounds")

    shapes = [shape.scaled(float(options.scale)) for shape in options.shapes]
    series = scaling.series(shapes[0]) if options.scaling else {}
    if options.scaling:
        shapes = [shape for along in series.values() for shape in along]
        head["scaling"] = {axis: [shape.name for shape in along] for axis, along in series.items()}
    cases = _measure(shapes, options, device, head, json_path, console)
    report.print_absences(cases, console)
    console.print(f"figures: {json_path}", soft_wrap=True)

    plot_path, title = json_path.with_suffix(".png"), f"{hardware_name(device)}, torch {torch.__version__}"
    if options.plot and options.scaling:
        found = {case.shape.name: case for case in cases}
        what = f"{title}, {options.dtype[0]}, {options.data[0]}, forward+backward"
        scaling.plot({axis: [found[shape.name] for shape in along] for axis, along in series.items()}, what, plot_path)
    elif options.plot and not report.plot_cases(cases, title, plot_path):
        console.print("no plot: it shows time against memory, which was not measured")
    if plot_path.exists():
        console.print(f"plot:    {plot_path}", soft_wrap=True)

    ours = [absence for case in cases for absence in case.absences if absence.failed and absence.candidate.role == "bigclass"]
    wrong = [c for case in cases for c in case.candidates if c.role == "bigclass" and case.is_wrong(c.name)]
    return 1 if ours or wrong else 0


def _measure(
    shapes: list[Shape], options: argparse.Namespace, device: torch.device, head: dict[str, Any], path: Path, console: Console
) -> list[Case]:
    """Measure every case once, print it, and write the file anew after each."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from . import report, scaling
    from .measure import add_memory, measure_case

    grid = dict.fromkeys(  # once each: several shapes asked for may come down to the trained model's
        (own_shape(shape, kind), DTYPES[name], kind)
        for shape in shapes
        for name in options.dtype
        for kind in kinds_for(shape, tuple(options.data))
    )
    cases: list[Case] = []
    weighed: dict[tuple[Shape, torch.dtype, bool], Case] = {}
    columns = SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(grid))
        for shape, dtype, kind in grid:

            def tell(what: str, label: str = f"{shape.name} {dtype} {kind}".replace("torch.", "")) -> None:
                progress.update(task, description=f"{label}: {what}")

            only = options.only or (scaling.WHO if options.scaling else None)
            case = measure_case(
                shape, dtype, kind, device, rounds=options.rounds, check=options.check, tell=tell, passes=options.passes, only=only
            )
            if options.memory:
                alike = shape, dtype, kind == "popular"  # which alone has a bias
                add_memory(case, device, tell, weighed.get(alike))
                weighed.setdefault(alike, case)
            cases.append(case)
            progress.advance(task)
            report.print_case(case, console)
            report.write_json(report.as_json(cases, head), path)  # a run that is interrupted has not been for nothing
    return cases


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

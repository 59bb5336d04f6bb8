"""The study of the certified gradient filter: `python -m benchmarks.filter_study --help`.

Parts, each with tables on the screen, a JSON file and a plot in benchmarks/results, that can be run apart (`--only errors training`):

    errors        what is kept, promised and truly lost, and the time, against the tolerance: the library's own engine
    blocks        how many rows share a list of columns; one list for a whole chunk; one budget for all blocks
    orders        rows sorted, classes sorted; columns against tiles
    correction    a rank-one stand-in for what is dropped
    random        columns drawn at random and scaled up, in place of dropping
    threshold     the fixed threshold of prior work
    training      loss curves with the filter and without
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bigclass.core.engines.filter import FILTER_ROWS
from bigclass.extras import require

from .filter_data import KINDS, Sizes
from .filter_training import Training

RESULTS = Path(__file__).parent / "results"
PARTS = ("errors", "blocks", "orders", "correction", "random", "threshold", "training")

SIZES = Sizes(rows=4096, classes=32768, features=512)
QUICK_SIZES = Sizes(rows=512, classes=4096, features=64)
QUICK_KINDS = ("early", "peaked", "popular")
QUICK_TRAINING = Training(vocab=1000, width=32, context=64, batch=4, steps=6, checkpoint_steps=10, seeds=2, corpus_bytes=400_000, watch=3)


@dataclass(frozen=True, slots=True)
class Options:
    """What to run."""

    parts: tuple[str, ...]
    kinds: tuple[str, ...]
    sizes: Sizes
    training: Training
    rounds: int
    """Times that each call of `errors` is timed."""
    out: Path
    prefix: str
    """Of the names of files."""
    redraw: bool = False
    """Only draw again what the JSON files hold."""


def parse_arguments(arguments: list[str] | None = None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.filter_study", description="Study the certified gradient filter.", allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--data", nargs="+", choices=KINDS, help="kinds of problems, all but `training` (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="times each call is timed (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON files and plots (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: under a minute, no figures worth quoting")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: print and draw again what the JSON files hold")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    return Options(
        parts=tuple(part for part in PARTS if part in given.only),
        kinds=tuple(given.data or (QUICK_KINDS if given.quick else KINDS)),
        sizes=QUICK_SIZES if given.quick else SIZES,
        training=QUICK_TRAINING if given.quick else Training(),
        rounds=1 if given.quick else given.rounds,
        out=given.out,
        prefix="filter-study-quick-" if given.quick else "filter-study-",
        redraw=given.redraw,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are asked for; 2 if a package is missing."""
    options = parse_arguments(arguments)
    try:
        require("rich", "matplotlib", extra="bench")
        require("tokenizers", extra="demo")
    except ModuleNotFoundError as error:
        print(f"the study {error}", file=sys.stderr)
        return 2
    run(options, shlex.join(["python", "-m", "benchmarks.filter_study", *(sys.argv[1:] if arguments is None else arguments)]))
    return 0


def run(options: Options, command: str) -> None:
    """Measure, print, and write the files part by part."""
    from rich.console import Console

    from . import filter_report
    from .machine import describe_machine, describe_versions, hardware_name, keep_freed_memory

    console = Console()
    if not console.is_terminal:  # a log file has no width
        console = Console(width=170)
    if options.redraw:
        for part in options.parts:
            path = options.out / f"{options.prefix}{part}.json"
            found = json.loads(path.read_text())
            filter_report.print_part(part, found, console)
            filter_report.plot_part(part, found, _title(found["machine"]["name"], found["versions"]["torch"]), path.with_suffix(".png"))
        return
    keep_freed_memory()
    device = torch.device("cpu")
    console.print(f"[bold]{hardware_name(device)}[/]; torch {torch.__version__}")
    for part in options.parts:
        began = time.perf_counter()
        head = {
            "part": part,
            "command": command,
            "started": time.strftime("%Y-%m-%dT%H-%M-%S"),
            "machine": describe_machine(device),
            "versions": {name: version for name, version in describe_versions().items() if version},
            "settings": {"rows_of_block": FILTER_ROWS}
            | ({"training": asdict(options.training)} if part == "training" else {"sizes": asdict(options.sizes)}),
        }
        with console.status(part) as status:

            def tell(what: str, part: str = part, status: Any = status) -> None:
                status.update(f"{part}: {what}")

            found = measure(part, options, tell)
        filter_report.print_part(part, found, console)
        seconds = round(time.perf_counter() - began, 1)
        path = options.out / f"{options.prefix}{part}.json"
        filter_report.write_json(head | {"seconds": seconds} | found, path)
        filter_report.plot_part(part, found, _title(hardware_name(device), torch.__version__), path.with_suffix(".png"))
        console.print(f"{part}: {seconds:.0f} s; {path.name} and {path.with_suffix('.png').name} in {options.out}", soft_wrap=True)


def _title(hardware: str, torch_version: str) -> str:
    return f"{hardware}, torch {torch_version}"


def measure(part: str, options: Options, tell: Any) -> dict[str, Any]:
    """What a part found, as plain values."""
    from . import filter_training
    from .filter_parts import ONCE, PER_CASE, TOLERANCES

    if part == "training":
        runs = filter_training.run_training(options.training, TOLERANCES[1:], tell)
        return {"rows": filter_training.compare(runs), "runs": filter_training.as_json(runs)}
    from .filter_data import cases

    found: dict[str, Any] = {"rows": []}
    for case in cases(options.kinds, options.sizes):
        tell(case.kind)
        found["rows"] += PER_CASE[part](case, options.rounds)
    if part in ONCE:
        tell("once for all")
        found |= ONCE[part](options.sizes, options.rounds)
    return found


if __name__ == "__main__":
    sys.exit(main())

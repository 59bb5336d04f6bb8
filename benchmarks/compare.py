"""`python -m benchmarks compare A.json B.json`: two result files, case by case.

What is compared is each candidate's time in units of the floor of its own run, so that machines of unlike speed can be compared; and
its memory. A file written before `backward` was a pass of its own has fewer figures, which are listed as missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .floors import FLOOR
from .machine import MIB

NONE = "–"
SIDES = ("A", "B")

Run = Mapping[str, Any]  # as `report.as_json` makes it
Key = tuple[str, str]  # candidate's name, pass


def main(arguments: list[str]) -> int:
    """Print the comparison; 0 whatever it shows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description="Compare two result files case by case.")
    for side in SIDES:
        parser.add_argument(side, type=Path, help="a JSON file that the benchmark wrote")
    options = parser.parse_args(arguments)
    runs: list[Run] = []
    for path in (options.A, options.B):
        try:
            runs.append(json.loads(path.read_text()))
            runs[-1]["cases"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{path}: not a result file of this benchmark ({type(error).__name__}: {error})")
    console = Console()
    print_comparison(runs[0], runs[1], console if console.is_terminal else Console(width=150))
    return 0


def print_comparison(a: Run, b: Run, console: Console) -> None:
    """What differs around the runs, a table a case that both have, and the cases that one has."""
    _print_heads(a, b, console)
    cases = [{_name(case): case for case in run["cases"]} for run in (a, b)]
    for name in cases[0]:
        if name in cases[1]:
            console.print(_table(name, cases[0][name], cases[1][name]))
    for side, own, other in ((SIDES[0], *cases), (SIDES[1], *reversed(cases))):
        missing = [name for name in own if name not in other]
        if missing:
            console.print(f"[bold]Only in {side}[/]")
            console.print("\n".join(f"  {name}" for name in missing), highlight=False)


def _print_heads(a: Run, b: Run, console: Console) -> None:
    for side, run in zip(SIDES, (a, b), strict=True):
        console.print(f"[bold]{side}[/] {run.get('machine', {}).get('name', NONE)}, {run.get('started', NONE)}", highlight=False)
    table = Table(title="[bold]What differs around the figures[/]", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", *SIDES):
        table.add_column(column, overflow="fold")
    for part in ("machine", "versions", "settings"):
        one, other = dict(_flat(part, a.get(part, {}))), dict(_flat(part, b.get(part, {})))
        for key in dict.fromkeys([*one, *other]):
            if one.get(key) != other.get(key):
                table.add_row(key, *(NONE if value is None else str(value) for value in (one.get(key), other.get(key))))
    console.print(table if table.row_count else "the same machine, versions and settings")


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of nested dictionaries."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}", inner)
    else:
        yield prefix, value


def _name(case: Mapping[str, Any]) -> str:
    """What makes two cases the same one, for people too."""
    shape = case["shape"]
    extras = [f"{key} {shape[key]}" for key in ("softcap", "k") if shape.get(key) is not None]
    loss = shape.get("loss") or ("cross-entropy" if shape.get("k") is None else "prediction")
    sizes = f"{shape['rows']} x {shape['classes']} x {shape['features']}"
    return ", ".join([f"{shape['name']} ({sizes})", loss, *extras, case["dtype"], case["data"]])


def _table(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Table:
    one, other = _figures(a), _figures(b)
    absent = _reasons(a), _reasons(b)
    table = Table(title=f"[bold]{name}[/]", title_justify="left", box=box.SIMPLE_HEAD, caption_justify="left")
    table.caption = f"time in units of {FLOOR} of the same run; below 1 in the column B / A, B is the faster"
    for column in ("candidate", "pass"):
        table.add_column(column, no_wrap=True)
    for column in ("time A", "time B", "B / A", "+MiB A", "+MiB B", "B / A"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("missing")
    for key in dict.fromkeys([*one, *other]):
        times = [side.get(key, {}).get("ratio_to", {}).get(FLOOR) for side in (one, other)]
        sizes = [side.get(key, {}).get("extra_bytes") for side in (one, other)]
        missing = [
            f"not in {letter}{reasons.get(key, '')}"
            for letter, side, reasons in zip(SIDES, (one, other), absent, strict=True)
            if key not in side
        ]
        table.add_row(
            *key,
            *(_number(t, "{:.3g}") for t in times),
            _ratio(*times),
            *(_number(None if s is None else s / MIB, "{:.1f}") for s in sizes),
            _ratio(*sizes),
            "; ".join(missing),
        )
    return table


def _figures(case: Mapping[str, Any]) -> dict[Key, Mapping[str, Any]]:
    """Everyone's figures, but those of the floor, which are the unit."""
    return {
        (candidate["name"], which): figures
        for candidate in case["candidates"]
        if candidate["name"] != FLOOR
        for which, figures in candidate["passes"].items()
    }


def _reasons(case: Mapping[str, Any]) -> dict[Key, str]:
    return {(absence["name"], absence["pass"]): f": {absence['reason']}" for absence in case["unavailable"]}


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _ratio(a: float | None, b: float | None) -> str:
    return f"{b / a:.2f}" if a and b else NONE

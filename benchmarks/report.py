"""What a run leaves behind: tables on the screen, a JSON file with every number, a plot."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

import bigclass
from bigclass.core import LogSumExp

from .candidate import Candidate, Pass
from .data import TRAINED
from .floors import FLOOR, FLOOR_FP32
from .machine import MIB
from .measure import Case, Figures
from .peers import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SCHEMA = 2  # 1: without the pass "backward" and without "exact"
BASELINES = (DENSE, FLOOR, FLOOR_FP32)
NONE = "–"

# Matrix products of the floor.
PRODUCTS: dict[Pass, int] = {"forward": 1, "backward": 2, "forward+backward": 3}

# Names in a table's head.
SHORT = {DENSE: "dense", FLOOR: "GEMM", FLOOR_FP32: "fp32", "forward": "forward", "backward": "backward", "forward+backward": "fwd+bwd"}

# What is measured in pages of 4 KiB, and by a counter that each thread batches, means nothing below this.
LEAST_BYTES = 1 << 18

# A floor that varies by more than this from round to round was not alone on the machine.
BUSY = 1.5

MARKERS = {"dense": "s", "peer": "^", "bigclass": "o"}
MARKER_FILTERED = "D"
COLOURS = {
    "dense": ("#555555",),
    "peer": ("#1f1f1f", "#f4a259", "#d1495b", "#8f5d2c", "#b07aa1", "#e0b000", "#7f2704"),
    "bigclass": ("#1b6ca8", "#2e8b57", "#9acd32", "#30a5bf", "#8cc6e7", "#7b4fa3", "#c77dff", "#00b4a0", "#3f37c9", "#9a8c98"),
}


# Tables


def print_case(case: Case, console: Console) -> None:
    """A table of one case, each candidate a row."""
    baselines = [name for name in BASELINES if any(key[0] == name for key in case.figures)]
    passes = case.passes()
    weighed = {which for (_, which), figures in case.figures.items() if figures.extra_bytes is not None}
    checked = any(figures.errors for figures in case.figures.values())

    table = Table(
        title=f"[bold]{case.shape}[/], {_dtype(case)}, {case.kind}",
        title_justify="left",
        caption=_caption(case),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("\ncandidate", no_wrap=True)
    for which in passes:
        table.add_column(f"{SHORT[which]}\nms", justify="right", no_wrap=True)
        for baseline in baselines:
            table.add_column(f"\n/ {SHORT[baseline]}", justify="right", no_wrap=True)
        if which in weighed:
            table.add_column("\n+MiB", justify="right", no_wrap=True)
    if checked:
        table.add_column("relative\nerror", justify="right")

    for candidate in case.candidates:
        found: dict[Pass, Figures | None] = {which: case.figures.get((candidate.name, which)) for which in passes}
        if not any(found.values()):
            continue
        row = [_label(candidate, found)]
        for which, figures in found.items():
            row.append(_milliseconds(figures.median) if figures else NONE)
            row += [_number(case.ratio(candidate.name, baseline, which), "{:.2f}") for baseline in baselines]
            if which in weighed:
                row.append(_mebibytes(figures.extra_bytes) if figures else NONE)
        if checked:
            mark = " !" if case.is_wrong(candidate.name) else "" if candidate.exact else " ~"
            row.append(_number(case.worst_error(candidate.name), "{:.0e}") + mark)
        style = "red" if case.is_wrong(candidate.name) else {"floor": "dim", "bigclass": "bold"}.get(candidate.role)
        table.add_row(*row, style=style)
    console.print(table)


def print_absences(cases: Sequence[Case], console: Console) -> None:
    """Who gave no figure, where and why: one row a candidate and reason."""
    where: defaultdict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for case in cases:
        for absence in case.absences:
            places = where[absence.candidate.name, absence.reason, absence.failed]
            place = f"{case.shape.name} {_dtype(case)}"
            if place not in places:
                places.append(place)
    if not where:
        return
    everywhere = len({(case.shape.name, case.dtype) for case in cases if not case.shape.k})
    table = Table(title="[bold]Not run[/]", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("candidate", "why", "where"):
        table.add_column(column)
    for (name, reason, failed), places in where.items():
        places_text = "every loss" if len(places) == everywhere > 1 else ", ".join(places)
        table.add_row(name, reason, places_text, style="red" if failed else None)
    console.print(table)


def _caption(case: Case) -> str:
    lines = []
    timed: Pass | None = next((which for which in case.passes() if (FLOOR, which) in case.figures), None)
    if timed:
        rate = PRODUCTS[timed] * case.shape.pass_flops / case.figures[FLOOR, timed].median
        lines.append(f"one product is {case.shape.pass_flops / 1e9:.3g} GFLOP; {FLOOR} at {rate / 1e12:.3g} TFLOP/s")
        spread = max(max(f.seconds) / min(f.seconds) for (name, _), f in case.figures.items() if name == FLOOR)
        if spread > BUSY:
            lines.append(f"the machine is busy: {FLOOR} varied by {spread:.1f} x between rounds, so these ratios are rough")
    if any(case.is_wrong(candidate.name) for candidate in case.candidates):
        lines.append("! further from float64 than rounding explains")
    if any(not candidate.exact and case.worst_error(candidate.name) is not None for candidate in case.candidates):
        lines.append("~ filtered: leaves small gradients out on purpose; their error is shown, and not held against rounding")
    if case.kind == TRAINED:
        lines.append("the shape is the trained model's own; N is what was asked, as far as its held-out text goes")
    return "\n".join(lines)


def _label(candidate: Candidate, found: Mapping[Pass, Figures | None]) -> str:
    settings = list(dict.fromkeys(f.setting for f in found.values() if f and f.setting is not None))
    return candidate.name + (f" ({'/'.join(map(str, settings))} {candidate.unit})" if settings else "")


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def _milliseconds(seconds: float) -> str:
    """Three significant digits or more, without an exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.{2 if value < 1 else 1}f}" if value >= 0.1 else f"{value:.3f}"


def _mebibytes(size: int | None) -> str:
    if size is None:
        return NONE
    return f"< {LEAST_BYTES / MIB:g}" if size < LEAST_BYTES else f"{size / MIB:.{0 if size >= 10 * MIB else 1}f}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


# JSON


def as_json(cases: Iterable[Case], head: Mapping[str, Any]) -> dict[str, Any]:
    """The run as plain values: `head` (machine, versions, command, settings), then the cases with every round's time."""
    return {"schema": SCHEMA, **head, "cases": [_case_as_json(case, head["machine"]["device"]) for case in cases]}


def write_json(run: Mapping[str, Any], path: Path) -> None:
    """Write what `as_json` made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n")


def _case_as_json(case: Case, device: str) -> dict[str, Any]:
    shape = case.shape
    plan = None if shape.k else _explain(case, device)
    return {
        "shape": {
            "name": shape.name,
            "rows": shape.rows,
            "classes": shape.classes,
            "features": shape.features,
            "softcap": shape.softcap,
            "k": shape.k,
            "loss": None if shape.k else shape.loss,
        },
        "shape_note": "the trained model's own, N as asked" if case.kind == TRAINED else None,
        "dtype": _dtype(case),
        "data": case.kind,
        "explain": plan,
        "candidates": [
            {
                "name": candidate.name,
                "role": candidate.role,
                "what": candidate.what,
                "unit": candidate.unit or None,
                "exact": candidate.exact,
                "wrong": case.is_wrong(candidate.name),
                "passes": {
                    which: _figures_as_json(case, candidate.name, which)
                    for which in case.passes()
                    if (candidate.name, which) in case.figures
                },
            }
            for candidate in case.candidates
            if any(key[0] == candidate.name for key in case.figures)
        ],
        "unavailable": [
            {"name": absence.candidate.name, "pass": absence.which, "reason": absence.reason, "failed": absence.failed}
            for absence in case.absences
        ],
    }


def _explain(case: Case, device: str) -> str:
    shape = case.shape
    sums = shape.one_vs_all or shape.loss == "siglip"
    folds = (LogSumExp(exclude_picks=True), LogSumExp(exclude_picks=True, axis="columns")) if shape.loss == "clip" else None
    return str(
        bigclass.explain(
            shape.rows, shape.classes, shape.features, dtype=case.dtype, device=device, softcap=shape.softcap, one_vs_all=sums, folds=folds
        )
    )


def _figures_as_json(case: Case, name: str, which: Pass) -> dict[str, Any]:
    figures = case.figures[name, which]
    ratios = {baseline: case.ratio(name, baseline, which) for baseline in BASELINES}
    return {
        "setting": figures.setting,
        "repeats": figures.repeats,
        "seconds": figures.seconds,
        "median_seconds": figures.median,
        "ratio_to": {baseline: ratio for baseline, ratio in ratios.items() if ratio is not None},
        "errors": figures.errors,
        "extra_bytes": figures.extra_bytes,
    }


# Plot, which alone needs matplotlib


def pyplot() -> Any:
    """matplotlib's, for files only: a machine without a display is the usual one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_cases(cases: Sequence[Case], title: str, path: Path) -> bool:
    """Time (in units of the bare products) against extra memory, a panel a case. False where no memory was measured."""
    cases = [case for case in cases if any(f.extra_bytes is not None for f in case.figures.values())]
    if not cases:
        return False
    columns = min(4, len(cases))
    rows = -(-len(cases) // columns)
    figure, panels = pyplot().subplots(rows, columns, figsize=(3.6 * columns + 0.4, 3.2 * rows + 1.3), squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for case, panel in zip(cases, panels.flat, strict=False):
        handles |= _plot_case(case, panel)
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("time / bare matrix products", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, 2 * columns), fontsize=8, frameon=False)
    save(figure, path)
    return True


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def plain_log_axis(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _plot_case(case: Case, panel: Axes) -> dict[str, Any]:
    which = case.passes()[-1]
    handles: dict[str, Any] = {"bare GEMM, the floor": panel.axhline(1, color="black", lw=1)}
    fp32 = case.ratio(FLOOR_FP32, FLOOR, which)
    if fp32 is not None:
        handles["bare GEMM in fp32"] = panel.axhline(fp32, color="black", lw=1, ls=":")

    seen: defaultdict[str, int] = defaultdict(int)
    for candidate in case.candidates:
        if candidate.role == "floor":
            continue
        colours = COLOURS[candidate.role]
        colour = colours[seen[candidate.role] % len(colours)]
        seen[candidate.role] += 1
        figures, ratio = case.figures.get((candidate.name, which)), case.ratio(candidate.name, FLOOR, which)
        if figures is None or figures.extra_bytes is None or ratio is None:
            continue
        handles[candidate.name] = panel.scatter(
            max(figures.extra_bytes, LEAST_BYTES) / MIB,
            ratio,
            s=46,
            marker=MARKERS[candidate.role] if candidate.exact else MARKER_FILTERED,
            color=colour,
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    # Room around the points, and an axis wide enough that noise does not look like a difference.
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    panel.set_xlim(left / 2, right * 2)
    panel.set_ylim(low / 1.1, max(high * 1.1, 2))
    for axis in (panel.xaxis, panel.yaxis):
        plain_log_axis(axis)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25, lw=0.5)
    shape = case.shape
    size = f"{shape.rows} x {shape.classes} x {shape.features}"
    panel.set_xlabel("peak MiB above inputs and outputs", fontsize=8)
    panel.set_title(f"{shape.name}, {_dtype(case)}, {case.kind}\n{size}, {which}", fontsize=8)
    return handles

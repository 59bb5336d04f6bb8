"""How time and memory grow: a series of cases along N and one along C, with the other two sizes held, and their plot.

Time is in units of the bare products of the same case, so a level line means that a candidate keeps its distance from the floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .candidate import Pass
from .floors import FLOOR
from .measure import Case
from .ours import FILTERED, OURS
from .peers import CHUNKED_BEST, DENSE
from .report import LEAST_BYTES, MARKER_FILTERED, MARKERS, MIB, plain_log_axis, pyplot, save
from .shapes import Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PASS: Pass = "forward+backward"
AXES = ("rows", "classes")
FACTORS = (0.25, 0.5, 1, 2, 4)
STYLES: dict[str, dict[str, Any]] = {
    DENSE: {"color": "#555555", "marker": MARKERS["dense"]},
    CHUNKED_BEST: {"color": "#d1495b", "marker": MARKERS["peer"]},
    OURS: {"color": "#1b6ca8", "marker": MARKERS["bigclass"]},
    FILTERED: {"color": "#2e8b57", "marker": MARKER_FILTERED},
}
WHO = (FLOOR, *STYLES)

LETTERS = {"rows": "N", "classes": "C", "features": "D"}


def series(base: Shape) -> dict[str, list[Shape]]:
    """`base` with its rows, and with its classes, times each of `FACTORS`; named by their sizes."""

    def named(shape: Shape) -> Shape:
        return replace(shape, name=f"{shape.rows}x{shape.classes}x{shape.features}", scales=False)

    return {axis: [named(replace(base, **{axis: max(1, round(getattr(base, axis) * f))})) for f in FACTORS] for axis in AXES}


def plot(found: Mapping[str, Sequence[Case]], title: str, path: Path) -> None:
    """Time above, memory below, a column an axis. found: the cases of each axis."""
    figure, panels = pyplot().subplots(2, len(AXES), figsize=(9, 7), sharex="col", sharey="row", layout="constrained")
    handles: dict[str, Any] = {}
    for axis, (above, below) in zip(AXES, panels.T, strict=True):
        handles |= _draw(above, below, axis, found[axis])
    low, high = panels[0, 0].get_ylim()
    panels[0, 0].set_ylim(low / 1.1, max(high * 1.1, 2))  # wide enough that noise does not look like a difference
    panels[0, 0].set_ylabel("time / bare matrix products", fontsize=8)
    panels[1, 0].set_ylabel("peak MiB above inputs and outputs", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save(figure, path)


def _draw(above: Axes, below: Axes, axis: str, cases: Sequence[Case]) -> dict[str, Any]:
    """One axis' series: its time and its memory. Returns what the legend is to name."""
    sizes = [getattr(case.shape, axis) for case in cases]
    logits = [case.shape.rows * case.shape.classes * case.dtype.itemsize / MIB for case in cases]
    handles: dict[str, Any] = {"bare GEMM, the floor": above.axhline(1, color="black", lw=1)}
    handles["one N x C matrix"] = below.plot(sizes, logits, color="black", lw=1, ls=":")[0]
    for name, style in STYLES.items():
        ratios = [(size, case.ratio(name, FLOOR, PASS)) for size, case in zip(sizes, cases, strict=True)]
        weights = [(size, _mebibytes(case, name)) for size, case in zip(sizes, cases, strict=True)]
        for panel, points in ((above, ratios), (below, weights)):
            known = [(size, value) for size, value in points if value is not None]
            if known:
                handles[name] = panel.plot(*zip(*known, strict=True), ms=5, **style)[0]
    fixed = ", ".join(f"{LETTERS[other]} = {getattr(cases[0].shape, other)}" for other in LETTERS if other != axis)
    above.set_title(f"against {LETTERS[axis]} ({fixed})", fontsize=9)
    below.set_xlabel(f"{LETTERS[axis]}, {axis}", fontsize=8)
    for panel in (above, below):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        plain_log_axis(panel.yaxis)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25, lw=0.5)
    return handles


def _mebibytes(case: Case, name: str) -> float | None:
    figures = case.figures.get((name, PASS))
    return None if figures is None or figures.extra_bytes is None else max(figures.extra_bytes, LEAST_BYTES) / MIB

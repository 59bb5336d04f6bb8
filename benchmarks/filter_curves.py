"""The plot of the trainings: curves, distances between runs, kept share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .filter_training import CONTROL, EXACT, STARTS

STYLES = {
    EXACT: ("#b8b8c4", 5.0),
    CONTROL: ("#555555", 1.0),
    "2^-8": ("#1b6ca8", 1.4),
    "2^-6": ("#f4a259", 1.4),
    "2^-4": ("#d1495b", 1.4),
    "2^-4 lost": ("#7b4fa3", 1.2),
}
NAMES = {EXACT: "exact (tiled)", CONTROL: "exact (dense engine)"}


def plot_training(found: Mapping[str, Any]) -> Figure:
    """A row of panels a start."""
    runs = [run for run in found["runs"] if run["start"] in STARTS]
    starts = list(dict.fromkeys(run["start"] for run in runs))
    figure, axes = plt.subplots(len(starts), 4, figsize=(16, 3.6 * len(starts) + 0.6), squeeze=False, layout="constrained")
    for row, start in zip(axes, starts, strict=True):
        own = [run for run in runs if run["start"] == start]
        _curves(row[0], own, start)
        _distances(row[1], own)
        _ends(row[2], own)
        _shares(row[3], own)
        for panel in row:
            panel.grid(alpha=0.25, lw=0.5)
            panel.tick_params(labelsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def _arms(runs: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["arm"] for run in runs))


def _of(runs: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["arm"] == arm]


def _mean(curves: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


def _curves(panel: Axes, runs: list[dict[str, Any]], start: str) -> None:
    for arm in _arms(runs):
        colour, width = STYLES[arm]
        first = _of(runs, arm)[0]["losses"]
        panel.plot(range(1, len(first) + 1), first, color=colour, lw=width, label=NAMES.get(arm, f"filter, {arm}"))
    panel.set_title(f"from {start}: training loss of the first seed", fontsize=9)
    panel.set_xlabel("step", fontsize=8)


def _distances(panel: Axes, runs: list[dict[str, Any]]) -> None:
    """Mean over seeds of the distance to the exact run of the same seed; and that of exact runs to their mean over seeds."""
    exact = {run["seed"]: run["losses"] for run in _of(runs, EXACT)}
    steps = range(1, len(next(iter(exact.values()))) + 1)
    mean = _mean(list(exact.values()))
    between = _mean([[abs(a - b) for a, b in zip(curve, mean, strict=True)] for curve in exact.values()])
    panel.plot(steps, between, color=STYLES[EXACT][0], lw=3)
    for arm in _arms(runs):
        if arm == EXACT:
            continue
        apart = [[abs(a - b) for a, b in zip(run["losses"], exact[run["seed"]], strict=True)] for run in _of(runs, arm)]
        panel.plot(steps, _mean(apart), color=STYLES[arm][0], lw=1.2)
    panel.set_yscale("symlog", linthresh=1e-6)  # equal losses have no place on a logarithmic axis
    panel.set_ylim(bottom=0)
    panel.set_title("|difference| to the exact run of the same seed\n(grey: exact runs to their mean over seeds)", fontsize=9)
    panel.set_xlabel("step", fontsize=8)


def _ends(panel: Axes, runs: list[dict[str, Any]]) -> None:
    """Held-out loss at the end, a point a run, lines joining those of a seed."""
    arms = _arms(runs)
    ends = {(run["arm"], run["seed"]): run["held_out"] for run in runs}
    for seed in dict.fromkeys(run["seed"] for run in runs):
        panel.plot(range(len(arms)), [ends[arm, seed] for arm in arms], color="0.8", lw=1, zorder=1)
    for x, arm in enumerate(arms):
        ys = [run["held_out"] for run in _of(runs, arm)]
        panel.scatter([x] * len(ys), ys, color=STYLES[arm][0], s=36, edgecolors="0.3", linewidths=0.5, zorder=2)
    panel.set_xticks(range(len(arms)), [arm.replace(" ", "\n") for arm in arms], fontsize=8)
    panel.margins(x=0.1)
    panel.set_title("held-out loss at the end, a line a seed", fontsize=9)


def _shares(panel: Axes, runs: list[dict[str, Any]]) -> None:
    for arm in _arms(runs):
        if arm in (EXACT, CONTROL):
            continue
        own = _of(runs, arm)
        steps = [step + 1 for step in own[0]["watched"]]
        panel.plot(steps, _mean([run["kept"] for run in own]), color=STYLES[arm][0], lw=1.4)
        panel.plot(steps, _mean([run["computed"] for run in own]), color=STYLES[arm][0], lw=1, ls=":")
    panel.set_ylim(0, 1.05)
    panel.set_title("share of columns kept\n(dotted: blocks above 60 % counted whole)", fontsize=9)
    panel.set_xlabel("step", fontsize=8)

"""Tables, JSON files and plots of the study of the filter. Tables are printed in the form of Markdown, to be pasted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich import box
from rich.console import Console
from rich.table import Table

from .filter_parts import DRAWS, THRESHOLD, TOLERANCES, tolerance_name

matplotlib.use("Agg")  # files only

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Row = Mapping[str, Any]
Found = Mapping[str, Any]

COLOURS = ("#7f7f7f", "#f4a259", "#1b6ca8", "#d1495b", "#7b4fa3", "#bcd8c1", "#8cc98c", "#3f9d54", "#145a2a")
MUCH = 0.97
MIDDLE = TOLERANCES[1]  # the tolerance shown where one must do


def share(value: float) -> str:
    return f"{100 * value:.{0 if value >= 0.995 else 1 if value >= 0.1 else 2}f} %"


def small(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def times(value: float) -> str:
    return f"{value:.2f}"


# Tables


def print_table(console: Console, title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=f"[bold]{title}[/]", title_justify="left", box=box.MARKDOWN)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_part(part: str, found: Found, console: Console) -> None:
    """The tables of a part."""
    TABLES[part](found, console)


def _print_errors(found: Found, console: Console) -> None:
    heads = ("kind", "loss", "tolerance", "kept", "kept, return_stats", "promised, return_stats", "G' worst block", "G' pooled", "dx", "dw",
             "time / exact")  # fmt: skip
    rows = [
        [r["kind"], f"{r['loss']:.3g}", tolerance_name(r["tolerance"]), share(r["kept"]), share(r["kept_reported"])]
        + [small(r[name]) for name in ("promised", "worst_block", "pooled", "dx", "dw")]
        + [times(r["time_ratio"])]
        for r in found["rows"]
    ]
    print_table(console, "errors: the engine against itself without the filter", heads, rows)


def _pivot(rows: Iterable[Row], left: str, top: str, value: str = "kept") -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table: `left` downwards, `top` across."""
    rows = list(rows)
    tops = list(dict.fromkeys(r[top] for r in rows))
    cells = {(r[left], r[top]): share(r[value]) for r in rows if value in r}
    lefts = dict.fromkeys(r[left] for r in rows)
    return [left, *map(str, tops)], [[str(a), *(cells.get((a, b), "–") for b in tops)] for a in lefts]


def _print_blocks(found: Found, console: Console) -> None:
    for tolerance in TOLERANCES:
        rows = [r for r in found["rows"] if r["tolerance"] == tolerance]
        print_table(
            console, f"blocks: columns kept at {tolerance_name(tolerance)}, by rows that share a list", *_pivot(rows, "kind", "rows")
        )
    forced = [r for r in found["rows"] if r["tolerance"] == MIDDLE and r["rows"] != "pooled"]
    print_table(console, "blocks: columns that hold a target, and are kept for that", *_pivot(forced, "kind", "rows", "forced"))
    rates = found["cost_of_kept_column"]
    title = "blocks: time of a kept column a row, gathered, against one product of all rows"
    print_table(console, title, ["rows", *rates], [["cost", *map(times, rates.values())]])


def _print_orders(found: Found, console: Console) -> None:
    for tolerance in TOLERANCES[1:]:
        for what in dict.fromkeys(r["what"] for r in found["rows"]):
            rows = [r for r in found["rows"] if r["tolerance"] == tolerance and r["what"] == what]
            print_table(console, f"orders: {what} kept at {tolerance_name(tolerance)}", *_pivot(rows, "kind", "order"))


def _print_correction(found: Found, console: Console) -> None:
    heads = ["kind", "tolerance", "kept"]
    heads += [f"{name}{way}" for name in ("G'", "dx", "dw") for way in ("", ", a block", ", all rows")]
    rows = [
        [r["kind"], tolerance_name(r["tolerance"]), share(r["kept"])]
        + [small(r[f"{name}{way}"]) for name in ("g", "dx", "dw") for way in ("", "_block", "_all")]
        for r in found["rows"]
    ]
    title = "correction: errors of dropping, and with a rank-one stand-in for each block of 128 rows or one for all"
    print_table(console, title, heads, rows)
    _print_fit(found, console)


def _print_fit(found: Found, console: Console) -> None:
    heads = ("kind", "tolerance", "kept, dropping", "kept, stand-in", "G' dropping", "G' stand-in", "dx dropping", "dx stand-in",
             "dw dropping", "dw stand-in")  # fmt: skip
    rows = [
        [r["kind"], tolerance_name(r["tolerance"]), share(r["kept"]), share(r["kept_fit"])]
        + [small(r[f"{name}{way}"]) for name in ("g", "dx", "dw") for way in ("", "_fit")]
        for r in found["rows"]
    ]
    print_table(console, "correction: columns kept if the tolerance is on what the stand-in leaves", heads, rows)


def _print_random(found: Found, console: Console) -> None:
    heads = ["kind", "tolerance", "kept", "G' dropped", "G' one draw"]
    heads += [f"{name} {way}" for name in ("dx", "dw") for way in ("dropped", "one draw", f"mean of {DRAWS}")]
    rows = [
        [r["kind"], tolerance_name(r["tolerance"]), share(r["kept"]), small(r["g_drop"]), small(r["g_draw"])]
        + [small(r[f"{name}_{way}"]) for name in ("dx", "dw") for way in ("drop", "draw", "mean")]
        for r in found["rows"]
    ]
    print_table(console, "random: errors at the same expected share", heads, rows)


def _print_threshold(found: Found, console: Console) -> None:
    heads = ("kind", "classes", "loss", "kept", "G' worst block", "G' pooled", "mass dropped", "dx", "dw")
    rows = [
        [r["kind"], r["order"], f"{r['loss']:.3g}", share(r["kept"]), small(r["worst_block"]), small(r["pooled"]), share(r["mass"]),
         small(r["dx"]), small(r["dw"])]
        for r in found["rows"]
    ]  # fmt: skip
    print_table(console, f"threshold: tiles of 128 x 256 dropped where all |G| < {tolerance_name(THRESHOLD)}", heads, rows)


def _print_training(found: Found, console: Console) -> None:
    heads = ("start", "arm", "held-out loss", "mean difference", "mean |difference|", "max |difference|", "deviation over seeds",
             "max |difference|, training loss", "its deviation", "kept first", "mean", "last", "computed mean")  # fmt: skip
    rows = [
        [r["start"], r["arm"], f"{r['held_out']:.4f}", f"{r['held_out_mean_difference']:+.1e}", small(r["held_out_mean_distance"]),
         small(r["held_out_max_distance"]), small(r["held_out_deviation_over_seeds"]), small(r["train_max_distance"]),
         small(r["train_deviation_over_seeds"]), share(r["kept_first"]), share(r["kept_mean"]), share(r["kept_last"]),
         share(r["computed_mean"])]
        for r in found["rows"]
    ]  # fmt: skip
    print_table(console, "training: differences to the exact run of the same seed, at the end", heads, rows)


TABLES: dict[str, Callable[[Found, Console], None]] = {
    "errors": _print_errors,
    "blocks": _print_blocks,
    "orders": _print_orders,
    "correction": _print_correction,
    "random": _print_random,
    "threshold": _print_threshold,
    "training": _print_training,
}


# JSON


def write_json(found: Found, path: Path) -> None:
    """Everything that was measured, numbers cut to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_short(found), indent=1) + "\n")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(k): _short(v) for k, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list | tuple) else value


# Plots


def plot_part(part: str, found: Found, title: str, path: Path) -> None:
    """The plot of a part as PNG."""
    figure = PLOTS[part](found)
    figure.suptitle(f"{part}: {title}", fontsize=9, color="0.35")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panels(rows: int, columns: int, width: float = 3.8, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.8), squeeze=False, layout="constrained")
    for panel in axes.flat:
        panel.grid(alpha=0.25, lw=0.5)
        panel.tick_params(labelsize=8)
    return figure, list(axes.flat)


def _kinds(found: Found) -> dict[str, str]:
    """Each kind and its colour."""
    return dict(zip(dict.fromkeys(r["kind"] for r in found["rows"]), COLOURS * 2, strict=False))


def _tolerance_axis(panel: Axes) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(TOLERANCES, [tolerance_name(t) for t in TOLERANCES])
    panel.set_xlabel("tolerance", fontsize=8)


def _share_axis(panel: Axes) -> None:
    panel.set_xscale("log")
    panel.set_xlim(2e-3, 1.4)
    panel.xaxis.set_major_locator(LogLocator(subs=(1,)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, panel: Axes, columns: int = 5) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _plot_errors(found: Found) -> Figure:
    shown = {"kept": "share of columns kept", "worst_block": "error of G', worst block", "dx": "error of dx", "dw": "error of dw",
             "time_ratio": "time / exact, forward and backward"}  # fmt: skip
    figure, panels = _panels(1, len(shown))
    for panel, (value, name) in zip(panels, shown.items(), strict=True):
        for kind, colour in _kinds(found).items():
            rows = [r for r in found["rows"] if r["kind"] == kind]
            ys = [r[value] or math.nan for r in rows]
            panel.plot([r["tolerance"] for r in rows], ys, marker="o", ms=3.5, lw=1.3, color=colour, label=kind)
        if value != "time_ratio":
            panel.set_yscale("log")
        if value == "worst_block":
            panel.plot(TOLERANCES, TOLERANCES, color="black", lw=1, ls=":", label="tolerance")
        if value == "time_ratio":
            panel.axhline(1, color="black", lw=1, ls=":")
            panel.set_ylim(bottom=0)
        _tolerance_axis(panel)
        panel.set_title(name, fontsize=9)
    _legend(figure, panels[1], 10)
    return figure


def _plot_blocks(found: Found) -> Figure:
    figure, panels = _panels(1, 4)
    for panel, tolerance in zip(panels, TOLERANCES[1:], strict=False):
        for kind, colour in _kinds(found).items():
            rows = [r for r in found["rows"] if r["kind"] == kind and r["tolerance"] == tolerance]
            own = [r for r in rows if r["rows"] != "pooled"]
            panel.plot([r["rows"] for r in own], [r["kept"] for r in own], marker="o", ms=3.5, lw=1.3, color=colour, label=kind)
            pooled = [r["kept"] for r in rows if r["rows"] == "pooled"]
            panel.plot([128] * len(pooled), pooled, marker="x", ms=6, color=colour, ls="")
        panel.set_title(f"share of columns kept at {tolerance_name(tolerance)}\n(x: one budget for all blocks of 128)", fontsize=9)
        panel.set_yscale("log")
    rates = found["cost_of_kept_column"]
    panels[3].plot([int(rows) for rows in rates], list(rates.values()), marker="o", ms=4, color="black")
    panels[3].set_title("time of a kept column a row,\nagainst one product of all rows", fontsize=9)
    panels[3].set_ylim(bottom=0)
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xlabel("rows that share a list of columns", fontsize=8)
    _legend(figure, panels[0], 9)
    return figure


def _plot_orders(found: Found) -> Figure:
    whats = list(dict.fromkeys(r["what"] for r in found["rows"]))
    shown = TOLERANCES[1:]
    figure, panels = _panels(len(shown), len(whats), 4.2, 3.3)
    kinds = list(_kinds(found))
    for i, panel in enumerate(panels):
        tolerance, what = shown[i // len(whats)], whats[i % len(whats)]
        rows = [r for r in found["rows"] if r["tolerance"] == tolerance and r["what"] == what]
        orders = list(dict.fromkeys(r["order"] for r in rows))
        cells = {(r["kind"], r["order"]): r["kept"] for r in rows}
        panel.imshow([[cells[kind, order] for order in orders] for kind in kinds], vmin=0, vmax=1.4, cmap="Blues", aspect="auto")
        for y, kind in enumerate(kinds):
            for x, order in enumerate(orders):
                panel.text(x, y, f"{100 * cells[kind, order]:.3g}", ha="center", va="center", fontsize=8)
        panel.set_xticks(range(len(orders)), [order.replace(" ", "\n", 1) for order in orders], fontsize=7)
        panel.set_yticks(range(len(kinds)), kinds, fontsize=8)
        panel.set_title(f"{what} kept at {tolerance_name(tolerance)}, %", fontsize=9)
        panel.grid(False)
    return figure


def _plot_ways(found: Found, ways: Mapping[str, tuple[str, str, str]], values: Mapping[str, str]) -> Figure:
    """Error against kept share: a panel a kind and value, a line a way (name: suffix, colour, line style). Kinds of which much is kept
    at any tolerance are in the table alone."""
    kinds = list(dict.fromkeys(r["kind"] for r in found["rows"] if r["kept"] < MUCH)) or list(_kinds(found))
    figure, panels = _panels(len(values), len(kinds), 2.7, 2.6)
    for i, panel in enumerate(panels):
        value, kind = list(values)[i // len(kinds)], kinds[i % len(kinds)]
        rows = [r for r in found["rows"] if r["kind"] == kind]
        for name, (suffix, colour, style) in ways.items():
            kept = "kept_fit" if suffix == "_fit" else "kept"
            points = [(r[kept], r[value + suffix]) for r in rows if r.get(value + suffix, 0.0) > 1e-5]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", ms=3.5, lw=1.3, color=colour, ls=style, label=name)
        _share_axis(panel)
        panel.set_yscale("log")
        panel.set_ylim(1e-5, 0.5)
        panel.set_title(kind, fontsize=9)
        if i % len(kinds) == 0:
            panel.set_ylabel(values[value], fontsize=8)
        if i // len(kinds) == len(values) - 1:
            panel.set_xlabel("share of columns kept", fontsize=8)
    _legend(figure, panels[-1])
    return figure


def _plot_correction(found: Found) -> Figure:
    ways = {"dropped": ("", "#555555", "-"), "stand-in, each block of 128 rows": ("_block", "#1b6ca8", "-"),
            "stand-in, one for all rows": ("_all", "#8cc6e7", "--"), "kept for the stand-in, block": ("_fit", "#d1495b", ":")}  # fmt: skip
    return _plot_ways(found, ways, {"g": "error of G'", "dx": "error of dx", "dw": "error of dw"})


def _plot_random(found: Found) -> Figure:
    ways = {
        "dropped": ("_drop", "#555555", "-"),
        "one draw": ("_draw", "#d1495b", "-"),
        f"mean of {DRAWS} draws": ("_mean", "#f4a259", "--"),
    }
    return _plot_ways(found, ways, {"g": "error of G'", "dx": "error of dx", "dw": "error of dw"})


def _plot_threshold(found: Found) -> Figure:
    figure, panels = _panels(1, 4, 4.2, 3.6)
    kinds = list(_kinds(found))
    shown = {"kept": "share of the tiles kept", "pooled": "error of G' (targets apart)", "dx": "error of dx", "dw": "error of dw"}
    for panel, (value, name) in zip(panels, shown.items(), strict=True):
        for shift, (order, colour) in enumerate({"as they come": "#8cc6e7", "by mean logit": "#1b6ca8"}.items()):
            cells = {r["kind"]: r[value] for r in found["rows"] if r["order"] == order}
            ys = [i + 0.38 * shift for i in range(len(kinds))]
            bars = panel.barh(ys, [cells[kind] for kind in kinds], 0.36, color=colour, label=f"classes {order}")
            panel.bar_label(bars, [f"{cells[kind]:.2g}" for kind in kinds], fontsize=7, padding=2)
        panel.set_yticks([i + 0.19 for i in range(len(kinds))], kinds, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(name, fontsize=9)
    _legend(figure, panels[0])
    return figure


def _plot_training(found: Found) -> Figure:
    from .filter_curves import plot_training as plot

    return plot(found)


PLOTS: dict[str, Callable[[Found], Figure]] = {
    "errors": _plot_errors,
    "blocks": _plot_blocks,
    "orders": _plot_orders,
    "correction": _plot_correction,
    "random": _plot_random,
    "threshold": _plot_threshold,
    "training": _plot_training,
}

"""What the demo shows: a table for the terminal and a plot as PNG."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from bigclass.demo.settings import DemoSettings
from bigclass.demo.training import Run

DENSE_COLOUR, STREAMED_COLOUR = "#b8b8c4", "#1f5fa8"
MIB = 2**20
MEMORY_NOTE = "Memory: forward and backward of one batch, beyond its features, the weights and the gradients of both."


@dataclass(frozen=True, slots=True)
class Report:
    """Both runs side by side."""

    settings: DemoSettings
    dense: Run
    streamed: Run

    @property
    def differences(self) -> list[float]:
        """Distance of the two losses at each step."""
        return [abs(a - b) for a, b in zip(self.dense.losses, self.streamed.losses, strict=True)]

    @property
    def title(self) -> str:
        """What was trained, in one line."""
        s = self.settings
        return (
            f"{s.layers} layers of width {s.width}, vocabulary {s.vocab:,}, {s.batch} x {s.context} tokens a step, "
            f"{'bf16' if s.bf16 else 'fp32'} on {s.device.type}"
        )


def table(report: Report) -> Table:
    """The comparison as a rich table."""
    dense, streamed = report.dense, report.streamed
    tokens = report.settings.batch * report.settings.context
    table = Table(title=report.title, title_justify="left", caption=MEMORY_NOTE, caption_justify="left")
    table.add_column(f"after {len(dense.losses)} steps")
    for heading in ("dense", "streamed", "streamed / dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("final loss", f"{dense.losses[-1]:.4f}", f"{streamed.losses[-1]:.4f}", "")
    table.add_row("largest difference of the losses", "", "", f"{max(report.differences):.1e} nats")
    table.add_row(
        "step time, median",
        f"{dense.step_seconds:.3f} s",
        f"{streamed.step_seconds:.3f} s",
        f"{streamed.step_seconds / dense.step_seconds:.2f} x",
    )
    table.add_row(
        "tokens per second",
        f"{tokens / dense.step_seconds:,.0f}",
        f"{tokens / streamed.step_seconds:,.0f}",
        f"{dense.step_seconds / streamed.step_seconds:.2f} x",
    )
    table.add_row(
        "peak memory of the loss layer",
        _mebibytes(dense.loss_layer_bytes),
        _mebibytes(streamed.loss_layer_bytes),
        f"{streamed.loss_layer_bytes / dense.loss_layer_bytes:.2f} x" if streamed.loss_layer_bytes and dense.loss_layer_bytes else "n/a",
    )
    return table


def plot(report: Report, path: Path) -> None:
    """Write the loss curves, their difference and the memory of the loss layers as a PNG."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    figure.suptitle(report.title, fontsize=10, color="0.35")
    curves, difference, memory = figure.subplots(1, 3, width_ratios=(5, 4, 3))
    _plot_losses(curves, report)
    _plot_difference(difference, report)
    _plot_memory(memory, report)
    for axes in (curves, difference, memory):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _plot_losses(axes: Axes, report: Report) -> None:
    steps = range(1, len(report.dense.losses) + 1)
    axes.plot(steps, report.dense.losses, color=DENSE_COLOUR, linewidth=6, label="dense", solid_capstyle="round")
    axes.plot(steps, report.streamed.losses, color=STREAMED_COLOUR, linewidth=1.5, label="streamed")
    axes.set(title="The same loss curve", xlabel="step", ylabel="training loss (nats per token)")
    axes.legend(frameon=False)


def _plot_difference(axes: Axes, report: Report) -> None:
    steps = range(1, len(report.differences) + 1)
    axes.plot(steps, report.differences, color=STREAMED_COLOUR, marker=".", linewidth=1)
    # Equal losses have no place on a logarithmic axis: a linear piece around 0 gives them one.
    axes.set_yscale("symlog", linthresh=1e-7)
    axes.set_ylim(0, max(1e-6, 3 * max(report.differences)))
    axes.grid(axis="y", color="0.92")
    axes.set(title="How far the two are apart", xlabel="step", ylabel="|dense - streamed| (nats)")


def _plot_memory(axes: Axes, report: Report) -> None:
    axes.set(title="Loss layer, peak memory", ylabel="MiB")
    measured = (report.dense.loss_layer_bytes, report.streamed.loss_layer_bytes)
    heights = [(size or 0) / MIB for size in measured]
    bars = axes.bar(["dense", "streamed"], heights, color=[DENSE_COLOUR, STREAMED_COLOUR], width=0.6)
    axes.bar_label(bars, [_mebibytes(size) for size in measured], padding=3)
    axes.margins(y=0.1)


def _mebibytes(size: int | None) -> str:
    return "n/a" if size is None else f"{size / MIB:,.0f} MiB"

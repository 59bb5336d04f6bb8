"""A timm model and an unchanged training loop over 7,000 classes, run twice: as timm makes it, and with its head converted.

    pip install -e '.[examples]'
    python examples/timm_patches.py [--stride 8] [--steps 250] [--batch 256] [--model test_convnext] [--out timm-patches.png] [--seed 0]

Which place of which photograph does a patch come from? The photographs are the two that scikit-learn ships; every eighth pixel each
way is a place, and so a class (parametric instance discrimination, as Dosovitskiy et al., arXiv:1406.6909). A patch is never seen twice:
it is shaken by up to three pixels, its contrast and colours change, grain is added. `train` is an ordinary loop that knows nothing of
bigclass. It gets a model, and the one line that differs is `bigclass.convert_head(model)`.

The two losses agree to rounding at first (1e-6). Training then amplifies what rounding left, as it does between two dense runs whose
weights differ by 1e-7, so the curves part by some thousandths of a nat in the end. On two cores of a Zen 4 EPYC it takes 70 s: the loss
falls from 8.9 to 5.6, three in ten fresh patches have their place among the five likeliest; a loss layer of 2,048 rows and 100,000 classes
needs 2,322 MiB dense and 90 MiB streamed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from patches import Patches
from torch import Tensor, nn

import bigclass
from bigclass import extras
from bigclass.demo.memory import peak_extra_bytes

FRESH_IMAGES = 2048
LARGE = 2048, 100_000  # rows and classes of the loss layer whose memory is measured
MIB = 2**20


def train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, on_step: Callable[[float, float], None]) -> None:
    """The loop, for any model that returns logits: nothing here is bigclass's."""
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / steps))
    model.train()
    for _ in range(steps):
        images, labels = next(batches)
        start = time.perf_counter()
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(loss.item(), time.perf_counter() - start)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 accuracy. In evaluation a converted model returns ordinary logits."""
    model.eval()
    found = torch.cat([model(part).topk(5).indices for part in images.split(256)])
    hits = found == labels[:, None]
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()


@dataclass(slots=True)
class Run:
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: tuple[float, float] = (0.0, 0.0)
    """Top-1 and top-5 on fresh patches."""
    memory: int | None = None
    """Peak of a loss layer of `LARGE` in bytes; None where the system does not tell."""


def prepare_loss_layer(streamed: bool, rows: int, classes: int, features: int) -> Callable[[], tuple[Tensor, ...]]:
    """A classifier and its loss of the shapes in training; the call to measure returns the gradients of features and weights."""

    def layer(rows: int, classes: int) -> Callable[[], tuple[Tensor, ...]]:
        head = bigclass.CCEHead(features, classes, engine="tiled") if streamed else nn.Linear(features, classes)
        x, labels = torch.randn(rows, features, requires_grad=True), torch.randint(classes, (rows,))

        def gradients() -> tuple[Tensor, ...]:
            loss = nn.functional.cross_entropy(head(x), labels, label_smoothing=0.02)
            return torch.autograd.grad(loss, (x, *head.parameters()))

        return gradients

    layer(64, 1000)()  # thread pools and lazy imports are no part of the layer
    return layer(rows, classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stride", type=int, default=8, help="pixels between places: 8 are 7,448 classes, 4 are 30,096")
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of each run")
    parser.add_argument("--batch", type=int, default=256, help="images in a step")
    parser.add_argument(
        "--model", default="test_convnext", help="a timm model that takes images of 32 x 32 pixels and ends in a linear layer"
    )
    parser.add_argument("--out", type=Path, default=Path("timm-patches.png"), help="where the plot goes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        extras.require("timm", "sklearn", "rich", "matplotlib", extra="examples")
    except ModuleNotFoundError as missing:
        raise SystemExit(f"This example {missing}") from None
    import timm
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console, patches = Console(), Patches(options.stride)
    classes = len(patches.places)
    fresh = next(patches.batches(FRESH_IMAGES, options.seed + 1))
    runs = {"dense": Run(), "streamed": Run()}
    features = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name, run in runs.items():
            task = progress.add_task(f"{name:8s}", total=options.steps)

            def record(loss: float, seconds: float, name=name, run=run, task=task) -> None:
                run.losses.append(loss)
                run.seconds.append(seconds)
                progress.update(task, advance=1, description=f"{name:8s} loss {loss:.3f}")

            torch.manual_seed(options.seed)
            model = timm.create_model(options.model, num_classes=classes)
            if name == "streamed":
                bigclass.convert_head(model)
            train(model, patches.batches(options.batch, options.seed), options.steps, record)
            run.accuracy = evaluate(model, *fresh)
            features = model.get_classifier().in_features
    with console.status("Measuring the memory of a large loss layer"):
        for name, run in runs.items():
            run.memory = peak_extra_bytes(prepare_loss_layer, name == "streamed", *LARGE, features)

    title = f"{options.model}, {classes:,} classes, {options.batch} images a step (log C = {math.log(classes):.2f})"
    console.print(table(title, **runs))
    plot(title, options.out, classes, **runs)
    console.print(f"Plot: {options.out}")


def table(title: str, dense: Run, streamed: Run):
    from rich.table import Table

    made = Table(title=title, title_justify="left", caption="Memory: beyond weights, features and gradients.", caption_justify="left")
    made.add_column(f"after {len(dense.losses)} steps")
    for heading in ("dense", "streamed"):
        made.add_column(heading, justify="right", no_wrap=True)
    rows = {
        "final training loss": lambda run: f"{run.losses[-1]:.4f}",
        "fresh patches, top-1 / top-5": lambda run: " / ".join(f"{share:.1%}" for share in run.accuracy),
        "step time, median": lambda run: f"{median(run.seconds):.3f} s",
        f"memory of a loss of {LARGE[0]:,} x {LARGE[1]:,}": lambda run: mebibytes(run.memory),
    }
    for label, show in rows.items():
        made.add_row(label, show(dense), show(streamed))
    apart = max(abs(a - b) for a, b in zip(dense.losses, streamed.losses, strict=True))
    made.add_row("largest difference of the losses", "", f"{apart:.1e}")
    return made


def plot(title: str, path: Path, classes: int, dense: Run, streamed: Run) -> None:
    from matplotlib.figure import Figure

    from bigclass.demo.report import DENSE_COLOUR, STREAMED_COLOUR

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10, color="0.35")
    curves, memory = figure.subplots(1, 2, width_ratios=(5, 3))
    steps = range(1, len(dense.losses) + 1)
    curves.axhline(math.log(classes), color="0.7", linestyle=":", linewidth=1, label="guessing (log C)")
    curves.plot(steps, dense.losses, color=DENSE_COLOUR, linewidth=6, label="dense", solid_capstyle="round")
    curves.plot(steps, streamed.losses, color=STREAMED_COLOUR, linewidth=1.5, label="streamed")
    curves.set(title="The same loss curve", xlabel="step", ylabel="training loss (nats per image)")
    curves.legend(frameon=False)
    sizes = [(run.memory or 0) / MIB for run in (dense, streamed)]
    bars = memory.bar(["dense", "streamed"], sizes, color=[DENSE_COLOUR, STREAMED_COLOUR], width=0.6)
    memory.bar_label(bars, [mebibytes(run.memory) for run in (dense, streamed)], padding=3)
    memory.set(title=f"Peak memory, {LARGE[0]:,} x {LARGE[1]:,}", ylabel="MiB")
    memory.margins(y=0.1)
    for axes in (curves, memory):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def mebibytes(size: int | None) -> str:
    return "n/a" if size is None else f"{size / MIB:,.0f} MiB"


if __name__ == "__main__":
    main()

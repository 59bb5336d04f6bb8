"""A timm model and an unchanged training loop over 10,000 classes, run twice: as timm makes it, and with its head converted.

    pip install -e '.[examples]'
    python examples/timm_numbers.py [--digits 4] [--steps 100] [--batch 512] [--model test_resnet] [--out timm-numbers.png] [--seed 0]

An image is a number of several handwritten digits side by side, scans that scikit-learn ships; its class is that number, so that
four digits are 10,000 classes. Held-out images are made of scans that are in no training image. `train` is an ordinary loop that knows
nothing of bigclass. It gets a model, and the one line that differs is `bigclass.convert_head(model)`.

It takes about a minute. Once, in 75 s on a two-core Zen 4 EPYC VM (OMP_NUM_THREADS=1, and other jobs were running, so that its
step times compare nothing), it printed

    after 100 steps                         dense       streamed
    final training loss                    8.6381         8.6351     log C = 9.21
    held-out top-1 / top-5            0.6% / 2.2%    0.8% / 2.3%     by chance 0.01% / 0.05%
    step time, median                     0.342 s        0.215 s
    peak memory of the loss layer          57 MiB         39 MiB
    largest difference of the losses                     2.7e-02

The losses are the same to 1e-6 for four steps; then training multiplies differences in rounding. A second dense run, whose head's
weights differ by 1e-7 of themselves, drifts off as fast: 5e-3 within 20 steps, as the streamed one.
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
from torch import Tensor, nn

import bigclass
from bigclass import extras
from bigclass.demo.memory import peak_extra_bytes

SCAN = 8  # pixels, each way
HELD_OUT_SCANS, HELD_OUT_IMAGES = 400, 2048
MIB = 2**20


def train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, on_step: Callable[[float, float], None]) -> None:
    """The loop, for any model that returns logits: nothing here is bigclass's."""
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99))
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


class Numbers:
    """Images of numbers, put together from scans of their digits."""

    def __init__(self, digits: int) -> None:
        from sklearn.datasets import load_digits

        scans = load_digits()
        images = torch.tensor(scans.images, dtype=torch.float32)
        self.digits, self.scan_labels = digits, torch.tensor(scans.target)
        self.scans = (images - images.mean(0)) / images.std()
        self.order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))

    def batches(self, size: int, seed: int, held_out: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end of images (N, 1, 8, 8 * digits) and labels (N,), uniform over all numbers."""
        chosen = self.order[:HELD_OUT_SCANS] if held_out else self.order[HELD_OUT_SCANS:]
        of_digit = [chosen[self.scan_labels[chosen] == digit] for digit in range(10)]
        generator = torch.Generator().manual_seed(seed)
        powers = 10 ** torch.arange(self.digits - 1, -1, -1)
        while True:
            written = torch.randint(10, (size, self.digits), generator=generator)
            which = torch.empty_like(written)
            for digit, scans in enumerate(of_digit):
                here = written == digit
                which[here] = scans[torch.randint(len(scans), (int(here.sum()),), generator=generator)]
            images = self.scans[which].transpose(1, 2).reshape(size, 1, SCAN, SCAN * self.digits)
            yield images, (written * powers).sum(1)


@dataclass(slots=True)
class Run:
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: tuple[float, float] = (0.0, 0.0)
    """Top-1 and top-5 on held-out images."""
    memory: int | None = None
    """Peak of the loss layer in bytes; None where the system does not tell."""


def prepare_loss_layer(streamed: bool, rows: int, classes: int, features: int) -> Callable[[], tuple[Tensor, ...]]:
    """A classifier and its loss of the shapes in training; the call to measure returns the gradients of features and weights."""
    head = bigclass.CCEHead(features, classes) if streamed else nn.Linear(features, classes)
    x, labels = torch.randn(rows, features, requires_grad=True), torch.randint(classes, (rows,))

    def gradients(n: int) -> tuple[Tensor, ...]:
        loss = nn.functional.cross_entropy(head(x[:n]), labels[:n], label_smoothing=0.05)
        return torch.autograd.grad(loss, (x, *head.parameters()))

    gradients(rows // 4 + 1)  # thread pools and lazy imports are no part of the layer
    return lambda: gradients(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=4, help="digits of a number: 4 are 10,000 classes, 5 are 100,000")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--batch", type=int, default=512, help="images in a step")
    parser.add_argument("--model", default="test_resnet", help="any timm model that takes images of any size and ends in a linear layer")
    parser.add_argument("--out", type=Path, default=Path("timm-numbers.png"), help="where the plot goes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        extras.require("timm", "sklearn", "rich", "matplotlib", extra="examples")
    except ModuleNotFoundError as missing:
        raise SystemExit(f"This example {missing}") from None
    import timm
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console, numbers, classes = Console(), Numbers(options.digits), 10**options.digits
    held_out = next(numbers.batches(HELD_OUT_IMAGES, options.seed, held_out=True))
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
            model = timm.create_model(options.model, in_chans=1, num_classes=classes)
            if name == "streamed":
                bigclass.convert_head(model)
            train(model, numbers.batches(options.batch, options.seed), options.steps, record)
            run.accuracy = evaluate(model, *held_out)
            features = model.get_classifier().in_features
    with console.status("Measuring the memory of both loss layers"):
        for name, run in runs.items():
            run.memory = peak_extra_bytes(prepare_loss_layer, name == "streamed", options.batch, classes, features)

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
        "held-out top-1 / top-5": lambda run: " / ".join(f"{share:.1%}" for share in run.accuracy),
        "step time, median": lambda run: f"{median(run.seconds):.3f} s",
        "peak memory of the loss layer": lambda run: mebibytes(run.memory),
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
    bars = memory.bar(
        ["dense", "streamed"], [(run.memory or 0) / MIB for run in (dense, streamed)], color=[DENSE_COLOUR, STREAMED_COLOUR], width=0.6
    )
    memory.bar_label(bars, [mebibytes(run.memory) for run in (dense, streamed)], padding=3)
    memory.set(title="Loss layer, peak memory", ylabel="MiB")
    memory.margins(y=0.1)
    for axes in (curves, memory):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def mebibytes(size: int | None) -> str:
    return "n/a" if size is None else f"{size / MIB:,.0f} MiB"


if __name__ == "__main__":
    main()

"""Extreme multi-label classification: 320,000 labels, a handful to a document, trained from scratch on a laptop CPU in about two minutes.

    pip install -e '.[examples]'
    python examples/extreme_labels.py [--labels 320000] [--samples 16384] [--epochs 1] [--batch 256] [--dim 64] [--loss bce] [--seed 0]

The data are synthetic, a bag of words under a long tail of labels, as titles are of products:

    label r of C      is drawn in proportion to 1 / (r + 20), and has a hidden prototype of six words, drawn uniformly
    a document        draws n of 1 ... 8 with probability in proportion to 1 / n, then n labels (one drawn twice counts once)
    its words         each word of each of its labels' prototypes with probability 3/4, and three words that mean nothing, in one bag

Training and test documents are drawn alike and apart. A model sees bags, and the labels of training documents; prototypes, and which
word came from which label, it never sees. Most labels have few training documents and many none: those nobody could name.

An embedding bag encodes documents. Each label is a logistic regression of its own on the code, whose gradient goes into the optimizer
slab by slab while the loss is differentiated (`update=`). Neither N x C logits and targets nor a C x D gradient exist. Beside it stands
what answering the most frequent labels every time would score. PSP weights a hit by the label's rarity: of the tail it tells most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, median
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bigclass
from bigclass import extras
from bigclass.demo.memory import peak_extra_bytes
from bigclass.metrics import MultiLabelMetrics, inverse_propensities

VOCABULARY = 16_384
PROTOTYPE_WORDS, KEPT, STRAY_WORDS = 6, 0.75, 3
MOST_LABELS = 8
FLAT_HEAD = 20  # r + 20: the most frequent of 320,000 labels is on one document in a hundred
METRICS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5")
LOSSES = ("bce", "focal", "asymmetric", "squared_hinge", "poly", "zlpr")
MIB = 2**20


class Documents(NamedTuple):
    words: Tensor  # (N, L), VOCABULARY where a document has fewer
    labels: Tensor  # (N, 8), -1 where a document has fewer


class World:
    """The hidden prototypes and frequencies, from which documents are drawn."""

    def __init__(self, labels: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.prototypes = torch.randint(VOCABULARY, (labels, PROTOTYPE_WORDS), generator=generator)
        self.frequencies = (1.0 / torch.arange(1.0 + FLAT_HEAD, labels + 1.0 + FLAT_HEAD, dtype=torch.float64)).cumsum(0)

    def documents(self, size: int) -> Documents:
        sizes = 1 + torch.multinomial(1.0 / torch.arange(1.0, MOST_LABELS + 1.0), size, replacement=True, generator=self.generator)
        there = torch.arange(MOST_LABELS) < sizes[:, None]
        drawn = torch.rand(size, MOST_LABELS, dtype=torch.float64, generator=self.generator) * self.frequencies[-1]
        labels = torch.searchsorted(self.frequencies, drawn).clamp(max=len(self.frequencies) - 1)
        kept = (torch.rand(size, MOST_LABELS, PROTOTYPE_WORDS, generator=self.generator) < KEPT) & there[:, :, None]
        words = torch.where(kept, self.prototypes[labels], VOCABULARY).flatten(1)
        stray = torch.randint(VOCABULARY, (size, STRAY_WORDS), generator=self.generator)
        ordered = torch.where(there, labels, -1).sort(1).values
        ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
        return Documents(torch.cat((words, stray), 1).sort(1).values, ordered)  # sorted: no trace of which word is whose


class Encoder(nn.Sequential):
    """Bags of words (N, L) to codes (N, D): the mean of the words' embeddings, and what a small network adds to it."""

    def __init__(self, dim: int) -> None:
        bag = nn.EmbeddingBag(VOCABULARY + 1, dim, mode="mean", padding_idx=VOCABULARY)
        super().__init__(bag, nn.LayerNorm(dim), Residual(dim), nn.LayerNorm(dim))


class Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@dataclass(slots=True)
class Run:
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Column heading: metrics on the test documents, and the training loss up to there."""


def train(
    encoder: nn.Module, head: bigclass.MultiLabelHead, documents: Documents, options: argparse.Namespace, on_step: Callable[..., None]
) -> None:
    """on_step takes the loss, the step's seconds, the five labels (N, 5) thought likeliest before the update, and the labels there are."""
    slabs = bigclass.optim.SlabRowAdam([head.weight], lr=options.head_rate)
    rest = [*encoder.parameters(), *([] if head.bias is None else [head.bias])]
    ordinary = torch.optim.Adam(rest, lr=options.rate)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(documents.words)).split(options.batch):
            start = time.perf_counter()
            labels = documents.labels[rows]
            loss, top = head(encoder(documents.words[rows]), labels, return_topk=5, update=slabs)
            ordinary.zero_grad()
            loss.backward()  # head.weight is updated in here; it never has a .grad
            ordinary.step()
            slabs.step()  # passes over it; what schedulers expect
            on_step(loss.item(), time.perf_counter() - start, top.indices, labels)


@torch.no_grad()
def evaluate(encoder: nn.Module, head: bigclass.MultiLabelHead, documents: Documents, metrics: MultiLabelMetrics) -> dict[str, float]:
    metrics.reset()
    for words, labels in zip(documents.words.split(512), documents.labels.split(512), strict=True):
        metrics.update(head.predict(encoder(words), k=5)[1], labels)
    return metrics.compute()


def prepare_loss_layer(rows: int, labels: int, dim: int, loss: str) -> Callable[[], tuple[Tensor, ...]]:
    """The loss layer of a training step, update included; the call to measure returns the gradients of codes and bias."""

    def layer(rows: int, labels: int) -> Callable[[], tuple[Tensor, ...]]:
        head = bigclass.MultiLabelHead(dim, labels, loss=loss, reduction="batchmean")
        slabs = bigclass.optim.SlabRowAdam([head.weight], lr=0.01)
        codes, positives = torch.randn(rows, dim, requires_grad=True), torch.randint(labels, (rows, MOST_LABELS))

        def gradients() -> tuple[Tensor, ...]:
            return torch.autograd.grad(head(codes, positives, return_topk=5, update=slabs)[0], (codes, head.bias))

        return gradients

    layer(64, 1000)()  # thread pools and lazy imports are no part of the layer
    return layer(rows, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=320_000)
    parser.add_argument("--samples", type=int, default=16_384, help="training documents")
    parser.add_argument("--fresh", type=int, default=2_048, help="test documents")
    parser.add_argument("--dim", type=int, default=64, help="numbers in a document's code")
    parser.add_argument("--batch", type=int, default=256, help="documents in a step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--loss", choices=LOSSES, default="bce", help="the rates suit bce; others want their own")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of encoder and bias")
    parser.add_argument("--head-rate", type=float, default=0.02, help="learning rate of the labels' weights")
    parser.add_argument("--evaluations", type=int, default=4, help="evaluations during training, evenly spread")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        extras.require("rich", extra="examples")
    except ModuleNotFoundError as missing:
        raise SystemExit(f"This example {missing}") from None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    torch.manual_seed(options.seed)
    world = World(options.labels, torch.Generator().manual_seed(options.seed))
    seen, fresh = world.documents(options.samples), world.documents(options.fresh)
    counts = torch.bincount(seen.labels[seen.labels >= 0], minlength=options.labels)
    per_document = counts.sum().item() / options.samples
    console.print(
        f"{options.labels:,} labels, {per_document:.1f} a document; of {options.samples:,} training documents the most frequent label is "
        f"on {counts.max().item():,}, {(counts == 0).sum().item() / options.labels:.0%} of the labels on none",
        soft_wrap=True,
    )

    metrics = MultiLabelMetrics(k=5, inverse_propensity=inverse_propensities(counts, options.samples))
    metrics.update(counts.topk(5).indices.expand(options.fresh, 5), fresh.labels)
    run = Run(evaluations={"most frequent": metrics.compute()})
    encoder = Encoder(options.dim)
    head = bigclass.MultiLabelHead(
        options.dim,
        options.labels,
        loss=options.loss,
        reduction="batchmean",
        prior=None if options.loss == "squared_hinge" else per_document / options.labels,
    )
    steps = options.epochs * -(-options.samples // options.batch)
    due = {round(steps * i / options.evaluations) for i in range(1, options.evaluations + 1)}
    last = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)

        def record(loss: float, seconds: float, top: Tensor, labels: Tensor) -> None:
            nonlocal last
            run.losses.append(loss)
            run.seconds.append(seconds)
            right = bigclass.metrics.precision_at_k(top, labels)[0].item()
            progress.update(task, advance=1, description=f"loss {loss:5.2f}  P@1 of the batch {right:5.1%}")
            step = len(run.losses)
            if step in due:
                found = evaluate(encoder, head, fresh, metrics)
                run.evaluations[f"step {step:,}"] = {**found, "loss": mean(run.losses[last:])}
                last = step

        train(encoder, head, seen, options, record)
    console.print(table(run))
    console.print(f"Step time, median: {median(run.seconds):.2f} s")
    with console.status("Measuring the memory of the loss layer"):
        peak = peak_extra_bytes(prepare_loss_layer, options.batch, options.labels, options.dim, options.loss)
    console.print(memory(peak, options.batch, options.labels, options.dim), soft_wrap=True)


def table(run: Run):
    from rich.table import Table

    made = Table(
        title="On fresh documents", title_justify="left", caption="Training loss: of a document, mean since the column before.",
        caption_justify="left",
    )  # fmt: skip
    made.add_column("")
    for heading in run.evaluations:
        made.add_column(heading, justify="right", no_wrap=True)
    for name in METRICS:
        made.add_row(name, *[f"{found[name]:.1%}" for found in run.evaluations.values()])
    made.add_row("training loss", *[f"{found['loss']:.2f}" if "loss" in found else "" for found in run.evaluations.values()])
    return made


def memory(peak: int | None, rows: int, labels: int, dim: int) -> str:
    """What the loss layer takes beside weights and codes; the dense way by formula."""
    numbers = 3 * rows * labels + labels * dim
    dense = 4 * numbers
    streamed = "not measured: this system does not tell" if peak is None else f"{peak / MIB:,.0f} MiB measured"
    share = "" if not peak else f", {dense / peak:.1f} times as much"
    return (
        f"Memory of the loss layer, {rows:,} x {labels:,}: streamed {streamed}; "
        f"dense {dense / MIB:,.0f} MiB by formula (logits, their gradient, targets, weight gradient in fp32){share}"
    )


if __name__ == "__main__":
    main()

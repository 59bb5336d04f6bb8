"""Does the filter change what a training reaches? One small language model, trained with and without it, from the same weights and batches.

The demo's transformer (bigclass.demo.model) on the Python standard library's text, from two starts:

    scratch       the seed draws the initial weights and the order of the batches
    checkpoint    one model, trained exactly before; the seed draws the order of the batches, the optimizer begins anew

Each arm runs with each seed. Two runs of one seed differ by the loss layer alone: by the filter's tolerance or, for `dense`, by rounding
only (another engine, nothing dropped), which says how far apart the same training drifts by itself. What the filter does must be seen
against that, and against the spread over seeds. The library puts outer products in the place of what it drops; in the arm called
`lost` that is left out, as prior work does, by the study's own dense code.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import bigclass
from bigclass.core.engines.filter import FILTER_ROWS, MOST
from bigclass.demo import data
from bigclass.demo.model import LanguageModel

from .filter_analysis import (
    column_norms,
    dropped_part,
    gradients,
    kept_columns,
    kept_shares,
    logit_gradient,
    target_columns,
    work_share,
)

EXACT = "exact"
CONTROL = "dense"  # the exact loss by another engine
STARTS = ("scratch", "checkpoint")

Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Training:
    """Sizes. The defaults take about twelve minutes on one CPU core."""

    vocab: int = 8000
    width: int = 128
    layers: int = 2
    heads: int = 4
    context: int = 128
    batch: int = 8
    """Sequences in a batch: a step sees N = batch * (context - 1) rows."""
    steps: int = 100
    checkpoint_steps: int = 800
    """Exact steps before the checkpoint."""
    seeds: int = 3
    learning_rate: float = 2e-3
    """Peak of the one-cycle schedule, from scratch; from the checkpoint a quarter of it."""
    corpus_bytes: int = 6_000_000
    watch: int = 10
    """Steps from one look at the kept share to the next."""
    held_out: int = 64
    """Sequences on which the loss at the end is measured, exactly."""


@dataclass(frozen=True, slots=True)
class Arm:
    """How the loss layer makes its gradient."""

    tolerance: float | None = None  # None: exact
    engine: str = "tiled"
    lost: bool = False


def arms(tolerances: tuple[float, ...]) -> dict[str, Arm]:
    """By name: exact, the control, each tolerance, and the coarsest without what stands in for the dropped."""
    plain = {tolerance_name(t): Arm(t) for t in tolerances}
    lost = {f"{tolerance_name(t)} lost": Arm(t, lost=True) for t in tolerances[-1:]}
    return {EXACT: Arm(), CONTROL: Arm(engine="dense")} | plain | lost


def tolerance_name(tolerance: float) -> str:
    """As a power of two, where it is one."""
    mantissa, exponent = torch.frexp(torch.tensor(tolerance))
    return f"2^{int(exponent) - 1}" if float(mantissa) == 0.5 else f"{tolerance:g}"


@dataclass(slots=True)
class Run:
    """One training."""

    start: str
    arm: str
    seed: int
    losses: list[float] = field(default_factory=list)  # of each step, before it
    watched: list[int] = field(default_factory=list)  # steps at which the next two were taken
    kept: list[float] = field(default_factory=list)  # share of the columns kept (exact arms: 1)
    computed: list[float] = field(default_factory=list)  # the same, blocks above MOST counted whole
    held_out: float = float("nan")  # loss at the end
    seconds: float = 0.0


class FilteredHead(nn.Linear):
    """The loss layer of an arm. `last` keeps what it saw, for the kept share."""

    arm: Arm = Arm()
    last: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean loss (scalar) of `hidden` (B, T, D) at position t against `labels` (B, T) at t + 1."""
        self.last = hidden.detach(), labels
        arm = self.arm
        if arm.lost and torch.is_grad_enabled():
            x, y = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            return _Lossy.apply(x, self.weight, y, arm.tolerance)  # type: ignore[return-value]
        loss = bigclass.linear_cross_entropy(hidden, self.weight, labels, shift=1, grad_filter=arm.tolerance, engine=arm.engine)
        assert isinstance(loss, Tensor)
        return loss


class _Lossy(torch.autograd.Function):
    """The mean cross-entropy; what the filter drops is missing from its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, y: Tensor, tolerance: float) -> Tensor:  # type: ignore[override]
        g = logit_gradient(x, w, None, y)
        keep = kept_columns(column_norms(g.rest, FILTER_ROWS), tolerance, target_columns(y, FILTER_ROWS, w.shape[0]))
        dx, dw = gradients(replace(g, rest=g.rest - dropped_part(g.rest, keep, FILTER_ROWS)), x, w)
        ctx.save_for_backward(dx.div_(len(y)), dw.div_(len(y)))
        return g.loss.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dw = ctx.saved_tensors
        return grad * dx, grad * dw, None, None


@torch.no_grad()
def kept_share(head: FilteredHead, tolerance: float) -> tuple[float, float]:
    """(kept, computed) on the batch that the head saw last; its weight must not have been updated since."""
    assert head.last is not None
    hidden, labels = head.last
    x, y = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    g = logit_gradient(x, head.weight, None, y)
    forced = target_columns(y, FILTER_ROWS, head.out_features)
    shares = kept_shares(column_norms(g.rest, FILTER_ROWS), [tolerance], forced)
    return float(shares.mean()), float(work_share(shares, MOST).mean())


def new_model(sizes: Training, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    head = FilteredHead(sizes.width, sizes.vocab, bias=False)
    return LanguageModel(head, sizes.context, sizes.layers, sizes.heads)


def train(model: LanguageModel, batches: Iterator[Tensor], run: Run, sizes: Training, steps: int, learning_rate: float, arm: Arm) -> None:
    """Take the steps and fill in the run."""
    head = model.head
    assert isinstance(head, FilteredHead)
    head.arm, tolerance = arm, arm.tolerance
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    began = time.perf_counter()
    for step in range(steps):
        loss = model(next(batches))
        optimizer.zero_grad()
        loss.backward()
        if step % sizes.watch == 0 or step == steps - 1:
            kept, computed = (1.0, 1.0) if tolerance is None else kept_share(head, tolerance)
            run.watched.append(step)
            run.kept.append(kept)
            run.computed.append(computed)
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
    run.seconds = time.perf_counter() - began


@torch.no_grad()
def held_out_loss(model: LanguageModel, ids: Tensor) -> float:
    """The exact loss on sequences `ids` (B, T)."""
    head = model.head
    assert isinstance(head, FilteredHead)
    head.arm = Arm()
    parts = ids.split(8)
    return sum(float(model(part)) * len(part) for part in parts) / len(ids)


def run_training(sizes: Training, tolerances: tuple[float, ...], tell: Tell = lambda _: None) -> list[Run]:
    """Every start, arm and seed."""
    tell("learning a vocabulary")
    texts = data.read_corpus(sizes.corpus_bytes)
    tokenizer = data.learn_vocabulary(texts, sizes.vocab)
    held = sizes.held_out * sizes.context
    wanted = (max(sizes.steps, sizes.checkpoint_steps) + 1) * sizes.batch * sizes.context
    ids = data.encode(texts, tokenizer, wanted + held, seed=0)
    held_out, ids = ids[:held].view(sizes.held_out, -1), ids[held:]

    def batches(seed: int) -> Iterator[Tensor]:
        return data.batches(ids, sizes.batch, sizes.context, seed)

    tell("training the checkpoint")
    checkpoint = new_model(sizes, seed=1000)
    before = Run("before", EXACT, 1000)
    train(checkpoint, batches(1000), before, sizes, sizes.checkpoint_steps, sizes.learning_rate, Arm())
    before.held_out = held_out_loss(checkpoint, held_out)
    runs = [before]
    for start in STARTS:
        for seed in range(sizes.seeds):
            for name, arm in arms(tolerances).items():
                model = new_model(sizes, seed) if start == "scratch" else copy.deepcopy(checkpoint)
                run = Run(start, name, seed)
                rate = sizes.learning_rate if start == "scratch" else sizes.learning_rate / 4
                train(model, batches(seed), run, sizes, sizes.steps, rate, arm)
                run.held_out = held_out_loss(model, held_out)
                runs.append(run)
                tell(f"{start}, seed {seed}, {name}: {run.held_out:.4f} after {run.seconds:.0f} s")
    return runs


# What the runs say


def final_loss(run: Run, last: int = 10) -> float:
    """Mean of the last training losses."""
    tail = run.losses[-last:]
    return sum(tail) / len(tail)


def compare(runs: list[Run]) -> list[dict[str, Any]]:
    """Each start and arm against exact runs of the same seed, beside the standard deviation of the exact runs over seeds."""
    rows = []
    for start in STARTS:
        exact = {run.seed: run for run in runs if run.start == start and run.arm == EXACT}
        if not exact:
            continue
        spread_held = _deviation([run.held_out for run in exact.values()])
        spread_train = _deviation([final_loss(run) for run in exact.values()])
        for arm in dict.fromkeys(run.arm for run in runs if run.start == start):
            own = [run for run in runs if run.start == start and run.arm == arm]
            held = [run.held_out - exact[run.seed].held_out for run in own]
            trained = [final_loss(run) - final_loss(exact[run.seed]) for run in own]
            rows.append(
                {
                    "start": start,
                    "arm": arm,
                    "held_out": sum(run.held_out for run in own) / len(own),
                    "held_out_mean_difference": sum(held) / len(held),
                    "held_out_mean_distance": sum(map(abs, held)) / len(held),
                    "held_out_max_distance": max(map(abs, held)),
                    "held_out_deviation_over_seeds": spread_held,
                    "train_max_distance": max(map(abs, trained)),
                    "train_deviation_over_seeds": spread_train,
                    "kept_first": sum(run.kept[0] for run in own) / len(own),
                    "kept_mean": sum(sum(run.kept) / len(run.kept) for run in own) / len(own),
                    "kept_last": sum(run.kept[-1] for run in own) / len(own),
                    "computed_mean": sum(sum(run.computed) / len(run.computed) for run in own) / len(own),
                }
            )
    return rows


def _deviation(values: list[float]) -> float:
    """Standard deviation of a sample; NaN of fewer than two."""
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else float("nan")


def as_json(runs: list[Run]) -> list[dict[str, Any]]:
    return [asdict(run) for run in runs]

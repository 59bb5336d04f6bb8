"""The same model trained twice, step by step in turn, and the memory of each one's loss layer."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

import bigclass
from bigclass.demo.memory import peak_extra_bytes
from bigclass.demo.model import DenseHead, LanguageModel
from bigclass.demo.settings import DemoSettings

HEADS: dict[str, type[nn.Linear]] = {"dense": DenseHead, "streamed": bigclass.LMHead}


@dataclass(slots=True)
class Run:
    """One model's training, step by step."""

    losses: list[float] = field(default_factory=list)
    """Loss of each step, in nats."""
    seconds: list[float] = field(default_factory=list)
    """Wall time of each step: forward, backward and optimizer."""
    loss_layer_bytes: int | None = None
    """Peak memory of the loss layer on a batch's shapes, see `loss_layer_bytes`; None if not measured."""

    @property
    def step_seconds(self) -> float:
        """Median time of a step, without the first, which warms up."""
        return median(self.seconds[1:] or self.seconds)


def train_both(settings: DemoSettings, batches: Iterator[torch.Tensor], on_step: Callable[[dict[str, Run]], None]) -> dict[str, Run]:
    """Train the dense and the streamed model from the same weights on the same batches.

    They take turns, and take turns in going first: whatever else the machine does then slows both alike.

    Args:
        settings: sizes, steps, device and seed.
        batches: token ids (B, T).
        on_step: called with the runs so far after each step of both.

    Returns:
        "dense" and "streamed", each with its run.
    """
    torch.manual_seed(settings.seed)
    models = {name: _model(name, settings) for name in HEADS}
    models["streamed"].load_state_dict(models["dense"].state_dict())
    steppers = {name: _stepper(model, settings) for name, model in models.items()}
    runs = {name: Run() for name in HEADS}
    for step in range(settings.steps):
        ids = next(batches).to(settings.device)
        for name in sorted(steppers, reverse=step % 2 == 1):
            start = time.perf_counter()
            loss = steppers[name](ids)
            if settings.device.type != "cpu":
                torch.accelerator.synchronize(settings.device)
            runs[name].seconds.append(time.perf_counter() - start)
            runs[name].losses.append(loss.item())
        on_step(runs)
    return runs


def loss_layer_bytes(name: str, settings: DemoSettings) -> int | None:
    """Peak memory of the loss layer, forward and backward, beyond features, weights and their gradients; None if unmeasurable."""
    return peak_extra_bytes(prepare_loss_layer, name, settings, device=settings.device)


def prepare_loss_layer(name: str, settings: DemoSettings) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One loss layer on the shapes of a training batch, warmed up: the call to measure returns the gradients of features and weights."""
    head = HEADS[name](settings.width, settings.vocab, bias=False, device=settings.device)
    # Under autocast the final norm hands over float32 features, as they are here.
    hidden = torch.randn(settings.batch, settings.context, settings.width, device=settings.device)
    labels = torch.randint(settings.vocab, hidden.shape[:2], device=settings.device)

    def gradients(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = hidden.detach().requires_grad_()
        with settings.autocast():
            loss = head(hidden, labels)
        return torch.autograd.grad(loss, (hidden, head.weight))

    # Lazy imports, thread pools and library handles are no part of the layer. One sequence, for a shorter one may take another engine.
    gradients(hidden[:1], labels[:1])
    return lambda: gradients(hidden, labels)


def _model(name: str, settings: DemoSettings) -> LanguageModel:
    head = HEADS[name](settings.width, settings.vocab, bias=False)
    return LanguageModel(head, settings.context, settings.layers, settings.heads).to(settings.device)


def _stepper(model: LanguageModel, settings: DemoSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that takes one optimizer step on a batch of ids (B, T) and returns its loss (scalar)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=settings.device.type in ("cpu", "cuda"))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps + 1)

    def step(ids: torch.Tensor) -> torch.Tensor:
        with settings.autocast():
            loss = model(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step

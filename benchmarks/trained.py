"""Hidden states and head of a language model that was really trained: the data kind `trained`.

The demo's model (bigclass.demo.model: two causal transformer blocks under a head tied to the token embedding) learns the Python
standard library's sources with the library's own streamed head. It is trained once and kept in a cache outside version control:

    settings    32,000 byte pairs, D = 256; 1200 steps of AdamW on 2 x 256 tokens (0.6 million tokens, each seen once), one-cycle
                learning rate of at most 2e-3, seed 0, float32
    held out    33 sequences of 256 tokens, from passages that no training step saw, give N = 8415 positions with a next token
    points      of training: "start" (before the first step), "early" (5 % of the steps), "middle" (40 %) and "end"

The corpus is the running Python's own, so another Python version gives a slightly different model; so does another kind of device.
`python -m benchmarks.trained` trains if need be and prints what the softmax looks like at each point.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bigclass
from bigclass.demo import DemoSettings, data
from bigclass.demo.model import LanguageModel
from bigclass.extras import require

CACHE = Path(__file__).parent / ".cache"
FORMAT = 1  # of a cached file, and of how it came about: another number trains anew

POINTS = {"start": 0.0, "early": 0.05, "middle": 0.4, "end": 1.0}  # name: share of the steps taken
HELD_OUT = 33  # sequences

Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class States:
    """What the loss layer met at one point of training, on text held out from it."""

    hidden: Tensor  # (N, D) float32, the head's input
    weight: Tensor  # (C, D) float32
    target: Tensor  # (N,) int64, the next token
    step: int  # optimizer steps taken before
    loss: float  # mean over the N rows


def points() -> tuple[str, ...]:
    """The names of the points of training, in order."""
    return tuple(POINTS)


def default_settings() -> DemoSettings:
    """What is trained: a few minutes on two CPU cores, seconds on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return DemoSettings(device=device, vocab=32_000, width=256, context=256, layers=2, heads=4, batch=2, steps=1200, learning_rate=2e-3)


def states(point: str, settings: DemoSettings | None = None, tell: Tell = lambda _: None) -> States:
    """The states at one of `points()`, from the cache, or from a training that fills it.

    Args:
        point: "start", "early", "middle" or "end".
        settings: what to train; None for `default_settings()`.
        tell: is told how training gets on.

    Raises:
        ValueError: for an unknown point.
        ModuleNotFoundError: if training is needed and the `tokenizers` package is missing.

    Example:
        >>> end = states("end")  # doctest: +SKIP
        >>> bigclass.linear_cross_entropy(end.hidden, end.weight, end.target)  # doctest: +SKIP
    """
    if point not in POINTS:
        raise ValueError(f"point: expected one of {', '.join(POINTS)}; got {point!r}")
    settings = settings or default_settings()
    if not is_cached(settings):
        for name, found in _train(settings, tell).items():
            _save(asdict(found), _path(settings, name))
    return States(**torch.load(_path(settings, point), weights_only=True))


def sizes(settings: DemoSettings | None = None) -> tuple[int, int, int]:
    """N, C and D of the states, known before any training."""
    settings = settings or default_settings()
    return HELD_OUT * (settings.context - 1), settings.vocab, settings.width


def is_cached(settings: DemoSettings | None = None) -> bool:
    """Whether `states` needs no training."""
    return all(_path(settings or default_settings(), point).exists() for point in POINTS)


def _path(settings: DemoSettings, point: str) -> Path:
    return CACHE / f"trained-{_key(settings)}" / f"{point}.pt"


def _key(settings: DemoSettings) -> str:
    """Names everything that the states depend on."""
    chosen = asdict(settings) | {"device": settings.device.type, "out": None}
    return hashlib.sha256(repr((FORMAT, POINTS, HELD_OUT, platform.python_version(), sorted(chosen.items()))).encode()).hexdigest()[:12]


def _save(content: dict[str, Any], path: Path) -> None:
    """Write all or nothing: another process may be training, too, or this one may be stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    torch.save(content, unfinished)
    os.replace(unfinished, path)


def _train(settings: DemoSettings, tell: Tell) -> dict[str, States]:
    """Train the model and take its states at each point."""
    require("tokenizers")
    tell("training a language model: learning its vocabulary")
    texts = data.read_corpus(settings.corpus_bytes)
    tokenizer = data.learn_vocabulary(texts, settings.vocab)
    held = HELD_OUT * settings.context
    ids = data.encode(texts, tokenizer, settings.steps * settings.batch * settings.context + held, settings.seed)
    held_out, ids = ids[-held:].view(HELD_OUT, -1).to(settings.device), ids[:-held]
    batches = data.batches(ids, settings.batch, settings.context, settings.seed)

    torch.manual_seed(settings.seed)
    head = bigclass.LMHead(settings.width, settings.vocab, bias=False)
    model = LanguageModel(head, settings.context, settings.layers, settings.heads).to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps + 1)
    wanted = {round(share * settings.steps): point for point, share in POINTS.items()}
    found: dict[str, States] = {}
    for step in range(settings.steps + 1):
        if step in wanted:
            found[wanted[step]] = _states_of(model, held_out, step)
        if step == settings.steps:
            break
        loss = model(next(batches).to(settings.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tell(f"training a language model: step {step + 1} of {settings.steps}, loss {loss.item():.2f}")
    return found


@torch.no_grad()
def _states_of(model: LanguageModel, ids: Tensor, step: int) -> States:
    """The states on sequences `ids` (B, T)."""
    hidden: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        hidden.append(output)

    hook = model.norm.register_forward_hook(keep)
    losses = [model(sequences) for sequences in ids.split(1)]
    hook.remove()
    x = torch.cat(hidden)[:, :-1].flatten(0, 1)  # (N, D), without the last position, whose next token is not known
    w = model.tokens.weight.detach()
    return States(x.cpu(), w.cpu().clone(), ids[:, 1:].flatten().cpu(), step, float(torch.stack(losses).mean()))


def main() -> int:
    """Train if need be; print how peaked the softmax is at each point."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    with console.status("reading the cache") as status:
        found = {point: states(point, tell=lambda what: status.update(what)) for point in points()}
    table = Table("point", "step", "loss", "entropy", "median of the largest probability", "right")
    for point, at in found.items():
        log_p = (at.hidden[:1024] @ at.weight.T).log_softmax(1)
        largest, predicted = log_p.exp().max(1)
        entropy, right = -(log_p.exp() * log_p).sum(1).mean(), (predicted == at.target[:1024]).float().mean()
        table.add_row(point, str(at.step), f"{at.loss:.2f}", f"{entropy:.2f}", f"{largest.median():.2g}", f"{right:.0%}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What fits: longest sequences and largest class counts by device, by formula, and the formula beside counted peaks.

    python -m benchmarks.memory_plan              # tables, and memory-plan.md, .json, .png in benchmarks/results; two minutes
    python -m benchmarks.memory_plan --no-check   # the formula alone, in seconds

The formula is `bigclass.memory_plan`; nothing of the models in the tables is run. The check trains small models on the CPU and counts every
block that torch's allocator hands out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import bigclass
from bigclass.extras import require
from bigclass.memory_plan import DEVICES, MODELS, Ranks, Training, largest_class_count, longest_sequence, peak_bytes, plan_memory
from bigclass.memory_plan.search import USABLE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 8, 64, 256, 1024)
CHUNK = 4096  # tokens of an MLP's chunk

WAYS = {
    "dense": Training(),
    "recompute": Training(recompute="block"),
    "+ mini-sequence": Training(recompute="block", mlp_chunk=CHUNK),
    "recompute + streamed": Training(recompute="block", head="streamed"),
    "+ both": Training(recompute="block", mlp_chunk=CHUNK, head="streamed"),
}
TABLED = ("llama3.2-1b", "gemma2-2b", "mistral-7b", "qwen2.5-7b", "llama3-8b", "gemma2-9b", "llama3-70b")
PLOTTED = ("llama3-8b", "80 GB")


@dataclass(frozen=True, slots=True)
class ClassTable:
    """A table of largest class counts: R rows of D features, trained so."""

    rows: int
    features: int
    training: Training
    words: str


CLASSES = (
    ClassTable(8192, 1024, Training(), "8192 rows of 1024 features, bf16, AdamW with fp32 states (16 bytes a weight)"),
    ClassTable(
        4096, 512, Training(dtype=torch.float32, optimizer="momentum"), "4096 rows of 512 features, fp32, SGD with momentum (12 bytes)"
    ),
)

# What small models are checked with: sequence, then the options of `Training`.
FP32 = Training(dtype=torch.float32, optimizer="adamw", step="loop", workspace=16 << 20)
CHECKS: tuple[tuple[int, dict[str, Any]], ...] = tuple(
    (2048, {"head": head, "recompute": recompute, "mlp_chunk": chunk})
    for recompute, chunk in (("none", None), ("block", None), ("block", 256))
    for head in ("dense", "streamed")
)
SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 8192, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """A table, for the screen and for Markdown: the first column is left, numbers are right."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as Markdown."""
        rule = ["---", *["---:"] * (len(self.heads) - 1)]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in (self.heads, rule, *self.rows)) + "\n"

    def table(self) -> Table:
        """The table for a console."""
        from rich import box
        from rich.table import Table

        table = Table(title=f"[bold]{self.title}[/]", title_justify="left", box=box.SIMPLE_HEAD)
        for i, head in enumerate(self.heads):
            table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table


def longest(model: str, memory: float, ranks: int, training: Training) -> int:
    """The longest sequence of one row, over so many ranks (ZeRO-3; Ulysses, in rings beyond the number of heads)."""
    return longest_sequence(model, memory, training=training, ranks=Ranks(sequence=ranks, shard=3 if ranks > 1 else 0))


def sequences() -> list[Block]:
    """A table of longest sequences for each device."""
    return [
        Block(
            f"Longest sequence, tokens, on devices of {device}",
            ("model, ranks", *WAYS),
            [
                (f"{model}, {ranks}", *[_number(longest(model, memory, ranks, training)) for training in WAYS.values()])
                for model in TABLED
                for ranks in RANKS
            ],
        )
        for device, memory in DEVICES.items()
    ]


def class_counts() -> list[Block]:
    """The tables of largest class counts."""
    blocks = []
    for kind in CLASSES:
        dense, streamed = kind.training, kind.training.with_(head="streamed")

        def most(memory: float, ranks: int, training: Training, update: str = "step", kind: ClassTable = kind) -> str:
            return _millions(largest_class_count(kind.rows, kind.features, memory, training=training, ranks=ranks, update=update))

        rows = [
            (f"{device}, {ranks}", most(memory, ranks, dense), most(memory, ranks, streamed),
             most(memory, 1, streamed, "backward") if ranks == 1 else "")
            for device, memory in DEVICES.items()
            for ranks in RANKS
        ]  # fmt: skip
        heads = ("device, ranks", "dense", "streamed", "streamed, update in the backward")
        blocks.append(Block(f"Most classes, millions, of a head on its own: {kind.words}", heads, rows))
    return blocks


# --- the formula beside counted peaks


def step_of(config: Any, tokens: int, training: Training) -> Callable[[], Callable[[], None]]:
    """Makes a model of this configuration, trained as said, and its step."""

    def prepare() -> Callable[[], None]:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=training.dtype).train()
        if training.recompute == "block":
            with warnings.catch_warnings():  # its name changes in transformers 6
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable()
        if training.head == "streamed":
            bigclass.convert_head(model)
        if training.mlp_chunk:
            bigclass.mini_sequence(model, chunk_tokens=training.mlp_chunk)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        ids = torch.randint(0, config.vocab_size, (1, tokens))

        def step() -> None:
            with bigclass.planning(workspace=training.workspace):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return prepare


def check(tell: Callable[[str], None]) -> Block:
    """Planned and counted peaks of small models."""
    from transformers import LlamaConfig

    config, rows = LlamaConfig(**SMALL), []
    for tokens, options in CHECKS:
        training = FP32.with_(**options)
        name = ", ".join(
            [f"{options['head']} head", *(["recompute"] if options["recompute"] == "block" else [])]
            + ([f"MLPs of {options['mlp_chunk']} tokens"] if options["mlp_chunk"] else [])
        )
        tell(name)
        counted = peak_bytes(step_of(config, tokens, training))
        plan = plan_memory(config, tokens, training=training, device="cpu")
        rows.append((name, _mebibytes(counted), _mebibytes(plan.peak), f"{plan.peak / counted - 1:+.1%}", plan.peak_phase.name))
    sizes = (
        f"{config.num_hidden_layers} blocks, hidden {config.hidden_size}, {config.vocab_size} classes, {CHECKS[0][0]} tokens, fp32, AdamW"
    )
    return Block(
        f"Planned and counted peaks of a small Llama ({sizes})", ("", "counted MiB", "planned MiB", "off", "where the peak is"), rows
    )


# --- the page, the plot, the command line

HEAD = """# What fits: sequences and classes by device

    {command}

By formula (`bigclass.memory_plan`, whose docstring has every term with its source), not run on such devices. A plan may fill {usable:.0%}
of a device; GB are 10^9 bytes. bf16 weights and gradients, AdamW with fp32 states (16 bytes a parameter), transformers' modules,
flash attention. torch {torch}.
"""

CHECK = """## The formula beside counted peaks

Steps of a small model on a CPU, every block counted that torch's allocator hands out.
"""

SEQUENCES = """## Longest sequences

One sequence, over all ranks: ZeRO-3 (FSDP), and Ulysses up to as many ranks as there are heads, rings of such groups beyond. `dense` keeps
all activations and writes logits; `recompute` makes blocks again; `+ mini-sequence` puts {chunk} tokens through an MLP at a time as well,
with dense logits (which are the peak then, so that it gains nothing); `recompute + streamed` and `+ both` make the head stream.
"–": weights, gradients and optimizer states alone do not fit.
"""

CLASS_TEXT = """## Largest class counts

A classification head on its own, its gradients and optimizer states included; classes spread over the ranks, all of which see the same
rows. `update in the backward` is `update=` with a `SlabRowAdam` (one rank): no gradient, 4 bytes of state a class.
"""


def page(blocks: dict[str, list[Block]], command: str) -> str:
    """memory-plan.md."""
    parts = [HEAD.format(command=command, usable=USABLE, torch=torch.__version__), "![against ranks](memory-plan.png)\n"]
    if blocks["check"]:
        parts += [CHECK, *[block.markdown() for block in blocks["check"]]]
    parts += [SEQUENCES.format(chunk=CHUNK), *[block.markdown() for block in blocks["sequences"]]]
    parts += [CLASS_TEXT, *[block.markdown() for block in blocks["classes"]]]
    return "\n".join(parts)


def plot(path: Path) -> None:
    """Longest sequences and largest class counts against ranks, of one model and device."""
    import matplotlib

    matplotlib.use("Agg")  # files only
    from matplotlib import pyplot as plt

    model, device = PLOTTED
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = ("#555555", "#f4a259", "#d1495b", "#1b6ca8", "#2e8b57")
    for (name, training), colour in zip(WAYS.items(), colours, strict=True):
        found = [(ranks, longest(model, DEVICES[device], ranks, training)) for ranks in RANKS]
        fits = [(ranks, tokens) for ranks, tokens in found if tokens]
        left.plot(*zip(*fits, strict=True), marker="o", label=name, color=colour, linestyle="--" if "mini" in name else "-")
    left.set(title=f"longest sequence, {model}, {device}", xlabel="ranks", ylabel="tokens")
    kind = CLASSES[0]
    for head, colour in (("dense", colours[0]), ("streamed", colours[4])):
        counts = [
            largest_class_count(kind.rows, kind.features, DEVICES[device], training=kind.training.with_(head=head), ranks=ranks)
            for ranks in RANKS
        ]
        right.plot(RANKS, counts, marker="o", label=head, color=colour)
    right.set(title=f"most classes, {kind.rows} rows of {kind.features} features, bf16, {device}", xlabel="ranks", ylabel="classes")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_plan", description="What fits on which device, by formula.")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="train small models and count their peaks")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the page, its numbers and the plot (default: benchmarks/results)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and write the files; 2 if a package is missing."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    try:
        require("rich", "matplotlib", extra="bench")
        if options.check:
            require("transformers")
    except ModuleNotFoundError as error:
        print(f"the report {error}", file=sys.stderr)
        return 2
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    with console.status("counting the peaks of small models") as status:
        checked = [check(lambda name: status.update(f"counting: {name}"))] if options.check else []
    blocks = {"check": checked, "sequences": sequences(), "classes": class_counts()}
    _print((block for part in blocks.values() for block in part), console)
    command = shlex.join(["python", "-m", "benchmarks.memory_plan", *arguments])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory-plan.md").write_text(page(blocks, command))
    tables = [{"title": b.title, "heads": b.heads, "rows": b.rows} for part in blocks.values() for b in part]
    versions = {"bigclass": bigclass.__version__, "torch": torch.__version__}
    found = {"command": command, "versions": versions, "models": {name: MODELS[name].parameters for name in TABLED}, "tables": tables}
    (options.out / "memory-plan.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    plot(options.out / "memory-plan.png")
    console.print(f"written: {options.out / 'memory-plan.md'}, .json and .png", soft_wrap=True)
    return 0


def _print(blocks: Iterable[Block], console: Console) -> None:
    for block in blocks:
        console.print(block.table())


def _number(value: int) -> str:
    return f"{value:,}" if value else "–"


def _millions(value: int) -> str:
    return f"{value / 1e6:,.{1 if value >= 1e7 else 2}f}" if value else "–"


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):,.1f}"


if __name__ == "__main__":
    sys.exit(main())

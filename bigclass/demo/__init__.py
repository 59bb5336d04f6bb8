"""The main job: one small language model, trained twice on the Python standard library's own text.

Dense (`nn.Linear`, logits in memory, `F.cross_entropy`) and streamed (`bigclass.LMHead`), from the same weights on the same batches,
step by step in turn. What comes out is a table and a plot: the same loss curve, and what each way cost in time and memory.
"""

from typing import TYPE_CHECKING

from bigclass import extras
from bigclass.demo.settings import DemoSettings

if TYPE_CHECKING:
    from bigclass.demo.report import Report
    from bigclass.demo.training import Run

__all__ = ["DemoSettings", "run_demo"]


def run_demo(settings: DemoSettings) -> "Report":
    """Train both models, print the table, write the plot, and return what they show.

    Raises:
        ModuleNotFoundError: if a package of the `demo` extra is missing.
        ValueError: if the vocabulary or the batch asks for more text than the standard library has.
    """
    extras.require("tokenizers", "rich", "matplotlib")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from bigclass.demo import data, report, training

    console = Console()
    with console.status(f"Learning a vocabulary of {settings.vocab:,} from the Python standard library"):
        texts = data.read_corpus(settings.corpus_bytes)
        tokenizer = data.learn_vocabulary(texts, settings.vocab)
        wanted = settings.steps * settings.batch * settings.context
        ids = data.encode(texts, tokenizer, wanted, settings.seed)
    console.print(f"Learned {tokenizer.get_vocab_size():,} byte pairs from {sum(map(len, texts)) / 1e6:.1f} MB of Python standard library")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Training", total=settings.steps)

        def show(runs: "dict[str, Run]") -> None:
            losses = ", ".join(f"{name} {run.losses[-1]:.3f}" for name, run in runs.items())
            progress.update(task, advance=1, description=f"Training: loss {losses}")

        runs = training.train_both(settings, data.batches(ids, settings.batch, settings.context, settings.seed), show)

    with console.status("Measuring the memory of both loss layers"):
        for name, run in runs.items():
            run.loss_layer_bytes = training.loss_layer_bytes(name, settings)
    result = report.Report(settings, dense=runs["dense"], streamed=runs["streamed"])
    report.plot(result, settings.out)
    console.print(report.table(result))
    console.print(f"Plot: {settings.out}")
    return result

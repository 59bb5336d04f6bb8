"""The command line: `python -m bigclass demo`, `plan` (also called `explain`), `memory` and `doctor`."""

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import bigclass
from bigclass import extras
from bigclass.core.engines.support import device_reason
from bigclass.memory_plan import MODELS, OPTIMIZERS, Ranks, Training
from bigclass.memory_plan.search import USABLE
from bigclass.memory_plan.settings import HEADS, RECOMPUTE

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINING_DTYPES = tuple(name for name in DTYPES if name != "float64")
MLP_CHUNK = 4096  # tokens of an MLP's chunk where `memory` is not told: at these models' sizes its GEMMs still run at their full rate


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.command(args)
    except (ModuleNotFoundError, ValueError) as error:
        parser.exit(1, f"bigclass: error: {error}\n")
    return 0


def demo(args: argparse.Namespace) -> None:
    """Train the same language model with dense and with streamed logits, and compare."""
    from bigclass.demo import DemoSettings, run_demo

    chosen = {name: value for name in ("vocab", "steps", "seed") if (value := getattr(args, name)) is not None}
    run_demo(DemoSettings.for_device(args.device or default_device(), out=args.out, **chosen))


def plan(args: argparse.Namespace) -> None:
    """Print what engine="auto" would do for the given shapes, and why."""
    device = args.device or default_device()
    print(bigclass.explain(args.rows, args.classes, args.features, dtype=DTYPES[args.dtype], device=device))


def memory(args: argparse.Namespace) -> None:
    """Print what a language model's training step takes on each device, and the longest sequence that fits, by formula."""
    shape = MODELS[args.model]
    if args.classes:
        shape = replace(shape, classes=args.classes)
    training = Training(
        dtype=DTYPES[args.dtype],
        optimizer=args.optimizer,
        recompute=args.recompute,
        mlp_chunk=args.mlp_chunk,
        head=args.head,
    )
    everyone = args.ranks * args.data_ranks
    ranks = Ranks(
        data=args.data_ranks,
        sequence=args.ranks,
        classes=args.class_ranks,
        shard=(3 if everyone > 1 else 0) if args.zero is None else args.zero,
    )
    device = "cpu" if args.device is not None and args.device.type == "cpu" else "cuda"
    found = bigclass.plan_memory(shape, args.sequence, batch=args.batch, training=training, ranks=ranks, device=device)
    print(found)
    if args.device_memory is None:
        return
    size = args.device_memory * 1e9
    fits = "fits" if found.peak <= USABLE * size else "does not fit"
    print(f"{fits} {args.device_memory:g} GB, of which tensors may fill {USABLE:.0%}; longest sequence there:")
    chunk = args.mlp_chunk or MLP_CHUNK
    plain = training.with_(recompute="none", mlp_chunk=None, head="dense")
    ways = {
        "dense head, nothing made again": plain,
        "blocks made again": plain.with_(recompute="block"),
        f"and MLPs of {chunk} tokens at a time": plain.with_(recompute="block", mlp_chunk=chunk),
        "and a streamed head": plain.with_(recompute="block", mlp_chunk=chunk, head="streamed"),
        "as asked for": training,
    }
    for name, way in ways.items():
        longest = bigclass.longest_sequence(shape, size, batch=args.batch, training=way, ranks=ranks, device=device)
        print(f"  {name:<36}{longest:>14,}")


def doctor(args: argparse.Namespace) -> None:
    """Print the versions and devices that a bug report needs."""
    for name, value in machine_facts().items():
        print(f"{name:<14}{value}")


def default_device() -> torch.device:
    """The CUDA (or ROCm) device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine_facts() -> dict[str, str]:
    """What `doctor` prints: this machine's software and devices, name to value."""
    facts = {
        "bigclass": extras.version_of("bigclass") or "not installed",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'})",
        "triton": extras.version_of("triton") or "missing: comes with CUDA builds of torch",
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
    if torch.backends.mps.is_available():
        facts["mps"] = "available"
    reason = device_reason(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts["fused engine"] = "ready" if reason is None else f"not here, for {reason}: GPUs of compute capability 8.0 or more, with Triton"
    for module in extras.EXTRA_OF:
        facts[module] = extras.version_of(module) or f"missing: {extras.install_hint(module)}"
    return facts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bigclass", description="Classification layers with a huge class axis, without their logits."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help=demo.__doc__, description=demo.__doc__)
    command.add_argument("--vocab", type=_positive, help="byte-pair vocabulary, learned on the spot (default: 32000)")
    command.add_argument("--steps", type=_positive, help="optimizer steps of each of the two models (default: about two minutes' worth)")
    command.add_argument("--device", type=_device, help="torch device (default: cuda if there is one, else cpu)")
    command.add_argument("--out", type=Path, default=Path("bigclass-demo.png"), help="where the plot goes (default: %(default)s)")
    command.add_argument("--seed", type=int, help="of the weights and the order of the text (default: 0)")
    command.set_defaults(command=demo)

    command = commands.add_parser("plan", aliases=["explain"], help=plan.__doc__, description=plan.__doc__)
    command.add_argument("--rows", type=_positive, required=True, help="N: tokens or samples in a batch")
    command.add_argument("--classes", type=_positive, required=True, help="C: vocabulary or label count")
    command.add_argument("--features", type=_positive, required=True, help="D: width of the features")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the features and weights (default: %(default)s)")
    command.add_argument("--device", type=_device, help="torch device (default: cuda if there is one, else cpu)")
    command.set_defaults(command=plan)

    command = commands.add_parser("memory", help=memory.__doc__, description=memory.__doc__)
    command.add_argument("--model", choices=MODELS, required=True, help="whose sizes are taken")
    command.add_argument("--sequence", type=_positive, required=True, help="tokens of a sequence")
    command.add_argument("--batch", type=_positive, default=1, help="sequences of each data-parallel rank (default: %(default)s)")
    command.add_argument("--classes", type=_positive, help="vocabulary (default: the model's)")
    command.add_argument("--ranks", type=_positive, default=1, help="devices that share a sequence (default: %(default)s)")
    command.add_argument("--data-ranks", type=_positive, default=1, help="groups of those with batches of their own (default: %(default)s)")
    command.add_argument("--class-ranks", type=_positive, default=1, help="devices that share the head's classes (default: %(default)s)")
    command.add_argument("--zero", type=int, choices=range(4), help="stage of ZeRO over all devices (default: 3, FSDP; of one: 0)")
    command.add_argument("--dtype", choices=TRAINING_DTYPES, default="bfloat16", help="of weights and activations (default: %(default)s)")
    command.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: %(default)s, with fp32 states")
    command.add_argument("--recompute", choices=RECOMPUTE, default="none", help="what is made again in the backward (default: %(default)s)")
    command.add_argument("--mlp-chunk", type=_positive, help="tokens that go through an MLP at a time (default: all)")
    command.add_argument("--head", choices=HEADS, default="streamed", help="default: %(default)s")
    command.add_argument("--device", type=_device, help="cpu or cuda: what the streamed head may use (default: cuda)")
    command.add_argument("--device-memory", type=_gigabytes, metavar="GB", help="of one device, to see what fits")
    command.set_defaults(command=memory)

    command = commands.add_parser("doctor", help=doctor.__doc__, description=doctor.__doc__)
    command.set_defaults(command=doctor)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return value


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of GB above 0, got {text}")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a torch device such as cpu, cuda or cuda:1, got {text!r}") from None

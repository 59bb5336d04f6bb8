"""The command line: `python -m bigclass demo`, `plan` (also called `explain`) and `doctor`."""

import argparse
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

import bigclass
from bigclass import extras
from bigclass.core.engines.support import device_reason

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    command = commands.add_parser("doctor", help=doctor.__doc__, description=doctor.__doc__)
    command.set_defaults(command=doctor)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a torch device such as cpu, cuda or cuda:1, got {text!r}") from None

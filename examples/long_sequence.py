"""A language model on one long sequence, spread over ranks: Ulysses, mini-sequences and a streamed head, next to one process without them.

    pip install -e '.[examples,ulysses]'
    torchrun --nproc-per-node 2 examples/long_sequence.py  # about a minute on two cores
    torchrun --nproc-per-node 8 examples/long_sequence.py --context 262144 --width 2048 --layers 16 --heads 32 --recompute --no-compare
    python examples/long_sequence.py  # one process: mini-sequences and the streamed head alone

Of T tokens every one of W ranks has T/W. What a step then keeps on it, and what it would keep:

    logits          T x C and their gradient            streamed: never there
    MLPs            several T x (inner width) a layer   one chunk of tokens, made again in the backward
    the rest        T x width a layer, a few times      T/W x width (attention exchanges tokens for heads on its way)

The loss is the mean over all ranks' tokens, the same number as that of one process, which rank 0 starts first to compare: dense logits,
whole sequences. Weights and optimizer are sharded by FSDP2, which knows nothing of all this.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigclass import extras
from bigclass.demo import data
from bigclass.demo.memory import resident_peak

MIB = 2**20
LIBRARY_BYTES = 4_000_000  # of the standard library's sources
OF_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def library() -> tuple[Tensor, int]:
    """The standard library's text as tokens (T,), each a pair of bytes, and how many of those pairs there are."""
    text = "".join(data.read_corpus(LIBRARY_BYTES)).encode()
    pairs = torch.frombuffer(bytearray(text[: len(text) // 2 * 2]), dtype=torch.uint8).view(-1, 2).int()
    kinds, ids = (pairs[:, 0] * data.BYTES + pairs[:, 1]).unique(return_inverse=True)
    return ids, len(kinds)


def build(vocabulary: int, options: argparse.Namespace, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=options.width, intermediate_size=options.width * 7 // 2, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=max(options.heads // 2, 1), max_position_embeddings=options.context,
        bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device).train()


def spread(model: Any, options: argparse.Namespace) -> Any:
    """Ulysses, mini-sequences, the streamed head, and FSDP2 around them. What cuts a batch for this rank."""
    from bigclass.integrations.ulysses import setup_ulysses

    if options.recompute:
        model.gradient_checkpointing_enable()
    parallel = setup_ulysses(model, dist.group.WORLD if dist.is_initialized() else None, chunk_tokens=options.chunk)
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        # Lazy logits hold the weight as a view, so that wrappers see a tensor that the module made. Nobody writes into it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return parallel.shard


def train(model: Any, cut: Any, ids: Tensor, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The losses of the steps, the peak of memory beyond what stood before them (MiB) and the seconds of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    windows = ids[: len(ids) // options.context * options.context].view(-1, options.context)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    losses, before, start = [], None, 0.0
    for step in range(-1, options.steps):
        rows = [int(order[(step * options.batch + b) % len(order)]) for b in range(options.batch)]
        whole = windows[rows].to(device)
        # before the first step a short one, of which nothing is learnt: what libraries allocate once is then there
        inputs = cut({"input_ids": whole, "labels": whole} if step >= 0 else {"input_ids": whole[:, :64], "labels": whole[:, :64]})
        loss = model(**inputs).loss
        loss.backward()
        if step >= 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        optimizer.zero_grad()
        if step < 0:
            before, start = memory(device), time.perf_counter()
    after = memory(device)
    peak = math.nan if before is None or after is None else (after - before) / MIB
    return {"losses": losses, "peak": peak, "seconds": (time.perf_counter() - start) / options.steps}


def memory(device: torch.device) -> int | None:
    """Bytes at the peak so far: allocated by PyTorch on a GPU, resident on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def of_one_process() -> dict[str, Any]:
    """The same training, not converted, in a process of its own, so that its peak of memory is its own, too."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHER and not name.startswith("TORCHELASTIC")}
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--dense"]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def report(dense: dict[str, Any] | None, own: dict[str, Any], peaks: list[float]) -> None:
    print(f"{'step':>6}{'one process, dense':>22}{f'{len(peaks)} ranks, streamed':>22}{'difference':>14}")
    for step, loss in enumerate(own["losses"]):
        other = math.nan if dense is None else dense["losses"][step]
        print(f"{step + 1:6d}{other:22.6f}{loss:22.6f}{abs(loss - other) / other:14.1e}")
    if dense is not None:
        print(f"memory of a step on one process, dense: {dense['peak']:,.0f} MiB; {dense['seconds']:.1f} s")
    each = ", ".join(f"{peak:,.0f}" for peak in peaks)
    print(f"memory of a step on each of {len(peaks)} ranks: {each} MiB; {own['seconds']:.1f} s", flush=True)


def run(options: argparse.Namespace, device: torch.device) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ids, vocabulary = library()
    if options.dense:
        print(json.dumps(train(build(vocabulary, options, device), lambda inputs: inputs, ids, options, device)))
        return
    dense = None
    if rank == 0:
        size = options.batch * options.context * vocabulary * 4 / MIB
        print(f"{options.context:,} tokens of {vocabulary:,} kinds on {world} ranks; their logits would take {size:,.0f} MiB", flush=True)
        dense = None if options.no_compare else of_one_process()
    if dist.is_initialized():
        dist.barrier()
    model = build(vocabulary, options, device)
    own = train(model, spread(model, options), ids, options, device)
    peaks = [torch.zeros(1, device=device) for _ in range(world)]
    if dist.is_initialized():
        dist.all_gather(peaks, torch.tensor([own["peak"]], device=device))
    else:
        peaks = [torch.tensor([own["peak"]])]
    if rank == 0:
        report(dense, own, [peak.item() for peak in peaks])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--context", type=int, default=4096, help="tokens in a sequence, over all ranks")
    add("--batch", type=int, default=1, help="sequences in a step")
    add("--steps", type=int, default=4)
    add("--width", type=int, default=128)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4, help="of attention; the ranks must divide them")
    add("--chunk", type=int, default=256, help="tokens in a chunk of the MLPs")
    add("--recompute", action="store_true", help="activation checkpointing: of a layer only its input is kept")
    add("--rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--no-compare", action="store_true", help="no training of one process to compare")
    add("--dense", action="store_true", help="that training: one process, not converted; prints a line of JSON")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    launched = "RANK" in os.environ
    try:
        extras.require("transformers", extra="examples")
        if launched and int(os.environ["WORLD_SIZE"]) > 1:
            extras.require("deepspeed", extra="ulysses")
    except ModuleNotFoundError as missing:
        raise SystemExit(f"This example {missing}") from None
    device = torch.device(options.device, int(os.environ.get("LOCAL_RANK", 0)) if options.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launched:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        run(options, device)
    finally:
        if launched:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

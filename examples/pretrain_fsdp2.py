"""Pretraining a transformers model from scratch with FSDP2 under torchrun, on long sequences and a large vocabulary.

    pip install -e '.[examples]'
    torchrun --nproc-per-node 8 examples/pretrain_fsdp2.py --vocab 128256 --width 2048 --layers 16 --heads 32 --context 65536 --batch 1
    torchrun --nproc-per-node 2 examples/pretrain_fsdp2.py --device cpu --dtype float32  # a small one, in a minute or two
    python examples/pretrain_fsdp2.py                                                    # one process needs no torchrun

A GPU's memory at 65,536 tokens and 128,256 classes would go to logits: 31 GiB in fp32, and their gradient. Here `convert_head` leaves
the sequence's own activations, of which checkpointing keeps one tensor a block. What each rank does in a step:

    count     the labels to be predicted in all micro-batches of all ranks: one all-reduce of one number
    loss      world x (sum of the losses of its tokens) / count, micro-batch by micro-batch
    gradient  FSDP2 averages over ranks, so the mean over *tokens* comes out, however unevenly they lie (a mean of means would not be it)

Blocks are FSDP groups of their own. Embedding, last norm and head belong to the root's group, which stays gathered from the forward to the
backward: the lazy logits that the model returns can then be streamed by a loss outside it. Data are a function of the step, so a
checkpoint is weights, optimizer and one number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigclass
from bigclass import extras
from bigclass.demo import data
from bigclass.demo.memory import resident_peak

MIB, IGNORED = 2**20, -100
LIBRARY_BYTES = 12_000_000  # of the standard library's sources


class Windows:
    """Samples (S, T) of token ids and labels, in an order that depends on the seed and the number of the sample alone."""

    def __init__(self, ids: Tensor, labels: Tensor, seed: int) -> None:
        self.ids, self.labels, self.seed = ids, labels, seed

    def __getitem__(self, samples: range) -> tuple[Tensor, Tensor]:
        """The rows of these samples; counting goes on from one pass over the data to the next."""
        size = len(self.ids)
        orders = {p: torch.randperm(size, generator=torch.Generator().manual_seed(self.seed + p)) for p in {i // size for i in samples}}
        rows = torch.stack([orders[i // size][i % size] for i in samples])
        return self.ids[rows].long(), self.labels[rows].long()


def windows(options: argparse.Namespace, rank: int) -> Windows:
    """Of --data, or of the standard library's text: read by rank 0, which tells the others."""
    if options.data:
        saved = torch.load(options.data, mmap=True, weights_only=True)
        ids, labels = (saved["input_ids"], saved["labels"]) if isinstance(saved, dict) else (saved, saved)
    else:
        found = [library(options)] if rank == 0 else [None]
        dist.broadcast_object_list(found)
        ids = labels = found[0]
    if ids.dim() == 1:
        length = len(ids) // options.context * options.context
        ids, labels = (t[:length].view(-1, options.context) for t in (ids, labels))
    return Windows(ids, labels, options.seed)


def library(options: argparse.Namespace) -> Tensor:
    """The standard library's text as ids (T,): bytes with --vocab 256, otherwise byte pairs learnt on the spot."""
    texts = data.read_corpus(LIBRARY_BYTES)
    if options.vocab == data.BYTES:
        return torch.frombuffer(bytearray("".join(texts).encode()), dtype=torch.uint8).int()
    extras.require("tokenizers", extra="examples")
    wanted = options.steps * options.accumulate * options.batch * options.context * dist.get_world_size()
    return data.encode(texts, data.learn_vocabulary(texts, options.vocab), wanted, options.seed).int()


def build(options: argparse.Namespace, device: torch.device) -> Any:
    """The model with a streamed head, sharded. Every rank makes the same weights and keeps its part of each block as it goes."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(options.seed)
    if options.config:
        config = AutoConfig.from_pretrained(options.config)
    else:
        config = LlamaConfig(
            vocab_size=options.vocab, hidden_size=options.width, intermediate_size=options.width * 8 // 3 // 8 * 8,
            num_hidden_layers=options.layers, num_attention_heads=options.heads, max_position_embeddings=options.context,
            tie_word_embeddings=options.tie, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    model = bigclass.convert_head(AutoModelForCausalLM.from_config(config).float().train())

    shard: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, options.dtype), reduce_dtype=torch.float32),
    }
    for parent, name, block in blocks(model):
        if not options.keep_activations:
            block = checkpoint_wrapper(block)  # non-reentrant
            setattr(parent, name, block)
        fully_shard(block, **shard)
    # Lazy logits hold the weight as a view, so that wrappers see a tensor that the module made. Nobody writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return fully_shard(model, **shard)


def blocks(model: Any) -> list[tuple[nn.Module, str, nn.Module]]:
    """The model's layers, as (parent, name, module): what its own `_no_split_modules` names."""
    kinds = set(model._no_split_modules or ())
    found = [(p, name, m) for p in model.modules() for name, m in p.named_children() if type(m).__name__ in kinds]
    if not found:
        raise SystemExit(f"{type(model).__name__} names no blocks to be sharded one by one (_no_split_modules)")
    return found


def optimizer_of(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95))


def rate_at(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < options.warmup:
        return options.rate * (step + 1) / options.warmup
    share = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return options.rate * (0.55 + 0.45 * math.cos(math.pi * min(share, 1.0)))


def micro_batches(samples: Windows, step: int, rank: int, world: int, options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of a step: of each micro-batch of all ranks the next `batch` samples."""
    size = options.batch * world
    starts = [(step * options.accumulate + a) * size + rank * options.batch for a in range(options.accumulate)]
    return [samples[range(start, start + options.batch)] for start in starts]


def train(model: Any, optimizer: torch.optim.Optimizer, samples: Windows, first: int, options: argparse.Namespace) -> Iterator[dict]:
    """Steps from `first` on; what each came to."""
    from bigclass.integrations.transformers import lm_loss

    rank, world, device = dist.get_rank(), dist.get_world_size(), next(model.parameters()).device
    for step in range(first, options.steps):
        start = time.perf_counter()
        micro = [(ids.to(device), labels.to(device)) for ids, labels in micro_batches(samples, step, rank, world, options)]
        count = torch.stack([(labels[:, 1:] != IGNORED).sum() for _, labels in micro]).sum()
        dist.all_reduce(count)
        count = count.clamp(min=1)
        mean = torch.zeros((), device=device)
        for ids, labels in micro:
            logits = model(input_ids=ids, use_cache=False).logits  # lazy
            # A rank without a label has the sum of nothing, and takes part in every collective all the same.
            loss = lm_loss(logits, labels, reduction="sum", z_loss=options.z_loss) / count
            (world * loss).backward()  # gradients are reduced now: those of a micro-batch, whole, are more than the shards kept
            mean += loss.detach()
        dist.all_reduce(mean)
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        rate = rate_at(step, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        norm, loss = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item(), mean.item()  # waits for the device
        tokens = world * options.accumulate * options.batch * options.context
        yield {
            "step": step + 1, "loss": loss, "norm": norm, "rate": rate, "predicted": count.item(),
            "tokens_per_second": tokens / (time.perf_counter() - start), "peak_mib": peak(device),
        }  # fmt: skip


def peak(device: torch.device) -> float:
    """MiB, of the rank that has most: allocated by PyTorch on a GPU, resident on the CPU (nan where the system does not tell)."""
    own = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()
    most = torch.tensor(math.nan if own is None else own / MIB, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": torch.tensor(step)}, checkpoint_id=str(folder / f"step-{step:08d}"))


def resume(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest whole checkpoint (its .metadata is written last), on any number of ranks. The steps it has behind it; 0 without."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    there = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    if not there:
        return 0
    weights, state = get_state_dict(model, optimizer)
    step = torch.tensor(0)
    dcp.load({"model": weights, "optimizer": state, "step": step}, checkpoint_id=str(there[-1]))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return int(step)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", help="a transformers configuration (a folder or a name), instead of a Llama of the sizes below")
    add("--vocab", type=int, default=32_000)
    add("--width", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--tie", action="store_true", help="tie the head to the embedding")
    add("--data", help="a file of torch.save: ids (T,) or (S, T), or a dict of input_ids and labels (-100 where nothing is predicted)")
    add("--context", type=int, default=512, help="tokens in a sequence")
    add("--batch", type=int, default=1, help="sequences in a micro-batch of a rank")
    add("--accumulate", type=int, default=2, help="micro-batches in a step")
    add("--steps", type=int, default=20)
    add("--until", type=int, help="stop here, as if interrupted; the schedule is that of --steps")
    add("--rate", type=float, default=1e-3, help="highest learning rate")
    add("--warmup", type=int, default=5)
    add("--decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0)
    add("--z-loss", type=float, default=0.0)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of gathered weights and activations; masters are fp32")
    add("--keep-activations", action="store_true", help="no activation checkpointing")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--checkpoints", type=Path, help="folder of checkpoints; training goes on from the newest there")
    add("--every", type=int, default=1000, help="steps between checkpoints; there is one at the end, too")
    add("--figures", type=Path, help="a file to which each step adds a line of JSON")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    try:
        extras.require("transformers", extra="examples")
    except ModuleNotFoundError as missing:
        raise SystemExit(f"This example {missing}") from None
    device = torch.device(options.device, int(os.environ.get("LOCAL_RANK", 0)) if options.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        run(options, device)
    finally:
        dist.destroy_process_group()


def run(options: argparse.Namespace, device: torch.device) -> None:
    talks = dist.get_rank() == 0
    samples = windows(options, dist.get_rank())
    model = build(options, device)
    optimizer = optimizer_of(model, options)
    first = resume(options.checkpoints, model, optimizer) if options.checkpoints else 0
    if talks:
        logits = options.batch * options.context * model.config.vocab_size * getattr(torch, options.dtype).itemsize
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {dist.get_world_size()} ranks, from step {first}; ", end="")
        print(f"one matrix of a micro-batch's logits would take {logits / MIB:,.0f} MiB on each", flush=True)
    last = options.steps if options.until is None else min(options.until, options.steps)
    for made in train(model, optimizer, samples, first, options):
        if talks:
            print(
                f"step {made['step']:5d}  loss {made['loss']:8.4f}  norm {made['norm']:7.3f}  rate {made['rate']:.2e}  "
                f"{made['tokens_per_second']:,.0f} tokens/s  peak {made['peak_mib']:,.0f} MiB",
                flush=True,
            )
            if options.figures:
                with options.figures.open("a") as file:
                    file.write(json.dumps(made) + "\n")
        ends = made["step"] >= last
        if options.checkpoints and (ends or made["step"] % options.every == 0):
            save(options.checkpoints, model, optimizer, made["step"])
        if ends:
            return


if __name__ == "__main__":
    main()

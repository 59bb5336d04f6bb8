"""The plan: what lives in each phase of a training step, and in which the peak is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bigclass.core.errors import ArgumentError
from bigclass.memory_plan.blocks import BlockMemory, block_memory
from bigclass.memory_plan.heads import HeadMemory, head_memory
from bigclass.memory_plan.settings import Ranks, Training, positive
from bigclass.memory_plan.shapes import ModuleShape, TransformerShape, shape_of

GIB = 1 << 30
MIB = 1 << 20

PARTS = ("weights", "gradients", "optimizer", "gathered", "inputs", "activations", "mlp", "head")


@dataclass(frozen=True, slots=True)
class Phase:
    """A moment of the step. name: in words. parts: bytes of each of `PARTS`."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All bytes alive."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a training step takes on one device. Printing it shows its parts and why.

    name: of the model. tokens: N, of this device. phases: moments of the step, one of which is the peak. why: what was assumed, in words.
    """

    name: str
    tokens: int
    phases: tuple[Phase, ...]
    why: tuple[str, ...] = ()

    @property
    def peak_phase(self) -> Phase:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.peak_phase.total

    def part(self, name: str) -> int:
        """Bytes of one of `PARTS` at the peak."""
        return self.peak_phase.parts.get(name, 0)

    def __str__(self) -> str:
        top = self.peak_phase
        width = max(len(phase.name) for phase in self.phases)
        lines = [f"{self.name}, {self.tokens:,} tokens a device: peak {_readable(self.peak)}, {top.name}"]
        lines += [f"  {part:<{width}}  {_readable(size):>12}" for part, size in top.parts.items() if size]
        lines += ["phases"]
        lines += [f"  {phase.name:<{width}}  {_readable(phase.total):>12}" for phase in self.phases]
        return "\n".join(lines + [f"  - {reason}" for reason in self.why])


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of weights, gradients and optimizer states on this rank. gradients_of(parameters) shards as gradients are."""

    weights: int
    optimizer: int
    gradients: int
    step: int


def plan_memory(
    model: Any,
    sequence: int,
    *,
    batch: int = 1,
    training: Training | None = None,
    ranks: Ranks | None = None,
    device: str | torch.device = "cuda",
) -> MemoryPlan:
    """The memory of a training step on one device, by formula: nothing is allocated or run.

    peak = the largest, over the phases of a step, of weights + gradients + optimizer + gathered + inputs + activations + mlp + head, with
    the terms of `bigclass.memory_plan` (its docstring has them all, with their sources).

    Args:
        model: a name of `bigclass.memory_plan.MODELS`, a shape, a transformers configuration or model, or any module with a classifier
            (whose activations then are `row_bytes` of its shape: `shape_of(model, row_bytes=...)`).
        sequence: S, tokens of a sequence; for a module that is only counted 1, or what a row counts as.
        batch: sequences (rows) of each data-parallel rank in a forward.
        training: precision, optimizer, recompute, head; None: `Training()`: bf16, AdamW with fp32 states, a dense head.
        ranks: over how many; None: one.
        device: "cuda" or "cpu": what the streamed head may use and keeps.

    Returns:
        A `MemoryPlan`: `print` it, or read `.peak`, `.part("head")`, `.phases`.

    Raises:
        ArgumentError, ArgumentTypeError: for a model, size or option that is not known.

    Source: the terms of activations: arXiv:2205.05198; sharded states: ZeRO, arXiv:1910.02054; mini-sequences: arXiv:2407.15892;
    sequences over ranks: Ulysses, arXiv:2309.14509. How they add up over a step is tested against counted allocations.

    Example:
        >>> dense = bigclass.plan_memory("llama3-8b", 8192)
        >>> streamed = bigclass.plan_memory("llama3-8b", 8192, training=bigclass.memory_plan.Training(head="streamed"))
        >>> dense.peak > streamed.peak
        True
    """
    shape = shape_of(model)
    training, ranks = training or Training(), ranks or Ranks()
    place = torch.device(device).type
    positive("sequence", sequence)
    positive("batch", batch)
    if isinstance(shape, ModuleShape):
        return _of_module(shape, batch * sequence, training, ranks, place)
    if ranks.sequence > sequence:
        raise ArgumentError(f"sequence: expected at least a token for each of {ranks.sequence} ranks, got {sequence}")
    tokens = batch * -(-sequence // ranks.sequence)
    block = block_memory(shape, tokens, sequence, training, ranks, device=place)
    head = _head(shape, tokens, training, ranks, place)
    return MemoryPlan(
        shape.name, tokens, tuple(_phases(shape, tokens, sequence, training, ranks, block, head)), _why(shape, training, ranks, head)
    )


def states_of(parameters: int, head: int, largest: int, training: Training, ranks: Ranks) -> States:
    """Bytes of the states of `parameters`, `head` of which are sharded over the ranks that share classes; largest: of one tensor."""

    def local(each: float, stage: int) -> int:
        shared = ranks.share(stage)
        return int(each * (-(-(parameters - head) // shared) + -(-head // max(shared, ranks.classes))))

    w, o, g = training.weight_bytes, training.state_bytes, training.gradient_bytes
    per_moment = 4 if training.optimizer == "adamw" else w
    step = {"fused": 0, "loop": 2 * per_moment * -(-largest // ranks.share(1)), "foreach": local(per_moment, 1)}[training.step]
    return States(local(w, 3), local(o, 1), local(g, 2), step if training.optimizer.startswith("adamw") else 0)


def _head(shape: TransformerShape | ModuleShape, rows: int, training: Training, ranks: Ranks, place: str) -> HeadMemory:
    """The head of this rank. One that shares its classes sees the rows of all that do."""
    softcap = isinstance(shape, TransformerShape) and shape.softcap
    classes = -(-shape.classes // ranks.classes)
    all_rows = rows * ranks.classes
    return head_memory(all_rows, classes, shape.hidden, training, softcap=softcap, spread=ranks.classes > 1, device=place)


def _phases(
    shape: TransformerShape, tokens: int, sequence: int, training: Training, ranks: Ranks, block: BlockMemory, head: HeadMemory
) -> list[Phase]:
    e, g = training.item, training.gradient_bytes
    classes = -(-shape.classes // ranks.classes)
    head_weight = classes * shape.hidden
    largest = max(head_weight, shape.matrix)
    shared_head = shape.classes * shape.hidden if ranks.classes > 1 else 0
    states = states_of(shape.parameters, shared_head, largest, training, ranks)
    spread_rows = e * tokens * (ranks.classes - 1) * shape.hidden  # features of the ranks that share classes, gathered

    # Sharded weights are gathered a block at a time, the next one's meanwhile; their gradients are there whole until they are spread.
    gathers = ranks.share(3) > 1
    scatters = ranks.share(2) > 1
    block_weights = 2 * e * shape.block_parameters if gathers else 0
    block_gradients = (e if gathers else g) * shape.block_parameters + (g * shape.block_parameters if gathers else 0) if scatters else 0
    head_gathered = e * head_weight if gathers else 0
    table_gathered = e * shape.embedding_parameters // ranks.classes if gathers else 0

    def gradients(parameters: int) -> int:
        """Bytes of the gradients of parameters whose backward is done."""
        if training.accumulate:
            return states.gradients
        return min(-(-g * parameters // ranks.share(2)), states.gradients)

    layers, recompute = shape.layers, training.recompute == "block"
    kept = block.input if recompute else block.kept + (block.input if block.shared_input else 0)
    kept_mlp = 0 if recompute else block.mlp
    rotary = 0 if shape.positions else 2 * e * shape.head_dim * tokens  # cosines and sines, shared by the blocks
    mask = e * tokens * sequence if training.attention == "eager" else 0
    inputs = 3 * 8 * tokens + rotary + mask  # ids, labels, labels shifted

    def phase(name: str, done: int, activations: float, mlp: float, of_head: int, gathered: int, step: int = 0) -> Phase:
        parts = {
            "weights": states.weights,
            "gradients": gradients(done),
            "optimizer": states.optimizer + step,
            "gathered": gathered,
            "inputs": inputs,
            "activations": int(activations),
            "mlp": int(mlp),
            "head": of_head + head.idle,
        }
        return Phase(name, parts)

    all_but_table = shape.parameters - shape.embedding_parameters + (head_weight if shape.tied else 0)
    found = [
        phase("at the head", 0, layers * kept + block.last + spread_rows, layers * kept_mlp, head.peak, head_gathered),
    ]
    around = block_weights + block_gradients
    for name, left, done in (("last", layers, head_weight), ("first", 1, all_but_table - shape.block_parameters)):
        again = (block.kept, block.mlp) if recompute else (0, 0)
        mlp = left * kept_mlp + again[1] + block.chunk + block.in_mlp
        # Chunks' gradients of all its matrices are summed, one more is made; else the last matrix's is there.
        of_mlp = shape.mlp_parameters + shape.matrix if block.chunk else shape.matrix
        found.append(phase(f"in the {name} block's backward, its MLP", done + of_mlp, left * kept + again[0], mlp, 0, around))
        # What is left of the block stands for what it kept.
        rest = (left - 1) * kept + (block.input if recompute or block.shared_input else 0) + block.in_rest
        done += shape.mlp_parameters
        found.append(phase(f"in the {name} block's backward, the rest", done, rest, (left - 1) * kept_mlp, 0, around))
    # A tied weight has the head's gradient already; that of the table is made beside it, and their sum beside both. A sharded one is made
    # whole before it is spread, one to be accumulated beside what it is added to.
    table = g * shape.embedding_parameters // ranks.classes
    beside = table * (2 * shape.tied + (scatters or training.accumulate))
    found += [
        phase("backward of the embedding", shape.parameters, block.input, 0, beside, table_gathered),
        phase("optimizer", shape.parameters, 0, 0, 0, 0, states.step),
    ]
    return found


def _of_module(shape: ModuleShape, rows: int, training: Training, ranks: Ranks, place: str) -> MemoryPlan:
    """A module that is only counted: states, what rows keep, the head. What its own backward takes on top is not known."""
    head = _head(shape, rows, training, ranks, place)
    weight = shape.classes * shape.hidden
    states = states_of(shape.parameters, weight if ranks.classes > 1 else 0, max(shape.largest, weight // ranks.classes), training, ranks)
    features = training.item * shape.hidden  # of a row; the head keeps them
    kept = rows * (max(shape.row_bytes, features) + features * (ranks.classes - 1))
    before = states.gradients if training.accumulate else 0
    base = {"weights": states.weights, "optimizer": states.optimizer}
    dw = -(-weight // ranks.classes) * training.gradient_bytes
    found = (
        Phase("at the head", base | {"gradients": before, "activations": kept, "head": head.peak + head.idle}),
        Phase("backward of the rest", base | {"gradients": max(before, dw), "activations": kept, "head": head.idle}),
        Phase("optimizer", base | {"gradients": states.gradients, "optimizer": states.optimizer + states.step, "head": head.idle}),
    )
    why = () if shape.row_bytes else ("what is before the head keeps activations that were not counted: give row_bytes (saved_bytes)",)
    return MemoryPlan(shape.name, rows, found, (*why, *_why(shape, training, ranks, head)))


def _why(shape: TransformerShape | ModuleShape, training: Training, ranks: Ranks, head: HeadMemory) -> tuple[str, ...]:
    p = shape.parameters
    per = training.weight_bytes + training.gradient_bytes + training.state_bytes
    why = [f"{p:,} parameters of {per:.4g} bytes: weights {training.weight_bytes}, gradients {training.gradient_bytes}, "
           f"{training.optimizer} {training.state_bytes:.4g}"]  # fmt: skip
    if ranks.shard:
        what = ("optimizer states", "gradients and optimizer states", "weights, gradients and optimizer states")[ranks.shard - 1]
        why.append(f"{what} are spread over {ranks.all} ranks (ZeRO {ranks.shard})")
    if isinstance(shape, TransformerShape) and ranks.sequence > 1:
        groups = "" if ranks.sequence <= shape.heads else f", in rings of {ranks.sequence / shape.heads:.4g}: it has {shape.heads} heads"
        why.append(f"a sequence is spread over {ranks.sequence} ranks (Ulysses{groups})")
    if training.head == "dense":
        why.append("a dense head: log-softmax and two gradients of it in fp32, 12 bytes a logit, at the worst moment")
    elif head.plan is not None:
        why.append(f"a streamed head: {head.plan.engine}, gradients {head.plan.gradients}, workspace {head.plan.workspace / MIB:.0f} MiB")
    return tuple(why)


def _readable(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"

"""How a model is trained and over how many ranks: what `plan_memory` has to be told beside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from bigclass.core.errors import ArgumentError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Bytes of state a parameter, of a weight of w bytes.
OPTIMIZERS: Mapping[str, Callable[[int], float]] = {
    "adamw": lambda w: 8 + (4 if w < 4 else 0),
    "adamw-plain": lambda w: 2 * w,
    "adamw-8bit": lambda w: 2 * (1 + 4 / 256),
    "momentum": lambda w: w,
    "sgd": lambda w: 0,
}
STEPS = ("fused", "loop", "foreach")
RECOMPUTE = ("none", "block")
HEADS = ("dense", "chunked", "streamed")
ATTENTION = ("flash", "eager")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the model is trained.

    dtype: of activations and of the weights that are multiplied. weight_dtype: weights are stored in it; None: dtype. gradient_dtype:
    of gradients as the optimizer reads them; None: that of the weights.
    optimizer: "adamw": two fp32 moments, and where weights are of 16 bits an fp32 copy of them (12 bytes a parameter: K of ZeRO's paper).
    "adamw-plain": two moments in the weights' dtype, as torch.optim.AdamW makes them. "adamw-8bit": two moments of a byte, with an fp32
    scale for each 256. "momentum": one in the weights' dtype. "sgd": none.
    step: what the optimizer's step takes besides: "fused" nothing; "loop" two copies of the largest parameter (torch's on CPUs);
    "foreach" one copy of all second moments (torch's on GPUs unless fused=True).
    accumulate: do gradients of earlier micro-batches stay in memory through forward and backward?
    recompute: "none", or "block": a block keeps its input only and is made again in the backward.
    mlp_chunk: tokens that go through an MLP at once and are made again in the backward (`bigclass.mini_sequence`); None: all, once.
    head: "dense" (logits, then cross-entropy), "chunked" (the same for head_chunk rows at a time, gradients in the forward), "streamed"
    (bigclass). workspace: of the streamed head, in bytes; None: the planner's default. head_gradients: "auto", or "recompute" (`planning`).
    attention: "flash" keeps no scores (torch's scaled_dot_product_attention), "eager" keeps tokens x tokens of them for each head.
    """

    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype | None = None
    gradient_dtype: torch.dtype | None = None
    optimizer: str = "adamw"
    step: str = "fused"
    accumulate: bool = False
    recompute: str = "none"
    mlp_chunk: int | None = None
    head: str = "dense"
    head_chunk: int = 1024
    workspace: int | None = None
    head_gradients: str = "auto"
    attention: str = "flash"

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", tuple(OPTIMIZERS)), ("step", STEPS), ("recompute", RECOMPUTE), ("head", HEADS), ("attention", ATTENTION),
            ("dtype", FLOATS), ("weight_dtype", (None, *FLOATS)), ("gradient_dtype", (None, *FLOATS)),
            ("head_gradients", ("auto", "forward", "recompute")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ArgumentError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("mlp_chunk", "head_chunk", "workspace"):
            positive(name, getattr(self, name), optional=name != "head_chunk")

    @property
    def item(self) -> int:
        """e: bytes of an activation's element."""
        return self.dtype.itemsize

    @property
    def half(self) -> bool:
        return self.item == 2

    @property
    def weight_bytes(self) -> int:
        """w: bytes of a stored weight."""
        return (self.weight_dtype or self.dtype).itemsize

    @property
    def gradient_bytes(self) -> int:
        """g: bytes of a gradient's element."""
        return (self.gradient_dtype or self.weight_dtype or self.dtype).itemsize

    @property
    def state_bytes(self) -> float:
        """o: bytes of optimizer state a parameter."""
        return OPTIMIZERS[self.optimizer](self.weight_bytes)

    def with_(self, **changes: object) -> Training:
        """The same with some fields changed."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What is spread over ranks. All together there are data x sequence of them; those that share classes are among them.

    data: ranks with rows of their own. sequence: ranks that share a sequence: Ulysses within a group of as many ranks as there are heads,
    a ring of such groups beyond. classes: ranks that share the head's classes; each sees the rows of all of them.
    shard: stage of ZeRO over all ranks: 0 nothing (DDP), 1 optimizer states, 2 gradients too, 3 weights too (FSDP).
    """

    data: int = 1
    sequence: int = 1
    classes: int = 1
    shard: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "sequence", "classes"):
            positive(name, getattr(self, name))
        if self.shard not in (0, 1, 2, 3):
            raise ArgumentError(f"shard: expected a stage of ZeRO, 0 to 3, got {self.shard!r}")
        if self.all % self.classes:
            raise ArgumentError(f"classes: expected a divisor of the {self.all} ranks (data x sequence), got {self.classes}")

    @property
    def all(self) -> int:
        """R: all ranks."""
        return self.data * self.sequence

    def share(self, stage: int) -> int:
        """Ranks that share what ZeRO shards from this stage on."""
        return self.all if self.shard >= stage else 1


def positive(name: str, value: object, *, optional: bool = False) -> None:
    """Raise unless `value` is a whole number of at least 1 (or None, where that is optional)."""
    if (value is None and optional) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    raise ArgumentError(f"{name}: expected a whole number of at least 1, got {value!r}")

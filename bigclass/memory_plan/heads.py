"""Memory of the head and its loss: R rows, C classes of this rank, D features; e, g bytes of an element and of a gradient's.

Dense, as transformers' models and most training loops do it (`F.linear`, `.float()` where it is of 16 bits, `F.cross_entropy`):

    forward     logits e RC, their fp32 copy 4 RC [16 bits only], log-softmax 4 RC
    backward    log-softmax 4 RC, gradient of it 4 RC, gradient of the logits 4 RC
    products    gradient of the logits 4 RC, or its cast e RC; dw g CD and dx e RD

A soft cap keeps one tensor more, e RC. The log-softmax alone is kept from forward to backward: cross-entropy saves its result.

Chunked: the same for c rows in place of R, gradients at once, so fp32 dw 4 CD and dx e RD from the forward on.

Streamed: what bigclass' own planner says (core/plan.py): its workspace; and where gradients come with the loss, dw and dx in fp32 (4 CD
and 4 RD), which for 16 bits are cast when the upstream gradient is known (g CD and e RD more). Where tiles are made again: dw g CD and
dx e RD alone. `_beside_tiles` has what was found by measuring the tiled engine: copies of rows where others are left out, a product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bigclass.core.plan import Plan, Settings, Work, choose_engine, choose_gradients, make_plan, saved_size, tile_buffers
from bigclass.memory_plan.settings import Training

# The tiled engine keeps its largest work buffer for the next call, on a CPU, if it is of such a size (core/engines/pages.py).
KEPT_BUFFER = range(4 << 20, (256 << 20) + 1)


@dataclass(frozen=True, slots=True)
class HeadMemory:
    """Bytes of a head.

    peak: most at once in forward and backward, beyond features, weight, their gradients of earlier micro-batches. saved: kept between them.
    idle: kept for the next call, at all times. plan: the streamed head's.
    """

    peak: int
    saved: int
    idle: int = 0
    plan: Plan | None = None


def head_memory(
    rows: int, classes: int, features: int, training: Training, *, softcap: bool = False, spread: bool = False, in_backward: bool = False,
    masked: bool = True, device: str = "cuda",
) -> HeadMemory:  # fmt: skip
    """The memory of one head.

    Args:
        rows, classes, features: R, C and D; classes are those of this rank.
        training: its dtypes, `head`, `head_chunk`, `workspace`.
        softcap: are logits bent by a soft cap?
        spread: are there more classes on other ranks?
        in_backward: is the weight updated slab by slab (`update=`), so that dw never exists?
        masked: are rows left out (ignore_index), as a language model's last token is?
        device: "cpu" or "cuda", which decides the streamed head's workspace.

    Returns:
        A `HeadMemory`.
    """
    e, g = training.item, training.gradient_bytes
    size, dx = rows * classes, rows * features * e
    dw = 0 if in_backward else classes * features * g
    cap = e * size if softcap else 0
    if training.head == "dense":
        forward = (e + 8 if training.half else 8) * size + cap
        products = e * size + dw + dx
        return HeadMemory(max(forward, 12 * size + cap, products), 4 * size + cap)
    if training.head == "chunked":
        chunk = min(training.head_chunk, rows) * classes
        kept = 4 * classes * features + dx
        backward = kept + (dw if g < 4 else 0)
        return HeadMemory(max((12 + (e if training.half else 0)) * chunk + kept, backward), kept)
    plan = streamed_plan(rows, classes, features, training, softcap=softcap, spread=spread or in_backward, masked=masked, device=device)
    if plan.engine == "dense":
        return HeadMemory(plan.workspace + dw + dx, 4 * size)
    idle = _idle(plan, classes) if device == "cpu" else 0
    forward = plan.workspace - idle
    backward = forward + (_beside_tiles(plan, rows, features, training, masked) if plan.engine == "tiled" else 0)
    if plan.gradients == "forward":
        wide = 4 * (classes + rows) * features
        return HeadMemory(max(backward + wide, wide + (dw + dx if training.half else 0)), wide, idle, plan)
    if (
        in_backward and training.half
    ):  # five fp32 copies of a slab, as measured: its gradient as handed on, the weights, what an update takes
        backward += 5 * 4 * plan.class_block * features
    kept = saved_size(rows, plan.saved) if plan.gradients == "saved" else 0
    return HeadMemory(max(forward, backward + dw + dx), kept, idle, plan)


def _idle(plan: Plan, classes: int) -> int:
    """The largest buffer of a call, which stays for the next one: whole rows of logits, or a tile."""
    size = 4 * (plan.chunk * classes if plan.gradients == "forward" else plan.row_block * plan.class_block)
    return min(size, plan.workspace) if size in KEPT_BUFFER else 0


def _beside_tiles(plan: Plan, rows: int, features: int, training: Training, masked: bool) -> int:
    """What the tiled engine takes beyond the workspace of its plan (less, where a buffer of the forward's is gone by then)."""
    row = 4 * features
    if plan.gradients == "forward":
        # Where rows are left out the others' features and their dx are copied: of a chunk, and of the one before until it is replaced.
        return 0 if training.half or not masked else (2 if plan.chunk >= rows else 3) * plan.chunk * row
    second_tile = 4 * plan.row_block * plan.class_block
    if training.half:
        return max(plan.row_block, plan.class_block) * row - second_tile  # a product before it is added
    return ((rows + 2 * plan.row_block) * row if masked else 0) - second_tile


def streamed_plan(
    rows: int, classes: int, features: int, training: Training, *, softcap: bool = False, spread: bool = False, masked: bool = True,
    device: str = "cuda",
) -> Plan:  # fmt: skip
    """What bigclass' planner would do on such a device, whether or not this machine has one (a GPU is taken to have Triton)."""
    options = Settings(workspace=training.workspace, gradients=training.head_gradients)
    work = Work(
        n=rows, c=classes, d=features, device=device, scalar=not spread, half=training.half,
        buffers=tile_buffers(not softcap, not spread, int(softcap)), narrow=training.half, masked=masked,
        not_fused=None if device == "cuda" else "it is no GPU",
        saves=training.dtype == torch.bfloat16 and features % 8 == 0 and not spread, direct=device == "cuda" and training.half,
    )  # fmt: skip
    if choose_gradients(work, options, choose_engine(work)) in ("recompute", "saved"):  # by `reduce_logits`, then
        work = replace(work, buffers=tile_buffers(not softcap, False, int(softcap)))
    return make_plan(work, "auto", options)

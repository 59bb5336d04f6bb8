"""The longest sequence and the largest class count that fit a device: the plan, searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bigclass.core.errors import ArgumentError
from bigclass.memory_plan.heads import head_memory
from bigclass.memory_plan.plan import Phase, plan_memory, states_of
from bigclass.memory_plan.settings import Ranks, Training, positive
from bigclass.memory_plan.shapes import shape_of

GB = 10**9

# What a plan may fill. The rest is the CUDA context, the communication library's buffers, and blocks between which memory is lost.
USABLE = 0.92

DEVICES = {"24 GB": 24 * GB, "40 GB": 40 * GB, "80 GB": 80 * GB, "141 GB": 141 * GB, "192 GB": 192 * GB}
"""Memory of usual accelerators, in bytes (GB of 10^9: what is printed on them is at least that)."""

UPDATES = ("step", "backward")

_MOST = 1 << 46


def longest_sequence(
    model: Any, memory: float, *, batch: int = 1, training: Training | None = None, ranks: Ranks | None = None, usable: float = USABLE,
    multiple: int = 128, device: str | torch.device = "cuda",
) -> int:  # fmt: skip
    """The longest sequence whose training step fits.

        max S: plan_memory(model, S).peak <= usable * memory

    Args:
        model, batch, training, ranks, device: as for `plan_memory`.
        memory: of a device, in bytes.
        usable: share of it that tensors may fill.
        multiple: tokens of each rank are a multiple of this.

    Returns:
        Tokens; 0 if not even the shortest fits.

    Raises:
        ArgumentError: for a share out of range, or what `plan_memory` refuses.

    Example:
        >>> longest_sequence("llama3-8b", 80e9, ranks=Ranks(sequence=8, shard=3)) > 0
        True
    """
    limit = _limit(memory, usable)
    positive("multiple", multiple)
    shape, ranks = shape_of(model), ranks or Ranks()
    each = multiple * ranks.sequence

    def fits(count: int) -> bool:
        return plan_memory(shape, count * each, batch=batch, training=training, ranks=ranks, device=device).peak <= limit

    return each * _largest(fits)


def largest_class_count(
    rows: int, features: int, memory: float, *, training: Training | None = None, ranks: int = 1, update: str = "step", other: float = 0,
    usable: float = USABLE, device: str | torch.device = "cuda",
) -> int:  # fmt: skip
    """The most classes that a classification head can have, its optimizer states included.

        max C: (w + g + o) D C / K + what the loss takes of R rows and C / K classes + e R D + other <= usable * memory     (update="step")

    over K ranks that share the classes and see the same rows. Two phases are told apart: the loss, with the gradient being made, and the
    optimizer's step, with the gradient complete.

    Args:
        rows: R, the rows of a step, of all ranks.
        features: D.
        memory: of a device, in bytes.
        training: dtypes, optimizer, head; None: `Training(head="streamed")`.
        ranks: K, over which the classes are spread.
        update: "step": an optimizer after the backward, or "backward": `update=` with a `bigclass.optim.SlabRowAdam` (no momentum), which
            takes 4 bytes a class of state and no gradient; streamed heads on one rank only.
        other: bytes that the rest of the model takes.
        usable: share of the memory that tensors may fill.
        device: "cuda" or "cpu".

    Returns:
        Classes over all ranks, in multiples of `ranks`; 0 if none fit.

    Raises:
        ArgumentError: for a size or share out of range; for update="backward" with a head that is not streamed or with ranks.

    Example:
        >>> largest_class_count(4096, 1024, 80e9, ranks=8) > largest_class_count(4096, 1024, 80e9)
        True
    """
    limit, training = _limit(memory, usable), training or Training(head="streamed")
    for name, value in (("rows", rows), ("features", features), ("ranks", ranks)):
        positive(name, value)
    if update not in UPDATES:
        raise ArgumentError(f"update: expected one of {UPDATES}, got {update!r}")
    in_backward = update == "backward"
    if in_backward and (training.head != "streamed" or ranks > 1):
        raise ArgumentError(f"update: 'backward' takes a streamed head on one rank, got head={training.head!r} and ranks={ranks}")
    place = torch.device(device).type

    def fits(classes: int) -> bool:
        phases = head_phases(rows, classes, features, training, spread=ranks > 1, in_backward=in_backward, device=place)
        return max(phase.total for phase in phases) + other <= limit

    return ranks * _largest(fits)


def head_phases(
    rows: int, classes: int, features: int, training: Training, *, spread: bool = False, in_backward: bool = False, device: str = "cuda"
) -> tuple[Phase, Phase]:
    """A head on its own, with `classes` on this rank: at its loss and at the optimizer's step."""
    head = head_memory(rows, classes, features, training, spread=spread, in_backward=in_backward, masked=False, device=device)
    weight = classes * features
    states = states_of(weight, 0, weight, training, Ranks())
    kept = training.item * rows * features
    lasting = {"weights": states.weights, "optimizer": 4 * classes if in_backward else states.optimizer}
    before = {"gradients": states.gradients} if training.accumulate else {}
    gradients, step = (0, 0) if in_backward else (states.gradients, states.step)
    return (
        Phase("at the head", lasting | before | {"activations": kept, "head": head.peak + head.idle}),
        Phase("optimizer", lasting | {"gradients": gradients, "optimizer": lasting["optimizer"] + step, "head": head.idle}),
    )


def _limit(memory: float, usable: float) -> float:
    if not 0 < usable <= 1:
        raise ArgumentError(f"usable: expected a share above 0 and at most 1, got {usable}")
    if not memory > 0:
        raise ArgumentError(f"memory: expected a number of bytes above 0, got {memory}")
    return usable * memory


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, by doubling and halving; 0 if 1 does not."""
    if not fits(1):
        return 0
    most = 1
    while most < _MOST and fits(2 * most):
        most *= 2
    step = most // 2
    while step:
        if fits(most + step):
            most += step
        step //= 2
    return most

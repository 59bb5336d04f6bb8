"""Two streams over the same classes: a divergence between their softmaxes, row by row or summed, without either's N x C logits.

    compare_rows(student, teacher, divergence)         D (N,), differentiable; its backward makes the tiles of both again
    compare_sum(student, teacher, divergence, g)       sum_i g_i D_i; gradients are made with the loss

The teacher is a constant. What D can be: divergences.py. How the rows are walked: engines/pair.py. Both are custom ops (one graph under
torch.compile) but for the dense engine, which is plain autograd.

With D features of the student and E of the teacher, in flops: 2NC(D+E) for the value, 4NCD more for gradients that come with it; for
gradients of rows, 2NC(D+E) + 4NCD more. Memory: the planner's workspace, in which whole rows of both are kept; compare_sum holds dw of a
16-bit weight in fp32 until the upstream factor is known. compare_rows saves six or seven numbers a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bigclass.core.custom_ops import scaled_gradients, spread
from bigclass.core.divergences import DIVERGENCES, Divergence
from bigclass.core.engines import dense, pair
from bigclass.core.errors import ArgumentError
from bigclass.core.guards import autocast_off, refuse_create_graph, refuse_transforms
from bigclass.core.plan import Plan, Settings, Work, choose_engine, make_pair_plan, pair_work, settings
from bigclass.core.problem import check, is_half
from bigclass.core.recipe import pack, unpack
from bigclass.core.stream import Stream


def compare_rows(student: Stream, teacher: Stream, divergence: Divergence, *, keep: Tensor | None = None, engine: str = "auto") -> Tensor:
    """D_i between softmax(teacher's logits) and softmax(student's), for each row.

    Args:
        student, teacher: how the logits are made, over the same rows and classes. The teacher's tensors get no gradient.
        divergence: a registered one.
        keep: (N,) bool; rows where it is False are 0 and contribute exactly nothing, to gradients either.
        engine: "auto", "dense" or "tiled".

    Returns:
        (N,), in the student's accumulation type (fp32, or float64).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    student, teacher, name = checked_pair(student, teacher, keep, engine, scalar=False)
    if name == "dense":
        return _dense(student, teacher, divergence, keep)
    tensors, constants, needs = packed_pair(student, teacher, divergence, name, "recompute")
    return rows_op(*tensors, keep, *constants, needs)[0]


def compare_sum(
    student: Stream, teacher: Stream, divergence: Divergence, g: Tensor, *, keep: Tensor | None = None, engine: str = "auto"
) -> Tensor:
    """sum_i g_i D_i, a scalar.

    Args:
        g: (N,) factors, constants; in float64 so is the sum over rows. Everything else: as in `compare_rows`.
    """
    student, teacher, name = checked_pair(student, teacher, keep, engine, scalar=True)
    if tuple(g.shape) != (student.shape[0],):
        raise ArgumentError(f"g: expected shape ({student.shape[0]},), got {tuple(g.shape)}")
    g = g.detach() if keep is None else torch.where(keep, g.detach(), 0.0)
    if name == "dense" or settings().gradients == "recompute":
        return (g * compare_rows(student, teacher, divergence, keep=keep, engine=name)).sum().to(student.accumulate_dtype)
    tensors, constants, needs = packed_pair(student, teacher, divergence, name, "auto")
    return sum_op(*tensors, keep, g, *constants, needs)[0]


def checked_pair(student: Stream, teacher: Stream, keep: Tensor | None, engine: str, *, scalar: bool) -> tuple[Stream, Stream, str]:
    """The streams, the teacher's without gradients, and the engine's name."""
    teacher = replace(teacher.with_tensors([_constant(t) for t in teacher.tensors]), grad_filter=0.0)
    student = replace(student, grad_filter=0.0)  # a head's, say: of two streams no entries can be set apart, so gradients are exact
    check(student, None, (), keep)
    check(teacher, None, (), None)
    if student.shape != teacher.shape:
        raise ArgumentError(f"teacher: expected {student.shape} rows and classes, as the student, got {teacher.shape}")
    if student.device != teacher.device:
        raise ArgumentError(f"teacher: expected device {student.device} (the student's), got {teacher.device}")
    name = choose_engine(_work(student, teacher, scalar=scalar, grad=True), engine)
    if name != "dense":
        refuse_transforms([*student.tensors, *teacher.tensors])
    return student, teacher, name


def _constant(t: Tensor) -> Tensor:
    """t without a gradient; of a tensor made in inference mode, which autograd refuses to save, a plain one of the same memory."""
    if torch.compiler.is_compiling() or not t.is_inference() or torch.is_inference_mode_enabled():
        return t.detach()
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def _dense(student: Stream, teacher: Stream, divergence: Divergence, keep: Tensor | None) -> Tensor:
    with autocast_off(student.device):
        log_q = dense.logits(student, keep).log_softmax(1)
        log_p = dense.logits(teacher, keep).to(log_q.dtype).log_softmax(1)
    d = divergence.dense(log_p, log_q)
    return d if keep is None else torch.where(keep, d, 0.0)


def _work(student: Stream, teacher: Stream, *, scalar: bool, grad: bool) -> Work:
    n, c = student.shape
    return pair_work(
        n=n,
        c=c,
        d=student.features + teacher.features,
        device=student.device.type,
        scalar=scalar,
        grad=grad,
        half=is_half(student) or is_half(teacher),
        wide=student.accumulate_dtype == torch.float64,
        maps=len(student.maps) + len(teacher.maps),
    )


def packed_pair(student: Stream, teacher: Stream, divergence: Divergence, engine: str, gradients: str):
    """([the student's tensors, the teacher's], what else describes them, which tensors of the student need a gradient)."""
    recipe, numbers, tensors = pack(student, ())
    teacher_recipe, teacher_numbers, teacher_tensors = pack(teacher, ())
    needs = [t.requires_grad and torch.is_grad_enabled() for t in tensors]
    # the last number only keeps the list from being empty, which autograd takes for tensors
    constants = recipe, numbers, teacher_recipe, teacher_numbers, divergence.name, [*divergence.numbers, 0.0]
    return (tensors, teacher_tensors), (*constants, f"{engine},{gradients},{settings().workspace or 0}"), needs


def unpacked_pair(
    tensors, teacher_tensors, recipe, numbers, teacher_recipe, teacher_numbers, name, constants, plan: str, scalar: bool, grad: bool
) -> tuple[Stream, Stream, Divergence, Plan]:
    """What a custom op was handed."""
    student, teacher = unpack(recipe, numbers, tensors)[0], unpack(teacher_recipe, teacher_numbers, teacher_tensors)[0]
    engine, gradients, workspace = plan.split(",")
    chosen = make_pair_plan(_work(student, teacher, scalar=scalar, grad=grad), engine, Settings(int(workspace) or None, gradients))
    return student, teacher, DIVERGENCES[name](tuple(constants[:-1])), chosen


@torch.library.custom_op("bigclass::compare_rows", mutates_args=())
def rows_op(
    tensors: list[Tensor], teacher_tensors: list[Tensor], keep: Tensor | None, recipe: str, numbers: list[float],
    teacher_recipe: str, teacher_numbers: list[float], divergence: str, constants: list[float], plan: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    described = (recipe, numbers, teacher_recipe, teacher_numbers, divergence, constants, plan)
    student, teacher, kind, chosen = unpacked_pair(tensors, teacher_tensors, *described, scalar=False, grad=any(needs))
    with autocast_off(student.device):
        return list(pair.compare(student, teacher, keep, kind, chosen, None, ())[:3])


@rows_op.register_fake
def _(tensors, teacher_tensors, keep, recipe, numbers, teacher_recipe, teacher_numbers, divergence, constants, plan, needs):
    student, _ = unpack(recipe, numbers, tensors)
    n, like = student.shape[0], tensors[0].new_empty((), dtype=student.accumulate_dtype)
    return [like.new_empty(n), like.new_empty((n, 4 + DIVERGENCES[divergence].width)), like.new_empty(n, dtype=torch.int64)]


@torch.library.custom_op("bigclass::compare_rows_backward", mutates_args=())
def rows_backward_op(
    tensors: list[Tensor], teacher_tensors: list[Tensor], keep: Tensor | None, stats: Tensor, top: Tensor, g: Tensor, recipe: str,
    numbers: list[float], teacher_recipe: str, teacher_numbers: list[float], divergence: str, constants: list[float], plan: str,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    described = (recipe, numbers, teacher_recipe, teacher_numbers, divergence, constants, plan)
    student, teacher, kind, chosen = unpacked_pair(tensors, teacher_tensors, *described, scalar=False, grad=True)
    with autocast_off(student.device):
        return pair.compare_backward(student, teacher, keep, kind, chosen, stats, top, g, needs)


@rows_backward_op.register_fake
def _(tensors, teacher_tensors, keep, stats, top, g, *rest):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(tensors, rest[-1], strict=True) if need]


def _rows_context(ctx, inputs, output):
    tensors, teacher_tensors, keep, *constants = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *teacher_tensors, *output[1:], *[t for t in (keep,) if t is not None])
    ctx.sizes = len(tensors), len(teacher_tensors)
    ctx.constants = constants


def _rows_gradients(ctx, grads):
    refuse_create_graph()
    *constants, needs = ctx.constants
    count, others = ctx.sizes
    made: Sequence[Tensor | None] = [None] * count
    if grads[0] is not None and any(needs):
        tensors, teacher_tensors, (stats, top, *rest) = _parted(ctx.saved_tensors, count, others)
        keep = rest[0] if rest else None
        made = spread(rows_backward_op(tensors, teacher_tensors, keep, stats, top, grads[0], *constants, needs), tensors, needs)
    return made, [None] * others, None, *[None] * (len(constants) + 1)


def _parted(saved, *counts: int) -> list[list[Tensor]]:
    """The saved tensors, in groups of so many, and the rest."""
    rest, parts = list(saved), []
    for count in counts:
        parts.append(rest[:count])
        rest = rest[count:]
    return [*parts, rest]


rows_op.register_autograd(_rows_gradients, setup_context=_rows_context)


@torch.library.custom_op("bigclass::compare_sum", mutates_args=())
def sum_op(
    tensors: list[Tensor], teacher_tensors: list[Tensor], keep: Tensor | None, g: Tensor, recipe: str, numbers: list[float],
    teacher_recipe: str, teacher_numbers: list[float], divergence: str, constants: list[float], plan: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    described = (recipe, numbers, teacher_recipe, teacher_numbers, divergence, constants, plan)
    student, teacher, kind, chosen = unpacked_pair(tensors, teacher_tensors, *described, scalar=True, grad=any(needs))
    with autocast_off(student.device):
        values, *_, made = pair.compare(student, teacher, keep, kind, chosen, g if any(needs) else None, needs)
    return [(g * values).sum().to(student.accumulate_dtype), *made]


@sum_op.register_fake
def _(tensors, teacher_tensors, keep, g, recipe, numbers, *rest):
    student, _ = unpack(recipe, numbers, tensors)
    wide = student.accumulate_dtype
    loss = tensors[0].new_empty((), dtype=wide)
    return [loss, *[t.new_empty(t.shape, dtype=wide) for t, need in zip(tensors, rest[-1], strict=True) if need]]


def _sum_context(ctx, inputs, output):
    tensors, teacher_tensors, keep, g, *constants = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *teacher_tensors, g, *[t for t in (keep,) if t is not None])
    ctx.sizes = len(tensors), len(teacher_tensors)
    ctx.constants = constants
    ctx.gradients = output[1:]


def _sum_gradients(ctx, grads):
    refuse_create_graph()
    needs = ctx.constants[-1]
    count, others = ctx.sizes
    made: Sequence[Tensor | None] = [None] * count
    if grads[0] is not None and any(needs):
        tensors, teacher_tensors, (g, *rest) = _parted(ctx.saved_tensors, count, others)
        keep = rest[0] if rest else None
        made = scaled_gradients(ctx, grads[0], lambda: sum_op(tensors, teacher_tensors, keep, g, *ctx.constants)[1:])
        made = spread(made, tensors, needs)
    return made, [None] * others, None, None, *[None] * len(ctx.constants)


sum_op.register_autograd(_sum_gradients, setup_context=_sum_context)

"""Divergences between two streams whose classes are spread over ranks: core/compare.py, the rows' statistics merged between its walks.

Each rank finds the largest logit of its classes and the sum of the others' exponentials, of teacher and student; these are merged (three
numbers a row and stream, gathered); then each makes its part of the divergence's sums from the merged numbers, and the parts are added up.
From there on every rank has the rows' statistics of the whole, which is all that the backward reads: it makes G of its own classes.

Flops with D features of the student, E of the teacher and M classes on a rank: 4NM(D+E) for the value (both walks make the tiles), for the
gradients 2NM(D+E) + 4NMD more. Bytes: 48NW and 4N a sum; dx is added up where the features came in (layer.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigclass.core import compare
from bigclass.core.compare import checked_pair, packed_pair, rows_backward_op, unpacked_pair
from bigclass.core.custom_ops import spread
from bigclass.core.divergences import DIVERGENCES, Divergence
from bigclass.core.engines import pair
from bigclass.core.errors import ArgumentError
from bigclass.core.guards import autocast_off, refuse_create_graph
from bigclass.core.recipe import unpack
from bigclass.core.stream import Stream
from bigclass.parallel.classes import own, shards_of
from bigclass.parallel.collectives import all_of, summed
from bigclass.parallel.groups import Ranks, ranks_named


def compare_rows(student: Stream, teacher: Stream, divergence: Divergence, *, keep: Tensor | None = None, engine: str = "auto") -> Tensor:
    """`core.compare.compare_rows` over all classes, wherever they are; both streams spread alike."""
    shards = shards_of(student)
    if shards is None:
        return compare.compare_rows(student, teacher, divergence, keep=keep, engine=engine)
    if engine not in ("auto", "tiled"):
        raise ArgumentError(f"engine: expected 'auto' or 'tiled' over shards of classes, got {engine!r}")
    student, teacher, _ = checked_pair(own(student), own(teacher), keep, "tiled", scalar=False)
    (tensors, teacher_tensors), constants, needs = packed_pair(student, teacher, divergence, "tiled", "recompute")
    return _compare(tensors, teacher_tensors, keep, *constants, shards.ranks.name, shards.start, needs)[0]


def compare_sum(
    student: Stream, teacher: Stream, divergence: Divergence, g: Tensor, *, keep: Tensor | None = None, engine: str = "auto"
) -> Tensor:
    """`core.compare.compare_sum` over all classes, wherever they are."""
    if shards_of(student) is None:
        return compare.compare_sum(student, teacher, divergence, g, keep=keep, engine=engine)
    g = g.detach() if keep is None else torch.where(keep, g.detach(), 0.0)
    return (g * compare_rows(student, teacher, divergence, keep=keep, engine=engine)).sum().to(student.accumulate_dtype)


@torch.library.custom_op("bigclass::compare_shards", mutates_args=())
def _compare(
    tensors: list[Tensor], teacher_tensors: list[Tensor], keep: Tensor | None, recipe: str, numbers: list[float], teacher_recipe: str,
    teacher_numbers: list[float], divergence: str, constants: list[float], plan: str, group: str, start: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    described = (recipe, numbers, teacher_recipe, teacher_numbers, divergence, constants, plan)
    student, teacher, kind, chosen = unpacked_pair(tensors, teacher_tensors, *described, scalar=False, grad=True)
    ranks = ranks_named(group)
    with autocast_off(student.device):
        found = pair.largest(student, teacher, keep, kind, chosen)
        merged = [_merged(one, start, ranks) for one in found]
        stats, top = torch.cat([t for one in merged for t in (one.m, one.rest)], 1), merged[1].top.squeeze(1)
        stats = torch.cat((stats, summed(pair.sums(student, teacher, keep, kind, chosen, stats, top - start), ranks)), 1)
    return [pair.values(kind, stats, keep), stats, top - start]


def _merged(mine: pair.Largest, start: int, ranks: Ranks) -> pair.Largest:
    """Of the classes of all ranks, `top` counted from the first rank's first."""
    m, rest, top = (all_of(t, ranks) for t in (mine.m, mine.rest, mine.top + start))
    whole = pair.Largest(m.shape[1], m)
    for q in range(ranks.size):
        whole.merge(m[q], rest[q], top[q])
    return whole


@_compare.register_fake
def _(tensors, teacher_tensors, keep, recipe, numbers, teacher_recipe, teacher_numbers, divergence, constants, plan, group, start, needs):
    student, _ = unpack(recipe, numbers, tensors)
    n, like = student.shape[0], tensors[0].new_empty((), dtype=student.accumulate_dtype)
    return [like.new_empty(n), like.new_empty((n, 4 + DIVERGENCES[divergence].width)), like.new_empty(n, dtype=torch.int64)]


def _context(ctx, inputs, output):
    tensors, teacher_tensors, keep, *constants, _, _, needs = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *teacher_tensors, *output[1:], *[t for t in (keep,) if t is not None])
    ctx.sizes, ctx.constants, ctx.needs = (len(tensors), len(teacher_tensors)), constants, needs


def _gradients(ctx, grads):
    refuse_create_graph()
    count, others = ctx.sizes
    made = [None] * count
    saved = list(ctx.saved_tensors)
    tensors, teacher_tensors, (stats, top, *rest) = saved[:count], saved[count : count + others], saved[count + others :]
    if grads[0] is not None and any(ctx.needs):
        if tensors[1].shape[0]:
            given = rows_backward_op(tensors, teacher_tensors, rest[0] if rest else None, stats, top, grads[0], *ctx.constants, ctx.needs)
        else:  # a rank without classes
            given = [torch.zeros_like(t) for t, need in zip(tensors, ctx.needs, strict=True) if need]
        made = spread(given, tensors, ctx.needs)
    return made, [None] * others, None, *[None] * (len(ctx.constants) + 3)


_compare.register_autograd(_gradients, setup_context=_context)

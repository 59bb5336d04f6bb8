"""The floors: matrix products into memory that is already there, and nothing else. A bias costs no product and is left out."""

from __future__ import annotations

import dataclasses

import torch

from .candidate import Call, Candidate, Outputs, Pass, need_memory
from .data import Problem
from .shapes import Shape

FLOOR = "bare GEMM"
FLOOR_FP32 = "bare GEMM fp32"

CLASS_TILES = (4096, 16384, 65536)


def floors_for(shape: Shape, dtype: torch.dtype) -> list[Candidate]:
    """The floors of `shape`; half types have a second one in fp32."""
    if shape.k:
        return [Candidate(FLOOR, "floor", "torch.mm over tiles of classes", _tiled, CLASS_TILES, "classes", ("forward",))]
    floors = [Candidate(FLOOR, "floor", "torch.mm: one forward, two backward", _whole)]
    if dtype in (torch.bfloat16, torch.float16):
        floors.append(Candidate(FLOOR_FP32, "floor", "the same products in fp32", _fp32))
    return floors


def _whole(problem: Problem, which: Pass, _: int | None) -> Call:
    x, w = problem.input, problem.linear_weight
    need_memory(problem, x.element_size())
    logits = torch.mm(x, w.T)  # real numbers for a backward alone, too: a GPU multiplies zeros faster

    def forward() -> Outputs:
        torch.mm(x, w.T, out=logits)
        return ()

    if which == "forward":
        return forward
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def backward() -> Outputs:
        torch.mm(logits, w, out=dx)
        torch.mm(logits.T, x, out=dw)
        return ()

    return backward if which == "backward" else lambda: forward() + backward()


def _fp32(problem: Problem, which: Pass, setting: int | None) -> Call:
    wide = dataclasses.replace(problem, input=problem.input.float(), linear_weight=problem.linear_weight.float())
    return _whole(wide, which, setting)


def _tiled(problem: Problem, _: Pass, tile: int | None) -> Call:
    assert tile is not None
    x, w = problem.input, problem.linear_weight
    buffer = x.new_empty(x.shape[0] * tile)  # flat, so that the last, narrower tile is contiguous too

    def call() -> Outputs:
        for part in w.split(tile):
            torch.mm(x, part.T, out=buffer[: x.shape[0] * part.shape[0]].view(x.shape[0], -1))
        return ()

    return call

"""Streams and folds across a custom op.

A custom op takes tensors, lists of tensors, numbers and strings. `pack` takes a stream and its folds apart into those three,
`unpack` puts them together again inside the op. Everything a map or a fold is lies in its registered name, its numbers and its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bigclass.core.folds import FOLDS, Fold
from bigclass.core.stream import MAPS, Stream

Packed = tuple[str, list[float], list[Tensor]]

_OPTIONAL = ("bias", "class_scale", "given", "scale_tensor")


def pack(stream: Stream, folds: Sequence[Fold]) -> Packed:
    """(recipe, numbers, tensors): e.g. recipe "1|00|bias||softcap,1,0|logsumexp,0,0,1,rows" with numbers (scale, filter, softcap)."""
    optional = "+".join([name for name in _OPTIONAL if getattr(stream, name) is not None])
    dtype = "" if stream.compute_dtype is None else str(stream.compute_dtype).removeprefix("torch.")
    maps = ";".join([f"{m.name},{len(m.numbers)},{len(m.tensors)}" for m in stream.maps])
    parts = ";".join([f"{f.name},{len(f.numbers)},{len(f.tensors)},{int(f.exclude_picks)},{f.axis}" for f in folds])
    numbers = [stream.scale, stream.grad_filter] + [v for m in stream.maps for v in m.numbers] + [v for f in folds for v in f.numbers]
    tensors = stream.tensors + [t for f in folds for t in f.tensors]
    return f"{len(stream.pairs)}|{int(stream.normalized)}{int(stream.bias_last)}|{optional}|{dtype}|{maps}|{parts}", numbers, tensors


def unpack(recipe: str, numbers: Sequence[float], tensors: Sequence[Tensor]) -> tuple[Stream, tuple[Fold, ...]]:
    """The stream and the folds of a packed recipe."""
    pairs, flags, optional, dtype, maps, parts = _parse(recipe)
    number, tensor = iter(numbers), iter(tensors)
    scale, grad_filter = next(number), next(number)
    operands = tuple([(next(tensor), next(tensor)) for _ in range(pairs)])
    named: dict[str, Any] = {name: next(tensor) for name in optional}
    made = tuple([MAPS[name](_take(number, count), _take(tensor, size)) for name, count, size in maps])
    folds = tuple([FOLDS[name](_take(number, count), _take(tensor, size), out, axis) for name, count, size, out, axis in parts])
    stream = Stream(
        operands, scale=scale, maps=made, compute_dtype=dtype, normalized=flags[0], bias_last=flags[1], grad_filter=grad_filter, **named
    )
    return stream, folds


def _take(source: Iterable, count: int) -> tuple:
    return tuple([v for _, v in zip(range(count), source, strict=False)])


@lru_cache(maxsize=256)
def _parse(recipe: str):
    pairs, flags, optional, dtype, maps, folds = recipe.split("|")
    return (
        int(pairs),
        tuple(flag == "1" for flag in flags),
        tuple(filter(None, optional.split("+"))),
        getattr(torch, dtype) if dtype else None,
        tuple((n, int(a), int(b)) for n, a, b in (m.split(",") for m in filter(None, maps.split(";")))),
        tuple((n, int(a), int(b), x == "1", axis) for n, a, b, x, axis in (f.split(",") for f in filter(None, folds.split(";")))),
    )

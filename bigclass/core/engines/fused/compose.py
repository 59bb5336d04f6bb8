"""The epilogue of a kernel, composed from the Triton forms of a stream's maps and folds.

The kernels are written once (kernels.py) and take what varies as compile-time functions: how logits are bent, how row states begin,
fold and merge, how a tile's gradient is made. Those are a few lines each, and differ only in which forms they call on which arguments, so
they are written out here as source text, one form after the other, and compiled like any other Triton function. For cross-entropy
under a soft cap the text of `bend` and `update` is

    def bend(z, tensors, numbers):
        return map_0_forward(z, numbers[0])

    def update(state, s, sx, live, livex, row0, class0, rows, cols, N, C, tensors, numbers, MASKED, PICKS, codes, references, stride, TMA):
        fold_0 = fold_0_lift(sx)
        fold_0 = fold_0_merge(state[0], state[1], fold_0[0], fold_0[1])
        return (fold_0[0], fold_0[1],)

s: the tile's logits, -inf where nothing counts. sx: the same with -inf at the picks too. live, livex: where they count, as masks.
tensors, numbers: everything the forms read, maps first (`Problem._parameters`); behind an N x C tensor stands the stride of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from bigclass.core.engines.fused import kernels
from bigclass.core.folds import Fold, SumFold
from bigclass.core.stream import Map
from bigclass.core.triton_form import define

_ARGUMENTS = "s, sx, live, livex, row0, class0, rows, cols, N, C, tensors, numbers, MASKED, PICKS"


@dataclass(frozen=True)
class Part:
    """What the text needs to know of a fold: no tensors, so that equal parts share a composition."""

    cls: type[Fold]
    numbers: int
    axes: tuple[str, ...]  # of its tensors
    exclude: bool
    columns: bool
    identity: tuple[float, ...]  # of each part of its state
    active: bool = False  # does a gradient reach it?
    literals: tuple[int, ...] = ()  # its numbers, where they are constants of the text
    saves: bool = False  # is it the one that saves its tiles (saved.py)?

    @property
    def sums(self) -> bool:
        return issubclass(self.cls, SumFold)


@dataclass(frozen=True)
class Composition:
    """The compile-time functions of one recipe."""

    bend: Any  # (z, tensors, numbers) -> s
    start: Any  # (BM) -> states of the row folds
    update: Any  # (state, tile...) -> state
    store: Any  # (state, pointers, offset of the split, rows, N)
    columns: Any  # (tile..., pointers, row block): writes the states of the column folds
    merge_rows: Any  # (state, state) -> state
    merge_columns: Any
    load_rows: Any  # (pointers, offset, index, n) -> state
    load_columns: Any
    store_columns: Any
    map_back: Any  # (g, z, tensors, numbers) -> dL/dz from g = dL/ds
    gradient: Any  # (z, tile..., reference) -> dL/dz, without the picks' own; of a saved tile z is e, and reference its rows' (saved.py)


def part_of(f: Fold, active: bool = False, saves: bool = False) -> Part:
    """The tensor-free part of a fold."""
    fill = tuple(float(t) for t in f.identity(1, torch.empty((), dtype=torch.float32)))
    axes = tuple(f.tensor_axes[: len(f.tensors)])
    literals = tuple([int(v) for v in f.numbers]) if f.literal_numbers else ()
    return Part(type(f), len(f.numbers), axes, f.exclude_picks, f.axis == "columns", fill, active, literals, saves)


def composition(maps: Sequence[Map], folds: Sequence[Part]) -> Composition:
    """The functions for these maps and folds; the same ones for the same recipe."""
    return _composition(tuple((type(m), len(m.tensors), len(m.numbers)) for m in maps), tuple(folds))


@lru_cache(maxsize=256)
def _composition(maps: tuple[tuple[type[Map], int, int], ...], folds: tuple[Part, ...]) -> Composition:
    names: dict[str, Any] = {"tl": tl, "grid": kernels.grid, "save": kernels.save, "__name__": f"{__name__}.composed"}
    for i, (cls, _, _) in enumerate(maps):
        for kind in ("forward", "backward"):
            _bind(names, f"map_{i}_{kind}", getattr(cls, f"{kind}_triton"))
    for i, f in enumerate(folds):
        for kind in ("term", "slope") if f.sums else ("lift", "merge", "gradient", "saving", "saved"):
            _bind(names, f"fold_{i}_{kind}", getattr(f.cls, f"{kind}_triton"))
    text = _Text(maps, folds)
    rows, columns = text.of_axis(False), text.of_axis(True)
    lines = (
        text.bend()
        + text.start(rows)
        + text.update(rows)
        + text.store("store", rows)
        + text.write_columns(columns)
        + text.merge("merge_rows", rows)
        + text.merge("merge_columns", columns)
        + text.load("load_rows", rows)
        + text.load("load_columns", columns)
        + text.store("store_columns", columns)
        + text.gradient()
    )
    define("\n".join(lines) + "\n", names)
    made: dict[str, Any] = {}
    for name in Composition.__dataclass_fields__:
        made[name] = names[name] = triton.jit(names[name])  # in `names` too: gradient calls map_back
    return Composition(**made)


def _bind(names: dict[str, Any], name: str, form: Any) -> None:
    if form is not None:
        names[name] = form.jit


class _Text:
    """The source text of the functions."""

    def __init__(self, maps: Sequence[tuple[type[Map], int, int]], folds: Sequence[Part]) -> None:
        self.maps, self.folds = maps, folds
        self.tensor = self.number = 0
        self.map_arguments = [self._arguments(tensors, numbers, scalar=True) for _, tensors, numbers in maps]
        self.tensor_numbers: list[list[int]] = []
        self.fold_numbers: list[list[str]] = []
        for f in folds:
            self.tensor_numbers.append([self.tensor + i + f.axes[:i].count("grid") for i in range(len(f.axes))])
            self.tensor += len(f.axes) + f.axes.count("grid")
            self.fold_numbers.append([str(v) for v in f.literals] or [f"numbers[{self.number + i}]" for i in range(f.numbers)])
            self.number += f.numbers
        self.states = self.tensor  # where the gradient's states and their gradients begin among the tensors

    def _arguments(self, tensors: int, numbers: int, scalar: bool) -> list[str]:
        """Of a map: its tensors are scalars."""
        out = [f"tl.load(tensors[{self.tensor + i}]).to(tl.float32)" for i in range(tensors)]
        out += [f"numbers[{self.number + i}]" for i in range(numbers)]
        self.tensor += tensors
        self.number += numbers
        return out

    def of_axis(self, columns: bool) -> list[int]:
        return [i for i, f in enumerate(self.folds) if f.columns == columns]

    def bend(self) -> list[str]:
        lines = ["def bend(z, tensors, numbers):"]
        for i, arguments in enumerate(self.map_arguments):
            lines.append(f"    z = map_{i}_forward({', '.join(['z', *arguments])})")
        lines += ["    return z", "", "def map_back(g, z, tensors, numbers):", "    z_0 = z"]
        for i, arguments in enumerate(self.map_arguments):
            lines.append(f"    z_{i + 1} = map_{i}_forward({', '.join([f'z_{i}', *arguments])})")
        for i in range(len(self.maps) - 1, -1, -1):
            lines.append(f"    g = map_{i}_backward({', '.join(['g', f'z_{i}', f'z_{i + 1}', *self.map_arguments[i]])})")
        return [*lines, "    return g", ""]

    def start(self, folds: list[int]) -> list[str]:
        parts = [f"tl.full((BM,), {_literal(v)}, tl.float32)" for i in folds for v in self.folds[i].identity]
        return ["def start(BM: tl.constexpr):", f"    return {_tuple(parts or ['tl.zeros((BM,), tl.float32)'])}", ""]

    def update(self, folds: list[int]) -> list[str]:
        lines = [f"def update(state, {_constexpr(_ARGUMENTS)}, codes, references, stride, TMA: tl.constexpr):"]
        out, at = [], 0
        for i in folds:
            width = len(self.folds[i].identity)
            lines += self._lift(i)
            if self.folds[i].sums:
                out.append(f"state[{at}] + fold_{i}_0")
            else:
                mine, other = [f"state[{at + k}]" for k in range(width)], [f"fold_{i}_{k}" for k in range(width)]
                lines += self._call(f"fold_{i}", "merge", i, mine + other, width)
                out += other
            at += width
        return [*lines, f"    return {_tuple(out) if out else 'state'}", ""]

    def _tile(self, i: int) -> tuple[str, str]:
        """The fold's tile and its mask, transposed for a column fold."""
        s, live = ("sx", "livex") if self.folds[i].exclude else ("s", "live")
        return (f"tl.trans({s})", f"tl.trans({live})") if self.folds[i].columns else (s, live)

    def _masked(self, i: int) -> str:
        return "MASKED or PICKS" if self.folds[i].exclude else "MASKED"

    def _load_tensors(self, i: int) -> tuple[list[str], list[str]]:
        """Lines that load the fold's tensors, and their names, broadcastable to its tile."""
        lines, names = [], []
        for number, axis in zip(self.tensor_numbers[i], self.folds[i].axes, strict=True):
            name = f"t_{number}"
            names.append(name)
            if axis == "grid":
                where = f"tensors[{number}], row0, class0, tensors[{number + 1}], N, C, rows.shape[0], cols.shape[0]"
                lines.append(f"    {name} = grid({where})")
                if self.folds[i].columns:
                    lines.append(f"    {name} = tl.trans({name})")
                continue
            along_rows = (axis == "kept") != self.folds[i].columns
            index, size = ("rows", "N") if along_rows else ("cols", "C")
            expand = "[:, None]" if axis == "kept" else "[None, :]"
            lines.append(f"    {name} = tl.load(tensors[{number}] + {index}, mask={index} < {size}, other=0.0).to(tl.float32){expand}")
        return lines, names

    def _call(self, name: str, kind: str, i: int, arguments: list[str], width: int) -> list[str]:
        call = f"fold_{i}_{kind}({', '.join(arguments)})"
        if width == 1:
            return [f"    {name}_0 = {call}"]
        return [f"    {', '.join(f'{name}_{k}' for k in range(width))} = {call}"]

    def _lift(self, i: int) -> list[str]:
        """Lines that leave the fold's state of this tile in fold_i_0, fold_i_1, ..."""
        lines, tensors = self._load_tensors(i)
        tile, mask = self._tile(i)
        arguments = [tile, *tensors, *self.fold_numbers[i]]
        if self.folds[i].saves:
            lines.append(f"    fold_{i}_0, fold_{i}_1, e = fold_{i}_saving({', '.join(arguments)})")
            return [*lines, f"    save(codes, references, e, fold_{i}_0, row0, class0, rows, cols, N, stride, TMA)"]
        if not self.folds[i].sums:
            return lines + self._call(f"fold_{i}", "lift", i, arguments, len(self.folds[i].identity))
        lines.append(f"    fold_{i}_tile = fold_{i}_term({', '.join(arguments)})")
        lines.append(f"    if {self._masked(i)}:")
        lines.append(f"        fold_{i}_tile = tl.where({mask}, fold_{i}_tile, 0.0)")
        return [*lines, f"    fold_{i}_0 = tl.sum(fold_{i}_tile, axis=1)"]

    def write_columns(self, folds: list[int]) -> list[str]:
        lines = [f"def columns({_constexpr(_ARGUMENTS)}, out, offset):"]
        at = 0
        for i in folds:
            lines += self._lift(i)
            for k in range(len(self.folds[i].identity)):
                lines.append(f"    tl.store(out[{at}] + offset + cols, fold_{i}_{k}, mask=cols < C)")
                at += 1
        return [*lines, "    pass", ""]

    def merge(self, name: str, folds: list[int]) -> list[str]:
        lines, out, at = [f"def {name}(a, b):"], [], 0
        for i in folds:
            width = len(self.folds[i].identity)
            mine, other = [f"a[{at + k}]" for k in range(width)], [f"b[{at + k}]" for k in range(width)]
            if self.folds[i].sums:
                out.append(f"{mine[0]} + {other[0]}")
            else:
                lines += self._call(f"fold_{i}", "merge", i, mine + other, width)
                out += [f"fold_{i}_{k}" for k in range(width)]
            at += width
        return [*lines, f"    return {_tuple(out) if out else 'a'}", ""]

    def load(self, name: str, folds: list[int]) -> list[str]:
        count = sum(len(self.folds[i].identity) for i in folds)
        parts = [f"tl.load(pointers[{k}] + offset + index, mask=index < n, other=0.0)" for k in range(count)]
        return [f"def {name}(pointers, offset, index, n):", f"    return {_tuple(parts or ['0.0'])}", ""]

    def store(self, name: str, folds: list[int]) -> list[str]:
        count = sum(len(self.folds[i].identity) for i in folds)
        lines = [f"    tl.store(pointers[{k}] + offset + index, state[{k}], mask=index < n)" for k in range(count)]
        return [f"def {name}(state, pointers, offset, index, n):", *lines, "    pass", ""]

    def gradient(self) -> list[str]:
        lines = [f"def gradient(z, {_constexpr(_ARGUMENTS)}, reference):"]
        at, made = self.states, []
        for i, f in enumerate(self.folds):
            if not f.active:
                continue
            load, tensors = self._load_tensors(i)
            lines += load
            tile, mask = self._tile(i)
            index, size = ("cols", "C") if f.columns else ("rows", "N")
            vectors = []
            count = len(f.identity) + sum(f.cls.differentiable)
            for _ in range(count):
                lines.append(f"    v_{at} = tl.load(tensors[{at}] + {index}, mask={index} < {size}, other=0.0)")
                vectors.append(f"v_{at}")
                at += 1
            if f.sums:
                lines.append(f"    g_{i} = fold_{i}_slope({', '.join([tile, *tensors, *self.fold_numbers[i]])}) * {vectors[-1]}[:, None]")
                lines.append(f"    g_{i} = tl.broadcast_to(g_{i}, {tile}.shape)")
            elif f.saves:
                lines.append(f"    g_{i} = fold_{i}_saved(z, reference, {', '.join(vectors)})")
            else:
                lines.append(f"    g_{i} = fold_{i}_gradient({', '.join([tile, *vectors, *tensors, *self.fold_numbers[i]])})")
            if f.exclude:
                lines.append("    if PICKS:")
                lines.append(f"        g_{i} = tl.where({mask}, g_{i}, 0.0)")
            made.append(f"tl.trans(g_{i})" if f.columns else f"g_{i}")
        lines.append(f"    g = {' + '.join(made) if made else 'tl.zeros_like(z)'}")
        if any(f.saves for f in self.folds) and self.maps:  # one map, whose slope its output tells
            return [*lines, f"    return map_0_backward({', '.join(['g', 's', 's', *self.map_arguments[0]])})", ""]
        if any(f.saves for f in self.folds):
            return [*lines, "    return g", ""]
        return [*lines, "    return map_back(g, z, tensors, numbers)", ""]


def _constexpr(arguments: str) -> str:
    return arguments.replace("MASKED", "MASKED: tl.constexpr").replace("PICKS", "PICKS: tl.constexpr")


def _tuple(parts: Sequence[str]) -> str:
    return f"({', '.join(parts)},)"


def _literal(value: float) -> str:
    return f'float("{value}")'

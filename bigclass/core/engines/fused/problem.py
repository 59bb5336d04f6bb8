"""The part of a problem that one launch sees, and its launches: what each kernel is told.

Every tensor is cut to the launch's rows and classes; only picks count from the first class of all. Sums over launches: __init__.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigclass.core.engines.fused import compose, kernels, launch
from bigclass.core.engines.fused.saved import Saved
from bigclass.core.engines.support import interpreting
from bigclass.core.engines.tiles import Span
from bigclass.core.folds import Fold, State, SumFold
from bigclass.core.stream import Stream


@dataclass(frozen=True)
class Picks:
    """Class indices of each row. sorted: (N, K) int32, ascending, -1 (none) first. order: where each came from, None for K = 1."""

    sorted: Tensor
    order: Tensor | None

    @classmethod
    def of(cls, picks: Tensor | None) -> Picks | None:
        if picks is None:
            return None
        if picks.shape[1] < 2:
            return cls(picks.to(torch.int32).contiguous(), None)
        ordered, order = picks.contiguous().sort(1)
        return cls(ordered.to(torch.int32), order)

    def back(self, t: Tensor) -> Tensor:
        """t (N, K) in the caller's order."""
        return t if self.order is None else torch.empty_like(t).scatter_(1, self.order, t)

    def rows(self, r: Span) -> Picks:
        """Those of rows r."""
        return Picks(self.sorted[r.start : r.stop], None if self.order is None else self.order[r.start : r.stop])

    def there(self, t: Tensor) -> Tensor:
        """t (N, K), given in the caller's order, in ours."""
        return t.contiguous() if self.order is None else t.gather(1, self.order)


@dataclass(frozen=True)
class Problem:
    """The part of a problem that one launch sees: every tensor is cut to its rows and classes; only picks count from `class_base`.

    pairs: operands in the type of their products. stored: (N, C) their products in fp32, if made already; pairs are then not read.
    saved: its logits in 16 bits; pairs are then read for picks under a map alone.
    """

    stream: Stream
    folds: tuple[Fold, ...]
    pairs: tuple[tuple[Tensor, Tensor], ...]
    n: int
    c: int
    picks: Tensor | None
    class_base: int = 0
    stored: Tensor | None = None
    saved: Saved | None = None

    @property
    def k(self) -> int:
        return 0 if self.picks is None else self.picks.shape[1]

    def cut(
        self, r: Span, c: Span, pairs: tuple[tuple[Tensor, Tensor], ...] = (), stored: Tensor | None = None, saved: Saved | None = None
    ) -> Problem:
        """Rows r and classes c of it, with these operands."""
        if (r.start, r.stop, c.start, c.stop) == (0, self.n, 0, self.c):
            return replace(self, pairs=pairs, stored=stored, saved=saved)

        def part(t: Tensor, axis: str) -> Tensor:
            if axis == "grid":
                return t[r.start : r.stop, c.start : c.stop]
            return t[r.start : r.stop] if axis == "rows" else t[c.start : c.stop]

        def optional(t: Tensor | None, axis: str = "classes") -> Tensor | None:
            return None if t is None else part(t, axis)

        def of_fold(f: Fold, axis: str) -> str:
            return axis if axis == "grid" else "rows" if (axis == "kept") == (f.axis == "rows") else "classes"

        st = self.stream
        stream = replace(st, bias=optional(st.bias), class_scale=optional(st.class_scale), given=optional(st.given, "grid"))

        def cut_fold(f: Fold) -> Fold:
            return replace(f, tensors=tuple([part(t, of_fold(f, a)) for t, a in zip(f.tensors, f.tensor_axes, strict=False)]))

        folds = tuple([cut_fold(f) for f in self.folds])
        return Problem(stream, folds, pairs, r.size, c.size, optional(self.picks, "rows"), self.class_base + c.start, stored, saved)

    def _shared(self, config: launch.Config) -> tuple[list[Any], list[Any], dict[str, Any], Tensor]:
        """What both kernels are told of the stream: leading pointers, sizes and strides, constants; and any tensor, to fill gaps."""
        st = self.stream
        pairs = [(x, w) for x, w in self.pairs] if self.stored is None else []
        tma = config.tma and bool(pairs) and launch.describable([t for pair in pairs for t in pair])
        pointers, sizes, strides = [], [], []
        for x, w in pairs:
            pointers += [launch.operand(x, config.BM, config.BK, tma), launch.operand(w, config.BN, config.BK, tma)]
            sizes.append(x.shape[1])
            strides += [x.stride(0), w.stride(0)]
        missing = 2 - len(pairs)
        pointers += [None] * (2 * missing)
        pointers += [self.stored, st.class_scale, st.given, st.bias, st.scale_tensor]
        sizes += [0] * missing
        strides += [0] * (2 * missing) + [0 if t is None else t.stride(0) for t in (self.stored, st.given)]
        dtype = pairs[0][0].dtype if pairs else torch.float32
        constants = {
            "BM": config.BM,
            "BN": config.BN,
            "BK": config.BK,
            "GROUP": config.group,
            "TMA": tma,
            "EVEN_D": all(d % config.BK == 0 for d in sizes),
            "SCALED": st.scale != 1.0,
            "BIAS_LAST": st.bias_last,
            "PRECISION": launch.precision(dtype) if pairs else "ieee",
            "INTERPRETED": interpreting(),
        }
        filler = next(t for t in (self.stored, *[t for pair in pairs for t in pair], st.given) if t is not None)
        return pointers, sizes + strides, constants, filler

    def _parameters(self) -> tuple[list[Any], list[float]]:
        """What maps and folds read, in the order of their composition; an N x C tensor is followed by the stride of its rows."""
        st = self.stream
        tensors: list[Any] = [t for m in st.maps for t in m.tensors]
        for f in self.folds:
            for t, axis in zip(f.tensors, f.tensor_axes, strict=False):
                tensors += [t, t.stride(0)] if axis == "grid" else [t]
        return tensors, [v for m in st.maps for v in m.numbers] + [v for f in self.folds for v in f.numbers]

    def _config(self, folds: Sequence[Fold], *, searched: bool, bent: bool = False) -> launch.Config:
        """The tile for these folds. searched: must a tile look for its picks, beyond leaving one a row out?"""
        given, mapped = self.stream.given is not None, bool(self.stream.maps)
        weight = launch.weight(folds, given=given, searched=searched, mapped=mapped, bent=bent)
        if self.saved is not None:
            return launch.saving_config(launch.architecture(self.stream.device), weight)
        dtype = torch.float32 if self.stored is not None else self.pairs[0][0].dtype
        described = self.stored is not None or launch.describable([t for pair in self.pairs for t in pair])
        return launch.config(launch.architecture(self.stream.device), dtype, weight, described=described, products=self.stored is None)

    def fold(self, picked: Tensor | None) -> list[State]:
        """The states of the folds, each part (N,) or (C,). Picked logits are written to `picked` (N, K), in the picks' order, and all
        logits to `saved`, if there is one.

        A pick must not exceed a log-sum-exp that counts it, so it is then read from the tile itself, with the rounding it has there.
        Where all folds (sums aside) leave the picks out there is nothing to compare, and reading them apart spares every tile the work.
        """
        exclude = self.k > 0 and any(f.exclude_picks for f in self.folds)
        read = self.k > 0 and not all(f.exclude_picks or isinstance(f, SumFold) for f in self.folds)
        config, device = self._config(self.folds, searched=self.k > 1 or read), self.stream.device
        made = compose.composition(self.stream.maps, self._parts([True] * len(self.folds)))
        codes, references, codes_stride, tma_codes = None, None, 0, False
        if self.saved is not None:
            codes, references, codes_stride = self.saved.whole_tiles, self.saved.references, self.saved.codes.stride(0)
            tma_codes = config.tma and launch.describable([codes])
            codes = launch.operand(codes, config.BM, config.BN, tma_codes)
        bands = -(-self.n // config.BM)
        splits, each = launch.split_classes(bands, -(-self.c // config.BN), config.group, device)
        rows, columns = self._states("rows", splits, self.n), self._states("columns", bands, self.c)
        pointers, numbers_of, constants, filler = self._shared(config)
        tensors, numbers = self._parameters()
        if self.k > 0 and not read:
            self.read_picks(made, picked)
        launch.start(
            kernels.fold,
            bands * splits,
            device,
            [*pointers, self.picks if exclude or read else None, picked, _tuple(tensors, filler), _tuple(rows, filler),
             _tuple(columns, filler), codes, references, self.stream.scale, _tuple(numbers, 0.0), self.class_base, self.n, self.c, self.k,
             *numbers_of, codes_stride, each, splits],
            constants | {"BEND": made.bend, "START": made.start, "UPDATE": made.update, "STORE": made.store, "COLUMNS": made.columns,
                         "HAS_COLUMNS": bool(columns), "ONE_PICK": self.k == 1, "READ": read, "EXCLUDE": exclude,
                         "TMA_CODES": tma_codes},
            config,
        )  # fmt: skip
        rows = merged(rows, made.load_rows, made.merge_rows, made.store)
        columns = merged(columns, made.load_columns, made.merge_columns, made.store_columns)
        taken = {"rows": iter(rows), "columns": iter(columns)}
        return [tuple([next(taken[f.axis]) for _ in f.differentiable]) for f in self.folds]

    def _parts(self, active: Sequence[bool]) -> list[compose.Part]:
        """The folds without their tensors. active: which of them a gradient reaches."""
        saves = [self.saved is not None and f.can_save() for f in self.folds]
        return [compose.part_of(f, *flags) for f, *flags in zip(self.folds, active, saves, strict=True)]

    def _droppable(self) -> bool:
        """May the picks' stored logits be -inf instead of being searched for in each tile? Nothing must turn that into something else."""
        st = self.stream
        plain = not st.maps and st.scale_tensor is None and st.class_scale is None and st.given is None and st.scale > 0.0
        return self.stored is not None and plain and all(isinstance(f, SumFold) and f.vanishes and f.exclude_picks for f in self.folds)

    def _drop_picks(self) -> None:
        assert self.stored is not None and self.picks is not None
        launch.start(
            kernels.drop_picks, -(-self.n // launch.MERGE_BLOCK), self.stored.device,
            [self.picks, self.stored, self.class_base, self.n, self.c, self.k, self.stored.stride(0)], {"BLOCK": launch.MERGE_BLOCK},
        )  # fmt: skip

    def _states(self, axis: str, count: int, n: int) -> list[Tensor]:
        like = self.stream.tensors[0]
        parts = sum(len(f.differentiable) for f in self.folds if f.axis == axis)
        return [like.new_empty((count, n), dtype=torch.float32) for _ in range(parts)]

    def gradient(
        self, states: Sequence[State], grads: Sequence[Sequence[Tensor | None]], keep: Tensor | None, out: Tensor, boost: float,
        found: list[State] | None = None,
    ) -> Tensor | None:  # fmt: skip
        """out (N, C) = boost dL/dz but for the picks, whose entries mean nothing yet. What the folds gave there, for `add_picks`.

        states, grads: of each fold, flat vectors. found: takes the states of these classes, of sums over rows, from the same pass.
        """
        active = [any(g is not None for g in parts) for parts in grads]
        excluded = [f.exclude_picks for f, there in zip(self.folds, active, strict=True) if there]
        # At the picks the tile is written over, from fp32 and once: with h alone where all folds leave them out, else with what the folds
        # that count them gave there, which the tile then notes apart. A group must not see its picks either, one of which may be largest.
        folds = [f for f, there in zip(self.folds, active, strict=True) if there]
        noted = self.k > 0 and (not all(excluded) or any(f.group > 1 for f in folds))
        searched = self.picks if noted else None
        base = out.new_empty((self.n, self.k), dtype=torch.float32) if noted else None
        made = compose.composition(self.stream.maps, self._parts(active))
        tensors, numbers = self._parameters()
        for f, state, parts, there in zip(self.folds, states, grads, active, strict=True):
            if there:
                tensors += [t.contiguous() for t in state]
                given = [g for g, d in zip(parts, f.differentiable, strict=True) if d]
                tensors += [torch.zeros_like(state[0]) if g is None else g.float().contiguous() for g in given]
        folded, dropped = found is not None, False
        exclude = noted and any(excluded)
        if folded and self.k > 0 and any(f.exclude_picks for f in self.folds):
            dropped = self._droppable()
            if dropped:
                self._drop_picks()
            else:
                searched, exclude = self.picks, True
        if self.saved is not None:
            self._saved_gradient(self.saved, made, searched, base, keep, tensors, numbers, out, exclude)
            return base
        device = self.stream.device
        if folded:
            config = self._config(self.folds, searched=self.k > 1, bent=True)
        else:
            config = self._config(folds, searched=noted, bent=bool(self.stream.maps))
        rows = self._states("rows", -(-self.c // config.BN), self.n) if folded else []
        pointers, numbers_of, constants, filler = self._shared(config)
        tma_out = config.tma and launch.describable([out])
        launch.start(
            kernels.gradient,
            -(-self.n // config.BM) * -(-self.c // config.BN),
            device,
            [*pointers, searched, base, keep, _tuple(tensors, filler), _tuple(rows, filler),
             launch.operand(out, config.BM, config.BN, tma_out), self.stream.scale, boost, _tuple(numbers, 0.0),
             self.class_base, self.n, self.c, self.k, *numbers_of, out.stride(0)],
            constants | {"BEND": made.bend, "START": made.start, "UPDATE": made.update, "STORE": made.store, "GRADIENT": made.gradient,
                         "ONE_PICK": self.k == 1, "EXCLUDE": exclude, "FOLDED": folded, "DROPPED": dropped,
                         "SUMS": all(isinstance(f, SumFold) for f in self.folds),
                         "BOOSTED": boost != 1.0, "TMA_OUT": tma_out},
            config,
        )  # fmt: skip
        if found is not None:
            taken = iter(merged(rows, made.load_rows, made.merge_rows, made.store))
            found += [tuple([next(taken) for _ in f.differentiable]) for f in self.folds]
        return base

    def _saved_gradient(
        self, saved: Saved, made: compose.Composition, searched: Tensor | None, base: Tensor | None, keep: Tensor | None,
        tensors: Sequence[Any], numbers: Sequence[float], out: Tensor, exclude: bool,
    ) -> None:  # fmt: skip
        """`gradient` from saved logits. out: its rows reach to the end of a last, ragged tile."""
        config, codes = launch.saved_config(saved.width), saved.codes
        launch.start(
            kernels.saved_gradient,
            -(-self.n // config.BM) * -(-self.c // config.BN),
            out.device,
            [codes, saved.references, searched, base, keep, _tuple(tensors, codes), out, _tuple(numbers, 0.0), self.class_base, self.n,
             self.c, self.k, codes.stride(0), out.stride(0)],
            {"GRADIENT": made.gradient, "MAPPED": bool(self.stream.maps), "ONE_PICK": self.k == 1, "EXCLUDE": exclude, "BM": config.BM,
             "BN": config.BN, "INTERPRETED": interpreting()},
            config,
        )  # fmt: skip

    def add_picks(self, h: Tensor | None, base: Tensor | None, out: Tensor, boost: float) -> None:
        """The picks' entries of out (N, C). h: (N, K) in the picks' order, 0 where a row does not count. base: of `gradient`."""
        if self.k == 0:
            return
        if h is None:
            h = out.new_zeros((self.n, self.k), dtype=torch.float32)
        made = compose.composition(self.stream.maps, [])
        pointers, numbers_of, constants, filler = self._shared(launch.ROWS)
        tensors, numbers = self._parameters()
        launch.start(
            kernels.add_picks,
            -(-self.n // launch.ROWS.BM),
            self.stream.device,
            [*pointers, self.picks, h, base, _tuple(tensors, filler), out, self.stream.scale, boost, _tuple(numbers, 0.0), self.class_base,
             self.n, self.c, self.k, *numbers_of, out.stride(0)],
            {"MAP_BACK": made.map_back, "HAS_MAPS": bool(self.stream.maps),
             "BLOCK": launch.ROWS.BM, "BK": launch.ROWS.BK, "SCALED": constants["SCALED"], "BIAS_LAST": constants["BIAS_LAST"],
             "INTERPRETED": interpreting()},
            launch.ROWS,
        )  # fmt: skip

    def read_picks(self, made: compose.Composition, picked: Tensor | None) -> None:
        pointers, numbers_of, constants, filler = self._shared(launch.ROWS)
        tensors, numbers = self._parameters()
        launch.start(
            kernels.read_picks,
            -(-self.n // launch.ROWS.BM),
            self.stream.device,
            [*pointers, self.picks, picked, _tuple(tensors, filler), self.stream.scale, _tuple(numbers, 0.0),
             self.class_base, self.n, self.c, self.k, *numbers_of],
            {"BEND": made.bend, "BLOCK": launch.ROWS.BM, "BK": launch.ROWS.BK, "SCALED": constants["SCALED"],
             "BIAS_LAST": constants["BIAS_LAST"]},
            launch.ROWS,
        )  # fmt: skip


def flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else rowwise(t)


def _tuple(values: Sequence[Any], filler: Any) -> tuple[Any, ...]:
    """A tuple argument; never an empty one, which a kernel could not take."""
    return tuple(values) or (filler,)


def merged(parts: list[Tensor], load: Any, merge: Any, store: Any) -> list[Tensor]:
    """States (count, n) merged to (n,)."""
    if not parts or parts[0].shape[0] == 1:
        return [t.view(-1) for t in parts]
    count, n = parts[0].shape
    out = [t.new_empty(n) for t in parts]
    launch.start(
        kernels.merge, -(-n // launch.MERGE_BLOCK), out[0].device, [tuple(parts), tuple(out), n, count],
        {"LOAD": load, "MERGE": merge, "STORE": store, "BLOCK": launch.MERGE_BLOCK},
    )  # fmt: skip
    return out


def picks_shape(picks: Picks) -> tuple[int, int]:
    """(N, K)"""
    return picks.sorted.shape[0], picks.sorted.shape[1]


def rowwise(t: Tensor) -> Tensor:
    """t with the elements of a row side by side, as the kernels read it. Rows may lie anywhere, also all in one place."""
    return t if t.stride(-1) == 1 else t.contiguous()

"""What the certified filter (filter.py) leaves out of a block of rows, put back as one outer product for each slab of classes.

Small columns are many, and they have much in common: on each row they are about as popular as they always are. Left out, they take the
mean of their rows of w from dx, which on a trained language model is 20 times what their norm would let one think. So with D the dropped
part of dL/dz (r, c) in a slab,

    m = D 1   (r,)  what each row dropped    a = D^T m / ||m||^2   (c,)    D is replaced by m a^T:   dx += m (a^T w)   dw += a (m^T x)

m a^T is the projection of D on m, so ||D - m a^T||^2 = ||D||^2 - ||m||^2 ||a||^2: whatever D is, the filter's promise holds, and what is
known to be back comes off what it reports. Each row's sum is right (D 1 = m a^T 1). At 2^-8, hidden states of the demo's model after 1,200
steps: relative error of dx 8.7e-2 without, 7.6e-3 with it; of dw 3.3e-3 and 1.5e-3 (benchmarks/filter_study.py).

Cost: two passes over the logits at hand, G 1 and G^T m (one, where sums of whole rows are known), and one over w and dw for as many blocks
as wait for it (`WAITING`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigclass.core.engines.tiles import WIDE_OUTPUT, Span, TileMaker

WAITING = 16  # blocks whose outer products are added together, at most: each takes C numbers until then


@dataclass(frozen=True, slots=True)
class Tail:
    """D of a block of rows and a slab of classes, about m a^T. m: (r,). a: (c,), 0 where nothing was dropped. back: () ||m a^T||^2."""

    m: Tensor
    a: Tensor
    back: Tensor

    @classmethod
    def of(cls, g: Tensor, drop: Tensor, m: Tensor | None = None, factor: Tensor | None = None) -> Tail:
        """g: (r, c) dL/dz, or with a factor (r,) what its rows are to be multiplied by. drop: (c,) bool, its columns that were dropped.

        m: (r,) D 1, if it is known (beside a factor it must be). All numbers come in fp32 (fp64)."""
        wide = torch.promote_types(g.dtype, torch.float32)
        if m is None:
            m = matvec(g, drop.to(wide))
        peak = m.abs().amax()
        there = drop.any() & (peak > 0) & peak.isfinite()  # where nothing is dropped g may hold NaN
        # squares of gradients of a mean over many rows would underflow; rounded to g's type here, m is the m of both products
        m = torch.where(there, m / peak, 0.0).to(g.dtype).to(wide)
        a = torch.where(drop & there, matvec(g.t(), m if factor is None else m * factor) / m.square().sum(), 0.0)
        return cls(m, a, m.square().sum() * a.square().sum())


def matvec(t: Tensor, v: Tensor) -> Tensor:
    """t v in v's type, which may be wider than that of t: its products are then of t's type, and summed in v's."""
    if t.dtype == v.dtype:
        return torch.mv(t, v)
    narrow = v.to(t.dtype)
    if t.device.type in WIDE_OUTPUT:
        return torch.mm(t, narrow.unsqueeze(1), out_dtype=v.dtype).squeeze(1)
    return torch.mv(t.to(v.dtype), narrow.to(v.dtype))


class Tails:
    """Tails of blocks over all slabs, added to dx and to dw some blocks at a time."""

    def __init__(self, maker: TileMaker, dx: Sequence[Tensor | None], dw: Sequence[Tensor | None], waiting: int = WAITING) -> None:
        """dx: (N, D_p) finished gradients. dw: (C, D_p) sums, without the scale of the classes. waiting: blocks added together."""
        self.maker, self.dx, self.dw, self._most = maker, dx, dw, waiting
        self._waiting: list[tuple[Span, Tensor, list[Tensor], list[Tensor]]] = []  # rows, m (r, slabs), a of each slab, m^T x of each pair

    def add(self, rows: Span, tails: Sequence[Tail], slabs: Sequence[Span], xs: Sequence[Tensor]) -> None:
        """tails: of the block `rows`, one a slab. xs: its features, of each pair."""
        m = torch.stack([tail.m for tail in tails], 1)
        self._waiting.append((rows, m, [tail.a for tail in tails], [m.t() @ x for x in xs]))
        if len(self._waiting) >= self._most:
            self.flush(slabs)

    def flush(self, slabs: Sequence[Span]) -> None:
        """Add what waits."""
        if not self._waiting:
            return
        maker, st = self.maker, self.maker.stream
        bars = [torch.stack(of_pair, 1) for of_pair in zip(*[bars for *_, bars in self._waiting], strict=True)]  # (slabs, blocks, D)
        sums = [torch.zeros_like(bar) for bar in bars]
        for s, c in enumerate(slabs):
            a = torch.stack([of_slab[s] for _, _, of_slab, _ in self._waiting])  # (blocks, c)
            scaled = a if st.class_scale is None else a * st.class_scale[c.start : c.stop].to(a.dtype)
            for bar, total, dx, dw, w in zip(bars, sums, self.dx, self.dw, maker.slab(c), strict=True):
                if dx is not None:
                    torch.mm(scaled, w, out=total[s])
                if dw is not None:
                    dw[c.start : c.stop].addmm_(a.t(), bar[s], alpha=maker.alpha)
        for total, dx in zip(sums, self.dx, strict=True):
            if dx is None:
                continue
            for i, (rows, m, _, _) in enumerate(self._waiting):
                maker.rows.add(dx, rows, (m @ total[:, i]).mul_(maker.alpha))
        self._waiting.clear()

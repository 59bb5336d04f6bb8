"""A tile of dL/dz that is still what a lone log-sum-exp left of its logits, e^(s - m): without its rows' factors and without its picks.

Under a filter most of a tile takes part in no product. Its norms, sums and tail follow from the exponentials and the factors (r,), so that
only what is multiplied is scaled, in the copy that the product needs anyway. Of kept tiles, which lie in memory, that saves a pass and a
write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigclass.core.engines.tiles import Span, Where


@dataclass(frozen=True, slots=True)
class Unscaled:
    """What turns e (r, c), 0 at the picks, into dL/dz.

    factor: (r,). sums: (r,) of the rows of e times factor. where: its picks. h: (r, K) what to put there.
    """

    factor: Tensor
    sums: Tensor
    where: Where
    h: Tensor | None

    def complete(self, e: Tensor, rows: Span) -> Tensor:
        """dL/dz of some rows, in their place."""
        g = e[rows.start : rows.stop].mul_(self.factor[rows.start : rows.stop].unsqueeze(1))
        return self._add_picks(g, None, rows, e.shape[1])

    def gather(self, e: Tensor, some: Tensor, rows: Span, out: Tensor) -> tuple[Tensor, Tensor]:
        """(dL/dz of some rows and of the columns `some`, ascending; the sums of its rows without the picks), the first in `out`."""
        # a gather, for it takes two thirds of the time of the same index_select
        g = torch.gather(e[rows.start : rows.stop], 1, some.expand(rows.size, -1), out=out)
        g.mul_(self.factor[rows.start : rows.stop].unsqueeze(1))
        sums = g.sum(1)
        return self._add_picks(g, some, rows, e.shape[1]), sums

    def _add_picks(self, g: Tensor, some: Tensor | None, rows: Span, columns: int) -> Tensor:
        if self.where is None or self.h is None or not g.numel():
            return g
        at, inside = (t[rows.start : rows.stop] for t in self.where)
        at = at % max(columns, 1)
        if some is not None:
            place = torch.searchsorted(some, at).clamp_max_(some.numel() - 1)
            inside, at = inside & (some[place] == at), place
        return g.scatter_add_(1, torch.where(inside, at, 0), torch.where(inside, self.h[rows.start : rows.stop], 0.0))

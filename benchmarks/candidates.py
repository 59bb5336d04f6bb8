"""Who takes part: the floors, the dense loss and the peers, and bigclass."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .candidate import Candidate
from .floors import floors_for
from .ours import ours_for
from .peers import peers_for
from .shapes import Shape


def candidates_for(shape: Shape, dtype: torch.dtype, only: Collection[str] | None = None) -> list[Candidate]:
    """Everyone who takes part on `shape`, floors first; of these `only` the named, where given."""
    everyone = [*floors_for(shape, dtype), *peers_for(shape), *ours_for(shape)]
    return [candidate for candidate in everyone if only is None or candidate.name in only]

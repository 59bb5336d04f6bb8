"""The operands of a problem: what its logits look like.

For a loss, with z, n standard normal, e_i the row's class vector and ^ a vector scaled to length 1:

    flat     w_j = n_j / sqrt(D), x_i = z_i, y uniform. Logits are standard normal: an untrained head; loss about log C + 1/2.
    early    a head after a few steps: it knows how frequent classes are and nothing else. Logits are 0.1 x normal plus the class's
             centred log-frequency / 4; y drawn by frequency (Zipf). No probability is above some tens of 1/C.
    peaked   a trained head: x_i points at its class by a margin that varies from row to row, and at 8 rivals by a little less,
             y drawn by frequency (Zipf). Loss about 1.4 from D = 512 on; many rows are sure, some are wrong, most classes are negligible.
    onehot   a memorised batch: as peaked, with one large margin and no rivals. Loss of 1e-8 to 1e-5: LSE - s_y cancels.
    popular  what the gradient filter is specified on: x_i = a_i w_y / |w_y| + z_i, a_i uniform in 5..15, w_j = n_j / |n_j| (so that noise
             makes logits of standard deviation 1), a constant bias b_j = -log(1 + rank of j) with classes ranked at random, and y drawn
             by that popularity.
    trained  hidden states, head and next tokens of a language model that was really trained (trained.py). The model gives C and D,
             and N as far as its held-out text goes.

For prediction (k best classes) what matters is the order in which good classes are met:

    random      operands as flat.
    ascending   all x_i point the same way and classes are sorted by score, so that each class beats all before it.

For one-vs-all losses, 5 different labels a row, drawn uniformly:

    fresh   operands as flat: half of all classes are predicted. No negative is cheap.
    rare    a head that knows how rare labels are and nothing else: logits are standard normal about log(5/C), by a common component of
            all x_i. Most negatives lie where the asymmetric loss is exactly 0.

For contrastive losses, images and texts of length 1:

    fresh    independent: an untrained pair of encoders.
    paired   a text is its image plus as much noise: loss of clip about 0.

Everything else is drawn in float32 on the device itself from one seed and then rounded, so a device gives the same operands every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import trained
from .shapes import Shape

SEED = 20240817
DRAWN_KINDS = ("flat", "peaked", "early", "onehot", "popular")
TRAINED = "trained"
LOSS_KINDS = (*DRAWN_KINDS, TRAINED)
PREDICTION_KINDS = ("random", "ascending")
ONE_VS_ALL_KINDS = ("fresh", "rare")
CONTRASTIVE_KINDS = ("fresh", "paired")

LABELS = 5  # a row, of one-vs-all losses

RIVALS = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """A shape with its operands."""

    shape: Shape
    kind: str
    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    target: Tensor  # (N,), not used by predictions and contrastive losses; labels (N, K) of one-vs-all losses
    bias: Tensor | None = None  # (C,), constant


def kinds_for(shape: Shape, loss_kinds: tuple[str, ...] = DRAWN_KINDS) -> tuple[str, ...]:
    """The kinds of data to run `shape` on, `loss_kinds` being those asked for losses."""
    if shape.k:
        return PREDICTION_KINDS
    return ONE_VS_ALL_KINDS if shape.one_vs_all else CONTRASTIVE_KINDS if shape.contrastive else loss_kinds


def own_shape(shape: Shape, kind: str) -> Shape:
    """The shape that is run when `shape` is asked for: another than asked for only where the kind of data has sizes of its own."""
    if kind != TRAINED:
        return shape
    n, c, d = trained.sizes()
    return Shape(TRAINED, min(shape.rows, n), c, d)


def make_problem(
    shape: Shape, kind: str, dtype: torch.dtype, device: torch.device, tell: Callable[[str], object] = lambda _: None
) -> Problem:
    """Draw the operands, or look them up. The problem's shape is `own_shape`. `tell` is told how a training gets on.

    Raises:
        ValueError: for a kind that `shape` does not have.
    """
    known = kinds_for(shape, LOSS_KINDS)
    if kind not in known:
        raise ValueError(f"data: expected one of {known} for {shape}, got {kind!r}")
    if kind == TRAINED:
        return _trained(own_shape(shape, kind), dtype, device, tell)
    generator = torch.Generator(device).manual_seed(SEED)
    if kind == "popular":
        return _popular(shape, dtype, generator)
    n, c, d = shape.rows, shape.classes, shape.features

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    w = normal(c, d).div_(math.sqrt(d))  # (C, D)
    if shape.contrastive:
        x = normal(n, d)
        text = x / math.sqrt(d) + w if kind == "paired" else w
        nobody = torch.arange(n, device=device)
        return Problem(shape, kind, F.normalize(x).to(dtype), F.normalize(text).to(dtype), nobody)
    if shape.one_vs_all:
        k = min(LABELS, c)
        first = torch.randint(c, (n, 1), generator=generator, device=device)
        step = torch.randint(1, max(c // k, 1) + 1, (n, 1), generator=generator, device=device)
        y = (first + step * torch.arange(k, device=device)) % c  # (N, K), different since K steps are at most C
    elif kind in ("early", "peaked"):
        y = _zipf(n, c, generator, device)
    else:
        y = torch.randint(c, (n,), generator=generator, device=device)
    x = normal(n, d)  # (N, D)

    if kind == "early":
        direction = F.normalize(normal(d), dim=0)
        log_frequency = -torch.arange(1, c + 1, device=device, dtype=torch.float32).log_()
        known = (log_frequency - log_frequency.mean()) / 4  # (C,)
        # x gets a common component of length sqrt(D), as the mean of real hidden states has, and w writes the frequencies on it.
        w.mul_(0.1).addr_(known / math.sqrt(d), direction)
        x.add_(math.sqrt(d) * direction)
    elif kind == "peaked":
        # Margins are relative to log C + 1/2, the log-sum-exp of the other classes' standard normal logits.
        margin = math.log(c) + 0.5 + 3.5 + 2.5 * normal(n)  # (N,)
        x.add_(margin[:, None] * F.normalize(w[y], dim=1))
        for _ in range(RIVALS):
            rival = torch.randint(c, (n,), generator=generator, device=device)
            behind = torch.empty(n, device=device).exponential_(1 / 6, generator=generator)
            x.add_((margin - behind).clamp_(min=0)[:, None] * F.normalize(w[rival], dim=1))
    elif kind == "onehot":
        x.add_((math.log(c) + 18) * F.normalize(w[y], dim=1))
    elif kind == "rare":
        direction = F.normalize(normal(d), dim=0)
        w.addr_(torch.full((c,), math.log(y.shape[1] / c) / math.sqrt(d), device=device), direction)
        x.add_(math.sqrt(d) * direction)
    elif kind == "ascending":
        direction = F.normalize(normal(d), dim=0)
        w = w[(w @ direction).argsort()]
        x = (0.5 + torch.rand(n, 1, generator=generator, device=device)) * math.sqrt(d) * direction

    return Problem(shape, kind, x.to(dtype), w.to(dtype), y)


def _trained(shape: Shape, dtype: torch.dtype, device: torch.device, tell: Callable[[str], object]) -> Problem:
    states = trained.states("end", tell=tell)
    x, w = states.hidden[: shape.rows].to(device, dtype), states.weight.to(device, dtype)
    return Problem(shape, TRAINED, x, w, states.target[: shape.rows].to(device))


def _popular(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    n, c, d, device = shape.rows, shape.classes, shape.features, generator.device
    w = F.normalize(torch.randn(c, d, generator=generator, device=device))  # (C, D)
    by_rank = torch.randperm(c, generator=generator, device=device)  # (C,) the class of each rank
    bias = torch.empty(c, device=device)  # (C,)
    bias[by_rank] = -torch.arange(1, c + 1, device=device, dtype=torch.float32).log_()
    y = by_rank[_zipf(n, c, generator, device)]  # (N,)
    margin = torch.empty(n, 1, device=device).uniform_(5, 15, generator=generator)
    x = torch.randn(n, d, generator=generator, device=device).add_(margin * w[y])  # (N, D)
    return Problem(shape, "popular", x.to(dtype), w.to(dtype), y, bias.to(dtype))


def _zipf(n: int, c: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Classes (N,) drawn with probability proportional to 1 / (j + 1), by inverting the continuous distribution function."""
    uniform = torch.rand(n, generator=generator, device=device)
    return torch.exp(uniform * math.log(c + 1)).sub_(1).long().clamp_(max=c - 1)

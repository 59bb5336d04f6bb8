"""Divergences between the softmaxes of two streams over the same classes: of a teacher's logits t (constants) and a student's s.

    p_ij = e^(t_ij - m_i) / l_i        q_ij the same of s        r_ij = log(p_ij / q_ij)        m_i = max_j t_ij,  l_i = 1 + the others' sum

    cross_entropy      D_i = -sum_j p log q                                         dD_i/ds_ij = q - p
    forward            D_i = sum_j p r                      KL(p || q)              q - p
    reverse            D_i = -sum_j q r                     KL(q || p)              -q (r + D_i)
    jensen_shannon     D_i = b KL(p || m) + (1-b) KL(q || m),  m = b p + (1-b) q    (1-b) q (log(q/m) - KL(q || m)_i)

r is made of logits taken relative to their rows' maxima and of one logarithm of the ratio of the two sums, never of two log-softmaxes:
where the two agree it is a small number with small errors, and exactly 0 for equal logits. The sums leave the largest term out, so that of
two confident rows log(l_s / l_t) = log1p((rest_s - rest_t) / l_t) keeps its digits, and with it q - p of the class they agree on (fp32,
losses near 1e-8: gradients are right to 4e-4, of two log-softmaxes to 6e-2). log(p/m) and log(q/m) are made of r alone,

    c = -log1p(v (e^-|r| - 1)),  v = 1-b where r >= 0, else b        log(p/m) = c + min(r, 0)        log(q/m) = c - max(r, 0)

which overflows nowhere and cancels nowhere. A class that a distribution gives nothing adds nothing to that distribution's own average
(0 log 0 = 0), whatever the other gives it; logits of -inf in both are therefore as if the class were not there.

To add one, subclass `Divergence` under `@register_divergence`; engines need no edit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from bigclass.core.stream import check_name


@dataclass(slots=True)
class PairTile:
    """What both streams are on a block of logits: p, q, r (n, c), and b = s - m (n, c), all of them work buffers.

    at, inside: (n, 1) the column of each row's largest s, and whether it lies in this tile at all. work: one more buffer, by name.
    """

    p: Tensor
    q: Tensor
    r: Tensor
    b: Tensor
    at: Tensor
    inside: Tensor
    work: Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class Divergence:
    """One row of the module's table. numbers: constants."""

    numbers: tuple[float, ...] = ()

    name: ClassVar[str] = ""
    width: ClassVar[int] = 1  # how many sums it keeps a row
    waits: ClassVar[bool] = True  # does `gradient` read the sums of the whole row?

    def sums(self, tile: PairTile) -> list[Tensor]:
        """This tile's part of each sum, (n, 1). May use b up, and must leave p, q and r alone."""
        raise NotImplementedError

    def value(self, sums: Tensor, rest: Tensor) -> Tensor:
        """D (n,) from the sums (n, width) over all classes and the student's l - 1 (n,)."""
        raise NotImplementedError

    def gradient(self, tile: PairTile, sums: Tensor) -> Tensor:
        """dD/ds (n, c) in the place of q. May use everything up. Only where D is finite need it be right."""
        raise NotImplementedError

    def dense(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D (n,) by plain autograd from both log-softmaxes (n, C)."""
        raise NotImplementedError


AnyDivergence = TypeVar("AnyDivergence", bound=Divergence)

DIVERGENCES: dict[str, type[Divergence]] = {}


def register_divergence(cls: type[AnyDivergence]) -> type[AnyDivergence]:
    """Make a `Divergence` known under its `name`, so that it can cross a custom op."""
    check_name(cls.name, DIVERGENCES, cls)
    DIVERGENCES[cls.name] = cls
    return cls


def _average(weight: Tensor, t: Tensor, out: Tensor) -> Tensor:
    """sum_j weight t (n, 1), with 0 times an infinity 0. What a NaN of the logits itself leaves out, engines see in m and l."""
    return torch.mul(weight, t, out=out).nansum(1, keepdim=True)


def _difference(tile: PairTile) -> Tensor:
    """q - p in the place of q; at the largest s, where both may be all but 1, made of r."""
    p, q, r = (t.gather(1, tile.at) for t in (tile.p, tile.q, tile.r))
    made = torch.where(r >= 0.0, p * torch.expm1(-r), -q * torch.expm1(r))
    out = tile.q.sub_(tile.p)
    return out.scatter_(1, tile.at, torch.where(tile.inside, made, out.gather(1, tile.at)))


def _weighed(weight: Tensor, t: Tensor) -> Tensor:
    """sum_j weight t (n,) under autograd, 0 where the weight is 0, where t may be infinite or NaN."""
    return (weight * torch.where(weight > 0, t, 0.0)).sum(1)


@register_divergence
@dataclass(frozen=True, eq=False)
class CrossEntropy(Divergence):
    """-sum_j p log q: forward KL plus the teacher's entropy, a constant."""

    name: ClassVar[str] = "cross_entropy"
    waits: ClassVar[bool] = False

    def sums(self, tile):
        return [_average(tile.p, tile.b, tile.b)]

    def value(self, sums, rest):
        return torch.log1p(rest) - sums[:, 0]

    def gradient(self, tile, sums):
        return _difference(tile)

    def dense(self, log_p, log_q):
        return -_weighed(log_p.exp(), log_q)


@register_divergence
@dataclass(frozen=True, eq=False)
class Forward(Divergence):
    """KL(p || q)."""

    name: ClassVar[str] = "forward"
    waits: ClassVar[bool] = False

    def sums(self, tile):
        return [_average(tile.p, tile.r, tile.b)]

    def value(self, sums, rest):
        return sums[:, 0]

    def gradient(self, tile, sums):
        return _difference(tile)

    def dense(self, log_p, log_q):
        return _weighed(log_p.exp(), log_p - log_q)


@register_divergence
@dataclass(frozen=True, eq=False)
class Reverse(Divergence):
    """KL(q || p)."""

    name: ClassVar[str] = "reverse"

    def sums(self, tile):
        return [_average(tile.q, tile.r, tile.b)]

    def value(self, sums, rest):
        return -sums[:, 0]

    def gradient(self, tile, sums):
        return tile.q.mul_(torch.sub(sums, tile.r, out=tile.b))

    def dense(self, log_p, log_q):
        return _weighed(log_q.exp(), log_q - log_p)


@register_divergence
@dataclass(frozen=True, eq=False)
class JensenShannon(Divergence):
    """b KL(p || m) + (1-b) KL(q || m), m = b p + (1-b) q. numbers: (b,), 0 < b < 1 (Agarwal et al., arXiv:2306.13649, equation 1)."""

    name: ClassVar[str] = "jensen_shannon"
    width: ClassVar[int] = 2

    def _common(self, tile: PairTile) -> Tensor:
        """c, in the place of b."""
        (beta,) = self.numbers
        c = torch.abs(tile.r, out=tile.b).neg_().expm1_()
        if beta == 0.5:
            c.mul_(0.5)
        else:
            c.mul_(torch.ge(tile.r, 0.0, out=tile.work("side")).mul_(1.0 - 2.0 * beta).add_(beta))
        return c.log1p_().neg_()

    def sums(self, tile):
        c, work = self._common(tile), tile.work("side")
        of_p = _average(tile.p, torch.clamp(tile.r, max=0.0, out=work).add_(c), work)
        return [of_p, _average(tile.q, torch.sub(c, torch.clamp(tile.r, min=0.0, out=work), out=work), work)]

    def value(self, sums, rest):
        return self.numbers[0] * sums[:, 0] + (1.0 - self.numbers[0]) * sums[:, 1]

    def gradient(self, tile, sums):
        log_ratio = self._common(tile).sub_(tile.r.clamp_(min=0.0))
        return tile.q.mul_(log_ratio.sub_(sums[:, 1:])).mul_(1.0 - self.numbers[0])

    def dense(self, log_p, log_q):
        (beta,) = self.numbers
        p, q = log_p.exp(), log_q.exp()
        nowhere = (log_p == -math.inf) & (log_q == -math.inf)
        log_p, log_q = log_p.masked_fill(nowhere, 0.0), log_q.masked_fill(nowhere, 0.0)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return beta * _weighed(p, log_p - log_m) + (1.0 - beta) * _weighed(q, log_q - log_m)

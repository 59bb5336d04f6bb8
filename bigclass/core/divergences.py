"""Divergences between the softmaxes of two streams over the same classes: of a teacher's logits t (constants) and a student's s.

    p_ij = e^(t_ij - m_i) / l_i        q_ij the same of s        r_ij = log(p_ij / q_ij)        m_i = max_j t_ij,  l_i = 1 + the others' sum

    cross_entropy      D_i = -sum_j p log q                                         dD_i/ds_ij = q - p
    forward            D_i = sum_j p r                      KL(p || q)              q - p
    reverse            D_i = -sum_j q r                     KL(q || p)              -q (r + D_i)
    jensen_shannon     D_i = b KL(p || m) + (1-b) KL(q || m),  m = b p + (1-b) q    (1-b) q (log(q/m) - KL(q || m)_i)

r is made of logits taken relative to their rows' maxima and of one logarithm of the ratio of the two sums, never of two log-softmaxes:
where the two agree it is a small number with small errors, and exactly 0 for equal logits. The sums leave the largest term out, so that of
two confident rows log(l_s / l_t) = log1p((rest_s - rest_t) / l_t), for rest_s >= rest_t, keeps its digits, and with it q - p of the class
they agree on (fp32, losses near 1e-8: gradients are right to 4e-4, of log-softmaxes to 6e-2). log(p/m) and log(q/m) are made of r alone,

    c = -log1p(v (e^-|r| - 1)),  v = 1-b where r >= 0, else b        log(p/m) = c + min(r, 0)        log(q/m) = c - max(r, 0)

which overflows nowhere and cancels nowhere. Where a gradient is q times a difference to an expectation, a confident student's largest
class is nearly all of that expectation, and is kept apart (`Expected`). A class that a distribution gives nothing adds nothing to that
distribution's own average (0 log 0 = 0), whatever the other gives it; logits of -inf in both are therefore as if the class were not there.

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

    def gradient(self, tile: PairTile, sums: Tensor, rest: Tensor) -> Tensor:
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

    def gradient(self, tile, sums, rest):
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

    def gradient(self, tile, sums, rest):
        return _difference(tile)

    def dense(self, log_p, log_q):
        return _weighed(log_p.exp(), log_p - log_q)


class Expected(Divergence):
    """D is, or has in it, sum_j q h with dD/ds_j = q_j (h_j - sum_j q h). Sums: q h of all but the largest s; the h of that one, h_top.

    A confident student's h_top is nearly the whole expectation, and their difference is made without it:
    h_top - sum q h = (1 - q_top) h_top - sum of q h over the others, with 1 - q_top = rest / (1 + rest).
    """

    width: ClassVar[int] = 2

    def slope(self, tile: PairTile) -> Tensor:
        """h (n, c), in the place of b. Leaves p, q and r alone."""
        raise NotImplementedError

    def expectation(self, sums: Tensor, rest: Tensor) -> Tensor:
        """sum_j q h (n,)."""
        return sums[:, 0] + sums[:, 1] / (1.0 + rest)

    def sums(self, tile):
        return self.parts(tile, self.slope(tile))

    @staticmethod
    def parts(tile: PairTile, h: Tensor) -> list[Tensor]:
        """This tile's part of both sums. Uses h up."""
        top = torch.where(tile.inside, h.gather(1, tile.at), 0.0)
        terms = torch.mul(tile.q, h, out=h)
        terms.scatter_(1, tile.at, torch.where(tile.inside, 0.0, terms.gather(1, tile.at)))
        return [terms.nansum(1, keepdim=True), top]

    def gradient(self, tile, sums, rest):
        h, q = self.slope(tile), tile.q.gather(1, tile.at)
        others, top = sums[:, :1], sums[:, 1:2]
        made = q * (rest / (1.0 + rest) * top.squeeze(1) - others.squeeze(1)).unsqueeze(1)
        out = tile.q.mul_(h.sub_(self.expectation(sums, rest).unsqueeze(1)))
        return out.scatter_(1, tile.at, torch.where(tile.inside, made, out.gather(1, tile.at)))


@register_divergence
@dataclass(frozen=True, eq=False)
class Reverse(Expected):
    """KL(q || p)."""

    name: ClassVar[str] = "reverse"

    def slope(self, tile):
        return torch.neg(tile.r, out=tile.b)

    def value(self, sums, rest):
        return self.expectation(sums, rest)

    def dense(self, log_p, log_q):
        return _weighed(log_q.exp(), log_q - log_p)


@register_divergence
@dataclass(frozen=True, eq=False)
class JensenShannon(Expected):
    """b KL(p || m) + (1-b) KL(q || m), m = b p + (1-b) q. numbers: (b,), 0 < b < 1 (Agarwal et al., arXiv:2306.13649, section 2)."""

    name: ClassVar[str] = "jensen_shannon"
    width: ClassVar[int] = 3

    def _common(self, tile: PairTile) -> Tensor:
        """c, in the place of b."""
        (beta,) = self.numbers
        c = torch.abs(tile.r, out=tile.b).neg_().expm1_()
        if beta == 0.5:
            c.mul_(0.5)
        else:
            c.mul_(torch.ge(tile.r, 0.0, out=tile.work("side")).mul_(1.0 - 2.0 * beta).add_(beta))
        return c.log1p_().neg_()

    def slope(self, tile):
        return self._slope(tile, self._common(tile))

    def _slope(self, tile: PairTile, c: Tensor) -> Tensor:
        """(1-b) log(q/m), in the place of c."""
        return c.sub_(torch.clamp(tile.r, min=0.0, out=tile.work("side"))).mul_(1.0 - self.numbers[0])

    def sums(self, tile):
        c, work = self._common(tile), tile.work("side")
        of_p = _average(tile.p, torch.clamp(tile.r, max=0.0, out=work).add_(c), work)
        return [*self.parts(tile, self._slope(tile, c)), of_p]

    def value(self, sums, rest):
        return self.numbers[0] * sums[:, 2] + self.expectation(sums, rest)

    def dense(self, log_p, log_q):
        (beta,) = self.numbers
        p, q = log_p.exp(), log_q.exp()
        nowhere = (log_p == -math.inf) & (log_q == -math.inf)
        log_p, log_q = log_p.masked_fill(nowhere, 0.0), log_q.masked_fill(nowhere, 0.0)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return beta * _weighed(p, log_p - log_m) + (1.0 - beta) * _weighed(q, log_q - log_m)

r"""The one-vs-all losses that come with the library, as pairs of elementwise functions (elementwise.py).

With sigma the logistic function and sp(s) = log(1 + e^s) = -log sigma(-s):

                    positive(s)                          negative(s)
    bce             sp(-s)                               sp(s)
    focal           a (1 - sigma)^g sp(-s)               (1 - a) sigma^g sp(s)                        arXiv:1708.02002; a < 0: no factors
    asymmetric      (1 - sigma)^g+ sp(-s)                -q^g- log(1 - q),  q = max(sigma - m, 0)     arXiv:2009.14119
    squared_hinge   max(m - s, 0)^2                      max(m + s, 0)^2
    poly            focal + e (1 - sigma)^(g + 1)        focal + e sigma^(g + 1)                      arXiv:2204.12511

Exponentials are of -|s| or of logarithms below 0, so nothing overflows, and each gradient is one expression: no logit loses its digits.
Every negative and its slope are exactly 0 at s = -inf; those of asymmetric (m > 0) and squared_hinge already below a finite logit.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# (the language of Triton forms has other types than Python's)

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.core.folds import exp_
from bigclass.core.triton_form import triton_form_with
from bigclass.losses.elementwise import LOSSES, ElementwiseLoss, register_elementwise_loss
from bigclass.losses.logistic import cross_entropy, log_missing, logistic, positive_part, power

__all__ = ["LOSSES", "Asymmetric", "BinaryCrossEntropy", "Focal", "Poly", "SquaredHinge"]

if TYPE_CHECKING:
    import triton.language as tl


def _log1p_exp(s: Tensor, out: Tensor | None = None) -> Tensor:
    """log(1 + e^-|s|), what sp(s) and sp(-s) share. No autograd."""
    return exp_(torch.abs(s, out=out).neg_()).log1p_()


def _power(q: Tensor, g: float) -> Tensor:
    """q^g for q >= 0, by products where g is a small whole number: `pow` takes 10 x the time of one."""
    if g not in (1.0, 2.0, 3.0, 4.0):
        return q.pow(g)
    square = q * q if g > 1.0 else q
    return q if g == 1.0 else square if g == 2.0 else square * q if g == 3.0 else square * square


@register_elementwise_loss
class BinaryCrossEntropy(ElementwiseLoss):
    """Binary cross-entropy with logits."""

    name: ClassVar[str] = "bce"
    vanishes: ClassVar[bool] = True
    weight: ClassVar[int] = 2

    @staticmethod
    def positive(s):
        # not F.softplus, which drops e^-s above s = 20, where float64 can see it
        return -F.logsigmoid(s)

    @staticmethod
    def negative(s):
        return -F.logsigmoid(-s) if s.requires_grad else _log1p_exp(s).add_(s.relu())

    @classmethod
    def negative_with_slope(cls, s):
        return cls.negative(s.detach()), torch.sigmoid(s)

    @classmethod
    def negative_in_place(cls, s, work):
        value = _log1p_exp(s, work(0)).add_(torch.clamp(s, min=0.0, out=work(1)))
        s.sigmoid_()
        return value

    @classmethod
    def mixture_in_place(cls, s, t, p, work):
        if not (isinstance(p, float) and p == 1.0):
            return None
        # (1 - t) max(s, 0) + t max(-s, 0) = max(s, 0) - t s, where nothing cancels that counts: it is 0 or s
        linear = torch.clamp(s, min=0.0, out=work(1))
        linear.sub_(torch.mul(s, t, out=work(0)))
        value = _log1p_exp(s, work(0)).add_(linear)
        s.sigmoid_().sub_(t)
        return value

    @classmethod
    def mixture(cls, s, t, p):
        if s.requires_grad:  # under autograd |s| and relu have slope 0 at s = 0, where a head of zeros starts
            return F.logsigmoid(-s) * (t - 1.0) - F.logsigmoid(s) * (t * p)
        positive = t * p
        return _log1p_exp(s).mul_(1.0 - t + positive).add_(s.relu() * (1.0 - t)).add_((-s).relu_() * positive)

    @classmethod
    def mixture_with_slope(cls, s, t, p):
        plain = isinstance(p, float) and p == 1.0
        slope = torch.sigmoid(s)
        slope = slope.sub_(t) if plain else slope.mul_(1.0 - t).sub_(torch.sigmoid(-s) * (t * p))
        return cls.mixture(s.detach(), t, p), slope

    @triton_form_with(logistic=logistic, positive_part=positive_part)
    def negative_triton(s):
        return positive_part(s) + logistic(s)[0]

    @triton_form_with(logistic=logistic)
    def negative_slope_triton(s):
        return logistic(s)[1]

    @triton_form_with(logistic=logistic, cross_entropy=cross_entropy)
    def mixture_triton(s, t, p):
        return cross_entropy(s, 1.0 - t, t * p, logistic(s)[0])

    @triton_form_with(logistic=logistic)
    def mixture_slope_triton(s, t, p):
        _, up, down = logistic(s)
        return (1.0 - t) * up - t * p * down


def _focal(s: Tensor, gamma: float) -> Tensor:
    """sigma^g sp(s), with sigma^g = e^(g log sigma): finite wherever s is, its slope too."""
    loss = -F.logsigmoid(-s)
    return loss * torch.exp(gamma * F.logsigmoid(s)) if gamma else loss


@register_elementwise_loss
class Focal(ElementwiseLoss):
    """Focal loss (Lin et al., arXiv:1708.02002), as torchvision's sigmoid_focal_loss. alpha < 0: no factors."""

    name: ClassVar[str] = "focal"
    options: ClassVar[Mapping[str, float]] = {"alpha": 0.25, "gamma": 2.0}
    vanishes: ClassVar[bool] = True

    @classmethod
    def check(cls, alpha, gamma):
        if not (alpha < 0.0 or 0.0 <= alpha <= 1.0):
            raise ArgumentError(f"alpha: expected a share of the positives in [0, 1], or -1 for none, got {alpha}")
        if not 0.0 <= gamma < math.inf:
            raise ArgumentError(f"gamma: expected a finite exponent >= 0, got {gamma}")

    @staticmethod
    def positive(s, alpha, gamma):
        return _focal(-s, gamma) * (1.0 if alpha < 0.0 else alpha)

    @staticmethod
    def negative(s, alpha, gamma):
        return _focal(s, gamma) * (1.0 if alpha < 0.0 else 1.0 - alpha)

    @classmethod
    def negative_with_slope(cls, s, alpha, gamma):
        factor = 1.0 if alpha < 0.0 else 1.0 - alpha
        s = s.detach()
        shared = _log1p_exp(s)
        sp = s.relu().add_(shared)
        power = exp_(shared.add_((-s).relu_()).mul_(-gamma)).mul_(factor) if gamma else torch.full_like(s, factor)
        sigma = torch.sigmoid(s)
        slope = (1.0 - sigma).mul_(sp).mul_(gamma).add_(sigma).mul_(power)  # sigma^g [g (1 - sigma) sp + sigma]
        return sp.mul_(power), slope

    @classmethod
    def negative_in_place(cls, s, work, alpha, gamma):
        shared, sp, power = _log1p_exp(s, work(0)), work(1), work(2)
        torch.clamp(s, min=0.0, out=sp).add_(shared)
        torch.neg(s, out=power).clamp_(min=0.0).add_(shared)  # -log sigma
        power = exp_(power.mul_(-gamma)) if gamma else power.fill_(1.0)
        if alpha >= 0.0:
            power.mul_(1.0 - alpha)
        s.sigmoid_()
        other = torch.neg(s, out=shared).add_(1.0)
        s.add_(other.mul_(sp), alpha=gamma).mul_(power)
        return sp.mul_(power)

    @triton_form_with(logistic=logistic, positive_part=positive_part)
    def negative_triton(s, alpha, gamma):
        log1p, _, _ = logistic(s)
        factor = tl.where(gamma == 0.0, 1.0, tl.exp2((log1p + positive_part(-s)) * (-1.4426950408889634 * gamma)))
        return (1.0 - tl.maximum(alpha, 0.0)) * factor * (positive_part(s) + log1p)

    @triton_form_with(logistic=logistic, positive_part=positive_part)
    def negative_slope_triton(s, alpha, gamma):
        log1p, up, down = logistic(s)
        factor = tl.where(gamma == 0.0, 1.0, tl.exp2((log1p + positive_part(-s)) * (-1.4426950408889634 * gamma)))
        lost = tl.where(down == 0.0, 0.0, down * (positive_part(s) + log1p))  # of s = inf, too
        return (1.0 - tl.maximum(alpha, 0.0)) * factor * (gamma * lost + up)

    @classmethod
    def mixture(cls, s, t, p, alpha, gamma):
        """torchvision's for soft targets: cross-entropy under a focusing weight of the mixed probability."""
        value = BinaryCrossEntropy.mixture(s, t, p)
        if gamma:
            value = value * _missing(t * torch.sigmoid(-s) + (1.0 - t) * torch.sigmoid(s)).pow(gamma)
        return value if alpha < 0.0 else value * (t * alpha + (1.0 - t) * (1.0 - alpha))

    @triton_form_with(logistic=logistic, cross_entropy=cross_entropy, power=power)
    def mixture_triton(s, t, p, alpha, gamma):
        log1p, up, down = logistic(s)
        share = tl.where(alpha < 0.0, 1.0, t * alpha + (1.0 - t) * (1.0 - alpha))
        return share * cross_entropy(s, 1.0 - t, t * p, log1p) * power(t * down + (1.0 - t) * up, gamma)

    @triton_form_with(logistic=logistic, cross_entropy=cross_entropy, power=power)
    def mixture_slope_triton(s, t, p, alpha, gamma):
        log1p, up, down = logistic(s)
        value = cross_entropy(s, 1.0 - t, t * p, log1p)
        missing = tl.maximum(t * down + (1.0 - t) * up, 1.2e-38)
        share = tl.where(alpha < 0.0, 1.0, t * alpha + (1.0 - t) * (1.0 - alpha))
        focus = value * gamma * (1.0 - 2.0 * t) * up * down / missing
        return share * power(missing, gamma) * ((1.0 - t) * up - t * p * down + focus)


def _missing(q: Tensor) -> Tensor:
    """A probability to be raised to a power: never 0, where the power's slope may be infinite."""
    return q.clamp_min(torch.finfo(q.dtype).tiny)


def _log_missing(s: Tensor, q: Tensor, clip: float) -> Tensor:
    """log(1 - q), q = max(sigma - clip, 0), without taking from 1 what is near 1."""
    if clip <= 0.0:
        return F.logsigmoid(-s)
    return torch.where(q < 0.5, torch.log1p(-q.clamp(max=0.5)), torch.log(torch.sigmoid(-s) + clip))


def _held(t: Tensor, constant: float) -> Tensor:
    """t, or (constant) t as if it were a number: the focusing weights of timm's disable_torch_grad_focal_loss."""
    return t.detach() if constant else t


@register_elementwise_loss
class Asymmetric(ElementwiseLoss):
    """Asymmetric loss (Ridnik et al., arXiv:2009.14119), with timm's options and clamps: eps bounds the probability inside each logarithm.

    A positive below log(eps) gets no gradient but its focusing weight's; eps=0 removes the clamp."""

    name: ClassVar[str] = "asymmetric"
    absent: ClassVar[Mapping[str, float]] = {"clip": 0.0}
    options: ClassVar[Mapping[str, float]] = {
        "gamma_neg": 4.0,
        "gamma_pos": 1.0,
        "clip": 0.05,
        "eps": 1e-8,
        "disable_torch_grad_focal_loss": 0.0,
    }
    vanishes: ClassVar[bool] = True

    @classmethod
    def check(cls, gamma_neg, gamma_pos, clip, eps, disable_torch_grad_focal_loss):
        for name, value in (("gamma_neg", gamma_neg), ("gamma_pos", gamma_pos)):
            if not 0.0 <= value < math.inf:
                raise ArgumentError(f"{name}: expected a finite exponent >= 0, got {value}")
        if not 0.0 <= clip < 1.0:
            raise ArgumentError(f"clip: expected a margin of probability in [0, 1), got {clip}")
        if not 0.0 <= eps < 0.5:
            raise ArgumentError(f"eps: expected a probability in [0, 0.5), got {eps}")

    @staticmethod
    def zero_below(gamma_neg, gamma_pos, clip, eps, constant):
        # where sigma - clip is 0 or less in any rounding
        return math.log(clip / (1.0 - clip)) - 1e-4 if clip > 0.0 else -math.inf

    @staticmethod
    def positive(s, gamma_neg, gamma_pos, clip, eps, constant):
        value = -F.logsigmoid(s)
        if eps > 0.0:
            value = value.clamp(max=-math.log(eps))
        return value * _held(torch.exp(gamma_pos * F.logsigmoid(-s)), constant) if gamma_pos else value

    @staticmethod
    def negative(s, gamma_neg, gamma_pos, clip, eps, constant):
        q = (torch.sigmoid(s) - clip).clamp(min=0.0)
        value = -_log_missing(s, q, clip)
        if eps > clip:
            value = value.clamp(max=-math.log(eps))
        if not gamma_neg:
            return value
        return value * _held(_missing(q).pow(gamma_neg) if clip > 0.0 else torch.exp(gamma_neg * F.logsigmoid(s)), constant)

    @classmethod
    def negative_with_slope(cls, s, gamma_neg, gamma_pos, clip, eps, constant):
        if clip <= 0.0:
            if eps > 0.0 or constant:
                return super().negative_with_slope(s, gamma_neg, gamma_pos, clip, eps, constant)
            return Focal.negative_with_slope(s, -1.0, gamma_neg)
        s = s.detach()
        sigma, other = torch.sigmoid(s), torch.sigmoid(-s)
        q = (sigma - clip).clamp_(min=0.0)
        value = _log_missing(s, q, clip).neg_()
        inner = sigma.mul_(other).mul_(q > 0.0)  # dq / ds
        rest = other.add_(clip)  # 1 - q, where q > 0
        own = inner / rest
        if eps > clip:
            own.masked_fill_(value > -math.log(eps), 0.0)
            value.clamp_(max=-math.log(eps))
        if gamma_neg == 0.0:
            return value, own
        power = _power(q, gamma_neg)
        # q^g / (1 - q) + g q^(g-1) value
        slope = own.mul_(power)
        if not constant:
            slope.add_(inner.mul_(value).mul_(power).div_(_missing(q)), alpha=gamma_neg)
        return value.mul_(power), slope

    @classmethod
    def negative_in_place(cls, s, work, gamma_neg, gamma_pos, clip, eps, constant):
        # log(1 - q) is taken from q below: with too small a margin that loses digits
        if clip < max(0.02, eps) or constant or gamma_neg not in (1.0, 2.0, 3.0, 4.0):
            return None
        q, log, power, rest = work(0), work(1), work(2), work(3)
        torch.neg(s, out=rest).sigmoid_()
        s.sigmoid_()
        torch.sub(s, clip, out=q).clamp_(min=0.0)
        s.mul_(rest)  # d sigma / ds
        rest.add_(clip)  # 1 - q, where q > 0
        torch.neg(q, out=log).log1p_()
        if gamma_neg > 1.0:
            power.copy_(q)
            for _ in range(int(gamma_neg) - 2):
                power.mul_(q)
            s.mul_(power)
            power.mul_(q)
        else:
            power.copy_(q)
        power.mul_(log).neg_()
        # q^(g-1) sigma' [q / (1 - q) - g log(1 - q)]
        s.mul_(q.div_(rest).add_(log, alpha=-gamma_neg))
        return power

    @triton_form_with(logistic=logistic, log_missing=log_missing, power=power)
    def negative_triton(s, gamma_neg, gamma_pos, clip, eps, constant):
        log1p, up, down = logistic(s)
        q = tl.maximum(up - clip, 0.0)
        value = -tl.maximum(log_missing(s, q, log1p, down, clip), tl.log(tl.maximum(eps, 1.2e-38)))
        return tl.where(s == s, tl.where(q > 0.0, value * power(q, gamma_neg), 0.0), s)

    @triton_form_with(logistic=logistic, log_missing=log_missing, power=power)
    def negative_slope_triton(s, gamma_neg, gamma_pos, clip, eps, constant):
        log1p, up, down = logistic(s)
        q, least = tl.maximum(up - clip, 0.0), tl.log(tl.maximum(eps, 1.2e-38))
        value = -log_missing(s, q, log1p, down, clip)
        # sigma' [q^g / (1 - q) + g q^(g-1) value]
        own = tl.where(value > -least, 0.0, 1.0 / tl.maximum(down + clip, 1.2e-38))
        focus = tl.where(constant != 0.0, 0.0, gamma_neg * tl.minimum(value, -least) / tl.maximum(q, 1.2e-38))
        return tl.where(s == s, tl.where(q > 0.0, up * down * power(q, gamma_neg) * (own + focus), 0.0), s)

    @classmethod
    def mixture(cls, s, t, p, gamma_neg, gamma_pos, clip, eps, constant):
        """timm's for soft targets: the exponent and the probability that it is of are mixed, too."""
        up, down = torch.sigmoid(s), torch.sigmoid(-s)
        q = (up - clip).clamp(min=0.0)
        positive, negative = F.logsigmoid(s), _log_missing(s, q, clip)
        if eps > 0.0:
            positive, negative = positive.clamp(min=math.log(eps)), negative.clamp(min=math.log(eps))
        value = positive * (-t * p) - negative * (1.0 - t)
        if not (gamma_neg or gamma_pos):
            return value
        return value * _held(_missing(t * down + (1.0 - t) * q).pow(gamma_pos * t + gamma_neg * (1.0 - t)), constant)

    @triton_form_with(logistic=logistic, log_missing=log_missing, positive_part=positive_part, power=power)
    def mixture_triton(s, t, p, gamma_neg, gamma_pos, clip, eps, constant):
        log1p, up, down = logistic(s)
        q, least = tl.maximum(up - clip, 0.0), tl.log(tl.maximum(eps, 1.2e-38))
        positive, negative = -positive_part(-s) - log1p, log_missing(s, q, log1p, down, clip)
        value = -t * p * tl.maximum(positive, least) - (1.0 - t) * tl.maximum(negative, least)
        return tl.where(s == s, value * power(t * down + (1.0 - t) * q, gamma_pos * t + gamma_neg * (1.0 - t)), s)

    @triton_form_with(logistic=logistic, log_missing=log_missing, positive_part=positive_part, power=power)
    def mixture_slope_triton(s, t, p, gamma_neg, gamma_pos, clip, eps, constant):
        log1p, up, down = logistic(s)
        q, least = tl.maximum(up - clip, 0.0), tl.log(tl.maximum(eps, 1.2e-38))
        positive, negative = -positive_part(-s) - log1p, log_missing(s, q, log1p, down, clip)
        inner = tl.where(q > 0.0, up * down, 0.0)  # dq / ds
        own = (1.0 - t) * tl.where(negative < least, 0.0, inner / tl.maximum(down + clip, 1.2e-38))
        own -= t * p * tl.where(positive < least, 0.0, down)
        value = -t * p * tl.maximum(positive, least) - (1.0 - t) * tl.maximum(negative, least)
        gamma, missing = gamma_pos * t + gamma_neg * (1.0 - t), tl.maximum(t * down + (1.0 - t) * q, 1.2e-38)
        focus = tl.where(constant != 0.0, 0.0, value * gamma * ((1.0 - t) * inner - t * up * down) / missing)
        return tl.where(s == s, power(missing, gamma) * (own + focus), s)


@register_elementwise_loss
class Poly(ElementwiseLoss):
    """Poly-1 of the (focal) binary cross-entropy (Leng et al., arXiv:2204.12511), as timm's PolyBinaryCrossEntropy."""

    name: ClassVar[str] = "poly"
    options: ClassVar[Mapping[str, float]] = {"epsilon": 1.0, "gamma": 0.0, "alpha": -1.0}
    absent: ClassVar[Mapping[str, float]] = {"alpha": -1.0}
    vanishes: ClassVar[bool] = True

    @classmethod
    def check(cls, epsilon, gamma, alpha):
        Focal.check(alpha, gamma)

    @staticmethod
    def positive(s, epsilon, gamma, alpha):
        value = (epsilon * torch.sigmoid(-s) - F.logsigmoid(s)) * (1.0 if alpha < 0.0 else alpha)
        return value * torch.exp(gamma * F.logsigmoid(-s)) if gamma else value

    @staticmethod
    def negative(s, epsilon, gamma, alpha):
        value = (epsilon * torch.sigmoid(s) - F.logsigmoid(-s)) * (1.0 if alpha < 0.0 else 1.0 - alpha)
        return value * torch.exp(gamma * F.logsigmoid(s)) if gamma else value

    @classmethod
    def mixture(cls, s, t, p, epsilon, gamma, alpha):
        missing = t * torch.sigmoid(-s) + (1.0 - t) * torch.sigmoid(s)
        value = BinaryCrossEntropy.mixture(s, t, p) + epsilon * missing * (1.0 - t + t * p)
        if gamma:
            value = value * _missing(missing).pow(gamma)
        return value if alpha < 0.0 else value * (t * alpha + (1.0 - t) * (1.0 - alpha))

    @triton_form_with(logistic=logistic, positive_part=positive_part)
    def negative_triton(s, epsilon, gamma, alpha):
        log1p, up, _ = logistic(s)
        factor = tl.where(gamma == 0.0, 1.0, tl.exp2((log1p + positive_part(-s)) * (-1.4426950408889634 * gamma)))
        return (1.0 - tl.maximum(alpha, 0.0)) * factor * (positive_part(s) + log1p + epsilon * up)

    @triton_form_with(logistic=logistic, positive_part=positive_part)
    def negative_slope_triton(s, epsilon, gamma, alpha):
        log1p, up, down = logistic(s)
        factor = tl.where(gamma == 0.0, 1.0, tl.exp2((log1p + positive_part(-s)) * (-1.4426950408889634 * gamma)))
        lost = tl.where(down == 0.0, 0.0, down * (positive_part(s) + log1p + epsilon * up))  # of s = inf, too
        return (1.0 - tl.maximum(alpha, 0.0)) * factor * (gamma * lost + up + epsilon * up * down)

    @triton_form_with(logistic=logistic, cross_entropy=cross_entropy, power=power)
    def mixture_triton(s, t, p, epsilon, gamma, alpha):
        log1p, up, down = logistic(s)
        missing = t * down + (1.0 - t) * up
        share = tl.where(alpha < 0.0, 1.0, t * alpha + (1.0 - t) * (1.0 - alpha))
        return share * (cross_entropy(s, 1.0 - t, t * p, log1p) + epsilon * (1.0 - t + t * p) * missing) * power(missing, gamma)

    @triton_form_with(logistic=logistic, cross_entropy=cross_entropy, power=power)
    def mixture_slope_triton(s, t, p, epsilon, gamma, alpha):
        log1p, up, down = logistic(s)
        missing, turn = tl.maximum(t * down + (1.0 - t) * up, 1.2e-38), (1.0 - 2.0 * t) * up * down
        epsilon *= 1.0 - t + t * p
        value = cross_entropy(s, 1.0 - t, t * p, log1p) + epsilon * missing
        share = tl.where(alpha < 0.0, 1.0, t * alpha + (1.0 - t) * (1.0 - alpha))
        return share * power(missing, gamma) * ((1.0 - t) * up - t * p * down + epsilon * turn + gamma * value * turn / missing)


@register_elementwise_loss
class SquaredHinge(ElementwiseLoss):
    """Squared hinge: exactly 0 for a negative below -margin, a positive above it."""

    name: ClassVar[str] = "squared_hinge"
    options: ClassVar[Mapping[str, float]] = {"margin": 1.0}
    vanishes: ClassVar[bool] = True
    weight: ClassVar[int] = 2

    @staticmethod
    def zero_below(margin):
        return -margin

    @classmethod
    def check(cls, margin):
        if not math.isfinite(margin):
            raise ArgumentError(f"margin: expected a finite number, got {margin}")

    @staticmethod
    def positive(s, margin):
        return (margin - s).relu().square()

    @staticmethod
    def negative(s, margin):
        return (margin + s).relu().square()

    @classmethod
    def negative_with_slope(cls, s, margin):
        u = (s.detach() + margin).relu_()
        return u * u, u.mul_(2.0)

    @triton_form_with(positive_part=positive_part)
    def negative_triton(s, margin):
        return positive_part(margin + s) * positive_part(margin + s)

    @triton_form_with(positive_part=positive_part)
    def negative_slope_triton(s, margin):
        return 2.0 * positive_part(margin + s)

    @triton_form_with(positive_part=positive_part)
    def positive_triton(s, margin):
        return positive_part(margin - s) * positive_part(margin - s)

    @triton_form_with(positive_part=positive_part)
    def positive_slope_triton(s, margin):
        return -2.0 * positive_part(margin - s)

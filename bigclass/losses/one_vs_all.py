r"""The one-vs-all losses that come with the library, as pairs of elementwise functions (elementwise.py).

With sigma the logistic function and sp(s) = log(1 + e^s) = -log sigma(-s):

                    positive(s)                          negative(s)
    bce             sp(-s)                               sp(s)
    focal           a (1 - sigma)^g sp(-s)               (1 - a) sigma^g sp(s)                        arXiv:1708.02002; a < 0: no factors
    asymmetric      (1 - sigma)^g+ sp(-s)                -q^g- log(1 - q),  q = max(sigma - m, 0)     arXiv:2009.14119
    squared_hinge   max(m - s, 0)^2                      max(m + s, 0)^2

Exponentials are of -|s| or of logarithms below 0, so nothing overflows, and each gradient is one expression: no logit loses its digits.
Every negative and its slope are exactly 0 at s = -inf; those of asymmetric (m > 0) and squared_hinge already below a finite logit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.core.folds import exp_
from bigclass.core.triton_form import triton_form
from bigclass.losses.elementwise import LOSSES, ElementwiseLoss, register_elementwise_loss

__all__ = ["LOSSES", "Asymmetric", "BinaryCrossEntropy", "Focal", "SquaredHinge"]

if TYPE_CHECKING:
    import triton.language as tl


def _log1p_exp(s: Tensor) -> Tensor:
    """log(1 + e^-|s|), what sp(s) and sp(-s) share. No autograd."""
    return exp_(s.abs().neg_()).log1p_()


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

    @triton_form
    def negative_triton(s):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))  # Kahan's: log u alone loses e below 2^-24
        return tl.where(s > 0.0, s, 0.0) + log1p

    @triton_form
    def negative_slope_triton(s):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        return tl.where(s < 0.0, e, 1.0) / (1.0 + e)

    @triton_form
    def mixture_triton(s, t, p):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
        a, b = 1.0 - t, t * p  # pyright: ignore[reportOperatorIssue]
        return tl.where(s > 0.0, a * s, -b * s) + (a + b) * log1p

    @triton_form
    def mixture_slope_triton(s, t, p):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        r = 1.0 / (1.0 + e)
        up, down = tl.where(s < 0.0, e, 1.0) * r, tl.where(s < 0.0, 1.0, e) * r  # sigma(s), sigma(-s)
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

    @triton_form
    def negative_triton(s, alpha, gamma):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
        power = tl.exp2((log1p + tl.where(s < 0.0, -s, 0.0)) * (-1.4426950408889634 * gamma))
        power = tl.where(gamma == 0.0, 1.0, power)
        return (1.0 - tl.maximum(alpha, 0.0)) * power * (tl.where(s > 0.0, s, 0.0) + log1p)

    @triton_form
    def negative_slope_triton(s, alpha, gamma):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
        power = tl.exp2((log1p + tl.where(s < 0.0, -s, 0.0)) * (-1.4426950408889634 * gamma))
        power = tl.where(gamma == 0.0, 1.0, power)
        up, down = tl.where(s < 0.0, e, 1.0) / u, tl.where(s < 0.0, 1.0, e) / u
        return (1.0 - tl.maximum(alpha, 0.0)) * power * (gamma * down * (tl.where(s > 0.0, s, 0.0) + log1p) + up)

    @classmethod
    def mixture(cls, s, t, p, alpha, gamma):
        """torchvision's for soft targets: cross-entropy under a focusing weight of the mixed probability."""
        value = BinaryCrossEntropy.mixture(s, t, p)
        if gamma:
            value = value * _missing(t * torch.sigmoid(-s) + (1.0 - t) * torch.sigmoid(s)).pow(gamma)
        return value if alpha < 0.0 else value * (t * alpha + (1.0 - t) * (1.0 - alpha))

    @triton_form
    def mixture_triton(s, t, p, alpha, gamma):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
        r = 1.0 / u
        up, down = tl.where(s < 0.0, e, 1.0) * r, tl.where(s < 0.0, 1.0, e) * r
        a, b = 1.0 - t, t * p  # pyright: ignore[reportOperatorIssue]
        value = tl.where(s > 0.0, a * s, -b * s) + (a + b) * log1p
        missing = tl.maximum(t * down + a * up, 1e-38)
        share = tl.where(alpha < 0.0, 1.0, t * alpha + a * (1.0 - alpha))
        return tl.where(s == s, share * value * tl.exp2(gamma * tl.log2(missing)), s)

    @triton_form
    def mixture_slope_triton(s, t, p, alpha, gamma):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
        r = 1.0 / u
        up, down = tl.where(s < 0.0, e, 1.0) * r, tl.where(s < 0.0, 1.0, e) * r
        a, b = 1.0 - t, t * p  # pyright: ignore[reportOperatorIssue]
        value = tl.where(s > 0.0, a * s, -b * s) + (a + b) * log1p
        missing = tl.maximum(t * down + a * up, 1e-38)
        share = tl.where(alpha < 0.0, 1.0, t * alpha + a * (1.0 - alpha))
        focus = value * gamma * (a - t) * up * down / missing
        return tl.where(s == s, share * tl.exp2(gamma * tl.log2(missing)) * (a * up - b * down + focus), s)


def _missing(q: Tensor) -> Tensor:
    """A probability to be raised to a power: never 0, where the power's slope may be infinite."""
    return q.clamp_min(torch.finfo(q.dtype).tiny)


def _held(t: Tensor, constant: float) -> Tensor:
    """t, or (constant) t as if it were a number: the focusing weights of timm's disable_torch_grad_focal_loss."""
    return t.detach() if constant else t


@register_elementwise_loss
class Asymmetric(ElementwiseLoss):
    """Asymmetric loss (Ridnik et al., arXiv:2009.14119), with timm's options and clamps: eps bounds the probability inside each logarithm.

    A positive below log(eps) gets no gradient but its focusing weight's; eps=0 removes the clamp."""

    name: ClassVar[str] = "asymmetric"
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
        if clip > 0.0:
            q = (torch.sigmoid(s) - clip).clamp(min=0.0)
            value = -torch.log1p(-q)
            return value * _held(q.pow(gamma_neg), constant) if gamma_neg else value
        value = -F.logsigmoid(-s)
        if eps > 0.0:
            value = value.clamp(max=-math.log(eps))
        return value * _held(torch.exp(gamma_neg * F.logsigmoid(s)), constant) if gamma_neg else value

    @classmethod
    def negative_with_slope(cls, s, gamma_neg, gamma_pos, clip, eps, constant):
        if clip <= 0.0:
            if eps > 0.0 or constant:
                return super().negative_with_slope(s, gamma_neg, gamma_pos, clip, eps, constant)
            return Focal.negative_with_slope(s, -1.0, gamma_neg)
        sigma = torch.sigmoid(s.detach())
        q = (sigma - clip).clamp_(min=0.0)
        value = (-q).log1p_().neg_()
        inner = sigma.sub_(sigma * sigma)  # d sigma / ds
        if gamma_neg == 0.0:
            return value, inner.mul_(q > 0.0).div_(1.0 - q)
        if constant:
            power = _power(q, gamma_neg)
            return value.mul_(power), inner.mul_(power).mul_(q > 0.0).div_(1.0 - q)
        # q^(g-1) [q / (1 - q) + g value]
        slope = (q / (1.0 - q)).add_(value, alpha=gamma_neg).mul_(inner)
        if gamma_neg != 1.0:
            slope.mul_(_power(q.clamp_min(torch.finfo(q.dtype).tiny) if gamma_neg < 1.0 else q, gamma_neg - 1.0))
        return value.mul_(_power(q, gamma_neg)), slope

    @triton_form
    def negative_triton(s, gamma_neg, gamma_pos, clip, eps, constant):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        sigma = tl.where(s < 0.0, e, 1.0) / u
        q = tl.maximum(sigma - clip, 0.0)
        # -log(1 - q): 1 - q = (1 - sigma) + clip, where it is smaller than 1; -log1p(-q) by Kahan where q is small
        rest = tl.where(s < 0.0, 1.0, e) / u + clip
        v = 1.0 - q
        small = tl.where(v == 1.0, q, tl.log(v) * (q / (v - 1.0)))
        value = tl.where(q < 0.5, small, -tl.log(tl.maximum(tl.maximum(rest, eps), 1e-38)))
        power = tl.where(gamma_neg == 0.0, 1.0, tl.exp2(gamma_neg * tl.log2(q)))
        power = tl.where(q > 0.0, power, 0.0)
        return tl.where(s == s, power * value, s)

    @triton_form
    def negative_slope_triton(s, gamma_neg, gamma_pos, clip, eps, constant):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        sigma, other = tl.where(s < 0.0, e, 1.0) / u, tl.where(s < 0.0, 1.0, e) / u
        q = tl.maximum(sigma - clip, 0.0)
        rest = other + clip
        v = 1.0 - q
        small = tl.where(v == 1.0, q, tl.log(v) * (q / (v - 1.0)))
        value = tl.where(q < 0.5, small, -tl.log(tl.maximum(tl.maximum(rest, eps), 1e-38)))
        power = tl.where(gamma_neg == 0.0, 1.0, tl.exp2(gamma_neg * tl.log2(q)))
        own = tl.where(rest < eps, 0.0, sigma * other / tl.maximum(rest, 1e-38))
        # sigma' [q^g / (1 - q) + g q^(g-1) value]
        focus = tl.where(constant != 0.0, 0.0, gamma_neg * sigma * other * value / tl.maximum(q, 1e-38))
        slope = tl.where(q > 0.0, power * (own + focus), 0.0)
        return tl.where(s == s, slope, s)

    @classmethod
    def mixture(cls, s, t, p, gamma_neg, gamma_pos, clip, eps, constant):
        """timm's for soft targets: the exponent and the probability that it is of are mixed, too."""
        up, down = torch.sigmoid(s), torch.sigmoid(-s)
        q = (up - clip).clamp(min=0.0)
        positive, negative = F.logsigmoid(s), torch.log1p(-q) if clip > 0.0 else F.logsigmoid(-s)
        if eps > 0.0:
            positive, negative = positive.clamp(min=math.log(eps)), negative.clamp(min=math.log(eps))
        value = positive * (-t * p) - negative * (1.0 - t)
        if not (gamma_neg or gamma_pos):
            return value
        return value * _held(_missing(t * down + (1.0 - t) * q).pow(gamma_pos * t + gamma_neg * (1.0 - t)), constant)

    @triton_form
    def mixture_triton(s, t, p, gamma_neg, gamma_pos, clip, eps, constant):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
        r = 1.0 / u
        up, down = tl.where(s < 0.0, e, 1.0) * r, tl.where(s < 0.0, 1.0, e) * r
        q = tl.maximum(up - clip, 0.0)
        least = tl.log(tl.maximum(eps, 1e-38))
        positive = tl.maximum(tl.where(s > 0.0, 0.0, s) - log1p, least)
        v = 1.0 - q
        small = tl.where(v == 1.0, -q, tl.log(v) * (q / (1.0 - v)))
        negative = tl.maximum(tl.where(q < 0.5, small, tl.log(tl.maximum(down + clip, 1e-38))), least)
        negative = tl.where(clip > 0.0, negative, tl.maximum(tl.where(s > 0.0, -s, 0.0) - log1p, least))
        value = -t * p * positive - (1.0 - t) * negative
        power = (gamma_pos * t + gamma_neg * (1.0 - t)) * tl.log2(tl.maximum(t * down + (1.0 - t) * q, 1e-38))
        return tl.where(s == s, value * tl.exp2(power), s)

    @triton_form
    def mixture_slope_triton(s, t, p, gamma_neg, gamma_pos, clip, eps, constant):
        e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
        r = 1.0 / u
        up, down = tl.where(s < 0.0, e, 1.0) * r, tl.where(s < 0.0, 1.0, e) * r
        q = tl.maximum(up - clip, 0.0)
        least = tl.log(tl.maximum(eps, 1e-38))
        positive = tl.where(s > 0.0, 0.0, s) - log1p
        v = 1.0 - q
        small = tl.where(v == 1.0, -q, tl.log(v) * (q / (1.0 - v)))
        rest = tl.maximum(down + clip, 1e-38)
        negative = tl.where(clip > 0.0, tl.where(q < 0.5, small, tl.log(rest)), tl.where(s > 0.0, -s, 0.0) - log1p)
        inner = tl.where(q > 0.0, up * down, 0.0)  # dq / ds
        own = (1.0 - t) * tl.where(negative < least, 0.0, inner / rest) - t * p * tl.where(positive < least, 0.0, down)
        value = -t * p * tl.maximum(positive, least) - (1.0 - t) * tl.maximum(negative, least)
        gamma, missing = gamma_pos * t + gamma_neg * (1.0 - t), tl.maximum(t * down + (1.0 - t) * q, 1e-38)
        focus = tl.where(constant != 0.0, 0.0, value * gamma * ((1.0 - t) * inner - t * up * down) / missing)
        return tl.where(s == s, tl.exp2(gamma * tl.log2(missing)) * (own + focus), s)


@register_elementwise_loss
class SquaredHinge(ElementwiseLoss):
    """Squared hinge: exactly 0 for a negative below -margin, a positive above it."""

    name: ClassVar[str] = "squared_hinge"
    options: ClassVar[Mapping[str, float]] = {"margin": 1.0}
    vanishes: ClassVar[bool] = True

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

    @triton_form
    def negative_triton(s, margin: Any):
        u = s + margin
        u = tl.where(u < 0.0, 0.0, u)  # keeps NaN
        return u * u

    @triton_form
    def negative_slope_triton(s, margin: Any):
        u = s + margin
        return tl.where(u < 0.0, 0.0, 2.0 * u)

    @triton_form
    def positive_triton(s, margin: Any):
        u = margin - s
        u = tl.where(u < 0.0, 0.0, u)
        return u * u

    @triton_form
    def positive_slope_triton(s, margin: Any):
        u = margin - s
        return tl.where(u < 0.0, 0.0, -2.0 * u)

"""Pieces of the Triton forms of one-vs-all losses, in fp32: logistic functions that lose no digits on either side.

1.2e-38 stands for next to nothing: Triton takes a literal below fp32's least normal number for fp64, and all that meets it."""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# (the language of Triton forms has other types than Python's)

from __future__ import annotations

from typing import TYPE_CHECKING

from bigclass.core.triton_form import triton_form, triton_form_with

if TYPE_CHECKING:
    import triton.language as tl


@triton_form
def logistic(s):
    """log(1 + e^-|s|), sigma(s), sigma(-s)"""
    e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
    u = 1.0 + e
    r = 1.0 / u
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))  # Kahan's: log u alone loses e below 2^-24
    return log1p, tl.where(s < 0.0, e, 1.0) * r, tl.where(s < 0.0, 1.0, e) * r


@triton_form
def positive_part(s):
    """max(s, 0), which keeps NaN"""
    return tl.where(s < 0.0, 0.0, s)


@triton_form
def power(q, gamma):
    """q^gamma for q >= 0; 0^0 = 1"""
    return tl.exp2(gamma * tl.log2(tl.maximum(q, 1.2e-38)))


@triton_form_with(positive_part=positive_part)
def cross_entropy(s, a, b, log1p):
    """a sp(s) + b sp(-s)"""
    return a * positive_part(s) + b * positive_part(-s) + (a + b) * log1p


@triton_form_with(positive_part=positive_part)
def log_missing(s, q, log1p, down, clip):
    """log(1 - q), q = max(sigma - clip, 0)"""
    v = 1.0 - q
    small = tl.where(v == 1.0, -q, tl.log(v) * (q / (1.0 - v)))
    shifted = tl.where(q < 0.5, small, tl.log(tl.maximum(down + clip, 1.2e-38)))
    return tl.where(clip > 0.0, shifted, -positive_part(s) - log1p)

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
    r = 1.0 / (1.0 + e)
    # log(1 + e) = e P(e), relative to it within 4.7e-9 on [0, 1] (least maximum by reweighted least squares), in fp32 1.5e-7: no logarithm
    p = -0.05695890635251999 + e * (0.01985112763941288 - e * 0.0032439506612718105)
    p = -0.24954131245613098 + e * (0.19675926864147186 + e * (-0.15305554866790771 + e * (0.10603591054677963 + e * p)))
    log1p = e * (1.0 + e * (-0.4999990165233612 + e * (0.3332996070384979 + e * p)))
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

"""The margin losses as plain formulas over the whole matrix of cosines, in any dtype."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import exact_nll


def dense_margin_loss(
    x: Tensor, w: Tensor, y: Tensor, margins, *, scale=64.0, centres=1, beyond_pi="plain", straight_through=False, t=None
) -> Tensor:
    """Losses (N,): all cosines, the target's replaced by cos(m1 theta + m2) - m3, cross-entropy."""
    m1, m2, m3 = margins
    cos = (F.normalize(x) @ F.normalize(w).t()).unflatten(1, (-1, centres)).max(2).values
    c = cos.gather(1, y[:, None])[:, 0]
    angle = m1 * torch.acos(c) + m2
    turned = torch.cos(angle)
    if beyond_pi == "linear":
        f = torch.where(angle < math.pi, turned, c - m2 * math.sin(m2))
    elif beyond_pi == "easy":
        f = torch.where(c > 0, turned, c)
    elif beyond_pi == "monotone":
        k = torch.floor(angle / math.pi)
        f = (1 - 2 * (k % 2)) * turned - 2 * k
    elif beyond_pi == "clip":
        f = torch.cos(angle.clamp(0, math.pi))
    else:
        f = turned
    f = f - m3
    if straight_through:
        f = c + (f - c).detach()
    if t is not None:
        cos = torch.where(cos > (turned - m3)[:, None], cos * (t + cos), cos)
    return exact_nll(scale * cos.scatter(1, y[:, None], f[:, None]), y)

"""Rounding fp32 to bf16 at random, without bias.

A bf16 number is an fp32 number whose lower 16 bits are 0. For x between the neighbours l and u (|l| <= |x| <= |u|),

    round(x) = u with probability (x - l) / (u - l), else l:          E[round(x)] = x

The lower 16 bits of x are that probability times 2^16. So 16 random bits are added to x as an integer, which carries into the bits
above exactly that often, and the lower half is cut off. Sign and magnitude are apart in the format: both signs round alike.

Rounding to nearest would lose an update below half a unit of the weight's last place, 2^-9 of it, every time; here it is kept on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.bfloat16).max


def round_stochastically(out: Tensor, values: Tensor, generator: torch.Generator | None = None) -> None:
    """out (bf16) <- values (fp32, same shape, used up) rounded at random. Beside them it takes 1.25 times the memory of values.

    Numbers of bf16 stay what they are, zeros' signs, infinities and NaN among them. What is finite stays finite: beyond the largest
    number there is no upper neighbour to round to, so it becomes that number.
    """
    # Not every NaN has a bit in its upper half: without this, one that has none would be cut to an infinity.
    values.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)
    bits = values.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    # Finite numbers would carry to infinity, and a NaN on into its sign.
    noise.masked_fill_(values.lt(LARGEST).logical_not_(), 0).masked_fill_(values.le(-LARGEST), 0)
    bits.add_(noise).bitwise_and_(-(1 << 16))
    out.copy_(values)

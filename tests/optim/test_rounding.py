"""Rounding at random: only the two neighbours, on average the number itself, and what bf16 has stays."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigclass.optim import SlabRowAdam, SlabSGD
from bigclass.optim.rounding import LARGEST, round_stochastically
from tests.optim.support import gradients, parameter, step_in_slabs


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically(out, values.clone(), torch.Generator().manual_seed(seed))
    return out


def neighbours(x: float) -> tuple[float, float]:
    """The numbers of bf16 next to x, the one nearer 0 first; the same twice if x is one."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    low = bits & 0xFFFF0000
    high = low if bits == low or low & 0x7FFFFFFF == 0x7F7F0000 else low + 0x10000
    return tuple(struct.unpack("<f", struct.pack("<I", b))[0] for b in (low, high))  # pyright: ignore[reportReturnType]


@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False), seed=st.integers(0, 99))
def test_only_the_two_neighbours_occur(x, seed):
    low, high = neighbours(x)
    out = rounded(torch.full((64,), x), seed).double()
    assert ((out == low) | (out == high)).all()
    assert (out.signbit() == torch.tensor(x).signbit()).all()


@pytest.mark.parametrize("share", [2**-16, 0.01, 0.25, 0.5, 0.9, 1 - 2**-16])
@pytest.mark.parametrize("base", [1.0, -1.0, 255.0, 2.0**-126, -(2.0**-130), 3e38])
def test_the_mean_of_many_draws_is_the_number(base, share):
    """A count of draws from a binomial distribution: within five standard deviations (and never all, never none, where both are likely)."""
    n = 1 << 18
    low = float(torch.tensor(base).bfloat16())
    high = float((torch.tensor(base).bfloat16().view(torch.int16) + 1).view(torch.bfloat16))
    x = torch.tensor(low + share * (high - low), dtype=torch.float64).float()
    chance = (float(x) - low) / (high - low)
    ups = int((rounded(x.expand(n).contiguous()).double() == high).sum())
    assert abs(ups - n * chance) <= 5 * math.sqrt(n * chance * (1 - chance)) + 1
    if n * min(chance, 1 - chance) > 100:
        assert 0 < ups < n


def test_every_number_of_bf16_stays_what_it_is():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(torch.bfloat16)
    for seed in range(3):
        out = rounded(exact.float(), seed)
        numbers = ~exact.isnan()
        assert torch.equal(out.view(torch.int16)[numbers], bits[numbers])  # bits: the sign of 0 too
        assert out[~numbers].isnan().all()


def test_every_kind_of_nan_stays_nan():
    """A NaN with bits in its lower half only would be cut to an infinity, and one full of bits carry into the sign."""
    bits = torch.tensor([0x7F800001, 0x7F80FFFF, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
    assert bits.view(torch.float32).isnan().all()
    assert rounded(bits.repeat(50).view(torch.float32)).isnan().all()


def test_finite_numbers_stay_finite():
    largest = torch.finfo(torch.float32).max
    out = rounded(torch.tensor([largest, -largest, LARGEST, math.inf, -math.inf]).repeat(100))
    assert torch.equal(out.view(100, 5).double(), torch.tensor([LARGEST, -LARGEST, LARGEST, math.inf, -math.inf]).double().expand(100, 5))


def test_is_reproducible_from_its_generator_and_from_the_default_one():
    x = torch.randn(1000)
    assert torch.equal(rounded(x, 3), rounded(x, 3))
    assert not torch.equal(rounded(x, 3), rounded(x, 4))
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        out = torch.empty(1000, dtype=torch.bfloat16)
        round_stochastically(out, x.clone())
        outs.append(out)
    assert torch.equal(*outs)


def test_strided_values_and_results():
    x = torch.randn(6, 10)
    out = torch.zeros(10, 12, dtype=torch.bfloat16)
    round_stochastically(out[:, ::2].t(), x.clone().t().contiguous().t(), torch.Generator().manual_seed(0))
    assert ((out[:, ::2].t().float() - x).abs() <= 2**-7 * x.abs()).all()
    assert (out[:, 1::2] == 0).all()


@pytest.mark.parametrize("kind", [SlabSGD, SlabRowAdam])
def test_updates_too_small_for_bf16_add_up(kind):
    """lr is 2^-13 and a weight of 1 has neighbours 2^-8 and 2^-7 away: to nearest, nothing would ever move."""
    moved = {}
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = kind([p], 2.0**-13, stochastic_rounding=stochastic, generator=torch.Generator().manual_seed(0))
        for _ in range(100):
            step_in_slabs(optimizer, p, torch.ones(64, 64), 16)
        moved[stochastic] = float(1 - p.detach().double().mean())
    assert moved[False] == 0.0
    # a step down is one of 2^-8 with chance 2^-5: the mean over 4096 weights of 100 steps has a standard deviation of about 1e-4
    assert abs(moved[True] - 100 * 2.0**-13) < 5e-4


@pytest.mark.parametrize("kind", [SlabSGD, SlabRowAdam])
def test_a_step_goes_to_a_neighbour_of_the_exact_one(kind):
    p, q = parameter(dtype=torch.bfloat16), parameter(dtype=torch.bfloat16)
    exact = torch.nn.Parameter(p.detach().float())
    (g,) = gradients(p, 1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    step_in_slabs(kind([p], 0.1, stochastic_rounding=True, generator=generator), p, g, 3)
    step_in_slabs(kind([exact], 0.1), exact, g, 3)
    assert not torch.equal(p, q)
    assert ((p.float() - exact).abs() <= 2**-7 * exact.abs() + 1e-7).all()


def test_parameters_that_are_not_bf16_are_refused():
    with pytest.raises(TypeError, match=r"stochastic_rounding: expected bfloat16 parameters, got torch.float32"):
        SlabSGD([parameter(dtype=torch.float32)], 0.1, stochastic_rounding=True)
    groups = [{"params": [parameter(dtype=torch.bfloat16)]}, {"params": [parameter((7,), torch.float32)], "stochastic_rounding": False}]
    SlabRowAdam(groups, 0.1, stochastic_rounding=True)

"""SlabRowAdam is its formula, in any slabs; of one axis it is torch.optim.AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigclass.optim import SlabRowAdam
from tests.optim.support import gradients, parameter, step_in_slabs, step_whole


def by_hand(rows, steps, lr, betas, eps, weight_decay):
    """The formula on lists of floats: rows [[w]], steps [[[g]]]."""
    v = [0.0] * len(rows)
    m = [[0.0] * len(row) for row in rows]
    for t, g in enumerate(steps, 1):
        for j, row in enumerate(rows):
            v[j] = betas[1] * v[j] + (1 - betas[1]) * sum(x * x for x in g[j]) / len(g[j])
            for d in range(len(row)):
                m[j][d] = betas[0] * m[j][d] + (1 - betas[0]) * g[j][d]
                direction = m[j][d] / (1 - betas[0] ** t) / (math.sqrt(v[j] / (1 - betas[1] ** t)) + eps)
                row[d] = (1 - lr * weight_decay) * row[d] - lr * direction
    return rows


OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.01, 1.0]),
        "betas": st.sampled_from([(0.0, 0.999), (0.9, 0.99), (0.5, 0.0), (0.0, 0.5)]),
        "eps": st.sampled_from([1e-8, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
    }
)


@settings(max_examples=200)
@given(
    options=OPTIONS, shape=st.sampled_from([(7, 3), (1, 1), (4, 2, 3)]), steps=st.integers(1, 5), size=st.integers(0, 8), back=st.booleans()
)
def test_is_its_formula_in_any_slabs(options, shape, steps, size, back):
    """size 0: `step` itself."""
    p = parameter(shape)
    rows = p.detach().flatten(1).tolist()
    optimizer = SlabRowAdam([p], **options)
    made = list(gradients(p, steps))
    made[0][0] = 0.0  # a row without gradient
    for g in made:
        if size:
            step_in_slabs(optimizer, p, g, size, backwards=back)
        else:
            step_whole(optimizer, p, g)
    expected = by_hand(rows, [g.flatten(1).tolist() for g in made], **options)
    torch.testing.assert_close(p.detach().flatten(1), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(options=OPTIONS, shape=st.sampled_from([(5,), (), (6, 1)]), size=st.integers(1, 6))
def test_rows_of_one_number_are_adamw(options, shape, size):
    p, q = parameter(shape), parameter(shape)
    ours, theirs = SlabRowAdam([p], **options), torch.optim.AdamW([q], **options)
    for g in gradients(p, 4):
        step_in_slabs(ours, p, g, size)
        step_whole(theirs, q, g)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40)
@given(options=OPTIONS, size=st.integers(1, 8))
def test_other_dtypes_take_the_exact_step_rounded_once(dtype, options, size):
    p = parameter(dtype=dtype)
    exact = torch.nn.Parameter(p.detach().double())
    (g,) = gradients(p, 1, dtype=torch.float32)
    step_in_slabs(SlabRowAdam([p], **options), p, g, size)
    step_in_slabs(SlabRowAdam([exact], **options), exact, g, 100)
    error = (p.detach().double() - exact.detach()).abs()
    assert (error <= (0.5 + 1e-3) * torch.finfo(dtype).eps * exact.detach().abs() + 1e-6).all()


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])
def test_state_is_one_number_a_row_unless_there_is_a_first_moment(betas):
    p = parameter((50, 8), torch.bfloat16)
    optimizer = SlabRowAdam([p], 0.1, betas)
    step_whole(optimizer, p, next(gradients(p, 1)))
    state = optimizer.state[p]
    assert (state["row_exp_avg_sq"].shape, state["row_exp_avg_sq"].dtype, state["step"]) == ((50,), torch.float32, 1)
    assert ("exp_avg" in state) == (betas[0] > 0)


def test_parameters_without_numbers_stay_so():
    for shape in ((0, 3), (3, 0)):
        p = parameter(shape)
        optimizer = SlabRowAdam([p], 0.1)
        step_whole(optimizer, p, torch.empty(shape))
        step_in_slabs(optimizer, p, torch.empty(shape), 2)
        assert p.shape == shape and not any(torch.isnan(t).any() for t in optimizer.state[p].values() if isinstance(t, torch.Tensor))

"""SlabSGD is torch.optim.SGD, whole and in slabs; of half-precision parameters it is more exact."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigclass.optim import SlabSGD
from tests.optim.support import SHAPES, gradients, parameter, step_in_slabs, step_whole


@st.composite
def options(draw):
    momentum = draw(st.sampled_from([0.0, 0.5, 0.99]))
    nesterov = momentum > 0 and draw(st.booleans())
    return {
        "lr": draw(st.sampled_from([0.0, 0.03, 1.0])),
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": 0.0 if nesterov else draw(st.sampled_from([0.0, 0.3])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
    }


@settings(max_examples=200)
@given(options=options(), shape=st.sampled_from(SHAPES), steps=st.integers(1, 5), size=st.integers(0, 8), backwards=st.booleans())
def test_equals_torch_in_any_slabs(options, shape, steps, size, backwards):
    """size 0: `step` itself."""
    p, q = parameter(shape), parameter(shape)
    ours, theirs = SlabSGD([p], **options), torch.optim.SGD([q], **options)
    for g in gradients(p, steps):
        step_whole(theirs, q, g)
        if size:
            step_in_slabs(ours, p, g, size, backwards=backwards)
        else:
            step_whole(ours, p, g)
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert ours.state_dict()["state"].get(0, {}).keys() <= {"momentum_buffer"}


@settings(max_examples=50)
@given(options=options(), steps=st.integers(1, 5), size=st.integers(1, 8))
def test_equals_torch_in_fp32(options, steps, size):
    p, q = parameter(dtype=torch.float32), parameter(dtype=torch.float32)
    ours, theirs = SlabSGD([p], **options), torch.optim.SGD([q], **options)
    for g in gradients(p, steps):
        step_whole(theirs, q, g)
        step_in_slabs(ours, p, g, size)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(options=options(), size=st.integers(1, 8))
def test_half_precision_parameters_are_rounded_once(dtype, options, size):
    """One step from fp32 gradients is the exact step, rounded."""
    p = parameter(dtype=dtype)
    exact = torch.nn.Parameter(p.detach().double())
    (g,) = gradients(p, 1, dtype=torch.float32)
    step_in_slabs(SlabSGD([p], **options), p, g, size)
    step_whole(torch.optim.SGD([exact], **options), exact, g)
    error = (p.detach().double() - exact.detach()).abs()
    assert (error <= (0.5 + 1e-3) * torch.finfo(dtype).eps * exact.detach().abs() + 1e-7).all()


@pytest.mark.parametrize(("momentum_dtype", "kept"), [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_momentum_in_a_dtype_of_its_own(momentum_dtype, kept):
    """With fp32 momentum the steps follow the exact ones as closely as rounding the weights allows."""
    p = parameter(dtype=torch.bfloat16)
    exact = torch.nn.Parameter(p.detach().double())
    ours = SlabSGD([p], 0.01, 0.9, momentum_dtype=momentum_dtype)
    theirs = torch.optim.SGD([exact], 0.01, 0.9)
    for g in gradients(p, 5, dtype=torch.float32):
        step_in_slabs(ours, p, g, 2)
        step_whole(theirs, exact, g)
    m = ours.state[p]["momentum_buffer"]
    assert m.dtype == kept
    tolerance = 1e-6 if kept == torch.float32 else 2e-2
    torch.testing.assert_close(m.double(), theirs.state[exact]["momentum_buffer"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_goes_on_from_a_checkpoint_of_torch_and_back(momentum):
    p, q = parameter(), parameter()
    ours, theirs = SlabSGD([p], 0.5, momentum), torch.optim.SGD([q], 0.1, momentum, weight_decay=0.01)
    for g in gradients(p, 3):
        step_whole(theirs, q, g)
    with torch.no_grad():
        p.copy_(q)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for g in gradients(p, 3, seed=2):
        step_whole(theirs, q, g)
        step_in_slabs(ours, p, g, 2)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for g in gradients(p, 3, seed=3):
        step_whole(theirs, q, g)
        step_in_slabs(ours, p, g, 2)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_momentum_switched_on_later_begins_with_that_gradient():
    """As torch.optim.SGD, which makes its buffer then; dampening is not applied to it."""
    p, q = parameter(), parameter()
    ours, theirs = SlabSGD([p], 0.1, dampening=0.5), torch.optim.SGD([q], 0.1, dampening=0.5)
    for i, g in enumerate(gradients(p, 4)):
        ours.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = 0.0 if i < 2 else 0.9
        step_whole(theirs, q, g)
        step_in_slabs(ours, p, g, 3)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)

"""Adapters as the kernels' second operand pair."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bigclass
from tests.losses.test_lora import adapted, adapters, leaves
from tests.support import draw, error, errors


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_frozen_head_has_the_gradients_of_the_merged_one(dtype, gradients):
    x, w, b, y = draw("peaked", 33, 70, 16, dtype, seed=1)
    w.requires_grad_(False)
    lora = adapters(70, 16, (3,), dtype)
    exact = F.cross_entropy(F.linear(x.double(), adapted(w, lora), b.double()), y)
    with bigclass.planning(gradients=gradients):
        loss = bigclass.linear_cross_entropy(x, w, y, linear_bias=b, lora=lora, engine="fused")
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    assert error(loss, exact) < limit
    args = [*leaves(x, lora), b]
    assert all(e < limit for e in errors(torch.autograd.grad(loss, args), torch.autograd.grad(exact, args)))


def test_products_of_two_types_are_refused_with_the_reason():
    x, w, _, y = draw("flat", 5, 40, 16, torch.bfloat16, seed=2)
    with pytest.raises(ValueError, match=r"one type for all pairs, not torch\.bfloat16, torch\.float32"):
        bigclass.linear_cross_entropy(x, w, y, lora=adapters(40, 16, (2,), torch.float32), engine="fused")

"""Contrastive losses on the fused engine, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import bigclass
from tests.losses.contrastive_support import Batch, batches
from tests.losses.test_contrastive import ours, relative, with_gradients

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@settings(max_examples=12, phases=[Phase.generate])
@given(
    batch=batches(dtypes=(torch.float32,), most=90), direction=st.sampled_from(("both", "image", "text")),
    reduction=st.sampled_from(("mean", "sum")),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_definition(sigmoid, batch, direction, reduction):
    made = with_gradients(ours(batch, sigmoid, direction, reduction, engine="fused"), batch.leaves)
    exact = batch.exact(sigmoid, direction, reduction)
    # logits up to 112 in fp32 leave 1e-5 to a softmax; a gradient far below the loss is a difference of numbers of its size
    assert max(relative(made, exact, 3e-2 * max(1.0, float(exact[0].detach())))) < 3e-5


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_half_features_and_a_confident_batch(sigmoid):
    image = F.normalize(torch.randn(70, 48)).bfloat16().requires_grad_()
    text = F.normalize(image.detach().float() + 0.02 * torch.randn(70, 48)).bfloat16().requires_grad_()
    bias = torch.tensor(-45.0, requires_grad=True) if sigmoid else None
    batch = Batch(image, text, torch.tensor(60.0, requires_grad=True), bias, None, None, None)
    made = with_gradients(ours(batch, sigmoid, "both", "mean", engine="fused"), batch.leaves)
    exact = batch.exact(sigmoid, "both", "mean")
    assert float(exact[0].detach()) < (1e-3 if sigmoid else 1e-6)
    assert made[1].dtype == torch.bfloat16 and made[0].dtype == torch.float32
    assert max(relative(made, exact, 0.0)) < 4e-3


def test_the_sigmoid_takes_the_slabs_and_its_bias_stands_behind_the_scale():
    image, text = (F.normalize(torch.randn(40, 20)).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor(-4.0, requires_grad=True)
    batch = Batch(image, text, scale, bias, None, None, None)
    exact = batch.exact(True, "both", "mean")
    for gradients in ("auto", "recompute"):
        with bigclass.planning(gradients=gradients):
            made = with_gradients(ours(batch, True, "both", "mean", engine="fused"), batch.leaves)
        assert max(relative(made, exact, 0.0)) < 3e-6

"""Weights updated in the backward on a GPU, and gradients added straight into .grad."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bigclass
from bigclass.optim import SlabRowAdam, SlabSGD
from tests.support import error

from .support import DEVICE, at, every_dtype, every_engine, no_sync, wide

N, C, D = at((500, 20000, 128), (30, 150, 24))
MAKERS = {
    "sgd": lambda p, **more: SlabSGD(p, lr=5.0, momentum=0.9, nesterov=True, weight_decay=1e-3, **more),
    "sgd, plain": lambda p, **more: SlabSGD(p, lr=5.0, **more),
    "row adam": lambda p, **more: SlabRowAdam(p, lr=0.01, weight_decay=0.1, **more),
    "row adam, first moment": lambda p, **more: SlabRowAdam(p, lr=0.01, betas=(0.9, 0.99), **more),
}
LOSSES = {
    "cross-entropy": lambda x, w, y, **o: bigclass.linear_cross_entropy(x, w, y, softcap=20.0, z_loss=1e-3, **o),
    "bce": lambda x, w, y, **o: bigclass.linear_binary_cross_entropy(x, w, y.clamp_min(-1)[:, None], reduction="batchmean", **o),
    "zlpr": lambda x, w, y, **o: bigclass.linear_zlpr_loss(x, w, y.clamp_min(-1)[:, None], **o),
    "arcface": lambda x, w, y, **o: bigclass.linear_margin_loss(x, w, y, logit_scale=16.0, **o),
}


def batches(dtype: torch.dtype, steps: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        y = torch.randint(C, (N,), generator=g)
        y[::5] = -100
        made.append((torch.randn(N, D, generator=g).to(DEVICE, dtype), y.to(DEVICE)))
    return made


def weight(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter((torch.randn(C, D, generator=torch.Generator().manual_seed(1)) * D**-0.5).to(DEVICE, dtype))


@every_engine
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_updates_in_the_backward_equal_the_two_step_form_and_do_not_wait(engine, loss, make):
    """Three steps, in slabs; the second and third must not wait. Against float64, where both forms are exact."""
    results = []
    for dtype, updating, which in ((torch.float32, True, engine), (torch.float64, False, "dense")):
        w, seen = weight(torch.float32), []
        w = w if dtype == torch.float32 else nn.Parameter(w.detach().double())
        before = w.detach().clone()
        optimizer = make([w])
        for step, (x, y) in enumerate(batches(torch.float32, 3)):
            x = x.to(dtype).requires_grad_()

            def once(x=x, y=y, w=w, optimizer=optimizer, updating=updating, which=which) -> list[Tensor]:
                with bigclass.planning(workspace=1 << 20):
                    value = loss(x, w, y, engine=which, update=optimizer if updating else None)
                    (0.5 * value).backward()
                optimizer.step()
                assert (w.grad is None) == updating
                optimizer.zero_grad()
                return [value.detach(), x.grad]

            if updating and step:
                with no_sync():
                    seen += once()
            else:
                seen += once()
        results.append([w.detach() - before, *seen])
    for i, (got, want) in enumerate(zip(*results, strict=True)):  # how far the weight went: its own rounding shows there
        assert got.any() and error(got, want) < (5e-3 if i == 0 else 2e-4), f"output {i}: {error(got, want):.1e}"


@every_engine
@every_dtype
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_are_added_into_grad_over_steps(engine, dtype, loss):
    """Pitfall 49: the same as autograd's own, without a second C x D tensor."""
    w, truth = weight(dtype), wide(weight(dtype), True)
    limit = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}[dtype]
    for step, (x, y) in enumerate(batches(dtype, 3)):
        loss(wide(x), truth, y, engine="dense").backward()

        def once(x=x, y=y) -> None:
            loss(x, w, y, engine=engine, update=bigclass.GradAccumulator()).backward()

        if step:
            with no_sync():
                once()
        else:
            once()
    assert w.grad is not None and truth.grad is not None and w.grad.dtype == dtype
    assert error(w.grad, truth.grad) < limit


@every_engine
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_stochastic_rounding_moves_half_precision_weights_and_can_be_repeated(engine, make):
    """Steps far below half an ulp, which rounding to nearest would lose; a scaler's factor is taken back."""
    ends = []
    for _ in range(2):
        w = weight(torch.bfloat16)
        optimizer = make([w], stochastic_rounding=True, generator=torch.Generator(DEVICE).manual_seed(0))
        optimizer.grad_scale = torch.full((), 8.0, device=DEVICE)
        optimizer.param_groups[0]["lr"] = 1e-3
        for x, y in batches(torch.bfloat16, 3):
            value = bigclass.linear_cross_entropy(x, w, y, engine=engine, update=optimizer)
            assert isinstance(value, Tensor)
            (8.0 * value).backward()
            optimizer.step()
        ends.append(w.detach())
    assert torch.equal(ends[0], ends[1]) and ends[0].isfinite().all()
    assert not torch.equal(ends[0], weight(torch.bfloat16))

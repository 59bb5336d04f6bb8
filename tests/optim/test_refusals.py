"""What the slab optimizers cannot do is refused: options, parameters, slabs, steps, states."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.distributed
import torch.distributed.tensor
from torch import nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.optim import SlabRowAdam, SlabSGD
from tests.optim.support import parameter, step_whole

W = parameter((4, 3), torch.float32)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: SlabSGD([W], -0.1), ArgumentError, "lr: expected a finite value of at least 0, got -0.1"),
        (lambda: SlabSGD([W], math.nan), ArgumentError, "lr: expected"),
        (lambda: SlabSGD([W], math.inf), ArgumentError, "lr: expected"),
        (lambda: SlabSGD([W], "0.1"), ArgumentTypeError, "lr: expected a number"),  # pyright: ignore[reportArgumentType]
        (lambda: SlabSGD([W], torch.ones(2)), ArgumentError, "lr: expected a number, or a tensor of one element"),
        (lambda: SlabSGD([W], torch.ones((), device="meta")), ArgumentError, "on the CPU"),
        (lambda: SlabSGD([W], 0.1, -0.5), ArgumentError, "momentum: expected"),
        (lambda: SlabSGD([W], 0.1, 0.5, -0.5), ArgumentError, "dampening: expected"),
        (lambda: SlabSGD([W], 0.1, nesterov=True), ArgumentError, "nesterov: expected momentum > 0"),
        (lambda: SlabSGD([W], 0.1, 0.9, 0.1, nesterov=True), ArgumentError, "nesterov: expected"),
        (lambda: SlabSGD([W], 0.1, weight_decay=-1.0), ArgumentError, "weight_decay: expected"),
        (lambda: SlabSGD([W], 0.1, momentum_dtype=torch.int64), ArgumentTypeError, "momentum_dtype: expected"),
        (lambda: SlabRowAdam([W], -0.1), ArgumentError, "lr: expected"),
        (lambda: SlabRowAdam([W], 0.1, (0.9, 1.0)), ArgumentError, "beta2: expected 0 <= beta2 < 1, got 1.0"),
        (lambda: SlabRowAdam([W], 0.1, (-0.9, 0.9)), ArgumentError, "beta1: expected"),
        (lambda: SlabRowAdam([W], 0.1, 0.9), ArgumentError, "betas: expected a pair"),  # pyright: ignore[reportArgumentType]
        (lambda: SlabRowAdam([W], 0.1, eps=-1.0), ArgumentError, "eps: expected"),
        (lambda: SlabSGD([torch.zeros(3, dtype=torch.int64)], 0.1), ArgumentTypeError, "params: expected float64"),
        (lambda: SlabSGD([torch.zeros(3, 3).to_sparse()], 0.1), ArgumentTypeError, "params: expected plain dense tensors"),
        (lambda: SlabSGD([{"params": [W], "lr": -1.0}], 0.1), ArgumentError, "lr: expected"),
    ],
)
def test_options_out_of_range_are_refused(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_a_refused_group_is_not_kept():
    optimizer = SlabSGD([W], 0.1)
    for wrong in ({"lr": -1.0}, {"stochastic_rounding": True}):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            optimizer.add_param_group({"params": [parameter((2,), torch.float32)], **wrong})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("start", "stop", "gradient", "kind", "words"),
    [
        (0, 2, torch.ones(3, 3), ArgumentError, "gradient: expected shape (2, 3), that of the rows, got (3, 3)"),
        (0, 2, torch.ones(2), ArgumentError, "gradient: expected shape (2, 3)"),
        (
            0,
            2,
            torch.ones(2, 3, dtype=torch.float64),
            ArgumentTypeError,
            "gradient: expected torch.float32 for a parameter in torch.float32",
        ),
        (0, 2, torch.ones(2, 3, dtype=torch.bfloat16), ArgumentTypeError, "gradient: expected torch.float32"),
        (0, 2, torch.ones(2, 3, device="meta"), ArgumentError, "gradient: expected device cpu"),
        (0, 2, [[1.0] * 3] * 2, ArgumentTypeError, "gradient: expected a tensor"),
        (-1, 1, torch.ones(2, 3), ArgumentError, "start, stop: expected 0 <= start <= stop <= 4 (the rows), got -1, 1"),
        (2, 1, torch.ones(1, 3), ArgumentError, "start, stop: expected"),
        (3, 5, torch.ones(2, 3), ArgumentError, "start, stop: expected"),
    ],
)
def test_slabs_that_do_not_fit_are_refused(start, stop, gradient, kind, words):
    p = parameter((4, 3), torch.float32)
    optimizer = SlabSGD([p], 0.1)
    optimizer.begin_step(p)
    with pytest.raises(kind, match=re.escape(words)):
        optimizer.update_slab(p, start, stop, gradient)
    assert torch.equal(p, parameter((4, 3), torch.float32))


def test_a_step_is_begun_once_and_ends_with_its_last_row():
    p, other = parameter((4, 3), torch.float32), parameter((4, 3), torch.float32)
    optimizer = SlabRowAdam([p], 0.1)
    with pytest.raises(ArgumentError, match="call begin_step"):
        optimizer.update_slab(p, 0, 4, torch.ones(4, 3))
    with pytest.raises(ArgumentError, match="one of this optimizer's own"):
        optimizer.begin_step(other)
    optimizer.begin_step(p)
    optimizer.update_slab(p, 2, 4, torch.ones(2, 3))
    optimizer.update_slab(p, 2, 2, torch.ones(0, 3))
    with pytest.raises(ArgumentError, match="2 rows that this step has left"):
        optimizer.update_slab(p, 0, 3, torch.ones(3, 3))
    optimizer.update_slab(p, 0, 2, torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="call begin_step"):
        optimizer.update_slab(p, 0, 2, torch.ones(2, 3))
    assert optimizer.state[p]["step"] == 1


def test_state_of_another_shape_and_sparse_gradients_are_refused():
    p, q = parameter((4, 3)), parameter((5, 3))
    optimizer, other = SlabSGD([p], 0.1, 0.9), SlabSGD([q], 0.1, 0.9)
    step_whole(optimizer, p, torch.ones(4, 3))
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ArgumentError, match=r"state momentum_buffer: expected shape \(5, 3\), got \(4, 3\)"):
        other.begin_step(q)
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ArgumentTypeError, match="dense gradient"):
        SlabSGD(embedding.parameters(), 0.1).step()


def test_tensors_in_shards_are_refused():
    """Slices of a DTensor may be copies, and their updates lost."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        p = nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.ones(4, 2), mesh))
        with pytest.raises(ArgumentTypeError, match="DTensor"):
            SlabSGD([p], 0.1)
    finally:
        torch.distributed.destroy_process_group()

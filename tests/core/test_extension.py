"""A map, a fold and a row loss from outside: registered here, run by every engine, no engine edited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import bigclass
from bigclass.core import Fold, Map, Stream, SumFold, register_fold, register_map, register_row_loss, stream_loss
from tests.support import ROADS, error


@register_map
@dataclass(frozen=True, eq=False)
class Power(Map):
    """s = sign(z) |z|^p with a learnable p: reads its input for both gradients."""

    name: ClassVar[str] = "tests.power"

    @staticmethod
    def forward(z, numbers, tensors, out=None):
        s = torch.sign(z) * z.abs().clamp_min(1e-30) ** tensors[0]
        return s if out is None else out.copy_(s)

    @staticmethod
    def backward(g, z, s, numbers, tensors):
        return g * tensors[0] * z.abs().clamp_min(1e-30) ** (tensors[0] - 1)

    @staticmethod
    def tensor_gradients(g, z, s, numbers, tensors):
        return ((g * s * z.abs().clamp_min(1e-30).log()).sum().reshape(tensors[0].shape),)


@register_fold
@dataclass(frozen=True, eq=False)
class Hinge(SumFold):
    """sum_j c_j relu(r_i + s_ij)^2, with a row vector r that gets a gradient and a class vector c."""

    name: ClassVar[str] = "tests.hinge"
    tensor_axes: ClassVar[tuple[str, ...]] = ("kept", "folded")

    @staticmethod
    def term(s, numbers, tensors):
        return tensors[1] * torch.relu(tensors[0] + s).square()

    @staticmethod
    def slope(s, numbers, tensors):
        return 2.0 * tensors[1] * torch.relu(tensors[0] + s)

    def tensor_gradient(self, which, tile, tensors, state, grads):
        assert which == 0
        return (self.slope(tile.s, self.numbers, tensors) * grads[0]).sum(-1, keepdim=True)


@register_fold
@dataclass(frozen=True, eq=False)
class Largest(Fold):
    """max_j s_j with its gradient to the winner: a monoid that is no sum."""

    name: ClassVar[str] = "tests.largest"
    differentiable: ClassVar[tuple[bool, ...]] = (True,)

    def identity(self, n, like):
        return (like.new_full((n, 1), -torch.inf),)

    def lift(self, tile, tensors):
        return (tile.logits(self.exclude_picks).amax(-1, keepdim=True),)

    def merge(self, a, b):
        return (torch.maximum(a[0], b[0]),)

    def gradient(self, tile, tensors, state, grads, out):
        return torch.mul(tile.logits(self.exclude_picks) == state[0], grads[0], out=out)


@register_row_loss("tests.margin")
def margin(folds, picked, args, numbers):
    return folds[0][0] + args[0] * torch.relu(numbers[0] + folds[1][0] - picked[:, 0])


@pytest.mark.parametrize("road", ROADS, ids="-".join)
def test_a_map_a_fold_and_a_row_loss_from_outside_run_on_every_engine(road):
    torch.manual_seed(0)
    n, c, d = 40, 900, 12
    x, w, p = torch.randn(n, d), torch.randn(c, d), torch.tensor(1.4)
    r, weight, v, y = torch.randn(n), torch.rand(n), torch.rand(c), torch.randint(c, (n, 1))
    leaves = [t.requires_grad_() for t in (x, w, p, r, weight)]
    engine, gradients = road
    with bigclass.planning(gradients=gradients, workspace=1 << 20):
        stream = Stream(((x, w),), maps=(Power(tensors=(p,)),))
        folds = (Hinge(tensors=(r, v)), Largest(exclude_picks=True))
        loss = stream_loss(stream, y, folds, "tests.margin", (weight,), (0.5,), engine=engine)
        got = torch.autograd.grad(loss, leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    z = exact[0] @ exact[1].t()
    s = z.sign() * z.abs() ** exact[2]
    largest = s.scatter(1, y, -torch.inf).amax(1)
    truth = ((v * (exact[3][:, None] + s).relu().square()).sum(1) + exact[4] * (0.5 + largest - s.gather(1, y)[:, 0]).relu()).sum()
    assert error(loss, truth) < 1e-6
    for g, t in zip(got, torch.autograd.grad(truth, exact), strict=True):
        assert error(g, t) < 1e-5


def test_names_are_checked_when_registered():
    with pytest.raises(ValueError, match="must be letters"):
        register_map(type("Nameless", (Map,), {}))
    with pytest.raises(ValueError, match="taken"):
        register_fold(type("Other", (Fold,), {"name": "logsumexp"}))
    with pytest.raises(ValueError, match="taken"):
        register_row_loss("cross_entropy")(lambda *a: a)

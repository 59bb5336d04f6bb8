"""What repeated picks promise: the gather and the scatter-add they stand in for, no place touched twice, nothing of K x K a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import bigclass
from bigclass.core.engines import dense
from bigclass.core.repeats import Repeats


@given(n=st.integers(0, 5), k=st.integers(0, 40), c=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_values_are_copied_to_and_summed_over_repeats(n, k, c, seed):
    g = torch.Generator().manual_seed(seed)
    picks = torch.randint(-1, c, (n, k), generator=g)
    table, given, up = (torch.randn(n, m, generator=g, dtype=torch.float64) for m in (c + 1, k, k))
    repeats = Repeats.of(picks)
    there = repeats.distinct[repeats.distinct >= 0]
    assert sorted(there.tolist()) == sorted(j for row in picks.tolist() for j in set(row) - {-1})
    got = repeats.copied(table.gather(1, repeats.distinct + 1))
    assert torch.equal(got[picks >= 0], table.gather(1, picks + 1)[picks >= 0])
    # sums, and the gradient of copies, which is one
    want = torch.zeros_like(table).scatter_add(1, picks + 1, given)
    summed = torch.zeros_like(table).scatter_add(1, repeats.distinct + 1, repeats.summed(given))
    assert torch.allclose(summed[:, 1:], want[:, 1:], rtol=0, atol=1e-13)
    values = torch.zeros(n, k, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(repeats.copied(values), values, up)
    want = torch.zeros_like(table).scatter_add(1, picks + 1, up)
    assert torch.allclose(torch.zeros_like(table).scatter_add(1, repeats.distinct + 1, slope)[:, 1:], want[:, 1:], rtol=0, atol=1e-13)


class _Watch(TorchDispatchMode):
    """The most numbers that were added to one place, and the most that one tensor held."""

    collisions, numel = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.scatter_add, torch.ops.aten.scatter_add_):
            at, ones = args[2], (args[3] != 0).long()
            counts = torch.zeros(at.shape[0], int(at.max()) + 1, dtype=torch.long).scatter_add(1, at, ones)
            self.collisions = max(self.collisions, int(counts.max()))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("engine", ["tiled", "dense"])
@pytest.mark.parametrize("name", ["linear_log_prob", "linear_logsumexp"])
def test_gradients_of_many_repeats_are_right_and_add_up_in_one_order(engine, name, monkeypatch):
    """On a GPU a gather's gradient adds what it read from one place in any order: of three or more numbers the bits then vary."""
    monkeypatch.setattr(dense, "_IN_ORDER", ())
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((4, 3), (9, 3)))
    index, up = torch.randint(2, (4, 30), generator=g), torch.randn(4, 30, generator=g, dtype=torch.float64)
    s = x @ w.t()
    exact = s.log_softmax(1) if name == "linear_log_prob" else s
    want = torch.autograd.grad(exact.gather(1, index), (x, w), up)
    with _Watch() as watch:
        if name == "linear_log_prob":
            got = bigclass.linear_log_prob(x, w, index, engine=engine)
        else:
            got = bigclass.linear_logsumexp(x, w, index=index, engine=engine)[1]
        made = torch.autograd.grad(got, (x, w), up)
    assert watch.collisions <= 2
    for a, e in zip((got, *made), (exact.gather(1, index), *want), strict=True):
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-13)


def test_a_stored_teacher_of_hundreds_of_classes_takes_no_memory_of_their_square():
    n, k = 8, 400
    index = torch.arange(k).repeat(n, 1) % 300
    x, w = torch.randn(n, 4), torch.randn(500, 4)
    with _Watch() as watch:
        bigclass.SparseTarget(index, torch.ones(n, k), 500).merged()
        bigclass.linear_topk_kl_div(x, w, index, torch.full((n, k), -6.5), engine="tiled")
    assert watch.numel <= n * 500

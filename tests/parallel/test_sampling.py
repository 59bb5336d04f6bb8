"""Training on a share of the classes: all are the full loss, a tenth has its gradient in expectation, and only used rows are touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bigclass
from tests.parallel.class_support import relative
from tests.ranks import run_ranks

N, D = 6, 5


def problem(c: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*size, dtype=torch.float64, generator=g) for size in ((N, D), (c, D), (c,)))
    y = torch.randint(c, (N,), generator=g)
    y[1] = -100
    return x, w * 0.4, b * 0.3, y


def run(kind: str, x: Tensor, w: Tensor, b: Tensor, y: Tensor, **options: Any) -> Tensor:
    if kind == "ce":
        return bigclass.linear_cross_entropy(x, w, y, linear_bias=b, logit_scale=0.7, **options)
    if kind == "centres":
        return bigclass.linear_margin_loss(x, w, y // 2, subcenters=2, logit_scale=3.0, margin=0.2, **options) + b.sum() * 0.0
    return bigclass.linear_margin_loss(x, w, y, logit_scale=3.0, margin=0.2, **options) + b.sum() * 0.0


def gradients(kind: str, x: Tensor, w: Tensor, b: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    y = torch.where(y >= 0, y, -200 if kind == "centres" else -100)
    loss = run(kind, *leaves, y, **options)
    loss.backward()
    return [loss.detach(), *[t.grad.to_dense() for t in leaves]]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ("ce", "arcface", "centres"))
def test_all_classes_are_the_full_loss(kind):
    for sparse in (True, False):
        made = gradients(kind, *problem(40), sample=bigclass.ClassSampling(1.0, sparse=sparse))
        for a, b in zip(made, gradients(kind, *problem(40)), strict=True):
            assert relative(a, b) < 1e-12


@pytest.mark.parametrize("kind", ("ce", "arcface", "centres"))
def test_a_tenth_of_the_classes_has_the_full_gradient_in_expectation(kind):
    """The mean over many draws, against its own scatter; without the correction it is far off."""
    c, draws, g = 600, 400, torch.Generator().manual_seed(1)
    given = problem(c)
    exact = gradients(kind, *given)
    found = {}
    for corrected in (True, False):
        made = [gradients(kind, *given, sample=bigclass.ClassSampling(0.1, g, corrected=corrected)) for _ in range(draws)]
        for which in (1, 2):  # dx, dw
            several = torch.stack([one[which] for one in made])
            off = relative(several.mean(0), exact[which])
            noise = float(several.std(0).norm() / exact[which].norm()) / draws**0.5
            found[corrected, which] = off, noise
    for which in (1, 2):
        off, noise = found[True, which]
        assert off < 2.0 * noise + 0.01, found
        assert found[False, which][0] > 2.5 * noise + 0.015, found


def test_only_rows_that_were_used_are_touched_and_positives_always_are():
    x, w, _, y = problem(200)
    parameter = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.SparseAdam([parameter], lr=0.1)
    loss = bigclass.linear_cross_entropy(x, parameter, y, sample=bigclass.ClassSampling(0.1, torch.Generator().manual_seed(2)))
    loss.backward()
    assert parameter.grad is not None and parameter.grad.is_sparse
    rows = parameter.grad.coalesce().indices()[0]
    assert rows.numel() == 20 and set(y[y >= 0].tolist()) <= set(rows.tolist())
    optimizer.step()
    changed = (parameter.detach() != w).any(1)
    assert changed.nonzero().squeeze(1).tolist() == rows.tolist()
    again = bigclass.linear_cross_entropy(x, w, y, sample=bigclass.ClassSampling(0.1, torch.Generator().manual_seed(2)))
    assert torch.equal(again.detach(), loss.detach())  # a seed is a draw
    few = bigclass.linear_cross_entropy(x, w, y, sample=bigclass.ClassSampling(1e-6))  # never fewer than rows
    assert float(few) > 0.0


def test_small_problems_and_any_ignored_class_are_sampled_too():
    """Both have roads of their own past the draw."""
    x, w, _, _ = problem(200)
    w.requires_grad_()
    y = torch.tensor([4, 150, 3, 9, 7, 199])
    bigclass.linear_cross_entropy(x, w, y, sample=bigclass.ClassSampling(0.1)).backward()
    assert w.grad is not None and w.grad.is_sparse
    for ignored in (0, 1, 3):  # the places of targets in a small sample
        rows = bigclass.linear_cross_entropy(
            x, w, y, ignore_index=ignored, reduction="none", sample=bigclass.ClassSampling(0.03, torch.Generator().manual_seed(1))
        )
        assert (rows == 0.0).tolist() == (y == ignored).tolist()


def test_what_cannot_be_sampled_is_refused():
    x, w, _, y = problem(40)
    half = bigclass.ClassSampling(0.5)
    for options in (
        {"softcap": 3.0}, {"label_smoothing": 0.1}, {"weight": torch.ones(40)}, {"logit_scale": torch.tensor(1.0)},
        {"lora": (torch.ones(2, D), torch.ones(40, 2), 1.0)},
    ):  # fmt: skip
        with pytest.raises(bigclass.ArgumentError, match="sample"):
            bigclass.linear_cross_entropy(x, w, y, sample=half, **options)
    with pytest.raises(bigclass.ArgumentTypeError, match="ClassSampling"):
        bigclass.linear_cross_entropy(x, w, y, sample=0.5)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        bigclass.linear_cross_entropy(x, w, y + 39, sample=half)
    for rate in (0.0, 1.5, float("nan"), True):
        with pytest.raises(bigclass.ArgumentError, match="rate"):
            bigclass.ClassSampling(rate)


def over_ranks(rank: int, world: int) -> dict[str, Any]:
    sizes = (130, 0, 70)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, w, b, y = problem(sum(sizes))
    rows = torch.arange(N).tensor_split(world)[rank]
    group = bigclass.Spread(classes=dist.group.WORLD, batch=dist.group.WORLD, gradients="sum")
    found: dict[str, Any] = {}
    for kind in ("ce", "arcface", "centres"):
        exact = gradients(kind, x, w, b, y)
        cut = [exact[0], exact[1][rows], exact[2][mine], exact[3][mine]]
        part = (x[rows], w[mine], b[mine], y[rows])
        made = gradients(kind, *part, group=group, sample=bigclass.ClassSampling(1.0))
        found[f"{kind} all"] = max(relative(a, b) for a, b in zip(made, cut, strict=True))
        g = torch.Generator().manual_seed(rank)
        several = [gradients(kind, *part, group=group, sample=bigclass.ClassSampling(0.2, g)) for _ in range(60)]
        mean = torch.stack([one[1] for one in several]).mean(0)
        found[f"{kind} some"] = mean, cut[1]
    return found


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_ranks_sample_their_own_classes():
    results = run_ranks(over_ranks, 3)
    for kind in ("ce", "arcface", "centres"):
        assert max(found[f"{kind} all"] for found in results) < 1e-10
        mean, exact = (torch.cat([found[f"{kind} some"][i] for found in results]) for i in range(2))
        assert relative(mean, exact) < 0.1

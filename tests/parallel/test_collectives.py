"""The general part of parallel/: merging states, gathering rows, gradients of both, over three gloo processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bigclass.core.folds import LogSumExp, ShiftedMoment, Total, log_sum_exp
from bigclass.core.op import reduce_logits
from bigclass.core.stream import Stream
from bigclass.core.topk import TopK
from bigclass.parallel.collectives import batch_sizes, gather_rows, merge_states, replicated, scaled_gradient
from bigclass.parallel.groups import Ranks
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

N, SHARDS = 5, (4, 1, 7)  # rows, and classes of each rank


def operands() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    return torch.randn(N, 3, generator=g, dtype=torch.float64), torch.randn(sum(SHARDS), 3, generator=g, dtype=torch.float64)


def shard(rank: int) -> slice:
    return slice(sum(SHARDS[:rank]), sum(SHARDS[: rank + 1]))


def pieces(rank: int, world: int) -> dict[str, Tensor]:
    ranks = Ranks.of(dist.group.WORLD)
    assert ranks is not None
    x, w = operands()
    own = w[shard(rank)].clone().requires_grad_()
    folds = [LogSumExp(), Total(), ShiftedMoment(), TopK((3.0,))]
    states, _ = reduce_logits(Stream(((x, own),)), None, folds, engine="tiled")
    made = {}
    lse, total = merge_states(folds[0], states[0], ranks), merge_states(folds[1], states[1], ranks)
    # every rank goes on to the same loss: its gradient by the own classes needs no more sending
    loss = (log_sum_exp(lse) ** 2).sum() + total[0].sum()
    moment = merge_states(folds[2], states[2], ranks)  # gathered, merged by the fold's own arithmetic, and differentiated through it
    entropy = torch.log1p(moment[1]) - (moment[2] + moment[1]) / (1 + moment[1])
    (made["entropy gradient"],) = torch.autograd.grad(entropy.sum(), own, retain_graph=True)
    made["entropy"] = entropy.detach()
    (made["gradient"],) = torch.autograd.grad(loss, own)
    made["loss"] = loss.detach()
    values, indices = states[3]
    made["top"] = merge_states(folds[3], (values.detach(), indices + shard(rank).start), ranks)[0]
    gathered = gather_rows(own, SHARDS, ranks)
    made["gathered"] = gathered.detach()
    (made["scattered"],) = torch.autograd.grad((gathered * (rank + 1)).square().sum(), own)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (made["replicated"],) = torch.autograd.grad(replicated(scale, ranks, 0.5) * (rank + 1), scale)
    (made["scaled"],) = torch.autograd.grad(scaled_gradient(scale, 3.0) * 2.0, scale)
    made["sizes"] = torch.tensor(batch_sizes(own, ranks))
    return made


@pytest.fixture(scope="module")
def made() -> list[dict[str, Tensor]]:
    return run_ranks(pieces, len(SHARDS))


def test_merged_states_are_those_of_all_classes(made):
    x, w = operands()
    w.requires_grad_()
    s = x @ w.t()
    loss = (s.logsumexp(1) ** 2).sum() + s.sum()
    (gradient,) = torch.autograd.grad(loss, w)
    p = s.detach().softmax(1)
    (of_entropy,) = torch.autograd.grad(-((x @ w.t()).softmax(1) * (x @ w.t()).log_softmax(1)).sum(), w)
    for rank, found in enumerate(made):
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(found["gradient"], gradient[shard(rank)], rtol=1e-12, atol=0)
        torch.testing.assert_close(found["entropy"].flatten(), -(p * p.log()).sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(found["top"], s.detach().topk(3).values, rtol=1e-13, atol=0)
        torch.testing.assert_close(found["entropy gradient"], of_entropy[shard(rank)], rtol=1e-11, atol=1e-14)


def test_gathered_rows_send_their_gradients_home(made):
    _, w = operands()
    factor = sum((q + 1) ** 2 for q in range(len(SHARDS)))
    for rank, found in enumerate(made):
        assert torch.equal(found["gathered"], w)
        torch.testing.assert_close(found["scattered"], 2.0 * factor * w[shard(rank)], rtol=1e-12, atol=0)
        assert found["replicated"].item() == 0.5 * (1 + 2 + 3) and found["scaled"].item() == 6.0
        assert found["sizes"].tolist() == list(SHARDS)

"""Layers whose classes or rows lie on 2, 3 and 4 gloo processes: the loss and the gradients of one process that has everything."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bigclass
from tests.parallel.class_support import ROWS, SHARDS, Case, errors_of_batch, errors_of_both, errors_of_classes
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

WORLDS = (2, 3, 4)


def ids(n: int, c: int, k: int | None = None, ignored: bool = False, seed: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(c, (n,) if k is None else (n, k), generator=g)
    return torch.where(torch.rand(y.shape, generator=g) < 0.25, -100 if k is None else -1, y) if ignored else y


def cases(world: int) -> dict[str, Case]:
    n, c = sum(ROWS[world]), sum(SHARDS[world])
    v = torch.linspace(0.5, 2.0, c, dtype=torch.float64)
    y, some = ids(n, c), ids(n, c, ignored=True)
    several, labels = ids(n, c, 3, ignored=True), ids(n, c, 2)
    soft = torch.rand(n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(1)
    share = torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def ce(**options):
        return lambda x, w, b, s, target, **group: bigclass.linear_cross_entropy(
            x, w, target, linear_bias=b, logit_scale=s, **options, **group
        )

    def bce(name, **options):
        return lambda x, w, b, s, target, **group: bigclass.linear_elementwise_loss(
            x, w, target, loss=name, linear_bias=b, logit_scale=s, **options, **group
        )

    def margin(**options):
        def run(x, w, b, s, target, m=None, **group):
            more = {} if m is None else {"margin": m}
            return bigclass.linear_margin_loss(x, w, target, logit_scale=8.0, **more, **options, **group) + (b.sum() + s) * 0.0

        return run

    def sparse(x, w, b, s, index, weights, **group):
        target = bigclass.SparseTarget(index, weights, c, floor=0.01)
        return bigclass.linear_cross_entropy(x, w, target, linear_bias=b, logit_scale=s, **group)

    def log_prob(x, w, b, s, index, **group):
        logp, h = bigclass.linear_log_prob(x, w, index, linear_bias=b, logit_scale=s, temperature=1.3, return_entropy=True, **group)
        return torch.cat((logp, h.unsqueeze(1)), 1)

    def lse(x, w, b, s, index, **group):
        total, at = bigclass.linear_logsumexp(x, w, linear_bias=b, index=index, logit_scale=s, softcap=3.0, **group)
        return torch.cat((total.unsqueeze(1), at), 1)

    def stats(x, w, b, s, target, **group):
        loss, found = bigclass.linear_cross_entropy(
            x, w, target, linear_bias=b, logit_scale=s, return_stats=True, reduction="none", **group
        )
        return torch.stack((loss, found.lse, found.correct.to(loss.dtype)), 1)

    def with_top(x, w, b, s, target, **group):
        loss, top = bigclass.linear_binary_cross_entropy(
            x, w, target, linear_bias=b, logit_scale=s, return_topk=4, reduction="none", **group
        )
        return torch.cat((loss.unsqueeze(1), top.values.detach(), top.indices.to(loss.dtype)), 1)

    taught = torch.randn(n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(8))

    def kl(stored: bool = False, **options):
        def run(x, w, b, s, t=None, **group):
            given = (
                (t,)
                if stored
                else (
                    x.detach() * 0.7 + 0.1,
                    w.detach().flip(1),
                )
            )
            bias = {} if stored else {"teacher_bias": -b.detach()}
            return bigclass.linear_kl_div(x, w, *given, linear_bias=b, logit_scale=s, temperature=1.5, **bias, **options, **group)

        return run

    def topk_kl(x, w, b, s, index, log_p, **group):
        return bigclass.linear_topk_kl_div(x, w, index, log_p, linear_bias=b, logit_scale=s, **group)

    best = taught.log_softmax(1).topk(3)
    return {
        "kl": Case(kl(), {"t": y}),
        "kl stored": Case(kl(stored=True), {"t": taught}),
        "kl reverse rows": Case(kl(divergence="reverse", reduction="none"), {"t": y}, rowwise=True),
        "kl jensen shannon": Case(kl(divergence="jensen_shannon", beta=0.3), {"t": y}),
        "kl top": Case(topk_kl, {"index": best.indices, "log_p": best.values}),
        "ce": Case(ce(), {"target": y}),
        "ce tiled": Case(ce(engine="tiled"), {"target": y}),
        "ce ignored": Case(ce(), {"target": some}),
        "ce sum": Case(ce(reduction="sum"), {"target": some}),
        "ce rows": Case(ce(reduction="none"), {"target": some}, rowwise=True),
        "ce everything": Case(ce(weight=v, label_smoothing=0.1, z_loss=1e-2, softcap=4.0), {"target": some}),
        "ce filter": Case(ce(grad_filter=2**-40, engine="tiled"), {"target": y}),
        "ce probabilities": Case(ce(label_smoothing=0.1, weight=v), {"target": soft}),
        "ce sparse": Case(sparse, {"index": labels, "weights": share}),
        "stats": Case(stats, {"target": some}, rowwise=True),
        "poly": Case(
            lambda x, w, b, s, target, **g: bigclass.linear_poly_cross_entropy(x, w, target, linear_bias=b, logit_scale=s, **g),
            {"target": soft},
        ),
        "log prob": Case(log_prob, {"index": labels}, rowwise=True),
        "lse": Case(lse, {"index": several}, rowwise=True),
        "bce": Case(bce("bce"), {"target": several}),
        "bce tiled": Case(bce("bce", engine="tiled", weight=v, pos_weight=v.flip(0)), {"target": several}),
        "bce smoothed": Case(bce("bce", label_smoothing=0.1, reduction="batchmean"), {"target": several}),
        "bce dense": Case(bce("bce"), {"target": soft}),
        "bce top": Case(with_top, {"target": several}, rowwise=True),
        "asymmetric": Case(bce("asymmetric", reduction="sum"), {"target": several}),
        "zlpr": Case(
            lambda x, w, b, s, target, **g: bigclass.linear_zlpr_loss(x, w, target, linear_bias=b, logit_scale=s, **g), {"target": several}
        ),
        "arcface": Case(margin(), {"target": some}),
        "arcface rows": Case(margin(reduction="none"), {"target": y, "m": torch.linspace(0.1, 0.6, n)}, rowwise=True),
        "curriculum": Case(margin(curriculum=0.2), {"target": y}),
    }


def every_case(rank: int, world: int) -> dict[str, list[float]]:
    found = {}
    for name, case in cases(world).items():
        found[f"{name}, classes"] = errors_of_classes(case, rank, world)
        for gradients in ("mean", "sum") if name in ("ce", "ce rows", "bce", "arcface") else ("mean",):
            found[f"{name}, both {gradients}"] = errors_of_both(case, rank, world, gradients)
            if not case.rowwise:
                found[f"{name}, batch {gradients}"] = errors_of_batch(case, rank, world, gradients)
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_every_loss_over_shards_and_spread_rows_is_that_of_one_process(world):
    for found in run_ranks(every_case, world):
        wrong = {key: e for key, e in found.items() if not max(e) < 1e-10}
        assert not wrong, "\n".join([f"{key}: {e}" for key, e in wrong.items()])

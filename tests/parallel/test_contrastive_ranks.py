"""Contrastive losses over 2, 3 and 4 gloo processes: the loss and the gradients of one process that has the whole batch."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigclass
from bigclass.core.folds import LogSumExp
from bigclass.core.recipe import pack
from bigclass.core.stream import Stream
from bigclass.parallel.groups import Ranks
from tests.losses.contrastive_support import Batch
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

WORLDS = {2: ((9, 9), (4, 7)), 3: ((5, 2, 9), (3, 0, 4)), 4: ((6, 6, 6, 6), (1, 8, 2, 5))}  # batches of the ranks
FORMS = ("pairs", "several", "hard negatives")


def whole_batch(sizes: tuple[int, ...], form: str) -> tuple[Batch, list[int]]:
    """The batch of all ranks in float64, and how many hard negatives each has."""
    g = torch.Generator().manual_seed(sum(sizes))
    n = sum(sizes)
    hard = [q if form == "hard negatives" else 0 for q in range(len(sizes))]  # the first rank has none
    m = n + sum(hard)

    def features(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=g)).requires_grad_()

    several = form == "several"
    return Batch(
        features(n),
        features(m),
        torch.tensor([9.0], dtype=torch.float64, requires_grad=True),
        torch.tensor(-3.0, dtype=torch.float64, requires_grad=True),
        torch.randint(-1, m, (n, 3), generator=g) if several else None,
        torch.randint(-1, m, (n, 2), generator=g) if several else None,
        None,
    ), hard


def positions(sizes: tuple[int, ...], hard: list[int]) -> Tensor:
    """Where text i lies among the texts of all ranks, each rank's hard negatives behind its own."""
    at = []
    for q, n in enumerate(sizes):
        at += list(range(sum(sizes[:q]) + sum(hard[:q]), sum(sizes[:q]) + sum(hard[:q]) + n))
    return torch.tensor(at)


def run(batch: Batch, sigmoid: bool, direction: str, reduction: str, **options) -> Tensor:
    extra = {k: v for k, v in batch.options.items() if v is not None}
    if sigmoid:
        return bigclass.sigmoid_contrastive_loss(batch.image, batch.text, batch.scale, batch.bias, reduction=reduction, **extra, **options)
    return bigclass.contrastive_loss(
        batch.image, batch.text, batch.scale, logit_bias=batch.bias, direction=direction, reduction=reduction, **extra, **options
    )


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def errors_of_every_case(rank: int, world: int) -> dict[str, list[float]]:
    """Errors of the loss and of the gradients by images, texts, scale and bias, averaged over ranks."""
    found = {}
    for sizes in WORLDS[world]:
        for form in FORMS:
            whole, hard = whole_batch(sizes, form)
            start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
            first = start + sum(hard[:rank])
            last = first + sizes[rank] + hard[rank]
            at = positions(sizes, hard)
            for sigmoid, direction, reduction in (
                (False, "both", "mean"), (False, "both", "sum"), (False, "image", "mean"), (False, "text", "mean"), (True, "both", "mean"),
                (True, "both", "sum"),
            ):  # fmt: skip
                if form != "pairs" and reduction == "sum":
                    continue
                whole.positives = at if form == "hard negatives" else whole.positives
                exact = whole.exact(sigmoid, direction, reduction)
                for exchange in ("gather", "ring"):
                    text = leaf(whole.text[first:last])
                    own = Batch(
                        leaf(whole.image[start:stop]),
                        text[: sizes[rank]] if hard[rank] else text,
                        leaf(whole.scale),
                        leaf(whole.bias),
                        whole.positives[start:stop] if form == "several" else None,
                        None if whole.ignore is None else whole.ignore[start:stop],
                        text[sizes[rank] :] if hard[rank] else None,
                    )
                    loss = run(own, sigmoid, direction, reduction, group=dist.group.WORLD, exchange=exchange)
                    loss.backward()
                    image, texts = torch.zeros_like(whole.image), torch.zeros_like(whole.text)
                    image[start:stop], texts[first:last] = own.image.grad / world, text.grad / world
                    made = [loss.detach(), image.detach(), texts.detach(), own.scale.grad, own.bias.grad]
                    for t in made[1:3]:
                        dist.all_reduce(t)
                    key = f"{sizes} {form} {'sigmoid' if sigmoid else 'softmax'} {direction} {reduction} {exchange}"
                    found[key] = [
                        float((a - b.detach()).norm() / b.detach().norm().clamp_min(1e-4)) for a, b in zip(made, exact, strict=True)
                    ]
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_has_the_loss_of_the_whole_batch_and_gradients_that_average_to_its_own(world):
    results = run_ranks(errors_of_every_case, world)
    assert len(results[0]) == 2 * 2 * (6 + 4 + 4)
    wrong = {key: e for found in results for key, e in found.items() if max(e) > 1e-10}
    assert not wrong


def in_half_and_fused(rank: int, world: int) -> dict[str, list[float]]:
    """Errors of bf16 features, and of the fused engine in Triton's interpreter, against float64 of the same features."""
    n, found = 24, {}
    whole = Batch(*(F.normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(s))).requires_grad_() for s in (1, 2)),
                  torch.tensor(9.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True), None, None, None)  # fmt: skip
    mine = slice(rank * n // world, (rank + 1) * n // world)
    for engine, dtype in (("tiled", torch.bfloat16), *([("fused", torch.float32)] if importlib.util.find_spec("triton") else [])):
        cast = Batch(*(leaf(t.to(dtype)) for t in (whole.image, whole.text)), whole.scale, whole.bias, None, None, None)
        for sigmoid in (False, True):
            exact = cast.exact(sigmoid, "both", "mean")
            for exchange in ("gather", "ring"):
                own = Batch(leaf(cast.image[mine]), leaf(cast.text[mine]), leaf(whole.scale), leaf(whole.bias), None, None, None)
                loss = run(own, sigmoid, "both", "mean", group=dist.group.WORLD, exchange=exchange, engine=engine)
                loss.backward()
                made = [loss.detach(), own.image.grad / world, own.text.grad / world, own.scale.grad]
                truth = [exact[0], exact[1][mine], exact[2][mine], exact[3]]
                key = f"{engine} {sigmoid} {exchange}"
                found[key] = [float((a.double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(made, truth, strict=True)]
    return found


def test_gradients_of_half_features_are_rounded_once_and_the_fused_engine_spreads_too():
    for found in run_ranks(in_half_and_fused, 2):
        for key, e in found.items():
            # rounding to bf16 once: 2^-9 at most, 1.7e-3 on average
            assert max(e) < (2.0**-9 if key.startswith("tiled") else 3e-6), (key, e)


def trained(rank: int, world: int) -> dict[str, list[Tensor]]:
    """Parameters after steps of data-parallel training of two encoders and a scale, by group= and its mesh, compiled, and in half."""
    from torch.distributed.device_mesh import init_device_mesh

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.image, self.text = nn.Linear(7, 5), nn.Linear(4, 5)
            self.log_scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor([-2.0]))

        def forward(self, x: Tensor, y: Tensor):
            return F.normalize(self.image(x)), F.normalize(self.text(y)), self.log_scale.exp(), self.bias

    def train(loss, model: nn.Module, rows: slice) -> list[Tensor]:
        g = torch.Generator().manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(3):
            x, y = (torch.randn(12, d, generator=g, dtype=torch.float64)[rows] for d in (7, 4))
            optimizer.zero_grad()
            loss(*model(x, y)).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    each = 12 // world
    mine = slice(rank * each, (rank + 1) * each)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    made = {}
    for name in ("softmax", "sigmoid"):
        call = bigclass.contrastive_loss if name == "softmax" else bigclass.sigmoid_contrastive_loss

        def loss(a, b, scale, bias, group=None, exchange="auto", call=call):
            return call(a, b, scale, logit_bias=bias, group=group, exchange=exchange)

        made[f"{name} alone"] = train(loss, Model().double(), slice(None))
        for road, options in {
            "group": {"group": dist.group.WORLD},
            "mesh": {"group": mesh},
            "ring": {"group": mesh, "exchange": "ring"},
        }.items():
            model = nn.parallel.DistributedDataParallel(Model().double())
            made[f"{name} {road}"] = train(lambda *t, options=options: loss(*t, **options), model, mine)

        def compiled(a, b, scale, bias, call=call):
            return call(a, b, scale, logit_bias=bias, group=dist.group.WORLD)

        model = nn.parallel.DistributedDataParallel(Model().double())
        made[f"{name} compiled"] = train(torch.compile(compiled, fullgraph=True, backend="aot_eager"), model, mine)
    return made


def test_data_parallel_training_is_that_of_one_process_by_every_road():
    for made in run_ranks(trained, 2):
        for name in ("softmax", "sigmoid"):
            for road in ("group", "mesh", "ring", "compiled"):
                for ours, alone in zip(made[f"{name} {road}"], made[f"{name} alone"], strict=True):
                    assert float((ours - alone).norm() / alone.norm()) < 1e-10, (name, road)


def special_cases(rank: int, world: int) -> dict[str, Any]:
    """The mean of nothing, by each road; and what torch.library finds in the op."""
    found = {}
    for exchange in ("gather", "ring"):
        for loss in (bigclass.contrastive_loss, bigclass.sigmoid_contrastive_loss):
            nothing = torch.zeros(0, 3, requires_grad=True)
            mean = loss(nothing, nothing, 2.0, group=dist.group.WORLD, exchange=exchange)
            mean.backward()
            found[f"{loss.__name__} {exchange}"] = float(mean.detach())
        ranks = Ranks.of(dist.group.WORLD)
        assert ranks is not None
        folds = [LogSumExp(exclude_picks=True), LogSumExp(exclude_picks=True, axis="columns")]
        stream = Stream(
            ((leaf(torch.randn(4, 3)), leaf(torch.randn(4, 3))),), bias=leaf(torch.ones(1)), scale_tensor=leaf(torch.tensor(2.0))
        )
        recipe, numbers, tensors = pack(stream, folds)
        picks = torch.arange(4 * rank, 4 * rank + 4).unsqueeze(1)
        args = tensors, picks, recipe, numbers, f"tiled,0,{exchange}", ranks.name, [4] * world, [True] * len(tensors)
        found[f"opcheck {exchange}"] = torch.library.opcheck(torch.ops.bigclass.spread_logits.default, args)
    return found


def test_the_mean_of_nothing_is_nan_and_the_op_is_sound():
    for found in run_ranks(special_cases, 2):
        for key, value in found.items():
            assert set(value.values()) == {"SUCCESS"} if key.startswith("opcheck") else math.isnan(value), key


def refusals(rank: int, world: int) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh

    a = F.normalize(torch.randn(4, 3))
    messages = {}

    def note(name: str, **options) -> None:
        try:
            bigclass.contrastive_loss(a, a, 1.0, **options)
        except Exception as e:
            messages[name] = f"{type(e).__name__}: {e}"

    some = dist.new_group([0])
    if rank == 1:
        note("not a member", group=some)
    note("mesh", group=init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp")))
    note("no group", group="world")
    note("none", group=dist.group.WORLD, reduction="none")
    note("exchange", group=dist.group.WORLD, exchange="broadcast")
    note("engine", group=dist.group.WORLD, engine="dense")
    try:  # ranks that do not agree
        bad = a.double() if rank else a
        bigclass.contrastive_loss(bad, bad, 1.0, group=dist.group.WORLD)
    except Exception as e:
        messages["dtypes"] = f"{type(e).__name__}: {e}"
    try:
        bad = a[:, :2] if rank else a
        bigclass.sigmoid_contrastive_loss(bad, bad, 1.0, -1.0, group=dist.group.WORLD)
    except Exception as e:
        messages["widths"] = f"{type(e).__name__}: {e}"
    note("positives", group=dist.group.WORLD, positives=torch.full((4,), 4 * world))
    if rank == 0:  # a group of one is no group: nobody to wait for
        messages["alone"] = str(float(bigclass.contrastive_loss(a, a, 1.0, group=some) - bigclass.contrastive_loss(a, a, 1.0)))
    return messages


def test_bad_groups_are_refused_before_anything_is_sent():
    first, second = run_ranks(refusals, 2)
    assert "no member" in second["not a member"] and second["not a member"].startswith("ArgumentError")
    assert first["alone"] == "0.0"
    for found in (first, second):
        assert "mesh of one axis" in found["mesh"]
        assert found["no group"].startswith("ArgumentTypeError: group: expected a ProcessGroup")
        assert "reduction: 'none'" in found["none"]
        assert "exchange: expected one of" in found["exchange"]
        assert found["positives"].startswith("IndexError")
        assert "engine: 'dense' is not offered with group=" in found["engine"]
        assert "one dtype on all ranks" in found["dtypes"] and "one width" in found["widths"]

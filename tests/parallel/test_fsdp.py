"""Every head under DistributedDataParallel and FSDP2 on two gloo processes: the training of one process.

tests/heads/test_wrappers.py has a classifier's and a policy's head, tests/integrations timm's, PEFT's and the Trainer's models; here are
the other heads, transformers' models, mixed precision and clipped gradients.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigclass
from tests.parallel.engine_support import HEADS, N, build, gradients, llama, loss_of, moved, pairs, part, texts, whole, worst
from tests.ranks import run_ranks
from tests.support import error

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

MODES = ("ddp", "ddp static_graph", "ddp find_unused_parameters", "fsdp root", "fsdp blocks", "fsdp head apart")


def wrapped(net: Any, mode: str, **policy: Any) -> nn.Module:
    if mode.startswith("ddp"):
        option = mode[4:]
        return nn.parallel.DistributedDataParallel(net, **({option: True} if option else {}))
    from torch.distributed.fsdp import fully_shard

    for module in [] if mode == "fsdp root" else [*net.blocks, *(net.heads.values() if mode == "fsdp head apart" else [])]:
        fully_shard(module, **policy)
    return fully_shard(net, **policy)


# --- every head, every wrapper


def train(net: nn.Module, model: nn.Module, x: Tensor, targets: Any, kind: str, explicit: bool) -> tuple[Tensor, list[float]]:
    """Three steps of SGD with clipped gradients: how far the parameters moved, and the norms before clipping."""
    before = [whole(p) for p in net.parameters()]
    optimizer, norms = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x, targets, kind, explicit).backward()
        norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.02)).item())
        optimizer.step()
    return moved(net.parameters(), before), norms


def of_one_process(kind: str, explicit: bool) -> tuple[Tensor, list[float]]:
    net, x, targets = build(kind)
    return train(net, net, x, targets, kind, explicit)


def every_mode(rank: int, world: int) -> dict[tuple[str, bool, str], Any]:
    warnings.simplefilter("error", bigclass.LogitsWarning)
    made: dict[tuple[str, bool, str], Any] = {}
    for kind, explicit in pairs():
        for mode in MODES:
            net, x, targets = build(kind)
            try:
                made[kind, explicit, mode] = train(
                    net, wrapped(net, mode), part(x, rank, world), part(targets, rank, world), kind, explicit
                )
            except RuntimeError as e:
                made[kind, explicit, mode] = str(e)
    return made


def everything(rank: int, world: int) -> dict[str, Any]:
    """One start of the processes for all that follows."""
    made: dict[str, Any] = {"heads": every_mode(rank, world), "bf16": bf16_gradients(rank, world)}
    made["predictions"] = predictions(rank, world)
    if importlib.util.find_spec("transformers"):
        made["lm"] = lm_gradients(rank, world)
    return made


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "explicit"), list(pairs()))
def test_two_ranks_train_as_one_process(ranks, kind, explicit, mode):
    """Pitfall 32."""
    if mode == "fsdp head apart" and not explicit:
        for rank in [made["heads"] for made in ranks]:
            assert "FSDP2 resharded it" in rank[kind, explicit, mode] and "head(features, target)" in rank[kind, explicit, mode]
        return
    exact, norms = of_one_process(kind, explicit)
    assert max(norms) > 0.02, "the gradients would not be clipped"
    for rank in [made["heads"] for made in ranks]:
        assert not isinstance(rank[kind, explicit, mode], str), rank[kind, explicit, mode]
        mine, its_norms = rank[kind, explicit, mode]
        assert error(mine, exact) < 1e-10
        assert its_norms == pytest.approx(norms, rel=1e-10)


@pytest.mark.parametrize("kind", ["cce", "multilabel"])
def test_lazy_and_explicit_forms_are_one_loss(kind):
    assert error(of_one_process(kind, False)[0], of_one_process(kind, True)[0]) < 1e-10


# --- predictions


def predictions(rank: int, world: int) -> dict[str, list[Tensor]]:
    """The best classes of this rank's rows, by heads that are groups of their own and whose `predict` FSDP2 was told of."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    made: dict[str, list[Tensor]] = {}
    for kind in HEADS:
        net, x, _ = build(kind)
        head = fully_shard(net.heads[kind])
        try:
            head.predict(part(x, rank, world), 3)  # type: ignore[operator]
        except ValueError as e:
            assert "If FSDP sharded it" in str(e)
        register_fsdp_forward_method(head, "predict")
        made[kind] = list(head.predict(part(x, rank, world), 3))  # type: ignore[operator]
    return made


@pytest.mark.parametrize("kind", HEADS)
def test_predictions_of_a_sharded_head_are_those_of_one_process(ranks, kind):
    net, x, _ = build(kind)
    values, classes = net.heads[kind].predict(x, 3)  # type: ignore[operator]
    made = [torch.cat([rank["predictions"][kind][i] for rank in ranks]) for i in range(2)]
    assert error(made[0], values) < 1e-12 and torch.equal(made[1], classes)


# --- mixed precision


def bf16_gradients(rank: int, world: int) -> dict[str, list[dict[str, Tensor]]]:
    """Of eight batches, streamed and dense, parameters and activations in bf16, reduced in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    made: dict[str, list[dict[str, Tensor]]] = {}
    for name, explicit, mode in (("dense", False, "fsdp blocks"), ("lazy", False, "fsdp blocks"), ("explicit", True, "fsdp head apart")):
        net, _, _ = build("cce", dtype=torch.float32)
        net.heads["cce"].lazy = name != "dense"
        model = wrapped(net, mode, mp_policy=policy)
        made[name] = []
        for x, y in batches():
            x, y = part(x, rank, world), part(y, rank, world)
            net.zero_grad()  # before the forward: after it the root's parameters are still the gathered ones
            loss = model(x, {"cce": y}) if explicit else nn.CrossEntropyLoss()(model(x), y)
            if name != "dense":
                assert loss.dtype == torch.float32
            loss.backward()
            assert all(p.grad.dtype == torch.float32 for p in net.parameters())  # type: ignore[union-attr]
            made[name].append(gradients(net))
    return made


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [(torch.randn(N, 16, generator=g), torch.randint(301, (N,), generator=g)) for _ in range(8)]


def test_in_bf16_streamed_gradients_are_no_less_exact_than_dense_ones(ranks):
    """Pitfalls 4 and 33. Against float64, pooled over batches: what is left is the rounding of the blocks' own activations."""
    net, _, _ = build("cce", dtype=torch.float32)
    net = net.double()
    exact = []
    for x, y in batches():
        net.zero_grad()
        net(x.double(), {"cce": y}).backward()
        exact.append(gradients(net))
    made = ranks[0]["bf16"]
    for part_of in ("heads", "blocks"):

        def pooled(name: str, part_of: str = part_of) -> float:
            both = [(a[key], b[key]) for a, b in zip(made[name], exact, strict=True) for key in b if key.startswith(part_of)]
            return math.sqrt(sum(error(a, b) ** 2 for a, b in both) / len(both))

        assert 0 < pooled("lazy") <= 1.1 * pooled("dense") < 0.1
        assert 0 < pooled("explicit") <= 1.1 * pooled("dense")


# --- a language model of transformers

LM_MODES = ("root", "blocks", "blocks tied", "head apart", "head apart, kept gathered")


def lm_gradients(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("error", bigclass.LogitsWarning)
    made: dict[str, Any] = {}
    for mode in LM_MODES:
        model = bigclass.convert_head(llama("tied" in mode), engine="tiled")
        if mode != "root":
            for layer in model.model.layers:
                fully_shard(layer)
        if "apart" in mode:
            fully_shard(model.lm_head, reshard_after_forward="kept" not in mode)
        fully_shard(model)
        ids = part(texts(), rank, world)
        try:
            for _ in range(2):  # the second time a group's order is known
                model.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
            made[mode] = gradients(model)
        except RuntimeError as e:
            made[mode] = str(e)
    return made


@pytest.mark.parametrize("mode", LM_MODES)
def test_transformers_models_under_fsdp2_have_the_gradients_of_one_process(ranks, mode):
    pytest.importorskip("transformers", reason="transformers is not installed")
    if mode == "head apart":  # its loss is computed from the head's output, when the weight is gone
        assert all("FSDP2 resharded it" in rank[mode] for rank in [made["lm"] for made in ranks])
        return
    model = llama("tied" in mode)
    model(input_ids=texts(), labels=texts()).loss.backward()
    for rank in [made["lm"] for made in ranks]:
        assert not isinstance(rank[mode], str), rank[mode]
        assert worst(rank[mode], gradients(model)) < 1e-6  # transformers computes its loss in float32

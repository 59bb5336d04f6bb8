"""Ulysses over two gloo processes, the streamed head and mini-sequences on top: loss and gradients of one process with dense logits."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigclass
from tests.parallel.engine_support import V, gradients, llama, worst
from tests.support import error

missing = [name for name in ("transformers", "deepspeed") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed"),
]

T = 13  # rank 0 gets 7 tokens, rank 1 gets 6 and one that counts nowhere
LABELS = ("some", "second rank masked", "first rank masked")
PLAIN = [(labels, tied, kv, "mean") for labels in LABELS for tied, kv in ((False, 2), (True, 1))] + [("some", False, 2, "sum")]
WRAPPERS = ("ddp", "fsdp blocks", "zero 3")


def batch(labels: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(V, (2, T), generator=g)
    target = ids.masked_fill(torch.rand(2, T, generator=g) < 0.3, -100)
    if labels == "second rank masked":
        target[:, 8:] = -100  # the label of token 6, the first rank's last, is that of place 7
    if labels == "first rank masked":
        target[:, :8] = -100
    return {"input_ids": ids, "labels": target}


def dense(labels: str, tied: bool, kv: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process, not converted, in float64. (transformers' own loss would be in float32.)"""
    model, inputs = llama(tied, kv), batch(labels)
    logits = model(input_ids=inputs["input_ids"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    loss.backward()
    return loss.detach(), gradients(model)


def combined(model: nn.Module, how: str) -> dict[str, Tensor]:
    """Gradients as data parallelism would combine them."""
    made = gradients(model)
    for grad in made.values():
        dist.all_reduce(grad)
        grad /= dist.get_world_size() if how == "mean" else 1
    return made


def spread(tied: bool, kv: int, **options: Any) -> tuple[Any, Any]:
    from bigclass.integrations.ulysses import setup_ulysses

    model = llama(tied, kv)
    return model, setup_ulysses(model, dist.group.WORLD, chunk_tokens=3, engine="tiled", **options)


def everything(rank: int) -> dict[Any, Any]:
    warnings.simplefilter("error", bigclass.LogitsWarning)
    made: dict[Any, Any] = {}
    for case in PLAIN:
        labels, tied, kv, how = case
        model, parallel = spread(tied, kv, gradients=how)
        loss = model(**parallel.shard(batch(labels))).loss
        loss.backward()
        made[case] = loss.detach(), combined(model, how)
    for wrapper in WRAPPERS:
        made[wrapper] = wrapped(wrapper)
    made["trainer"] = as_the_trainer_does("second rank masked")
    made["off"] = switched_off()
    made["errors"] = errors(rank)
    return made


def wrapped(wrapper: str) -> tuple[Tensor, dict[str, Tensor]]:
    model, parallel = spread(False, 2)
    inputs = parallel.shard(batch("second rank masked"))
    if wrapper == "zero 3":
        from deepspeed.utils import safe_get_full_grad

        from tests.parallel.test_deepspeed import engine_of

        bigclass.mini_sequence(model, 3, group=dist.group.WORLD)
        engine = engine_of(model.float(), 3)
        loss = engine(**inputs).loss
        engine.backward(loss)
        return loss.detach(), {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
    if wrapper == "ddp":
        whole = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        whole = fully_shard(model)
    loss = whole(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def as_the_trainer_does(labels: str) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' own loss under sequence parallelism, of a converted head that knows nothing of ranks: means of ranks, weighted."""
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

    model, parallel = spread(False, 2)
    model.lm_head.group = None
    accelerator = SimpleNamespace(torch_device_mesh={"sp": SimpleNamespace(get_group=lambda: dist.group.WORLD)})
    config = SimpleNamespace(sp_backend="torch", sp_size=dist.get_world_size())
    inputs = parallel.shard(batch(labels))
    loss = deepspeed_sp_compute_loss(accelerator, model, inputs, False, config)
    loss.backward()
    return loss.detach(), combined(model, "mean")


def switched_off() -> dict[str, Any]:
    """A whole sequence on every rank; a copy of the model; one that is restored."""
    model, parallel = spread(False, 2)
    inputs, made = batch("some"), {}
    with parallel.off():
        made["off"] = model(**inputs).loss.detach()
    made["copy"] = copy.deepcopy(model)(**parallel.shard(inputs)).loss.detach()
    parallel.restore()
    made["restored"] = model(**inputs).loss.detach()
    return made


def errors(rank: int) -> dict[str, str]:
    """What each call raises, on this rank: all return, so no rank waits for another."""
    from bigclass.integrations.ulysses import setup_ulysses

    model, parallel = spread(False, 2)
    ids = batch("some")["input_ids"]
    calls = {
        "other length": lambda: parallel.shard({"input_ids": ids[:, rank:]}),
        "other tokens": lambda: parallel.shard({"input_ids": ids.roll(rank, 1)}),
        "padding": lambda: parallel.shard({"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)}),
        "packed": lambda: parallel.shard({"input_ids": ids, "position_ids": torch.arange(T)[None] % 6}),
        "labels": lambda: parallel.shard({"input_ids": ids, "labels": ids[:, 1:]}),
        "cache": lambda: model.eval().generate(ids, max_new_tokens=2, do_sample=False),
        "twice": lambda: setup_ulysses(model, dist.group.WORLD),
        "eager": lambda: setup_ulysses(changed(_attn_implementation="eager"), dist.group.WORLD),
        "sliding": lambda: setup_ulysses(changed(layer_types=["full_attention", "sliding_attention"]), dist.group.WORLD),
        "recurrent": lambda: setup_ulysses(changed(layer_types=["full_attention", "linear_attention"]), dist.group.WORLD),
        "heads": lambda: setup_ulysses(changed(num_attention_heads=3), dist.group.WORLD),
        "key-value heads": lambda: setup_ulysses(changed(num_attention_heads=6, num_key_value_heads=3), dist.group.WORLD),
        "positions": lambda: setup_ulysses(small("Roberta", "ForCausalLM", is_decoder=True), dist.group.WORLD),
        "bidirectional": lambda: setup_ulysses(small("Bert", "LMHeadModel", is_decoder=False), dist.group.WORLD),
        "rotary": lambda: setup_ulysses(changed(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), dist.group.WORLD),
    }
    made = {}
    for name, call in calls.items():
        try:
            made[name] = str(call())
        except ValueError as e:
            made[name] = str(e)
    return made


def small(family: str, kind: str, **options: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": V}
    return getattr(transformers, family + kind)(getattr(transformers, family + "Config")(**sizes, **options))


def changed(**attributes: Any) -> Any:
    model = llama(False, 2)
    for name, value in attributes.items():
        setattr(model.config, name, value)
    return model


@pytest.fixture
def ranks(deepspeed_ranks) -> list[dict[Any, Any]]:
    return [made["ulysses"] for made in deepspeed_ranks]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_loss_and_gradients_are_those_of_one_process(ranks, case):
    """Pitfalls 8 and 41: a rank without a label, and labels that lie unevenly."""
    labels, tied, kv, _ = case
    loss, exact = dense(labels, tied, kv)
    for rank in ranks:
        assert error(rank[case][0], loss) < 1e-12
        assert worst(rank[case][1], exact) < 1e-10


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_engines_around_it_average_to_the_gradients_of_one_process(ranks, wrapper):
    loss, exact = dense("second rank masked", False, 2)
    for rank in ranks:
        assert error(rank[wrapper][0], loss) < (1e-6 if wrapper == "zero 3" else 1e-12)
        assert worst(rank[wrapper][1], exact) < (1e-6 if wrapper == "zero 3" else 1e-10)


def test_the_trainers_own_loss_takes_a_converted_head(ranks):
    loss, exact = dense("second rank masked", False, 2)
    for rank in ranks:
        assert error(rank["trainer"][0], loss) < 1e-12
        assert worst(rank["trainer"][1], exact) < 1e-10


def test_it_can_be_switched_off_and_undone_and_copies_stay_spread(ranks):
    loss, _ = dense("some", False, 2)
    for rank in ranks:
        assert {name: error(value, loss) < 1e-12 for name, value in rank["off"].items()} == {"off": True, "copy": True, "restored": True}


def test_what_cannot_work_raises_on_every_rank(ranks):
    expected = {
        "other length": "inputs: expected the same batch on all ranks",
        "other tokens": "inputs: expected the same batch on all ranks",
        "padding": "attention_mask: expected padding on the right only",
        "packed": "position_ids: expected positions that count up by one",
        "labels": "labels: expected the shape of input_ids",
        "cache": "off()",
        "twice": "spread over a sequence already",
        "eager": "attn_implementation='sdpa'",
        "sliding": "a flash attention knows sliding windows",
        "recurrent": "linear_attention, which would not see the other ranks' tokens",
        "heads": "divides 3 attention heads",
        "key-value heads": "divides 3 key-value heads",
        "positions": "the features of RobertaForCausalLM are not the same",  # it counts positions from another number
        "bidirectional": "is not causal",
        "rotary": "(dynamic) depend on the length",
    }
    for rank in ranks:
        assert rank["errors"].keys() == expected.keys()
        for name, words in expected.items():
            assert words in rank["errors"][name], (name, rank["errors"][name])


def test_one_process_needs_no_deepspeed():
    from bigclass.integrations.ulysses import setup_ulysses

    model, inputs = llama(False, 2), batch("some")
    parallel = setup_ulysses(model, None, chunk_tokens=4)
    loss = model(**parallel.shard(inputs)).loss
    loss.backward()
    expected, exact = dense("some", False, 2)
    assert error(loss, expected) < 1e-12
    assert worst(gradients(model), exact) < 1e-10

"""transformers models whose vocabulary is spread over two gloo processes: loss, gradients and evaluation of one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")

import bigclass
from tests.parallel.class_support import relative
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def model_of(tied: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if tied:
        config = GPT2Config(vocab_size=67, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        return GPT2LMHeadModel(config).double().train()
    config = LlamaConfig(vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, tie_word_embeddings=False)  # fmt: skip
    return LlamaForCausalLM(config).double().train()


def of_both(rank: int, world: int) -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh

    from bigclass.integrations.transformers import shard_vocabulary

    mesh, found = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), {}
    ids = torch.randint(67, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(ids % 5 == 0, -100)
    for tied in (True, False):
        alone = bigclass.convert_head(model_of(tied))
        exact = alone(input_ids=ids, labels=labels).loss
        exact.backward()
        model = shard_vocabulary(bigclass.convert_head(model_of(tied)), mesh["tp"])
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        found[f"{tied} loss"] = relative(loss, exact)
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[f"{tied} {name}"] = relative(grad, q.grad)
        with torch.no_grad():
            found[f"{tied} logits"] = relative(model.eval()(input_ids=ids).logits, alone.eval()(input_ids=ids).logits)
    plain = model_of(True)
    for message, call in {
        "convert_head": lambda: shard_vocabulary(copy.deepcopy(plain), mesh["tp"]),
        "expected a mesh of one axis": lambda: shard_vocabulary(
            bigclass.convert_head(copy.deepcopy(plain)), init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
        ),
    }.items():
        with pytest.raises(bigclass.ArgumentError) as caught:
            call()
        assert message in str(caught.value)
    return found


def test_a_sharded_vocabulary_trains_as_a_whole_one():
    for found in run_ranks(of_both, 2):
        wrong = {key: e for key, e in found.items() if not e < 1e-10}
        assert not wrong, wrong

"""`convert_head` before PEFT wraps a model, after, and both: the numbers of the unconverted PEFT model, or a refusal."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import bigclass  # noqa: E402
from bigclass.integrations.transformers import head_options, loss_only, perplexity  # noqa: E402
from tests.support import error  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:The new"),
]

C = 61
IDS = torch.randint(C, (2, 7), generator=torch.Generator().manual_seed(0))

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["lm_head", "q_proj"]},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "dropout": {"target_modules": ["lm_head"], "lora_dropout": 0.3},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "elsewhere": {"target_modules": ["q_proj"]},
}
TIED = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
    "tied adapters": {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
}
CASES = [(name, tied) for name in CONFIGS for tied in (False, True)] + [(name, True) for name in TIED]


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=C, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def wrapped(name: str, tied: bool, order: str) -> Any:
    """A PEFT model in training, its adapters drawn."""
    model = llama(tied)
    if order in ("before", "both"):
        bigclass.convert_head(model, engine="tiled")
    config = peft.LoraConfig(r=3, lora_alpha=4, task_type="CAUSAL_LM", **{**CONFIGS, **TIED}[name])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double().train()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if any(part in key for part in ("lora_A", "lora_B", "magnitude", "modules_to_save", "delta")):
                p.add_(0.2 * torch.randn(p.shape, generator=g))
    if order in ("after", "both"):
        bigclass.convert_head(model, engine="tiled")
    return model


def head_of(model: Any) -> nn.Module:
    return (model.get_base_model() if isinstance(model, peft.PeftModel) else model).get_output_embeddings()


def check_step(model: Any, dense: Any, lazy: bool) -> None:
    """Loss and gradients, in float64, and what kind the logits are."""
    made = []
    for each in (model, dense):
        torch.manual_seed(3)
        each.zero_grad()
        logits = each(input_ids=IDS).logits
        assert isinstance(logits, Tensor if each is dense or not lazy else bigclass.LazyLogits)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), IDS[:, 1:].reshape(-1))
        loss.backward()
        made.append((loss.detach(), {n: p.grad.clone() for n, p in each.named_parameters() if p.grad is not None}))
    (loss, grads), (exact, expected) = made
    assert error(loss, exact) < 1e-12 and list(grads) == list(expected) and grads
    for name, g in grads.items():
        assert error(g, expected[name]) < 1e-10, name


def no_heads(model: nn.Module) -> bool:
    return not any(type(m).__module__.startswith("bigclass") for m in model.modules())


@pytest.mark.parametrize("order", ["before", "after", "both"])
@pytest.mark.parametrize(("name", "tied"), CASES, ids=[f"{name}{', tied' * tied}" for name, tied in CASES])
def test_every_order_trains_scores_and_undoes_or_says_why_not(name, tied, order):
    dense, model = wrapped(name, tied, "never"), wrapped(name, tied, order)
    adapted = name not in ("saved", "elsewhere")  # an adapter stands around the head, and adds to what it returns
    streams = order != "before" or not adapted
    silent = streams or name == "tokens"  # there PEFT multiplies by the weight itself
    with contextlib.nullcontext() if silent else pytest.warns(bigclass.LogitsWarning, match="convert_head again after get_peft_model"):
        check_step(model, dense, lazy=streams)
    exact = dense.eval()(input_ids=IDS).logits
    assert error(model.eval()(input_ids=IDS).logits, exact) < 1e-12
    if streams:
        mean = F.cross_entropy(exact[:, :-1].reshape(-1, C), IDS[:, 1:].reshape(-1))
        assert perplexity(model, [IDS]) == pytest.approx(math.exp(float(mean.detach())), rel=1e-12)
        assert head_options(model) == {}
    else:
        for use in (lambda: perplexity(model, [IDS]), lambda: head_options(model), lambda: loss_only(model).__enter__()):
            with pytest.raises(ValueError, match=r"PEFT has wrapped its head since the conversion.*convert_head\(model\) again"):
                use()
    for each in (model, dense):
        each.train()
    if name != "tied adapters":  # PEFT's cannot be copied
        for way in ("merge_and_unload", "unload"):
            out, plain = (getattr(copy.deepcopy(m), way)().train().requires_grad_(True) for m in (model, dense))
            check_step(out, plain, lazy=True)
            check_step(bigclass.restore_head(out), plain, lazy=False)
            assert no_heads(out)
    bigclass.restore_head(model)
    check_step(model, dense, lazy=False)
    assert no_heads(model) and type(head_of(model)) is type(head_of(dense))


@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_a_head_beside_adapters_is_resized_and_one_within_is_not(order):
    dense, model = wrapped("elsewhere", False, "never"), wrapped("elsewhere", False, order)
    for each in (model, dense):
        torch.manual_seed(5)
        each.resize_token_embeddings(C + 4)
    check_step(model, dense, lazy=True)
    with pytest.raises(TypeError, match="Old language model head is of type"):  # transformers' own
        wrapped("lora", False, order).resize_token_embeddings(C + 4)


def takes_this_peft() -> bool:
    """transformers 5.24 asks for a PEFT (0.22) that was not released when it was."""
    try:
        llama(False).add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"]))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("which", ["own", "mixed"])
def test_adapters_of_transformers_own_and_mixed_ones_stream(which):
    if which == "own" and not takes_this_peft():
        pytest.skip(f"the installed transformers refuses PEFT {peft.__version__} for adapters of its own")
    made = []
    for convert in (bigclass.convert_head, lambda model, **_: model):
        config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        model = llama(False)
        torch.manual_seed(2)
        model = peft.get_peft_model(model, config, mixed=True) if which == "mixed" else (model.add_adapter(config), model)[1]
        made.append(convert(model.double().train(), engine="tiled"))
    model, dense = made
    check_step(model, dense, lazy=True)
    assert no_heads(bigclass.restore_head(model))

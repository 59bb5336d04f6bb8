"""Models of the installed transformers, converted and not: the same loss, gradients and generated tokens; restored as they were."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import bigclass  # noqa: E402
from tests.integrations.transformers_support import KINDS, CannotBuild, batch, classes, forward, tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore", "error::bigclass.LogitsWarning")

# In every run: tied and untied heads, soft caps, scales, class biases, state spaces, experts, encoder-decoders, masked, images, speech.
REPRESENTATIVE = (
    ("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("gemma2", "Gemma2ForCausalLM"),
    ("gemma3", "Gemma3ForConditionalGeneration"),
    ("cohere", "CohereForCausalLM"), ("granite", "GraniteForCausalLM"), ("falcon_h1", "FalconH1ForCausalLM"), ("mamba", "MambaForCausalLM"),
    ("qwen3_moe", "Qwen3MoeForCausalLM"), ("gpt_oss", "GptOssForCausalLM"), ("deepseek_v3", "DeepseekV3ForCausalLM"),
    ("phi", "PhiForCausalLM"), ("opt", "OPTForCausalLM"), ("bloom", "BloomForCausalLM"), ("gpt_neox", "GPTNeoXForCausalLM"),
    ("minicpm3", "MiniCPM3ForCausalLM"), ("rwkv", "RwkvForCausalLM"), ("prophetnet", "ProphetNetForConditionalGeneration"),
    ("t5", "T5ForConditionalGeneration"), ("t5gemma", "T5GemmaForConditionalGeneration"), ("bart", "BartForConditionalGeneration"),
    ("marian", "MarianMTModel"), ("mt5", "MT5ForConditionalGeneration"), ("bert", "BertForMaskedLM"), ("roberta", "RobertaForMaskedLM"),
    ("modernbert", "ModernBertForMaskedLM"), ("xlm", "XLMWithLMHeadModel"), ("llava", "LlavaForConditionalGeneration"),
    ("idefics3", "Idefics3ForConditionalGeneration"), ("speech_to_text", "Speech2TextForConditionalGeneration"),
    ("whisper", "WhisperForConditionalGeneration"),
)  # fmt: skip

# How many classes of a kind must come out right, of transformers 5.23: as many as could be built when this was written, less a few.
AT_LEAST = {"causal": 155, "encoder-decoder": 30, "masked": 45, "vision-language": 52, "speech": 8}

# The decoder's weight is read, and joined to another, without its module being called: there is nothing to stream.
NOT_STREAMED = {"MobileBertForMaskedLM"}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    made = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return made


def losses_and_gradients(model: Any) -> tuple[float, dict, Any]:
    out = forward(model, batch(model))
    out.loss.backward()
    return float(out.loss.detach()), gradients(model), out.logits


def compare(model: Any) -> None:
    """Loss to 1e-5, each gradient to 1e-4, float32. Gradients below 1e-4 of all of them together are compared with that."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    kind, state, attributes = type(head), list(model.state_dict()), set(model.__dict__)
    loss, expected, _ = losses_and_gradients(model)
    whole = sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5
    assert whole > 0
    bigclass.convert_head(model, engine="tiled")
    assert model.get_output_embeddings() is head
    got, grads, logits = losses_and_gradients(model)
    assert isinstance(logits, bigclass.LazyLogits) != (name in NOT_STREAMED)
    assert abs(got - loss) <= 1e-5 * abs(loss), f"loss {got}, unconverted {loss}"
    assert set(grads) == set(expected)
    for key, g in expected.items():
        off = float((grads[key] - g).norm()) / max(float(g.norm()), 1e-4 * whole)
        assert off <= 1e-4, f"{key}: off by {off:.1e}"
    assert list(model.state_dict()) == state
    bigclass.restore_head(model)
    assert type(model.get_output_embeddings()) is kind
    assert set(model.__dict__) == attributes
    assert losses_and_gradients(model)[0] == loss


def generated(model: Any) -> torch.Tensor | None:
    """Five greedy tokens; None for a model that generates nothing from these inputs."""
    inputs = {name: t for name, t in batch(model).items() if name != "labels"}
    torch.manual_seed(0)
    try:
        return model.eval().generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1)
    except Exception:
        return None


@pytest.mark.parametrize(("model_type", "name"), REPRESENTATIVE, ids=[name for _, name in REPRESENTATIVE])
def test_a_converted_model_computes_what_it_did(model_type, name):
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    model = tiny(model_type, name)
    compare(model)
    before = generated(model)
    assert (before is None) == ("Masked" in name), "this model should generate"
    if before is not None:
        after = generated(bigclass.convert_head(model))
        assert after is not None and torch.equal(after, before)


@pytest.mark.architectures
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_class_that_can_be_built(kind, capsys):
    """Prints those that cannot, each with its reason."""
    right, wrong, cannot = [], [], []
    for model_type, name in classes(kind):
        try:
            model = tiny(model_type, name)
        except CannotBuild as reason:
            cannot.append(f"{name}: {reason}")
            continue
        try:
            compare(model)
            before = generated(model)
            if before is not None:
                after = generated(bigclass.convert_head(model))
                assert after is not None and torch.equal(after, before), "generates something else"
            if name not in NOT_STREAMED:
                right.append(name)
        except Exception as e:
            wrong.append(f"{name}: {type(e).__name__}: {e}")
        del model
        gc.collect()
    with capsys.disabled():
        print(f"\n{kind}: {len(right)} classes right, {len(wrong)} wrong, {len(cannot)} not built:", *sorted(cannot), sep="\n  ")
    assert not wrong, "\n".join(wrong)
    assert len(right) >= AT_LEAST[kind]


def test_a_z_loss_of_the_configuration_streams_with_the_logits():
    """Bamba's forward adds a multiple of the mean of LSE^2, padding included, as `logits.logsumexp` has it."""
    if not hasattr(transformers, "BambaForCausalLM"):
        pytest.skip("this version of transformers has no Bamba")
    model = tiny("bamba", "BambaForCausalLM")
    without = float(forward(model, batch(model)).loss.detach())
    model.z_loss_coefficient = 1e-2
    assert float(forward(model, batch(model)).loss.detach()) > without + 0.1
    compare(model)

"""Models of transformers and timm with their MLPs in chunks: the same loss and gradients; what cannot be chunked is said."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigclass

pytestmark = pytest.mark.filterwarnings("ignore", "error::bigclass.LogitsWarning")

# Class, and what of it runs in chunks. Gated, plain and Conv1D MLPs, one with two inputs, feed-forward methods of layers, norms without
# weights, lists of MLPs, experts beside MLPs, encoder-decoders, vision towers, state spaces.
TRANSFORMERS = {
    "LlamaForCausalLM": {"LlamaMLP"}, "GPT2LMHeadModel": {"GPT2MLP"}, "Gemma2ForCausalLM": {"Gemma2MLP"},
    "Gemma3ForConditionalGeneration": {"Gemma3MLP", "SiglipMLP"}, "CohereForCausalLM": {"CohereMLP"}, "GraniteForCausalLM": {"GraniteMLP"},
    "DeepseekV3ForCausalLM": {"DeepseekV3MLP"}, "PhiForCausalLM": {"PhiMLP"}, "Phi3ForCausalLM": {"Phi3MLP"},
    "BloomForCausalLM": {"BloomMLP"}, "FalconForCausalLM": {"FalconMLP"}, "GPTNeoXForCausalLM": {"GPTNeoXMLP"},
    "GPTJForCausalLM": {"GPTJMLP"}, "OlmoForCausalLM": {"OlmoMLP"}, "Qwen3ForCausalLM": {"Qwen3MLP"}, "MptForCausalLM": {"MptMLP"},
    "Glm4MoeForCausalLM": {"Glm4MoeMLP"}, "FalconH1ForCausalLM": {"FalconH1MLP"}, "T5ForConditionalGeneration": {"T5DenseActDense"},
    "MT5ForConditionalGeneration": {"MT5DenseGatedActDense"}, "T5GemmaForConditionalGeneration": {"T5GemmaMLP"},
    "ProphetNetForConditionalGeneration": {"ProphetNetFeedForward"}, "BertForMaskedLM": {"BertLayer"},
    "AlbertForMaskedLM": {"AlbertLayer"}, "DistilBertForMaskedLM": {"FFN"}, "ModernBertForMaskedLM": {"ModernBertMLP"},
    "XLMWithLMHeadModel": {"TransformerFFN"}, "LlavaForConditionalGeneration": {"CLIPMLP", "LlamaMLP"},
}  # fmt: skip

# Nothing of these is a token-wise module, and why.
NOT_CHUNKED = {
    "OPTForCausalLM": "OPTAttention", "BartForConditionalGeneration": "BartAttention", "MixtralForCausalLM": "experts|Router",
    "Qwen3MoeForCausalLM": "Experts", "GptOssForCausalLM": "Router|Experts", "MambaForCausalLM": "found none",
}  # fmt: skip

# How many of each kind of the classes of transformers 5.24 have something to chunk, less a few.
AT_LEAST = {"causal": 100, "masked": 28, "encoder-decoder": 15, "vision-language": 45, "speech": 0}

# Name, and the side of its images: small ones, where the model takes them.
TIMM = {
    "test_vit": 0, "test_vit3": 0, "test_convnext": 0, "deit_tiny_patch16_224": 64, "swin_tiny_patch4_window7_224": 56,
    "eva02_tiny_patch14_224": 56, "xcit_nano_12_p16_224": 64, "edgenext_xx_small": 64, "mobilevit_xxs": 64, "pit_ti_224": 64,
    "mixer_s32_224": 64, "cait_xxs24_224": 64, "davit_tiny": 64, "hiera_tiny_224": 64, "mvitv2_tiny": 64,
}  # fmt: skip
TIMM_NOT_CHUNKED = {
    "test_resnet": "found none", "test_efficientnet": "found none", "convnext_atto": "Conv2d", "pvt_v2_b0": "Conv2d",
    "convnextv2_atto": "GlobalResponseNormMlp", "gmlp_ti16_224": "could not be run|depends on the other tokens",
}  # fmt: skip


def without_dropout(model: nn.Module) -> Any:
    """Its masks are drawn chunk by chunk, so they would be others."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and "dropout" in type(module).__name__.lower())):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return model


def kinds(model: nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if "_mini_sequence" in vars(m)}


def loss_and_gradients(model: Any, loss: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    value = loss(model)
    value.backward()
    return float(value.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: Any, loss: Any, tokens: int, tolerance: float = 1e-5) -> set[str]:
    """Loss and every gradient, in chunks and not; those below 1e-4 of all together are compared with that. What was converted."""
    state, types = list(model.state_dict()), [type(m) for m in model.modules()]
    value, expected = loss_and_gradients(model, loss)
    whole = sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5
    assert whole > 0
    bigclass.mini_sequence(model, tokens)
    converted = kinds(model)
    got, gradients = loss_and_gradients(model, loss)
    assert abs(got - value) <= 1e-6 * abs(value)
    assert set(gradients) == set(expected)
    for name, g in expected.items():
        off = float((gradients[name] - g).norm()) / max(float(g.norm()), 1e-4 * whole)
        assert off <= tolerance, f"{name}: off by {off:.1e}"
    assert list(model.state_dict()) == state
    bigclass.restore_mini_sequence(model)
    assert [type(m) for m in model.modules()] == types
    assert loss_and_gradients(model, loss)[0] == value
    return converted


# --- transformers


def tiny(name: str, kind: str | None = None) -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.integrations import transformers_support as support

    found = {cls: model_type for k in support.KINDS for model_type, cls in support.classes(k)}
    if name not in found:
        pytest.skip(f"this version of transformers has no {name}")
    return without_dropout(support.tiny(found[name], name))


def lm_loss(model: Any) -> Tensor:
    from tests.integrations.transformers_support import batch

    return model(**batch(model)).loss


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_model_computes_what_it_did(name):
    """24 tokens in chunks of at most 5: five of them, of which the last is shorter."""
    assert compare(tiny(name), lm_loss, 5) == TRANSFORMERS[name]


@pytest.mark.parametrize("name", NOT_CHUNKED)
def test_a_transformers_model_without_token_wise_modules_is_refused_with_the_reason(name):
    model = tiny(name)
    with pytest.raises(ValueError, match=rf"(?s)model: expected a model with token-wise modules.*({NOT_CHUNKED[name]})"):
        bigclass.mini_sequence(model, 5)
    assert not kinds(model)


@pytest.mark.architectures
@pytest.mark.parametrize("kind", list(AT_LEAST))
def test_every_transformers_class(kind, capsys):
    """Prints those that have nothing to chunk."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.integrations.transformers_support import CannotBuild, classes
    from tests.integrations.transformers_support import tiny as built

    right, nothing, wrong = [], [], []
    for model_type, name in classes(kind):
        try:
            model = without_dropout(built(model_type, name))
        except CannotBuild:
            continue
        try:
            compare(model, lm_loss, 5, tolerance=1e-4)
            right.append(name)
        except bigclass.ArgumentError as reason:
            nothing.append(f"{name}: {reason}")
        except Exception as e:
            wrong.append(f"{name}: {type(e).__name__}: {e}")
        del model
        gc.collect()
    with capsys.disabled():
        print(f"\n{kind}: {len(right)} classes right, {len(wrong)} wrong, {len(nothing)} with nothing to chunk:", *nothing, sep="\n  ")
    assert not wrong, "\n".join(wrong)
    assert len(right) >= AT_LEAST[kind]


def test_generation_goes_on_as_before():
    model = tiny("LlamaForCausalLM").eval()
    ids = torch.arange(6, 12)[None]
    generate = partial(model.generate, ids, max_new_tokens=5, do_sample=False)
    before = generate()
    bigclass.mini_sequence(model, 2)
    assert torch.equal(generate(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_around_the_layers(reentrant):
    model = tiny("LlamaForCausalLM")
    value, expected = loss_and_gradients(model, lm_loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    bigclass.mini_sequence(bigclass.convert_head(model, engine="tiled"), 5)
    got, gradients = loss_and_gradients(model, lm_loss)
    assert abs(got - value) <= 1e-6 * value
    assert all(float((gradients[name] - g).norm()) <= 1e-5 * float(g.norm()) for name, g in expected.items())


def test_lora_on_the_mlp():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        tiny("LlamaForCausalLM"), peft.LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    )
    assert compare(model, lm_loss, 5) == {"LlamaMLP"}


@pytest.fixture
def offloading() -> Iterator[Any]:
    yield pytest.importorskip("accelerate", reason="accelerate is not installed").hooks


@pytest.mark.parametrize("first", ["hooks", "chunks"])
def test_hooks_of_accelerate_before_and_after(first, offloading):
    """They put a forward on the module itself, which calls the one that was there."""
    model = tiny("LlamaForCausalLM")
    mlp, seen = model.model.layers[0].mlp, []

    class Hook(offloading.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(args[0].shape)
            return args, kwargs

    value, expected = loss_and_gradients(model, lm_loss)
    calls: list[int] = []
    mlp.down_proj.register_forward_hook(lambda m, args, out: calls.append(out.numel() // out.shape[-1]))
    for step in ("hooks", "chunks") if first == "hooks" else ("chunks", "hooks"):
        if step == "hooks":
            offloading.add_hook_to_module(mlp, Hook())
        else:
            bigclass.mini_sequence(model, 5)
    got, gradients = loss_and_gradients(model, lm_loss)
    assert seen == [(2, 12, 32)] and calls == [5, 5, 5, 5, 4]
    assert abs(got - value) <= 1e-6 * value
    assert all(float((gradients[name] - g).norm()) <= 1e-5 * float(g.norm()) for name, g in expected.items())
    bigclass.restore_mini_sequence(model)
    assert loss_and_gradients(model, lm_loss)[0] == value and calls[5:] == [24]
    offloading.remove_hook_from_module(mlp)
    assert loss_and_gradients(model, lm_loss)[0] == value and calls[6:] == [24]


# --- timm


def image_model(name: str, side: int = 0) -> Any:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    if not timm.is_model(name):
        pytest.skip(f"this version of timm has no {name}")
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, num_classes=7, **({"img_size": side} if side else {}))
    except TypeError:  # it takes images of any size
        model = timm.create_model(name, num_classes=7)
    model = without_dropout(model.train())
    for p in model.get_classifier().parameters() if isinstance(model.get_classifier(), nn.Module) else ():
        nn.init.normal_(p, std=0.1)  # some classifiers start at zero, and pass no gradient on
    return model


@pytest.mark.parametrize("name", TIMM)
def test_a_timm_model_computes_what_it_did(name):
    # float64: batch norms of two images make 3e-4 of an fp32 rounding on some CPUs
    model = image_model(name, TIMM[name]).double()
    side = TIMM[name] or model.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).double()
    converted = compare(model, lambda m: nn.functional.cross_entropy(m(images), torch.tensor([3, 1])), 7, 1e-9)
    assert converted == {"GluMlp" if name.startswith("eva") else "Mlp"}


def test_of_a_mixer_only_the_channels_are_chunked():
    model = bigclass.mini_sequence(image_model("mixer_s32_224"), 13)
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if "_mini_sequence" in vars(m)}
    assert names == {"mlp_channels"}
    with pytest.raises(ValueError, match=r"'blocks.0.mlp_tokens' cannot be run in chunks of tokens: it takes 49 features"):
        bigclass.mini_sequence(model, 13, modules=["blocks.0.mlp_tokens"])


@pytest.mark.parametrize("name", TIMM_NOT_CHUNKED)
def test_a_timm_model_without_token_wise_modules_is_refused_with_the_reason(name):
    model = image_model(name)
    with pytest.raises(ValueError, match=rf"(?s)model: expected a model with token-wise modules.*({TIMM_NOT_CHUNKED[name]})"):
        bigclass.mini_sequence(model, 5)

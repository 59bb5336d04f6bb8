"""Tiny models of every class of the installed transformers: configurations shrunk by what their attributes are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

VOCABULARY, WIDTH, LENGTH = 96, 32, 12

# Attributes of configurations, by their names, and the largest value each may keep.
SIZES = (
    (r"(vocab_size|vocab)$", VOCABULARY),
    (
        r"^(hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|hidden_dim|encoder_embed_dim|decoder_embed_dim|model_dim|embedding_size|d_embed|width|"
        r"word_embed_proj_dim|(encoder|decoder|cross_attention|out|output|adapter|text|mm)_hidden_size|projection_dim)$",
        WIDTH,
    ),
    (
        r"(intermediate_size|ffn_dim|d_ff|n_inner|d_inner|inner_dim|ffn_hidden_size|mlp_dim|filter_size|intermediate_dim)$",
        2 * WIDTH,
    ),
    (
        r"^(num_hidden_layers|n_layers?|num_(decoder_|encoder_)?layers|(encoder|decoder)_layers|depth|num_blocks|"
        r"(encoder|decoder)_num_hidden_layers)$",
        2,
    ),
    (r"(num_attention_heads|n_heads?|num_heads|attention_heads)$", 4),
    (r"(num_key_value_heads|num_kv_heads|n_head_kv)$", 2),
    (r"^(head_dim|d_kv|attention_head_dim|kv_channels|hidden_size_per_layer_input)$", 8),
    (r"^rotary_dim$", 4),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts)$", 4),
    (r"^(num_experts_per_tok(en)?|num_selected_experts|moe_top_?k|top_?k_experts|experts_top_?k|moe_k|num_experts_per_topk)$", 2),
    (r"^(n_group|topk_group|num_expert_groups?|moe_n_group|moe_topk_group)$", 1),
)

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}


class CannotBuild(Exception):
    """This class cannot be built tiny from its configuration alone."""


def classes(kind: str) -> list[tuple[str, str]]:
    """(model type, class name) of every class of this kind, each class once."""
    found: dict[str, str] = {}
    for model_type, names in getattr(modeling_auto, KINDS[kind]).items():
        for name in names if isinstance(names, tuple | list) else (names,):
            found.setdefault(name, model_type)
    return [(model_type, name) for name, model_type in found.items()]


def shrunk(config: Any, derived: tuple[str, ...] = ()) -> dict[str, Any]:
    """What to change in a configuration so that nothing of it is large. derived: names to leave as they come out."""
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in derived:
            continue
        if name == "kv_lora_rank":  # latent attention: every head has keys of its own
            changes["num_key_value_heads"] = 4
        if isinstance(value, PretrainedConfig):
            changes[name] = type(value)(**shrunk(value, derived))
        elif type(value) is int:
            for pattern, size in SIZES:
                if re.search(pattern, name) and value > size:
                    changes.setdefault(name, size)
            if name.endswith("token_id") and value >= VOCABULARY - 6:
                changes[name] = 1
    return changes


def set_all(config: Any, changes: dict[str, Any]) -> Any:
    for name, value in changes.items():
        setattr(config, name, value)
    return config


# Some configurations work values out when they are made, some only check them: which of these it takes is found by trying.
def ways(cls: Any) -> Iterator[Callable[[], Any]]:
    for derived in ((), ("head_dim",)):
        yield lambda derived=derived: set_all(cls(), shrunk(cls(), derived))
        yield lambda derived=derived: cls(**shrunk(cls(), derived))
    yield lambda: set_all(cls(), {**shrunk(cls()), "head_dim": 8, "num_key_value_heads": 2})
    for sections in ([2, 1, 1], [1, 1, 0]):
        yield lambda sections=sections: with_sections(set_all(cls(), shrunk(cls())), sections)


def with_sections(config: Any, sections: list[int]) -> Any:
    """Rotary positions of several axes, for heads of 8 numbers."""
    for part in (config, *(v for v in vars(config).values() if isinstance(v, PretrainedConfig))):
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict) and "mrope_section" in rope:
            rope["mrope_section"] = sections
    return config


def usable(config: Any) -> Any:
    """What a loss needs and defaults leave open, in place: no cache, a token to start with."""
    for part in (config, *(v for v in vars(config).values() if isinstance(v, PretrainedConfig))):
        part.use_cache = False
        if getattr(part, "pad_token_id", 0) is None:
            part.pad_token_id = 0
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def tiny(model_type: str, name: str, limit: int = 20_000_000) -> Any:
    """A model of this class with random weights, on the CPU, in training. Raises CannotBuild, with the reason."""
    cls = getattr(transformers, name)
    reasons = []
    for way in ways(getattr(cls, "config_class", None) or CONFIG_MAPPING[model_type]):
        torch.manual_seed(0)
        try:
            config = usable(way())
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > limit:
                raise CannotBuild(f"{size / 1e6:.0f} M parameters after shrinking")
            model = cls(config).train()
            if forward(model, batch(model)).loss is None:
                raise CannotBuild("no loss comes with labels")
            return model
        except Exception as e:
            reasons.append(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:200])
    raise CannotBuild(reasons[0] if len(set(reasons)) == 1 else " | ".join(dict.fromkeys(reasons)))


def batch(model: Any, length: int = LENGTH) -> dict[str, Tensor]:
    """Token ids (or what else the model reads), and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, VOCABULARY - 6, (2, length), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, -2:] = -100
    if getattr(model.config, "is_encoder_decoder", False):
        labels = labels[:, :-3].contiguous()
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    shape = OTHER_INPUTS.get(type(model).__name__)
    if shape is not None:
        name, size = shape(model.config)
        made = {name: torch.randn(size, generator=generator), "labels": labels}
    return made


# Models that read something else, or something more, than text.
OTHER_INPUTS: dict[str, Callable[[Any], tuple[str, tuple[int, ...]]]] = {
    "WhisperForConditionalGeneration": lambda c: ("input_features", (2, c.num_mel_bins, 2 * c.max_source_positions)),
    "Speech2TextForConditionalGeneration": lambda c: ("input_features", (2, 40, c.input_feat_per_channel)),
    "VisionEncoderDecoderModel": lambda c: ("pixel_values", (2, 3, c.encoder.image_size, c.encoder.image_size)),
    "Pix2StructForConditionalGeneration": lambda c: ("flattened_patches", (2, 8, c.vision_config.patch_embed_hidden_size + 2)),
    "SpeechT5ForSpeechToText": lambda c: ("input_values", (2, 4000)),
    "MoonshineForConditionalGeneration": lambda c: ("input_values", (2, 8000)),
}


def forward(model: Any, inputs: dict[str, Tensor], seed: int = 3) -> Any:
    """The model's output under a fixed seed: dropout and routing are then the same every time."""
    torch.manual_seed(seed)
    return model(**inputs)

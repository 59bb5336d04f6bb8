"""What of a model decides its memory: the sizes of a transformer, by name, by its configuration, or of a module that is only counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError

NORMS = ("rms", "gemma", "layer", "fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerShape:
    """A decoder of equal blocks: embedding, L blocks of attention and an MLP, a last norm, a head over C classes.

    name: for messages. layers: L. hidden: D. intermediate: I, the MLP's width. heads, kv_heads: of queries, and of keys and values.
    head_dim: so A = heads head_dim and K = kv_heads head_dim. classes: C.
    tied: do head and embedding share their weight? positions: rows of a learned table of positions.
    gated: has the MLP a gate (three matrices) or not (two)? mlp_tensors: tokens x I tensors that an MLP keeps for its backward.
    norm: "rms" (as transformers' Llama writes it: several operations, in fp32), "gemma" (the same, its product in fp32 too), "layer"
    (torch's LayerNorm), "fused" (an RMS norm of one kernel). post_norms: are attention and MLP followed by a norm, too?
    qkv_bias: have queries, keys and values a bias? bias: has every linear layer one? softcap: are logits bent by a soft cap?
    attention_softcap: are scores?
    counted: parameters counted in a model at hand, which then replace those of the formula.
    """

    name: str = "model"
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    classes: int
    tied: bool = False
    positions: int = 0
    gated: bool = True
    mlp_tensors: int = 4
    norm: str = "rms"
    post_norms: bool = False
    qkv_bias: bool = False
    bias: bool = False
    softcap: bool = False
    attention_softcap: bool = False
    counted: int | None = None

    @property
    def queries(self) -> int:
        """A: elements of a token's queries, over all heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """K: elements of a token's keys, over all heads (its values have as many)."""
        return self.kv_heads * self.head_dim

    @property
    def matrix(self) -> int:
        """Parameters of an MLP's matrix, usually the largest of a block."""
        return self.hidden * self.intermediate

    @property
    def attention_parameters(self) -> int:
        """Parameters of a block's attention."""
        biases = self.qkv_bias or self.bias
        return 2 * self.hidden * (self.queries + self.keys) + biases * (self.queries + 2 * self.keys) + self.bias * self.hidden

    @property
    def mlp_parameters(self) -> int:
        """Parameters of a block's MLP."""
        return (3 if self.gated else 2) * self.matrix + self.bias * (self.hidden + (2 if self.gated else 1) * self.intermediate)

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def block_parameters(self) -> int:
        """Parameters of a block."""
        if self.counted is not None:
            return max(self.counted - self.head_parameters - self.embedding_parameters - self.norm_parameters, 0) // max(self.layers, 1)
        return self.attention_parameters + self.mlp_parameters + (4 if self.post_norms else 2) * self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, which a tied head shares, and of a table of positions."""
        return (self.classes + self.positions) * self.hidden

    @property
    def head_parameters(self) -> int:
        """Parameters of the head that are not the embedding's."""
        return 0 if self.tied else self.classes * self.hidden

    @property
    def parameters(self) -> int:
        """P: all of them, each once."""
        if self.counted is not None:
            return self.counted
        return self.layers * self.block_parameters + self.embedding_parameters + self.norm_parameters + self.head_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShape:
    """A model that is only counted: what is before its head, and the head.

    name: for messages. parameters: P, the head's among them. hidden, classes: D and C of the head.
    largest: elements of its largest parameter outside the head.
    row_bytes: what a row (an image, say) keeps for the backward before the head; `saved_bytes` counts it.
    """

    name: str = "module"
    parameters: int
    hidden: int
    classes: int
    largest: int = 0
    row_bytes: int = 0


Shape: TypeAlias = TransformerShape | ModuleShape


def _llama(name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, classes: int, **options: Any):
    options.setdefault("head_dim", hidden // heads)
    return TransformerShape(
        name=name, layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, classes=classes, **options
    )


_GEMMA2 = {"tied": True, "norm": "gemma", "post_norms": True, "softcap": True, "attention_softcap": True}

MODELS: Mapping[str, TransformerShape] = {
    shape.name: shape
    for shape in (
        _llama("llama3-8b", 32, 4096, 14336, 32, 8, 128256),
        _llama("llama3-70b", 80, 8192, 28672, 64, 8, 128256),
        _llama("llama3.2-1b", 16, 2048, 8192, 32, 8, 128256, tied=True),
        _llama("mistral-7b", 32, 4096, 14336, 32, 8, 32000),
        _llama("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 151936, tied=True, qkv_bias=True),
        _llama("qwen2.5-7b", 28, 3584, 18944, 28, 4, 152064, qkv_bias=True),
        _llama("gemma2-2b", 26, 2304, 9216, 8, 4, 256000, head_dim=256, **_GEMMA2),
        _llama("gemma2-9b", 42, 3584, 14336, 16, 8, 256000, head_dim=256, **_GEMMA2),
        # gelu_new is written out in five operations; dropout is taken to be off.
        _llama(
            "gpt2", 12, 768, 3072, 12, 12, 50257, tied=True, positions=1024, gated=False, mlp_tensors=5, norm="layer", bias=True
        ),
    )
}  # fmt: skip
"""Models by name, from their published configurations."""


def shape_of(model: str | Shape | nn.Module | Any, *, row_bytes: int | None = None) -> Shape:
    """The shape of a model: a name of `MODELS`, a transformers configuration or model, or any module with a classifier.

    Args:
        model: a name, a shape (returned as it is), an object with the attributes of a transformers configuration (hidden_size,
            num_hidden_layers, num_attention_heads, vocab_size ...; GPT-2's n_embd and so on as well), a module with such a `config`,
            or any other `nn.Module`, whose parameters are then counted: its head is the last of its linear layers.
        row_bytes: of a module that is only counted: bytes a row keeps for the backward (`saved_bytes`).

    Returns:
        A `TransformerShape`, or for other modules a `ModuleShape`.

    Raises:
        ArgumentError: for a name that is not known, or a module without a linear layer. ArgumentTypeError: for anything else.

    Example:
        >>> shape_of("llama3-8b").parameters
        8030261248
    """
    if isinstance(model, (TransformerShape, ModuleShape)):
        return model if row_bytes is None or isinstance(model, TransformerShape) else replace(model, row_bytes=row_bytes)
    if isinstance(model, str):
        if model not in MODELS:
            raise ArgumentError(f"model: expected one of {', '.join(MODELS)}, or a model or configuration, got {model!r}")
        return MODELS[model]
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        if _size(config, "num_hidden_layers", "n_layer") is not None and row_bytes is None:
            return replace(_of_config(config), counted=_count(model))
        return _of_module(model, row_bytes or 0)
    if _size(model, "num_hidden_layers", "n_layer") is not None:
        return _of_config(model)
    raise ArgumentTypeError(f"model: expected a name, a shape, a transformers configuration or an nn.Module, got {type(model).__name__}")


def _of_config(config: Any) -> TransformerShape:
    def need(*names: str) -> int:
        value = _size(config, *names)
        if value is None:
            raise ArgumentError(
                f"model: expected a configuration with {names[0]}, got {type(config).__name__} without; give a shape instead"
            )
        return value

    hidden, heads = need("hidden_size", "n_embd"), need("num_attention_heads", "n_head")
    kind = str(getattr(config, "model_type", "model"))
    activation = str(
        getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or getattr(config, "activation_function", "")
    )
    plain = kind.startswith("gpt") or not hasattr(config, "rms_norm_eps")  # LayerNorms and two matrices, as before Llama
    gemma = kind.startswith("gemma")
    return TransformerShape(
        name=kind,
        layers=need("num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=_size(config, "intermediate_size", "n_inner") or 4 * hidden,
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads") or heads,
        head_dim=_size(config, "head_dim") or hidden // heads,
        classes=need("vocab_size"),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        positions=need("max_position_embeddings", "n_positions") if plain else 0,
        gated=not plain,
        mlp_tensors=4 if not plain else 5 if activation == "gelu_new" else 2,
        norm="layer" if plain else "gemma" if gemma else "rms",
        post_norms=gemma and kind[5:6] in ("2", "3"),
        qkv_bias=bool(getattr(config, "attention_bias", False)) or kind == "qwen2",
        bias=plain,
        softcap=getattr(config, "final_logit_softcapping", None) is not None,
        attention_softcap=getattr(config, "attn_logit_softcapping", None) is not None,
    )


def _of_module(model: nn.Module, row_bytes: int) -> ModuleShape:
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ArgumentError(f"model: expected a module with a linear classifier, got {type(model).__name__} without; give a shape instead")
    head = linear[-1]
    largest = max((p.numel() for p in model.parameters() if p is not head.weight), default=0)
    return ModuleShape(
        name=type(model).__name__,
        parameters=_count(model),
        hidden=head.in_features,
        classes=head.out_features,
        largest=largest,
        row_bytes=row_bytes,
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())  # shared ones are given once


def _size(config: Any, *names: str) -> int | None:
    """The first of these attributes that is a whole number."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)

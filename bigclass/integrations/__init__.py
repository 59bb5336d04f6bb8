"""Thin adapters to other libraries, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import sys
from typing import Any, TypeVar

from torch import nn

from bigclass.core.errors import ArgumentTypeError

Model = TypeVar("Model", bound=nn.Module)


def convert_head(model: Model, **options: Any) -> Model:
    """Swap a model's classifier or output embeddings for a streamed head, in place, and return the model.

    The module keeps its identity and its parameters: checkpoints, tied weights, optimizers, EMA copies and hooks made before or after are
    as without. In training the model then returns lazy logits (`bigclass.LazyLogits`), in evaluation and generation real ones.

    Args:
        model: a transformers model with output embeddings, PEFT's wrapper of one, or a timm model whose classifier is one linear layer.
            For a model of your own use `bigclass.CCEHead.adopt(model.classifier)` or `bigclass.LMHead.adopt(model.lm_head)`.
        options: grad_filter, engine and lazy, as of the heads; for timm models softcap and logit_scale, too (a transformers model applies
            its own); for transformers models whose loss is their `loss_function`: label_smoothing and z_loss.

    Returns:
        The same model; converting it again changes the options, `bigclass.restore_head(model)` undoes all. `reset_classifier` and
        `resize_token_embeddings` keep what they put in the head's place converted. After `get_peft_model` convert again.

    Raises:
        TypeError: for a model of an unknown library or an unknown option.
        ValueError: for a head that cannot be swapped, with the reason.

    Example:
        >>> model = bigclass.convert_head(timm.create_model("vit_tiny_patch16_224", num_classes=100_000))
        >>> loss = torch.nn.CrossEntropyLoss()(model(images), labels)  # no N x 100,000 logits
        >>> model = bigclass.convert_head(AutoModelForCausalLM.from_pretrained(name))
        >>> loss = model(input_ids=ids, labels=ids).loss  # no logits over the vocabulary
    """
    _adapter(model).convert_head(unwrapped(model), **options)
    return model


def restore_head(model: Model) -> Model:
    """Undo `convert_head`, in place, and return the model."""
    _adapter(model).restore_head(unwrapped(model))
    return model


def unwrapped(model: Any) -> Any:
    """The model inside wrappers of torch.compile and of DistributedDataParallel, whichever stands around which."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _adapter(model: Any) -> Any:
    """The module of this package that knows this kind of model. No library is imported that the model has not brought along."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected a module, got {type(model).__name__}")
    bare = unwrapped(model)
    peft = _is_a(bare, "peft", "PeftModel") or _is_a(bare, "peft", "PeftMixedModel")
    if peft or _is_a(bare, "transformers", "PreTrainedModel"):
        from bigclass.integrations import transformers

        return transformers
    if hasattr(bare, "get_classifier") or hasattr(bare, "pretrained_cfg"):
        from bigclass.integrations import timm

        return timm
    raise ArgumentTypeError(
        f"model: {type(bare).__module__}.{type(bare).__qualname__} is neither a transformers nor a timm model; use "
        "bigclass.LMHead.adopt(linear) or bigclass.CCEHead.adopt(linear) on its head"
    )


def _is_a(model: Any, library: str, name: str) -> bool:
    cls = getattr(sys.modules.get(library), name, None)
    return cls is not None and isinstance(model, cls)


def __getattr__(name: str) -> Any:
    if name in ("open_clip", "peft", "timm", "transformers", "ulysses"):
        return importlib.import_module(f"bigclass.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Thin adapters to other libraries, each imported only when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from torch import nn

from bigclass.core.errors import ArgumentTypeError

Model = TypeVar("Model", bound=nn.Module)


def convert_head(model: Model, **options: Any) -> Model:
    """Swap a model's classifier for a streamed head, in place, and return the model.

    The classifier module keeps its identity and its parameters: checkpoints, optimizers, EMA copies and hooks made before or after are
    as without. In training the model then returns lazy logits (`bigclass.LazyLogits`), in evaluation real ones.

    Args:
        model: a timm model whose classifier is one linear layer (found by its configuration). For a model of your own use
            `bigclass.CCEHead.adopt(model.classifier)`.
        options: softcap, logit_scale, engine, lazy, as of `bigclass.CCEHead`.

    Returns:
        The same model. `reset_classifier` keeps its new classifier converted; `bigclass.restore_head(model)` undoes all.

    Raises:
        TypeError: for a model of an unknown library or an unknown option.
        ValueError: for a classifier that cannot be swapped, with the reason.

    Example:
        >>> model = bigclass.convert_head(timm.create_model("vit_tiny_patch16_224", num_classes=100_000))
        >>> loss = torch.nn.CrossEntropyLoss()(model(images), labels)  # no N x 100,000 logits
    """
    bare = _bare(model)
    _adapter(bare).convert_head(bare, **options)
    return model


def restore_head(model: Model) -> Model:
    """Undo `convert_head`, in place, and return the model."""
    bare = _bare(model)
    _adapter(bare).restore_head(bare)
    return model


def _bare(model: Any) -> Any:
    """The model inside torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def _adapter(model: nn.Module) -> Any:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected a module, got {type(model).__name__}")
    if hasattr(model, "get_classifier") or hasattr(model, "pretrained_cfg"):
        from bigclass.integrations import timm

        return timm
    raise ArgumentTypeError(
        f"model: {type(model).__module__}.{type(model).__qualname__} is no timm model; use bigclass.CCEHead.adopt(linear) on its classifier"
    )


def __getattr__(name: str) -> Any:
    if name in ("open_clip", "peft", "timm"):
        return importlib.import_module(f"bigclass.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

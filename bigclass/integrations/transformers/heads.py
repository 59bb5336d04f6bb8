"""Any transformers model's output embeddings as a streamed head, and back.

The module that `get_output_embeddings()` names changes its class, nothing else: keys, tying, hooks and references stay. In training it
returns lazy logits, on which a model's own code (a division, a soft cap, a class bias, a slice, `.float()`, `.view(-1, V)`) stays lazy;
the loss that follows streams them, whether it is the model's `loss_function` (loss.py) or a cross-entropy written out in its forward.
No model family is named here, so none can be forgotten.

`resize_token_embeddings` may put a new linear layer in the head's place, through `set_output_embeddings`. So that it comes out converted,
the model gets one of its own, which copies and pickles with the model and does not keep it alive (as `ResetClassifier` of timm's models).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.stream import Scale, Softcap
from bigclass.extras import require
from bigclass.heads.lazy import LazyLogits
from bigclass.heads.linear import LinearHead, LMHead, is_plain_linear
from bigclass.integrations import unwrapped
from bigclass.integrations.transformers.loss import StreamedLoss, streams

require("transformers")

from transformers import PreTrainedModel  # noqa: E402

OF_HEAD = ("grad_filter", "engine", "group", "lazy")
OF_LOSS = ("label_smoothing", "z_loss")
_PLACE = "_bigclass_conversion"  # on the model


@dataclass(frozen=True)
class Conversion:
    """What `convert_head` did. losses: the modules whose loss function is streamed, and whether one was set on them before."""

    losses: dict[str, bool]


def convert_head(model: Any, **options: Any) -> Any:
    """`bigclass.convert_head` for a transformers model."""
    unknown = [name for name in options if name not in (*OF_HEAD, *OF_LOSS)]
    if unknown:
        more = "; the model's own code applies what its configuration says" if unknown[0] in ("softcap", "logit_scale") else ""
        raise TypeError(f"convert_head: unexpected option {unknown[0]!r}; known: {', '.join((*OF_HEAD, *OF_LOSS))}{more}")
    model = base_model(model)
    head = output_head(model)
    of_loss = {name: value for name, value in options.items() if name in OF_LOSS and value}
    losses = _modules_with_loss(model)
    if of_loss and not losses:
        raise ArgumentError(
            f"{next(iter(of_loss))}: {type(model).__name__} computes its loss by itself, not by its loss_function, so there is no place "
            "for it; leave it out, or take the loss from the model's lazy logits: "
            "bigclass.integrations.transformers.lm_loss(model(**inputs).logits, labels, ...)"
        )
    restore_head(model)
    _adopt(head, options)
    done = Conversion({name: "_loss_function" in module.__dict__ for name, module in losses})
    for _, module in losses:
        module.loss_function = StreamedLoss(module.loss_function, **of_loss)
    model.set_output_embeddings = SetOutputEmbeddings(model, options)
    setattr(model, _PLACE, done)
    return model


def restore_head(model: Any) -> Any:
    """`bigclass.restore_head` for a transformers model."""
    model = base_model(model)
    done = model.__dict__.pop(_PLACE, None)
    if done is None:
        return model
    _release(model.get_output_embeddings())
    for name, was_set in done.losses.items():
        module = model.get_submodule(name)
        loss = module.__dict__.get("_loss_function")
        if not isinstance(loss, StreamedLoss):
            continue  # set since then: it is the user's
        del module._loss_function
        if was_set:
            module.loss_function = loss.original
    model.__dict__.pop("set_output_embeddings", None)
    return model


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside wrappers of torch.compile, of DistributedDataParallel and of PEFT."""
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        # PEFT's model of mixed adapters has a tuner around it, and no method
        model = model.get_base_model() if hasattr(model, "get_base_model") else getattr(getattr(model, "base_model", None), "model", model)
    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError(f"model: expected a transformers model, got {type(model).__module__}.{type(model).__qualname__}")
    return model


def output_head(model: Any) -> nn.Module:
    """The module that makes a model's logits. Raises ValueError, with the reason, where there is none that can be streamed."""
    model = base_model(model)
    name = type(model).__name__
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        raise ArgumentError(
            f"model: {name} has no output embeddings (get_output_embeddings() is None), so there is no head over a vocabulary to convert; "
            "of a classifier's layer use bigclass.CCEHead.adopt(layer)"
        )
    if is_plain_linear(head) or isinstance(head, LinearHead) or _of_peft(head):
        return head
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    if type(head).__name__.startswith("FSDP"):
        raise ArgumentError(f"model: the output embeddings of {name} are sharded already ({kind}); convert_head before fully_shard")
    if isinstance(head, nn.Linear):
        raise ArgumentError(
            f"model: the output embeddings of {name} are a {kind}, a linear layer that computes something else (quantised?); "
            "bigclass streams plain ones: keep the head in floating point (modules_to_not_convert=['lm_head'])"
        )
    raise ArgumentError(f"model: expected an nn.Linear for the output embeddings of {name}, got {kind}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every module is in the mode it was in (a frozen part may have been in another than the rest)."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


@contextlib.contextmanager
def loss_only(model: Any) -> Iterator[None]:
    """Within this context evaluation, too, streams: a converted model returns lazy logits in eval mode and under no_grad.

    For losses and perplexities. (Generation and metrics on logits need none of it: they get real ones.)

    Example:
        >>> with torch.no_grad(), loss_only(model.eval()):
        ...     loss = model(input_ids=ids, labels=ids).loss  # no logits were written
    """
    head = output_head(model)
    parts = [m for m in head.modules() if isinstance(m, LinearHead)]
    if getattr(base_model(model), _PLACE, None) is None:
        raise ArgumentError("model: its head is not converted; bigclass.convert_head(model) first")
    if not _streams(head):
        raise ArgumentError(
            "model: PEFT has wrapped its head since the conversion and adds its adapters to real logits; bigclass.convert_head(model) again"
        )
    before = [m.always_lazy for m in parts]
    try:
        for m in parts:
            m.always_lazy = True
        yield
    finally:
        for m, was in zip(parts, before, strict=True):
            m.always_lazy = was


def head_options(model: Any, **inputs: Any) -> dict[str, float]:
    """The logit scale and the soft cap that a model puts on what its head returns, as options of `bigclass.LMHead` and the losses.

    They are read off the recipe of the lazy logits of one token, not guessed from names in the configuration (`logits_scaling` divides
    in some models and multiplies in others).

    Args:
        model: converted. inputs: for its forward; one token unless given.

    Returns:
        {"logit_scale": ..., "softcap": ...}, those that there are.

    Raises:
        ValueError: for a model that does more to its logits, a class bias say.

    Example:
        >>> head = bigclass.LMHead(hidden_size, vocab_size, **head_options(model))
    """
    bare = base_model(model)
    inputs = inputs or {"input_ids": torch.zeros((1, 1), dtype=torch.long, device=bare.device)}
    if bare.config.is_encoder_decoder and len(inputs) == 1:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad(), loss_only(model), evaluating(bare):
        logits = bare(**inputs).logits
    name = type(bare).__name__
    if not isinstance(logits, LazyLogits):
        raise ArgumentError(f"model: {name} returned {type(logits).__name__} for its logits, so they cannot be read")
    s, own = logits.stream, getattr(output_head(model), "bias", None)
    if s.bias is not None and (s.bias if own is None else s.bias - own).count_nonzero():
        raise ArgumentError(f"model: {name} adds a class bias of its own to its logits, which is no option of a head; use its lazy logits")
    if s.scale_tensor is not None:
        raise ArgumentError(f"model: {name} scales its logits by a tensor, which may learn; give that tensor itself as logit_scale")
    return _options_of(s.scale, s.maps, name)


def _options_of(scale: float, maps: tuple, name: str) -> dict[str, float]:
    made: dict[str, float] = {}
    maps = tuple(maps)
    if len(maps) in (1, 2) and isinstance(maps[0], Softcap) and all(isinstance(m, Scale) and m.numbers for m in maps[1:]):
        after = maps[1].numbers[0] if len(maps) == 2 else 1.0
        # scale z, tanh, times c: c tanh(c scale z / c)
        cap, inner = after * maps[0].numbers[0], scale
        made["softcap"], scale, maps = cap, inner * after, ()
    if maps:
        raise ArgumentError(f"model: {name} does more to its logits than a scale and a soft cap: {', '.join(m.name for m in maps)}")
    return made if abs(scale - 1.0) < 1e-12 else {"logit_scale": scale, **made}


class SetOutputEmbeddings:
    """The class's own `set_output_embeddings`, and the new head converted."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._model, self.options = weakref.ref(model), options

    def __call__(self, new_embeddings: Any) -> None:
        model = self._model()
        assert model is not None, "it is an attribute of the model"
        type(model).set_output_embeddings(model, new_embeddings)
        if is_plain_linear(model.get_output_embeddings()):
            _adopt(model.get_output_embeddings(), self.options)

    def __reduce__(self) -> tuple:
        return SetOutputEmbeddings, (self._model(), self.options)


def _of_peft(head: nn.Module) -> bool:
    return type(head).__module__.partition(".")[0] == "peft" or type(head).__module__ == "bigclass.integrations.peft"


def _adopt(head: Any, options: dict[str, Any]) -> None:
    if _of_peft(head):
        from bigclass.integrations import peft

        peft.adopt(head, **options)
    else:
        LMHead.adopt(head, **options)


def _streams(head: Any) -> bool:
    if _of_peft(head):
        from bigclass.integrations import peft

        return peft.is_adopted(head)
    return isinstance(head, LinearHead)


def _release(head: Any) -> None:
    if _of_peft(head):
        from bigclass.integrations import peft

        peft.release(head)
    elif isinstance(head, LinearHead):
        head.release()


def _modules_with_loss(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The model and the models inside it whose forward calls transformers' own loss over a vocabulary."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel) and streams(m)]

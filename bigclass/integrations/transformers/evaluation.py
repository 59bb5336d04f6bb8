"""Losses of tokens and perplexity of a converted model, in evaluation, where it would otherwise return real logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.integrations.transformers.heads import base_model, evaluating, loss_only
from bigclass.integrations.transformers.loss import StreamedLoss, lm_loss, shift_of

IGNORED = -100


def token_losses(model: Any, input_ids: Tensor, labels: Tensor | None = None, *, shift: int | None = None, **inputs: Any) -> Tensor:
    """The loss of each predicted token in evaluation mode, without gradients and without logits over the vocabulary.

        loss[b, t] = -log p(labels[b, t + shift] | what position t sees)

    Args:
        model: converted; its train and eval modes are as before afterwards. input_ids: (B, T).
        labels: (B, T), -100 where nothing is to be predicted. Of a causal model input_ids by default, except where attention_mask is 0.
        shift: 1 for next-token prediction, 0 where labels stand at the position that predicts them. As in the model's own loss by default.
        inputs: what else its forward takes.

    Returns:
        (B, T) fp32 (fp64 of an fp64 model), 0 where nothing is predicted (with shift 1 so the last position).

    Raises:
        ValueError: for a model whose head is not converted, or that is not causal and gets no labels.

    Example:
        >>> surprise = token_losses(model, ids, attention_mask=mask)  # (B, T)
    """
    return _token_losses(model, input_ids, labels, shift, inputs)[0]


def perplexity(model: Any, batches: Iterable[Mapping[str, Any] | Tensor], *, shift: int | None = None) -> float:
    """exp of the mean loss of all predicted tokens of all batches: a mean over tokens, not of the batches' means.

    Args:
        model, shift: as in `token_losses`. batches: of this process; each a mapping of what `token_losses` takes, or input ids (B, T).

    Raises:
        ValueError: where no token at all is predicted.

    Example:
        >>> perplexity(model, DataLoader(test_set, batch_size=8, collate_fn=collate))
    """
    device = base_model(model).device
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for batch in batches:
        named = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        named = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in named.items()}
        if not isinstance(named.get("input_ids"), Tensor):
            raise ArgumentTypeError(f"batches: expected tensors of input ids or mappings that have them, got {type(batch).__name__}")
        losses, predicted = _token_losses(model, named.pop("input_ids"), named.pop("labels", None), shift, named)
        total += losses.sum(dtype=torch.float64).cpu()
        count += int(predicted.sum())
    if count == 0:
        raise ArgumentError("batches: there is no token to predict (no batch, or every label is -100)")
    return math.exp(total.item() / count)


def _token_losses(model: Any, input_ids: Tensor, labels: Tensor | None, shift: int | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The losses (B, T), and the mask of the labels (...) that are predicted."""
    with torch.no_grad(), loss_only(model), evaluating(model):
        bare: Any = base_model(model)
        shift = _shift_of(bare) if shift is None else shift
        encodes = bare.config.is_encoder_decoder
        if labels is None:
            if shift == 0 or encodes:
                raise ArgumentError(f"labels: expected, since {type(bare).__name__} does not predict its next input ids; got None")
            mask = inputs.get("attention_mask")
            labels = input_ids if mask is None or mask.shape != input_ids.shape else input_ids.masked_fill(mask == 0, IGNORED)
        if encodes and "decoder_input_ids" not in inputs:
            inputs = {**inputs, "decoder_input_ids": bare.prepare_decoder_input_ids_from_labels(labels=labels)}
        if "use_cache" in inspect.signature(bare.forward).parameters:
            inputs = {"use_cache": False, **inputs}  # nothing is generated
        losses = lm_loss(model(input_ids=input_ids, **inputs).logits, labels, shift=shift, reduction="none", ignore_index=IGNORED)
    return losses, labels[..., shift:] != IGNORED


def _shift_of(model: Any) -> int:
    """How far the model's own loss moves the labels."""
    loss = model.__dict__.get("_loss_function")
    if model.config.is_encoder_decoder:
        return 0  # the decoder's input has been moved
    named = loss.shift if isinstance(loss, StreamedLoss) else shift_of(getattr(model, "loss_type", None))
    if named is not None:
        return named
    raise ArgumentError(
        f"shift: expected 0 or 1, since {type(model).__name__} computes its loss by itself and does not tell how it moves labels; got None"
    )

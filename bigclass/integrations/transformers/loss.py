"""transformers' losses over a vocabulary, on lazy logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.stream import Stream
from bigclass.extras import require
from bigclass.heads.lazy import LazyLogits
from bigclass.losses.distill import check_options, kl_div
from bigclass.losses.inputs import shifted

require("transformers")

from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss  # noqa: E402

# What `StreamedLoss` stands in for, and how far it moves the labels.
_SHIFTS = {ForCausalLMLoss: 1, ForMaskedLMLoss: 0}


def streams(model: Any) -> bool:
    """Does the model's forward call a loss function that `StreamedLoss` computes? (Asked without the property, which may warn.)"""
    own = model.__dict__.get("_loss_function")
    own = own.original if isinstance(own, StreamedLoss) else own
    # what the property falls back on is the causal loss
    loss = own or LOSS_MAPPING.get(getattr(model, "loss_type", None) or "", ForCausalLMLoss)
    return loss in _SHIFTS and _calls_loss_function(type(model))


def _calls_loss_function(cls: type) -> bool:
    """Is `self.loss_function` named in its forward, or in one that it inherits?"""
    for forward in (base.__dict__["forward"] for base in cls.__mro__ if "forward" in base.__dict__):
        code = getattr(inspect.unwrap(forward), "__code__", None)
        if code is not None and "loss_function" in code.co_names:
            return True
    return False


def shift_of(loss_type: str | None) -> int | None:
    """How far the loss that transformers calls so moves the labels; None where that is no loss over a vocabulary."""
    return _SHIFTS.get(LOSS_MAPPING.get(loss_type or ""))


class StreamedLoss:
    """transformers' causal or masked language-modelling loss: streamed on lazy logits, as it was on real ones.

    original: what it stands in for. label_smoothing, z_loss: as in `linear_cross_entropy`.
    """

    def __init__(self, original: Callable, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        if isinstance(original, StreamedLoss):
            original = original.original
        self.original, self.label_smoothing, self.z_loss = original, label_smoothing, z_loss

    @property
    def shift(self) -> int:
        """As in `lm_loss`."""
        return _SHIFTS[self.original]

    def __call__(
        self, logits: Any, labels: Tensor | None, vocab_size: int | None = None, num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100, shift_labels: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if not isinstance(logits, LazyLogits):
            return self.original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **kwargs)
        # the masked loss moves no labels, and takes no others
        target, shift = (labels, self.shift) if shift_labels is None or not self.shift else (shift_labels, 0)
        loss = lm_loss(
            logits, target, shift=shift, reduction="mean" if num_items_in_batch is None else "sum", ignore_index=ignore_index,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss,
        )  # fmt: skip
        if num_items_in_batch is None:
            return loss
        return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def lm_loss(
    logits: Any, labels: Any, *, shift: int = 1, reduction: str = "mean", ignore_index: int = -100, label_smoothing: float = 0.0,
    z_loss: float = 0.0, return_stats: bool = False,
) -> Any:  # fmt: skip
    """Cross-entropy of a converted model's lazy logits; scale, soft cap and bias that the model put on them are part of them.

    Args:
        logits: `LazyLogits` (..., T, C), what a converted model returns. labels: (..., T), int64 or int32, or as many in another shape.
        shift: position t is scored against labels[..., t + shift]. ignore_index: rows with this label contribute exactly nothing.
        reduction, label_smoothing, z_loss, return_stats: as in `bigclass.linear_cross_entropy`.

    Returns:
        The loss, as `bigclass.linear_cross_entropy`; with reduction "none" the shape of labels, 0 where there is nothing to predict.

    Raises:
        TypeError: for logits that are not lazy. IndexError: a label outside the vocabulary that is not ignore_index.

    Example:
        >>> logits = model(input_ids=ids).logits  # of a converted model in training
        >>> loss = lm_loss(logits, ids, z_loss=1e-4)
    """
    _check_logits(logits)
    target = _moved(labels, shift, ignore_index, logits)
    rows = logits.view(-1, logits.shape[-1])
    out = rows.cross_entropy(
        target.reshape(-1), ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
        z_loss=z_loss, return_stats=return_stats,
    )  # fmt: skip
    if not return_stats:
        return out.reshape(labels.shape) if reduction == "none" else out
    loss, stats = out
    shaped = stats._replace(lse=stats.lse.reshape(labels.shape), correct=stats.correct.reshape(labels.shape))
    return (loss.reshape(labels.shape) if reduction == "none" else loss), shaped


def lm_kl_div(
    logits: Any, teacher_logits: Any, labels: Any = None, *, shift: int = 1, ignore_index: int = -100, divergence: str = "forward",
    beta: float = 0.5, temperature: float = 1.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Divergence of a student from a teacher, both of transformers, from their lazy logits: neither's N x C numbers are made.

    Scales, soft caps and biases that the models put on their logits are part of them.

    Args:
        logits: `LazyLogits` (..., T, C) of the student, a converted model in training.
        teacher_logits: the teacher's (..., T, C), a constant: lazy ones (`loss_only(teacher)`), of any width, or a tensor of stored ones.
        labels: (..., T) tokens; position t counts where labels[..., t + shift] is there and not ignore_index. None: every position does.
        divergence, beta, temperature, reduction: as in `bigclass.linear_kl_div`.

    Returns:
        The loss, as `bigclass.linear_kl_div`; with reduction "none" (..., T), 0 at positions that do not count.

    Raises:
        TypeError: for a student's logits that are not lazy. ValueError: for shapes that do not fit.

    Example:
        >>> with torch.no_grad(), loss_only(teacher.eval()):
        ...     taught = teacher(input_ids=ids).logits
        >>> loss = lm_kl_div(student(input_ids=ids).logits, taught, ids, temperature=2.0)
    """
    _check_logits(logits)
    check_options(reduction, temperature)
    if not isinstance(teacher_logits, LazyLogits | Tensor):
        raise ArgumentTypeError(f"teacher_logits: expected lazy logits or a tensor of them, got {type(teacher_logits).__name__}")
    if not teacher_logits.dtype.is_floating_point:
        raise ArgumentTypeError(f"teacher_logits: expected a floating-point tensor, got {teacher_logits.dtype}")
    if tuple(teacher_logits.shape) != tuple(logits.shape):
        raise ArgumentError(
            f"teacher_logits: expected the student's shape {tuple(logits.shape)}, got {tuple(teacher_logits.shape)}; of a vocabulary that "
            "was padded take the classes that both have, teacher_logits[..., :C], in both"
        )
    mask = None if labels is None else (_moved(labels, shift, ignore_index, logits) != ignore_index).reshape(logits.shape[:-1])
    student = logits / temperature
    student.check()
    if isinstance(teacher_logits, LazyLogits):
        taught = teacher_logits / temperature
        taught.check()
        teacher = taught.stream
    else:  # divided as they are read: a quotient of 16-bit logits would be rounded to 16 bits, and be as large as they are
        teacher = Stream(given=teacher_logits.reshape(-1, teacher_logits.shape[-1]), scale=1.0 / temperature)
    return kl_div(
        student.stream, teacher, tuple(logits.shape[:-1]), divergence=divergence, beta=beta, temperature=temperature, reduction=reduction,
        mask=mask, engine=logits.engine,
    )  # fmt: skip


def _check_logits(logits: Any) -> None:
    if not isinstance(logits, LazyLogits):
        raise ArgumentTypeError(
            f"logits: expected the lazy logits of a converted model (in training, or within loss_only), got {type(logits).__name__}"
        )


def _moved(labels: Any, shift: int, ignore_index: int, logits: LazyLogits) -> Tensor:
    """The label of each position, in the shape of the labels."""
    if not isinstance(labels, Tensor):
        raise ArgumentTypeError(f"labels: expected a tensor of token ids, got {type(labels).__name__}")
    if labels.numel() * logits.shape[-1] != logits.numel():
        raise ArgumentError(f"labels: expected a label for each of the positions {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    return shifted("labels", labels, shift, ignore_index)[0].to(logits.device)

"""Which torch functions lazy logits answer: `F.cross_entropy(lazy, y)` and `lazy.cross_entropy(y)` are one thing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as legacy

from bigclass.core.errors import ArgumentError
from bigclass.heads.lazy.base import functions_of, result_dtype
from bigclass.heads.lazy.logits import LazyLogits
from bigclass.heads.lazy.terms import LazyBinaryCrossEntropy
from bigclass.losses.classwise import binary_cross_entropy, class_vector
from bigclass.losses.inputs import in_autocast
from bigclass.losses.targets import SparseTarget


def _binary_cross_entropy(input, target, weight=None, size_average=None, reduce=None, reduction="mean", pos_weight=None):
    if not isinstance(input, LazyLogits) or not isinstance(target, Tensor | SparseTarget) or input.class_first:
        return NotImplemented
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
    if tuple(target.shape) != tuple(input.shape):
        raise ArgumentError(f"target: expected the shape of the logits, {tuple(input.shape)}, got {tuple(target.shape)}")
    given = {"weight": weight, "pos_weight": pos_weight}
    vectors = [class_vector(name, v, input.stream) for name, v in given.items()]
    shaped = all(made is not None or v is None for made, v in zip(vectors, given.values(), strict=True))
    if not shaped or getattr(target, "requires_grad", False):
        return NotImplemented
    input.check()
    if in_autocast(input.device.type):
        input = input.float()  # as autocast has it for this function
    if reduction == "none":
        return LazyBinaryCrossEntropy(input, target, weight=vectors[0], pos_weight=vectors[1])
    loss = binary_cross_entropy(
        input.stream, input.lead, target, weight=vectors[0], pos_weight=vectors[1], reduction=reduction, engine=input.engine
    )
    return loss.to(result_dtype(input.dtype))


def _cross_entropy(input, target, *args, **kwargs):
    return input.cross_entropy(target, *args, **kwargs) if isinstance(input, LazyLogits) else NotImplemented


def _swapped(method: Callable) -> Callable:
    """A binary operation with the lazy object on either side."""

    def call(a, b, *, out=None, alpha=1, rounding_mode=None):
        if out is not None or alpha != 1 or rounding_mode is not None or not (isinstance(a, LazyLogits) ^ isinstance(b, LazyLogits)):
            return NotImplemented
        return method(a, b) if isinstance(a, LazyLogits) else method(b, a)

    return call


def _left(method: Callable) -> Callable:
    def call(a, b, *, out=None, alpha=1, rounding_mode=None):
        if out is not None or alpha != 1 or rounding_mode is not None or not isinstance(a, LazyLogits) or isinstance(b, LazyLogits):
            return NotImplemented
        return method(a, b)

    return call


_ANSWERED = (
    "detach", "clone", "contiguous", "to", "cpu", "float", "double", "half", "bfloat16", "type", "type_as", "tanh", "view", "reshape",
    "view_as", "reshape_as", "flatten", "unsqueeze", "squeeze", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis",
    "split", "chunk", "unbind", "narrow", "select", "topk", "argmax", "max", "gather", "logsumexp", "log_softmax", "size", "dim",
    "numel", "is_floating_point", "is_contiguous", "element_size",
)  # fmt: skip

LazyLogits._functions = {
    **functions_of(LazyLogits, _ANSWERED),
    F.cross_entropy: _cross_entropy,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
    **dict.fromkeys(
        (torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.multiply), _swapped(LazyLogits.__mul__)
    ),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _swapped(LazyLogits.__add__)),
    **dict.fromkeys((torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.__truediv__), _left(LazyLogits.__truediv__)),
    **dict.fromkeys((torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__), _left(LazyLogits.__sub__)),
    **dict.fromkeys((torch.neg, torch.negative, Tensor.neg, Tensor.__neg__), LazyLogits.__neg__),
    Tensor.__getitem__: LazyLogits.__getitem__,
}

r"""Gradients of weights summed over chunks in fp32, and rounded once.

Autograd adds the parts that reach a weight in the weight's dtype: with bf16 weights and many chunks each addition rounds, and the error
grows with their number. So weights are read through a placeholder of theirs in fp32, to which all parts go:

    w ---> placeholder ---> chunk 1, 2, ...       backward: each chunk's dw in fp32, their sum, one rounding to w's dtype

The placeholder is one number seen as many (stride 0); its value is never used. Linear layers multiply in the input's dtype as before, but
make dw with an fp32 result, so that it is rounded nowhere between the product and the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HALVES = (torch.bfloat16, torch.float16)


class _Widen(torch.autograd.Function):
    """w -> its placeholder."""

    @staticmethod
    def forward(ctx, w):
        ctx.dtype = w.dtype
        return w.new_zeros((), dtype=torch.float32).expand(w.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype)


class _Read(torch.autograd.Function):
    """w, with its gradient going to the placeholder."""

    @staticmethod
    def forward(ctx, wide, w):
        return w.view_as(w)

    @staticmethod
    def backward(ctx, grad):
        return grad.float(), None


class _Linear(torch.autograd.Function):
    """x w^T + b with x (..., D), w (C, D), b (C,); the gradients of w and b go to their placeholders in fp32."""

    @staticmethod
    def forward(ctx, x, wide_w, w, wide_b, b):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            out = F.linear(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype))
        ctx.save_for_backward(x, w)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ w.to(grad.dtype)).to(x.dtype)
        g = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            dw = _wide_product(g.t(), x.reshape(-1, x.shape[-1]).to(g.dtype))
        if ctx.needs_input_grad[3]:
            db = g.sum(0, dtype=torch.float32)
        return dx, dw, None, db, None


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, of halves. Only GPU libraries store a product of halves so; elsewhere the operands are widened first."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def widened(module: nn.Module, device: str) -> Wide | None:
    """What reads this module's parameters with wide gradients; None where they are wide anyway."""
    autocast = torch.is_autocast_enabled(device)
    weights = [p for p in module.parameters() if p.requires_grad and (p.dtype in _HALVES or (autocast and p.dtype == torch.float32))]
    return Wide(weights) if weights else None


class Wide:
    """Parameters and their placeholders. Made outside the chunks, so that all of them share it."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        # Lists searched by identity, since a key made of id() is nothing that torch.compile could trace.
        self.weights, self.placeholders = weights, [_Widen.apply(w) for w in weights]

    def placeholder(self, value: Any) -> Tensor | None:
        return next((wide for w, wide in zip(self.weights, self.placeholders, strict=True) if w is value), None)

    def reading(self) -> _Reading:
        """Within this context operations read the parameters through their placeholders."""
        return _Reading(self)


class _Reading(TorchFunctionMode):
    def __init__(self, wide: Wide) -> None:
        super().__init__()
        self.wide = wide

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _asks_only(func):
            return func(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs and self.wide.placeholder(args[2]) is not None:
            b, x, w = args  # transformers' Conv1D: b + x w
            wide_w = self.wide.placeholder(w)
            return _Linear.apply(x, wide_w.t(), w.t(), *self._bias(b))  # pyright: ignore[reportOptionalMemberAccess]
        return func(*[self._read(a) for a in args], **{name: self._read(a) for name, a in kwargs.items()})

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = self.wide.placeholder(weight)
        if wide is None:
            return F.linear(self._read(input), weight, self._read(bias))
        return _Linear.apply(input, wide, weight, *self._bias(bias))

    def _bias(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The placeholder, and the values. A bias that has no placeholder (frozen, or no parameter) stands in its own place."""
        wide = None if bias is None else self.wide.placeholder(bias)
        return (bias, bias) if wide is None else (wide, bias)

    def _read(self, value: Any) -> Any:
        wide = self.wide.placeholder(value) if isinstance(value, Tensor) else None
        return value if wide is None else _Read.apply(wide, value)


def _asks_only(func: Any) -> bool:
    """Is this an attribute (dtype, shape, device) of a tensor, or another question without a gradient? Transposes are none."""
    name = getattr(func, "__name__", "")
    return name in ("__get__", "__set__", "dim", "size", "is_floating_point", "detach") and func not in _TRANSPOSES


_TRANSPOSES: tuple[Any, ...] = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT"))

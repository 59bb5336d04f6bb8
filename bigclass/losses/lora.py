r"""Low-rank adapters of a linear layer: a second operand pair, and no copy of its weight.

    s_ij = x_i . w_j  +  sum_p u^p_i . B^p_j  (+ b_j)         u^p = alpha_p x (A^p)^T        A^p (R, D), B^p (C, R)

u (N, R) is made once, by autograd, outside the op: dA = alpha du^T x and the adapter's share of dx follow from its gradient. The op sees
pairs (x, w) and (u, B): a frozen w gets no C x D gradient, and what is made beyond a plain head's is of order (N + C) R.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.guards import autocast_off, in_transform
from bigclass.losses.inputs import check_scale, check_tensor, in_autocast


class Lora(NamedTuple):
    """An adapter: a (R, D), b (C, R) and alpha, the factor itself (PEFT's `scaling`, that is its lora_alpha / r)."""

    a: Tensor
    b: Tensor
    alpha: float | Tensor = 1.0


Adapters: TypeAlias = tuple[Tensor, Tensor, float | Tensor] | Sequence[tuple[Tensor, Tensor, float | Tensor]]


def adapter_pairs(input: Tensor, linear_weight: Tensor, lora: Adapters | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """The operand pairs (u (N, R), B (C, R)) of the adapters, checked."""
    if lora is None:
        return ()
    x = input.reshape(-1, input.shape[-1])
    return tuple([(adapter_features(x, a, alpha), b) for a, b, alpha in _checked(input, linear_weight, lora)])


def adapter_features(x: Tensor, a: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
    """u = alpha x a^T (N, R) for x (N, D), a (R, D), summed and scaled in fp32 (fp64) and rounded at most once.

    It comes in the wider dtype of the two; under autocast as it was summed, for engines then round operands themselves, where that pays."""
    wide = torch.promote_types(torch.promote_types(x.dtype, a.dtype), torch.float32)
    dtype = wide if in_autocast(x.device.type) else torch.promote_types(x.dtype, a.dtype)
    factor, scalar = (1.0, alpha) if isinstance(alpha, Tensor) else (float(alpha), None)
    with autocast_off(x.device):
        # where autograd's other forms look on (the dense engine has them all) plain functions, which do not shield ignored rows
        u = F.linear(x.to(wide), a.to(wide)) * factor if _watched(x, a) else _Down.apply(x, a, factor, wide)
        u = u if scalar is None else u * scalar.to(wide).reshape(())
        return u.to(dtype)


def _watched(*tensors: Tensor) -> bool:
    """Does a torch.func transform or forward-mode AD look on?"""
    if torch.compiler.is_compiling():
        return False
    dual = torch.autograd.forward_ad
    return in_transform() or (dual._current_level >= 0 and any(dual.unpack_dual(t).tangent is not None for t in tensors))


class _Down(torch.autograd.Function):
    """alpha x a^T, whose dA leaves out rows that no gradient reached: an ignored row may hold NaN, and 0 times NaN is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, alpha: float, wide: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, a)
        ctx.alpha, ctx.wide = alpha, wide
        return F.linear(x.to(wide), a.to(wide)).mul_(alpha)

    @staticmethod
    def backward(ctx: Any, du: Tensor):  # type: ignore[override]
        (x, a), wide = ctx.saved_tensors, ctx.wide
        dx = da = None
        with autocast_off(du.device):
            du = du.to(wide) * ctx.alpha
            if ctx.needs_input_grad[0]:
                dx = (du @ a.to(wide)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                reached, x = du.ne(0).any(1, keepdim=True), x.to(wide)
                if torch.compiler.is_compiling() or du.device.type != "cpu" or not bool(reached.all()):
                    x = torch.where(reached, x, 0.0)
                da = (du.t() @ x).to(a.dtype)
        return dx, da, None, None


def _checked(input: Tensor, linear_weight: Tensor, lora: Any) -> list[Lora]:
    """The adapters as triples. Raise for what does not fit."""
    if linear_weight.dim() != 2:
        raise ArgumentError(f"lora: adapts a weight (C, D), not one with positions, {tuple(linear_weight.shape)}; leave it None")
    several = not isinstance(lora, Lora) and isinstance(lora, Sequence) and all(isinstance(t, Sequence) for t in lora)
    made = []
    triples: Sequence[Any] = lora if several else (lora,)
    for i, given in enumerate(triples):
        name = f"lora[{i}]" if several else "lora"
        if not isinstance(given, Sequence) or len(given) != 3:
            kind = f"{len(given)} values" if isinstance(given, Sequence) else type(given).__name__
            raise ArgumentTypeError(f"{name}: expected (A (R, D), B (C, R), alpha), or a sequence of such triples, got {kind}")
        made.append(_checked_one(name, Lora(*given), input, linear_weight))
    return made


def _checked_one(name: str, adapter: Lora, input: Tensor, linear_weight: Tensor) -> Lora:
    a, b, alpha = adapter
    (c, d), rank = linear_weight.shape, "R"
    for label, t in (("A", a), ("B", b)):
        check_tensor(f"{name}: {label}", t)
        if not t.is_floating_point():
            raise ArgumentTypeError(f"{name}: expected {label} in a floating-point dtype, got {t.dtype}")
        if t.device != input.device:
            raise ArgumentError(f"{name}: expected {label} on device {input.device} (that of input), got {t.device}")
        shape = (rank, d) if label == "A" else (c, rank)
        if t.dim() != 2 or any(isinstance(s, int) and s != got for s, got in zip(shape, t.shape, strict=True)) or 0 in t.shape:
            raise ArgumentError(f"{name}: expected {label} of shape ({shape[0]}, {shape[1]}), got {tuple(t.shape)}")
        rank = a.shape[0]
    if not isinstance(alpha, int | float | Tensor) or isinstance(alpha, bool):
        raise ArgumentTypeError(f"{name}: expected alpha, a number or a scalar tensor, got {type(alpha).__name__}")
    check_scale(alpha, input, name=f"{name}: alpha")
    return adapter

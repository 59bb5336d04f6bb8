"""From a user's arguments (torch's words, any leading axes) to a stream (x (N, D), w (C, D), b (C,))."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.stream import Map, Scale, Softcap, Stream
from bigclass.parallel.layer import Layer, layer_of

INDEX_DTYPES = (torch.int64, torch.int32)


def in_autocast(device: str) -> bool:
    """Is autocast on for this type of device? (Some types have none, and raise when asked.)"""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_tensor(name: str, t: object) -> None:
    """Raise unless t is a tensor."""
    if not isinstance(t, Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor, got {type(t).__name__}")


LINEAR = ("input", "linear_weight", "linear_bias")


def check_linear(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *, weight_dims: int | None = 2, names: tuple[str, str, str] = LINEAR,
    shard: bool = False,
) -> None:  # fmt: skip
    """Raise unless input (..., D), linear_weight (C, [d_1, ..., d_K,] D) and linear_bias (C, [d_1, ..., d_K]) fit together.

    names: what the user calls the three. shard: may there be no class, this being a rank's part of them?"""
    of_input, of_weight, of_bias = names
    tensors = [(of_input, input), (of_weight, linear_weight)] + ([] if linear_bias is None else [(of_bias, linear_bias)])
    for name, t in tensors:
        check_tensor(name, t)
        if not t.is_floating_point():
            raise ArgumentTypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")
        if t.device != input.device:
            raise ArgumentError(f"{name}: expected device {input.device} (that of {of_input}), got {t.device}")
    if input.dim() < 1:
        raise ArgumentError(f"{of_input}: expected at least one axis (..., D), got a scalar")
    if linear_weight.dim() < 2 or (weight_dims is not None and linear_weight.dim() != weight_dims):
        elsewhere = "; ZeRO-3 has it in parts: call the module that owns it, or call this within deepspeed.zero.GatheredParameters"
        more = elsewhere if hasattr(linear_weight, "ds_status") else ""
        raise ArgumentError(f"{of_weight}: expected shape (C, D), got {tuple(linear_weight.shape)}{more}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise ArgumentError(
            f"{of_weight}: expected {input.shape[-1]} features in its last axis (as {of_input} {tuple(input.shape)}), "
            f"got {linear_weight.shape[-1]}"
        )
    if 0 in linear_weight.shape[1 if shard else 0 :]:
        raise ArgumentError(f"{of_weight}: expected at least one class and one feature (and position), got {tuple(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ArgumentError(f"{of_bias}: expected shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}")


def open_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, group: Any, *, weight_dims: int | None = 2) -> Layer:
    """The layer of a call, whose operands fit together, spread over ranks or not (`layer_of`)."""
    layer = layer_of(input, linear_weight, linear_bias, group)
    check_linear(layer.input, layer.weight, layer.bias, weight_dims=weight_dims, shard=layer.layout is not None)
    return layer


def make_stream(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | Tensor | None,
    temperature: float = 1.0,
    pairs: tuple[tuple[Tensor, Tensor], ...] = (),
    grad_filter: float | None = None,
    layer: Layer | None = None,
) -> Stream:
    """The stream softcap(logit_scale * (x w^T + b)) / temperature over the rows of input. pairs: more operands, of adapters.

    layer: what input, weight and bias are of, if it may be spread over ranks."""
    maps: list[Map] = []
    if logit_scale is not None:
        check_scale(logit_scale, input)
        maps.append(Scale.by(logit_scale))
    if softcap is not None:
        maps.append(Softcap.at(softcap))
    if temperature != 1.0:
        maps.append(Scale.by(1.0 / temperature))
    device = input.device.type
    compute = torch.get_autocast_dtype(device) if in_autocast(device) else None
    layout = None if layer is None else layer.layout
    if compute is None and layer is not None:
        compute = layer.compute_dtype
    x = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    return Stream(
        ((x, linear_weight), *pairs), bias=linear_bias, maps=tuple(maps), compute_dtype=compute, grad_filter=filter_of(grad_filter),
        layout=layout,
    )  # fmt: skip


def filter_of(grad_filter: float | None) -> float:
    """A stream's `grad_filter` from a user's; 0 for None. Raise unless it is None or a number in (0, 1)."""
    if grad_filter is None:
        return 0.0
    if isinstance(grad_filter, bool) or not isinstance(grad_filter, int | float | torch.SymFloat):
        raise ArgumentTypeError(f"grad_filter: expected None (exact) or a number such as 2**-8, got {grad_filter!r}")
    if not 0.0 < grad_filter < 1.0:
        raise ArgumentError(f"grad_filter: expected None (exact) or a relative error between 0 and 1, such as 2**-8, got {grad_filter!r}")
    return float(grad_filter)


def check_smoothing(label_smoothing: float, z_loss: float = 0.0) -> None:
    """Raise for a label smoothing outside [0, 1] or a negative coefficient of LSE^2."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"label_smoothing: expected a value in [0, 1], got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ArgumentError(f"z_loss: expected a coefficient >= 0, got {z_loss}")


def check_scale(value: float | Tensor, input: Tensor, *, name: str = "logit_scale", of: str = "input") -> None:
    """Raise unless the value is a number or a floating-point scalar tensor on input's device. name, of: what the user calls the two."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ArgumentError(
                f"{name}: expected a number or a floating-point tensor of shape () or (1,), got {value.dtype} {tuple(value.shape)}"
            )
        if value.device != input.device:
            raise ArgumentError(f"{name}: expected device {input.device} (that of {of}), got {value.device}")


def check_index(name: str, index: Tensor, device: torch.device, ignore_index: int = -100) -> None:
    """Raise unless index is an int64 or int32 tensor on `device` and ignore_index an integer."""
    check_tensor(name, index)
    if not isinstance(ignore_index, int | torch.SymInt):
        raise ArgumentTypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    if index.dtype not in INDEX_DTYPES:
        raise ArgumentTypeError(f"{name}: expected int64 or int32 class indices, got {index.dtype}")
    if index.device != device:
        raise ArgumentError(f"{name}: expected device {device} (that of input), got {index.device}")


def check_range(name: str, index: Tensor, keep: Tensor | None, classes: int) -> None:
    """Raise IndexError for a kept index outside [0, C), where looking costs no host sync. Elsewhere the op itself asserts."""
    if torch.compiler.is_compiling() or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = index.aminmax()
    if int(low) >= 0 and int(high) < classes:
        return
    wrong = (index < 0) | (index >= classes)
    if keep is not None:
        wrong &= keep
    if bool(wrong.any()):
        raise IndexError(f"{name}: expected class indices in [0, {classes}), got {int(index[wrong][0])}")


def kept_picks(index: Tensor, keep: Tensor | None, classes: int) -> Tensor:
    """Picks for index (N,): -1 where not kept. A kept negative index becomes C, so that the op's own check sees it."""
    if keep is None:  # known to be in range (`check_range`)
        return index.long().unsqueeze(-1)
    return torch.where(keep, torch.where(index < 0, classes, index), -1).unsqueeze(-1)


def checked_picks(name: str, index: Tensor, classes: int) -> Tensor:
    """Picks (N, K) for index (..., K), all of which must be classes: to an op -1 is no pick, so here it becomes C for the op to refuse."""
    check_range(name, index, None, classes)
    index = index.reshape(-1, index.shape[-1]).long()
    return torch.where(index < 0, classes, index)


def kept_rows(index: Tensor, ignore_index: int) -> Tensor | None:
    """(N,) bool, False where ignored; None if it is known that nothing is (known: on a CPU, outside a traced graph)."""
    keep = index != ignore_index
    if not torch.compiler.is_compiling() and index.device.type == "cpu" and bool(keep.all()):
        return None
    return keep


def shifted(name: str, index: Tensor, shift: int, ignore_index: int, axis: int = -1) -> tuple[Tensor, int | None]:
    """(index of each position, number of positions that have one): moved by `shift` to the left along the axis, the rest ignored."""
    if isinstance(shift, bool) or not isinstance(shift, int | torch.SymInt) or shift < 0:
        raise ArgumentError(f"shift: expected an integer >= 0, got {shift!r}")
    if not shift:
        return index, None
    if index.dim() < -axis:
        raise ArgumentError(f"shift: needs a sequence axis: input (..., T, D) with {name} (..., T)")
    length = index.shape[axis]
    shift = min(shift, length)
    moved = index.narrow(axis, shift, length - shift)
    return F.pad(moved, (*[0] * (-2 - 2 * axis), 0, shift), value=ignore_index), length - shift

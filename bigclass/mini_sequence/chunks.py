"""The loop over chunks, and the class that puts it into a module.

A converted module changes its class for one made from its own, in which one method (its forward, or the token-wise method of a larger
layer) runs chunk by chunk. So parameters, names, hooks and state_dict keys stay, and hooks of the module still run once a call, around the
whole loop: FSDP gathers and frees its parameters once, not once a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.heads.linear import change_class
from bigclass.mini_sequence.wide import Wide, widened
from bigclass.parallel.groups import Ranks

_SETTINGS = "_mini_sequence"  # of an instance: how to chunk it
_BASE, _METHOD = "_mini_sequence_base", "_mini_sequence_method"  # of a made class: what it was made from


@dataclass(frozen=True, slots=True)
class Chunks:
    """How a module is chunked."""

    tokens: int  # at most so many in a chunk
    fp32_gradients: bool = False  # sum weights' gradients over chunks in fp32, and round once
    ranks: Ranks | None = None  # run as many chunks as the rank that has the most


# --- putting it in, taking it out


@functools.cache
def _chunked_class(base: type, method: str) -> type:
    """A class like `base` whose method runs in chunks. Its name is that of base, for what looks layers up by it (FSDP policies, hooks)."""
    whole = getattr(base, method)

    @functools.wraps(whole)
    def in_chunks(self, *args, **kwargs):
        return run(self, functools.partial(whole, self), args, kwargs)  # a bound method made here would not compile

    def reduced(self, protocol):
        # The made class cannot be found by its name: what is stored is what it was made from.
        _, _, *state = super(made, self).__reduce_ex__(max(protocol, 2))
        return _remade, (base, method), *state

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    made = type(base.__name__, (base,), {**names, method: in_chunks, "__reduce_ex__": reduced, _BASE: base, _METHOD: method})
    return made


def _remade(base: type, method: str) -> Any:
    cls: Any = _chunked_class(base, method)
    return cls.__new__(cls)


def settings(module: nn.Module) -> Chunks | None:
    """How this module is chunked; None if it is not."""
    return module.__dict__.get(_SETTINGS)


def check_own_forward(module: nn.Module, method: str) -> str | None:
    """Why a change of class would not reach this method, or None. (accelerate's hooks keep the one they replace, which can be changed.)"""
    if method in module.__dict__ and not (method == "forward" and getattr(module.__dict__.get("_old_forward"), "__self__", None) is module):
        return f"its {method} was assigned on the module itself, which changing its class would not change; convert it before that"
    return None


def chunk(module: nn.Module, method: str, how: Chunks) -> None:
    """Run this method in chunks from now on; of a module that does already, change how."""
    if not hasattr(type(module), _BASE):  # else it has been, perhaps below a class that another library made from it since
        change_class(module, _chunked_class(type(module), method))
    module.__dict__[_SETTINGS] = how


def unchunk(module: nn.Module) -> None:
    """Undo `chunk`. Where another library has made its class from ours since (FSDP2) that stays, and does nothing."""
    if module.__dict__.pop(_SETTINGS, None) is not None and _BASE in type(module).__dict__:
        change_class(module, getattr(type(module), _BASE))


# --- running it


def run(module: nn.Module, whole: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """whole(*args, **kwargs), chunk by chunk, each with a checkpoint of its own."""
    how = settings(module)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if how is None or not tensors or tensors[0].ndim < 2:
        return whole(*args, **kwargs)
    keep = torch.is_grad_enabled() and (any(t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters()))
    # Without a graph nothing is kept and there is nothing to save. But a no_grad forward may be one that is made again with a graph
    # (reentrant checkpoints, gradient caches): its dropout masks must be drawn alike.
    if not keep and not (module.training and _draws(module)):
        return whole(*args, **kwargs)
    lead = tensors[0].shape[:-1]
    nested = [type(a).__name__ for a in (*args, *kwargs.values()) if isinstance(a, tuple | list | dict) and _holds_tensors(a)]
    if nested:
        raise ArgumentTypeError(
            f"{type(module).__name__}: expected tensors as arguments of their own, got some in a {nested[0]}, which is not chunked; "
            "leave this module out of mini_sequence (modules=[...] names those to convert)"
        )
    if any(t.shape[:-1] != lead for t in tensors):
        raise ArgumentError(
            f"{type(module).__name__}: expected tensors with the same token axes, got shapes {[tuple(t.shape) for t in tensors]}; leave "
            "this module out of mini_sequence (modules=[...] names those to convert)"
        )
    _check_sharding(module, how)
    sizes = _sizes(tensors[0], how)
    if len(sizes) == 1:
        return whole(*args, **kwargs)
    call = _Call(module, whole, *_without_tensors(args, kwargs))
    if how.fp32_gradients and keep:
        return _in_fp32(call, tensors, sizes)
    return _joined(call, tensors, sizes, keep)


@dataclass(frozen=True)
class _Call:
    """A call of a module, to be made with the tensors of a chunk."""

    module: nn.Module
    whole: Callable[..., Any]
    args: tuple[Any, ...]  # Tensor, the class, where a tensor was: the graph, which holds this, would hold the whole call's besides
    kwargs: dict[str, Any]
    wide: Wide | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        args = [next(given) if t is Tensor else t for t in self.args]
        kwargs = {name: next(given) if t is Tensor else t for name, t in self.kwargs.items()}
        x = tensors[0]
        with _fresh_casts(x.device.type), nullcontext() if self.wide is None else self.wide.reading():
            out = self.whole(*args, **kwargs)
        if not isinstance(out, Tensor) or out.shape[:-1] != x.shape[:-1]:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ArgumentTypeError(
                f"{type(self.module).__name__}: expected one tensor with a row for each of the tokens {tuple(x.shape)}, got {got}; leave "
                "this module out of mini_sequence (modules=[...] names those to convert)"
            )
        return out


def _without_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rest = tuple([Tensor if isinstance(t, Tensor) else t for t in args])
    return rest, {name: Tensor if isinstance(t, Tensor) else t for name, t in kwargs.items()}


def _holds_tensors(container: Any) -> bool:
    values = container.values() if isinstance(container, dict) else container
    return any(isinstance(value, Tensor) for value in values)


def _joined(call: _Call, tensors: list[Tensor], sizes: list[int], keep: bool) -> Tensor:
    lead = tensors[0].shape[:-1]
    flat = (1,) * (len(lead) - 1) + (sum(sizes),)  # as many axes as before: the module may count on them
    # One split: its gradient is one concatenation. Slices would each make a gradient of full size.
    parts = [t.reshape(*flat, t.shape[-1]).split(sizes, dim=-2) for t in tensors]
    outs = [checkpoint(call, *own, use_reentrant=False) if keep else call(*own) for own in zip(*parts, strict=True)]
    joined = torch.cat(outs, dim=-2)
    return joined.reshape(*lead, joined.shape[-1])


@torch.compiler.disable(reason="fp32_gradients=True of mini_sequence reads weights by a mode that no graph holds; not with fullgraph=True")
def _in_fp32(call: _Call, tensors: list[Tensor], sizes: list[int]) -> Tensor:
    return _joined(replace(call, wide=widened(call.module, tensors[0].device.type)), tensors, sizes, True)


def _sizes(x: Tensor, how: Chunks) -> list[int]:
    """How many tokens of x (..., D) each chunk has: nearly equal, so that the largest, which makes the peak, is small."""
    rows = most = math.prod(x.shape[:-1])
    if how.ranks is not None:
        from bigclass.parallel.collectives import row_counts

        most = max(row_counts((x.detach().reshape(rows, x.shape[-1]),), how.ranks)[0])
    count = max(1, -(-most // how.tokens))
    return [rows // count + (i < rows % count) for i in range(count)]


def _check_sharding(module: nn.Module, how: Chunks) -> None:
    """Raise where parts gather their parameters once a chunk and nothing makes ranks agree on chunks: the first uneven batch would hang."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    # by their names: importing torch's takes a while, and who has one has imported it
    parts = next((name for name, p in module.named_parameters() if type(p).__name__ == "DTensor" or hasattr(p, "ds_id")), None)
    if parts is None:
        return
    if how.fp32_gradients:
        raise ArgumentError(
            f"fp32_gradients: expected whole parameters inside {type(module).__name__}, got {parts!r} sharded; shard the module or its "
            "block as a whole (fully_shard(block)), or leave it out"
        )
    gathers = any(hasattr(p, "ds_id") for p in module.parameters())
    gathers = gathers or any(cls.__name__ == "FSDPModule" for part in module.modules() if part is not module for cls in type(part).__mro__)
    if gathers and how.ranks is None:
        raise ArgumentError(
            f"group: {type(module).__name__} has parts that gather their own parameters ({parts!r}), once a chunk; give mini_sequence "
            "group=torch.distributed.group.WORLD (the ranks that share them) so that all run as many chunks, or shard the module as a whole"
        )


def _fresh_casts(device: str) -> AbstractContextManager[Any]:
    """Under autocast: without its cache, in which all chunks would share a weight's half-precision copy, and sum their gradients in it."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)


def _draws(module: nn.Module) -> bool:
    """May this module draw random numbers in training? By its dropouts, and by numbers that are called so."""
    for part in module.modules():
        dropout = isinstance(part, nn.modules.dropout._DropoutNd) or "dropout" in type(part).__name__.lower()
        for name, value in vars(part).items():
            if isinstance(value, float) and value > 0 and ("drop" in name or (dropout and name == "p")):
                return True
    return False

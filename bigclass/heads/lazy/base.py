"""What lazy logits and what is made of them share: torch functions are answered from a table, anything else materialises."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.core.plan import settings


class LogitsWarning(UserWarning):
    """Lazy logits were written out, N x C, for an operation that needs the numbers themselves."""


class Lazy:
    """What lazy logits and what is made of them share: torch functions come to `_functions`, anything else materialises."""

    _functions: ClassVar[dict[Any, Callable]] = {}

    def materialize(self) -> Tensor:
        """The real tensor (..., C), differentiable. No warning: you asked for it."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    def written_out(self, operation: str) -> Tensor:
        made = self.__dict__.get("_real")
        if made is None:
            if not torch.compiler.is_compiling():
                _announce(operation, self)
            made = self.materialize()
            self.__dict__["_real"] = made
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for a in (*args, *kwargs.values()):
            if isinstance(a, Lazy):
                handler = type(a)._functions.get(func)
                if handler is not None:
                    made = handler(*args, **kwargs)
                    if made is not NotImplemented:
                        return made
        return dense_call(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        attribute = getattr(Tensor, name)
        if callable(attribute):
            return _Method(attribute, self)
        return getattr(self.written_out(name), name)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    nelement = numel

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self.written_out("indexing")[index]

    def __bool__(self) -> bool:
        return bool(self.written_out("bool"))

    def __iter__(self):
        return iter(self.unbind(0))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    __hash__ = object.__hash__


class _Method:
    """A tensor's method, bound to a lazy object."""

    def __init__(self, function: Callable, owner: Lazy):
        self.function, self.owner = function, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.owner).__torch_function__(self.function, (type(self.owner),), (self.owner, *args), kwargs)


def dense_call(func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """func on real tensors."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    real = functools.partial(pytree.tree_map, lambda a: a.written_out(name) if isinstance(a, Lazy) else a, is_leaf=is_lazy)
    return func(*real(list(args)), **real(kwargs))


def is_lazy(a: Any) -> bool:
    return isinstance(a, Lazy)


def _announce(operation: str, lazy: Any) -> None:
    """Say that N x C numbers are about to be written, or refuse."""
    size = lazy.numel() * lazy.dtype.itemsize
    shape = tuple(lazy.shape)
    what = f"{operation} needs the logits themselves: {shape} {lazy.dtype}, {size / 2**20:.1f} MiB, and as much again for gradients"
    limit = settings().logits_limit
    if limit is not None and size > limit:
        raise ArgumentError(
            f"bigclass: {what}, above the limit of {limit / 2**20:.1f} MiB. Use head(features, target), a loss that streams or "
            "bigclass.convert_criterion, or raise bigclass.planning(logits_limit=...)"
        )
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("bigclass", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"bigclass: {what}. They are written out. To stay lazy use head(features, target), a loss that streams, or "
        "bigclass.convert_criterion; to refuse instead set bigclass.planning(logits_limit=...)",
        LogitsWarning,
        stacklevel=level,
    )


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed from logits of this dtype comes in: never in 16 bits."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def functions_of(cls: type, names: Sequence[str]) -> dict[Callable, Callable]:
    """The torch functions and tensor methods of these names, answered by the methods of the same name."""
    table: dict[Callable, Callable] = {}
    for name in names:
        method = getattr(cls, name)
        for home in (torch, Tensor, F):
            function = getattr(home, name, None)
            if callable(function):
                table[function] = method
    return table


def _materialising(name: str) -> Callable:
    function = getattr(Tensor, name)

    def call(self, *args, **kwargs):
        return dense_call(function, (self, *args), kwargs)

    return call


for _name in (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__pow__", "__rpow__", "__rsub__", "__rtruediv__", "__matmul__",
    "__rmatmul__", "__mod__", "__floordiv__", "__abs__", "__float__", "__int__", "__array__", "__contains__",
):  # fmt: skip
    setattr(Lazy, _name, _materialising(_name))

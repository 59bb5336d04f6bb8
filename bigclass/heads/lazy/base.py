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
    __array_priority__ = 1000  # as tensors: NumPy's numbers then leave arithmetic to us

    def materialize(self) -> Tensor:
        """The real tensor (..., C), differentiable. No warning: you asked for it."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    def written_out(self, operation: str) -> Tensor:
        """The real tensor for an operation that needs it: with a `LogitsWarning` the first time, the same one afterwards."""
        if self._kept("_real") is None:
            _announce(operation, tuple(self.shape), self.dtype)
        return self.real()

    def real(self) -> Tensor:
        """`materialize`, once."""
        made = self._kept("_real")
        return self._keep("_real", self.materialize()) if made is None else made

    def _keep(self, name: str, made: Any) -> Any:
        self.__dict__[name] = made, torch.is_grad_enabled()
        return made

    def _kept(self, name: str) -> Any:
        """What `_keep` was given, unless it was made under no_grad and gradients are wanted now."""
        made, differentiable = self.__dict__.get(name, (None, False))
        return made if differentiable or not (torch.is_grad_enabled() and self.requires_grad) else None

    def stand_in(self) -> Tensor:
        """A tensor of this shape, dtype and device and nothing else: one number, expanded."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)

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
        if func in _ASK_SHAPE or (func in _TAKE_SHAPE and args and not isinstance(args[0], Lazy)):
            like = [a.stand_in() if isinstance(a, Lazy) else a for a in args]
            return func(*like, **{k: a.stand_in() if isinstance(a, Lazy) else a for k, a in kwargs.items()})
        return dense_call(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if _writes(name):
            raise _read_only(name)
        attribute = getattr(Tensor, name)
        if callable(attribute):
            return _Method(attribute, self)
        return getattr(self.stand_in() if name in _FACTS else self.written_out(name), name)

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

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _read_only("assignment")

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
    compiling = torch.compiler.is_compiling()  # there a function's name is no string to look into; `__getattr__` has seen the methods
    if isinstance(kwargs.get("out"), Lazy) or (not compiling and args and isinstance(args[0], Lazy) and _writes(name)):
        raise _read_only(name)
    made: list[tuple[Tensor, int]] = []

    def real(a: Any) -> Any:
        if not isinstance(a, Lazy):
            return a
        t = a.written_out(name)
        if not compiling and not t.is_inference():
            made.append((t, t._version))
        return t

    all_real = functools.partial(pytree.tree_map, real, is_leaf=is_lazy)
    out = func(*all_real(list(args)), **all_real(kwargs))
    if any(t._version != version for t, version in made):  # inplace=True, say: what streams would not see it
        raise _read_only(name)
    return out


def _read_only(operation: str) -> RuntimeError:
    return RuntimeError(
        f"bigclass: {operation} writes to lazy logits, or watches their gradient, and there is no tensor to do that to: a loss that "
        "streams would not notice. Use the form that returns a new tensor, or logits = logits.materialize() first"
    )


# Answered from the shape, the dtype and the device of what is lazy ...
_ASK_SHAPE = {
    getattr(home, name)
    for home in (torch, Tensor)
    for name in (
        "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full", "new_empty",
        "new_tensor", "result_type", "is_complex", "is_signed", "is_same_size",
    )
    if hasattr(home, name)
}  # fmt: skip
# ... unless it is the tensor itself that takes another's
_TAKE_SHAPE = {getattr(Tensor, name) for name in ("to", "type_as", "view_as", "reshape_as", "expand_as")}
# Attributes that need no numbers
_FACTS = {
    "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn", "itemsize", "nbytes",
}  # fmt: skip


def _writes(name: str) -> bool:
    """Does the method of this name change its tensor in place, or watch the gradients of one?"""
    return (name.endswith("_") and not name.startswith("_")) or name in _WRITES


_WRITES = {
    "__imul__", "__iadd__", "__isub__", "__itruediv__", "__ipow__", "__setitem__",
    "retain_grad", "register_hook", "register_post_accumulate_grad_hook",
}  # fmt: skip


def is_lazy(a: Any) -> bool:
    return isinstance(a, Lazy)


def _announce(operation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Say that N x C numbers are about to be written, or refuse. In a compiled graph: while it is traced, once."""
    if torch.compiler.is_compiling():
        _announce_in_trace(operation, shape, dtype)
    else:
        _tell(operation, shape, dtype)


def _tell(operation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    size = math.prod(shape) * dtype.itemsize
    what = f"{operation} needs the logits themselves: {shape} {dtype}, {size / 2**20:.1f} MiB, and as much again for gradients"
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("bigclass", "torch"):
        frame, level = frame.f_back, level + 1
    if frame.f_globals.get("__name__", "").partition(".")[0] == "peft":
        what += " (an adapter around a head that was converted before it: convert_head again after get_peft_model, and it streams too)"
    limit = settings().logits_limit
    if limit is not None and size > limit:
        raise ArgumentError(
            f"bigclass: {what}, above the limit of {limit / 2**20:.1f} MiB. Use head(features, target), a loss that streams or "
            "bigclass.convert_criterion, or raise bigclass.planning(logits_limit=...)"
        )
    warnings.warn(
        f"bigclass: {what}. They are written out. To stay lazy use head(features, target), a loss that streams, or "
        "bigclass.convert_criterion; to refuse instead set bigclass.planning(logits_limit=...)",
        LogitsWarning,
        stacklevel=level,
    )


@torch.compiler.assume_constant_result
def _announce_in_trace(operation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _tell(operation, shape, dtype)


def plain_number(value: Any) -> Any:
    """A NumPy number as Python's; anything else as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed from logits of this dtype comes in: never in 16 bits."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def functions_of(cls: type, names: Sequence[str]) -> dict[Callable, Callable]:
    """The torch functions and tensor methods of these names, answered by the methods of the same name."""
    table: dict[Callable, Callable] = {}
    for name in names:
        method = _of_first(cls, getattr(cls, name))
        for home in (torch, Tensor, F):
            function = getattr(home, name, None)
            if callable(function):
                table[function] = method
    return table


def _of_first(cls: type, method: Callable) -> Callable:
    """method as a function of torch: for a first argument of this class, which torch calls `input` or `self`."""

    def call(*args, **kwargs):
        if not args:
            name = next((name for name in ("input", "self", "tensor") if name in kwargs), None)
            if name is None:
                return NotImplemented
            args, kwargs = (kwargs[name],), {k: v for k, v in kwargs.items() if k != name}
        return method(*args, **kwargs) if isinstance(args[0], cls) else NotImplemented

    return call


def _materialising(name: str) -> Callable:
    function = getattr(Tensor, name)

    def call(self, *args, **kwargs):
        if args and name in ("__eq__", "__ne__") and not isinstance(args[0], Tensor | Lazy | int | float | complex):
            return NotImplemented  # lazy == None
        return dense_call(function, (self, *args), kwargs)

    return call


for _name in (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__pow__", "__rpow__", "__rsub__", "__rtruediv__", "__matmul__",
    "__rmatmul__", "__mod__", "__floordiv__", "__abs__", "__float__", "__int__", "__array__", "__contains__", "__add__", "__radd__",
    "__sub__", "__pos__",
):  # fmt: skip
    setattr(Lazy, _name, _materialising(_name))

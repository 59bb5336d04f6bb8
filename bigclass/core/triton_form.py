"""Triton forms beside torch forms, without importing Triton.

A map or a fold is written twice: in torch, for the tiled engine, and as a Triton device function,
for the fused one. The two stand side by side in one file. Triton is optional, so the decorator
below keeps the plain Python function and compiles it only when an engine asks.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable
from types import FunctionType
from typing import Any


class TritonForm:
    """A Triton device function that is compiled when `.jit` is first read.

    Inside the function `tl` means `triton.language`, and the names of `uses` other forms.
    """

    def __init__(self, function: Callable[..., Any], uses: dict[str, TritonForm] | None = None) -> None:
        self.function, self.uses = function, uses or {}
        self._jit: Any = None

    @property
    def jit(self) -> Any:
        """The `triton.JITFunction`. Raises ImportError where Triton is not installed."""
        if self._jit is None:
            import triton
            import triton.language as tl

            f = self.function
            scope = {**f.__globals__, "tl": tl, **{name: form.jit for name, form in self.uses.items()}}
            made = FunctionType(f.__code__, scope, f.__name__, f.__defaults__, f.__closure__)
            made.__module__, made.__qualname__ = f.__module__, f.__qualname__
            self._jit = triton.jit(made)
        return self._jit


class WrittenForm(TritonForm):
    """A form whose text is made, of other forms: `def form(...)`, in which these go by their names."""

    def __init__(self, text: str, forms: dict[str, TritonForm]) -> None:
        self.text, self.forms = text, forms
        self._jit: Any = None

    @property
    def jit(self) -> Any:
        if self._jit is None:
            import triton
            import triton.language as tl

            names: dict[str, Any] = {"tl": tl, "__name__": f"{__name__}.written", **{k: f.jit for k, f in self.forms.items()}}
            define(self.text, names)
            self._jit = triton.jit(names["form"])
        return self._jit


def define(source: str, names: dict[str, Any]) -> None:
    """Run source text that defines functions, so that `inspect` (and with it Triton) finds their text again."""
    file = f"<bigclass {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)


def triton_form(function: Callable[..., Any]) -> TritonForm:
    """Mark a function as the Triton form of the torch function beside it."""
    return TritonForm(function)


def triton_form_with(**uses: TritonForm) -> Callable[[Callable[..., Any]], TritonForm]:
    """`triton_form` for a function that calls other forms, by these names."""
    return lambda function: TritonForm(function, uses)

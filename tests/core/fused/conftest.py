"""These tests run the kernels in Triton's interpreter. Where there is a GPU it is off by default: tests/gpu runs them for real there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigclass.core.engines.support import interpreting


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder, compiled-only tests aside, where the interpreter is off."""
    if interpreting():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.name != "test_compile.py":
            item.add_marker(pytest.mark.skip(reason="needs Triton's interpreter: set TRITON_INTERPRET=1"))


@pytest.fixture(scope="session", autouse=True)
def one_patch_a_launch() -> Iterator[None]:
    """The interpreter swaps the functions of Triton's language for its own again at every call of a device function, a third of the time
    of these tests; here at the first call from each module in a launch. Triton without these names is left as it is."""
    try:
        from triton.runtime import interpreter

        patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    except (ImportError, AttributeError):
        yield
        return
    done: set[int] = set()

    def patch_once(fn):
        if id(fn.__globals__) in done:
            return None  # looked at by nobody: only the kernel's own patch, the first of a launch, is taken back
        done.add(id(fn.__globals__))
        return patch(fn)

    @functools.wraps(launch)
    def launch_anew(*args, **kwargs):
        try:
            return launch(*args, **kwargs)
        finally:
            done.clear()

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "_patch_lang", patch_once)
        patches.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield

"""These tests run the kernels in Triton's interpreter. Where there is a GPU it is off by default: tests/gpu runs them for real there."""

from __future__ import annotations

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

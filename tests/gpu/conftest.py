"""Tests that need a CUDA device: `python -m pytest -m gpu` (`-n 8` where pytest-xdist is installed).

Where there is a device, a JSON file in benchmarks/results (or the folder that BIGCLASS_GPU_RESULTS names) says which it was and what each
test came to. It is written after every test, so that a run that is cut short has not been for nothing. A test that leaves the device broken
(after an illegal access nothing works in that process) ends its process with exit code `BROKEN`, one that hangs ends it, too.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.support import ON_CPU

FOLDER = Path(os.environ.get("BIGCLASS_GPU_RESULTS") or Path(__file__).parents[2] / "benchmarks" / "results")
STARTED = time.strftime("%Y-%m-%dT%H-%M-%S")
BROKEN = 86
RUNNING = "running"
LONGEST = 400  # seconds of a test, its subprocesses' included, after which the process gives up

_outcomes: dict[str, dict[str, object]] = {}
_head: dict[str, Any] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder, and skip it without a device."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not ON_CPU:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def ends_one_day(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that hangs cannot be interrupted: the process ends, and says where it was."""
    if not ON_CPU:
        faulthandler.dump_traceback_later(LONGEST, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test that never ends stands in the file as running."""
    if "tests/gpu/" in nodeid and torch.cuda.is_available() and _writes():
        _outcomes[nodeid] = {"outcome": RUNNING}
        _write()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what each test of this folder came to, and write it."""
    if "tests/gpu/" not in report.nodeid:
        return
    if report.when == "call" or not report.passed:
        known = _outcomes.get(report.nodeid)
        if known is None or known["outcome"] in (RUNNING, "passed"):
            note = {} if report.passed else {"note": report.longreprtext.splitlines()[-12:] or str(report.longrepr)}
            _outcomes[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 3)} | note
        if torch.cuda.is_available() and _writes():
            _write()
    if report.failed and torch.cuda.is_available() and not hasattr(report, "node") and _broken():
        sys.__stderr__.write(f"{report.nodeid} left the device broken\n")  # pyright: ignore[reportOptionalMemberAccess]
        os._exit(BROKEN)


def pytest_sessionfinish(exitstatus: int) -> None:
    """Nothing is left to be run, unless somebody stopped it."""
    if exitstatus in (0, 1) and _outcomes and torch.cuda.is_available() and _writes():
        _head["complete"] = True
        _write()


def _writes() -> bool:
    """One process does, which hears of all tests."""
    return "PYTEST_XDIST_WORKER" not in os.environ


def _broken() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _write() -> None:
    """The file, anew."""
    if "machine" not in _head:
        from benchmarks.machine import describe_machine, describe_versions

        command = "python -m pytest " + " ".join(sys.argv[1:])
        _head.update(command=command, started=STARTED, machine=describe_machine(torch.device("cuda")), versions=describe_versions())
    counts = {which: sum(o["outcome"] == which for o in _outcomes.values()) for which in ("passed", "failed", "skipped")}
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {**_head, "finished": time.strftime("%Y-%m-%dT%H-%M-%S"), **counts, "tests": _outcomes}
    path = FOLDER / f"gpu-tests-{STARTED}.json"
    path.with_suffix(".new").write_text(json.dumps(content, indent=1))
    path.with_suffix(".new").replace(path)  # whoever is stopped here leaves a whole file


if ON_CPU:  # the interpreter is quicker so
    from tests.core.fused.conftest import one_patch_a_launch  # noqa: F401

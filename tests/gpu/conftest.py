"""Tests that need a CUDA device: `python -m pytest -m gpu`. Where there is one, a JSON file names it and what passed there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"

_outcomes: dict[str, dict[str, object]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder, and skip it without a device."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what each test of this folder came to."""
    if "tests/gpu/" in report.nodeid and (report.when == "call" or report.failed):
        _outcomes[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 3)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the file, if anything ran on a device."""
    if not _outcomes or not torch.cuda.is_available():
        return
    from benchmarks.machine import describe_machine, describe_versions

    device = torch.device("cuda")
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    content = {
        "command": "python -m pytest -m gpu",
        "finished": started,
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "passed": sum(o["outcome"] == "passed" for o in _outcomes.values()),
        "tests": _outcomes,
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"gpu-tests-{started}.json").write_text(json.dumps(content, indent=1))

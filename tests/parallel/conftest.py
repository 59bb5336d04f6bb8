"""What several test files share: processes that have imported DeepSpeed, which takes longer than all that is tested there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks


def with_deepspeed(rank: int, world: int) -> dict[str, Any]:
    from tests.parallel import test_deepspeed, test_ulysses

    test_deepspeed.start_deepspeed(rank, world)
    return {"ulysses": test_ulysses.everything(rank), "zero": test_deepspeed.every_stage(rank, world)}


@pytest.fixture(scope="session")
def deepspeed_ranks() -> list[dict[str, Any]]:
    """What two ranks made under DeepSpeed: ZeRO (test_deepspeed.py) and Ulysses (test_ulysses.py)."""
    return run_ranks(with_deepspeed, 2)

"""Who is timed, in which order, and what the clock leaves out."""

import time

import pytest
import torch

from benchmarks.timing import Staged, interleave, seconds_a_call

CPU = torch.device("cpu")


def test_interleaving_rotates_the_order_warms_up_before_each_sample_and_keeps_every_round() -> None:
    order: list[str] = []
    times = interleave([lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c")], [1, 2, 1], 3, CPU)
    assert "".join(order) == "aabbbcc" + "bbbccaa" + "ccaabbb"
    assert [len(rounds) for rounds in times] == [3, 3, 3]


def test_of_two_stages_the_clock_sees_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def first() -> float:
        now[0] += 100.0
        return 2.0

    def second(seconds: float) -> float:
        now[0] += seconds
        return seconds

    assert seconds_a_call(Staged(first, second), CPU, repeats=3) == 2.0
    assert Staged(first, second)() == 2.0

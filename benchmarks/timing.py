"""Times of several calls, fairly: interleaved round by round, each round in another order.

A machine's speed drifts (other users, clocks, heat). Candidates timed one after the other would each meet another machine;
within a round they meet the same one, and a median over rounds drops the odd one out.

Directly before each sample the call is made once untimed: else whoever follows one that used much memory would pay for its dirty
pages, cold caches and clocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# A sample lasts at least this long, so that a short call is repeated until the clock and one interruption no longer matter.
SAMPLE_SECONDS = 0.02
MAX_REPEATS = 500

# Calls timed to learn how long a short one takes; the fastest counts, for any may be the one that was interrupted.
TRIALS = 3


@dataclass(frozen=True, slots=True)
class Staged:
    """A call in two stages, `second(first())`, of which only the second is timed."""

    first: Callable[[], Any]
    second: Callable[[Any], Any]

    def __call__(self) -> Any:
        return self.second(self.first())


def seconds_a_call(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Mean time of a call. On CUDA by events, so that launches of one call hide behind the one before, as in a training step."""
    if isinstance(call, Staged):
        return sum(_seconds_of_second(call, device) for _ in range(repeats)) / repeats
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _seconds_of_second(call: Staged, device: torch.device) -> float:
    made = call.first()
    if device.type == "cuda":  # no wait for the first stage: the launches of the second hide behind it
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call.second(made)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call.second(made)
    return time.perf_counter() - begin


def estimate_seconds(call: Callable[[], object], device: torch.device) -> float:
    """About how long a call takes, from as few as will tell. The call has been made before (is warm)."""
    fastest = math.inf
    for _ in range(TRIALS):
        fastest = min(fastest, seconds_a_call(call, device))
        if fastest > 5 * SAMPLE_SECONDS:
            break
    return fastest


def choose_repeats(seconds: float) -> int:
    """How often to repeat a call of that length in one sample."""
    return min(MAX_REPEATS, max(1, math.ceil(SAMPLE_SECONDS / max(1e-9, seconds))))


def interleave(
    calls: Sequence[Callable[[], object]],
    repeats: Sequence[int],
    rounds: int,
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Seconds a call of each of `calls`, one number a round, each after a call that warms up. `tick` is called after every sample."""
    times: list[list[float]] = [[] for _ in calls]
    for round_index in range(rounds):
        for position in range(len(calls)):
            which = (position + round_index) % len(calls)
            calls[which]()
            times[which].append(seconds_a_call(calls[which], device, repeats[which]))
            tick()
    return times

"""What bigclass means to reach on a Hopper GPU, and whether a run's JSON file shows it.

Every limit is a ratio to something measured in the same run (the bare matrix products, a peer) or a number of bytes beyond inputs and
gradients. A pass is one product of 2NCD flops: the floor's forward makes one, its forward+backward three; four are both together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .candidate import Pass
from .floors import FLOOR
from .ours import FILTERED, OURS
from .shapes import CROSS_ENTROPY

MB = 1_000_000
QUACK, CCE = "quack", "cce"
FUSED, IN_FORWARD = "bigclass fused", "bigclass fused, in forward"
SAVED, RECOMPUTE = "bigclass fused, saved", "bigclass fused, recompute"
FORWARD: Pass = "forward"
BOTH: Pass = "forward+backward"
EXACT = (OURS, FUSED, SAVED, IN_FORWARD, RECOMPUTE, "bigclass tiled", "bigclass tiled, in forward", "bigclass tiled, recompute")
FILTERED_COARSE = "bigclass, filter 2^-6"


@dataclass(frozen=True, slots=True)
class Limit:
    """The fastest (or smallest) of `who` in pass `which` takes at most `most` of `of`.

    of: a number of passes of the floor, a peer's name, or None: `most` bytes. memory: extra bytes are compared, not seconds.
    Memory is that of whoever was fastest.
    """

    who: tuple[str, ...]
    which: Pass
    most: float
    of: int | str | None
    memory: bool = False
    loss: str = CROSS_ENTROPY
    data: tuple[str, ...] = ("flat",)
    classes: int | None = None


LIMITS = (
    Limit((FUSED,), FORWARD, 1.15, 1),
    Limit((FUSED,), FORWARD, 4 * MB, None, memory=True),
    Limit(EXACT, BOTH, 1.10, 3),
    Limit(EXACT, BOTH, 1.00, QUACK),
    Limit(EXACT, BOTH, 0.85, QUACK, memory=True),
    Limit((RECOMPUTE,), BOTH, 1.15, 4),
    Limit((RECOMPUTE,), BOTH, 256 * MB, None, memory=True),
    *(
        Limit((name,), BOTH, most, peer, data=("peaked",))
        for name, most in ((FILTERED, 0.7), (FILTERED_COARSE, 0.5))
        for peer in (QUACK, CCE)
    ),
    *(Limit((name,), BOTH, 256 * MB, None, memory=True, data=("peaked",)) for name in (FILTERED, FILTERED_COARSE)),
    Limit(EXACT, BOTH, 1.2, 4, loss="clip", data=("fresh", "paired"), classes=32768),
    Limit(EXACT, BOTH, 1.2, 3, loss="bce", data=("fresh", "rare"), classes=131072),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A limit on one case. found: the ratio or the bytes; None where something did not run, and `missing` says what."""

    limit: Limit
    case: str
    who: str
    found: float | None
    missing: str = ""

    @property
    def holds(self) -> bool | None:
        return None if self.found is None else self.found <= self.limit.most

    def __str__(self) -> str:
        of = {1: "one bare GEMM", 3: "three bare GEMMs", 4: "four bare GEMMs", None: ""}.get(self.limit.of, str(self.limit.of))  # pyright: ignore[reportArgumentType, reportCallIssue]
        what = f"{self.case}: {self.who}, {self.limit.which}"
        if self.limit.of is None:
            found = "?" if self.found is None else f"{self.found / MB:.1f}"
            line = f"{what}: {found} MB beyond inputs and gradients, at most {self.limit.most / MB:g}"
        else:
            found = "?" if self.found is None else f"{self.found:.3f}"
            line = f"{what}: {found} x {of}{' in memory' if self.limit.memory else ''}, at most {self.limit.most:g}"
        mark = {True: "ok    ", False: "MISSED", None: "-     "}[self.holds]
        return f"{mark} {line}" + (f" ({self.missing})" if self.missing else "")


def verdicts(runs: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """Every limit on every case that it is about, of runs as `python -m benchmarks` and its `tiles` write them."""
    runs = list(runs)
    of = [found for run in runs for case in run.get("cases", ()) for found in _of_case(case)]
    return of + [found for run in runs for shape in run.get("shapes", ()) for found in _of_tiles(shape)]


def of_candidate(name: str) -> Limit | None:
    """The limit in bare products of a candidate's forward and backward, the one that is most its own."""
    ours = [limit for limit in LIMITS if name in limit.who and limit.which == BOTH and isinstance(limit.of, int) and not limit.memory]
    return min(ours, key=lambda limit: len(limit.who), default=None)


def _of_case(case: Mapping[str, Any]) -> Iterator[Verdict]:
    shape = case["shape"]
    name = f"{shape['name']} {case['dtype']} {case['data']}"
    passes = {(c["name"], which): figures for c in case["candidates"] for which, figures in c["passes"].items()}
    for limit in LIMITS:
        wanted = limit.loss == shape["loss"] and case["data"] in limit.data and limit.classes in (None, shape["classes"])
        if not wanted or case["dtype"] == "float32":
            continue
        ran = [who for who in limit.who if (who, limit.which) in passes]
        if not ran:
            yield Verdict(limit, name, limit.who[0], None, "did not run")
            continue
        who = min(ran, key=lambda w: passes[w, limit.which]["median_seconds"])
        measure = "extra_bytes" if limit.memory else "median_seconds"
        value, unit = passes[who, limit.which][measure], _unit(limit, passes, measure)
        if value is None or not unit:
            yield Verdict(limit, name, who, None, f"{limit.of or who} was not measured" if value is not None else "memory was not measured")
            continue
        yield Verdict(limit, name, who, value / unit)


def _of_tiles(found: Mapping[str, Any]) -> Iterator[Verdict]:
    """The best tile of each road of one shape of `python -m benchmarks.tiles`, its bare GEMM being one pass."""
    times: Mapping[str, float] = found["milliseconds"]
    of_roads = {"saved": SAVED, "in forward": IN_FORWARD, "recompute": RECOMPUTE}
    for road, limit in (("forward", LIMITS[0]), *((road, of_candidate(name)) for road, name in of_roads.items())):
        best = min((name for name in times if name.startswith(road + " ")), key=times.__getitem__, default=None)
        if best is not None and limit is not None and isinstance(limit.of, int):
            yield Verdict(limit, found["shape"]["name"], f"tiles {best}", times[best] / (limit.of * times[FLOOR]))


def _unit(limit: Limit, passes: Mapping[tuple[str, Pass], Mapping[str, Any]], measure: str) -> float | None:
    """What the limit counts in: bytes, the peer's figure, or the seconds of so many passes of the floor."""
    if limit.of is None:
        return 1.0
    if isinstance(limit.of, str):
        return passes.get((limit.of, limit.which), {}).get(measure)
    parts: dict[int, tuple[Pass, ...]] = {1: (FORWARD,), 3: (BOTH,), 4: (FORWARD, BOTH)}
    found: list[float | None] = [passes.get((FLOOR, part), {}).get(measure) for part in parts[limit.of]]
    known = [seconds for seconds in found if seconds is not None]
    return sum(known) if len(known) == len(found) else None

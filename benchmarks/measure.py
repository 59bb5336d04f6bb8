"""One case, a shape with a type and a kind of data: everyone timed side by side, checked against float64, weighed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .candidates import LOSS_PASSES, Call, Candidate, Pass, Unavailable, candidates_for
from .data import Problem, make_problem
from .memory import measure_memory
from .reference import TOLERANCE, Reference, errors, reference
from .shapes import Shape
from .timing import choose_repeats, estimate_seconds, interleave

Tell = Callable[[str], None]


@dataclass(slots=True)
class Figures:
    """What one candidate did in one pass.

    setting: the chunk or tile it ran with, if it has one. seconds: of one call, one number a round, each the mean of `repeats` calls.
    errors: relative, by output, where there is a reference. extra_bytes: above inputs and outputs, where measured.
    """

    setting: int | None
    repeats: int
    seconds: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    extra_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Absence:
    """A candidate that gave no figure, or not all of them, and why. failed: it should have."""

    candidate: Candidate
    which: Pass
    reason: str
    failed: bool


@dataclass(slots=True)
class Case:
    """The figures of one case."""

    shape: Shape
    dtype: torch.dtype
    kind: str
    candidates: list[Candidate]
    figures: dict[tuple[str, Pass], Figures] = field(default_factory=dict)  # by candidate's name and pass
    absences: list[Absence] = field(default_factory=list)

    def passes(self) -> list[Pass]:
        """The passes that somebody has figures for."""
        return [which for which in LOSS_PASSES if any(key[1] == which for key in self.figures)]

    def ratio(self, name: str, baseline: str, which: Pass) -> float | None:
        """Median time of `name` in units of `baseline`'s, None unless both ran."""
        one, other = self.figures.get((name, which)), self.figures.get((baseline, which))
        return one.median / other.median if one and other else None

    def worst_error(self, name: str) -> float | None:
        """The largest relative error of any output of any pass."""
        found = [e for (who, _), f in self.figures.items() if who == name for e in f.errors.values()]
        return max(found, default=None)

    def is_wrong(self, name: str) -> bool:
        """Whether an output is further from float64 than rounding explains (a NaN is)."""
        error = self.worst_error(name)
        return error is not None and not error <= TOLERANCE[self.dtype]


def measure_case(shape: Shape, dtype: torch.dtype, kind: str, device: torch.device, *, rounds: int, check: bool, tell: Tell) -> Case:
    """Time every candidate on one case; check outputs where `check`."""
    tell("making data")
    problem = make_problem(shape, kind, dtype, device)
    exact = None
    if check:
        tell("computing the float64 reference")
        exact = reference(problem)
    case = Case(shape, dtype, kind, candidates_for(shape, dtype))

    for which in LOSS_PASSES:
        ready: list[tuple[Figures, Call]] = []
        for candidate in case.candidates:
            if which not in candidate.passes:
                continue
            tell(f"{which}: preparing {candidate.name}")
            try:
                figures, call = _prepare(candidate, problem, which, exact)
            except Unavailable as reason:
                case.absences.append(Absence(candidate, which, str(reason), failed=False))
            except Exception as error:  # whatever a candidate dies of, the others go on and the report says it
                case.absences.append(Absence(candidate, which, _one_line(error), failed=True))
            else:
                case.figures[candidate.name, which] = figures
                ready.append((figures, call))
        tell(f"{which}: {rounds} rounds of {len(ready)} candidates")
        times = interleave([call for _, call in ready], [figures.repeats for figures, _ in ready], rounds, device)
        for (figures, _), seconds in zip(ready, times, strict=True):
            figures.seconds = seconds
    return case


def add_memory(case: Case, device: torch.device, tell: Tell) -> None:
    """Measure everyone's memory, but the floors': they are given theirs."""
    for candidate in case.candidates:
        settings: dict[Pass, int | None] = {which: f.setting for (name, which), f in case.figures.items() if name == candidate.name}
        if candidate.role == "floor" or not settings:
            continue
        tell(f"memory of {candidate.name}")
        try:
            extra = measure_memory(candidate.name, settings, case.shape, case.kind, case.dtype, device)
        except Exception as error:  # whatever the measured process dies of, the others go on
            case.absences += [Absence(candidate, which, f"memory: {_one_line(error)}", failed=True) for which in settings]
            continue
        for which, size in extra.items():
            case.figures[candidate.name, which].extra_bytes = size


def copy_memory(source: Case, to: Case) -> None:
    """Take over the memory figures of the same shape and type on other data: memory does not depend on values."""
    for key, figures in to.figures.items():
        if key in source.figures:
            figures.extra_bytes = source.figures[key].extra_bytes


def _prepare(candidate: Candidate, problem: Problem, which: Pass, exact: Reference | None) -> tuple[Figures, Call]:
    """A warm call at its best setting, with its outputs checked."""
    device = problem.input.device
    fastest, best = math.inf, None
    for setting in candidate.settings_for(problem.shape):
        call = candidate.prepare(problem, which, setting)
        found = errors(call(), exact or {})
        seconds = estimate_seconds(call, device)
        if seconds < fastest:
            fastest, best = seconds, (Figures(setting, choose_repeats(seconds), errors=found), call)
    assert best is not None
    return best


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""One case, a shape with a type and a kind of data: everyone timed side by side, checked against float64, weighed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from .candidate import LOSS_PASSES, Call, Candidate, Pass, Unavailable
from .candidates import candidates_for
from .data import Problem, make_problem, own_shape
from .memory import measure_memory
from .reference import TOLERANCE, Reference, errors, reference
from .shapes import Shape
from .timing import Staged, choose_repeats, estimate_seconds, interleave

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
    """The figures of one case. shape: what was run, which is not what was asked where the data have sizes of their own."""

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
        """The largest relative error of any output of any pass; NaN if one is."""
        found = [error for _, error in self._errors(name)]
        return math.nan if any(map(math.isnan, found)) else max(found, default=None)

    def is_wrong(self, name: str) -> bool:
        """Whether an output is further from float64 than rounding explains (a NaN is). Gradients that are not meant to be exact may be."""
        exact = all(candidate.exact for candidate in self.candidates if candidate.name == name)
        tolerance = TOLERANCE[self.dtype]
        return any(not error <= (tolerance if exact or output == "loss" else math.inf) for output, error in self._errors(name))

    def _errors(self, name: str) -> list[tuple[str, float]]:
        return [item for (who, _), figures in self.figures.items() if who == name for item in figures.errors.items()]


def measure_case(
    shape: Shape,
    dtype: torch.dtype,
    kind: str,
    device: torch.device,
    *,
    rounds: int,
    check: bool,
    tell: Tell,
    passes: Sequence[Pass] = LOSS_PASSES,
    only: Collection[str] | None = None,
) -> Case:
    """Time every candidate, or `only` the named, on one case; check outputs where `check`."""
    tell("making data")
    shape = own_shape(shape, kind)
    problem = make_problem(shape, kind, dtype, device, tell)
    exact = None
    if check:
        tell("computing the float64 reference")
        exact = reference(problem)
    case = Case(shape, dtype, kind, candidates_for(shape, dtype, only))

    for which in passes:
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


def add_memory(case: Case, device: torch.device, tell: Tell, known: Case | None = None) -> None:
    """Measure everyone's memory, but the floors' (they are given theirs) and the backward's alone (it starts beside what a forward kept).

    known: a case of the same shape and type on other data; memory does not depend on values, but where these choose what is left out.
    """
    for candidate in case.candidates:
        found: dict[Pass, Figures] = {
            which: f for (name, which), f in case.figures.items() if name == candidate.name and which != "backward"
        }
        if candidate.role == "floor" or not found:
            continue
        if known and candidate.exact and all((candidate.name, which) in known.figures for which in found):
            for which, figures in found.items():
                figures.extra_bytes = known.figures[candidate.name, which].extra_bytes
            continue
        tell(f"memory of {candidate.name}")
        settings: dict[Pass, int | None] = {which: figures.setting for which, figures in found.items()}
        try:
            extra = measure_memory(candidate.name, settings, case.shape, case.kind, case.dtype, device)
        except Exception as error:  # whatever the measured process dies of, the others go on
            case.absences += [Absence(candidate, which, f"memory: {_one_line(error)}", failed=True) for which in settings]
            continue
        for which, size in extra.items():
            found[which].extra_bytes = size


def _prepare(candidate: Candidate, problem: Problem, which: Pass, exact: Reference | None) -> tuple[Figures, Call]:
    """A warm call at its best setting, with its outputs checked."""
    device = problem.input.device
    fastest, best = math.inf, None
    for setting in candidate.settings_for(problem.shape):
        call = candidate.prepare(problem, which, setting)
        found = errors(call(), exact or {})
        seconds = estimate_seconds(call, device)
        if seconds < fastest:
            # What is not timed takes its time all the same: 500 forwards for a backward of a microsecond would be no good bargain.
            whole = estimate_seconds(call.__call__, device) if isinstance(call, Staged) else seconds
            fastest, best = seconds, (Figures(setting, choose_repeats(whole), errors=found), call)
    assert best is not None
    return best


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

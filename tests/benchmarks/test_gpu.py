"""`python -m benchmarks.gpu` where there is no GPU: its commands, its clock, what it says of limits."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._C._autograd import DeviceType

pytest.importorskip("rich", reason="pip install 'bigclass[bench]'")
pytest.importorskip("matplotlib", reason="pip install 'bigclass[bench]'")

from benchmarks import gpu, kernel_times, rates, tiles
from benchmarks.__main__ import main as benchmark
from benchmarks.__main__ import parse_arguments
from benchmarks.data import make_problem
from benchmarks.floors import FLOOR
from benchmarks.gpu import Step
from benchmarks.limits import BOTH, CCE, FORWARD, FUSED, MB, OURS, QUACK, RECOMPUTE, of_candidate, verdicts
from benchmarks.ours import FILTERED
from benchmarks.shapes import Shape

CPU = torch.device("cpu")


def python(code: str, *more: str) -> Step:
    return Step((sys.executable, "-c", code, *more), 1.0)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_device")
def test_a_dry_run_prints_every_command_and_without_a_device_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["all", "--dry-run", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert all(f"{stage}: about" in out for stage in gpu.STAGES)
    assert "benchmarks.tiles" in out and "llama3-8b" in out and "pytest -m gpu" in out
    assert "no CUDA device" in err
    assert gpu.main(["rates"]) == 2


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_every_command_is_understood_and_a_stage_fits_into_its_time(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = gpu.parse([stage, "--out", str(tmp_path)])
    steps = gpu.steps_of(stage, options)
    assert sum(step.seconds for step in steps) < 60 * gpu.MINUTES or stage == "check"
    for step in steps:
        module, arguments = step.command[2], list(step.command[3:])
        if module == "benchmarks":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            parsed = parse_arguments(arguments)
            assert parsed.device == "cuda" and parsed.out == tmp_path and FLOOR in parsed.only
        elif module in ("benchmarks.rates", "benchmarks.kernel_times", "benchmarks.tiles"):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            monkeypatch.setattr(sys, "argv", ["", *arguments])
            run = {"benchmarks.rates": rates.main, "benchmarks.kernel_times": kernel_times.main, "benchmarks.tiles": tiles.main}[module]
            assert run() == 2
    if stage in ("peers", "tiles", "profile"):
        assert "phi3.5" in str(gpu.steps_of(stage, gpu.parse([stage, "--shapes", "phi3.5"]))[0])


def test_nsight_compute_looks_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = gpu.parse(["profile", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    plain = gpu.steps_of("profile", options)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/opt/{name}")
    more = gpu.steps_of("profile", options)[len(plain) :]
    assert more and all(step.command[0] == "/opt/ncu" and "--clock-control none" in str(step) for step in more)


def test_steps_are_chosen_by_number() -> None:
    assert gpu.numbers("1,3-5") == {1, 3, 4, 5}
    every = gpu.steps_of("peers", gpu.parse(["peers"]))
    assert gpu.steps_of("peers", gpu.parse(["peers", "--steps", "2-3"])) == every[1:3]
    with pytest.raises(SystemExit):
        gpu.parse(["peers", "--steps", "two"])


def test_a_command_that_runs_when_the_time_is_up_is_stopped_and_the_rest_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    begin = time.monotonic()
    assert gpu.run(python("import time; time.sleep(60)"), begin + 1.5)[0] is None
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    assert gpu.run(python(stubborn), time.monotonic() + 1.5)[0] is None
    assert time.monotonic() - begin < 30
    assert gpu.run(python("raise SystemExit(3)"), time.monotonic() + 30)[0] == 3
    assert gpu.run(python("pass"), time.monotonic() - 1)[0] is None


def test_a_stage_writes_what_became_of_each_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = json.dumps(made_up({(FLOOR, FORWARD): (1.0, None), (FUSED, FORWARD): (1.1, 3 * MB)}))
    code = "import sys, pathlib; pathlib.Path(sys.argv[1], 'run.json').write_text(sys.argv[2])"
    options = gpu.parse(["peers", "--out", str(tmp_path), "--minutes", "1"])
    steps = [python(code, str(tmp_path), run), python("raise SystemExit(3)")]
    assert gpu.run_stage("peers", steps, options) == 1
    (path,) = tmp_path.glob("gpu-peers-*.json")
    record = json.loads(path.read_text())
    assert [step["exit_code"] for step in record["steps"]] == [0, 3] and record["files"] == ["run.json"]
    assert any(line.startswith("ok") and "1.100 x one bare GEMM, at most 1.15" in line for line in record["limits"])
    assert "exit code 3" in capsys.readouterr().out


def test_tests_that_a_broken_device_took_along_run_in_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every, calls = [f"tests/gpu/test_a.py::test_{i}" for i in range(5)], []

    def run(step: Step, deadline: float, environment: dict[str, str]) -> tuple[int | None, float]:
        left_out = Path(step.command[-1].removeprefix("@")).read_text().splitlines()
        left = [test for test in every if f"--deselect={test}" not in left_out]
        calls.append(left)
        now = left[:2]  # the second breaks the device, the first time
        broken = len(calls) == 1
        outcomes = {test: {"outcome": "passed"} for test in (now if broken else left)} | (
            {now[-1]: {"outcome": "failed"}} if broken else {}
        )
        file = {"tests": outcomes} if broken else {"tests": outcomes, "complete": True}
        folder = Path(environment["BIGCLASS_GPU_RESULTS"])
        (folder / f"gpu-tests-{len(calls)}.json").write_text(json.dumps(file))
        return (86 if broken else 0), 1.0

    monkeypatch.setattr(gpu, "run", run)
    options = gpu.parse(["check", "--out", str(tmp_path)])
    code, _ = gpu.run_check(python("pass"), options, time.monotonic() + 60)
    assert code == 1 and calls == [every, every[2:]]
    # all of them ended: nothing is left for another call
    gpu.run_check(python("pass"), gpu.parse(["check", "--out", str(tmp_path), "--resume"]), time.monotonic() + 60)
    assert calls[2] == []


def made_up(figures: dict[tuple[str, str], tuple[float, float | None]], name: str = "llama3-8b", data: str = "flat", **shape) -> dict:
    """A run of `python -m benchmarks` with these (seconds, bytes) by candidate and pass."""
    by_name: dict[str, dict] = {}
    for (who, which), (seconds, size) in figures.items():
        by_name.setdefault(who, {})[which] = {"median_seconds": seconds, "extra_bytes": size}
    return {
        "cases": [
            {
                "shape": {"name": name, "rows": 8, "classes": 9, "features": 7, "loss": "cross-entropy", **shape},
                "dtype": "bfloat16",
                "data": data,
                "candidates": [{"name": who, "passes": passes} for who, passes in by_name.items()],
            }
        ]
    }


def found(run: dict, who: str, which: str, of: object, memory: bool = False):
    (verdict,) = [v for v in verdicts([run]) if v.who == who and v.limit.which == which and v.limit.of == of and v.limit.memory == memory]
    return verdict


def test_limits_are_in_passes_of_the_floor_of_peers_and_in_bytes() -> None:
    run = made_up(
        {
            (FLOOR, FORWARD): (1.0, None), (FLOOR, BOTH): (3.0, None), (QUACK, BOTH): (3.3, 1000 * MB), (FUSED, FORWARD): (1.2, 5 * MB),
            (OURS, BOTH): (3.2, 800 * MB), (RECOMPUTE, BOTH): (4.4, 200 * MB),
        }
    )  # fmt: skip
    assert found(run, FUSED, FORWARD, 1).found == pytest.approx(1.2) and found(run, FUSED, FORWARD, 1).holds is False
    assert found(run, FUSED, FORWARD, None, memory=True).holds is False
    assert found(run, OURS, BOTH, 3).found == pytest.approx(3.2 / 3) and found(run, OURS, BOTH, 3).holds
    assert found(run, OURS, BOTH, QUACK).found == pytest.approx(3.2 / 3.3)
    assert found(run, OURS, BOTH, QUACK, memory=True).found == pytest.approx(0.8)
    four = found(run, RECOMPUTE, BOTH, 4)
    assert four.found == pytest.approx(1.1) and str(four).startswith("ok     llama3-8b bfloat16 flat: bigclass fused, recompute")
    assert found(run, RECOMPUTE, BOTH, None, memory=True).found == 200 * MB
    assert "MISSED" in str(found(run, FUSED, FORWARD, 1)) and "5.0 MB" in str(found(run, FUSED, FORWARD, None, memory=True))


def test_who_did_not_run_is_named_and_holds_no_limit() -> None:
    run = made_up({(FLOOR, FORWARD): (1.0, None), (FLOOR, BOTH): (3.0, None), (FILTERED, BOTH): (2.0, None)}, data="peaked")
    for of in (QUACK, CCE):
        verdict = found(run, FILTERED, BOTH, of)
        assert verdict.holds is None and of in verdict.missing and str(verdict).startswith("-")
    assert "memory was not measured" in found(run, FILTERED, BOTH, None, memory=True).missing
    assert all(v.holds is None for v in verdicts([made_up({})]))


def test_limits_are_of_their_own_losses_and_sizes() -> None:
    figures: dict[tuple[str, str], tuple[float, float | None]] = {
        (FLOOR, FORWARD): (1.0, None), (FLOOR, BOTH): (3.0, None), (OURS, BOTH): (4.4, None),
    }  # fmt: skip
    (pairs,) = verdicts([made_up(figures, data="fresh", loss="clip", classes=32768)])
    assert pairs.found == pytest.approx(1.1) and pairs.holds
    (labels,) = verdicts([made_up(figures, data="rare", loss="bce", classes=131072)])
    assert labels.found == pytest.approx(4.4 / 3) and labels.holds is False
    assert verdicts([made_up(figures, data="fresh", loss="clip", classes=4096)]) == []
    limit = of_candidate(RECOMPUTE)
    assert limit is not None and (limit.of, limit.most) == (4, 1.15)


def test_the_best_tile_of_each_road_is_held_against_its_limit() -> None:
    times = {FLOOR: 1.0, "forward table": 1.3, "forward {'stages': 4}": 1.1, "recompute table": 5.0, "saved table": 3.2}
    lines = [str(v) for v in verdicts([{"shapes": [{"shape": {"name": "llama3-8b"}, "milliseconds": times}]}])]
    assert len(lines) == 3
    assert "tiles forward {'stages': 4}, forward: 1.100 x one" in lines[0] and lines[0].startswith("ok")
    assert "1.067 x three" in lines[1] and "MISSED" in lines[2] and "1.250 x four" in lines[2]


def test_limits_read_what_the_benchmark_writes(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--shapes", "16x90x8", "--dtype", "bf16", "--rounds", "1", "--no-memory", "--only", OURS]
    assert benchmark([*arguments, "--passes", FORWARD, BOTH, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    run = json.loads(path.read_text())
    assert found(run, OURS, BOTH, 3).found > 0 and found(run, OURS, BOTH, QUACK).holds is None


def test_rates_are_of_everything_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    figures = rates.measure(CPU, 1, shapes=((16, 24, 8),), copied=1 << 12, launches=3)
    assert sum("TFLOP/s" in name for name in figures) == 6 and "copy, TB/s" in figures
    assert all(value > 0 for value in figures.values())


def test_a_profile_names_what_ran_and_adds_up() -> None:
    problem = make_problem(Shape("profiled", 16, 90, 8), "flat", torch.float32, CPU)
    rows = kernel_times.profile(kernel_times.step(problem, "tiled", "recompute", None), DeviceType.CPU)
    assert rows and sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert [row["milliseconds"] for row in rows] == sorted((row["milliseconds"] for row in rows), reverse=True)
    assert kernel_times.floor_milliseconds(problem) > 0

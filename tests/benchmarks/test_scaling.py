"""Time and memory against N and against C, and two result files side by side."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="pip install 'bigclass[bench]'")
pytest.importorskip("matplotlib", reason="pip install 'bigclass[bench]'")

from benchmarks import scaling
from benchmarks.__main__ import main, parse_arguments
from benchmarks.machine import MIB
from benchmarks.measure import measure_case
from benchmarks.shapes import Shape

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(short_runs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON file of a small run of `--scaling`."""
    folder = tmp_path_factory.mktemp("scaling")
    arguments = "--device cpu --scaling --shapes 16x200x8 --rounds 1 --no-memory"
    assert main([*arguments.split(), "--out", str(folder)]) == 0
    (path,) = folder.glob("*-scaling.json")
    return path


def test_a_series_is_geometric_and_changes_one_size() -> None:
    series = scaling.series(Shape("gemma2-2b", 64, 1000, 16, scales=True))
    assert [shape.rows for shape in series["rows"]] == [16, 32, 64, 128, 256]
    assert [shape.classes for shape in series["classes"]] == [250, 500, 1000, 2000, 4000]
    assert {(shape.classes, shape.features) for shape in series["rows"]} == {(1000, 16)}
    assert series["rows"][2] == series["classes"][2] == Shape("64x1000x16", 64, 1000, 16)


def test_the_command_measures_each_size_once_and_writes_the_plot(written: Path) -> None:
    run = json.loads(written.read_text())
    names = [case["shape"]["name"] for case in run["cases"]]
    assert len(names) == len(set(names)) == 9
    assert run["scaling"] == {
        "rows": ["4x200x8", "8x200x8", "16x200x8", "32x200x8", "64x200x8"],
        "classes": ["16x50x8", "16x100x8", "16x200x8", "16x400x8", "16x800x8"],
    }
    for case in run["cases"]:
        ran = {candidate["name"] for candidate in case["candidates"]} | {absence["name"] for absence in case["unavailable"]}
        assert ran == set(scaling.WHO)
        assert case["data"] == "peaked"
    assert written.with_suffix(".png").stat().st_size > 0


def test_the_plot_has_memory_where_it_was_measured(tmp_path: Path) -> None:
    case = measure_case(
        Shape("one", 16, 200, 8), torch.float32, "flat", CPU, rounds=1, check=False, tell=lambda _: None,
        passes=[scaling.PASS], only=scaling.WHO,
    )  # fmt: skip
    for figures in case.figures.values():
        figures.extra_bytes = MIB
    scaling.plot({axis: [case] for axis in scaling.AXES}, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments", ["--shapes cpu small", "--shapes topk", "--shapes bce", "--data flat peaked", "--data trained", "--passes forward"]
)
def test_scaling_is_about_one_loss(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--device", "cpu", "--scaling", *arguments.split()])
    assert "--scaling: " in capsys.readouterr().err


def compared(a: Any, b: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `compare` prints of two runs."""
    for name, run in (("a", a), ("b", b)):
        (folder / f"{name}.json").write_text(json.dumps(run))
    capsys.readouterr()
    assert main(["compare", str(folder / "a.json"), str(folder / "b.json")]) == 0
    return capsys.readouterr().out


def test_a_file_compared_with_itself_is_level(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = json.loads(written.read_text())
    printed = compared(run, run, tmp_path, capsys)
    assert "the same machine, versions and settings" in printed
    assert "Only in" not in printed and "not in" not in printed
    rows = [line.split() for line in printed.splitlines() if line.strip().startswith("dense")]
    assert len(rows) == 9
    assert {row[4] for row in rows} == {"1.00"}


def test_comparing_names_what_differs_and_what_is_missing(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (json.loads(written.read_text()) for _ in range(2))
    b["versions"]["torch"] = "9.9"
    b["machine"]["gpu"] = {"name": "a new GPU"}
    b["cases"] = b["cases"][1:]
    case = b["cases"][0]
    (dense,) = (candidate for candidate in case["candidates"] if candidate["name"] == "dense")
    dense["passes"]["forward+backward"]["ratio_to"]["bare GEMM"] *= 3
    dense["passes"]["forward+backward"]["extra_bytes"] = 5 * MIB
    case["candidates"] = [candidate for candidate in case["candidates"] if candidate["name"] != "bigclass"]
    case["unavailable"].append({"name": "bigclass", "pass": "forward+backward", "reason": "on holiday", "failed": False})
    printed = compared(a, b, tmp_path, capsys)
    assert "versions.torch" in printed and "9.9" in printed
    assert "machine.gpu.name" in printed and "a new GPU" in printed
    assert "Only in A" in printed and "4x200x8 (4 x 200 x 8), cross-entropy, float32, peaked" in printed
    row = next(line.split() for line in printed.splitlines() if line.strip().startswith("dense"))
    assert row[4] == "3.00" and row[6] == "5.0"
    assert "not in B: on holiday" in printed


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_another_file_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "other.json"), str(tmp_path / "other.json")])
    assert "not a result file" in capsys.readouterr().err

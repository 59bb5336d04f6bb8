"""The states of a model that was really trained: held out, cached, and a kind of data of the benchmark."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tokenizers", reason="pip install 'bigclass[demo]'")
pytest.importorskip("rich", reason="pip install 'bigclass[bench]'")
pytest.importorskip("matplotlib", reason="pip install 'bigclass[bench]'")

from benchmarks import trained
from benchmarks.__main__ import main
from benchmarks.data import make_problem, own_shape
from benchmarks.shapes import Shape
from bigclass.demo import DemoSettings

SMALL = DemoSettings(vocab=300, corpus_bytes=300_000, steps=20, batch=2, context=16, width=16, layers=1, heads=2, learning_rate=1e-2)
ROWS = trained.HELD_OUT * 15
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture(scope="module", autouse=True)
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(trained, "default_settings", lambda: SMALL)
        yield


def test_states_are_those_of_a_model_that_learns() -> None:
    found = [trained.states(point) for point in trained.points()]
    assert [at.step for at in found] == [0, 1, 8, 20]
    for at in found:
        assert (len(at.hidden), len(at.weight), at.weight.shape[1]) == trained.sizes() == (ROWS, 300, 16)
        assert at.target.shape == (ROWS,)
        assert float(F.cross_entropy(at.hidden @ at.weight.T, at.target)) == pytest.approx(at.loss, rel=1e-4)
    assert found[-1].loss < found[0].loss - 0.3
    assert not any(at.hidden.requires_grad or at.weight.requires_grad for at in found)
    assert not torch.equal(found[0].weight, found[-1].weight)


def test_training_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trained.states("end")
    assert trained.is_cached()
    monkeypatch.setattr(trained, "_train", lambda *_: pytest.fail("trained again"))
    assert torch.equal(trained.states("end").hidden, one.hidden)
    assert not trained.is_cached(DemoSettings(seed=1))


def test_an_unknown_point_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected one of start, early, middle, end; got 'late'"):
        trained.states("late")


def test_the_shape_of_trained_data_is_the_models_own_with_the_rows_asked_for() -> None:
    asked = Shape("asked", 100, 5000, 64)
    problem = make_problem(asked, "trained", torch.bfloat16, CPU)
    assert problem.shape == own_shape(problem.shape, "trained") == Shape("trained", 100, 300, 16)
    assert problem.input.shape == (100, 16) and problem.input.dtype == torch.bfloat16
    assert own_shape(Shape("large", 10**6, 7, 7), "trained").rows == ROWS
    assert own_shape(asked, "flat") == asked


def test_the_command_runs_the_trained_model_once_and_says_whose_the_shape_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--device cpu --shapes 64x100x16 64x200x32 --data trained --dtype fp32 --rounds 1 --no-memory --passes forward"
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 0
    assert "the trained model's own" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert case["shape"] | {"rows": 64, "classes": 300, "features": 16, "name": "trained"} == case["shape"]
    assert case["data"] == "trained" and "trained model" in case["shape_note"]
    assert {which for candidate in case["candidates"] for which in candidate["passes"]} == {"forward"}

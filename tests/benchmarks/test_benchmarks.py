"""The benchmark's promises, but for speed: everyone computes the same, nobody is missing without a reason, the files have their form."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import bigclass

pytest.importorskip("rich", reason="pip install 'bigclass[bench]'")
pytest.importorskip("matplotlib", reason="pip install 'bigclass[bench]'")

from benchmarks import measure, memory, peers, report
from benchmarks.__main__ import main, parse_arguments
from benchmarks.candidate import LOSS_PASSES, Unavailable, need_no_bias
from benchmarks.candidates import candidates_for
from benchmarks.data import DRAWN_KINDS, kinds_for, make_problem
from benchmarks.floors import FLOOR
from benchmarks.machine import MIB
from benchmarks.measure import Case, add_memory, measure_case
from benchmarks.ours import FILTERED, OURS
from benchmarks.peers import DENSE
from benchmarks.reference import TOLERANCE, errors, reference
from benchmarks.shapes import SHAPES, Shape, parse_shape
from benchmarks.timing import Staged

pytestmark = pytest.mark.usefixtures("short_runs")

CPU = torch.device("cpu")
LOSS = Shape("loss", 96, 301, 32)
CAPPED = Shape("capped", 96, 301, 32, softcap=30.0)
PREDICTION = Shape("prediction", 40, 5000, 16, k=5)
BCE = Shape("bce", 24, 3001, 32, loss="bce")
ASYMMETRIC = Shape("asymmetric", 24, 3001, 32, loss="asymmetric")
CLIP = Shape("clip", 301, 301, 32, loss="clip")
SIGLIP = Shape("siglip", 301, 301, 32, loss="siglip")


def measured(shape: Shape, kind: str) -> Case:
    return measure_case(shape, torch.float32, kind, CPU, rounds=1, check=True, tell=lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [(shape, kind) for shape in (LOSS, CAPPED, PREDICTION, BCE, ASYMMETRIC, CLIP, SIGLIP) for kind in kinds_for(shape)],
    ids=lambda value: str(value),
)
def test_every_candidate_computes_the_same_loss_and_gradients(shape: Shape, kind: str, dtype: torch.dtype) -> None:
    problem = make_problem(shape, kind, dtype, CPU)
    exact = reference(problem)
    compared = set()
    for candidate in candidates_for(shape, dtype):
        # On memorised data the plain forms cancel, of rare labels 16 bits lose the mean: being right there is bigclass' own promise.
        if (kind == "onehot" or (kind == "rare" and dtype == torch.bfloat16)) and candidate.role != "bigclass":
            continue
        for which in candidate.passes:
            for setting in candidate.settings_for(shape):
                try:
                    outputs = candidate.prepare(problem, which, setting)()
                except Unavailable:
                    continue
                for name, error in errors(outputs, exact).items():
                    assert error <= (TOLERANCE[dtype] if candidate.exact else 0.1), (candidate.name, which, name)
                    compared.add((candidate.role, which, name))
    passes = ("forward",) if shape.k else LOSS_PASSES
    assert {which for role, which, _ in compared if role == "bigclass"} == set(passes)


@pytest.mark.parametrize("shape", [LOSS, PREDICTION, BCE, ASYMMETRIC, CLIP, SIGLIP], ids=str)
def test_a_reference_is_float64_and_not_trivial(shape: Shape) -> None:
    exact = reference(make_problem(shape, kinds_for(shape)[0], torch.float32, CPU))
    for truth in exact.values():
        assert truth.dtype == torch.float64
        assert truth.abs().max() > 0


def test_who_does_not_run_is_listed_with_the_reason() -> None:
    case = measured(CAPPED, "flat")
    reasons = {absence.candidate.name: absence.reason for absence in case.absences}
    assert reasons.keys() >= {"liger", "quack", "cce", "cce, unfiltered"}
    assert "CUDA" in reasons["liger"]
    assert "soft cap" in reasons["torch chunked"] or "torch 2.13" in reasons["torch chunked"]
    for candidate in case.candidates:
        for which in candidate.passes:
            listed = any(absence.candidate is candidate and absence.which == which for absence in case.absences)
            assert listed != ((candidate.name, which) in case.figures), (candidate.name, which)


def test_a_candidate_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken on purpose\nsecond line")

    monkeypatch.setattr(bigclass, "linear_cross_entropy", broken)
    case = measured(LOSS, "flat")
    failed = [absence for absence in case.absences if absence.failed]
    assert {absence.candidate.role for absence in failed} == {"bigclass"}
    assert {absence.reason for absence in failed} == {"RuntimeError: broken on purpose"}
    assert (DENSE, "forward+backward") in case.figures


def test_a_wrong_candidate_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bigclass.linear_cross_entropy
    monkeypatch.setattr(bigclass, "linear_cross_entropy", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    case = measured(LOSS, "flat")
    assert {candidate.name for candidate in case.candidates if case.is_wrong(candidate.name)} == {
        candidate.name
        for candidate in case.candidates
        if candidate.role == "bigclass" and "fused" not in candidate.name  # needs a GPU
    }


def test_the_command_writes_every_round_of_every_candidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--device cpu --shapes 32x100x16 32x2000x16x3 --dtype bf16 --data peaked --rounds 2 --no-memory"
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "32x100x16" in printed
    assert "needs a CUDA device" in printed
    (path,) = tmp_path.glob("*.json")
    run = json.loads(path.read_text())
    assert run["schema"] == report.SCHEMA
    assert run["command"].startswith("python -m benchmarks --device cpu")
    assert run["machine"].keys() >= {"name", "cpu", "cores", "threads", "cpu_capability", "bf16_units"}
    assert run["versions"].keys() >= {"python", "torch", "triton"}
    assert [(case["shape"]["name"], case["data"]) for case in run["cases"]] == [
        ("32x100x16", "peaked"),
        ("32x2000x16x3", "random"),
        ("32x2000x16x3", "ascending"),
    ]
    for case in run["cases"]:
        for candidate in case["candidates"]:
            for which, figures in candidate["passes"].items():
                assert which in LOSS_PASSES
                assert len(figures["seconds"]) == 2
                assert min(figures["seconds"]) > 0
                assert figures["ratio_to"][FLOOR] > 0
        assert all(absence["reason"] for absence in case["unavailable"])
    assert "engine" in run["cases"][0]["explain"]


def test_only_who_is_asked_for_runs_beside_the_floor(tmp_path: Path) -> None:
    arguments = "--device cpu --shapes 16x90x8 --dtype fp32 --rounds 1 --no-memory --passes backward forward --only dense bigclass"
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert {candidate["name"]: list(candidate["passes"]) for candidate in case["candidates"]} == {
        name: ["forward", "backward"] for name in (FLOOR, DENSE, OURS)
    }
    assert case["unavailable"] == []


def test_one_vs_all_losses_are_measured_beside_dense_and_the_floor(tmp_path: Path) -> None:
    arguments = "--device cpu --shapes 16x900x8:bce 16x900x8:asymmetric --dtype fp32 --rounds 1 --no-memory"
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    cases = json.loads(path.read_text())["cases"]
    assert [(case["shape"]["loss"], case["data"]) for case in cases] == [
        (loss, data) for loss in ("bce", "asymmetric") for data in ("fresh", "rare")
    ]
    for case in cases:
        ran = {candidate["name"]: candidate for candidate in case["candidates"]}
        assert ran.keys() >= {FLOOR, DENSE, "bigclass", "bigclass tiled"}
        assert ("timm" in ran) != ("timm" in {absence["name"] for absence in case["unavailable"]})
        assert not any(candidate["wrong"] for candidate in ran.values())
        assert ran["bigclass"]["passes"]["forward+backward"]["ratio_to"].keys() == {FLOOR, DENSE}


def test_labels_are_different_classes_and_logits_of_rare_ones_are_low() -> None:
    for shape in (BCE, Shape("few", 8, 3, 8, loss="bce")):
        problems = {kind: make_problem(shape, kind, torch.float32, CPU) for kind in kinds_for(shape)}
        labels = problems["fresh"].target
        assert labels.shape == (shape.rows, min(5, shape.classes))
        assert all(len(set(row.tolist())) == labels.shape[1] for row in labels)
    rare = make_problem(BCE, "rare", torch.float32, CPU)
    share = torch.sigmoid(rare.input @ rare.linear_weight.T).log().mean().exp()
    assert float(share) == pytest.approx(5 / 3001, rel=0.3)


def test_the_usual_run_leaves_one_vs_all_losses_out() -> None:
    assert not any(shape.one_vs_all or shape.contrastive or shape.name == "filter" for shape in parse_arguments(["--device", "cpu"]).shapes)
    assert parse_arguments(["--shapes", "bce"]).shapes == [SHAPES["bce"]]


def test_the_plot_shows_what_was_weighed(tmp_path: Path) -> None:
    case = measured(LOSS, "flat")
    path = tmp_path / "plots" / "plot.png"
    assert not report.plot_cases([case], "title", path)
    for figures in case.figures.values():
        figures.extra_bytes = 3 * MIB
    assert report.plot_cases([case], "title", path)
    assert path.stat().st_size > 0


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    shape = Shape("weighed", 512, 16384, 16)  # 32 MiB of logits
    (extra,) = memory.measure_memory(DENSE, {"forward": None}, shape, "flat", torch.float32, CPU).values()
    assert extra is not None
    assert extra / MIB == pytest.approx(64, abs=8)  # the logits and their log-softmax
    with pytest.raises(ValueError, match="expected 1"):
        memory.measure_memory("nobody", {"forward": None}, shape, "flat", torch.float32, CPU)


@pytest.mark.parametrize("kind", DRAWN_KINDS)
def test_data_is_the_same_every_time(kind: str) -> None:
    one, other = (make_problem(LOSS, kind, torch.float32, CPU) for _ in range(2))
    assert torch.equal(one.input, other.input)
    assert torch.equal(one.linear_weight, other.linear_weight)
    assert torch.equal(one.target, other.target)


def test_data_is_what_its_name_says() -> None:
    shape = Shape("loss", 256, 4000, 256)
    loss = {kind: float(reference(make_problem(shape, kind, torch.float32, CPU))["loss"]) for kind in DRAWN_KINDS}
    assert loss["onehot"] < 1e-5
    assert 0.5 < loss["peaked"] < 3
    assert 6 < loss["early"] < loss["flat"] < 10
    assert loss["popular"] < 2


def test_popular_data_are_what_the_filter_is_specified_on() -> None:
    problem = make_problem(Shape("popular", 2000, 500, 64), "popular", torch.float32, CPU)
    x, w, y, bias = problem.input, problem.linear_weight, problem.target, problem.bias
    assert bias is not None and not bias.requires_grad
    torch.testing.assert_close(torch.linalg.vector_norm(w, dim=1), torch.ones(500))
    torch.testing.assert_close(bias.sort(descending=True).values, -torch.arange(1, 501).log())
    assert not torch.equal(bias, bias.sort(descending=True).values)  # the order of classes is random
    drawn = torch.bincount(y, minlength=500) / len(y)
    assert float(drawn[bias.argmax()]) == pytest.approx(math.log(2) / math.log(501), rel=0.2)
    margin = (x * w[y]).sum(1)  # a, with noise of deviation 1
    assert float(margin.mean()) == pytest.approx(10, abs=0.3)
    noise = (x - margin[:, None] * w[y]) @ w.T
    assert float(noise.std()) == pytest.approx(1, abs=0.05)


def test_who_takes_no_bias_says_so() -> None:
    problem = make_problem(LOSS, "popular", torch.float32, CPU)
    with pytest.raises(Unavailable, match="takes no bias"):
        need_no_bias(problem)
    with pytest.raises(Unavailable, match="takes no bias"):
        peers._bias(problem, lambda x, w, y: None)
    assert peers._bias(problem, lambda x, w, y, bias=None: None) == {"bias": problem.bias}
    need_no_bias(make_problem(LOSS, "flat", torch.float32, CPU))


def test_filtered_gradients_are_not_held_against_rounding_but_the_loss_is_and_none_may_be_nan() -> None:
    case = measured(LOSS, "flat")
    figures = case.figures[FILTERED, "forward+backward"]
    assert (FILTERED, "forward") not in case.figures
    figures.errors["input"] = 0.05
    assert not case.is_wrong(FILTERED)
    case.figures[OURS, "forward+backward"].errors["input"] = 0.05
    assert case.is_wrong(OURS)
    figures.errors["loss"] = 0.05
    assert case.is_wrong(FILTERED)
    figures.errors |= {"loss": 0.0, "input": math.nan}
    assert case.is_wrong(FILTERED)
    assert math.isnan(case.worst_error(FILTERED) or 0.0)


def test_the_backward_alone_comes_after_a_forward_that_is_not_its_own() -> None:
    problem = make_problem(LOSS, "flat", torch.float32, CPU)
    (dense,) = candidates_for(LOSS, torch.float32, only=[DENSE])
    call = dense.prepare(problem, "backward", None)
    assert isinstance(call, Staged)
    value = call.first()
    assert value.requires_grad and value.ndim == 0
    assert len(call.second(value)) == 3


def test_without_a_compiler_the_compiled_loss_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    peers.compiler_reason.cache_clear()
    case = measured(LOSS, "flat")
    reasons = {absence.reason for absence in case.absences if absence.candidate.name == "dense, compiled"}
    assert reasons == {"torch.compile: No working C++ compiler found"}
    assert not any(absence.failed for absence in case.absences)
    peers.compiler_reason.cache_clear()


def test_memory_of_other_data_is_taken_over_unless_data_choose_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[str] = []

    def weigh(name: str, settings: dict[str, None], *_: object) -> dict[str, int]:
        weighed.append(name)
        return {which: len(weighed) * MIB for which in settings}

    monkeypatch.setattr(measure, "measure_memory", weigh)
    first, second = measured(LOSS, "flat"), measured(LOSS, "peaked")
    add_memory(first, CPU, lambda _: None)
    assert OURS in weighed and FILTERED in weighed and FLOOR not in weighed
    assert first.figures[OURS, "backward"].extra_bytes is None
    weighed.clear()
    add_memory(second, CPU, lambda _: None, known=first)
    assert set(weighed) == {"bigclass, filter 2^-8", "bigclass, filter 2^-6"}
    assert second.figures[OURS, "forward"].extra_bytes == first.figures[OURS, "forward"].extra_bytes


def test_scaling_keeps_the_name_and_leaves_fixed_shapes_alone() -> None:
    scaled = SHAPES["gemma2-2b"].scaled(1 / 8)
    assert (scaled.name, scaled.rows, scaled.classes, scaled.features) == ("gemma2-2b", 1024, 32000, 288)
    assert SHAPES["cpu"].scaled(1 / 8) == SHAPES["cpu"]
    assert str(SHAPES["filter"].scaled(1 / 8)) == "filter (4096 x 128000 x 512)"


@pytest.mark.parametrize("text", ["gemma", "8x8", "8x8x8:mse", "8x8x8x8:bce", "8x8x8x8x8", "0x8x8", "axbxc"])
def test_an_unknown_shape_is_an_error_that_says_what_was_expected(text: str) -> None:
    with pytest.raises(ValueError, match=f"NxCxD\\[:LOSS\\] or NxCxDxK; got '{text}'"):
        parse_shape(text)


@pytest.mark.parametrize(
    "arguments", ["--scale 0", "--scale 2", "--rounds 0", "--shapes nope", "--threads x", "--data some", "--only nobody"]
)
def test_bad_arguments_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments.split())
    assert arguments.split()[0] in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["--quick"]) == 2
    assert "bigclass[bench]" in capsys.readouterr().err

"""The study's promises: its analysis computes what it says, and every part runs and leaves its files."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="pip install 'bigclass[bench]'")
pytest.importorskip("matplotlib", reason="pip install 'bigclass[bench]'")

from benchmarks import filter_analysis as fa
from benchmarks import filter_parts, filter_study, filter_training
from benchmarks.filter_data import SYNTHETIC, Case, Sizes, make_case
from benchmarks.filter_training import EXACT, Run, Training

TINY = Sizes(rows=160, classes=601, features=24)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def case(kind: str = "popular") -> tuple[Case, fa.Gradient]:
    made = make_case(kind, TINY)
    return made, fa.logit_gradient(made.x, made.w, made.b, made.y)


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_gradients_are_those_of_autograd_in_float64(kind: str) -> None:
    made = make_case(kind, TINY)
    x, w = made.x.double().requires_grad_(), made.w.double().requires_grad_()
    b = None if made.b is None else made.b.double()
    loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w, b), made.y, reduction="sum")
    g = fa.logit_gradient(x.detach(), w.detach(), b, made.y)
    assert float(g.loss.sum()) == pytest.approx(float(loss.detach()), rel=1e-9)
    for own, exact in zip(fa.gradients(g, x.detach(), w.detach()), torch.autograd.grad(loss, (x, w)), strict=True):
        assert fa.relative(own - exact, exact) < 1e-6  # on "onehot" autograd itself subtracts nearly equal numbers


def test_kept_columns_are_the_fewest_that_keep_the_promise() -> None:
    norms, tolerance = torch.rand(3, 9).pow(4), 0.4
    keep = fa.kept_columns(norms, tolerance)
    for n, kept in zip(norms.double(), keep, strict=True):
        possible = [d for d in itertools.product((False, True), repeat=9) if n[torch.tensor(d)].sum() <= tolerance**2 * n.sum()]
        assert int((~kept).sum()) == max(map(sum, possible))
        assert n[~kept].sum() <= tolerance**2 * n.sum()


def test_kept_shares_of_many_tolerances_are_those_of_kept_columns() -> None:
    made, g = case()
    norms, forced = fa.column_norms(g.rest, 32), fa.target_columns(made.y, 32, TINY.classes)
    tolerances = (2.0**-8, 2.0**-4, 0.5)
    for tolerance, shares in zip(tolerances, fa.kept_shares(norms, tolerances, forced), strict=True):
        keep = fa.kept_columns(norms, tolerance, forced)
        torch.testing.assert_close(shares, keep.double().mean(1))
        assert keep[forced].all()
        worst, pooled = fa.block_errors(norms, keep)
        assert pooled <= worst <= tolerance


def test_longer_blocks_are_joined_from_shorter_ones() -> None:
    made, g = case()
    torch.testing.assert_close(fa.join_blocks(fa.column_norms(g.rest, 32), 2), fa.column_norms(g.rest, 64))
    forced = fa.target_columns(made.y, 32, TINY.classes)
    assert torch.equal(fa.join_blocks(forced, 2), fa.target_columns(made.y, 64, TINY.classes))


def test_orders_are_permutations_and_random_order_of_all_rows_changes_no_total() -> None:
    made, g = case()
    for order in fa.row_orders(g, made.x, 32).values():
        if order is not None:
            assert torch.equal(order.sort().values, torch.arange(TINY.rows))
            torch.testing.assert_close(fa.column_norms(g.rest, 32, order).sum(0), fa.column_norms(g.rest, 32).sum(0))
    for order in fa.class_orders(made.x, made.w, made.b, made.popularity).values():
        if order is not None:
            assert torch.equal(order.sort().values, torch.arange(TINY.classes))


def test_predicted_is_the_class_of_the_largest_logit() -> None:
    made, g = case()
    assert torch.equal(g.predicted(), (made.x @ made.w.t() + (0.0 if made.b is None else made.b)).argmax(1))


def test_tiles_come_back_as_columns() -> None:
    order = torch.randperm(10)
    columns = torch.rand(2, 10) < 0.3
    back = filter_parts.spread_tiles(fa.tiles(columns, 4, order), 4, order, 10)
    assert bool((back | ~columns).all())  # a tile with a kept column is kept whole
    assert torch.equal(filter_parts.spread_tiles(fa.tiles(columns, 1, order), 1, order, 10), columns)


def test_peaks_know_the_entries_at_the_targets() -> None:
    _, g = case()
    whole = g.rest.scatter(1, g.target.unsqueeze(1), g.at_target.unsqueeze(1)).abs()
    assert torch.equal(fa.column_peaks(g, 64), torch.stack([part.amax(0) for part in whole.split(64)]))


def test_the_stand_in_is_exact_where_all_rows_of_a_block_are_alike() -> None:
    x, w = torch.randn(64, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    blocks = torch.rand(2, 50, dtype=torch.float64).repeat_interleave(32, 0)
    dropped = blocks * torch.rand(64, 1, dtype=torch.float64)  # alike but for a factor
    made = fa.mean_correction(dropped, x, w, 32)
    torch.testing.assert_close(made.dx, dropped @ w)
    torch.testing.assert_close(made.dw, dropped.t() @ x)
    assert made.residual < 1e-12


def test_the_residual_of_the_stand_in_is_what_it_leaves_and_is_held_to_the_tolerance() -> None:
    made, g = case()
    forced = fa.target_columns(made.y, 32, TINY.classes)
    norms = fa.column_norms(g.rest, 32)
    keep = fa.kept_beside_correction(g.rest, 0.1, 32, forced)
    dropped = fa.dropped_part(g.rest, keep, 32).double()
    left = 0.0
    for part, total in zip(dropped.split(32), norms.sum(1), strict=True):
        misfit = part - part.sum(1, keepdim=True) * part.sum(0) / part.sum()
        assert float(misfit.norm()) <= 0.11 * float(total.sqrt())  # the last fit is not the one that columns were chosen by
        left += float(misfit.norm() ** 2)
    assert fa.mean_correction(dropped, made.x.double(), made.w.double(), 32).residual == pytest.approx(left, rel=1e-6)
    assert keep.double().mean() < fa.kept_columns(norms, 0.1, forced).double().mean()


def test_drawn_columns_are_unbiased_as_many_as_asked_for_and_as_far_off_as_said() -> None:
    norms = torch.rand(2, 40).pow(6)
    forced = torch.zeros(2, 40, dtype=torch.bool)
    forced[0, :3] = True
    expected = torch.tensor([12.0, 5.0], dtype=torch.float64)
    q = fa.keep_probabilities(norms, expected, forced)
    torch.testing.assert_close(q.sum(1), expected)
    assert bool((q[forced] == 1.0).all())
    generator, draws = torch.Generator().manual_seed(0), 4000
    factors = torch.stack([fa.draw(q, generator) for _ in range(draws)])
    deviation = (1.0 / q - 1.0).sqrt() / math.sqrt(draws)
    assert bool(((factors.mean(0) - 1.0).abs() <= 5.0 * deviation + 1e-12).all())
    measured = ((factors - 1.0).square() * norms.double()).sum((1, 2)).mean() / norms.double().sum()
    assert fa.draw_error(norms, q) == pytest.approx(float(measured.sqrt()), rel=0.1)


def test_drawing_in_proportion_to_the_norm_beats_drawing_evenly() -> None:
    norms = torch.rand(1, 60).pow(6)
    q = fa.keep_probabilities(norms, torch.tensor([15.0], dtype=torch.float64))
    assert fa.draw_error(norms, q) < fa.draw_error(norms, torch.full_like(q, 0.25))


def test_the_gradient_read_off_the_engine_is_its_own_and_keeps_the_promise() -> None:
    made = make_case("popular", Sizes(rows=512, classes=20_011, features=48))
    g = fa.logit_gradient(made.x, made.w, made.b, made.y)
    assert fa.relative(filter_parts.engine_gradient(made, None) - g.rest, g.rest) < 1e-5
    assert 2.0**-8 < fa.relative(filter_parts.engine_gradient(made, 2.0**-4) - g.rest, g.rest) <= 2.0**-4


def test_a_comparison_is_with_the_exact_run_of_the_same_seed() -> None:
    def run(arm: str, seed: int, end: float) -> Run:
        return Run("scratch", arm, seed, [9.0, end], [0], [0.5], [1.0], end)

    runs = [run(EXACT, 0, 4.0), run(EXACT, 1, 5.0), run("2^-8", 0, 4.1), run("2^-8", 1, 4.9)]
    exact, filtered = filter_training.compare(runs)
    assert exact["held_out_max_distance"] == 0.0
    assert filtered["held_out_max_distance"] == pytest.approx(0.1)
    assert filtered["held_out_mean_difference"] == pytest.approx(0.0, abs=1e-9)
    assert filtered["held_out_deviation_over_seeds"] == pytest.approx(math.sqrt(0.5))


def test_tolerances_are_named_as_powers_of_two() -> None:
    assert [filter_training.tolerance_name(t) for t in (2.0**-10, 2.0**-4, 0.3)] == ["2^-10", "2^-4", "0.3"]


def test_every_part_runs_and_leaves_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers", reason="pip install 'bigclass[demo]'")
    small = Training(vocab=300, width=16, layers=1, heads=2, context=16, batch=2, steps=2, checkpoint_steps=2, seeds=2, watch=1, held_out=8)
    monkeypatch.setattr(filter_study, "QUICK_SIZES", TINY)
    monkeypatch.setattr(filter_study, "QUICK_TRAINING", replace(small, corpus_bytes=100_000))
    assert filter_study.main(["--quick", "--data", "popular", "--out", str(tmp_path)]) == 0
    for part in filter_study.PARTS:
        found = json.loads((tmp_path / f"filter-study-quick-{part}.json").read_text())
        assert found["rows"] and found["machine"]["name"] and found["versions"]["torch"] and "filter_study" in found["command"]
        assert (tmp_path / f"filter-study-quick-{part}.png").stat().st_size > 10_000
    assert filter_study.main(["--quick", "--redraw", "--only", "threshold", "--out", str(tmp_path)]) == 0

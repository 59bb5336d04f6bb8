"""Gradients from logits that the forward saved in 16 bits (fused/saved.py), in Triton's interpreter: as exact as any others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import bigclass
from bigclass.core import Dot, LogSumExp, ShiftedMoment, Softcap, Stream, Total, custom_ops, log_sum_exp, problem, reduce_logits
from bigclass.core import plan as plan_module
from bigclass.core.engines import tiles
from bigclass.core.engines.support import can_save, saves
from bigclass.core.folds import register_fold
from bigclass.core.recipe import pack
from bigclass.core.triton_form import triton_form
from tests.losses.test_contract import check_pooled, exact, ours, with_gradients
from tests.support import KINDS, draw, error

saved = pytest.importorskip("bigclass.core.engines.fused.saved", reason="Triton is not installed")

ROAD = ("fused", "saved")
BF16 = torch.bfloat16


@pytest.fixture
def used(monkeypatch):
    """How many classes' logits were saved, or read, by each part that was."""
    seen, of = [], saved.Saved.of

    def noted(cls, tensors, classes, width):
        seen.append(classes)
        return of(tensors, classes, width)

    monkeypatch.setattr(saved.Saved, "of", classmethod(noted))
    return seen


def part_of_the_classes(monkeypatch, step: int, block: int) -> None:
    """Plans that save so many sixteenths of the classes, and multiply `block` of them at once; the others are made again, 64 at a time."""
    make = problem.make_plan

    def some(work, engine, options):
        plan = make(work, engine, options)
        return replace(plan, saved_block=block, class_block=64) if plan.saved else plan

    monkeypatch.setattr(problem, "make_plan", some)
    monkeypatch.setattr(plan_module, "SAVED_CLASSES", 64)
    monkeypatch.setattr("bigclass.core.op.saved_steps", lambda *_: step)


@pytest.mark.parametrize("gradients", ["saved", "forward"])
@settings(max_examples=5, phases=[Phase.generate])
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(33, 70),
    c=st.integers(65, 300),
    d=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    bias=st.booleans(),
)
def test_a_single_draw_is_as_exact_as_tiles_made_again(gradients, kind, n, c, d, seed, bias):
    """To a twentieth of the rounding of G, which both share: codes are eight times as fine."""
    x, w, b, y = draw(kind, n, c, 8 * d, BF16, seed)
    truth = exact(x, w, b if bias else b * 0, y)
    leaves = (x, w, b) if bias else (x, w)
    results = [with_gradients(ours(x, w, b if bias else None, y, ("fused", of)), leaves) for of in (gradients, "recompute")]
    for name, z, other, exactly in zip(("loss", "dx", "dw", "db"), *results, truth, strict=False):
        assert error(z, exactly) <= 1.05 * error(other, exactly) + 4 * 2.0**-24, name


@pytest.mark.parametrize(("kind", "gradients"), [*((kind, "saved") for kind in KINDS), ("peaked", "forward")])
def test_pooled_over_draws_no_output_and_no_gradient_is_less_exact_than_dense(gradients, kind, used):
    check_pooled(("fused", gradients), BF16, kind, 64, 300, 48, draws=8)
    assert used and set(used) == {300}


@pytest.mark.parametrize("gradients", ["saved", "forward"])
@pytest.mark.parametrize(
    "options",
    [{"softcap": 9.0}, {"label_smoothing": 0.1}, {"label_smoothing": 0.2, "weighted": True}, {"z_loss": 1e-2}, {"logit_scale": 2.5}],
    ids=str,
)
def test_options_give_what_tiles_made_again_give(options, gradients, used):
    x, w, b, y = draw("peaked", 40, 200, 40, BF16, 1)
    y[3] = -100
    options = {name: value for name, value in options.items() if name != "weighted"} | (
        {"weight": torch.rand(200) + 0.5} if "weighted" in options else {}
    )
    got = with_gradients(ours(x, w, b, y, ("fused", gradients), **options), (x, w, b))
    assert used
    again = with_gradients(ours(x, w, b, y, ("fused", "recompute"), **options), (x, w, b))
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truths = with_gradients(ours(*wide, y, ("dense", "auto"), **options), wide)
    for name, z, other, truth in zip(("loss", "dx", "dw", "db"), got, again, truths, strict=True):
        assert error(z, truth) <= 1.05 * error(other, truth) + 4 * 2.0**-24, name
        assert error(z, other) < 1e-3, name


@pytest.mark.parametrize(("step", "count", "block"), [(14, 256, 128), (4, 64, 64), (16, 300, 128), (11, 192, 192)])
def test_some_classes_are_saved_and_the_others_made_again(step, count, block, monkeypatch, used):
    x, w, b, y = draw("peaked", 70, 300, 24, BF16, 2)
    want = with_gradients(ours(x, w, b, y, ("fused", "recompute"), label_smoothing=0.1), (x, w, b))
    part_of_the_classes(monkeypatch, step, block)
    got = with_gradients(ours(x, w, b, y, ROAD, label_smoothing=0.1), (x, w, b))
    assert used == [count, count]
    assert error(got[0], want[0]) < 1e-6
    for z, t in zip(got[1:], want[1:], strict=True):
        assert error(z, t) < 1e-3


@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["features", "bias"])
def test_nan_and_infinities_come_out_as_from_tiles_made_again(where, value, options):
    x, w, b, y = (t.detach() for t in draw("flat", 20, 90, 8, BF16, 4))
    (x[5:6] if where == "features" else b[40:41]).fill_(value)
    results = []
    for gradients in ("saved", "recompute"):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        results.append(with_gradients(ours(*leaves, y, ("fused", gradients), reduction="sum", **options), leaves))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isfinite(), want.isfinite())
        there = want.isfinite()
        assert torch.allclose(got[there].float(), want[there].float(), rtol=2e-2, atol=2e-2)


def test_a_class_without_a_chance_gets_exactly_nothing():
    """A bias of -inf, and a logit far below all others of its tile and of the row."""
    x, w, b, y = draw("flat", 40, 300, 16, BF16, 5)
    y = y % 200
    with torch.no_grad():
        b[250], b[251] = -float("inf"), -80.0
    got = with_gradients(ours(x, w, b, y, ROAD), (x, w, b))
    assert not got[2][250].any() and not got[2][251].any() and float(got[3][250]) == 0.0
    assert got[2][252].any()


def test_a_second_backward_makes_logits_again(used):
    x, w, b, y = draw("peaked", 70, 300, 16, BF16, 6)
    loss = ours(x, w, b, y, ROAD)
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    seen = len(used)
    second = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    third = torch.autograd.grad(loss, (x, w, b))
    assert seen == 2 and len(used) == 2
    again = with_gradients(ours(x, w, b, y, ("fused", "recompute")), (x, w, b))[1:]
    for a, c, d, t in zip(first, second, third, again, strict=True):
        assert torch.equal(c, d) and torch.equal(c, t) and error(a, t) < 1e-3


def test_the_same_bits_each_time():
    x, w, b, y = draw("peaked", 70, 200, 24, BF16, 7)
    runs = [with_gradients(ours(x, w, b, y, ROAD), (x, w, b)) for _ in range(2)]
    assert all(torch.equal(a, c) for a, c in zip(*runs, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_run_the_forward_again_and_use_its_own(reentrant, used):
    x, w, b, y = draw("peaked", 70, 300, 16, BF16, 8)
    want = with_gradients(ours(x, w, b, y, ROAD), (x, w, b))
    used.clear()
    loss = checkpoint(lambda x, w, b: ours(x, w, b, y, ROAD), x, w, b, use_reentrant=reentrant)
    got = torch.autograd.grad(loss, (x, w, b)) if not reentrant else backward(loss, x, w, b)
    assert used
    for z, t in zip(got, want[1:], strict=True):
        assert torch.equal(z, t)


def backward(loss, *leaves):
    loss.backward()
    return [t.grad for t in leaves]


def test_one_graph_leaves_what_was_saved_as_it_is(used):
    """There another backward may follow, and no pass may write to a saved tensor: G has a buffer of its own."""
    x, w, b, y = draw("peaked", 40, 300, 16, BF16, 9)
    want = with_gradients(ours(x, w, b, y, ROAD, softcap=30.0), (x, w, b))

    def loss(x, w, b):
        return ours(x, w, b, y, ROAD, softcap=30.0)

    loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    used.clear()
    made = loss(x, w, b)
    got = [made, *torch.autograd.grad(made, (x, w, b))]
    assert used
    for z, t in zip(got, want, strict=True):
        assert error(z, t) < 1e-4


def test_the_op_passes_opcheck():
    torch.manual_seed(0)
    x, w, y = torch.randn(9, 8, dtype=BF16), torch.randn(128, 8, dtype=BF16), torch.randint(128, (9, 1))
    recipe, numbers, tensors = pack(Stream(((x, w),)), (LogSumExp(exclude_picks=True),))
    # without a backward, which uses up what was saved and which the check then compares
    torch.library.opcheck(custom_ops.fold_op, (tensors, y, None, recipe, numbers, f"fused,saved,{1 << 20},16", [True, True]))


@pytest.mark.parametrize("gradients", ["saved", "forward"])
def test_a_filter_acts_on_what_was_saved(gradients, used):
    torch.manual_seed(0)
    n, c = 100, 300
    common = 3.0 * torch.randn(c)  # classes differ by e^8 in the gradients they get
    x, w = torch.randn(n, 32), torch.randn(c, 32) * 32**-0.5
    x, w, b = (t.to(BF16).requires_grad_() for t in (x, w, common))
    y = torch.multinomial(torch.softmax(common, 0), n, replacement=True)
    truth = exact(x, w, b, y)
    with bigclass.planning(gradients=gradients, workspace=8 << 20):
        statistics = gradients == "saved"  # which a loss made in the forward has none of
        out = bigclass.linear_cross_entropy(x, w, y, linear_bias=b, grad_filter=2**-4, engine="fused", return_stats=statistics)
        loss, stats = out if statistics else (out, None)
        got = torch.autograd.grad(loss, (x, w, b))
        dropped = error(torch.autograd.grad(bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine="fused"), x)[0], got[0])
    assert used and dropped > 1e-3
    if stats is not None:
        assert 0.0 < float(stats.kept_share) < 0.9 and 0.0 < float(stats.promised_error) <= 2**-4
    assert error(got[0], truth[1]) < 2**-4 and error(got[1], truth[2]) < 2**-4 and error(got[2], truth[3]) < 4e-3


def test_autocast_casts_slabs_of_a_float32_weight(used):
    x, w, b, y = draw("peaked", 40, 300, 24, torch.float32, 5)
    with torch.autocast("cpu", dtype=BF16):
        got = with_gradients(ours(x, w, b, y, ROAD), (x, w, b))
    assert used
    half = [t.detach().bfloat16().requires_grad_() for t in (x, w)]
    for g, t in zip(got, exact(*half, b, y), strict=True):
        assert g.dtype == torch.float32 and error(g, t) < 6e-3


def test_products_that_round_dw_themselves_round_it_once(monkeypatch):
    """As on devices that multiply 16 bits into fp32, emulated: dw is never there in fp32."""
    monkeypatch.setattr(tiles, "WIDE_OUTPUT", ("cpu",))
    plain, wide = tiles._product, []

    def product(a, b, out, beta, alpha):
        if out.shape == (300, 24):
            wide.append(out.dtype)
        into = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        plain(a.float(), b.float(), into, beta, alpha)
        return out if into is out else out.copy_(into)

    monkeypatch.setattr(tiles, "_product", product)
    x, w, b, y = draw("peaked", 70, 300, 24, BF16, 6)
    for road in (ROAD, ("fused", "recompute")):
        got = with_gradients(ours(x, w, b, y, road), (x, w, b))
        for g, t in zip(got, exact(x, w, b, y), strict=True):
            assert error(g, t) < 4e-3
    assert wide and set(wide) == {BF16}


def test_what_cannot_be_told_from_codes_is_made_again():
    rest = LogSumExp(exclude_picks=True)
    cap = (Softcap.at(30.0),)
    weights = Total(tensors=(torch.rand(5),))
    for maps, folds, can in (
        ((), (rest,), True),
        ((), (LogSumExp(), Total(), weights), True),
        (cap, (rest,), True),
        (cap, (rest, Total()), False),  # the slope of a cap at a logit without a code
        ((Softcap.at(3.0),), (rest,), False),  # it saturates within what a code is off by
        ((*cap, *cap), (rest,), False),
        ((), (rest, ShiftedMoment()), False),
        ((), (rest, LogSumExp()), False),
        ((), (rest, Dot(tensors=(torch.rand(2, 5),))), False),
        ((), (LogSumExp(axis="columns"),), False),
        ((), (Total(),), False),
        ((), (Bent(),), False),  # inherits the form of other terms
    ):
        assert can_save(maps, folds) is can, (maps, folds)
    x, w, scale = torch.randn(2, 8), torch.randn(5, 8), torch.ones(())
    assert saves(Stream(((x, w),), maps=cap), (rest,)) and saves(Stream(((x, w),), scale_tensor=scale), (rest,))
    assert not saves(Stream(((x, w),), maps=cap, scale_tensor=scale), (rest,))


def test_recompute_means_that_nothing_is_saved(used):
    """Pitfall of a planner that is asked twice: wide features make saving pay."""
    x, w, b, y = draw("flat", 40, 300, 256, BF16, 13)
    for gradients, count in (("recompute", 0), ("saved", 2)):
        used.clear()
        for options in ({}, {"reduction": "none"}):
            ours(x, w, b, y, ("fused", gradients), **options).sum().backward()
        assert len(used) == 2 * count


def test_one_graph_serves_any_number_of_classes_that_are_all_saved(used):
    """Pitfall: the number of classes in the op's plan would make a graph for each."""
    graphs = CompileCounterWithBackend("aot_eager")

    def plain(x, w, y):
        return bigclass.linear_cross_entropy(x, w, y, engine="fused")

    loss, made = torch.compile(plain, fullgraph=True, backend=graphs, dynamic=True), []
    for c in (130, 200, 257):
        x, w, _, y = draw("flat", 20, c, 16, BF16, c)
        with bigclass.planning(gradients="saved"):
            torch.autograd.grad(loss(x, w, y), (x, w))
        made.append(graphs.frame_count)
    assert made[0] == made[-1] and used


@register_fold
@dataclass(frozen=True, eq=False)
class Bent(LogSumExp):
    """Sums e^2s."""

    name = "tests.bent"

    @triton_form
    def lift_triton(s):
        return LogSumExp.lift_triton.function(2.0 * s)  # never compiled


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 16), (torch.float16, 16), (BF16, 12)])
def test_other_types_and_ragged_rows_make_tiles_again(dtype, d, used):
    x, w, b, y = draw("flat", 70, 300, d, dtype, 11)
    with_gradients(ours(x, w, b, y, ROAD), (x, w, b))
    assert not used


def test_statistics_and_several_consumers_share_what_was_saved(used):
    """`reduce_logits` itself: nothing has to be a scalar."""
    x, w, _, y = draw("peaked", 70, 300, 16, BF16, 12)

    def two(engine, x, w):
        with bigclass.planning(gradients="saved"):
            (state,), picked = reduce_logits(Stream(((x, w),)), y[:, None], (LogSumExp(),), engine=engine)
        lse = log_sum_exp(state)
        return (lse**2).mean() + F.softplus(lse - picked[:, 0]).sum()

    got = torch.autograd.grad(two("fused", x, w), (x, w))
    assert used == [300, 300]
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    for z, t in zip(got, torch.autograd.grad(two("dense", *wide), wide), strict=True):
        assert error(z, t) < 5e-3

"""What the planner promises: the workspace is kept to, the choice is explained, and what is explained is what is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.core import ShiftedMoment, compare, problem
from bigclass.core.engines.support import TRITON_IS_THERE
from bigclass.core.plan import MIB, Settings, Work, make_plan
from bigclass.core.topk import TopK


@settings(max_examples=300)
@given(
    n=st.integers(0, 10**6), c=st.integers(1, 10**7), d=st.integers(1, 8192), workspace=st.integers(1, 512),
    scalar=st.booleans(), grad=st.booleans(),
    half=st.booleans(), wide=st.booleans(), device=st.sampled_from(["cpu", "cuda"]),
    buffers=st.integers(1, 5), gradients=st.sampled_from(["auto", "recompute"]),
)  # fmt: skip
def test_every_plan_covers_the_problem_and_keeps_to_the_workspace(n, c, d, workspace, scalar, grad, half, wide, device, buffers, gradients):
    work = Work(n=n, c=c, d=d, device=device, scalar=scalar, grad=grad, half=half, wide=wide, buffers=buffers)
    plan = make_plan(work, "tiled", Settings(workspace * MIB, gradients))
    assert 1 <= plan.row_block <= max(n, 1) and 1 <= plan.class_block <= c
    carried = n * d * work.item if half and plan.gradients == "recompute" else 0  # dx in fp32, named in `why`
    least = 4 * d * work.item if half else 0  # one row and one class in fp32
    assert plan.workspace <= workspace * MIB * 1.02 + 4096 + carried + least
    assert (plan.gradients == "none") == (not grad)
    assert plan.gradients != "forward" or scalar
    assert plan.why and all(plan.why)


def test_more_workspace_never_means_more_passes():
    passes = {"forward": 3, "recompute": 4}
    counts = [passes[make_plan(Work(n=4096, c=128000, d=512), "tiled", Settings(m * MIB)).gradients] for m in (8, 16, 64, 256, 1024, 4096)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 4 and counts[-1] == 3


def test_explain_names_engine_plan_tiles_workspace_and_reasons():
    text = str(bigclass.explain(4096, 256000, 2304, dtype=torch.bfloat16))
    for word in ("engine     tiled", "gradients  recompute (4 passes", "rows x", "classes", "MiB", "  - "):
        assert word in text
    assert "engine     dense" in str(bigclass.explain(32, 100, 64))
    assert "3 passes" in str(bigclass.explain(2048, 32000, 512))
    assert "1 pass " in str(bigclass.explain(2048, 32000, 512, requires_grad=False))
    assert bigclass.explain(2048, 32000, 512, reduction="none").gradients == "recompute"


def test_planning_is_undone_after_the_block_and_refuses_nonsense():
    before = bigclass.explain(2048, 32000, 512)
    with bigclass.planning(workspace=4 << 20):
        assert bigclass.explain(2048, 32000, 512).workspace <= 4 << 20
        with pytest.raises(ValueError, match="workspace: expected at least"), bigclass.planning(workspace=100):
            pass
    with pytest.raises(ValueError, match="gradients: expected one of"), bigclass.planning(gradients="later"):
        pass
    assert bigclass.explain(2048, 32000, 512) == before


@pytest.mark.parametrize("tolerance", [0.0, -0.1, 1.0, float("nan")])
def test_explain_refuses_what_is_no_tolerance(tolerance):
    with pytest.raises(ValueError, match="grad_filter: expected None"):
        bigclass.explain(2048, 32000, 512, grad_filter=tolerance)


def test_the_fused_engine_is_planned_for_gpus():
    pytest.importorskip("triton", reason="Triton is not installed")
    plan = bigclass.explain(8192, 128256, 4096, dtype=torch.bfloat16, device="cuda")
    assert plan.engine == "fused" and plan.gradients == "saved" and plan.saved == 128256
    # logits in 16 bits take no more than the workspace and the fp32 dw that gradients made in the forward need
    assert plan.workspace <= (1 << 30) + 4 * 128256 * 4096 and "kernels for sm_" in str(plan)
    single = bigclass.explain(8192, 128256, 4096, dtype=torch.float32, device="cuda")
    assert single.engine == "fused" and single.gradients == "forward" and single.workspace <= 1 << 30
    wide = bigclass.explain(8192, 128256, 4096, dtype=torch.float64, device="cuda")
    assert wide.engine == "tiled" and "not the fused engine, for it has no float64" in str(wide)


def test_explain_names_the_tiles_that_the_kernels_run():
    launch = pytest.importorskip("bigclass.core.engines.fused.launch", reason="Triton is not installed")

    def explained(features=4096, gradients="auto", dtype=torch.bfloat16, **options):
        with bigclass.planning(gradients=gradients):
            return str(bigclass.explain(8192, 128256, features, dtype=dtype, device="cuda", engine="fused", **options))

    def words(tile):
        return f"{tile.BM} rows x {tile.BN} classes, {tile.warps} warps, {tile.stages} stages"

    architecture = launch.architecture(torch.device("cuda")) if torch.cuda.is_available() else "sm_90"
    half, stored = launch.TABLE[architecture, 2], launch.TABLE[architecture, 4]
    assert explained(gradients="recompute").endswith(f": {words(half[0])}")
    assert explained(gradients="recompute", label_smoothing=0.1).endswith(f": {words(half[1])}")
    assert explained(gradients="recompute", softcap=30.0).endswith(f": {words(half[0])}; their gradient {words(half[1])}")
    assert explained(dtype=torch.float16).endswith(f": {words(stored[0])}")  # gradients in the forward: kernels read logits in fp32
    saving = launch.SAVING[architecture]
    assert explained().endswith(f": {words(saving[0])}") and explained(softcap=30.0).endswith(f": {words(saving[0])}")
    assert explained(label_smoothing=0.1).endswith(f": {words(saving[1])}")
    assert explained(features=70, gradients="recompute").endswith(f": {words(launch.POINTERS[2][0])}")
    assert explained(folds=(ShiftedMoment(),)).endswith(f": {words(half[2])}")
    assert "asked for" in explained() and "would be" not in explained()


def test_explain_says_why_a_device_or_a_fold_falls_to_tiled():
    pytest.importorskip("triton", reason="Triton is not installed")
    shape = (8192, 128256, 64)
    assert "not the fused engine, for Triton has no kernels for device 'xpu'" in str(bigclass.explain(*shape, device="xpu"))
    plan = bigclass.explain(*shape, device="cuda", folds=(TopK((1,)),))
    assert plan.engine == "tiled" and "not the fused engine, for fold 'topk' has no Triton form" in str(plan)


def test_fused_plans_count_what_is_masked_cast_copied_or_summed_in_fp32():
    work = Work(n=8192, c=128256, d=4096, device="cuda", half=True, narrow=True)
    for gradients in ("forward", "recompute"):
        plain, masked, laid_out = (
            make_plan(w, "fused", Settings(None, gradients)).workspace
            for w in (work, replace(work, masked=True), replace(work, laid_out=1 << 30))
        )
        assert plain < masked and laid_out - plain == 1 << 30
    plan = make_plan(work, "fused", Settings(None, "recompute"))
    g, dx, dw = 8192 * plan.class_block * 2, 8192 * 4096 * 4, plan.class_block * 4096 * 4
    assert plan.workspace == g + dx + dw
    assert make_plan(replace(work, narrow=False), "fused", Settings(None, "recompute")).workspace > plan.workspace
    direct = make_plan(replace(work, direct=True), "fused", Settings(None, "recompute"))
    assert direct.workspace == 8192 * direct.class_block * 2 + dx


@pytest.mark.parametrize(
    ("shape", "options", "gradients", "share"),
    [
        ((8192, 128256, 4096), {}, "saved", 1.0),
        ((8192, 152064, 3584), {}, "saved", 1.0),
        ((8192, 256000, 2304), {"softcap": 30.0}, "saved", 0.68),
        ((4096, 21841, 1024), {}, "saved", 1.0),
        ((131072, 128256, 4096), {}, "forward", 1.0),  # rows so many that an fp32 dw takes less
        ((8192, 128256, 64), {}, "recompute", 0.0),  # a product cheaper than what its logits move
        ((8192, 128256, 4096), {"reduction": "none"}, "saved", 1.0),
        ((8192, 128256, 4096), {"dtype": torch.float16}, "forward", 0.0),
        ((8192, 128256, 4096), {"softcap": 30.0, "label_smoothing": 0.1}, "forward", 0.0),
    ],
    ids=str,
)
def test_a_gpu_saves_what_fits_and_pays(shape, options, gradients, share):
    pytest.importorskip("triton", reason="Triton is not installed")
    plan = bigclass.explain(*shape, device="cuda", **{"dtype": torch.bfloat16, **options})
    assert (plan.engine, plan.gradients) == ("fused", gradients)
    assert share <= plan.saved / shape[1] <= share + 0.01
    assert plan.saved_block <= plan.saved and plan.class_block % 64 == 0


@pytest.mark.parametrize("megabytes", [16, 64, 256, 1024])
def test_a_smaller_workspace_saves_fewer_classes(megabytes):
    pytest.importorskip("triton", reason="Triton is not installed")
    with bigclass.planning(workspace=megabytes << 20, gradients="saved"):
        plan = bigclass.explain(8192, 128256, 1024, dtype=torch.bfloat16, device="cuda")
    assert plan.gradients == ("saved" if plan.saved else "recompute")
    assert plan.workspace <= (megabytes << 20) + 8192 * 1024 * 4 + (48 << 20)  # dx in fp32, and a slab of at least 256 classes
    assert plan.saved >= (40000 if megabytes == 1024 else 7168 if megabytes == 256 else 0)


def test_the_fused_engine_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"engine: 'fused' cannot run this, for Triton has no kernels for device 'cpu'.*'tiled'"):
        bigclass.explain(4096, 5000, 10, engine="fused")


@pytest.mark.parametrize("workspace", [1 << 20, 8 << 20, 64 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("centres", [None, 1, 3])
@pytest.mark.parametrize(("n", "reduction"), [(40, "mean"), (400, "mean"), (400, "none")])
def test_cross_entropy_and_margin_losses_run_as_explained(n, reduction, centres, dtype, workspace, monkeypatch):
    plans, make = [], problem.make_plan
    monkeypatch.setattr(problem, "make_plan", lambda *given: plans.append(make(*given)) or plans[-1])
    rows = 6000 * (centres or 1)
    x, w, y = torch.randn(n, 8, dtype=dtype), torch.randn(rows, 8, dtype=dtype, requires_grad=True), torch.randint(6000, (n,))
    with bigclass.planning(workspace=workspace):
        if centres is None:
            loss = bigclass.linear_cross_entropy(x, w, y, reduction=reduction)
        else:
            loss = bigclass.linear_margin_loss(x, w, y, subcenters=centres, reduction=reduction)
        torch.autograd.grad(loss.sum(), w)
        told = bigclass.explain(n, 6000, 8, dtype=dtype, subcenters=centres, reduction=reduction)
    if told.engine == "dense":
        assert n * rows * 4 <= 2 << 20 and not plans
    else:
        assert replace(plans[-1], why=()) == replace(told, why=())


def test_explain_refuses_a_margin_loss_that_is_something_else_too():
    for options in ({"subcenters": 0}, {"subcenters": 2, "one_vs_all": True}, {"subcenters": 1, "folds": (TopK((1,)),)}):
        with pytest.raises(ValueError, match="subcenters: expected a number >= 1"):
            bigclass.explain(40, 6000, 8, **options)
    gpu = {"dtype": torch.bfloat16, "device": "cuda"}
    if TRITON_IS_THERE:
        assert bigclass.explain(4096, 1_000_000, 512, subcenters=4, **gpu).engine == "fused"
        assert "groups of 3 classes" in str(bigclass.explain(4096, 1_000_000, 512, subcenters=3, **gpu))


@pytest.mark.parametrize("workspace", [1 << 20, 64 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "reduction"), [(20, "mean"), (400, "mean"), (400, "none")])
def test_losses_of_a_teacher_run_as_explained(n, reduction, dtype, workspace, monkeypatch):
    plans, make = [], compare.make_pair_plan
    monkeypatch.setattr(compare, "make_pair_plan", lambda *given: plans.append(make(*given)) or plans[-1])
    x, w, u, v = (torch.randn(s, dtype=dtype) for s in ((n, 8), (6000, 8), (n, 3), (6000, 3)))
    for teacher, features, softcap in (((u, v), 3, None), ((torch.randn(n, 6000, dtype=dtype), None), 0, 20.0)):
        with bigclass.planning(workspace=workspace):
            loss = bigclass.linear_kl_div(x, w.requires_grad_(), *teacher, reduction=reduction, softcap=softcap)
            torch.autograd.grad(loss.sum(), w)
            told = bigclass.explain(n, 6000, 8, dtype=dtype, reduction=reduction, softcap=softcap, teacher_features=features)
        if told.engine == "dense":
            assert n * 6000 * 4 <= 2 << 20 and not plans
        else:
            assert plans[-1] == told and "two streams" in str(told)


def test_explain_refuses_a_teacher_beside_what_it_does_not_teach():
    for options in ({"teacher_features": -1}, {"teacher_features": 8, "one_vs_all": True}, {"teacher_features": 8, "subcenters": 2}):
        with pytest.raises(ValueError, match="teacher_features: expected a number >= 0"):
            bigclass.explain(40, 6000, 8, **options)
    with pytest.raises(ValueError, match="engine: 'fused' cannot run this, for a loss of two streams has no Triton form"):
        bigclass.explain(4000, 6000, 8, teacher_features=8, device="cuda", engine="fused")


def test_explain_says_how_sums_over_classes_run():
    plan = bigclass.explain(512, 131072, 256, one_vs_all=True)
    assert plan.gradients == "slabs" and "3 passes" in str(plan) and plan.workspace <= 80 << 20
    half = bigclass.explain(512, 131072, 256, one_vs_all=True, dtype=torch.bfloat16)
    assert half.gradients == "slabs" and "dw stays fp32" in str(half)
    assert bigclass.explain(512, 131072, 256, one_vs_all=True, reduction="none").gradients == "recompute"
    assert bigclass.explain(8192, 256000, 2304, one_vs_all=True, dtype=torch.bfloat16, device="cuda").gradients == "slabs"


def test_a_filter_has_a_workspace_of_its_own_on_a_cpu_and_is_spoken_of():
    shape = 4096, 128_000, 512
    exact, filtered = bigclass.explain(*shape), bigclass.explain(*shape, grad_filter=2.0**-8)
    assert exact.workspace <= 80 << 20 < filtered.workspace <= 256 << 20
    assert filtered.chunk > 2 * exact.chunk
    assert any("filter" in reason for reason in filtered.why) and not any("filter" in reason for reason in exact.why)
    with bigclass.planning(workspace=32 << 20):
        assert bigclass.explain(*shape, grad_filter=2.0**-8).workspace <= 32 << 20
    assert any("drops nothing" in reason for reason in bigclass.explain(*shape, grad_filter=0.1, device="cuda", engine="tiled").why)
    assert "filter" not in str(bigclass.explain(*shape, grad_filter=0.1, requires_grad=False))

"""The drop-ins for open_clip's losses, on one process: its values, gradients and dictionaries, and its code made to use them."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
import open_clip.loss as theirs  # noqa: E402

import bigclass  # noqa: E402
from bigclass.core.engines import tiles  # noqa: E402
from bigclass.demo.memory import peak_extra_bytes, resident_peak  # noqa: E402
from bigclass.integrations import open_clip as ours  # noqa: E402
from bigclass.losses import distill  # noqa: E402
from tests.integrations.open_clip_support import Loader, arguments, tower, train_one_epoch  # noqa: E402
from tests.support import error  # noqa: E402

NAMES = ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss")
FEATURES = ("image_features", "text_features")
ARGS = {
    "ClipLoss": (*FEATURES, "logit_scale", "logit_bias"),
    "SigLipLoss": (*FEATURES, "logit_scale", "logit_bias"),
    "CoCaLoss": (*FEATURES, "logits", "labels", "logit_scale"),
    "DistillClipLoss": (*FEATURES, "logit_scale", "dist_image_features", "dist_text_features", "dist_logit_scale"),
}
MADE = {"CoCaLoss": {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5}}


def draw(n: int, d: int, dtype: torch.dtype, scale: float, bias: float | None, lead: float, seed: int) -> dict[str, Any]:
    """Pairs whose texts are like their images, by `lead`; a teacher that knows better."""
    g = torch.Generator().manual_seed(seed)

    def pair(lead: float) -> tuple[Tensor, Tensor]:
        a, b = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
        return F.normalize(a, dim=1).to(dtype), F.normalize(b + lead * a, dim=1).to(dtype)

    scalars = torch.float64 if dtype == torch.float64 else torch.float32
    made: dict[str, Any] = dict(zip((*FEATURES, "dist_image_features", "dist_text_features"), (*pair(lead), *pair(2 * lead)), strict=True))
    made["logit_scale"], made["dist_logit_scale"] = torch.tensor(scale, dtype=scalars), torch.tensor(0.7 * scale, dtype=scalars)
    made["logit_bias"] = None if bias is None else torch.tensor(bias, dtype=scalars)
    made["logits"], made["labels"] = torch.randn(n, 3, 17, generator=g).to(dtype), torch.randint(17, (n, 3), generator=g)
    return made


def evaluate(module: Any, name: str, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The parts of the loss and all gradients."""
    learn = [k for k in (*FEATURES, "logit_scale", *(["logit_bias"] if name == "SigLipLoss" else [])) if inputs[k] is not None]
    leaves = {k: inputs[k].detach().clone().requires_grad_() for k in learn}
    loss = getattr(module, name)(**MADE.get(name, {}))
    for k, v in options.items():
        setattr(loss, k, v)
    out = loss(**{k: leaves.get(k, inputs[k]) for k in ARGS[name]}, output_dict=True)
    grads = torch.autograd.grad(sum(out.values()), list(leaves.values()))
    return {**{f"value of {k}": v.detach() for k, v in out.items()}, **dict(zip(learn, grads, strict=True))}


def exact(name: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """open_clip's own in float64, of the same rounded inputs."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return evaluate(theirs, name, wide)


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    n=st.integers(1, 70),
    d=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.floats(1.0, 100.0),
    bias=st.none() | st.floats(-10.0, 3.0),
    lead=st.sampled_from([0.0, 1.0]),
    engine=st.sampled_from(["auto", "tiled"]),
    seed=st.integers(0, 999),
)
@example("DistillClipLoss", 67, 13, torch.float32, 20.0, None, 1.0, "auto", 0)
@example("SigLipLoss", 67, 13, torch.float32, 100.0, -10.0, 1.0, "tiled", 0)
def test_values_and_gradients_are_open_clip_s(name, n, d, dtype, scale, bias, lead, engine, seed):
    inputs = draw(n, d, dtype, scale, bias, lead, seed)
    got, want = evaluate(ours, name, inputs, engine=engine), exact(name, inputs)
    assert list(got) == list(want)
    if dtype != torch.float64:
        dense = evaluate(theirs, name, inputs)
    for k, z in got.items():
        assert z.shape == want[k].shape
        if dtype == torch.float64:
            # beside 1: what a confident pair leaves is a difference of logits
            assert error(z, want[k]) < 1e-10 or torch.allclose(z, want[k], rtol=0, atol=1e-13)
            continue
        if k == "value of caption_loss":  # open_clip's own
            assert torch.equal(z, dense[k])
            continue
        floor = 2e-6 if dtype == torch.float32 or k.startswith("value") else 2**-8
        # what confident pairs leave is smaller than the rounding of a logit
        assert error(z, want[k]) <= 1.1 * error(dense[k], want[k]) + floor or float((z - want[k]).abs().max()) < 1e-6 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_pooled_over_draws_nothing_is_less_exact_than_dense(name, dtype):
    """The contract: at most 1.1 times the error of open_clip's own arithmetic in the same dtype."""
    pooled: dict[str, list[tuple[float, float]]] = {}
    for seed in range(100):
        inputs = draw(97, 24, dtype, 20.0, -4.0, (0.0, 1.0)[seed % 2], seed)
        want, dense = exact(name, inputs), evaluate(theirs, name, inputs)
        for engine in ("auto", "tiled"):
            got = evaluate(ours, name, inputs, engine=engine)
            for k in want:
                pooled.setdefault(k, []).append((error(got[k], want[k]), error(dense[k], want[k])))
    for k, pairs in pooled.items():
        mine, their = (math.sqrt(sum(e * e for e in es)) for es in zip(*pairs, strict=True))
        assert mine <= 1.1 * their, (k, mine, their)


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_constructor_are_open_clip_s(name):
    mine, their = getattr(ours, name), getattr(theirs, name)
    assert issubclass(mine, their)
    assert inspect.signature(mine) == inspect.signature(their)
    assert list(inspect.signature(mine.forward).parameters.values()) == list(inspect.signature(their.forward).parameters.values())


@pytest.mark.parametrize("name", NAMES)
def test_without_output_dict_the_same_comes_as_a_tensor_or_a_tuple(name):
    """Pitfall 30: and a dictionary has open_clip's keys alone."""
    inputs = draw(9, 4, torch.float32, 10.0, -2.0, 1.0, 0)
    made = [getattr(module, name)(**MADE.get(name, {})) for module in (ours, theirs)]
    given = {k: inputs[k] for k in ARGS[name]}
    bare, parts = zip(*[(loss(**given), loss(**given, output_dict=True)) for loss in made], strict=True)
    assert list(parts[0]) == list(parts[1])
    assert type(bare[0]) is type(bare[1])
    for a, b in zip(*[t if isinstance(t, tuple) else (t,) for t in bare], strict=True):
        assert error(a, b) < 1e-6


def test_a_coca_loss_without_its_contrastive_part_is_open_clip_s():
    inputs = draw(9, 4, torch.float32, 10.0, None, 1.0, 0)
    given = {k: inputs[k] for k in ARGS["CoCaLoss"]}
    got, want = (m.CoCaLoss(2.0, 0.0)(**given, output_dict=True) for m in (ours, theirs))
    assert got["contrastive_loss"] == want["contrastive_loss"] == 0
    assert torch.equal(got["caption_loss"], want["caption_loss"])


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_a_bias_that_learns_gets_a_gradient_and_a_frozen_tower_none(name):
    """Of a softmax's bias exactly 0, where dense leaves rounding."""
    inputs = draw(9, 4, torch.float32, 10.0, -2.0, 1.0, 0)
    leaves = {k: inputs[k].requires_grad_(k != "image_features") for k in ARGS[name]}
    getattr(ours, name)()(**leaves).backward()
    assert leaves["image_features"].grad is None
    bias = leaves["logit_bias"].grad
    assert bias is not None
    assert (bias == 0.0) == (name == "ClipLoss")


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_cached_features_of_which_one_part_learns_get_dense_gradients(name, part):
    """What --accum-freq does: the loss of a whole step, differentiated by one of its batches."""
    inputs = draw(3 * 11, 6, torch.float64, 15.0, -2.0, 1.0, part)

    def gradients(module: Any) -> list[Tensor]:
        leaves, cats = [], {}
        for k in FEATURES:
            parts = list(inputs[k].split(11))
            leaves.append(parts[part].clone().requires_grad_())
            cats[k] = torch.cat(parts[:part] + [leaves[-1]] + parts[part + 1 :])
        leaves.append(inputs["logit_scale"].clone().requires_grad_())
        given = {k: inputs[k] for k in ARGS[name]} | cats | {"logit_scale": leaves[-1]}
        losses = getattr(module, name)()(**given, output_dict=True)
        return list(torch.autograd.grad(sum(losses.values()), leaves))

    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
def test_under_autocast_logits_are_not_rounded(name):
    """On a CPU not even the features are, where open_clip's own loss rounds all to bf16."""
    inputs = draw(97, 24, torch.float32, 20.0, -4.0, 1.0, 0)
    want = exact(name, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(ours, name, inputs, engine="tiled")
        dense = evaluate(theirs, name, inputs)
    for k in want:
        assert got[k].dtype == torch.float32
        assert error(got[k], want[k]) < 5e-6 < error(dense[k], want[k])


# --- the teacher ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
def test_a_teacher_s_cross_entropy_in_chunks_is_that_of_written_out_logits(needs):
    n, c = 600, 700
    g = torch.Generator().manual_seed(0)
    shapes = (n, 5), (c, 5), (n, 3), (c, 3)
    x, w, u, v = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    leaves = [t.requires_grad_(bool(need)) for t, need in zip((x, w, torch.tensor([3.0], dtype=torch.float64)), needs, strict=True)]
    b = torch.tensor(2.0)
    want = -((b * u @ v.t()).softmax(1) * (leaves[2] * x @ w.t()).log_softmax(1)).sum()
    with bigclass.planning(workspace=1 << 20):
        got = distill.teacher_cross_entropy(*leaves, u, v, b, "tiled")
    assert error(got, want) < 1e-12
    assert got.requires_grad == any(needs)
    wanted = [t for t in leaves if t.requires_grad]
    if wanted:
        for a, e in zip(torch.autograd.grad(got * 0.3, wanted), torch.autograd.grad(want * 0.3, wanted), strict=True):
            assert error(a, e) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_s_cross_entropy_of_16_bits_where_products_are_wide(monkeypatch, dtype):
    """The road of GPUs, emulated; probabilities of 4096 classes are subnormal in fp16."""
    monkeypatch.setattr(tiles, "WIDE_OUTPUT", ("cpu",))
    plain, seen = tiles.product, set()

    def widened(a: Tensor, b: Tensor, out: Tensor, **options: float) -> Tensor:
        seen.add((a.dtype, b.dtype))
        return plain(a.to(out.dtype), b.to(out.dtype), out, **options)

    monkeypatch.setattr(tiles, "product", widened)
    monkeypatch.setattr("bigclass.core.engines.sink.product", widened)
    g = torch.Generator().manual_seed(0)
    x, w, u, v = (torch.randn(n, 8, generator=g).to(dtype) for n in (40, 4096, 40, 4096))
    leaves, a = [x.requires_grad_(), w.requires_grad_()], torch.tensor(0.3)
    got = distill.teacher_cross_entropy(x, w, a, u, v, a, "tiled")
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = -((0.3 * u.double() @ v.double().t()).softmax(1) * (0.3 * wide[0] @ wide[1].t()).log_softmax(1)).sum()
    assert seen == {(dtype, dtype)}
    assert error(got, want) < 1e-6
    for z, e in zip(torch.autograd.grad(got / 40, leaves), torch.autograd.grad(want / 40, wide), strict=True):
        assert z.dtype == dtype
        assert error(z, e) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_a_confident_student_that_agrees_with_its_teacher_keeps_its_digits(engine):
    n, d = 64, 64
    x = torch.eye(n, d)
    student, teacher = torch.tensor(30.0), torch.tensor(20.0)
    got = distill.teacher_cross_entropy(x, x, student, x, x, teacher, engine)
    s, t = student.double() * torch.eye(n, dtype=torch.float64), teacher.double() * torch.eye(n, dtype=torch.float64)
    assert error(got, -(t.softmax(1) * s.log_softmax(1)).sum()) < 1e-5


def test_a_teacher_that_learns_gets_its_gradients_from_open_clip_after_a_warning(monkeypatch):
    monkeypatch.setattr(ours, "_said", set())
    inputs = draw(9, 4, torch.float64, 10.0, None, 1.0, 0)
    given = {k: inputs[k] for k in ARGS["DistillClipLoss"]}
    leaf = given["dist_image_features"].requires_grad_()
    with pytest.warns(UserWarning, match="the teacher requires gradients"):
        got = ours.DistillClipLoss()(**given)[1]
    want = theirs.DistillClipLoss()(**given)[1]
    assert torch.equal(*[torch.autograd.grad(loss, leaf)[0] for loss in (got, want)])
    with torch.no_grad():
        assert error(ours.DistillClipLoss()(**given)[1], want) < 1e-12


# --- memory -------------------------------------------------------------------------------------------------------------------------


def distilled(n: int):
    """A step of the loss that has most, warmed up on a small problem."""

    def run(n: int) -> list[Tensor]:
        inputs = draw(n, 16, torch.float32, 20.0, None, 1.0, 0)
        return list(evaluate(ours, "DistillClipLoss", inputs).values())

    for _ in range(2):
        run(1500)
    return lambda: run(n)


@pytest.mark.skipif(resident_peak() is None, reason="this system does not tell a process's peak memory")
def test_contrast_and_distillation_of_8192_pairs_hold_no_matrix_of_logits():
    """Each of which has 256 MiB; dense holds eight at once."""
    extra = peak_extra_bytes(distilled, 8192)
    assert extra is not None
    assert extra <= 104 << 20


# --- errors -------------------------------------------------------------------------------------------------------------------------


def test_several_ranks_without_a_process_group_are_refused():
    inputs = draw(9, 4, torch.float32, 10.0, -2.0, 1.0, 0)
    for name in NAMES:
        with pytest.raises(ValueError, match=r"world_size: .* rank 1 of 2, but torch.distributed is not initialised"):
            getattr(ours, name)(**MADE.get(name, {}), rank=1, world_size=2)(**{k: inputs[k] for k in ARGS[name]})


@pytest.mark.parametrize(("name", "shape"), [("image", (8, 5)), ("text", (10, 5)), ("text", (9, 4)), ("image", (9,))])
def test_a_teacher_of_other_pairs_is_refused_by_name(name, shape):
    inputs = draw(9, 5, torch.float32, 10.0, None, 1.0, 0)
    inputs[f"dist_{name}_features"] = torch.randn(shape)
    with pytest.raises(ValueError, match=rf"dist_{'image' if len(shape) == 1 else name}_features: expected 9 rows"):
        ours.DistillClipLoss()(**{k: inputs[k] for k in ARGS["DistillClipLoss"]})


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
def test_double_backward_is_refused(name):
    """Pitfall 47: a gradient without a graph would take no part in what is made of it."""
    inputs = draw(9, 5, torch.float32, 10.0, None, 1.0, 0)
    x = inputs["image_features"].requires_grad_()
    loss = getattr(ours, name)()
    loss.engine = "tiled"
    parts = loss(**{k: inputs[k] for k in ARGS[name]}, output_dict=True)
    for part in parts.values():
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(part, x, create_graph=True)


def test_horovod_runs_open_clip_s_own_loss_after_a_warning(monkeypatch):
    class Horovod:
        @staticmethod
        def allgather(t: Tensor) -> Tensor:
            return torch.cat((t, -t))

    monkeypatch.setattr(theirs, "hvd", Horovod)
    monkeypatch.setattr(ours, "_said", set())
    inputs = draw(9, 4, torch.float32, 10.0, None, 1.0, 0)
    options = {"use_horovod": True, "world_size": 2, "gather_with_grad": True}
    for name in ("ClipLoss", "CoCaLoss", "DistillClipLoss"):
        given, made = {k: inputs[k] for k in ARGS[name]}, MADE.get(name, {}) | options
        with pytest.warns(UserWarning, match=f"{name.replace('CoCa', '(CoCa|Clip)')}: with use_horovod"):
            got = getattr(ours, name)(**made)(**given, output_dict=True)
        want = getattr(theirs, name)(**made)(**given, output_dict=True)
        assert all(torch.equal(got[k], want[k]) for k in want)


# --- open_clip's own code ---------------------------------------------------------------------------------------------------------------

KINDS = {
    "ClipLoss": {},
    "SigLipLoss": {"siglip": True},
    "CoCaLoss": {"model": "coca_ViT-B-32"},
    "DistillClipLoss": {"distill": True},
}


def test_patched_create_loss_makes_streamed_losses_and_unpatched_open_clip_s():
    import open_clip_train.train  # noqa: F401

    before = {name: getattr(theirs, name) for name in NAMES}
    with ours.patch() as undo:
        for name, options in KINDS.items():
            assert type(open_clip.create_loss(arguments(**options))) is getattr(ours, name)
            assert getattr(theirs, name) is getattr(open_clip.factory, name) is getattr(ours, name)
        assert open_clip.ClipLoss is ours.ClipLoss
        with ours.patch():  # changes nothing, and undoes nothing
            pass
        assert open_clip.ClipLoss is ours.ClipLoss
    undo()
    for name, options in KINDS.items():
        assert type(open_clip.create_loss(arguments(**options))) is before[name]
        assert getattr(theirs, name) is getattr(open_clip.factory, name) is before[name]
    assert open_clip.ClipLoss is before["ClipLoss"]
    ours.patch()
    ours.patch()
    ours.unpatch()
    assert open_clip.ClipLoss is before["ClipLoss"]
    ours.unpatch()


@pytest.mark.parametrize("freq", [1, 2])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
def test_open_clip_s_own_training_loop_trains_the_same_model(name, freq):
    bias = -2.0 if name == "SigLipLoss" else None
    trained = []
    for patched in (False, True):
        model, teacher = tower(bias), tower() if name == "DistillClipLoss" and freq == 1 else None
        options = KINDS[name] if teacher or name != "DistillClipLoss" else {}
        args = arguments(accum_freq=freq, **options)
        undo = ours.patch() if patched else None
        try:
            loss = train_one_epoch(model, Loader(4, 7, seed=0), args, teacher)
        finally:
            if undo:
                undo()
        assert type(loss).__module__ == (ours.__name__ if patched else "open_clip.loss")
        trained.append([p.detach() for p in model.parameters()])
    for a, b, start in zip(*trained, tower(bias).parameters(), strict=True):
        assert not torch.equal(b, start)
        assert error(b, a) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_losses_copy_and_pickle(name):
    loss = getattr(ours, name)(**MADE.get(name, {}))
    loss.engine = "tiled"
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(other) is type(loss)
        assert other.engine == "tiled"


def test_open_clip_is_imported_for_its_own_part_alone():
    code = (
        "import sys, bigclass; assert 'open_clip' not in sys.modules; "
        "bigclass.integrations.open_clip.ClipLoss; assert 'open_clip' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

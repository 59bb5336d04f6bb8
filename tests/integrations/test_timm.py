"""timm models with their classifier swapped: the same losses, gradients, checkpoints and habits as before."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("timm.data")
pytest.importorskip("timm.loss")

import bigclass  # noqa: E402
from bigclass.integrations import timm as adapter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::bigclass.LogitsWarning")

C = 30

# Quick ones, of every head style there is.
FAST = (
    "cpubone_nano", "deit_tiny_patch16_224", "edgenext_xx_small", "efficientvit_b0", "efficientvit_m0", "fasternet_t0", "ghostnet_050",
    "inception_next_atto", "iformer_t", "lcnet_035", "starnet_s050", "test_byobnet", "test_convnext", "test_coatnet", "test_efficientnet",
    "test_mambaout", "test_nfnet", "test_resnet", "test_vit",
)  # fmt: skip

# `python -m pytest -m architectures`: one of nearly every family (about ten minutes on two cores)
ALL = (
    *FAST, "cait_xxs24_224", "caformer_s18", "coat_tiny", "convit_tiny", "cs3darknet_focus_s", "csatv2", "cspnext_tiny", "davit_tiny",
    "densenet121", "eva02_tiny_patch14_224", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "gmlp_ti16_224", "hardcorenas_b",
    "hgnetv2_b0", "hiera_tiny_224", "hieradet_small", "hrnet_w18_small", "inception_resnet_v2", "inception_v3", "inception_v4",
    "lcnetv2_small", "legacy_seresnet18", "legacy_xception", "levit_256d", "lowformer_b0", "mobilevit_xxs", "mvitv2_tiny",
    "nextvit_small", "pit_ti_224", "poolformerv2_s12", "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "repghostnet_050", "res2next50",
    "resnet18", "rexnet_100", "sequencer2d_s", "shvit_s1", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "tinynet_e",
    "tnt_s_legacy_patch16_224", "twins_svt_small", "visformer_tiny", "vit_tiny_r_s16_p8_224", "xcit_nano_12_p8_224",
)  # fmt: skip

REFUSED = {
    "crossvit_tiny_240": "2 classifiers, head.0, head.1",
    "deit_tiny_distilled_patch16_224": "2 classifiers, head, head_dist",
    "dla46x_c": "'fc', is a convolution",
    "efficientvim_m1": "4 classifiers",
    "resnetv2_18": "'head.fc', is a convolution",
    "volo_d1_224": "2 classifiers, head, aux_head",
}


def small(name: str, classes: int = C) -> tuple[nn.Module, Tensor, Tensor]:
    """A float64 model in training, two of the smallest images it takes, their labels."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=classes).double().train()
    config = model.pretrained_cfg
    size = config["input_size"] if config.get("fixed_input_size") else config.get("min_input_size") or config["input_size"]
    return model, torch.randn(2, *size, dtype=torch.float64), torch.randint(classes, (2,))


def run(model: nn.Module, criterion, x: Tensor, y) -> tuple[Tensor, list[Tensor]]:
    """The loss and every parameter's gradient, with the same dropout for every model."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def gap(made: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a gradient. One below 1e-6 of all together (a bias before a batch norm: 0 but for rounding) is
    measured against that."""
    whole = torch.linalg.vector_norm(torch.stack([g.norm() for g in exact]))
    assert whole > 0
    return max(float((a - b).norm() / torch.maximum(b.norm(), 1e-6 * whole)) for a, b in zip(made, exact, strict=True))


def check_architecture(name: str) -> None:
    model, x, y = small(name)
    before = copy.deepcopy(model)
    classifier = model.get_classifier()
    parameters = [id(p) for p in model.parameters()]
    assert bigclass.convert_head(model, engine="tiled") is model
    head = model.get_submodule(adapter.classifier_path(model))
    assert type(head) is bigclass.CCEHead and head.num_classes == C
    assert model.get_classifier() is classifier
    assert list(model.state_dict()) == list(before.state_dict())
    assert [id(p) for p in model.parameters()] == parameters
    expected = run(before, F.cross_entropy, x, y)
    loss, grads = run(model, F.cross_entropy, x, y)
    assert abs(float(loss / expected[0]) - 1) < 1e-12
    assert gap(grads, expected[1]) < 1e-9  # rounding, grown on its way through the backbone
    plain = before.get_submodule(adapter.classifier_path(model))
    assert gap([p.grad for p in head.parameters()], [p.grad for p in plain.parameters()]) < 1e-12
    # evaluation: real logits, those of the model as it was
    model.eval(), before.eval()
    with torch.no_grad():
        logits = model(x)
        assert isinstance(logits, Tensor) and torch.equal(logits, before(x))
        if hasattr(model, "forward_head"):
            hidden = [m.forward_head(m.forward_features(x), pre_logits=True) for m in (model, before)]
            assert torch.equal(*hidden)
    model.reset_classifier(C + 1)
    head = model.get_submodule(adapter.classifier_path(model))
    assert type(head) is bigclass.CCEHead and head.num_classes == C + 1 and head.engine == "tiled"
    assert isinstance(model.train()(x), bigclass.LazyLogits)
    model.reset_classifier(0)
    assert isinstance(model(x), Tensor)


@pytest.mark.parametrize("name", FAST)
def test_an_architecture_trains_as_before(name):
    check_architecture(name)


@pytest.mark.architectures
@pytest.mark.parametrize("name", [name for name in ALL if name not in FAST])
def test_every_architecture_trains_as_before(name):
    check_architecture(name)


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_a_classifier_of_another_kind_is_refused_with_the_reason(name, words):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=C)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=words):
        bigclass.convert_head(model)
    assert [type(m) for m in model.modules()] == kinds and "reset_classifier" not in vars(model)


def test_a_model_without_classifier_or_of_another_library_is_refused():
    model = timm.create_model("test_vit", num_classes=0)
    with pytest.raises(ValueError, match=r"num_classes=0.*reset_classifier"):
        bigclass.convert_head(model)
    with pytest.raises(TypeError, match=r"nor a timm model.*CCEHead\.adopt"):
        bigclass.convert_head(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="expected a module, got str"):
        bigclass.convert_head("test_vit")
    model = timm.create_model("test_vit", num_classes=C)
    model.head = nn.Sequential(nn.Linear(64, C))
    with pytest.raises(ValueError, match=r"expected an nn\.Linear.*Sequential"):
        bigclass.convert_head(model)
    with pytest.raises(ValueError, match="greater than 0"):
        bigclass.convert_head(timm.create_model("test_vit", num_classes=C), softcap=-1.0)
    for option in ("soft_cap", "label_smoothing"):  # the second would never take effect
        with pytest.raises(TypeError, match=f"unexpected option '{option}'.*belongs to the criterion"):
            bigclass.convert_head(timm.create_model("test_vit", num_classes=C), **{option: 0.5})


def test_converting_twice_takes_the_last_options_and_restoring_undoes_it():
    model, x, _ = small("test_vit")
    bigclass.convert_head(bigclass.convert_head(model), softcap=5.0)
    assert model.head.softcap == 5.0 and isinstance(model(x), bigclass.LazyLogits)
    bigclass.restore_head(model)
    assert type(model.head) is nn.Linear and "softcap" not in vars(model.head) and "reset_classifier" not in vars(model)
    assert isinstance(model(x), Tensor)
    model.reset_classifier(7)
    assert type(model.head) is nn.Linear


def test_copies_and_pickles_reset_their_own_classifier():
    """A closure in place of `reset_classifier` would go on resetting the original."""
    model = bigclass.convert_head(timm.create_model("test_vit", num_classes=C))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        other.reset_classifier(7)
        assert type(other.head) is bigclass.CCEHead and other.head.out_features == 7 and model.head.out_features == C


def test_a_converted_model_is_freed_without_the_garbage_collector():
    """Its weights and gradients would stay on the device until a collection."""
    model = bigclass.convert_head(timm.create_model("test_vit", num_classes=C))
    there = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert there() is None
    finally:
        gc.enable()


def test_a_compiled_model_converts_and_is_restored_as_the_model_inside():
    model = timm.create_model("test_vit", num_classes=C)
    compiled = torch.compile(model, backend="eager")
    assert bigclass.convert_head(compiled) is compiled and type(model.head) is bigclass.CCEHead
    model.reset_classifier(7)
    assert type(model.head) is bigclass.CCEHead
    bigclass.restore_head(compiled)
    assert type(model.head) is nn.Linear and "reset_classifier" not in vars(model)


def test_checkpoints_load_both_ways():
    plain, converted = (timm.create_model("test_resnet", num_classes=C) for _ in range(2))
    bigclass.convert_head(converted)
    converted.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(converted.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain.eval()(x), converted.eval()(x))


CRITERIA = {
    "label smoothing": (lambda: timm.loss.LabelSmoothingCrossEntropy(0.1), "index", True),
    "soft target": (lambda: timm.loss.SoftTargetCrossEntropy(), "soft", True),
    "binary": (lambda: timm.loss.BinaryCrossEntropy(smoothing=0.1), "index", True),
    "binary, threshold": (lambda: timm.loss.BinaryCrossEntropy(smoothing=0.1, target_threshold=0.2), "index", True),
    "binary, summed": (lambda: timm.loss.BinaryCrossEntropy(sum_classes=True), "index", True),
    "binary, weighted": (
        lambda: timm.loss.BinaryCrossEntropy(weight=torch.linspace(0.5, 2, C), pos_weight=torch.tensor(3.0)), "index", True,
    ),
    "binary, dense": (lambda: timm.loss.BinaryCrossEntropy(smooth_dense=True), "multi", True),
    "asymmetric": (lambda: timm.loss.AsymmetricLossMultiLabel(), "multi", False),
    "asymmetric, options": (
        lambda: timm.loss.AsymmetricLossMultiLabel(
            gamma_neg=2.5, gamma_pos=0.5, clip=0.1, disable_torch_grad_focal_loss=True, smoothing=0.1, reduction="mean",
            weight=torch.linspace(0.5, 2, C), pos_weight=2.0,
        ), "multi", False,
    ),
    "asymmetric, no focus": (
        lambda: timm.loss.AsymmetricLossMultiLabel(gamma_neg=0, gamma_pos=0, clip=None, reduction="sum"), "multi", False,
    ),
    "asymmetric, one label": (lambda: timm.loss.AsymmetricLossSingleLabel(), "index", False),
    "asymmetric, one label, not smoothed": (lambda: timm.loss.AsymmetricLossSingleLabel(eps=0.0, gamma_pos=2.0), "index", False),
    "poly": (lambda: timm.loss.PolyCrossEntropy(), "index", False),
    "poly, smoothed": (lambda: timm.loss.PolyCrossEntropy(epsilon=-1.0, smoothing=0.1, reduction="sum"), "index", False),
    "poly, soft": (lambda: timm.loss.PolyCrossEntropy(smoothing=0.3), "soft", False),
    "poly, binary": (lambda: timm.loss.PolyBinaryCrossEntropy(), "multi", False),
    "poly, focal": (lambda: timm.loss.PolyBinaryCrossEntropy(gamma=2.0, alpha=0.3, smoothing=0.1, reduction="batchmean"), "multi", False),
}  # fmt: skip


def target_of(kind: str, n: int) -> Tensor:
    g = torch.Generator().manual_seed(5)
    if kind == "index":
        return torch.randint(C, (n,), generator=g)
    if kind == "soft":
        return torch.randn(n, C, generator=g, dtype=torch.float64).softmax(-1)
    return (torch.rand(n, C, generator=g) < 0.1).double()


@pytest.mark.parametrize("converted", [False, True], ids=["as it stands", "converted"])
@pytest.mark.parametrize("engine", ["tiled", "dense"])
@pytest.mark.parametrize("name", CRITERIA)
def test_timms_criteria_stream_with_their_own_numbers(name, engine, converted):
    make, kind, stands = CRITERIA[name]
    criterion, y = make(), target_of(kind, 9)
    torch.manual_seed(0)
    plain = nn.Linear(12, C).double()
    head = bigclass.CCEHead.adopt(copy.deepcopy(plain), engine=engine)
    x = torch.randn(9, 12, dtype=torch.float64)
    expected = run(plain, criterion, x, y)
    if not (stands or converted):
        with pytest.raises(bigclass.LogitsWarning):
            run(head, criterion, x, y)
        return
    loss, grads = run(head, bigclass.convert_criterion(criterion) if converted else criterion, x, y)
    limit = 1e-12 if expected[0].dtype == torch.float64 else 2e-6  # the reference casts to float32
    assert loss.dtype == expected[0].dtype
    assert abs(float(loss / expected[0]) - 1) < limit
    assert gap(grads, expected[1]) < limit


def test_a_converted_criterion_is_the_criterion_in_evaluation_and_moves_its_buffers():
    criterion = bigclass.convert_criterion(timm.loss.BinaryCrossEntropy(weight=torch.ones(C)))
    assert isinstance(criterion, nn.Module) and list(criterion.state_dict()) == ["criterion.weight"]
    assert criterion.double().criterion.weight.dtype == torch.float64
    logits, y = torch.randn(4, C), torch.randint(C, (4,))
    assert torch.equal(criterion.float()(logits, y), criterion.criterion(logits, y))
    assert bigclass.convert_criterion(criterion) is criterion
    stands = nn.CrossEntropyLoss()
    assert bigclass.convert_criterion(stands) is stands


@pytest.mark.parametrize("make", [timm.loss.JsdCrossEntropy, nn.MultiMarginLoss, nn.Identity], ids=lambda m: m.__name__)
def test_criteria_without_a_streamed_form_are_refused_with_the_reason(make):
    with pytest.raises(TypeError, match=f"{make.__name__} has no streamed form: .*Known: timm"):
        bigclass.convert_criterion(make())


def test_a_subclass_is_not_taken_for_its_base():
    class Doubled(timm.loss.SoftTargetCrossEntropy):
        def forward(self, x, target):
            return 2 * super().forward(x, target)

    with pytest.raises(TypeError, match="no streamed form"):
        bigclass.convert_criterion(Doubled())


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
@pytest.mark.parametrize("options", [{"mixup_alpha": 0.8}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}, {"mixup_alpha": 0.8, "prob": 0.0}])
def test_sparse_mixup_is_timms_mixup_without_its_target_matrix(mode, options):
    np = pytest.importorskip("numpy")
    options = {**options, "label_smoothing": 0.1, "num_classes": C, "mode": mode}
    x, y = torch.rand(6, 3, 16, 16), torch.tensor([3, 3, 7, 1, 3, 29])  # 3 meets itself
    np.random.seed(0)
    images, dense = timm.data.Mixup(**options)(x.clone(), y)
    np.random.seed(0)
    mixed, sparse = bigclass.SparseMixup(**options)(x.clone(), y)
    assert torch.equal(images, mixed) and isinstance(sparse, bigclass.SparseTarget) and sparse.shape == dense.shape
    torch.testing.assert_close(sparse.dense(), dense, rtol=1e-6, atol=1e-7)
    torch.manual_seed(0)
    plain = nn.Linear(12, C).double()
    head, x = bigclass.CCEHead.adopt(copy.deepcopy(plain), engine="tiled"), torch.randn(6, 12, dtype=torch.float64)
    for criterion in (timm.loss.SoftTargetCrossEntropy(), nn.CrossEntropyLoss(), timm.loss.BinaryCrossEntropy(target_threshold=0.2)):
        expected = run(plain, criterion, x, sparse.dense().double())
        for made in (criterion, bigclass.convert_criterion(criterion)):
            loss, grads = run(head, made, x, sparse.to(torch.float64))
            assert abs(float(loss / expected[0]) - 1) < 1e-7  # the floor is exact here, rounded to float32 there
            assert gap(grads, expected[1]) < 1e-7


@pytest.mark.parametrize("mode", ["batch", "elem", "pair", "half"])
def test_sparse_fast_collate_is_timms(mode):
    np = pytest.importorskip("numpy")
    g = np.random.default_rng(0)
    batch = [(g.integers(0, 255, (3, 8, 8), dtype=np.uint8), int(i) % C) for i in range(8)]
    options = {"mixup_alpha": 0.8, "label_smoothing": 0.1, "num_classes": C, "mode": mode}
    np.random.seed(0)
    images, dense = timm.data.FastCollateMixup(**options)(copy.deepcopy(batch))
    np.random.seed(0)
    mixed, sparse = bigclass.SparseFastCollateMixup(**options)(copy.deepcopy(batch))
    assert torch.equal(images, mixed)
    torch.testing.assert_close(sparse.dense(), dense.float(), rtol=1e-6, atol=1e-7)


def test_sparse_mixup_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="multi-label"):
        bigclass.SparseMixup(num_classes=C, multi_label=True)(torch.rand(2, 3, 8, 8), torch.rand(2, C))
    with pytest.raises(ValueError, match="even number of images, got 3"):
        bigclass.SparseMixup(num_classes=C)(torch.rand(3, 3, 8, 8), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
def test_the_flow_of_timms_own_training_script(amp):
    """Task wrapper, head-init options, EMA, gradient clipping, its loss scaler, evaluation of model and EMA."""
    from timm.models import model_parameters
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, NativeScaler, accuracy

    task = pytest.importorskip("timm.task", reason="this timm has no training tasks")
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=C, img_size=32)
    converted = copy.deepcopy(plain)
    losses = []
    for model, convert in ((plain, False), (converted, True)):
        if convert:
            bigclass.convert_head(model, engine="tiled")
        with torch.no_grad():
            model.get_classifier().weight.mul_(0.5)  # --head-init-scale
            nn.init.constant_(model.get_classifier().bias, -1.0)  # --head-init-bias
        optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
        ema, scaler = ModelEmaV3(model, decay=0.5), NativeScaler(device="cpu")
        wrapped = task.ClassificationTask(model, timm.loss.LabelSmoothingCrossEntropy(0.1), verbose=False)
        seen = []
        for step in range(3):
            torch.manual_seed(step)
            x, y = torch.randn(8, 3, 32, 32), torch.randint(C, (8,))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                result = wrapped(x, y)
            assert isinstance(result["output"], bigclass.LazyLogits) == convert
            top1, top5 = accuracy(result["output"].detach(), y, topk=(1, 5))
            scaler(
                result["loss"], optimizer, clip_grad=1.0, clip_mode="agc", parameters=model_parameters(model, exclude_head=True),
            )  # fmt: skip
            optimizer.zero_grad()
            ema.update(model, step=step)
            seen += [float(result["loss"]), float(top1), float(top5)]
        for m in (model, ema.module):
            with torch.no_grad():
                seen.append(float(nn.CrossEntropyLoss()(m.eval()(x), y)))
        losses.append(torch.tensor(seen))
    # with amp, bfloat16 rounds the dense logits; ours are not rounded
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2 if amp else 1e-5, atol=0.0)


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(), timm.loss.LabelSmoothingCrossEntropy(0.1), timm.loss.SoftTargetCrossEntropy()]
)
def test_model_and_criterion_compile_to_one_graph(criterion):
    model, x, y = small("test_vit")
    y = target_of("soft", 2) if isinstance(criterion, timm.loss.SoftTargetCrossEntropy) else y
    expected = run(model, criterion, x, y)
    bigclass.convert_head(model, engine="tiled")
    step = torch.compile(lambda x, y: criterion(model(x), y), fullgraph=True, backend="aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for loss in (lambda x, y: step(x, y), lambda x, y: criterion(compiled(x), y)):
        model.zero_grad()
        torch.manual_seed(1)
        made = loss(x, y)
        made.backward()
        assert abs(float(made / expected[0]) - 1) < 1e-12
        assert gap([p.grad for p in model.parameters()], expected[1]) < 1e-9

"""Contrastive losses against their definition and against the dense form: values, gradients, special cases, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bigclass
from tests.losses.contrastive_support import Batch, batches
from tests.support import error

ENGINES = ("dense", "tiled")
DIRECTIONS = ("both", "image", "text")


def ours(batch: Batch, sigmoid: bool, direction: str, reduction: str, **options):
    if sigmoid:
        return bigclass.sigmoid_contrastive_loss(
            batch.image, batch.text, batch.scale, batch.bias, reduction=reduction, **batch.options, **options
        )
    return bigclass.contrastive_loss(
        batch.image, batch.text, batch.scale, logit_bias=batch.bias, direction=direction, reduction=reduction, **batch.options, **options
    )


def with_gradients(loss, leaves):
    return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def relative(made, exact, floor: float) -> list[float]:
    """Errors; where the exact gradient is 0 (a bias under a softmax, a lone pair), against `floor`."""
    return [float((m.detach().double() - e.detach()).norm() / e.detach().norm().clamp_min(floor)) for m, e in zip(made, exact, strict=True)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@settings(max_examples=80)
@given(batch=batches(most=170), direction=st.sampled_from(DIRECTIONS), reduction=st.sampled_from(("mean", "sum")))
def test_loss_and_gradients_are_those_of_the_definition(engine, sigmoid, batch, direction, reduction):
    with bigclass.planning(workspace=1 << 20):  # several tiles from about 100 x 200 on
        made = with_gradients(ours(batch, sigmoid, direction, reduction, engine=engine), batch.leaves)
    exact = batch.exact(sigmoid, direction, reduction)
    # a gradient far below the loss's is a difference of numbers of its size, in the reference too
    assert max(relative(made, exact, 1e-4 * max(1.0, float(exact[0].detach())))) < 1e-10


def torchs_own(batch: Batch, sigmoid: bool) -> torch.Tensor:
    """The dense loss as training code writes it."""
    s = batch.scale * batch.image @ batch.text.t() + batch.bias
    if sigmoid:
        return -F.logsigmoid((2 * torch.eye(len(s)) - 1) * s).sum() / len(s)
    pairs = torch.arange(len(s))
    return (F.cross_entropy(s, pairs) + F.cross_entropy(s.t(), pairs)) / 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("likeness", [0.0, 1.0, 9.0], ids=["flat", "alike", "one-hot"])
def test_pooled_errors_are_those_of_dense_and_gradients_survive_confident_pairs(engine, sigmoid, dtype, scale, likeness):
    pooled: dict[str, list[float]] = {}
    confident = True
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        n, d = 64 + 7 * seed, 8 + 3 * seed
        image = torch.randn(n, d, generator=g)
        text = torch.randn(n, d, generator=g) + likeness * image
        leaves = [F.normalize(t).to(dtype).requires_grad_() for t in (image, text)]
        leaves += [torch.tensor(scale, requires_grad=True), torch.tensor(-10.0 if sigmoid else 0.0, requires_grad=True)]
        batch = Batch(*leaves, None, None, None)
        exact = batch.exact(sigmoid, "both", "mean")
        mine = with_gradients(ours(batch, sigmoid, "both", "mean", engine=engine), batch.leaves)
        dense = with_gradients(torchs_own(batch, sigmoid), batch.leaves)
        confident &= float(exact[0].detach()) < 1e-3
        assert mine[0].dtype == torch.float32 and mine[1].dtype == dtype
        for name, m, t, e in zip(("loss", "image", "text", "scale", "bias"), mine, dense, exact, strict=True):
            if name == "bias" and not sigmoid:
                assert float(m) == 0.0
                continue
            sums = pooled.setdefault(name, [0.0, 0.0, 0.0])
            for i, difference in enumerate((m.double() - e, t.double() - e, e)):
                sums[i] += float(difference.square().sum()) / n
    for name, (m, t, e) in pooled.items():
        # of a single number beyond that one rounding, which is all that its own error is
        rounding = 2.0**-24 if name in ("loss", "scale", "bias") else 0.1 * 2.0**-24
        mine, dense = math.sqrt(m / e), math.sqrt(t / e)
        assert mine <= 1.1 * dense + rounding, f"{name}: {mine:.2e}, dense {dense:.2e}"
        if confident:
            assert mine <= (1e-4 if dtype == torch.float32 else 4e-3), f"{name}: {mine:.2e}"


@pytest.mark.parametrize("engine", ENGINES)
def test_confident_pairs_keep_their_gradients(engine):
    """Losses about e^-60, where the dense form has nothing left."""
    image = F.normalize(torch.randn(50, 64)).requires_grad_()
    text = F.normalize(image.detach() + 1e-3 * torch.randn(50, 64)).requires_grad_()
    batch = Batch(image, text, torch.tensor(100.0, requires_grad=True), None, None, None, None)
    made = with_gradients(ours(batch, False, "both", "mean", engine=engine), batch.leaves)
    exact = batch.exact(False, "both", "mean")
    assert float(exact[0].detach()) < 1e-12
    assert max(relative(made, exact, 0.0)) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_reduction_none_gives_the_losses_that_are_averaged(engine):
    image, text = (F.normalize(torch.randn(19, 7, dtype=torch.float64)) for _ in range(2))
    positives = torch.randint(-1, 19, (19, 2))
    positives[0, 0] = 3
    both = bigclass.contrastive_loss(image, text, 5.0, reduction="none", engine=engine)
    assert both.shape == (19,)
    assert error(both.mean(), bigclass.contrastive_loss(image, text, 5.0, engine=engine)) < 1e-12
    for direction in ("image", "text"):
        some = bigclass.contrastive_loss(image, text, 5.0, positives=positives, direction=direction, reduction="none", engine=engine)
        whole = bigclass.contrastive_loss(image, text, 5.0, positives=positives, direction=direction, reduction="sum", engine=engine)
        assert some.shape == (19,) and error(some.sum(), whole) < 1e-12
    each = bigclass.sigmoid_contrastive_loss(image, text, 5.0, -3.0, reduction="none", engine=engine)
    assert each.shape == (19,)
    assert error(each.mean(), bigclass.sigmoid_contrastive_loss(image, text, 5.0, -3.0, engine=engine)) < 1e-12
    # row by row, not only in the sum
    s = 5.0 * image @ text.t()
    exact = (F.cross_entropy(s, torch.arange(19), reduction="none") + F.cross_entropy(s.t(), torch.arange(19), reduction="none")) / 2
    assert error(both, exact) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_reduction_none_with_hard_negatives_gives_the_pairs_losses(engine):
    image, text, hard = (F.normalize(torch.randn(n, 7, dtype=torch.float64)).requires_grad_() for n in (19, 19, 4))
    options = {"hard_negatives": hard, "engine": engine}
    each = bigclass.contrastive_loss(image, text, 5.0, reduction="none", **options)
    assert each.shape == (19,)
    made = with_gradients(each.mean(), (image, text, hard))
    whole = with_gradients(bigclass.contrastive_loss(image, text, 5.0, **options), (image, text, hard))
    assert max(error(a, b) for a, b in zip(made, whole, strict=True)) < 1e-12
    texts = bigclass.contrastive_loss(image, text, 5.0, direction="text", reduction="none", **options)
    assert texts.shape == (23,) and bool((texts[19:] == 0.0).all())


@pytest.mark.parametrize("engine", ENGINES)
def test_images_without_any_text_have_no_loss(engine):
    image, text = F.normalize(torch.randn(5, 7)).requires_grad_(), torch.zeros(0, 7, requires_grad=True)
    options = {"positives": torch.full((5, 2), -1), "reduction": "sum", "engine": engine}
    for loss in BOTH:
        made = with_gradients(loss(image, text, 5.0, **options), (image, text))
        assert float(made[0].detach()) == 0.0 and not made[1].any() and made[2].shape == (0, 7)


def test_telling_the_ignored_from_the_positives_takes_no_more_than_both():
    """Not one number for each pair of a positive and an ignored text."""
    n, k = 50, 60
    image, text = (F.normalize(torch.randn(rows, 4)) for rows in (n, 300))
    positives, ignore = (torch.randint(-1, 300, (n, k)) for _ in range(2))

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    with Largest() as largest:
        bigclass.contrastive_loss(image, text, 5.0, positives=positives, ignore=ignore, engine="tiled")
    assert largest.numel <= n * 300 + 1  # the one tile that there is


def test_every_sparse_form_of_positives_gives_the_same_loss():
    image, text = F.normalize(torch.randn(4, 6)), F.normalize(torch.randn(9, 6))
    padded = torch.tensor([[1, 8], [3, -1], [-1, -1], [0, 2]])
    pointers, indices = torch.tensor([0, 2, 3, 3, 5]), torch.tensor([1, 8, 3, 0, 2])
    sparse = torch.sparse_csr_tensor(pointers, indices, torch.ones(5), (4, 9))
    expected = bigclass.contrastive_loss(image, text, 10.0, positives=padded)
    assert torch.equal(bigclass.contrastive_loss(image, text, 10.0, positives=(pointers, indices)), expected)
    with pytest.raises(TypeError, match="without weights"):
        bigclass.contrastive_loss(image, text, 10.0, positives=sparse)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frozen_side_gets_no_gradient_and_the_other_is_unchanged(engine):
    image, text = (F.normalize(torch.randn(30, 8)) for _ in range(2))
    both = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    bigclass.contrastive_loss(*both, 20.0, engine=engine).backward()
    alone = image.clone().requires_grad_()
    bigclass.contrastive_loss(alone, text, 20.0, engine=engine).backward()
    assert torch.equal(alone.grad, both[0].grad) and text.grad is None


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_features_make_the_loss_nan_and_nothing_else_raises(engine):
    image, text = (F.normalize(torch.randn(9, 8)) for _ in range(2))
    image[3, 2] = math.nan
    assert math.isnan(bigclass.contrastive_loss(image, text, 20.0, engine=engine))
    assert math.isnan(bigclass.sigmoid_contrastive_loss(image, text, 20.0, -10.0, engine=engine))
    assert math.isnan(bigclass.contrastive_loss(image[:0], text[:0], 20.0, engine=engine))  # the mean of nothing, as in torch
    assert float(bigclass.contrastive_loss(image[:0], text[:0], 20.0, reduction="sum", engine=engine)) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_without_positives_is_no_part_of_the_images_direction_even_if_it_holds_nan(engine):
    image, text = (F.normalize(torch.randn(9, 8)) for _ in range(2))
    image[3, 2] = math.nan
    image, text = image.requires_grad_(), text.requires_grad_()
    positives = torch.arange(9)
    positives[3] = -1
    loss = bigclass.contrastive_loss(image, text, 20.0, positives=positives, direction="image", engine=engine)
    loss.backward()
    assert bool(loss.isfinite()) and bool(text.grad.isfinite().all()) and not bool(image.grad[3].any())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_negative_scale_tensor_is_used_as_it_is(engine):
    batch = Batch(*(F.normalize(torch.randn(9, 8, dtype=torch.float64)).requires_grad_() for _ in range(2)),
                  torch.tensor(-4.0, dtype=torch.float64, requires_grad=True), None, None, None, None)  # fmt: skip
    for sigmoid in (False, True):
        made = with_gradients(ours(batch, sigmoid, "both", "mean", engine=engine), batch.leaves)
        assert max(relative(made, batch.exact(sigmoid, "both", "mean"), 0.0)) < 1e-10


def test_the_same_bits_every_run_and_a_gradient_that_scales():
    image, text = (F.normalize(torch.randn(300, 32)).requires_grad_() for _ in range(2))
    first = with_gradients(bigclass.contrastive_loss(image, text, 30.0, engine="tiled"), (image, text))
    again = with_gradients(bigclass.contrastive_loss(image, text, 30.0, engine="tiled"), (image, text))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    scaled = torch.autograd.grad(bigclass.contrastive_loss(image, text, 30.0, engine="tiled") * 0.25, (image, text))
    assert all(error(a * 0.25, b) < 1e-6 for a, b in zip(first[1:], scaled, strict=True))


def test_under_autocast_products_are_in_bf16_and_sums_are_not():
    image, text = (F.normalize(torch.randn(200, 32)).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = bigclass.contrastive_loss(image, text, 30.0, engine="tiled")
    assert loss.dtype == torch.float32
    loss.backward()
    assert image.grad.dtype == torch.float32
    assert error(loss, bigclass.contrastive_loss(image, text, 30.0)) < 1e-2


@pytest.mark.parametrize("form", ["pairs", "several", "ignore", "sigmoid"])
def test_one_graph_under_compile(form):
    image, text = (F.normalize(torch.randn(60, 16)).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(3.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
    positives = torch.randint(-1, 60, (60, 2))

    def loss(image, text, scale, bias):
        if form == "sigmoid":
            return bigclass.sigmoid_contrastive_loss(image, text, scale.exp(), bias, engine="tiled")
        some = {"several": {"positives": positives}, "ignore": {"ignore": positives}}.get(form, {})
        return bigclass.contrastive_loss(image, text, scale.exp(), **some, engine="tiled")

    leaves = (image, text, scale) + ((bias,) if form == "sigmoid" else ())
    plain = with_gradients(loss(image, text, scale, bias), leaves)
    compiled = with_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager")(image, text, scale, bias), leaves)
    assert max(error(a, b) for a, b in zip(compiled, plain, strict=True)) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_one_graph_serves_batches_of_any_size(engine, sigmoid):
    def loss(image, text, scale):
        if sigmoid:
            return bigclass.sigmoid_contrastive_loss(image, text, scale, -5.0, engine=engine)
        return bigclass.contrastive_loss(image, text, scale, engine=engine)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for n in (12, 19, 7, 30):
        leaves = [*(F.normalize(torch.randn(n, 8)).requires_grad_() for _ in range(2)), torch.tensor(9.0, requires_grad=True)]
        plain, made = (with_gradients(f(*leaves), leaves) for f in (loss, compiled))
        assert max(error(a, b) for a, b in zip(made, plain, strict=True)) < 1e-5
    assert len(graphs) <= 2  # of the first size, then of all others


A, B = F.normalize(torch.randn(6, 5)), F.normalize(torch.randn(6, 5))
BOTH = (bigclass.contrastive_loss, bigclass.sigmoid_contrastive_loss)


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize(
    ("kind", "words", "arguments", "options"),
    [
        (ValueError, "text_features: expected 5 features", (A, torch.randn(6, 4), 1.0), {}),
        (ValueError, "text_features: expected 6 rows", (A, B[:3], 1.0), {}),
        (ValueError, "image_features: expected shape", (A[0], B, 1.0), {}),
        (ValueError, "image_features: expected at least one feature", (A[:, :0], B[:, :0], 1.0), {}),
        (TypeError, "image_features: expected a floating-point", (A.long(), B, 1.0), {}),
        (TypeError, "text_features: expected a tensor", (A, B.tolist(), 1.0), {}),
        (ValueError, "logit_scale: expected a finite number > 0", (A, B, -2.0), {}),
        (ValueError, "logit_scale: expected a finite number > 0", (A, B, math.nan), {}),
        (ValueError, "logit_scale: expected a number or", (A, B, torch.ones(2)), {}),
        (TypeError, "logit_scale: expected a number or", (A, B, "10"), {}),
        (ValueError, "logit_bias: expected a number or", (A, B, 1.0), {"logit_bias": torch.ones(6)}),
        (ValueError, "reduction: expected one of|reduction: expected", (A, B, 1.0), {"reduction": "avg"}),
        (IndexError, "positives: expected class indices in", (A, B, 1.0), {"positives": torch.full((6,), 6)}),
        (TypeError, "positives: expected indices of texts", (A, B, 1.0), {"positives": torch.eye(6)}),
        (ValueError, "ignore: expected shape", (A, B, 1.0), {"ignore": torch.zeros(6, dtype=torch.long)}),
        (IndexError, r"ignore: expected class indices in \[0, 6\), got 9", (A, B, 1.0), {"ignore": torch.full((6, 1), 9)}),
        (IndexError, "ignore: expected class indices", (A, B, 1.0), {"ignore": torch.full((6, 1), -2)}),
        (TypeError, "ignore: expected int64", (A, B, 1.0), {"ignore": torch.zeros(6, 1)}),
        (ValueError, "hard_negatives: expected 5 features", (A, B, 1.0), {"hard_negatives": torch.randn(3, 4)}),
        (ValueError, "text_features: expected rows of length 1", (A, 2 * B, 1.0), {"check_norms": True}),
        (ValueError, "exchange: expected one of", (A, B, 1.0), {"exchange": "broadcast"}),
        (ValueError, "engine: expected one of", (A, B, 1.0), {"engine": "triton"}),
        (ValueError, "group: torch.distributed is not initialised", (A, B, 1.0), {"group": object()}),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(loss, kind, words, arguments, options):
    with pytest.raises(kind, match=words):
        loss(*arguments, **options)


def test_bad_options_of_the_softmax_are_refused_by_name():
    with pytest.raises(ValueError, match="direction: expected one of"):
        bigclass.contrastive_loss(A, B, 1.0, direction="rows")
    with pytest.raises(ValueError, match="choose direction='image' or 'text'"):
        bigclass.contrastive_loss(A, B, 1.0, positives=torch.arange(6), reduction="none")


def test_double_backward_is_refused():
    image = A.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(bigclass.contrastive_loss(image, B, 1.0, engine="tiled"), image, create_graph=True)


@settings(max_examples=20)
@given(batch=batches(dtypes=(torch.float32,), most=30))
def test_the_dense_form_agrees_where_nothing_is_extreme(batch):
    assume(float(batch.scale.detach()) < 20.0)
    plain = batch.dense(False, "both", "mean")
    assert (
        error(ours(batch, False, "both", "mean"), plain) < 1e-4 or float((ours(batch, False, "both", "mean") - plain).detach().abs()) < 1e-5
    )

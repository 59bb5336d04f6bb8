"""The Triton form of every map and fold against the torch form beside it, and recipes from outside on the fused engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch

import bigclass
import bigclass.losses.folds
import bigclass.losses.margin_folds
from bigclass.core import Fold, LogSumExp, Map, Stream, SumFold, reduce_logits, register_fold, register_map
from bigclass.core.engines.support import fused_reason
from bigclass.core.folds import FOLDS
from bigclass.core.stream import MAPS
from bigclass.core.triton_form import triton_form
from bigclass.losses.one_vs_all import LOSSES
from tests.support import error

pytest.importorskip("triton", reason="Triton is not installed")

if TYPE_CHECKING:
    import triton.language as tl


@register_map
@dataclass(frozen=True, eq=False)
class Bent(Map):
    """s = a z + z^2 / 8: a map that reads its input for the gradient."""

    name: ClassVar[str] = "tests.bent"

    @staticmethod
    def forward(z, numbers, tensors, out=None):
        s = numbers[0] * z + z * z / 8
        return s if out is None else out.copy_(s)

    @staticmethod
    def backward(g, z, s, numbers, tensors):
        return g * (numbers[0] + z / 4)

    @triton_form
    def forward_triton(z, a):
        return a * z + z * z * 0.125

    @triton_form
    def backward_triton(g, z, s, a):
        return g * (a + z * 0.25)


@register_fold
@dataclass(frozen=True, eq=False)
class Hinge(SumFold):
    """sum_j c_j relu(r_i + a + s_ij)^2, of everything a fold may read: a row vector, a class vector, a number."""

    name: ClassVar[str] = "tests.fused_hinge"
    tensor_axes: ClassVar[tuple[str, ...]] = ("kept", "folded")

    @staticmethod
    def term(s, numbers, tensors):
        return tensors[1] * torch.relu(tensors[0] + numbers[0] + s).square()

    @staticmethod
    def slope(s, numbers, tensors):
        return 2.0 * tensors[1] * torch.relu(tensors[0] + numbers[0] + s)

    @triton_form
    def term_triton(s, r, c, a):
        u = tl.maximum(r + a + s, 0.0)
        return c * u * u

    @triton_form
    def slope_triton(s, r, c, a):
        return 2.0 * c * tl.maximum(r + a + s, 0.0)


@register_fold
@dataclass(frozen=True, eq=False)
class Largest(Fold):
    """max_j s_j with its gradient to the winner: a monoid that is no sum."""

    name: ClassVar[str] = "tests.fused_largest"
    differentiable: ClassVar[tuple[bool, ...]] = (True,)

    def identity(self, n, like):
        return (like.new_full((n, 1), -torch.inf),)

    def lift(self, tile, tensors):
        return (tile.logits(self.exclude_picks).amax(-1, keepdim=True),)

    def merge(self, a, b):
        return (torch.maximum(a[0], b[0]),)

    def gradient(self, tile, tensors, state, grads, out):
        return torch.mul(tile.logits(self.exclude_picks) == state[0], grads[0], out=out)

    @triton_form
    def lift_triton(s):
        return tl.max(s, axis=1)

    @triton_form
    def merge_triton(m, m2):
        return tl.maximum(m, m2)

    @triton_form
    def gradient_triton(s, m, g):
        return tl.where(s == m[:, None], g[:, None], 0.0)


# constants of the folds that have some
NUMBERS = {"tests.fused_hinge": (0.3,), "tempered_moment": (0.7,), "curricular": (50.0,), "grouped_logsumexp": (4.0,)}
for loss in LOSSES.values():
    options = tuple(loss.loss.options.values())
    NUMBERS |= {cls.name: options for cls in (*loss.negatives, *loss.dense)} | {cls.name: (0.3, *options) for cls in loss.floor}
WITHOUT_FORMS = {"topk", "grouped_topk"}
OWN = ("tests.fused_hinge", "tests.fused_largest")  # not those of other tests, which may have been imported before
WITH_FORMS = sorted(
    name
    for name, cls in FOLDS.items()
    if (name in OWN or not name.startswith("tests.")) and (cls.lift_triton or (issubclass(cls, SumFold) and cls.term_triton))
)
MAPS_WITH_FORMS = sorted(name for name, cls in MAPS.items() if cls.forward_triton)


def test_every_fold_and_map_of_the_library_has_a_triton_form_but_those_that_are_known_to_have_none():
    assert {name for name in FOLDS if "tests." not in name} - set(WITH_FORMS) == WITHOUT_FORMS
    assert {name for name in MAPS if "tests." not in name} <= set(MAPS_WITH_FORMS)


OF_LOSSES = {cls.name for loss in LOSSES.values() for cls in (*loss.negatives, *loss.floor, *loss.dense)}
# rows, classes, spread of the logits, are picks left out: on and off the ends of tiles, several tiles and merges, a row with no class left.
# Bounds grow with the logits: small ones show an error of 1e-4 in a term. One fold of a loss is as another but for its terms.
DRAWS = [(37, 70, 0.5, True), (66, 130, 40.0, False), (5, 150, 3.0, True), (1, 1, 3.0, True)]
CASES = [
    (name, tensors, axis, *drawn)
    for name in WITH_FORMS
    for tensors in ("all tensors", "fewest tensors")
    for axis in ("rows", "columns")
    for drawn in DRAWS[: 2 if name in OF_LOSSES else None]
    # class vectors are left out where that is possible; sums differ in nothing but their terms, so one of them stands for all on columns
    if (tensors == "all tensors" or name in ("total", "dot")) and (axis == "rows" or name not in OF_LOSSES or name == "bce_dense_weighted")
]


@pytest.mark.parametrize(
    ("name", "tensors", "axis", "n", "c", "spread", "exclude"), CASES, ids=[" ".join(map(str, case[:5])) for case in CASES]
)
def test_a_fold_and_its_gradient_are_those_of_the_torch_form(name, tensors, axis, n, c, spread, exclude):
    """State after many tiles and merges, and the gradient of a random upstream, both from the same logits."""
    seed = 31 * n + len(name)
    torch.manual_seed(seed)
    cls = FOLDS[name]
    group = cls(NUMBERS.get(name, ())).group
    if group > 1:  # of adjacent classes, along rows
        axis, c = "rows", -(-c // group) * group
    axes = (
        cls.tensor_axes if tensors == "all tensors" else tuple(a for a in cls.tensor_axes if name not in ("total", "dot") or a != "folded")
    )
    sizes = {"kept": (n,) if axis == "rows" else (c,), "folded": (c,) if axis == "rows" else (n,), "grid": (n, c)}
    fold = cls(NUMBERS.get(name, ()), tuple(torch.rand(sizes[a]) for a in axes), exclude, axis)
    x, w, picks = torch.randn(n, 3) * spread, torch.randn(c, 3), torch.randint(-1, c, (n, 2))
    x.requires_grad_()
    results = []
    for engine in ("fused", "tiled"):
        (state,), _ = reduce_logits(Stream(((x, w),)), picks, (fold,), engine=engine)
        torch.manual_seed(seed)
        parts = [t for t, d in zip(state, fold.differentiable, strict=True) if d]
        up = [torch.randn(t.shape) for t in parts]
        total = sum((t * u)[t.isfinite()].sum() for t, u in zip(parts, up, strict=True))
        results.append((state, torch.autograd.grad(total, x)[0] if total.requires_grad else torch.zeros_like(x)))
    (got, dx), (want, expected) = results
    scale = max(float((x.detach() @ w.t()).abs().max()), 1.0)
    for a, b in zip(got, want, strict=True):
        there = b.isfinite()
        assert torch.equal(a.isfinite(), there) and torch.allclose(a[there], b[there], rtol=2e-5 * scale, atol=1e-5 * scale)
    assert error(dx, expected) <= 2e-5 * scale or float((dx - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("name", MAPS_WITH_FORMS)
def test_a_map_and_its_gradient_are_those_of_the_torch_form(name):
    torch.manual_seed(0)
    z = torch.cat((torch.randn(900) * 5, torch.randn(900) * 1e-3, torch.tensor([0.0, -0.0, 1e30, -1e30])))
    m = MAPS[name]((1.7,))
    x, w = z[:, None].clone().requires_grad_(), torch.ones(1, 1)
    ((s,),), _ = reduce_logits(
        Stream(((x, w),), maps=(m,) if name != "scale" else (MAPS["softcap"]((9.0,)), m)), None, (Largest(),), engine="fused"
    )
    (g,) = torch.autograd.grad(s.sum(), x)
    exact = z.double().requires_grad_()
    if name == "scale":
        bent = 9.0 * torch.tanh(exact / 9.0) * 1.7
    else:
        bent = m.forward(exact, m.numbers, ())
    (want,) = torch.autograd.grad(bent.sum(), exact) if name != "tests.bent" else (1.7 + exact.detach() / 4,)
    there = bent.isfinite() & (bent.abs() < 1e29)
    assert float(((s.double() - bent).abs() / (bent.abs() + exact.abs() + 1e-30))[there].max()) < 5e-7
    assert float((g[:, 0].double() - want)[there].abs().max()) < 3e-6


@pytest.mark.parametrize("picks", [0, 1, 3])
def test_a_map_and_folds_from_outside_run_fused(picks):
    torch.manual_seed(0)
    n, c, d = 40, 200, 12
    x, w, b = (torch.randn(size, requires_grad=True) for size in ((n, d), (c, d), (c,)))
    y = torch.randint(-1, c, (n, picks)) if picks else None
    folds = (Hinge((0.5,), (torch.randn(n), torch.rand(c))), Largest(exclude_picks=True), LogSumExp())
    results = []
    for engine in ("fused", "tiled"):
        states, picked = reduce_logits(Stream(((x, w),), bias=b, maps=(Bent((0.7,)),)), y, folds, engine=engine)
        outputs = [states[0][0], states[1][0], states[2][1].log() + states[2][0]] + ([] if picked is None else [picked])
        total = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in outputs)
        results.append((*outputs, *torch.autograd.grad(total, (x, w, b))))
    for got, want in zip(*results, strict=True):
        assert error(got, want) < 1e-5


def test_what_has_no_triton_form_says_so():
    @register_fold
    @dataclass(frozen=True, eq=False)
    class Plain(SumFold):
        name: ClassVar[str] = "tests.plain"

        @staticmethod
        def term(s, numbers, tensors):
            return s.square()

        @staticmethod
        def slope(s, numbers, tensors):
            return 2.0 * s

    x, w = torch.randn(40, 3), torch.randn(50, 3)
    for stream, folds, words in [
        (Stream(((x, w),)), (Plain(),), "fold 'tests.plain' has no Triton form"),
        (Stream(((x, w),)), (FOLDS["topk"]((2.0,)),), "fold 'topk' has no Triton form"),
        (Stream(given=torch.randn(40, 50)), (LogSumExp(),), "one or two operand pairs, not 0"),
        (Stream(((x.double(), w.double()),)), (LogSumExp(),), "no float64 products"),
        (Stream(((x, w),), maps=(Bent((1.0,), (torch.ones(1, requires_grad=True),)),)), (LogSumExp(),), "'tests.bent' has a parameter"),
    ]:
        assert words in str(fused_reason(stream, folds))
        with pytest.raises(ValueError, match=f"engine: 'fused' cannot run this, for .*{words}.*engine='auto' would use '(dense|tiled)'"):
            reduce_logits(stream, None, folds, engine="fused")
        reduce_logits(stream, None, folds, engine="auto")


def test_without_triton_the_error_names_it(monkeypatch):
    monkeypatch.setattr("bigclass.core.engines.support.TRITON_IS_THERE", False)
    with pytest.raises(ValueError, match="'fused' cannot run this, for Triton is not installed"):
        bigclass.linear_cross_entropy(torch.randn(40, 3), torch.randn(50, 3), torch.zeros(40, dtype=torch.long), engine="fused")


def test_a_gpu_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    plan = bigclass.explain(8192, 128256, 4096, dtype=torch.bfloat16, device="cuda")
    assert plan.engine == "tiled" and "GPU compute capability 7.5 is below 8.0" in str(plan)
    with pytest.raises(ValueError, match=r"capability 7\.5"):
        bigclass.explain(8192, 128256, 4096, dtype=torch.bfloat16, device="cuda", engine="fused")


def test_the_custom_ops_pass_opcheck_and_compile_to_one_graph_on_the_fused_engine():
    from bigclass.core import custom_ops
    from bigclass.core.recipe import pack

    torch.manual_seed(0)
    x, w, y = torch.randn(9, 5, requires_grad=True), torch.randn(80, 5, requires_grad=True), torch.randint(80, (9,))
    recipe, numbers, tensors = pack(Stream(((x, w),)), (LogSumExp(exclude_picks=True),))
    torch.library.opcheck(custom_ops.fold_op, (tensors, y[:, None], None, recipe, numbers, f"fused,recompute,{1 << 20},0", [True, True]))

    def loss(x, w):
        return bigclass.linear_cross_entropy(x, w, y, engine="fused", z_loss=0.1)

    want = torch.autograd.grad(loss(x, w), (x, w))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w), (x, w))
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-6

"""Bad input: an error of the right type that names the argument, what was expected and what came. Never a silent number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bigclass
from tests.support import ROADS

N, C, D = 6, 11, 5
CE, LSE, LOGP, TOPK = bigclass.linear_cross_entropy, bigclass.linear_logsumexp, bigclass.linear_log_prob, bigclass.linear_topk
ENGINES = ("dense", "tiled", "auto")

X, W, B, Y = torch.randn(N, D), torch.randn(C, D), torch.randn(C), torch.arange(N)
P = torch.full((N, C), 1 / C)
WK = torch.randn(C, 2, D)  # a K-dimensional weight
META = torch.device("meta")


def call(function, **given):
    """function with good arguments but for those given."""
    arguments = {"input": X, "linear_weight": W}
    arguments |= {CE: {"target": Y}, LOGP: {"index": Y}, TOPK: {"k": 2}}.get(function, {})
    return function(**(arguments | given))


def refused(types, words, function, **given):
    """The error of a bad call: caught by each of `types`, its message starting with the first of `words` and holding them all."""
    with pytest.raises(types[0]) as caught:
        call(function, **given)
    for kind in types:
        assert isinstance(caught.value, kind), f"{caught.type.__mro__} cannot be caught as {kind}"
    message = str(caught.value)
    assert message.startswith(words[0]), message
    for word in words[1:]:
        assert word in message, f"{word!r} is not in: {message}"
    return caught.value


VALUE, TYPE = (ValueError, RuntimeError), (TypeError, RuntimeError)

# name: (types, (the argument, what was expected, what came), arguments)
LINEAR = {
    "input a list": (TYPE, ("input", "tensor", "list"), {"input": [1.0]}),
    "input a scalar": (VALUE, ("input", "(..., D)", "scalar"), {"input": torch.tensor(1.0)}),
    "input int": (TYPE, ("input", "floating-point", "torch.int64"), {"input": X.long()}),
    "input complex": (TYPE, ("input", "floating-point", "torch.complex64"), {"input": X.cfloat()}),
    "features differ": (VALUE, ("linear_weight", "5", "4"), {"linear_weight": W[:, :4]}),
    "weights 1-D": (VALUE, ("linear_weight", "(C, D)", "(5,)"), {"linear_weight": W[0]}),
    "weights None": (TYPE, ("linear_weight", "tensor", "NoneType"), {"linear_weight": None}),
    "weights int": (TYPE, ("linear_weight", "floating-point", "torch.int32"), {"linear_weight": W.int()}),
    "weights elsewhere": (VALUE, ("linear_weight", "cpu", "meta"), {"linear_weight": W.to(META)}),
    "no class": (VALUE, ("linear_weight", "at least one class", "(0, 5)"), {"linear_weight": W[:0]}),
    "no feature": (VALUE, ("linear_weight", "one feature", "(11, 0)"), {"input": X[:, :0], "linear_weight": W[:, :0]}),
    "bias too long": (VALUE, ("linear_bias", "(11,)", "(12,)"), {"linear_bias": torch.zeros(C + 1)}),
    "bias 2-D": (VALUE, ("linear_bias", "(11,)", "(11, 1)"), {"linear_bias": B[:, None]}),
    "bias int": (TYPE, ("linear_bias", "floating-point", "torch.int64"), {"linear_bias": B.long()}),
    "bias elsewhere": (VALUE, ("linear_bias", "cpu", "meta"), {"linear_bias": B.to(META)}),
    "softcap 0": (VALUE, ("softcap", "greater than 0", "0.0"), {"softcap": 0.0}),
    "softcap -1": (VALUE, ("softcap", "greater than 0", "-1"), {"softcap": -1}),
    "softcap NaN": (VALUE, ("softcap", "greater than 0", "nan"), {"softcap": float("nan")}),
    "softcap inf": (VALUE, ("softcap", "inf"), {"softcap": float("inf")}),
    "scale a vector": (VALUE, ("logit_scale", "()", "(2,)"), {"logit_scale": torch.ones(2)}),
    "scale int": (VALUE, ("logit_scale", "floating-point", "torch.int64"), {"logit_scale": torch.tensor(2)}),
    "scale elsewhere": (VALUE, ("logit_scale", "cpu", "meta"), {"logit_scale": torch.ones((), device=META)}),
    "engine unknown": (VALUE, ("engine", "'dense'", "'fast'"), {"engine": "fast"}),
    "engine None": (VALUE, ("engine", "'dense'", "None"), {"engine": None}),
}


@pytest.mark.parametrize("function", [CE, LSE, LOGP, TOPK], ids=lambda f: f.__name__)
def test_the_fused_engine_is_refused_where_no_triton_kernel_runs(function, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(VALUE, ("engine", "fused", "auto"), function, engine="fused")


@pytest.mark.parametrize("function", [CE, LSE, LOGP, TOPK], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR.keys())
def test_a_layer_that_does_not_fit_is_refused_by_every_function(case, function):
    types, words, given = case
    refused(types, words, function, **given)


@pytest.mark.parametrize("function", [LSE, LOGP, TOPK], ids=lambda f: f.__name__)
def test_k_dimensional_weights_are_for_cross_entropy_alone(function):
    refused(VALUE, ("linear_weight", "(C, D)", "(11, 2, 5)"), function, linear_weight=WK)


LOSS = {
    "target a list": (TYPE, ("target", "tensor", "list"), {"target": [0] * N}),
    "target None": (TYPE, ("target", "tensor", "NoneType"), {"target": None}),
    "target too short": (VALUE, ("target", "(6,)", "(5,)"), {"target": Y[1:]}),
    "target 2-D": (VALUE, ("target", "(6,)", "(6, 1)"), {"target": Y[:, None]}),
    "target of other leading axes": (VALUE, ("target", "(2, 3)", "(6,)"), {"input": X.view(2, 3, D)}),
    "target float": (TYPE, ("target", "int64", "torch.float32"), {"target": Y.float()}),
    "target bool": (TYPE, ("target", "int64", "torch.bool"), {"target": Y.bool()}),
    "target int16": (TYPE, ("target", "int64", "torch.int16"), {"target": Y.short()}),
    "target elsewhere": (VALUE, ("target", "cpu", "meta"), {"target": Y.to(META)}),
    "probabilities elsewhere": (VALUE, ("target", "cpu", "meta"), {"target": P.to(META)}),
    "probabilities int": (TYPE, ("target", "floating-point", "torch.int64"), {"target": P.long()}),
    "probabilities of C + 1": (VALUE, ("target", "(6, 11)", "(6, 12)"), {"target": torch.rand(N, C + 1)}),
    "probabilities ignored": (VALUE, ("ignore_index", "probabilities"), {"target": P, "ignore_index": -100}),
    "probabilities shifted": (VALUE, ("shift", "indices"), {"target": P, "shift": 1}),
    "K-dimensional, unbatched": (VALUE, ("input", "(N, D)", "(5,)"), {"input": X[0], "linear_weight": WK}),
    "K-dimensional, leading axes": (
        VALUE,
        ("input", "(N, D)", "(2, 3, 5)"),
        {"input": X.view(2, 3, D), "linear_weight": WK},
    ),
    "K-dimensional target": (VALUE, ("target", "(6, 2)", "(6,)"), {"linear_weight": WK}),
    "K-dimensional bias": (VALUE, ("linear_bias", "(11, 2)", "(11,)"), {"linear_weight": WK, "linear_bias": B}),
    "K-dimensional shift": (
        VALUE,
        ("shift", "K-dim"),
        {"linear_weight": WK, "target": torch.stack((Y, Y), 1), "shift": 1},
    ),
    "K-dimensional, no position": (
        VALUE,
        ("linear_weight", "at least one", "(11, 0, 5)"),
        {"linear_weight": W[:, None][:, :0], "target": Y[:, None][:, :0]},
    ),
    "class weights too long": (VALUE, ("weight", "(11,)", "(12,)"), {"weight": torch.ones(C + 1)}),
    "class weights 2-D": (VALUE, ("weight", "(11,)", "(11, 1)"), {"weight": torch.ones(C, 1)}),
    "class weights a list": (TYPE, ("weight", "tensor", "list"), {"weight": [1.0] * C}),
    "class weights int": (TYPE, ("weight", "floating-point", "torch.int64"), {"weight": torch.ones(C).long()}),
    "class weights learnt": (VALUE, ("weight", "constants", "detach"), {"weight": torch.ones(C, requires_grad=True)}),
    "class weights elsewhere": (VALUE, ("weight", "cpu", "meta"), {"weight": torch.ones(C, device=META)}),
    "reduction unknown": (VALUE, ("reduction", "'mean'", "'avg'"), {"reduction": "avg"}),
    "reduction None": (VALUE, ("reduction", "'mean'", "None"), {"reduction": None}),
    "smoothing below 0": (VALUE, ("label_smoothing", "[0, 1]", "-0.1"), {"label_smoothing": -0.1}),
    "smoothing above 1": (VALUE, ("label_smoothing", "[0, 1]", "1.5"), {"label_smoothing": 1.5}),
    "smoothing NaN": (VALUE, ("label_smoothing", "[0, 1]", "nan"), {"label_smoothing": float("nan")}),
    "z-loss negative": (VALUE, ("z_loss", ">= 0", "-1e-05"), {"z_loss": -1e-5}),
    "z-loss NaN": (VALUE, ("z_loss", ">= 0", "nan"), {"z_loss": float("nan")}),
    "shift negative": (VALUE, ("shift", ">= 0", "-1"), {"shift": -1}),
    "shift float": (VALUE, ("shift", "integer", "1.0"), {"shift": 1.0}),
    "shift of a single row": (VALUE, ("shift", "(..., T, D)"), {"input": X[0], "target": Y[0], "shift": 1}),
    "filter 0": (VALUE, ("grad_filter", "None", "between 0 and 1", "0.0"), {"grad_filter": 0.0}),
    "filter negative": (VALUE, ("grad_filter", "between 0 and 1", "-0.1"), {"grad_filter": -0.1}),
    "filter 1": (VALUE, ("grad_filter", "between 0 and 1", "1.0"), {"grad_filter": 1.0}),
    "filter NaN": (VALUE, ("grad_filter", "between 0 and 1", "nan"), {"grad_filter": float("nan")}),
    "filter a string": (TYPE, ("grad_filter", "number", "'auto'"), {"grad_filter": "auto"}),
    "filter True": (TYPE, ("grad_filter", "number", "True"), {"grad_filter": True}),
    "filter a tensor": (TYPE, ("grad_filter", "number", "tensor"), {"grad_filter": torch.tensor(0.1)}),
    "filter below rounding": (VALUE, ("grad_filter", "float32", "cannot be promised", "None"), {"grad_filter": 2.0**-25}),
    "filter of probabilities": (VALUE, ("grad_filter", "dense target", "None"), {"target": P, "grad_filter": 0.1}),
    "filter, K-dimensional stats": (
        VALUE,
        ("return_stats", "grad_filter"),
        {"linear_weight": WK, "target": torch.stack((Y, Y), 1), "grad_filter": 0.1, "return_stats": True},
    ),
}


@pytest.mark.parametrize("case", LOSS.values(), ids=LOSS.keys())
def test_cross_entropy_refuses_what_does_not_fit(case):
    types, words, given = case
    refused(types, words, CE, **given)


PICKS = {
    "temperature 0": (VALUE, ("temperature", "greater than 0", "0"), LOGP, {"temperature": 0}),
    "temperature negative": (VALUE, ("temperature", "greater than 0", "-0.5"), LOGP, {"temperature": -0.5}),
    "temperature NaN": (VALUE, ("temperature", "greater than 0", "nan"), LOGP, {"temperature": float("nan")}),
    "k 0": (VALUE, ("k", "1 <= k <= 11", "0"), TOPK, {"k": 0}),
    "k negative": (VALUE, ("k", "1 <= k <= 11", "-1"), TOPK, {"k": -1}),
    "k above C": (VALUE, ("k", "1 <= k <= 11", "12"), TOPK, {"k": C + 1}),
    "k float": (TYPE, ("k", "integer", "2.0"), TOPK, {"k": 2.0}),
} | {
    f"{function.__name__}, index {name}": (types, ("index", *words), function, {"index": index})
    for function in (LSE, LOGP)
    for name, types, words, index in (
        ("a list", TYPE, ("tensor", "list"), [0] * N),
        ("float", TYPE, ("int64", "torch.float32"), Y.float()),
        ("too short", VALUE, ("(6,)", "(5,)"), Y[1:]),
        ("too deep", VALUE, ("(6,) + (K,)", "(6, 1, 1)"), Y[:, None, None]),
        ("elsewhere", VALUE, ("cpu", "meta"), Y.to(META)),
    )
}


@pytest.mark.parametrize("case", PICKS.values(), ids=PICKS.keys())
def test_temperature_k_and_index_are_checked(case):
    types, words, function, given = case
    refused(types, words, function, **given)


# --- a class outside [0, C) -----------------------------------------------------------------------------------------------------


def with_one(value: int, dtype: torch.dtype) -> torch.Tensor:
    y = Y.to(dtype).clone()
    y[2] = value
    return y


@pytest.mark.parametrize("road", (*ROADS, ("auto", "auto")), ids="-".join)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("value, ignore", [(C, None), (-1, None), (-1, 3), (-100, 3), (C, -1), (2**31 - 1, None), (-(2**31), None)])
def test_a_target_outside_the_classes_is_an_index_error(road, dtype, reduction, value, ignore):
    """Pitfall 10."""
    engine, gradients = road
    with bigclass.planning(gradients=gradients):
        given = {"target": with_one(value, dtype), "ignore_index": ignore, "engine": engine, "reduction": reduction}
        refused((IndexError,), ("target", f"[0, {C})", str(value)), CE, input=X.clone().requires_grad_(), **given)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value, ignore", [(C, None), (-1, None), (-100, 3)])
def test_a_shifted_or_k_dimensional_target_is_checked_too(engine, value, ignore):
    given = {"target": with_one(value, torch.int64), "ignore_index": ignore, "engine": engine}
    refused((IndexError,), ("target", f"[0, {C})"), CE, shift=1, **given)
    given["target"] = given["target"][:, None].expand(-1, 2)
    refused((IndexError,), ("target", f"[0, {C})"), CE, **given, linear_weight=WK)


def test_a_target_that_the_shift_drops_is_not_looked_at():
    y = Y.clone()
    y[0] = C + 5
    assert torch.isfinite(CE(X, W, y, shift=1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("function, value", [(LSE, C), (LSE, -2), (LOGP, C), (LOGP, -1)])
def test_an_index_outside_the_classes_is_an_index_error(engine, dtype, function, value):
    index = with_one(value, dtype)
    refused((IndexError,), ("index", f"[0, {C})", str(value)), function, index=index, engine=engine)
    refused((IndexError,), ("index", f"[0, {C})", str(value)), function, index=torch.stack((Y.to(dtype), index), -1), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", [CE, LSE, LOGP], ids=lambda f: f.__name__)
def test_a_class_outside_is_an_error_inside_a_compiled_graph(engine, function):
    """Pitfall 15. The graph's own check names the range; in a dense graph it is the gather's."""
    torch._dynamo.reset()
    graph = torch.compile(
        lambda y: function(X, W, y, engine=engine) if function is not LSE else LSE(X, W, index=y, engine=engine), backend="aot_eager"
    )
    graph(Y)
    for value in (C, -2):
        with pytest.raises((IndexError, RuntimeError), match=r"\[0, 11\)|out of bounds"):
            graph(with_one(value, torch.int64))


# --- torch's own errors ---------------------------------------------------------------------------------------------------------

AS_TORCH = (
    "features differ", "weights 1-D", "input a scalar", "bias too long", "bias 2-D", "probabilities ignored", "probabilities int",
    "target too short", "target float", "K-dimensional, unbatched", "K-dimensional target", "K-dimensional bias", "class weights too long",
    "class weights 2-D", "class weights int", "reduction unknown", "smoothing above 1", "target elsewhere", "input int",
)  # fmt: skip


@pytest.mark.parametrize("name", AS_TORCH)
def test_an_except_written_for_torch_catches_ours(name):
    given = (LINEAR | LOSS)[name][2]
    with pytest.raises(Exception) as theirs:
        call(F.linear_cross_entropy, **({"target": Y} | given))
    with pytest.raises(theirs.type):
        call(CE, **given)


@pytest.mark.parametrize("value, ignore", [(C, None), (-1, None), (-100, 3)])
def test_an_except_written_for_torch_catches_a_wrong_target(value, ignore):
    with pytest.raises(IndexError):
        F.linear_cross_entropy(X, W, with_one(value, torch.int64), ignore_index=ignore)


# --- planner and explain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [({"workspace": 1000}, ("workspace", "1000")), ({"gradients": "both"}, ("gradients", "'both'"))])
def test_planning_refuses_unknown_settings_and_leaves_the_old_ones(given, words):
    before = bigclass.core.plan.settings()
    with pytest.raises(ValueError, match=".*".join(words)), bigclass.planning(**given):
        pass
    assert bigclass.core.plan.settings() is before


def test_a_failed_call_leaves_operands_and_settings_as_they_were():
    x, before = X.clone().requires_grad_(), bigclass.core.plan.settings()
    with pytest.raises(IndexError), bigclass.planning(gradients="recompute"):
        CE(x, W, with_one(C, torch.int64), engine="tiled")
    assert x.grad is None and bigclass.core.plan.settings() is before

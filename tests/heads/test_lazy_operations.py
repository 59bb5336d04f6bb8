"""Lazy logits under everything that is not a loss: what stays lazy is right and silent, what does not says so, nothing is lost quietly."""

from __future__ import annotations

import copy
import linecache
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from bigclass.heads.lazy import LazyLogits, LogitsWarning
from tests.heads.lazy_support import ENGINES, check, dense_logits, features, make_head, small_workspace
from tests.support import error

C = 12
LEAD = (3, 4)
every_engine = pytest.mark.parametrize("engine", ENGINES)


def lse(s):
    return s.logsumexp(-1)


def scalar(v, *shape):
    return torch.full(shape, v, dtype=torch.float64)


# --- arithmetic

NUMBERS = {
    "times": lambda s: s * 2.5,
    "from the left": lambda s: 2 * s,
    "over": lambda s: s / 0.7,
    "plus": lambda s: s + 1.5,
    "minus": lambda s: s - 3,
    "left plus": lambda s: 0.5 + s,
    "negated": lambda s: -s,
    "negative": torch.neg,
    "mul": lambda s: torch.mul(s, 3.0),
    "div": lambda s: torch.div(s, 4.0),
    "add": lambda s: torch.add(s, 1.0),
    "sub": lambda s: torch.sub(s, 1.0),
    "method": lambda s: s.mul(2.0),
    "tanh": torch.tanh,
    "softcap": lambda s: 3.0 * torch.tanh(s / 3.0),
    "scaled, shifted, capped": lambda s: torch.tanh((s * 2 + 1) / 5) * 5,
    "two caps": lambda s: (s.tanh() * 2).tanh(),
    "cap, then negated": lambda s: -(s.tanh() * 4.0),
    "clone": lambda s: s.clone(),
    "zero": lambda s: s * 0.0 + s.tanh().shape[0],
    "contiguous": lambda s: s.contiguous(),
}


@every_engine
@pytest.mark.parametrize("name", NUMBERS)
def test_arithmetic_with_numbers(name, engine):
    head, x = make_head(C, engine=engine), features(*LEAD)
    streams = name != "zero"  # s * 0 + 1: no bias can say that
    check(lambda s: lse(NUMBERS[name](s)), head, x, streams=streams)
    y = torch.randint(C, (12,), generator=torch.Generator().manual_seed(0))
    check(lambda s: F.cross_entropy(NUMBERS[name](s).reshape(-1, C), y), head, x, streams=streams)
    check(NUMBERS[name], head, x, streams=streams)


TENSORS = {
    "times": (lambda s, a: s * a, ()),
    "times one": (lambda s, a: s * a, (1,)),
    "from the left": (lambda s, a: a * s, ()),
    "over": (lambda s, a: s / a, ()),
    "exp": (lambda s, a: a.exp() * s, ()),
    "twice": (lambda s, a: (s * a) * a, ()),
    "plus": (lambda s, a: s + a, ()),
    "minus": (lambda s, a: s - a, (1,)),
    "class vector": (lambda s, b: s + b, (C,)),
    "class vector from the left": (lambda s, b: b + s, (C,)),
    "minus a class vector": (lambda s, b: s - b, (C,)),
    "class row": (lambda s, b: s + b, (1, C)),
    "after a scale": (lambda s, b: s * -3.0 + b, (C,)),
    "cap, scale": (lambda s, a: s.tanh() * a, ()),
    "in place": (lambda s, a: _in_place(s, a), ()),
}


def _in_place(s, a):
    s *= 2.0
    s += a
    s /= 3.0
    s -= 1.0
    return s


@every_engine
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("needs", [False, True])
def test_arithmetic_with_tensors_that_may_need_gradients(name, engine, needs):
    operation, shape = TENSORS[name]
    head, x = make_head(C, engine=engine), features(*LEAD)
    a = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).add_(0.5).requires_grad_(needs)
    operation_lse = lambda s, a: lse(operation(s if isinstance(s, LazyLogits) else s.clone(), a))  # noqa: E731
    check(operation_lse, head, x, (a,), tol=2e-12)


ANYTHING = {
    "softmax": lambda s: s.softmax(-1),
    "relu": F.relu,
    "exp": torch.exp,
    "pow": lambda s: s**2,
    "reversed": lambda s: 1.0 - s,
    "reciprocal": lambda s: 1.0 / (s * s + 1),
    "comparison": lambda s: (s > 0).double(),
    "concatenated": lambda s: torch.cat([s, s], 0),
    "stacked": lambda s: torch.stack((s, -s)),
    "sum": lambda s: s.sum(),
    "mean over rows": lambda s: s.mean(0),
    "rows' vector": lambda s: s + torch.arange(4.0)[:, None].double(),
    "matmul": lambda s: s @ torch.ones(C, 2, dtype=torch.float64),
    "times itself": lambda s: s * s,
    "plus itself": lambda s: s + s,
    "abs": abs,
    "masked": lambda s: s.masked_fill(s < 0, -1.0),
    "where": lambda s: torch.where(s > 0, s, torch.zeros_like(s)),
    "class axis first": lambda s: s.reshape(-1, C).t(),
    "one class": lambda s: s[..., 3],
    "class index": lambda s: s[:, :, [0, 3]],
    "flat": lambda s: s.reshape(-1),
    "new axis": lambda s: s[..., None],
    "every axis": lambda s: s.permute(2, 0, 1),
    "max of two": lambda s: torch.max(s, torch.zeros_like(s)),
    "max of all": lambda s: s.max(),
    "two, lazy second": lambda s: torch.maximum(torch.zeros(C, dtype=torch.float64), s),
    "smallest": lambda s: s.topk(2, largest=False)[0],
    "lse of rows": lambda s: s.logsumexp(0),
    "log-softmax of rows": lambda s: F.log_softmax(s, 0),
    "bias after a cap": lambda s: s.tanh() + 1.0,
    "weighted": lambda s: F.log_softmax(s, -1) * torch.arange(4.0)[:, None].double(),
    "nll over axes": lambda s: F.cross_entropy(s, torch.zeros(3, C, dtype=torch.long)),
}


@pytest.mark.parametrize("name", ANYTHING)
def test_anything_else_is_written_out_with_a_warning_and_right(name):
    head, x = make_head(C), features(*LEAD)
    with pytest.warns(LogitsWarning, match="needs the logits themselves"):
        ANYTHING[name](head(x))
    check(ANYTHING[name], head, x, streams=False)


# --- axes

AXES = {
    "rows": lambda s: s[1:],
    "every other": lambda s: s[:, ::2],
    "one": lambda s: s[1],
    "last": lambda s: s[-1, -2],
    "shifted": lambda s: s[..., :-1, :],
    "mask": lambda s: s[torch.tensor([True, False, True])],
    "mask of two axes": lambda s: s[torch.arange(12).view(3, 4) % 3 > 0],
    "index": lambda s: s[torch.tensor([2, 0, 2])],
    "list": lambda s: s[[2, 0]],
    "pairs": lambda s: s[torch.tensor([2, 0]), torch.tensor([1, 3])],
    "new axis": lambda s: s[None],
    "new axis inside": lambda s: s[:, None, 1:],
    "classes": lambda s: s[..., :7],
    "every third class": lambda s: s[:, :, 1::3],
    "rows and classes": lambda s: s[1, :, 2:9],
    "mask and classes": lambda s: s[torch.tensor([True, False, True]), :, :5],
    "everything": lambda s: s[...],
    "view": lambda s: s.view(-1, C),
    "view of axes": lambda s: s.view(2, 6, C),
    "reshape": lambda s: torch.reshape(s, (4, 3, -1)),
    "reshaped by a tensor": lambda s: s.reshape_as(torch.empty(6, 2, C)),
    "flatten": lambda s: s.flatten(0, 1),
    "flat": lambda s: torch.flatten(s, 0, -2),
    "permuted": lambda s: s.permute(1, 0, 2),
    "transposed": lambda s: s.transpose(0, 1),
    "swapped": lambda s: torch.swapaxes(s, -2, 0),
    "moved": lambda s: s.movedim(0, 1),
    "permuted and viewed": lambda s: s.transpose(0, 1).reshape(-1, C),
    "split": lambda s: s.split(3, 1)[1],
    "split in sizes": lambda s: torch.split(s, [1, 2])[1],
    "split by keyword": lambda s: torch.split(s, split_size_or_sections=2, dim=1)[0],
    "chunk": lambda s: s.chunk(3)[2],
    "chunks": lambda s: torch.chunk(s, 3, dim=1)[1],
    "unbound": lambda s: s.unbind(1)[3],
    "iterated": lambda s: list(s)[1],
    "narrow": lambda s: s.narrow(1, 1, 2),
    "narrow from the end": lambda s: s.narrow(1, -2, 2),
    "narrow classes": lambda s: torch.narrow(s, -1, 3, 4),
    "select": lambda s: s.select(1, 2),
    "unsqueezed": lambda s: s.unsqueeze(1),
    "squeezed": lambda s: s[:1].squeeze(0),
    "squeeze all": lambda s: s[:, :1].squeeze(),
    "detached": lambda s: s.detach()[0],
    "no rows": lambda s: s[:0],
}


@pytest.mark.parametrize("name", AXES)
def test_axes_are_moved_without_a_logit(name):
    head, x = make_head(C), features(*LEAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = AXES[name](head(x))
    assert isinstance(made, LazyLogits) and made.shape == AXES[name](dense_logits(head, x)[0]).shape
    check(lambda s: lse(AXES[name](s)), head, x)
    check(AXES[name], head, x)


steps = st.sampled_from(
    [
        lambda s: s[..., 1:, :] if s.dim() > 1 and s.shape[-2] > 1 else s,
        lambda s: s.flatten(0, -2) if s.dim() > 2 else s,
        lambda s: s.unsqueeze(0),
        lambda s: s[0] if s.dim() > 2 else s,
        lambda s: s * 1.5,
        lambda s: s.transpose(0, 1) if s.dim() > 2 else s,
        lambda s: s[..., :9] if s.shape[-1] > 9 else s,
        lambda s: s + 0.5,
        lambda s: s.tanh() * 3,
        lambda s: s.reshape(-1, s.shape[-1]),
        lambda s: -s,
        lambda s: s.chunk(2)[0],
    ]
)


@settings(max_examples=60)
@given(chain=st.lists(steps, max_size=6), engine=st.sampled_from(ENGINES), c=st.sampled_from([11, 4000]))
def test_chains_of_operations(chain, engine, c):
    head, x = make_head(c, engine=engine), features(*LEAD)

    def operation(s):
        for step in chain:
            s = step(s)
        return lse(s)

    with small_workspace():
        check(operation, head, x, streams=False, tol=4e-12)


def test_shape_and_dtype_are_those_of_the_tensor_and_cost_nothing():
    head, x = make_head(C, dtype=torch.float32), features(*LEAD, dtype=torch.float32)
    with bigclass.planning(logits_limit=0):
        s, real = head(x), dense_logits(head, x, torch.float32)[0]
        for ask in (
            lambda t: t.shape,
            lambda t: t.size(),
            lambda t: t.size(-1),
            lambda t: t.dim(),
            lambda t: t.ndim,
            lambda t: t.dtype,
            lambda t: t.device,
            lambda t: len(t),
            lambda t: t.numel(),
            lambda t: t.nelement(),
            lambda t: torch.numel(t),
            lambda t: t.is_floating_point(),
            lambda t: torch.is_floating_point(t),
            lambda t: t.element_size(),
            lambda t: t.is_cuda,
            lambda t: t.is_contiguous(),
            lambda t: t.requires_grad,
            lambda t: t.get_device(),
            lambda t: t.layout,
            lambda t: t.is_sparse,
            lambda t: t.is_cpu,
            lambda t: t.is_complex(),
            lambda t: torch.zeros_like(t),
            lambda t: torch.full_like(t, 2.0),
            lambda t: t.new_zeros(3),
            lambda t: t.new_tensor([1.0]),
            lambda t: torch.ones(3).double().to(t),
            lambda t: torch.ones(3).type_as(t),
            lambda t: torch.zeros(144).view_as(t),
            lambda t: torch.zeros(1, 1, C).expand_as(t),
            lambda t: torch.result_type(t, 1.0),
            lambda t: t.detach().requires_grad,
            lambda t: (t == None, t != None),  # noqa: E711
        ):
            mine, exact = ask(s), ask(real)
            assert torch.equal(mine, exact) and mine.dtype == exact.dtype if isinstance(exact, torch.Tensor) else mine == exact
        assert repr(s) == "LazyLogits(shape=(3, 4, 12), dtype=torch.float32, device=cpu)"
        with pytest.raises(AttributeError):
            _ = s.no_such_thing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_casts_change_the_dtype_of_what_comes_out(dtype):
    head, x = make_head(C, dtype=torch.float32), features(5, dtype=torch.float32)
    y = torch.arange(5)
    name = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float", torch.float64: "double"}[dtype]
    real, _ = dense_logits(head, x)
    for cast in (
        lambda s: s.to(dtype),
        lambda s: getattr(s, name)(),
        lambda s: s.type(dtype),
        lambda s: s.to("cpu", dtype),
        lambda s: s.to(dtype=dtype),
        lambda s: s.type_as(torch.empty((), dtype=dtype)),
        lambda s: s.to(torch.empty((), dtype=dtype)),
    ):
        s = cast(head(x))
        assert isinstance(s, LazyLogits) and s.dtype == dtype and s.materialize().dtype == dtype
        loss = F.cross_entropy(s, y)
        assert loss.dtype == (dtype if dtype.itemsize >= 4 else torch.float32)
        assert error(loss, F.cross_entropy(real, y)) < 1e-6
        assert s.argmax(-1).dtype == torch.int64 and s.topk(2)[0].dtype == dtype
    for whole in (lambda s: s.long(), lambda s: s.to(torch.int64), lambda s: s.type(torch.int64)):
        with pytest.warns(LogitsWarning):
            assert torch.equal(whole(head(x)), whole(F.linear(x, head.weight, head.bias)))
    assert head(x).cpu().shape == (5, C) and isinstance(head(x).cpu(), LazyLogits)


@every_engine
def test_predictions_are_streamed(engine):
    head, x = make_head(3000, engine=engine), features(*LEAD)
    real, _ = dense_logits(head, x)
    with small_workspace(), bigclass.planning(logits_limit=0):
        s = head(x)
        assert torch.equal(s.argmax(-1), real.argmax(-1)) and torch.equal(torch.argmax(input=s, dim=2, keepdim=True), real.argmax(2, True))
        for mine, exact in ((s.topk(5), real.topk(5)), (torch.topk(s, 5, 2, True, True), real.topk(5)), (s.max(-1), real.max(-1))):
            assert torch.equal(mine.indices, exact.indices) and error(mine.values, exact.values) < 1e-12
        values, indices = s.max(dim=-1, keepdim=True)
        assert values.shape == indices.shape == (3, 4, 1)
        assert not s.argmax(-1).requires_grad and s.max(-1)[0].requires_grad and not s.detach().topk(2)[0].requires_grad
        correct = (s.argmax(-1) == real.argmax(-1)).float().mean()  # a training loop's accuracy
        assert correct == 1.0


# --- nothing is lost quietly


def test_what_is_written_out_is_written_once_and_the_warning_says_what_where_and_how_large():
    head, x = make_head(C, dtype=torch.float32), features(*LEAD, dtype=torch.float32)
    s = head(x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        first = s.softmax(-1)
        second, third = torch.exp(s), s.sum()
    assert len(seen) == 1 and first.shape == second.shape == (3, 4, C) and third.dim() == 0
    assert seen[0].category is LogitsWarning and seen[0].filename == __file__
    assert all(words in str(seen[0].message) for words in ("softmax needs", "(3, 4, 12)", "torch.float32", "MiB", "logits_limit"))
    line = linecache.getline(__file__, seen[0].lineno)
    assert "s.softmax(-1)" in line
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        F.softmax(head(x), -1)
    assert seen[0].filename == __file__  # not torch's functional.py


def test_a_limit_refuses_instead():
    head, x = make_head(C, dtype=torch.float32), features(*LEAD, dtype=torch.float32)
    size = 3 * 4 * C * 4
    with (
        bigclass.planning(logits_limit=size - 1),
        pytest.raises(ValueError, match=r"softmax needs the logits.*limit.*head.features, target"),
    ):
        head(x).softmax(-1)
    with bigclass.planning(logits_limit=size), pytest.warns(LogitsWarning):
        head(x).softmax(-1)
    with bigclass.planning(logits_limit=0):
        assert head(x).materialize().shape == (3, 4, C)  # you asked for it
    with pytest.raises(ValueError, match="logits_limit"), bigclass.planning(logits_limit=-1):
        pass


def test_a_peek_under_no_grad_costs_no_gradient():
    """What was written out, or summed, without a graph must not be what the loss is made of."""
    head, x = make_head(C), features(5)
    for peek, loss in (
        (lambda s: s.softmax(-1), lambda s: s.softmax(-1).square().sum()),
        (lambda p: p.mean(-1), lambda p: p.mean(-1).square().sum()),
        (lambda p: p.exp().square(), lambda p: p.exp().square().sum()),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made, (exact, leaves) = head(x), dense_logits(head, x)
            if peek.__code__.co_varnames[0] == "p":
                made, exact = F.log_softmax(made, -1), F.log_softmax(exact, -1)
            with torch.no_grad():
                assert not peek(made).requires_grad
            g = torch.autograd.grad(loss(made), (x, head.weight))
            for a, b in zip(g, torch.autograd.grad(loss(exact), leaves[:2]), strict=True):
                assert error(a, b) < 1e-12


WRITES = {
    "mul_": lambda s: s.mul_(2.0),
    "div_": lambda s: s.div_(2.0),
    "masked_fill_": lambda s: s.masked_fill_(torch.ones(5, C).bool(), 0.0),
    "assignment": lambda s: s.__setitem__((slice(None), 0), -1e9),
    "relu": lambda s: F.relu(s, inplace=True),
    "torch.relu_": torch.relu_,
    "out": lambda s: torch.exp(torch.zeros(5, C), out=s),
    "dropout": lambda s: F.dropout(s, 0.5, inplace=True),
    "clamp_": lambda s: s.clamp_(min=0),
    "retain_grad": lambda s: s.retain_grad(),
    "register_hook": lambda s: s.register_hook(lambda g: g * 2),
    "log-probabilities": lambda s: F.log_softmax(s, -1).mul_(2.0),
}


@pytest.mark.filterwarnings("ignore::bigclass.heads.lazy.LogitsWarning")
@pytest.mark.parametrize("name", WRITES)
def test_writing_in_place_is_refused_for_a_stream_would_not_see_it(name):
    with pytest.raises((RuntimeError, TypeError), match=r"lazy logits|out"):
        WRITES[name](make_head(C)(features(5)))


@pytest.mark.parametrize("what", ["weight", "bias", "features"])
@pytest.mark.parametrize("derived", [False, True])
def test_a_change_in_place_between_head_and_loss_raises(what, derived):
    """Pitfall 53."""
    head, x, y = make_head(C), features(5), torch.arange(5)
    s = head(x)
    s = s[1:].float() * 2.0 if derived else s
    with torch.no_grad():
        {"weight": head.weight, "bias": head.bias, "features": x}[what].add_(1.0)
    y = y[1:] if derived else y
    for use in (
        lambda: F.cross_entropy(s, y),
        lambda: s.argmax(-1),
        lambda: s.materialize(),
        lambda: s * 2,
        lambda: s[:2],
        lambda: s.detach(),
        lambda: s.logsumexp(-1),
        lambda: F.log_softmax(s, -1).mean(-1),
        lambda: s.softmax(-1),
        lambda: s.gather(-1, y[:, None]),
        lambda: F.binary_cross_entropy_with_logits(s, torch.zeros(s.shape)),
        lambda: F.log_softmax(s, -1).gather(-1, y[:, None]),
        lambda: (F.log_softmax(s, -1) * torch.ones(s.shape)).sum(-1),
        lambda: F.kl_div(F.log_softmax(s, -1), torch.ones(s.shape), reduction="sum"),
    ):
        with pytest.raises(RuntimeError, match="changed in place"):
            use()


def test_an_optimizers_step_between_head_and_loss_raises_and_the_next_forward_is_fine():
    head, x, y = make_head(C), features(5), torch.arange(5)
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    loss, late = F.cross_entropy(head(x), y), head(x)
    loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="optimizer step"):
        F.cross_entropy(late, y)
    assert F.cross_entropy(head(x), y) < loss


# --- pytrees and copies


def test_lazy_logits_are_pytrees_whose_recipes_compare_and_hold_no_tensor():
    """Pitfall 32: DistributedDataParallel and FSDP2 look for tensors there."""
    head, x = make_head(C, softcap=3.0, logit_scale=2.0), features(*LEAD)
    s = (head(x).tanh() * torch.tensor(2.0, dtype=torch.float64, requires_grad=True))[..., 2:].transpose(1, 2)
    leaves, spec = pytree.tree_flatten(s)
    assert len(leaves) == 4 and all(isinstance(t, torch.Tensor) and t.requires_grad for t in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, LazyLogits) and again.shape == s.shape and again.dtype == s.dtype and again.versions is not None
    assert torch.equal(again.materialize(), s.materialize())
    other = (head(features(*LEAD, seed=5)).tanh() * torch.tensor(2.0, dtype=torch.float64))[..., 2:].transpose(1, 2)
    assert pytree.tree_structure(other) == spec and pytree.tree_structure(head(x)) != spec and isinstance(hash(spec.context), int)
    doubled = pytree.tree_map(lambda t: t.detach() * 2, {"logits": head(x)})["logits"]
    assert error(doubled.materialize(), torch.tanh(2 * (4 * (dense_pre(head, x)) + 2 * head.bias) / 3) * 3) < 1e-12
    opaque = pytree.tree_map(lambda t: "no tensor", s)
    assert isinstance(pytree.tree_map(lambda t: torch.ones(2), opaque), object)


def dense_pre(head, x):
    return x @ head.weight.t()


def test_log_probabilities_are_pytrees_too():
    head, x, t = make_head(C), features(5), torch.rand(5, C, dtype=torch.float64)
    for made in (
        F.log_softmax(head(x), -1) * -2.0,
        -t * F.log_softmax(head(x), -1),
        F.binary_cross_entropy_with_logits(head(x), t, reduction="none"),
    ):
        leaves, spec = pytree.tree_flatten(made)
        assert sum(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves) == 3
        again = pytree.tree_unflatten(leaves, spec)
        assert type(again) is type(made) and torch.equal(again.sum(-1), made.sum(-1))


def test_a_copy_of_lazy_logits_is_refused_or_right():
    s = make_head(C)(features(5))
    assert torch.equal(copy.copy(s).materialize(), s.materialize())


# --- arithmetic of other kinds


def test_numpy_numbers_are_numbers():
    np = pytest.importorskip("numpy")
    head, x = make_head(40), features(6)
    logits = head.logits(x)
    half, three = np.float64(0.5), np.float32(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LogitsWarning)
        for made, exact in (
            (half * head(x), 0.5 * logits), (head(x) * three, logits * 3.0), (head(x) / half, logits / 0.5),
            (head(x) + three, logits + 3.0), (head(x)[np.int64(2)], logits[2]),
        ):  # fmt: skip
            assert isinstance(made, LazyLogits) and error(made.materialize(), exact) < 1e-12


@pytest.mark.parametrize("operation", [lambda t: t + 1.0, lambda t: t - 1.0, lambda t: 1.0 + t, lambda t: +t, lambda t: t - t])
def test_arithmetic_on_log_probabilities_writes_them_out(operation):
    head, x = make_head(40), features(6)
    for terms in (
        lambda s: F.log_softmax(s, -1), lambda s: F.binary_cross_entropy_with_logits(s, torch.ones(6, 40).double(), reduction="none"),
    ):  # fmt: skip
        with pytest.warns(LogitsWarning):
            made = operation(terms(head(x)))
        assert error(made, operation(terms(head.logits(x)))) < 1e-12


def test_terms_under_autocast_have_the_dtype_of_autocast():
    head, x = make_head(40, dtype=torch.float32), features(6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        made = F.binary_cross_entropy_with_logits(head(x), torch.ones(6, 40), reduction="none")
        exact = F.binary_cross_entropy_with_logits(head.logits(x), torch.ones(6, 40), reduction="none")
    assert made.dtype == exact.dtype == torch.float32


def test_an_unknown_reduction_of_kl_div_is_named():
    with pytest.raises(ValueError, match=r"reduction.*'bogus'"):
        F.kl_div(F.log_softmax(make_head(40)(features(6)), -1), torch.rand(6, 40).double(), reduction="bogus")


def test_one_layer_serves_several_heads():
    """Splits of the class axis are smaller heads, each with a loss of its own."""
    y = torch.randint(15, (6,), generator=torch.Generator().manual_seed(1))
    check(lambda s: sum(F.cross_entropy(part, y % part.shape[-1]) for part in s.split([15, 25], -1)), make_head(40), features(6))
    check(lambda s: sum(F.cross_entropy(part, y) for part in s.chunk(2, 1)), make_head(40), features(6))

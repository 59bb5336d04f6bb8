"""Log-probabilities of selected classes and of sequences, and the entropy: against float64 with the class left out of its own sum."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigclass
from tests.support import KINDS, draw, error

SLACK = 4 * 2.0**-24
ENGINES = ("dense", "tiled")
LOGP, SEQUENCE = bigclass.linear_log_prob, bigclass.linear_sequence_log_prob
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def on(engine, function, *args, **options):
    with bigclass.planning(workspace=1 << 20):
        return function(*args, engine=engine, **options)


def logits(x, w, b, temperature=1.0, softcap=None):
    s = F.linear(x, w, b)
    return (s if softcap is None else softcap * torch.tanh(s / softcap)) / temperature


def exact_log_prob(s: Tensor, index: Tensor) -> Tensor:
    """log p (N, K) from float64 logits (N, C): nothing cancels, however certain."""
    picked = s.gather(1, index)
    rest = torch.stack([s.scatter(1, i[:, None], -math.inf).logsumexp(1) for i in index.unbind(1)], 1)
    return -torch.logaddexp(rest - picked, torch.zeros_like(picked))


def exact_entropy(s: Tensor) -> Tensor:
    m, top = s.max(1, keepdim=True)
    u, rest = s - m, torch.ones_like(s).scatter(1, top, 0.0)
    mass = (u.exp() * rest).sum(1)
    return torch.log1p(mass) - (u.exp() * u * rest).sum(1) / (1 + mass)


def dense_log_prob(s: Tensor, index: Tensor) -> Tensor:
    return s.log_softmax(1).gather(1, index)


def dense_entropy(s: Tensor) -> Tensor:
    lp = s.log_softmax(1)
    return -(lp.exp() * lp).sum(1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@settings(max_examples=12)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(64, 130),
    c=st.integers(257, 1200),
    d=st.integers(16, 100),
    seed=st.integers(0, 2**31),
    k=st.sampled_from([None, 1, 2, 5]),
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
    softcap=st.sampled_from([None, 30.0]),
    of=st.sampled_from(["log p", "entropy", "both"]),
)
def test_values_and_gradients_are_as_exact_as_dense_and_near_certain_choices_keep_their_digits(
    engine, dtype, kind, n, c, d, seed, k, temperature, softcap, of
):
    x, w, b, y = draw(kind, n, c, d, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    index = y[:, None] if k in (None, 1) else torch.cat((torch.randint(c, (n, k - 1), generator=g), y[:, None]), 1)
    if k == 5:
        index[::2, 1] = index[::2, 4]  # the likely one twice
    up, up_h = torch.randn(index.shape, generator=g), torch.randn(n, generator=g)

    def everything(log_prob, entropy, x, w, b):
        s = logits(x, w, b, temperature, softcap)
        return with_gradients(log_prob(s, index), entropy(s), (x, w, b))

    def with_gradients(logp, h, leaves):
        total = (logp.view(index.shape).double() * up.double()).sum() * (of != "entropy") + (h.double() * up_h.double()).sum() * (
            of != "log p"
        )
        return [logp.view(index.shape), h, *torch.autograd.grad(total, leaves)]

    options = {"temperature": temperature, "softcap": softcap}
    mine = with_gradients(*on(engine, LOGP, x, w, y if k is None else index, linear_bias=b, return_entropy=True, **options), (x, w, b))
    truth = everything(exact_log_prob, exact_entropy, *(t.detach().double().requires_grad_() for t in (x, w, b)))
    dense = everything(dense_log_prob, dense_entropy, x, w, b)
    assert bool((mine[0] <= 0).all())
    for name, z, other, reference in zip(("log p", "entropy", "dx", "dw", "db"), mine, dense, truth, strict=True):
        if dtype == torch.float64:
            assert error(z, reference) <= 1e-11, name
            continue
        if not bool(other.isfinite().all()):  # fp16 logits overflowed
            assert bool(z.isfinite().all()), name
            continue
        limit = 1.1 * error(other, reference) + SLACK
        assert error(z, reference) <= limit, f"{name}: {error(z, reference):.2e}, dense {error(other, reference):.2e}"
        if kind == "onehot" and softcap is None and k in (None, 1) and of == "log p" and dtype != torch.float16:
            assert error(z, reference) <= (1e-4 if dtype == torch.float32 else 4e-3) or name == "entropy", name


@pytest.mark.parametrize("engine", ENGINES)
def test_a_certain_choice_among_several_keeps_the_digits_of_its_gradient(engine):
    x, w, b, y = draw("onehot", 64, 1500, 32, torch.float32, 0)
    index = torch.stack(((y + 1) % 1500, y, y), 1)
    logp = on(engine, LOGP, x, w, index, linear_bias=b)
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    exact = exact_log_prob(logits(*leaves), index)
    assert error(logp[:, 1], exact[:, 1]) < 1e-4 and torch.equal(logp[:, 1], logp[:, 2])
    mine, truth = (torch.autograd.grad(t[:, 1:].sum(), of) for t, of in ((logp, (x, w, b)), (exact, leaves)))
    for z, t in zip(mine, truth, strict=True):
        assert error(z, t) < 1e-4


@st.composite
def batches(draw):
    """Features (*lead, T, D), index (*lead, T[, K]) with some ignored, and the options beside."""
    lead = draw(st.sampled_from([(), (3,), (2, 2)]))
    length, k = draw(st.integers(1, 6)), draw(st.sampled_from([None, 1, 3]))
    c, d = draw(st.integers(1, 400)), draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ignore = draw(st.sampled_from([-100, -1, 0]))
    index = torch.randint(c, (*lead, length, *([] if k is None else [k])), generator=g)
    index = index.masked_fill(torch.rand(index.shape, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0])), ignore)
    x, w = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((*lead, length, d), (c, d)))
    options = {"temperature": draw(st.sampled_from([1.0, 0.6])), "shift": draw(st.integers(0, 7)), "ignore_index": ignore}
    return x, w, index if draw(st.booleans()) else index.int(), options


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@settings(max_examples=25)
@given(batch=batches())
def test_shift_is_slicing_and_rows_with_nothing_to_score_contribute_nothing_though_they_hold_nan(engine, batch):
    x, w, index, options = batch
    k, shift, ignore = index.dim() - x.dim() + 1, options["shift"], options["ignore_index"]
    length = max(x.shape[-2] - shift, 0)
    moved = index.narrow(-1 - k, min(shift, x.shape[-2]), length).long()  # (*lead, T - shift[, K])
    used = moved != ignore
    rows = used.any(-1) if k else used
    lp = F.linear(x[..., :length, :], w).div(options["temperature"]).log_softmax(-1)
    at = moved.masked_fill(~used, 0)
    picked = lp.gather(-1, at) if k else lp.gather(-1, at.unsqueeze(-1)).squeeze(-1)
    want = torch.where(used, picked, 0.0), torch.where(rows, -(lp.exp() * lp).sum(-1), 0.0)
    holes = x.detach().clone()
    holes[..., length:, :] = math.nan
    holes[..., :length, :] = holes[..., :length, :].masked_fill(~rows.unsqueeze(-1), math.nan)
    holes.requires_grad_()
    got = on(engine, LOGP, holes, w, index, return_entropy=True, **options)
    ups = [torch.randn_like(t) for t in want]
    assert torch.equal(on(engine, LOGP, holes, w, index, **options), got[0]) or error(got[0], want[0]) < 1e-12
    for z, t in zip(got, want, strict=True):
        assert z.shape == t.shape and error(z, t) < 1e-11
    for z, t in zip(torch.autograd.grad(got, (holes, w), ups), torch.autograd.grad(want, (x, w), ups), strict=True):
        assert error(z, t) < 1e-10


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@settings(max_examples=25)
@given(batch=batches(), average=st.booleans())
def test_the_log_probability_of_a_sequence_is_that_of_its_labels(engine, batch, average):
    x, w, labels, options = batch
    labels = labels[..., 0] if labels.dim() == x.dim() else labels
    shift, ignore = options["shift"], options["ignore_index"]
    length = max(x.shape[-2] - shift, 0)
    moved = labels[..., min(shift, x.shape[-2]) :].long()
    lp = F.linear(x[..., :length, :], w).div(options["temperature"]).log_softmax(-1)
    used = moved != ignore
    want = torch.where(used, lp.gather(-1, moved.masked_fill(~used, 0).unsqueeze(-1)).squeeze(-1), 0.0).sum(-1)
    want = want / used.sum(-1).clamp_min(1) if average else want
    holes = x.detach().clone()
    holes[..., length:, :] = math.nan
    holes[..., :length, :] = holes[..., :length, :].masked_fill(~used.unsqueeze(-1), math.nan)
    holes.requires_grad_()
    got = on(engine, SEQUENCE, holes, w, labels, average=average, **options)
    assert got.shape == want.shape == x.shape[:-2] and error(got, want) < 1e-11
    up = torch.randn_like(want)
    for z, t in zip(torch.autograd.grad(got, (holes, w), up), torch.autograd.grad(want, (x, w), up), strict=True):
        assert error(z, t) < 1e-10


def test_the_next_token_is_the_default_of_a_sequence_and_nothing_to_score_is_zero():
    x, w, labels = torch.randn(2, 5, 4), torch.randn(9, 4), torch.randint(9, (2, 5))
    assert torch.equal(SEQUENCE(x, w, labels), LOGP(x, w, labels, shift=1).sum(-1))
    labels[0] = -100
    x[0] = math.nan
    x.requires_grad_()
    for average in (False, True):
        got = SEQUENCE(x, w, labels, average=average)
        got.sum().backward()
        assert got[0] == 0.0 and got[1] < 0.0 and not x.grad[0].any() and x.grad[1].isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_both_compile_to_one_graph(engine):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g, requires_grad=True) for s in ((2, 6, 5), (300, 5)))
    labels = torch.randint(300, (2, 6), generator=g)
    labels[0, :3] = -100
    several = torch.stack((labels, labels, labels.roll(1)), -1)

    def everything(x, w):
        logp, h = LOGP(x, w, several, shift=1, return_entropy=True, temperature=0.8, engine=engine)
        return logp.sum(), h.sum(), SEQUENCE(x, w, labels, average=True, softcap=5.0, engine=engine).sum()

    compiled = torch.compile(everything, fullgraph=True, backend="inductor" if engine == "tiled" else "aot_eager")
    made = [[*out, *torch.autograd.grad(sum(out), (x, w))] for out in (everything(x, w), compiled(x, w))]
    for a, b in zip(*made, strict=True):
        assert error(a, b) < 1e-6


BAD = {
    "labels a list": (TypeError, "labels: expected a tensor, got list", {"labels": [1, 2]}),
    "labels float": (TypeError, "labels: expected int64 or int32 class indices, got torch.float32", {"labels": torch.zeros(2, 5)}),
    "labels several": (ValueError, r"labels: expected token indices.*got \(2, 5, 3\)", {"labels": torch.zeros(2, 5, 3).long()}),
    "labels elsewhere": (ValueError, "labels: expected device cpu", {"labels": torch.zeros(2, 5, device="meta").long()}),
    "no sequence axis": (ValueError, "labels: expected token indices", {"input": torch.zeros(4), "labels": torch.tensor(0)}),
    "a label too large": (IndexError, r"expected class indices in \[0, 9\), got 9", {"labels": torch.full((2, 5), 9)}),
    "ignore_index": (TypeError, "ignore_index: expected an integer, got None", {"ignore_index": None}),
    "shift negative": (ValueError, "shift: expected an integer >= 0, got -1", {"shift": -1}),
    "shift float": (ValueError, "shift: expected an integer >= 0, got 1.0", {"shift": 1.0}),
    "temperature": (ValueError, "temperature: expected a finite number greater than 0 .* got 0", {"temperature": 0}),
    "temperature infinite": (ValueError, "temperature: expected a finite number .* got inf", {"temperature": float("inf")}),
    "temperature to learn": (ValueError, "temperature: expected a finite number .* got tensor", {"temperature": torch.tensor(2.0)}),
    "features": (ValueError, "linear_weight: expected 3 features", {"input": torch.zeros(2, 5, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_sequences_is_named(name):
    kind, words, given = BAD[name]
    arguments = {"input": torch.zeros(2, 5, 4), "linear_weight": torch.zeros(9, 4), "labels": torch.zeros(2, 5).long()} | given
    with pytest.raises(kind, match=words):
        SEQUENCE(**arguments)


def test_bad_shifts_of_log_prob_are_named():
    x, w = torch.zeros(2, 5, 4), torch.zeros(9, 4)
    for shift in (-1, 1.0, "1", True):
        with pytest.raises(ValueError, match="shift: expected an integer >= 0, got"):
            LOGP(x, w, torch.zeros(2, 5, dtype=torch.long), shift=shift)
    for index in (torch.tensor(0), torch.tensor([0])):
        with pytest.raises(ValueError, match=r"shift: needs a sequence axis: input \(\.\.\., T, D\) with index"):
            LOGP(x[0, 0], w, index, shift=1)
    with pytest.raises(ValueError, match=r"index: expected shape \(2, 5\) or \(2, 5\) \+ \(K,\), got \(2, 4\)"):
        LOGP(x, w, torch.zeros(2, 4, dtype=torch.long), shift=1)


def test_labels_that_the_shift_drops_are_not_looked_at():
    labels = torch.tensor([[99, 1, 2]])
    assert torch.isfinite(SEQUENCE(torch.randn(1, 3, 4), torch.randn(9, 4), labels)).all()

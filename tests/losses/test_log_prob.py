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
    mine = with_gradients(
        *on(engine, LOGP, x, w, y if k is None else index, linear_bias=b, return_entropy=True, **options), (x, w, b)
    )
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

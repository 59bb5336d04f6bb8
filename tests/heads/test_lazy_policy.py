"""Policy and preference code as libraries write it, on lazy logits: selected log-probabilities and entropies stream."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass
from bigclass.heads.lazy import LogitsWarning
from tests.heads.lazy_support import check, dense_logits, features, make_head, small_workspace
from tests.support import error

B, T, C, K = 3, 7, 40, 4


def index(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))


def by_logsumexp(logits, y):
    """Log-probabilities of selected tokens as TRL takes them from fp32 logits, a sequence at a time."""
    selected = torch.gather(logits, dim=-1, index=y.unsqueeze(-1)).squeeze(-1)
    return selected - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def by_rows(logits, y):
    """... and from 16-bit ones."""
    rows = [F.log_softmax(s, dim=-1).gather(dim=-1, index=i.unsqueeze(-1)).squeeze(-1) for s, i in zip(logits, y, strict=True)]
    return torch.stack(rows)


def dpo(logits, y):
    labels = y[:, 1:].clone()
    mask = labels != 5
    labels[~mask] = 0
    logp = torch.gather(logits[:, :-1, :].log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (logp * mask).sum(-1)


def grpo(logits, y, keep=K, temperature=0.9):
    logits = logits[:, :-1, :][:, -keep:, :] / temperature
    return by_logsumexp(logits, y[:, -keep:])


def entropy_in_chunks(logits, size=4):
    flat = logits.reshape(-1, logits.shape[-1])
    parts = []
    for chunk in flat.split(size, dim=0):
        logp = F.log_softmax(chunk, dim=-1)
        parts.append(-(torch.exp(logp) * logp).sum(-1))
    return torch.cat(parts).reshape(logits.shape[:-1])


def entropy_by_methods(logits):
    p = logits.log_softmax(-1)
    return -(p.exp() * p).sum(-1)


PATTERNS = {
    "logsumexp": lambda s: by_logsumexp(s, index(B, T)),
    "rows": lambda s: by_rows(s, index(B, T)),
    "dpo": lambda s: dpo(s, index(B, T)),
    "grpo": lambda s: grpo(s, index(B, T)),
    "several": lambda s: s.log_softmax(-1).gather(-1, index(B, T, 3)),
    "arange": lambda s: F.log_softmax(s.flatten(0, 1), -1)[torch.arange(B * T), index(B * T)],
    "rows of log p": lambda s: F.log_softmax(s, -1)[:, 1:-1].gather(-1, index(B, T - 2, 1)),
    "entropy": entropy_by_methods,
    "entropy, temperature": lambda s: entropy_by_methods(s / 0.7),
    "entropy in chunks": entropy_in_chunks,
    "entropy, factors": lambda s: (2.0 * F.log_softmax(s, -1) * F.log_softmax(s, -1).exp()).sum(dim=-1, keepdim=True) / 3.0,
    "entropy, mean": lambda s: -(s.log_softmax(-1).exp() * s.log_softmax(-1)).mean(),
    "entropy, cast": lambda s: -(s.double().log_softmax(-1).exp() * s.double().log_softmax(-1)).sum(-1),
    "entropy, product": lambda s: torch.sum(torch.mul(s.log_softmax(-1), torch.exp(s.log_softmax(-1))), -1),
    "probabilities, exp": lambda s: s.log_softmax(-1).exp().gather(-1, index(B, T, 1)) * 2.0,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 1.5}], ids=["plain", "capped"])
@pytest.mark.parametrize("name", PATTERNS)
def test_policy_code_streams_on_lazy_logits(name, options, dtype):
    head, x = make_head(C, dtype=dtype, kind=bigclass.LMHead, engine="tiled", **options), features(B, T, dtype=dtype)
    with small_workspace():
        check(PATTERNS[name], head, x, tol=1e-11)


@pytest.mark.parametrize(
    "operation",
    [
        lambda s: (2.0 * s.log_softmax(-1)).exp(), lambda s: s.log_softmax(-1).exp() * (s / 2.0).log_softmax(-1),
        lambda s: (s.log_softmax(-1).exp() * s.log_softmax(-1)).sum(1), lambda s: s.log_softmax(-1).exp()[0],
        lambda s: s.log_softmax(-1).exp() * s.log_softmax(-1) * torch.ones(C).double(),
        lambda s: s.log_softmax(-1).exp() * s.log_softmax(-1).exp(), lambda s: torch.square(s.log_softmax(-1).exp() * s.log_softmax(-1)),
    ],
)  # fmt: skip
def test_what_needs_probabilities_themselves_writes_them_out(operation):
    head, x = make_head(C, kind=bigclass.LMHead), features(B, T)
    with pytest.warns(LogitsWarning):
        operation(head(x))
    check(operation, head, x, streams=False)


def test_probabilities_on_their_way_are_still_probabilities():
    head, x = make_head(C, kind=bigclass.LMHead), features(B, T)
    p = head(x).log_softmax(-1).exp()
    assert not isinstance(p, Tensor) and p.shape == (B, T, C) and error(p.materialize(), head.logits(x).softmax(-1)) < 1e-12
    with pytest.warns(LogitsWarning):
        assert error((head(x).log_softmax(-1).exp() * 2.0).sum(-1), torch.full((B, T), 2.0).double()) < 1e-12


def test_the_entropy_of_a_near_certain_row_keeps_its_digits():
    """Pitfall 43."""
    head = bigclass.LMHead(2, C, engine="tiled")
    with torch.no_grad():
        head.weight.zero_()[3] = 16.0
    x = torch.ones(1, 1, 2)
    p = head(x).log_softmax(-1)
    rest = (C - 1) * torch.tensor(-32.0).double().exp()
    exact = torch.log1p(rest) + 32.0 * rest / (1 + rest)
    assert abs(float(-(p.exp() * p).sum(-1)) / float(exact) - 1) < 1e-5


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dividing_by_a_scalar_tensor_does_not_round_its_reciprocal(dtype, learnt):
    """1 / 0.7 in bfloat16 is off by 3e-4, for all logits alike."""
    head, x = make_head(31), features(4)
    temperature = torch.tensor(0.7, dtype=dtype, requires_grad=learnt)
    made = head(x) / temperature
    dense = dense_logits(head, x)[0] / temperature.detach().double()
    assert isinstance(made, bigclass.LazyLogits) and made.dtype == torch.float64
    assert error(made.materialize(), dense) < 1e-14
    y = torch.arange(4)
    assert error(F.cross_entropy(made, y), F.cross_entropy(dense, y)) < 1e-12
    bf16 = make_head(31, dtype=torch.bfloat16)(features(4, dtype=torch.bfloat16))
    for t in (temperature, temperature.reshape(1)):
        assert (bf16 / t).dtype == (bf16.materialize() / t).dtype


CONSTANTS = {
    "logits": lambda s: s / 2.0,
    "cast": lambda s: s.float(),
    "copy": lambda s: s.clone(),
    "some": lambda s: s[:, :2],
    "log p": lambda s: F.log_softmax(s, -1),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_is_made_under_no_grad_is_a_constant_afterwards(name):
    x, s = features(B, T), make_head(C)
    lazy = s(x)
    with torch.no_grad():
        made = CONSTANTS[name](lazy)
    picked = made.gather(-1, index(*made.shape[:-1], 1))
    assert not made.requires_grad and not picked.requires_grad
    assert lazy.requires_grad and CONSTANTS[name](lazy).gather(-1, index(*made.shape[:-1], 1)).requires_grad


@pytest.mark.filterwarnings("ignore::bigclass.heads.lazy.LogitsWarning")
def test_probabilities_made_under_no_grad_weigh_as_constants():
    """Of sum p log p with a constant p the gradient is that of its second factor alone, which is 0."""
    head, x = make_head(C), features(B, T)
    logp = F.log_softmax(head(x), -1)
    with torch.no_grad():
        p = logp.exp()
    slope, whole = (torch.autograd.grad((a * logp).sum(), x)[0] for a in (p, logp.exp()))
    assert float(slope.norm()) < 1e-12 < 1e-3 < float(whole.norm())
    with torch.no_grad(), bigclass.planning(logits_limit=0):  # an entropy to look at streams there too
        assert (logp.exp() * logp).sum(-1).shape == (B, T)

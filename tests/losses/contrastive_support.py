"""Contrastive losses by their definition, on whole float64 matrices, and batches to try them on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor


def pairs_of(indices: Tensor | None, n: int, m: int) -> Tensor:
    """(n, m) bool: is j among the indices of row i? None: none are."""
    marked = torch.zeros(n, m + 1, dtype=torch.bool)
    if indices is not None:
        indices = indices.reshape(n, -1)
        marked.scatter_(1, torch.where(indices < 0, m, indices), True)
    return marked[:, :m]


def _one_direction(s: Tensor, positive: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """(losses of the rows, which of them count). With the positives left out of the sum, for plain float64 is 0 at a loss of e^-80."""
    count = positive.sum(1)
    rest = s.masked_fill(positive | ignored, -math.inf).logsumexp(1)
    own = s.masked_fill(~positive, -math.inf)
    top = torch.where(count > 0, own.masked_fill((count == 0)[:, None], 0.0).logsumexp(1), 0.0)
    mean = torch.where(positive, s, 0.0).sum(1) / count.clamp_min(1)
    gap = rest - top
    # one positive: 0, by a gradient that is 0 and not 1 - 1
    spread = torch.where(count > 1, top - mean, 0.0)
    return torch.logaddexp(gap, torch.zeros_like(gap)) + spread, count > 0


def info_nce(s: Tensor, positive: Tensor, ignored: Tensor, direction: str, reduction: str) -> Tensor:
    """The softmax loss of logits s (N, M)."""
    both = {"image": (s, positive, ignored), "text": (s.t(), positive.t(), ignored.t())}
    parts = []
    for name, (logits, mine, out) in both.items():
        if direction in ("both", name):
            loss, there = _one_direction(logits, mine, out)
            parts.append(loss[there].mean() if reduction == "mean" else loss[there].sum())
    return sum(parts) / len(parts)


def pairwise_sigmoid(s: Tensor, positive: Tensor, ignored: Tensor, reduction: str) -> Tensor:
    """The sigmoid loss of logits s (N, M)."""
    signed = torch.where(positive, -s, s)
    loss = torch.where(ignored & ~positive, 0.0, torch.logaddexp(signed, torch.zeros_like(s))).sum()
    return loss / s.shape[0] if reduction == "mean" else loss


@dataclass
class Batch:
    """Features and everything that may come with them."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    positives: Tensor | None
    ignore: Tensor | None
    hard: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.image, self.text, self.scale, self.bias, self.hard) if t is not None and t.requires_grad]

    @property
    def options(self) -> dict:
        return {"positives": self.positives, "ignore": self.ignore, "hard_negatives": self.hard}

    def exact(self, sigmoid: bool, direction: str, reduction: str) -> list[Tensor]:
        """The loss and its gradients by `leaves`, in float64."""
        wide = Batch(*(t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
                       for t in (self.image, self.text, self.scale, self.bias, self.positives, self.ignore, self.hard)))  # fmt: skip
        loss = wide.dense(sigmoid, direction, reduction)
        return [loss, *torch.autograd.grad(loss, wide.leaves, allow_unused=True, materialize_grads=True)]

    def dense(self, sigmoid: bool, direction: str, reduction: str) -> Tensor:
        """The loss by its definition, in the dtype of the features."""
        texts = self.text if self.hard is None else torch.cat((self.text, self.hard))
        s = self.scale * self.image @ texts.t()
        s = s if self.bias is None else s + self.bias
        n, m = s.shape
        positive = torch.eye(n, m, dtype=torch.bool) if self.positives is None else pairs_of(self.positives, n, m)
        ignored = pairs_of(self.ignore, n, m) & ~positive
        return pairwise_sigmoid(s, positive, ignored, reduction) if sigmoid else info_nce(s, positive, ignored, direction, reduction)


@st.composite
def batches(draw, dtypes=(torch.float64,), most=70) -> Batch:
    dtype = draw(st.sampled_from(dtypes))
    n, d, seed = draw(st.integers(1, most)), draw(st.integers(1, 40)), draw(st.integers(0, 2**31))
    form = draw(st.sampled_from(("pairs", "one each", "several")))
    hard, q = draw(st.integers(0, 9)), draw(st.integers(0, 3))
    m = n if form == "pairs" else draw(st.integers(1, most))
    g = torch.Generator().manual_seed(seed)

    def features(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, generator=g)).to(dtype).requires_grad_(draw(st.booleans()))

    image, text = features(n), features(m)
    k = draw(st.integers(1, 4))
    positives = {
        "pairs": None,
        "one each": torch.randint(0, m, (n,), generator=g),
        "several": torch.randint(-1, m, (n, k), generator=g),  # the same text may stand twice in a row, or not at all
    }[form]
    if form == "several" and positives is not None:
        positives[0, 0] = 0  # a loss of nothing is NaN
    scale = torch.tensor([draw(st.floats(1.0, 100.0))], dtype=dtype).reshape(() if draw(st.booleans()) else (1,)).requires_grad_()
    return Batch(
        image,
        text,
        scale,
        torch.tensor(draw(st.floats(-12.0, 3.0)), dtype=dtype, requires_grad=True) if draw(st.booleans()) else None,
        positives,
        torch.randint(-1, m, (n, q), generator=g) if q else None,
        features(hard) if hard else None,
    )

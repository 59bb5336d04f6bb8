"""What loss functions make of lazy logits before they sum over classes: log-probabilities, p log p, the terms of a binary cross-entropy.

All are (..., C) and stay unmade until their sum, mean or gather over the class axis is asked for, which streams. So timm's
LabelSmoothingCrossEntropy and SoftTargetCrossEntropy, or a user's `-(t * F.log_softmax(logits, -1)).sum(-1).mean()`, run as they stand.
Row-wise results recompute the tiles in the backward (8NCD flops); `bigclass.convert_criterion` gives the 6NCD form of known modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import _reduction as legacy

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import LogSumExp, ShiftedMoment, Total, entropy, log_sum, log_sum_exp
from bigclass.heads.lazy.base import Lazy, dense_call, functions_of, result_dtype
from bigclass.heads.lazy.logits import LazyLogits
from bigclass.heads.lazy.shapes import from_start
from bigclass.losses.classwise import binary_cross_entropy
from bigclass.losses.cross_entropy import cross_entropy
from bigclass.losses.inputs import checked_picks
from bigclass.losses.targets import SparseTarget
from bigclass.parallel.classes import over_batch, reduce_logits


class _Terms(Lazy):
    """(..., C) terms of lazy logits, times a number."""

    lazy: LazyLogits
    factor: float

    def __post_init__(self) -> None:
        if isinstance(self.lazy, LazyLogits):  # while a pytree is taken apart it may be anything
            self.lazy = self.lazy.without_gradient()

    @property
    def shape(self) -> torch.Size:
        return self.lazy.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.lazy.dtype

    @property
    def device(self) -> torch.device:
        return self.lazy.device

    @property
    def requires_grad(self) -> bool:
        return self.lazy.requires_grad

    def row_sums(self) -> Tensor:
        """(...): the sum over classes, without the factor."""
        raise NotImplementedError

    def sum(self, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
        dims = (dim,) if isinstance(dim, int) else dim
        if dims is not None and (len(dims) != 1 or not self.lazy._last(dims[0])):
            return self.written_out("sum").sum(dim, keepdim, dtype=dtype)
        rows = (self.row_sums() * self.factor).to(dtype or result_dtype(self.dtype))
        if dims is None:
            return rows.sum()
        return rows.unsqueeze(-1) if keepdim else rows

    def mean(self, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
        dims = (dim,) if isinstance(dim, int) else dim
        if dims is not None and (len(dims) != 1 or not self.lazy._last(dims[0])):
            return self.written_out("mean").mean(dim, keepdim, dtype=dtype)
        return self.sum(dim, keepdim, dtype=dtype) / (self.numel() if dims is None else self.shape[-1])

    def __neg__(self) -> Any:
        return replace(self, factor=-self.factor)  # type: ignore[type-var]

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, int | float) and not isinstance(other, bool):
            return replace(self, factor=self.factor * other)  # type: ignore[type-var]
        return dense_call(torch.mul, (self, other), {})

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, int | float) and other != 0:
            return self * (1.0 / other)
        return dense_call(torch.div, (self, other), {})

    def to(self, *args: Any, **kwargs: Any) -> Any:
        lazy = self.lazy.to(*args, **kwargs)
        if not isinstance(lazy, LazyLogits):
            return self.written_out("to").to(*args, **kwargs)
        return replace(self, lazy=lazy)  # type: ignore[type-var]

    def float(self, *_: Any, **__: Any) -> Any:
        return self.to(torch.float32)


@dataclass(eq=False, repr=False)
class LazyLogProbs(_Terms):
    """factor * t_ij * log softmax(s)_ij, with t a (..., C) tensor or a `SparseTarget` (None: 1)."""

    lazy: LazyLogits
    factor: float = 1.0
    target: Tensor | SparseTarget | None = None

    def materialize(self) -> Tensor:
        made = F.log_softmax(self.lazy.real(), -1) * self.factor
        if self.target is None:
            return made
        return made * (self.target.dense() if isinstance(self.target, SparseTarget) else self.target)

    def row_sums(self) -> Tensor:
        lazy, c = self.lazy, self.shape[-1]
        if self.target is not None:
            lazy.check()
            return -cross_entropy(lazy.stream, lazy.lead, self.target, reduction="none", engine=lazy.engine).reshape(lazy.lead)
        lse, total = self._folds(None)[:2]
        return (total - c * lse).reshape(lazy.lead)

    def _folds(self, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(LSE (N,), sum of logits (N,), log p at index (N, K)); the first two are kept for whoever asks next."""
        kept = self._kept("_lse_and_total")
        if index is None and kept is not None:
            return (*kept, None)
        lazy = self.lazy
        lazy.check()
        single = index is not None and index.shape[1] == 1
        folds = (LogSumExp(exclude_picks=single), Total())
        (state, (total,)), picked = reduce_logits(lazy.stream, index, folds, engine=lazy.engine)
        lse = log_sum_exp(state)
        logp = None
        if picked is not None:
            m, log_l = state[0].unsqueeze(-1), log_sum(state).unsqueeze(-1)
            # with the class left out of the sum nothing cancels; a logit of +inf: NaN as in torch
            gap = (picked.masked_fill(picked == torch.inf, torch.nan) - m) - log_l
            logp = F.logsigmoid(gap) if single else gap
            lse = torch.logaddexp(lse, picked[:, 0]) if single else lse
        self._keep("_lse_and_total", (lse, total))
        return lse, total, logp

    def gather(self, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
        fits = self.lazy._last(dim) and index.dim() == self.ndim and tuple(index.shape[:-1]) == tuple(self.lazy.lead)
        if self.target is not None or not fits:
            return self.written_out("gather").gather(dim, index)
        logp = self._folds(checked_picks("index", index, self.shape[-1]))[2]
        assert logp is not None
        return (logp * self.factor).reshape(index.shape).to(result_dtype(self.dtype))

    def exp(self) -> Any:
        if self.target is not None or self.factor != 1.0:
            return self.written_out("exp").exp()
        return LazyProbabilities(self.lazy)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, LazyProbabilities):
            return other * self
        fits = isinstance(other, Tensor | SparseTarget) and tuple(other.shape) == tuple(self.shape)
        if fits and self.target is None and not getattr(other, "requires_grad", False):
            dtype = torch.promote_types(self.dtype, other.dtype)
            other = other if other.dtype.is_floating_point else other.to(self.dtype)
            return replace(self, target=other, lazy=self.lazy.to(dtype))
        return super().__mul__(other)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        picks = len(index) == self.ndim == 2 and all(isinstance(i, Tensor) and i.dim() == 1 and i.dtype == torch.int64 for i in index)
        if self.target is None and picks:  # log_probs[arange(N), y]
            rows, y = index
            picked = LazyLogProbs(self.lazy[rows], self.factor)
            if len(picked) == len(y):
                return picked.gather(-1, from_start(y, self.shape[-1]).unsqueeze(-1)).squeeze(-1)
        if self.target is None and isinstance(lazy := self.lazy[index], LazyLogits) and lazy.shape[-1:] == self.shape[-1:]:
            return LazyLogProbs(lazy, self.factor)
        return self.written_out("indexing")[index]

    def nll_loss(
        self, target: Tensor, weight=None, size_average=None, ignore_index: int = -100, reduce=None, reduction: str = "mean"
    ) -> Any:
        """`F.nll_loss(self, target, ...)`, streamed."""
        if isinstance(target, Tensor) and target.is_floating_point():
            raise ArgumentTypeError(f"target: expected class indices, got {target.dtype}")
        if self.target is not None or self.factor != 1.0 or self.ndim > 2:
            return F.nll_loss(self.written_out("nll_loss"), target, weight, size_average, ignore_index, reduce, reduction)
        return self.lazy.cross_entropy(target, weight, size_average, ignore_index, reduce, reduction)

    def kl_div(self, target: Any, size_average=None, reduce=None, reduction: str = "mean", log_target: bool = False) -> Any:
        """`F.kl_div(self, target, ...)`, streamed unless the reduction is "none"."""
        if size_average is not None or reduce is not None:
            reduction = legacy.legacy_get_string(size_average, reduce)
        if reduction not in ("none", "batchmean", "sum", "mean"):
            raise ArgumentError(f"reduction: expected 'none', 'batchmean', 'sum' or 'mean', got {reduction!r}")
        target = target.dense() if isinstance(target, SparseTarget) else target
        fits = isinstance(target, Tensor) and tuple(target.shape) == tuple(self.shape) and not target.requires_grad
        if self.target is not None or self.factor != 1.0 or reduction == "none" or not fits:
            real = self.written_out("kl_div")
            return F.kl_div(real, target, reduction=reduction, log_target=log_target)
        lazy, t = self.lazy, target.exp() if log_target else target
        lazy.check()
        wide = lazy.stream.accumulate_dtype
        own = (t * target).sum(dtype=wide) if log_target else torch.special.xlogy(t, t).sum(dtype=wide)
        loss = cross_entropy(lazy.stream, lazy.lead, t, reduction="sum", engine=lazy.engine) + over_batch(own, lazy.stream)
        by = {"sum": 1, "batchmean": self.shape[0], "mean": self.numel()}[reduction]
        by = over_batch(float(by), lazy.stream) if reduction != "sum" else by
        return (loss / by).to(result_dtype(self.dtype))


@dataclass(eq=False, repr=False)
class LazyProbabilities(_Terms):
    """factor * p_ij, p = softmax(s): what `log_probs.exp()` is, on its way into an entropy."""

    lazy: LazyLogits
    factor: float = 1.0

    def materialize(self) -> Tensor:
        return F.softmax(self.lazy.real(), -1) * self.factor

    def row_sums(self) -> Tensor:
        return F.softmax(self.lazy.written_out("sum of probabilities"), -1).sum(-1)

    def gather(self, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
        logp = LazyLogProbs(self.lazy).gather(dim, index)
        return logp.exp() * self.factor

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, LazyLogProbs) and other.target is None and _same(self.lazy, other.lazy):
            return LazyPLogP(self.lazy, self.factor * other.factor)
        return super().__mul__(other)

    __rmul__ = __mul__


@dataclass(eq=False, repr=False)
class LazyPLogP(_Terms):
    """factor * p_ij log p_ij, whose sum over classes is an entropy: exact, where the sum of products of rounded factors is not."""

    lazy: LazyLogits
    factor: float = 1.0

    def materialize(self) -> Tensor:
        logp = F.log_softmax(self.lazy.real(), -1)
        return logp.exp() * logp * self.factor

    def row_sums(self) -> Tensor:
        lazy = self.lazy
        lazy.check()
        (state,), _ = reduce_logits(lazy.stream, None, (ShiftedMoment(),), engine=lazy.engine)
        return -entropy(state).reshape(lazy.lead)


def _same(a: LazyLogits, b: LazyLogits) -> bool:
    """Are these the same logits, dtype aside? Under no_grad also if only one of them has gradients."""
    a, b = a.without_gradient(), b.without_gradient()
    return a is b or (a.stream is b.stream and a.lead == b.lead and a.class_first == b.class_first)


@dataclass(eq=False, repr=False)
class LazyBinaryCrossEntropy(_Terms):
    """factor * F.binary_cross_entropy_with_logits(s, target, weight, pos_weight=pos_weight, reduction="none")."""

    lazy: LazyLogits
    target: Tensor | SparseTarget
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    factor: float = 1.0

    def materialize(self) -> Tensor:
        logits, target = self.lazy.real(), self.target
        target = target.dense() if isinstance(target, SparseTarget) else target
        made = F.binary_cross_entropy_with_logits(logits, target, self.weight, pos_weight=self.pos_weight, reduction="none")
        return made * self.factor

    def row_sums(self) -> Tensor:
        lazy = self.lazy
        lazy.check()
        return binary_cross_entropy(
            lazy.stream, lazy.lead, self.target, weight=self.weight, pos_weight=self.pos_weight, reduction="none", engine=lazy.engine
        )


def _either(method: Callable) -> Callable:
    def call(a, b, *, out=None):
        if out is not None or not all(isinstance(t, _Terms) or not isinstance(t, Lazy) for t in (a, b)):
            return NotImplemented
        return method(a, b) if isinstance(a, _Terms) else method(b, a)

    return call


def _table(cls: Any, *names: str) -> dict[Any, Any]:
    return {
        **functions_of(cls, ("sum", "mean", "float", "to", *names)),
        **dict.fromkeys((torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _either(cls.__mul__)),
        **dict.fromkeys((torch.neg, torch.negative, Tensor.neg, Tensor.__neg__), cls.__neg__),
        **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), cls.__truediv__),
        Tensor.__getitem__: cls.__getitem__,
    }


LazyLogProbs._functions = _table(LazyLogProbs, "gather", "nll_loss", "kl_div", "exp")
LazyProbabilities._functions = {k: v for k, v in _table(LazyProbabilities, "gather").items() if k is not Tensor.__getitem__}
LazyPLogP._functions = {k: v for k, v in _table(LazyPLogP).items() if k is not Tensor.__getitem__}
LazyBinaryCrossEntropy._functions = {k: v for k, v in _table(LazyBinaryCrossEntropy).items() if k is not Tensor.__getitem__}


# A model may end in F.log_softmax; DistributedDataParallel has to find its tensors, too.
def _flatten(terms: Any) -> tuple[list, float]:
    return [terms.lazy, *[getattr(terms, name) for name in ("target", "weight", "pos_weight") if hasattr(terms, name)]], terms.factor


def _unflatten(cls: Any) -> Any:
    def made(parts: Any, factor: float) -> Any:
        lazy, *rest = parts
        return cls(lazy, factor, *rest) if cls is LazyLogProbs else cls(lazy, *rest, factor)

    return made


for _cls in (LazyLogProbs, LazyProbabilities, LazyPLogP, LazyBinaryCrossEntropy):
    pytree.register_pytree_node(_cls, _flatten, _unflatten(_cls), serialized_type_name=f"bigclass.{_cls.__name__}")

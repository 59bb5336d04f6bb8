"""Lazy logits: what a head returns in training instead of N x C numbers.

A `LazyLogits` holds the recipe of the logits (a `Stream`: features, an alias of the weight, bias, maps) and answers what training loops
ask of logits:

    loss functions        F.cross_entropy, F.nll_loss of F.log_softmax, F.binary_cross_entropy_with_logits, and the modules over them
    arithmetic            with numbers and scalar tensors, with a class vector (as a bias), tanh, casts: maps of the stream
    batch axes            slices, masks, views, permutations, splits: done to the features. Slices of the class axis: done to the weight
    shape, dtype, device  and their relatives
    argmax, topk, max, gather, logsumexp    streamed

Everything else writes the logits out, once, with a `LogitsWarning` that names the operation and the size, or raises above
`bigclass.planning(logits_limit=...)`.

It is no tensor subclass but a dataclass with `__torch_function__`, registered as a pytree node whose leaves are the stream's tensors: so
DistributedDataParallel and FSDP2 find the tensors of a module's output (with an opaque object static graphs come out silently wrong),
and torch.compile passes it on between graphs. The weight is held as `weight.view_as(weight)`, which autograd sees as an output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import _reduction as legacy

from bigclass.core.errors import ArgumentError
from bigclass.core.folds import LogSumExp, log_sum_exp
from bigclass.core.stream import Scale, Softcap, Stream
from bigclass.core.topk import TopK
from bigclass.heads.lazy.axes import Axes
from bigclass.heads.lazy.base import Lazy, dense_call, plain_number, result_dtype
from bigclass.heads.lazy.shapes import axis
from bigclass.losses.cross_entropy import cross_entropy
from bigclass.losses.inputs import checked_picks, filter_of, in_autocast, open_layer
from bigclass.losses.targets import SparseTarget
from bigclass.parallel.classes import own, reduce_logits, shards_of
from bigclass.parallel.collectives import gather_classes, replicated


@dataclass(eq=False, repr=False)
class LazyLogits(Axes):
    """The logits s (..., C) of a stream, not yet made. Heads return them in training.

    stream: their recipe, N rows. lead: the batch axes, whose product is N. dtype: what a plain `nn.Linear` would have returned (the
    stream never rounds to it). engine: for everything computed from them. class_first: is the class axis the second of all (as in the
    K-dimensional loss) rather than the last? versions: of the stream's tensors when they were taken; None where nobody can look (inside a
    compiled model; a weight changed between such a model and an eager loss goes unnoticed).
    """

    stream: Stream
    lead: tuple[int, ...]
    dtype: torch.dtype
    engine: str = "auto"
    class_first: bool = False
    versions: tuple[int, ...] | None = None

    # --- what tensors answer without being there

    @property
    def shape(self) -> torch.Size:
        c = self.stream.shape[1]
        return torch.Size((self.lead[0], c, *self.lead[1:]) if self.class_first else (*self.lead, c))

    @property
    def device(self) -> torch.device:
        return self.stream.device

    @property
    def requires_grad(self) -> bool:
        return any(t.requires_grad for t in self.stream.tensors)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def layout(self) -> torch.layout:
        return torch.strided

    def is_floating_point(self) -> bool:
        return True

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        return True

    def element_size(self) -> int:
        return self.dtype.itemsize

    def get_device(self) -> int:
        return -1 if self.device.index is None else self.device.index

    def materialize(self) -> Tensor:
        self.check()
        shards = shards_of(self.stream)
        stream = self.stream if shards is None else own(self.stream)
        s: Any = None
        # a class vector that was added in a wider type than the layer's is not rounded to that
        late = stream.class_scale is not None or (
            stream.bias is not None and self.dtype.itemsize > (stream.compute_dtype or self.dtype).itemsize
        )
        for p, (x, w) in enumerate(stream.pairs):
            dtype = stream.compute_dtype or torch.promote_types(x.dtype, w.dtype)
            b = stream.bias if p == 0 and not late else None
            with torch.autocast(self.device.type, enabled=False):
                part = F.linear(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype))
            s = part if s is None else s + part
        s = s.to(torch.promote_types(s.dtype, self.dtype))
        if stream.class_scale is not None:
            s = s * stream.class_scale
        if late and stream.bias is not None:
            s = s + stream.bias
        if stream.scale != 1.0:
            s = s * stream.scale
        if stream.scale_tensor is not None:
            s = s * stream.scale_tensor.reshape(())
        for m in stream.maps:
            s = m.forward(s, m.numbers, m.tensors)
        s = s.to(self.dtype)
        s = s if shards is None else gather_classes(s, shards.sizes, shards.ranks)
        s = s.reshape(*self.lead, self.stream.shape[1])
        return s.movedim(-1, 1) if self.class_first else s

    def check(self) -> None:
        """Raise if the features or the weight were changed in place since the logits were asked for (an optimizer's step, say)."""
        if torch.compiler.is_compiling():
            return
        if any(_is_gone(w) for _, w in self.stream.pairs):
            raise RuntimeError(
                "bigclass: the weight of these lazy logits is gone: FSDP2 resharded it after the head's forward. Give the head its "
                "targets, head(features, target), or let it belong to the root's group (no fully_shard of the head alone, or "
                "with reshard_after_forward=False)"
            )
        if self.versions is None:
            return
        if self.versions != _versions(self.stream):
            raise RuntimeError(
                "bigclass: the features, the weight or the bias of these lazy logits were changed in place after the head's forward (an "
                "optimizer step before the loss?). Their logits can no longer be made; compute the loss before the change"
            )

    # --- recipes of other lazy logits

    def _with(self, stream: Stream, **changes: Any) -> LazyLogits:
        made = replace(self, stream=stream, versions=None if self.versions is None else _versions(stream), **changes)
        return made.without_gradient()

    def without_gradient(self) -> LazyLogits:
        """Itself; under no_grad without gradients, one object for all calls: what torch makes of a tensor there has none later either."""
        if torch.is_grad_enabled() or not self.requires_grad:
            return self
        made = self.__dict__.get("_constant")
        return self.__dict__.setdefault("_constant", self.detach()) if made is None else made

    def _rows(self, operation: Callable[[Tensor], Any]) -> LazyLogits:
        """operation on the batch axes: what it does to a tensor (*lead, D)."""
        self.check()
        pairs, lead = [], self.lead
        for x, w in self.stream.pairs:
            moved = operation(x.reshape(*self.lead, x.shape[1]))
            lead = tuple(moved.shape[:-1])
            pairs.append((moved.reshape(-1, moved.shape[-1]), w))
        return self._with(replace(self.stream, pairs=tuple(pairs)), lead=lead)

    def _classes(self, index: Any) -> LazyLogits:
        """Some of the classes: an index of the first axis of the weight that keeps it."""
        self.check()
        s = self.stream
        if shards_of(s) is not None:
            raise ArgumentError("lazy logits whose classes are spread over ranks cannot be sliced along them; materialize() them first")
        pick = lambda t: None if t is None else t[index]  # noqa: E731
        pairs = tuple((x, w[index]) for x, w in s.pairs)
        return self._with(replace(s, pairs=pairs, bias=pick(s.bias), class_scale=pick(s.class_scale)))

    def _map(self, *maps: Any) -> LazyLogits:
        self.check()
        return self._with(replace(self.stream, maps=_joined((*self.stream.maps, *maps))))

    def _scaled(self, factor: Any) -> Any:
        factor = plain_number(factor)
        if isinstance(factor, bool) or not isinstance(factor, int | float | Tensor):
            return NotImplemented
        if not isinstance(factor, Tensor):
            return self._map(Scale.by(factor))
        if factor.numel() != 1 or factor.dim() > self.ndim or not factor.is_floating_point():
            return NotImplemented
        if factor.device != self.device and factor.requires_grad:
            return NotImplemented
        # a number that lies on the CPU stays there: moving it would be a host sync
        scale = Scale.by(factor if factor.device == self.device else float(factor))
        return replace(self._map(scale), dtype=_promoted(self.dtype, factor))

    def _shifted(self, by: Any) -> Any:
        """s + by for a number, a scalar or a class vector (C,): a bias, as long as nothing has bent the logits."""
        s, by = self.stream, plain_number(by)
        if isinstance(by, bool) or not isinstance(by, int | float | Tensor) or s.maps or s.scale == 0.0 or self.class_first:
            return NotImplemented
        if isinstance(by, Tensor) and (by.numel() != 1 and tuple(by.shape) not in ((s.shape[1],), (1, s.shape[1]))):
            return NotImplemented
        if isinstance(by, Tensor) and (not by.is_floating_point() or by.dim() > self.ndim or by.device != self.device):
            return NotImplemented
        if s.scale_tensor is not None:
            return NotImplemented  # by / scale would lose digits where the scale is near 0
        self.check()
        wide = s.accumulate_dtype
        b = by.reshape(-1).to(wide) if isinstance(by, Tensor) else torch.full((1,), float(by), dtype=wide, device=self.device)
        b, shards = (b / s.scale).expand(s.shape[1]), shards_of(s)
        if shards is not None:  # each rank's part of it gets a part of its gradient
            b = shards.vector(replicated(b, shards.ranks) if b.requires_grad and torch.is_grad_enabled() else b)
        dtype = _promoted(self.dtype, by)
        return self._with(replace(s, bias=b if s.bias is None else s.bias.to(wide) + b), dtype=dtype)

    def detach(self) -> LazyLogits:
        self.check()
        return self._with(self.stream.with_tensors([t.detach() for t in self.stream.tensors]))

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> LazyLogits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A cast: what is made of these logits in the end has the new dtype; sums stay as wide as they are. (Devices materialise.)"""
        dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
        other = kwargs.get("other", args[0] if args else None)
        device = kwargs.get("device", args[0] if args and isinstance(args[0], str | int | torch.device) else None)
        if isinstance(other, Tensor | Lazy):
            dtype, device = other.dtype, other.device
        moves = device is not None and torch.device(device) not in (self.device, torch.device(self.device.type))
        if moves or (dtype is not None and not dtype.is_floating_point):
            return self.written_out("to").to(*args, **kwargs)
        return self if dtype is None or dtype == self.dtype else replace(self, dtype=dtype).without_gradient()

    def cpu(self, *_: Any, **__: Any) -> Any:
        return self.to("cpu")

    def clone(self, *_: Any, **__: Any) -> LazyLogits:
        return replace(self).without_gradient()

    def float(self, *_: Any, **__: Any) -> LazyLogits:
        return self.to(torch.float32)

    def double(self, *_: Any, **__: Any) -> LazyLogits:
        return self.to(torch.float64)

    def half(self, *_: Any, **__: Any) -> LazyLogits:
        return self.to(torch.float16)

    def bfloat16(self, *_: Any, **__: Any) -> LazyLogits:
        return self.to(torch.bfloat16)

    def type(self, dtype: Any = None, *_: Any, **__: Any) -> Any:
        if isinstance(dtype, torch.dtype):
            return self.to(dtype)
        return self.written_out("type").type(dtype)

    def type_as(self, other: Any) -> Any:
        return self.to(other.dtype)

    def tanh(self) -> LazyLogits:
        return self._map(Softcap.at(1.0))

    # --- arithmetic

    def __neg__(self) -> LazyLogits:
        return self._map(Scale.by(-1.0))

    def __mul__(self, other: Any) -> Any:
        made = self._scaled(other)
        return dense_call(torch.mul, (self, other), {}) if made is NotImplemented else made

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        other = plain_number(other)
        made = NotImplemented
        if isinstance(other, Tensor) and other.numel() == 1 and other.is_floating_point():
            # in a wide type: the reciprocal of a half-precision number is not rounded to its own
            made = self._scaled(1.0 / other.to(torch.promote_types(other.dtype, self.stream.accumulate_dtype)))
        elif isinstance(other, int | float) and not isinstance(other, bool) and other != 0:
            made = self._scaled(1.0 / other)
        return dense_call(torch.div, (self, other), {}) if made is NotImplemented else made.to(_promoted(self.dtype, other))

    def __add__(self, other: Any) -> Any:
        made = self._shifted(other)
        return dense_call(torch.add, (self, other), {}) if made is NotImplemented else made

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        made = NotImplemented if isinstance(other, Lazy | bool) else self._shifted(-other)
        return dense_call(torch.sub, (self, other), {}) if made is NotImplemented else made

    # in place there is nothing to write to: Python then binds the name to the new object
    __imul__, __itruediv__, __iadd__, __isub__ = __mul__, __truediv__, __add__, __sub__

    # --- what is computed without N x C

    def _last(self, dim: Any) -> bool:
        return isinstance(dim, int) and not isinstance(dim, bool) and axis(dim, self.ndim) == self.ndim - 1 and not self.class_first

    def topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        if not self._last(dim) or not largest or not 1 <= k <= self.shape[-1]:
            return self.written_out("topk").topk(k, dim, largest, sorted)
        with torch.no_grad():
            ((values, indices),), _ = reduce_logits(self.detach().stream, None, (TopK((float(k),)),), engine=self.engine)
        values, indices = (t.reshape(*self.lead, k) for t in (values, indices))
        if torch.is_grad_enabled() and self.requires_grad:
            values = self.gather(-1, indices)
        return torch.return_types.topk((values.to(self.dtype), indices))

    def argmax(self, dim: Any = None, keepdim: bool = False) -> Any:
        if not self._last(dim):
            return self.written_out("argmax").argmax(dim, keepdim)
        with torch.no_grad():
            indices = self.detach().topk(1)[1]
        return indices if keepdim else indices.squeeze(-1)

    def max(self, dim: Any = None, keepdim: bool = False) -> Any:
        if not self._last(dim):
            real = self.written_out("max")
            if isinstance(dim, Tensor | Lazy):
                return dense_call(torch.max, (real, dim), {})
            return real.max() if dim is None else dense_call(torch.max, (real, dim, keepdim), {})
        values, indices = self.topk(1)
        return torch.return_types.max((values, indices) if keepdim else (values.squeeze(-1), indices.squeeze(-1)))

    def gather(self, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
        """The logits at index (*lead, K)."""
        if not self._last(dim) or index.dim() != self.ndim or tuple(index.shape[:-1]) != tuple(self.lead):
            return self.written_out("gather").gather(dim, index)
        self.check()
        picks = checked_picks("index", index, self.shape[-1])
        _, picked = reduce_logits(self.stream, picks, (LogSumExp(),), engine=self.engine)
        assert picked is not None
        return picked.reshape(index.shape).to(self.dtype)

    def logsumexp(self, dim: Any, keepdim: bool = False) -> Any:
        if not self._last(dim):
            return self.written_out("logsumexp").logsumexp(dim, keepdim)
        self.check()
        ((m, l),), _ = reduce_logits(self.stream, None, (LogSumExp(),), engine=self.engine)  # noqa: E741
        lse = log_sum_exp((m, l)).masked_fill(m == torch.inf, torch.inf).reshape(self.lead)
        return (lse.unsqueeze(-1) if keepdim else lse).to(result_dtype(self.dtype))

    def log_softmax(self, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
        from bigclass.heads.lazy.terms import LazyLogProbs  # made of lazy logits, so it stands above them

        dim = -1 if dim is None and self.ndim == 2 else dim
        dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype  # torch.log_softmax takes it there
        if not self._last(dim):
            return self.written_out("log_softmax").log_softmax(dim, dtype=dtype)
        if dtype is None and self.device.type != "cpu" and in_autocast(self.device.type):
            dtype = torch.float32  # as autocast has it for this function
        return LazyLogProbs(self if dtype is None else self.to(dtype))

    def cross_entropy(
        self, target: Any, weight: Tensor | None = None, size_average=None, ignore_index: int = -100, reduce=None,
        reduction: str = "mean", label_smoothing: float = 0.0, **more: Any,
    ) -> Any:  # fmt: skip
        """`F.cross_entropy(self, target, ...)`, streamed."""
        if size_average is not None or reduce is not None:
            reduction = legacy.legacy_get_string(size_average, reduce)
        if self.ndim > 2 and not self.class_first:  # torch takes the second axis for the classes there
            real = self.written_out("cross_entropy over the second of more than two axes")
            return F.cross_entropy(real, target, weight, None, ignore_index, None, reduction, label_smoothing)
        self.check()
        if isinstance(target, Tensor) and self.class_first and target.dim() == self.ndim:
            target = target.movedim(1, -1)
        soft = isinstance(target, SparseTarget) or (isinstance(target, Tensor) and target.is_floating_point())
        if soft and ignore_index >= 0:
            raise ArgumentError("ignore_index: is not supported for floating point targets")
        weight = None if weight is None else weight.to(self.stream.accumulate_dtype)
        loss = cross_entropy(
            self.stream, self.lead, target, weight=weight, reduction=reduction, ignore_index=None if soft else ignore_index,
            label_smoothing=label_smoothing, engine=self.engine, **more,
        )  # fmt: skip
        dtype = result_dtype(self.dtype)
        return (loss[0].to(dtype), loss[1]) if isinstance(loss, tuple) else loss.to(dtype)


def lazy_logits(
    features: Tensor, weight: Tensor, bias: Tensor | None, maps: tuple = (), engine: str = "auto", *,
    pairs: Sequence[tuple[Tensor, Tensor]] = (), class_scale: Tensor | None = None, grad_filter: float | None = None, group: Any = None,
) -> LazyLogits:  # fmt: skip
    """The logits maps(class_scale * (features weight^T + pairs) + bias) of features (..., D), not yet made.

    pairs: more operands, u (N, R) and v (C, R) each, as adapters have. class_scale: (C,). grad_filter, group: as in
    `linear_cross_entropy`."""
    layer = open_layer(features, weight, bias, group)
    if layer.rows is not None:
        raise ArgumentError(
            "lazy logits are of this rank's rows, but those of all ranks are gathered here (group= has them in `classes` and in `batch`); "
            "give the head its targets, head(features, target)"
        )
    if pairs or class_scale is not None:
        layer.whole("adapters")
    (features, weight, bias), layout = layer.operands, layer.layout
    device = features.device.type
    compute = torch.get_autocast_dtype(device) if in_autocast(device) else None
    if compute is not None and torch.float64 in (features.dtype, weight.dtype):
        compute = None  # autocast leaves float64 alone
    compute = compute or layer.compute_dtype
    dtype = compute or torch.promote_types(features.dtype, weight.dtype)
    # aliases, so that wrappers see tensors that the module made rather than its parameters
    b = None if bias is None else bias.view_as(bias)
    x = features.reshape(-1, features.shape[-1])
    own = ((x, weight.view_as(weight)), *[(u, v.view_as(v)) for u, v in pairs])
    stream = Stream(
        own, bias=b, class_scale=class_scale, maps=maps, compute_dtype=compute, grad_filter=filter_of(grad_filter), layout=layout
    )
    versions = None if torch.compiler.is_compiling() else _versions(stream)
    return LazyLogits(stream, tuple(features.shape[:-1]), dtype, engine, False, versions)


def _is_gone(w: Tensor) -> bool:
    """Was the memory of this tensor taken away?"""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(w)  # pyright: ignore[reportAttributeAccessIssue]
    return w.numel() > 0 and w.device.type != "meta" and not wrapped and w.untyped_storage().size() == 0


def _versions(stream: Stream) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for t in stream.tensors)  # made under inference_mode they have none


def _promoted(dtype: torch.dtype, other: Any) -> torch.dtype:
    """Of a tensor with axes after arithmetic with a number or a floating-point tensor. (torch.result_type breaks a compiled graph.)"""
    return torch.promote_types(dtype, other.dtype) if isinstance(other, Tensor) and other.dim() else dtype


def _joined(maps: tuple) -> tuple:
    """The same maps, fewer: scale, tanh, scale back is a soft cap; two scales by numbers are one."""
    if len(maps) > 1 and isinstance(maps[-1], Scale) and maps[-1].numbers and isinstance(maps[-2], Scale) and maps[-2].numbers:
        maps = (*maps[:-2], Scale.by(maps[-1].numbers[0] * maps[-2].numbers[0]))
    return maps


@dataclass(frozen=True)
class _Recipe:
    """What a pytree of lazy logits has beside its leaves: compared, kept and printed, so without a tensor."""

    pairs: int
    optional: tuple[bool, ...]
    scale: float
    maps: tuple[tuple[type, tuple[float, ...], int], ...]
    compute_dtype: torch.dtype | None
    grad_filter: float
    lead: tuple[int, ...]
    dtype: torch.dtype
    engine: str
    class_first: bool
    versioned: bool
    layout: Any

    def lazy(self, leaves: Sequence[Any]) -> LazyLogits:
        rest = iter(leaves)
        pairs = tuple((next(rest), next(rest)) for _ in range(self.pairs))
        bias, class_scale, given, scale_tensor = (next(rest) if there else None for there in self.optional)
        maps = tuple(cls(numbers, tuple(next(rest) for _ in range(count))) for cls, numbers, count in self.maps)
        stream = Stream(pairs, bias, class_scale, given, self.scale, scale_tensor, maps, self.compute_dtype, grad_filter=self.grad_filter,
                        layout=self.layout)  # fmt: skip
        return LazyLogits(stream, self.lead, self.dtype, self.engine, self.class_first, _versions(stream) if self.versioned else None)


def _flatten(lazy: LazyLogits):
    s = lazy.stream
    optional = tuple(t is not None for t in (s.bias, s.class_scale, s.given, s.scale_tensor))
    maps = tuple((type(m), m.numbers, len(m.tensors)) for m in s.maps)
    recipe = _Recipe(
        len(s.pairs), optional, s.scale, maps, s.compute_dtype, s.grad_filter, lazy.lead, lazy.dtype, lazy.engine, lazy.class_first,
        lazy.versions is not None, s.layout,
    )  # fmt: skip
    return s.tensors, recipe


def _unflatten(leaves, recipe):
    leaves = list(leaves)
    return recipe.lazy(leaves) if all(isinstance(t, Tensor) for t in leaves) else _Leaves(leaves, recipe)


@dataclass
class _Leaves:
    """A pytree of lazy logits whose leaves are no tensors for a while."""

    leaves: list
    recipe: _Recipe


pytree.register_pytree_node(_Leaves, lambda t: (t.leaves, t.recipe), _unflatten)
pytree.register_pytree_node(LazyLogits, _flatten, _unflatten, serialized_type_name="bigclass.LazyLogits")

"""Heads that are an `nn.Linear` with a streamed loss.

A head keeps everything of `nn.Linear`: parameter names and order, initialisation, state_dict keys, copying, hooks. In training it returns
lazy logits (lazy/), on which an unchanged criterion runs streamed; in evaluation and under no_grad real ones. Called with targets it
returns the loss, as a *forward*, so that the hooks of FSDP2 and ZeRO-3 run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any, TypeGuard

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.guards import in_transform
from bigclass.core.plan import ENGINES
from bigclass.core.stream import Map, Scale, Softcap
from bigclass.core.updates import SlabUpdate
from bigclass.heads.lazy import LazyLogits, lazy_logits
from bigclass.losses.cross_entropy import cross_entropy, linear_cross_entropy
from bigclass.losses.inputs import check_smoothing, check_tensor, filter_of
from bigclass.losses.log_prob import linear_log_prob, linear_sequence_log_prob, linear_topk
from bigclass.losses.multi_token import linear_multi_token_cross_entropy
from bigclass.losses.sampling import ClassSampling
from bigclass.losses.targets import SparseTarget
from bigclass.parallel.layer import Spread


def _check_bare(head: nn.Linear) -> None:
    """Raise for parametrized weights (weight_norm and the like), which belong to the class that would be changed, and for quantised ones,
    of which some libraries leave the class of the layer as it was."""
    if parametrize.is_parametrized(head):
        raise ArgumentTypeError(
            "linear: its weight is parametrized, which ties it to its class; torch.nn.utils.parametrize.remove_parametrizations first"
        )
    w = head.weight
    foreign = is_traceable_wrapper_subclass(w) and not type(w).__module__.startswith("torch.")
    if foreign or not w.is_floating_point() or w.dtype.itemsize < 2:
        raise ArgumentTypeError(
            f"linear: expected a weight of floating-point numbers of 16 bits or more, got {type(w).__module__}.{type(w).__qualname__} of "
            f"{w.dtype}; keep a quantised model's head as it was (modules_to_not_convert=['lm_head'])"
        )


def check_own_forward(head: nn.Module) -> None:
    """Raise for a forward that was put on the module itself, which a change of its class leaves there. (accelerate's calls the old one.)"""
    if "forward" in head.__dict__ and not hasattr(head, "_old_forward"):
        raise ArgumentTypeError(
            f"head: {type(head).__module__}.{type(head).__qualname__} has a forward of its own (head.forward was assigned), which changing "
            "its class would not change, so nothing would stream; convert the head before that (with transformers' tp_plan there is no way)"
        )


def change_class(head: nn.Module, cls: type) -> None:
    """Make this module one of class cls. What accelerate's hooks call between them (device_map="auto", offloading) follows."""
    head.__class__ = cls
    old = head.__dict__.get("_old_forward")
    if getattr(old, "__self__", None) is head:
        head.__dict__["_old_forward"] = MethodType(cls.forward, head)  # type: ignore[attr-defined]


def is_plain_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Is this an `nn.Linear`, or timm's, that computes nothing else?"""
    return type(module) is nn.Linear or (type(module).__module__, type(module).__name__) == ("timm.layers.linear", "Linear")


class LinearHead(nn.Linear):
    """What heads share: logits, loss and prediction under one soft cap and scale."""

    # options and their defaults; of the class, so that an nn.Linear that becomes a head (`adopt`) has them
    softcap: float | None = None
    logit_scale: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    grad_filter: float | None = None
    engine: str = "auto"
    group: Any = None
    lazy: bool = True
    always_lazy: bool = False  # in evaluation and under no_grad, too: for a while, where only the loss is wanted
    _is_replica: bool = False  # nn.DataParallel says so of its copies
    _OPTIONS = ("softcap", "logit_scale", "label_smoothing", "z_loss", "ignore_index", "grad_filter", "engine", "group", "lazy")
    _OWN: tuple[str, ...] = ()  # those of a subclass

    def __init__(self, in_features: int, out_features: int, bias: bool, *, device=None, dtype=None, **options: Any) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set(options)

    @classmethod
    def adopt(cls, linear: nn.Linear, **options: Any) -> Any:
        """Make an existing `nn.Linear` this head, in place, and return it: parameters, hooks, optimizers' and EMA's references stay.

        Args:
            linear: an `nn.Linear` (or timm's), not a subclass that computes something else. options: of the head.

        Raises:
            TypeError: for any other module. ValueError: for options that cannot work.
        """
        if not is_plain_linear(linear) and not isinstance(linear, LinearHead):
            raise ArgumentTypeError(f"linear: expected an nn.Linear, got {type(linear).__module__}.{type(linear).__qualname__}")
        if isinstance(linear, LinearHead):
            options.setdefault("group", linear.group)  # how its weight lies does not change with its class
        _check_bare(linear)
        check_own_forward(linear)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._set(options)  # raises before anything of `linear` is changed
        change_class(linear, cls)
        for other in LinearHead.__subclasses__():  # what it was before, too
            for name in (*other._OPTIONS, *other._OWN):
                linear.__dict__.pop(name, None)
        linear.__dict__.update({name: made.__dict__[name] for name in (*cls._OPTIONS, *cls._OWN)})
        return linear

    def release(self) -> nn.Linear:
        """Undo `adopt`: make this module a plain `nn.Linear` again, in place, and return it. (Not if its classes are spread.)"""
        _check_bare(self)
        if self.group is not None and self.group.classes is not None:
            raise ArgumentError("head: its classes are spread over ranks (group=), which an nn.Linear cannot tell; gather its weight first")
        for name in (*self._OPTIONS, *self._OWN):
            self.__dict__.pop(name, None)
        change_class(self, nn.Linear)
        return self

    def _set(self, options: dict[str, Any]) -> None:
        known = (*self._OPTIONS, *self._OWN)
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"{type(self).__name__}: unexpected option {unknown[0]!r}; known: {', '.join(known)}")
        for name in known:
            setattr(self, name, options.get(name, getattr(type(self), name)))
        if self.softcap is not None:
            Softcap.at(self.softcap)  # raises for a cap that is not positive
        check_smoothing(self.label_smoothing, self.z_loss)
        filter_of(self.grad_filter)  # raises for what is no tolerance
        self.group = Spread.of(self.group)
        if self.engine not in ENGINES:
            raise ArgumentError(f"engine: expected one of {ENGINES}, got {self.engine!r}")

    @property
    def streams(self) -> bool:
        """Are the logits of a forward without targets lazy ones now?"""
        made = self.lazy and (self.always_lazy or (self.training and torch.is_grad_enabled())) and not in_transform()
        if made and self._is_replica:
            raise ArgumentError(
                "nn.DataParallel cannot gather lazy logits: use DistributedDataParallel (torchrun, accelerate launch), give it one "
                "GPU a process (CUDA_VISIBLE_DEVICES=0), or give the head its targets, head(features, target)"
            )
        return made

    def _output(self, features: Tensor) -> Tensor | LazyLogits:
        """What a forward without targets returns."""
        if not self.streams:
            return self.logits(features)
        made = lazy_logits(features, self.weight, self.bias, self.maps, self.engine, grad_filter=self.grad_filter, group=self.group)
        # DeepSpeed's ZeRO-3 gathers a module's weight for its backward when the gradient of a tensor that it returned arrives. It looks
        # into lists and dictionaries for such tensors, not into pytrees: its own mark is put on those of lazy logits here.
        mark = getattr(self, "pre_bwd_fn", None)
        return made if mark is None else pytree.tree_map_only(Tensor, mark.apply, made)

    @property
    def maps(self) -> tuple[Map, ...]:
        """The scale and the soft cap, as a stream has them."""
        maps: list[Map] = [] if self.logit_scale is None else [Scale.by(self.logit_scale)]
        return (*maps, *([] if self.softcap is None else [Softcap.at(self.softcap)]))

    def logits(self, features: Tensor) -> Tensor:
        """Real logits (..., C) in the dtype of a plain `nn.Linear`, scaled and soft-capped; of all ranks' classes."""
        if self.group is not None:
            return lazy_logits(features, self.weight, self.bias, self.maps, self.engine, group=self.group).materialize()
        s = nn.functional.linear(features, self.weight, self.bias)
        if self.logit_scale is not None:
            s = s * self.logit_scale
        return s if self.softcap is None else Softcap.forward(s, (self.softcap,), ())

    def predict(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row and their classes, (..., k) each, without the full logits. No gradients."""
        values, indices = linear_topk(
            features,
            self.weight,
            k,
            linear_bias=self.bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            engine=self.engine,
            group=self.group,
        )
        return values, indices

    def _loss(self, features: Tensor | LazyLogits, target: Tensor | SparseTarget, **options: Any) -> Any:
        """features: or the head's lazy logits, to which others (an adapter around it) may have added."""
        soft = isinstance(target, SparseTarget)
        if not soft:
            check_tensor("target", target)
        index = not soft and not target.is_floating_point()
        options |= {
            "label_smoothing": self.label_smoothing, "z_loss": self.z_loss, "engine": self.engine,
            "ignore_index": self.ignore_index if index else None,
        }  # fmt: skip
        if isinstance(features, LazyLogits):
            if options.pop("sample", None) is not None:
                raise ArgumentError("sample: is taken with the features, not with lazy logits; call head(features, target, sample=...)")
            return cross_entropy(features.stream, features.lead, target, **options)
        return linear_cross_entropy(
            features, self.weight, target, linear_bias=self.bias, softcap=self.softcap, logit_scale=self.logit_scale,
            grad_filter=self.grad_filter, group=self.group, **options,
        )  # fmt: skip

    def loss(self, features: Tensor, target: Tensor | SparseTarget, **options: Any) -> Any:
        """`self(features, target, ...)` under a name of its own; it is a forward, so hooks run."""
        return self(features, target, **options)

    def extra_repr(self) -> str:
        extra = [f"{name}={getattr(self, name)!r}" for name in self._OPTIONS if getattr(self, name) != getattr(LinearHead, name)]
        return ", ".join([super().extra_repr(), *extra])


class CCEHead(LinearHead):
    r"""A linear classifier over many classes, with cross-entropy streamed.

    `head(features)` gives logits (..., C): in training lazy ones, on which an unchanged criterion runs streamed, in evaluation and under
    no_grad real ones. `head(features, target)` gives the loss, `head.predict(features, k)` the top k.

    Args:
        in_features: D. num_classes: C. bias, device, dtype: as in `nn.Linear`.
        softcap, logit_scale (a number): part of the logits. engine: as in `linear_cross_entropy`.
        label_smoothing, z_loss, ignore_index: of `head(features, target)`; a criterion of your own has its own.
        grad_filter: as in `linear_cross_entropy`; of lazy logits, too, whatever criterion reads them.
        group: as in `linear_cross_entropy`. The weight is then (M, D), this rank's shard: make the head with its number of classes M, or
            make it whole and call `bigclass.shard_classes(head, mesh)`.
        lazy: False: real logits in training, too.

    Example:
        >>> head = bigclass.CCEHead(768, 100_000)
        >>> loss = head(features, labels)  # features (N, 768), labels (N,)
    """

    def __init__(
        self, in_features: int, num_classes: int, bias: bool = True, device=None, dtype=None, *,
        softcap: float | None = None, logit_scale: float | None = None, label_smoothing: float = 0.0,
        z_loss: float = 0.0, ignore_index: int = -100, grad_filter: float | None = None, engine: str = "auto", group: Any = None,
        lazy: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, num_classes, bias, device=device, dtype=dtype, softcap=softcap, logit_scale=logit_scale,
            label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, grad_filter=grad_filter, engine=engine,
            group=group, lazy=lazy,
        )  # fmt: skip

    @property
    def num_classes(self) -> int:
        return self.out_features

    def forward(
        self,
        features: Tensor,
        target: Tensor | SparseTarget | None = None,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        return_stats: bool = False,
        update: SlabUpdate | None = None,
        sample: ClassSampling | None = None,
    ):  # type: ignore[override]
        """Logits (..., C) without a target (lazy in training); with one ((...) indices, (..., C) probabilities or a `SparseTarget`)
        the loss of `linear_cross_entropy`, whose options these are (update: the weight's gradient, handed on slab by slab;
        sample: a share of the classes)."""
        if target is None:
            if sample is not None:
                raise ArgumentError("sample: belongs to a loss; call head(features, target, sample=...)")
            return self._output(features)
        return self._loss(features, target, weight=weight, reduction=reduction, return_stats=return_stats, update=update, sample=sample)


class LMHead(LinearHead):
    r"""A language model's output layer, with the next-token loss streamed.

    `head(hidden)` gives logits (..., T, C), lazy in training as those of `CCEHead`.
    `head(hidden, labels)` gives the loss: the features of position t are scored against
    labels[t + shift], so labels are the input ids themselves (ignore_index where nothing is to be learnt).

    Args:
        hidden_size: D. vocab_size: C. bias, device, dtype: as in `nn.Linear` (without bias by default, as language models are).
        shift: 1 for next-token prediction; 0 if labels are shifted already.
        softcap, logit_scale (a number), label_smoothing, z_loss, ignore_index, grad_filter, engine, group: as in
            `linear_cross_entropy`.

    softcap, logit_scale and grad_filter are part of the logits; label_smoothing, z_loss and ignore_index are of `head(hidden, labels)`.

    `head.log_prob(hidden, index)` and `head.sequence_log_prob(hidden, labels)` give log-probabilities for policy and preference training,
    `head.multi_token_loss(features, labels)` the loss of features that predict several tokens ahead. All are forwards of the module, so
    hooks run.

    Tied embeddings: `head.tie(embedding)` makes the embedding's weight the head's own parameter.

    Example:
        >>> head = bigclass.LMHead(768, 50257)
        >>> loss = head(hidden, input_ids)  # hidden (B, T, 768), input_ids (B, T)
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, bias: bool = False, device=None, dtype=None, *, shift: int = 1,
        softcap: float | None = None, logit_scale: float | None = None, label_smoothing: float = 0.0,
        z_loss: float = 0.0, ignore_index: int = -100, grad_filter: float | None = None, engine: str = "auto", group: Any = None,
        lazy: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            hidden_size, vocab_size, bias, device=device, dtype=dtype, softcap=softcap, logit_scale=logit_scale,
            label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, grad_filter=grad_filter, engine=engine,
            group=group, lazy=lazy,
        )  # fmt: skip
        self.shift = shift

    shift: int = 1
    _OWN = ("shift",)

    def tie(self, embedding: nn.Embedding) -> LMHead:
        """Share the weight of `embedding` (C, D). Returns the head."""
        if embedding.weight.shape != self.weight.shape:
            raise ArgumentError(f"embedding: expected a weight of shape {tuple(self.weight.shape)}, got {tuple(embedding.weight.shape)}")
        self.weight = embedding.weight
        return self

    def log_prob(
        self, hidden: Tensor, index: Tensor, *, shift: int | None = None, temperature: float = 1.0, return_entropy: bool = False
    ) -> Any:
        """log p of index (..., T) or (..., T, K) and, if asked, the entropy (..., T), as `linear_log_prob` gives them.

        shift: instead of the head's: with 1 position t's features are scored at index[t + 1], and the results have T - 1 positions."""
        shift = self.shift if shift is None else shift
        return self(hidden, index, by=partial(linear_log_prob, shift=shift, temperature=temperature, return_entropy=return_entropy))

    def sequence_log_prob(
        self, hidden: Tensor, labels: Tensor, *, shift: int | None = None, average: bool = False, temperature: float = 1.0
    ) -> Tensor:
        """log p of whole sequences (...): the sum (average: the mean) over the labels (..., T) that count: `linear_sequence_log_prob`."""
        shift = self.shift if shift is None else shift
        return self(hidden, labels, by=partial(linear_sequence_log_prob, shift=shift, average=average, temperature=temperature))

    def multi_token_loss(
        self, features: Tensor | Sequence[Tensor], labels: Tensor, shifts: Sequence[int] = (1, 2, 3), **options: Any
    ) -> Any:
        """The loss of `linear_multi_token_cross_entropy` under this one head, with its label_smoothing and z_loss.

        features: K times (..., T, D), or one tensor of them (K, ..., T, D); or (..., T, D) for all shifts.
        options: loss_weights, return_losses. Heads of their own are as many `LMHead`s: the sum of head_k(features_k, labels, shift=k)."""
        own = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        return self(features, labels, by=partial(linear_multi_token_cross_entropy, shifts=shifts, **own, **options))

    def forward(
        self,
        hidden: Any,
        labels: Tensor | None = None,
        *,
        shift: int | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        return_stats: bool = False,
        update: SlabUpdate | None = None,
        by: Callable | None = None,
    ):  # type: ignore[override]
        """Logits (..., T, C) without labels (lazy in training); with labels (..., T) the loss of `linear_cross_entropy`.

        shift: instead of the head's. update: takes the weight's gradient slab by slab; not of a weight that another layer uses too
        (tied embeddings), whose gradient comes in parts. by: a function of the layer and the labels to compute in place of that loss, of
        itself alone (`log_prob` and others come through here: wrappers gather the weight around a forward only)."""
        if by is not None:
            return by(
                hidden, self.weight, labels, linear_bias=self.bias, softcap=self.softcap, logit_scale=self.logit_scale,
                ignore_index=self.ignore_index, grad_filter=self.grad_filter, engine=self.engine, group=self.group,
            )  # fmt: skip
        if labels is None:
            return self._output(hidden)
        check_tensor("labels", labels)
        if labels.is_floating_point():
            raise ArgumentError(
                f"labels: expected token indices (..., T), got {labels.dtype}; use linear_cross_entropy for class probabilities"
            )
        return self._loss(
            hidden, labels, shift=self.shift if shift is None else shift, weight=weight, reduction=reduction,
            return_stats=return_stats, update=update,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.shift == 1 else f", shift={self.shift}")

r"""One-vs-all losses: sums over classes of an elementwise term, and how to add one.

    loss_i = sum_j v_j [(1 - t_ij) negative(s_ij) + t_ij p_j positive(s_ij)]          t targets, v `weight`, p `pos_weight`

(Between 0 and 1 a loss may have its own form, `mixture`.) Targets are few a row: with P_i the row's positives (t_ik their values, 1
without) and f a floor that all classes have (smoothing),

    loss_i = sum_{j not in P_i} v_j mixture(s_ij, f, p_j)  +  sum_{j in P_i} v_j mixture(s_ij, t_ij, p_j)

the first a fold that leaves the picks out, the second arithmetic on picks. Dense targets are a fold over an N x C tensor.
From its two functions each loss gets its folds, for both engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import SumFold, register_fold
from bigclass.core.guards import autograd_inside_op
from bigclass.core.row_losses import register_row_loss
from bigclass.core.triton_form import TritonForm, WrittenForm

Work = Callable[[int], Tensor]


class ElementwiseLoss:
    r"""A one-vs-all loss: what a class costs where it is a positive, and where it is not. Register with `register_elementwise_loss`.

    `positive` and `negative` take logits of any shape and the options' numbers, in order, and are plain differentiable PyTorch.
    All else is optional: slopes (else autograd differentiates a tile), Triton forms of the negatives (else a GPU runs the tiled engine).

    Attributes:
        name: of the loss, for `linear_elementwise_loss(..., loss=name)` and `MultiLabelHead(loss=name)`.
        options: names and defaults of its constants. absent: of those that may be None, what None stands for.
        vanishes: are negative(-inf) and its slope exactly 0 for every option? Positives are then left out at no cost.
        weight: of the Triton forms, see `Fold.weight`: 3 takes tiles that have registers to spare.

    Example:
        >>> @bigclass.register_elementwise_loss
        ... class Exponential(bigclass.ElementwiseLoss):
        ...     name, options, vanishes = "exponential", {"rate": 1.0}, True
        ...
        ...     @staticmethod
        ...     def positive(s, rate):
        ...         return torch.exp(-rate * s)
        ...
        ...     @staticmethod
        ...     def negative(s, rate):
        ...         return torch.exp(rate * s)
        >>> loss = bigclass.linear_elementwise_loss(x, w, positives, loss="exponential", rate=0.5)
    """

    name: ClassVar[str] = ""
    options: ClassVar[Mapping[str, float]] = {}
    absent: ClassVar[Mapping[str, float]] = {}
    vanishes: ClassVar[bool] = False
    weight: ClassVar[int] = 3

    @staticmethod
    def positive(s: Tensor, *numbers: float) -> Tensor:
        """What a positive costs at logit s."""
        raise NotImplementedError

    @staticmethod
    def negative(s: Tensor, *numbers: float) -> Tensor:
        """What a negative costs at logit s."""
        raise NotImplementedError

    @classmethod
    def negative_with_slope(cls, s: Tensor, *numbers: float) -> tuple[Tensor, Tensor]:
        """(negative, d negative / ds). Overwrite it where both share work."""
        return _with_slope(cls.negative, s, *numbers)

    @classmethod
    def negative_in_place(cls, s: Tensor, work: Work, *numbers: float) -> Tensor | None:
        """negative(s), in one of the buffers work(0), work(1), ..., leaving its slope in s: large tensors then cost no allocations,
        which on a CPU can cost more than the arithmetic. None: not written."""
        return None

    @classmethod
    def mixture_in_place(cls, s: Tensor, t: Any, p: Any, work: Work, *numbers: float) -> Tensor | None:
        """The same of mixture."""
        return None

    @classmethod
    def mixture(cls, s: Tensor, t: Any, p: Any, *numbers: float) -> Tensor:
        """(1 - t) negative(s) + t p positive(s), for t and p that broadcast to s."""
        return (1.0 - t) * cls.negative(s, *numbers) + (t * p) * cls.positive(s, *numbers)

    @classmethod
    def mixture_with_slope(cls, s: Tensor, t: Any, p: Any, *numbers: float) -> tuple[Tensor, Tensor]:
        """(mixture, its derivative by s)."""
        return _with_slope(lambda s, *numbers: cls.mixture(s, t, p, *numbers), s, *numbers)

    @staticmethod
    def zero_below(*numbers: float) -> float:
        """Where s lies below this, negative and its slope are exactly 0, so that work can be skipped. -inf: nowhere."""
        return -math.inf

    @classmethod
    def check(cls, **options: float) -> None:
        """Raise for options that cannot work."""

    # (s, *numbers); the last two, for dense targets and smoothing, (s, t, p, *numbers). Either kind is made of the other where it lacks.
    negative_triton: ClassVar[TritonForm | None] = None
    negative_slope_triton: ClassVar[TritonForm | None] = None
    positive_triton: ClassVar[TritonForm | None] = None
    positive_slope_triton: ClassVar[TritonForm | None] = None
    mixture_triton: ClassVar[TritonForm | None] = None
    mixture_slope_triton: ClassVar[TritonForm | None] = None


def _with_slope(function: Callable[..., Tensor], s: Tensor, *numbers: float) -> tuple[Tensor, Tensor]:
    """(function(s), its elementwise derivative) by autograd."""
    with autograd_inside_op():
        leaf = s.detach().requires_grad_()
        value = function(leaf, *numbers)
        (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True) if value.requires_grad else (None,)
    return value.detach(), torch.zeros_like(s) if slope is None else slope


@dataclass(frozen=True)
class Registered:
    """A loss and the folds that were made of it, each for no class vectors and for both, (v, p)."""

    loss: type[ElementwiseLoss]
    negatives: tuple[type[SumFold], type[SumFold]]  # tensors (), (v,)
    floor: tuple[type[SumFold], type[SumFold]]  # numbers (f, ...); tensors (), (v, p)
    dense: tuple[type[SumFold], type[SumFold]]  # tensors (t,), (t, v, p)
    row_loss: str


LOSSES: dict[str, Registered] = {}

AnyLoss = TypeVar("AnyLoss", bound=type[ElementwiseLoss])


def register_elementwise_loss(cls: AnyLoss) -> AnyLoss:
    """Make an `ElementwiseLoss` known under its `name`, with its folds for both engines.

    Raises:
        ValueError: for a name that is taken by another class.
    """
    taken = LOSSES.get(cls.name)
    if taken is not None and taken.loss.__qualname__ != cls.__qualname__:
        raise ArgumentError(f"{cls.__name__}.name {cls.name!r} is taken by {taken.loss.__qualname__}; choose another name")
    row_loss = f"one_vs_all_{cls.name}"
    register_row_loss(row_loss, affine=True)(_row_loss(cls))
    negatives = _fold(cls, "", ()), _fold(cls, "weighted", ("v",))
    floor = _fold(cls, "floor", ("f",)), _fold(cls, "floor_weighted", ("v", "p", "f"))
    dense = _fold(cls, "dense", ("t",)), _fold(cls, "dense_weighted", ("t", "v", "p"))
    LOSSES[cls.name] = Registered(cls, negatives, floor, dense, row_loss)
    return cls


def registered(name: str) -> Registered:
    """The loss of that name. ValueError where there is none."""
    if name not in LOSSES:
        raise ArgumentError(f"loss: expected one of {sorted(LOSSES)} (or register_elementwise_loss your own), got {name!r}")
    return LOSSES[name]


def constants_of(loss: type[ElementwiseLoss], options: Mapping[str, Any]) -> dict[str, float]:
    """The constants by name and in order, defaults filled in, once they are known to be right."""
    unknown = [name for name in options if name not in loss.options]
    if unknown:
        raise TypeError(f"{loss.name}: unexpected option {unknown[0]!r}; known: {', '.join(loss.options) or 'none'}")
    made: dict[str, float] = {}
    for name, default in loss.options.items():
        value = options.get(name, default)
        value = loss.absent.get(name) if value is None else value
        if not isinstance(value, int | float) or math.isnan(value):
            raise ArgumentTypeError(f"{name}: expected a number, got {value!r}")
        made[name] = float(value)
    loss.check(**made)
    return made


def numbers_of(loss: type[ElementwiseLoss], options: Mapping[str, Any]) -> tuple[float, ...]:
    """The values of `constants_of`."""
    return tuple(constants_of(loss, options).values())


def _fold(cls: type[ElementwiseLoss], suffix: str, reads: tuple[str, ...]) -> type[SumFold]:
    """The fold of a loss that reads, beside s and the options: v, p class vectors, t an N x C target, f (a number) that of all classes."""
    axes = tuple(["grid" if r == "t" else "folded" for r in reads if r != "f"])
    mixed = "t" in reads or "f" in reads

    def split(numbers: Sequence[float], tensors: Sequence[Tensor]) -> tuple[Any, Any, Any, Sequence[float]]:
        """(t, v, p, options)"""
        given = dict(zip([r for r in reads if r != "f"], tensors, strict=True))
        t, numbers = (numbers[0], numbers[1:]) if "f" in reads else (given.get("t"), numbers)
        return t, given.get("v"), given.get("p", 1.0), numbers

    def both(s: Tensor, numbers: Sequence[float], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        t, v, p, options = split(numbers, tensors)
        value, slope = cls.mixture_with_slope(s, t, p, *options) if mixed else cls.negative_with_slope(s, *options)
        return (value, slope) if v is None else (value * v, slope * v)

    class Made(SumFold):
        name: ClassVar[str] = f"{cls.name}_{suffix}" if suffix else cls.name
        tensor_axes: ClassVar[tuple[str, ...]] = axes
        vanishes: ClassVar[bool] = cls.vanishes and not mixed
        weight: ClassVar[int] = cls.weight

        @property
        def zero_below(self) -> float:
            return -math.inf if mixed else cls.zero_below(*self.numbers)

        @staticmethod
        def term(s, numbers, tensors):
            t, v, p, options = split(numbers, tensors)
            value = cls.mixture(s, t, p, *options) if mixed else cls.negative(s, *options)
            return value if v is None else value * v

        @staticmethod
        def slope(s, numbers, tensors):
            return both(s, numbers, tensors)[1]

        @classmethod
        def term_and_slope(cls, s, numbers, tensors):
            return both(s, numbers, tensors)

        def slope_in_place(self, s, work, tensors):
            t, v, p, options = split(self.numbers, tensors)
            value = cls.mixture_in_place(s, t, p, work, *options) if mixed else cls.negative_in_place(s, work, *options)
            if v is not None and value is not None:
                value.mul_(v)
                s.mul_(v)
            return value

        term_triton = _form(cls, reads, "")
        slope_triton = _form(cls, reads, "_slope")

    Made.__name__ = f"{cls.__name__}Fold"
    Made.__qualname__ = f"{cls.__qualname__}.{Made.name}"
    Made.__doc__ = f"sum_j v_j {'mixture(s_j, t, p)' if mixed else 'negative(s_j)'} of {cls.__name__}."
    return register_fold(dataclass(frozen=True, eq=False)(Made))


def _form(cls: type[ElementwiseLoss], reads: tuple[str, ...], kind: str) -> TritonForm | None:
    """The Triton form of a fold's term (kind "") or slope ("_slope"), made of the loss's; None where these are missing."""
    options = "".join([f", n{i}" for i in range(len(cls.options))])
    negative, positive = getattr(cls, f"negative{kind}_triton"), getattr(cls, f"positive{kind}_triton")
    mixture = getattr(cls, f"mixture{kind}_triton")
    forms: dict[str, TritonForm | None] = {"negative": negative}
    value = f"negative(s{options})"
    if negative is None and mixture is not None:
        forms, value = {"mixture": mixture}, f"mixture(s, 0.0, 1.0{options})"
    if "t" in reads or "f" in reads:
        t, p = "t" if "t" in reads else "f", "p" if "p" in reads else "1.0"
        if mixture is not None:
            forms, value = {"mixture": mixture}, f"mixture(s, {t}, {p}{options})"
        else:
            forms["positive"] = positive
            value = f"((1.0 - {t}) * negative(s{options}) + {t} * {p} * positive(s{options}))"
    there = {name: form for name, form in forms.items() if form is not None}
    if len(there) < len(forms):
        return None
    arguments = "".join([f", {r}" for r in reads])
    return WrittenForm(f"def form(s{arguments}{options}):\n    return {value}{' * v' if 'v' in reads else ''}\n", there)


def _row_loss(cls: type[ElementwiseLoss]) -> Callable[..., Tensor]:
    def row_loss(folds, picked, args, numbers):
        """args: (N,) factor [, (N, K) which picks there are [, their targets] [, v and p there]]. The fold holds all other classes."""
        factor, *at_picks = args
        if not at_picks:
            return factor * folds[0][0]
        there, *given = at_picks
        v, p = given[-2:] if len(given) > 1 else (1.0, 1.0)
        terms = v * (cls.mixture(picked, given[0], p, *numbers) if len(given) % 2 else p * cls.positive(picked, *numbers))
        return factor * (folds[0][0] + torch.where(there > 0, terms, 0.0).sum(1))

    row_loss.__qualname__ = f"{cls.__qualname__}.row_loss"
    return row_loss

"""The recipe of the logits.

A stream says how the logit of row i and class j is made, without making it:

    z_ij = scale * (class_scale_j * (sum over pairs p of x_p[i] . w_p[j])  +  given_ij  +  bias_j)
    s_ij = maps(z_ij)

With `bias_last` the bias stands behind the scale, z_ij = scale * (...) + bias_j, as that of a contrastive loss does.
Several operand pairs are a sum of products (a LoRA head is two pairs, and no copy of w is made).
`class_scale` is 1/||w_j|| for normalised heads; `normalized` says that it is, and then dw_j goes through the norm (engines/sink.py)
and class_scale itself gets no gradient, which would be a second C x D tensor on its way into dw.
`given` is a stored N x C tensor, read tile by tile.
The leading scale is not a map of its own but part of z, because a product by a scalar commutes with the GEMM:
it costs nothing in a tile, and its gradient is sum_ij (dL/dz_ij)(z_ij/scale) = <x, dx_raw> + <b, db_raw>,
two dot products over N x D and C numbers instead of one more pass over N x C.

Maps bend the logits: each is a small class with a torch form and a Triton form, registered by name, because a custom
op takes tensors, numbers and strings but no objects. To add one, subclass `Map` under `@register_map`; engines need no edit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.shards import Layout
from bigclass.core.triton_form import TritonForm, triton_form

if TYPE_CHECKING:  # the name inside Triton forms; bound when the form is compiled
    import triton.language as tl


@dataclass(frozen=True, eq=False)
class Map:
    """An elementwise function of the logits, s = f(z; numbers, tensors).

    numbers: constants. tensors: learnable parameters of shape [] or [1]; they get gradients.
    """

    numbers: tuple[float, ...] = ()
    tensors: tuple[Tensor, ...] = ()

    name: ClassVar[str] = ""
    needs_input: ClassVar[bool] = True  # does `backward` read z? (s is always there)

    def told_by_output(self) -> bool:
        """Is the slope told, in the Triton form too, by s alone, even if s is off by 2^-12, as logits saved in 16 bits are?"""
        return False

    @staticmethod
    def forward(z: Tensor, numbers: Sequence[float], tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """s from z, elementwise. Write to `out` when it is given (it may be z itself)."""
        raise NotImplementedError

    @staticmethod
    def backward(g: Tensor, z: Tensor | None, s: Tensor, numbers: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        """dL/dz from g = dL/ds. May overwrite g. z is None unless `needs_input`."""
        raise NotImplementedError

    @staticmethod
    def tensor_gradients(g: Tensor, z: Tensor | None, s: Tensor, numbers: Sequence[float], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """dL/dtensor for each tensor, summed over this tile. Called before `backward` and must leave g alone."""
        return ()

    # forward_triton(z, *tensors, *numbers) -> s and backward_triton(g, z, s, *tensors, *numbers) -> dL/dz, on fp32 tiles
    forward_triton: ClassVar[TritonForm | None] = None
    backward_triton: ClassVar[TritonForm | None] = None


AnyMap = TypeVar("AnyMap", bound=Map)

MAPS: dict[str, type[Map]] = {}


def register_map(cls: type[AnyMap]) -> type[AnyMap]:
    """Make a `Map` known under its `name`, so that it can cross a custom op."""
    check_name(cls.name, MAPS, cls)
    MAPS[cls.name] = cls
    return cls


def check_name(name: str, registry: dict, cls: type) -> None:
    """Raise unless `name` can cross a custom op and is not taken in `registry`."""
    if not name or not all(c.isalnum() or c in "_." for c in name):
        raise ArgumentError(f"{cls.__name__}.name must be letters, digits, '_' or '.', got {name!r}")
    if name in registry and registry[name].__qualname__ != cls.__qualname__:
        raise ArgumentError(f"{cls.__name__}.name {name!r} is taken by {registry[name].__qualname__}; choose another name")


@register_map
@dataclass(frozen=True, eq=False)
class Scale(Map):
    """s = a z, with a a number or a learnable scalar tensor. As the first map it is absorbed into the stream's scale."""

    name: ClassVar[str] = "scale"
    needs_input: ClassVar[bool] = True

    @classmethod
    def by(cls, factor: float | Tensor) -> Scale:
        """The map that multiplies by `factor`."""
        return cls(tensors=(factor,)) if isinstance(factor, Tensor) else cls(numbers=(float(factor),))

    @staticmethod
    def forward(z, numbers, tensors, out=None):
        return torch.mul(z, tensors[0].reshape(()) if tensors else numbers[0], out=out)

    @staticmethod
    def backward(g, z, s, numbers, tensors):
        return g.mul_(tensors[0].reshape(()) if tensors else numbers[0])

    @staticmethod
    def tensor_gradients(g, z, s, numbers, tensors):
        return ((g * z).sum().reshape(tensors[0].shape),) if tensors and z is not None else ()

    @triton_form
    def forward_triton(z, a):
        return z * a

    @triton_form
    def backward_triton(g, z, s, a):
        return g * a


@register_map
@dataclass(frozen=True, eq=False)
class Softcap(Map):
    """s = c tanh(z / c): keeps |s| below c (Gemma 2, arXiv:2408.00118). ds/dz = 1 - (s/c)^2, from s alone."""

    name: ClassVar[str] = "softcap"
    needs_input: ClassVar[bool] = False

    @classmethod
    def at(cls, cap: float) -> Softcap:
        """The soft cap at `cap` > 0."""
        if not 0 < cap < math.inf:
            raise ArgumentError(f"softcap must be finite and greater than 0, got {cap}; leave it None for no cap")
        return cls(numbers=(float(cap),))

    def told_by_output(self):
        # The slope is off by 2^-11 / c. Where it is 0, at -c, a class with a bias of -inf must get next to nothing: p is e^-2c there.
        return self.numbers[0] >= 8.0

    @staticmethod
    def forward(z, numbers, tensors, out=None):
        s = torch.mul(z, 1.0 / numbers[0], out=out)
        s = torch.tanh(s, out=out)
        return torch.mul(s, numbers[0], out=out)

    @staticmethod
    def backward(g, z, s, numbers, tensors):
        # g - g (s/c)^2 in two passes and no buffer beyond one product
        return g.addcmul_(g * s, s, value=-1.0 / numbers[0] ** 2)

    @triton_form
    def forward_triton(z, c):
        u = z * (1.0 / c)
        v = tl.abs(u)
        e = tl.exp2(-2.885390081777927 * v)  # e^(-2v)
        # below 1/4, where 1 - e cancels, the series to u^9
        u2 = u * u
        series = u + u * u2 * (-0.3333333333333333 + u2 * (0.13333333333333333 + u2 * (-0.05396825396825397 + u2 * 0.021869488536155203)))
        tanh = (1.0 - e) / (1.0 + e)
        return c * tl.where(v < 0.25, series, tl.where(u < 0.0, -tanh, tanh))

    @triton_form
    def backward_triton(g, z, s, c):
        r = s * (1.0 / c)
        return g * (1.0 - r * r)


@dataclass(frozen=True, eq=False)
class Stream:
    """How the logits of N rows over C classes are made (module docstring has the formula).

    pairs: ((x_p (N, D_p), w_p (C, D_p)), ...). bias: (C,). class_scale: (C,). given: (N, C).
    normalized: class_scale is `inverse_norms(w)` of the one pair (norms.py), a function of w and no tensor of its own.
    bias_last: is the bias added after the scale?
    grad_filter: of a block of rows of dL/dz, the relative error that products of the gradient may make by leaving out small columns
    (engines/filter.py); 0: none.
    scale: a number times, if `scale_tensor` (shape [] or [1]) is there, a learnable scalar. maps: applied in order.
    compute_dtype: what the products' operands are cast to, tile by tile, on devices with units for it
    (autocast sets it); None: the wider of each pair's dtypes. Sums are always in fp32 (fp64 for fp64 operands).
    layout: how classes and rows are spread over ranks, for those who merge what the core folds; then w, bias and class_scale are this
    rank's, and the core itself is only handed streams without one.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...] = ()
    bias: Tensor | None = None
    class_scale: Tensor | None = None
    given: Tensor | None = None
    scale: float = 1.0
    scale_tensor: Tensor | None = None
    maps: tuple[Map, ...] = ()
    compute_dtype: torch.dtype | None = None
    normalized: bool = False
    bias_last: bool = False
    grad_filter: float = 0.0
    layout: Layout | None = None

    def __post_init__(self) -> None:
        # A leading Scale is absorbed: exact, and free in every tile.
        maps, scale, tensor = list(self.maps), self.scale, self.scale_tensor
        while maps and not self.bias_last and isinstance(maps[0], Scale) and not (maps[0].tensors and tensor is not None):
            first = maps.pop(0)
            if first.tensors:
                tensor = first.tensors[0]
            else:
                scale = scale * first.numbers[0]
        object.__setattr__(self, "maps", tuple(maps))
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "scale_tensor", tensor)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C), C of all ranks."""
        if self.layout is not None and self.layout.classes is not None:
            return self.tensors[0].shape[0], self.layout.classes.total
        if self.pairs:
            return self.pairs[0][0].shape[0], self.pairs[0][1].shape[0]
        assert self.given is not None
        return self.given.shape[0], self.given.shape[1]

    @property
    def is_linear(self) -> bool:
        """Are the logits x w^T + b, nothing else, in the operands' own dtype?"""
        bare = self.class_scale is None and self.given is None and self.scale_tensor is None and self.scale == 1.0 and self.layout is None
        return bare and len(self.pairs) == 1 and not self.maps and self.compute_dtype is None

    @property
    def features(self) -> int:
        """D, summed over the pairs."""
        return sum(x.shape[1] for x, _ in self.pairs)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the stream, in the order of the recipe string."""
        own = [t for pair in self.pairs for t in pair]
        own += [t for t in (self.bias, self.class_scale, self.given, self.scale_tensor) if t is not None]
        return own + [t for m in self.maps for t in m.tensors]

    @property
    def device(self) -> torch.device:
        return self.pairs[0][0].device if self.pairs else self.tensors[0].device

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """fp64 if any operand of the products is fp64, else fp32."""
        for x, w in self.pairs:
            if x.dtype == torch.float64 or w.dtype == torch.float64:
                return torch.float64
        return torch.float64 if self.given is not None and self.given.dtype == torch.float64 else torch.float32

    def check(self) -> None:
        """Raise for shapes, dtypes or devices that do not fit together."""
        if not self.pairs and self.given is None:
            raise ArgumentError("a stream needs at least one operand pair or a given N x C tensor")
        n, c = self.shape
        for p, (x, w) in enumerate(self.pairs):
            if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
                raise ArgumentError(f"pair {p}: expected x (N, D) and w (C, D), got {tuple(x.shape)} and {tuple(w.shape)}")
            if x.shape[0] != n or w.shape[0] != c:
                raise ArgumentError(f"pair {p}: expected {n} rows and {c} classes, got {x.shape[0]} and {w.shape[0]}")
        for label, t, shape in (
            ("bias", self.bias, (c,)),
            ("class_scale", self.class_scale, (c,)),
            ("given", self.given, (n, c)),
        ):
            if t is not None and tuple(t.shape) != shape:
                raise ArgumentError(f"{label}: expected shape {shape}, got {tuple(t.shape)}")
        if self.normalized and (len(self.pairs) != 1 or self.class_scale is None or self.class_scale.requires_grad):
            raise ArgumentError(
                "normalized: expected one operand pair and, as class_scale, its inverse_norms, which get no gradient of their own; got "
                f"{len(self.pairs)} pairs and class_scale {'None' if self.class_scale is None else 'that requires one'}"
            )
        if self.grad_filter:
            self._check_filter()
        if self.scale_tensor is not None and self.scale_tensor.numel() != 1:
            raise ArgumentError(f"scale: expected a tensor of shape () or (1,), got {tuple(self.scale_tensor.shape)}")
        device = self.device
        for t in self.tensors:
            if not t.is_floating_point():
                raise ArgumentTypeError(f"a stream's tensors must be floating point, got {t.dtype}")
            if t.device != device:
                raise ArgumentError(f"a stream's tensors must be on one device, got {device} and {t.device}")

    def _check_filter(self) -> None:
        dtypes = {self.compute_dtype or torch.promote_types(x.dtype, w.dtype) for x, w in self.pairs}
        least = max([torch.finfo(dtype).eps / 2 for dtype in dtypes], default=0.0)
        if not 0.0 < self.grad_filter < 1.0:
            raise ArgumentError(f"grad_filter: expected 0 (exact) or a relative error between 0 and 1, got {self.grad_filter}")
        if self.grad_filter < least:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ArgumentError(
                f"grad_filter: products of {names} round by up to {least:g}, so an error of {self.grad_filter:g} cannot be promised; "
                "expected at least that, or None (exact)"
            )
        if self.class_scale is not None and self.class_scale.requires_grad and torch.is_grad_enabled():
            raise ArgumentError("grad_filter: a class scale's own gradient is read off products that it would leave out; leave it None")

    def with_tensors(self, tensors: Sequence[Tensor]) -> Stream:
        """The same recipe over other tensors (in the order of `tensors`)."""
        it = iter(tensors)
        pairs = tuple((next(it), next(it)) for _ in self.pairs)
        optional = [None if t is None else next(it) for t in (self.bias, self.class_scale, self.given, self.scale_tensor)]
        maps = tuple(replace(m, tensors=tuple(next(it) for _ in m.tensors)) for m in self.maps)
        return replace(self, pairs=pairs, bias=optional[0], class_scale=optional[1], given=optional[2], scale_tensor=optional[3], maps=maps)

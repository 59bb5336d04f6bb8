"""The loss side of CLIP and SigLIP as a module: the learnt scale and bias, normalisation, and a streamed loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.plan import ENGINES
from bigclass.losses.contrastive import DIRECTIONS, contrastive_loss, sigmoid_contrastive_loss
from bigclass.losses.inputs import check_tensor, filter_of
from bigclass.parallel.spread import EXCHANGES

# The scale and the bias that the papers begin with.
LOSSES = {"softmax": (1 / 0.07, None), "sigmoid": (10.0, -10.0)}

# Temperature at a step: a tensor of shape (), int64, which counts training forwards from 0.
Schedule = Callable[[Tensor], "Tensor | float"]


class ContrastiveHead(nn.Module):
    """The end of a CLIP: two sets of features in, their loss out, without the matrix of logits.

    `logit_scale` is the logarithm of what similarities are multiplied by, `logit_bias` what is added: names, shapes and meaning of
    open_clip's, so that checkpoints go both ways.

    Args:
        loss: "softmax", symmetric InfoNCE (CLIP), or "sigmoid" (SigLIP).
        init_scale: the scale (not its logarithm) to begin with; None: 1/0.07, sigmoid 10. init_bias: None: no bias, sigmoid -10.
        learnable: is the scale a parameter with a gradient? (A bias is; `head.logit_bias.requires_grad_(False)` fixes it.)
        min_scale, max_scale: what the scale is held in; open_clip's range. None for max_scale: without bound.
        normalize: bring features to length 1, in fp32 where they are of a half type. False: they are already.
        schedule: temperature at each training step, instead of a learnt scale: takes the number of training forwards so far, a tensor
            of shape (), and returns 1/scale, a number or tensor (see `cosine_temperature`). `logit_scale` then follows it without a
            gradient, and the buffer `step` counts, so that a checkpoint resumes the schedule.
        direction, group, exchange, grad_filter, engine: as in `contrastive_loss` ("image" and "text" are the softmax's).

    The scale used never leaves its range, whatever the parameter says. Beyond a bound the gradient is that at the bound, so that the
    parameter can come back; call `head.clamp_()` after each optimizer step (as open_clip does) and it need not walk back first.

    Raises:
        ValueError, TypeError: options that do not fit, and what `contrastive_loss` raises.

    Example:
        >>> head = bigclass.ContrastiveHead()
        >>> loss = head(image_features, text_features)  # (N, D), (N, D)
        >>> loss.backward(); optimizer.step(); head.clamp_()

    Schedules: Kukleva et al., "Temperature Schedules for Self-Supervised Contrastive Methods on Long-Tail Data", arXiv:2303.13664.
    """

    step: Tensor

    def __init__(
        self, loss: str = "softmax", *, init_scale: float | None = None, init_bias: float | None = None, learnable: bool = True,
        min_scale: float = 1.0, max_scale: float | None = 100.0, normalize: bool = True, schedule: Schedule | None = None,
        direction: str = "both", group: Any = None, exchange: str = "auto", grad_filter: float | None = None, engine: str = "auto",
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        if loss not in LOSSES:
            raise ArgumentError(f"loss: expected one of {tuple(LOSSES)}, got {loss!r}")
        if direction not in DIRECTIONS:
            raise ArgumentError(f"direction: expected one of {DIRECTIONS}, got {direction!r}")
        if loss == "sigmoid" and direction != "both":
            raise ArgumentError(f"direction: the sigmoid loss has none, each pair counts once; leave it 'both', got {direction!r}")
        if exchange not in EXCHANGES:
            raise ArgumentError(f"exchange: expected one of {EXCHANGES}, got {exchange!r}")
        if engine not in ENGINES:
            raise ArgumentError(f"engine: expected one of {ENGINES}, got {engine!r}")
        filter_of(grad_filter)  # raises for what is no tolerance
        if schedule is not None and not callable(schedule):
            raise ArgumentTypeError(f"schedule: expected a function of the step, got {type(schedule).__name__}")
        if schedule is not None and init_scale is not None:
            raise ArgumentError(f"init_scale: the schedule sets the scale; leave it None, got {init_scale}")
        usual_scale, usual_bias = LOSSES[loss]
        bounds = _number("min_scale", min_scale), math.inf if max_scale is None else _number("max_scale", max_scale)
        if not 0.0 <= bounds[0] <= bounds[1] or bounds[1] == 0.0:
            raise ArgumentError(f"min_scale, max_scale: expected 0 <= min_scale <= max_scale and max_scale > 0, got {bounds}")
        if schedule is not None:
            init_scale = min(max(usual_scale, bounds[0]), bounds[1])
        self.init_scale = usual_scale if init_scale is None else _number("init_scale", init_scale)
        self.init_bias = usual_bias if init_bias is None else _number("init_bias", init_bias)
        if not (bounds[0] <= self.init_scale <= bounds[1] and 0.0 < self.init_scale < math.inf):
            raise ArgumentError(
                f"init_scale: expected a scale (no logarithm) in [min_scale, max_scale] = {list(bounds)}, got {self.init_scale}"
            )
        self.loss, self.min_scale, self.max_scale, self.normalize = loss, *bounds, normalize
        self.schedule, self.direction, self.group, self.exchange = schedule, direction, group, exchange
        self.grad_filter, self.engine = grad_filter, engine
        learns = learnable and schedule is None
        self.logit_scale = nn.Parameter(torch.empty((), device=device, dtype=dtype), requires_grad=learns)
        self.logit_bias = None if self.init_bias is None else nn.Parameter(torch.empty((), device=device, dtype=dtype))
        if schedule is not None:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew: scale, bias, and the steps of a schedule."""
        with torch.no_grad():
            self.logit_scale.fill_(math.log(self.init_scale))
            if self.logit_bias is not None:
                assert self.init_bias is not None
                self.logit_bias.fill_(self.init_bias)
            if self.schedule is not None:
                self.step.zero_()
                self.logit_scale.copy_(self._scheduled())

    def scale(self) -> Tensor:
        """What similarities are multiplied by now, exp(logit_scale) held in its range: (), float32 (float64 for float64 parameters)."""
        wide = self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32))
        # Through a plain clamp no gradient would reach a parameter beyond its bound, and it would stay there for good.
        slope = torch.where(wide.isfinite(), wide - wide.detach(), 0.0)  # 0, with a gradient
        return (wide.clamp(*self._bounds).detach() + slope).exp()

    @property
    def _bounds(self) -> tuple[float, float]:
        """Of the logarithm."""
        return (math.log(self.min_scale) if self.min_scale > 0.0 else -math.inf), math.log(self.max_scale)

    @torch.no_grad()
    def clamp_(self) -> ContrastiveHead:
        """Bring the parameter itself into its range; to be called after each optimizer step."""
        self.logit_scale.clamp_(*self._bounds)
        return self

    def _scheduled(self) -> Tensor:
        """The logarithm of the scale at this step."""
        assert self.schedule is not None
        temperature = self.schedule(self.step.clone())
        if not isinstance(temperature, Tensor):
            if isinstance(temperature, bool) or not isinstance(temperature, int | float):
                raise ArgumentTypeError(f"schedule: expected it to return a temperature, a number or a tensor, got {temperature!r}")
            if not 0.0 < temperature < math.inf:
                raise ArgumentError(f"schedule: expected it to return a finite temperature > 0, got {temperature}")
            temperature = torch.tensor(temperature, dtype=torch.float64)
        elif temperature.numel() != 1:
            raise ArgumentError(f"schedule: expected it to return one temperature, got shape {tuple(temperature.shape)}")
        elif temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not 0.0 < float(temperature) < math.inf:
            raise ArgumentError(f"schedule: expected it to return a finite temperature > 0, got {float(temperature)}")
        return -temperature.detach().reshape(()).log().clamp(*(-bound for bound in reversed(self._bounds)))

    def forward(
        self, image_features: Tensor, text_features: Tensor, *, positives: Any = None, ignore: Tensor | None = None,
        hard_negatives: Tensor | None = None, reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        """The loss of features (N, D) and (M, D), any length; the options are those of `contrastive_loss`. In training it counts a step."""
        named = {"image_features": image_features, "text_features": text_features, "hard_negatives": hard_negatives}
        if self.normalize:
            named = {name: None if t is None else _unit(name, t) for name, t in named.items()}
        if self.schedule is not None:
            with torch.no_grad():
                self.logit_scale.copy_(self._scheduled())
        options: dict[str, Any] = {
            "positives": positives, "ignore": ignore, "reduction": reduction, "group": self.group, "exchange": self.exchange,
            "grad_filter": self.grad_filter, "engine": self.engine,
        }  # fmt: skip
        if self.loss == "softmax":
            options["direction"] = self.direction
        function = contrastive_loss if self.loss == "softmax" else sigmoid_contrastive_loss
        loss = function(**named, logit_scale=self.scale(), logit_bias=self.logit_bias, **options)
        if self.schedule is not None and self.training:
            self.step += 1
        return loss

    def __deepcopy__(self, memo: dict[int, Any]) -> ContrastiveHead:
        """Of the same ranks: a process group cannot be copied, and a copy of the model (EMA) has no others."""
        memo[id(self.group)] = self.group
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def extra_repr(self) -> str:
        parts = [f"loss={self.loss!r}"]
        if self.schedule is not None:
            parts.append(f"schedule={getattr(self.schedule, '__name__', None) or self.schedule!r}")
        else:
            parts += [f"init_scale={self.init_scale:g}"] + ([] if self.logit_scale.requires_grad else ["learnable=False"])
        parts += [] if self.init_bias is None else [f"init_bias={self.init_bias:g}"]
        parts.append(f"max_scale={self.max_scale:g}")
        usual = {"min_scale": 1.0, "normalize": True, "direction": "both", "exchange": "auto", "grad_filter": None, "engine": "auto"}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        return ", ".join(parts + ([] if self.group is None else ["group=..."]))


def cosine_temperature(low: float, high: float, period: float) -> Schedule:
    """A schedule that swings between two temperatures: high at step 0 and after each period, low half a period later.

        low + (high - low) (1 + cos(2 pi step / period)) / 2

    Args:
        low, high: temperatures, 0 < low <= high. period: in steps.

    Raises:
        ValueError, TypeError: other numbers.

    Example:
        >>> head = bigclass.ContrastiveHead(schedule=bigclass.cosine_temperature(0.1, 1.0, period=10_000))

    Kukleva et al., arXiv:2303.13664, equation 4.
    """
    low, high, period = _number("low", low), _number("high", high), _number("period", period)
    if not 0.0 < low <= high < math.inf:
        raise ArgumentError(f"low, high: expected 0 < low <= high, got {low} and {high}")
    if not 0.0 < period < math.inf:
        raise ArgumentError(f"period: expected a number of steps > 0, got {period}")
    return _Cosine(low, high, period)


class _Cosine:
    """A class, not a closure: heads are pickled."""

    def __init__(self, low: float, high: float, period: float) -> None:
        self.low, self.high, self.period = low, high, period

    def __call__(self, step: Tensor) -> Tensor:
        # A late step has no digits left in float32, hence the remainder first, of integers; no number is read, for a host would wait.
        phase = torch.remainder(step, int(self.period) if self.period.is_integer() else self.period) / self.period
        return self.low + (self.high - self.low) * (1.0 + torch.cos(2.0 * math.pi * phase)) / 2.0

    def __repr__(self) -> str:
        return f"cosine_temperature({self.low:g}, {self.high:g}, {self.period:g})"


def _unit(name: str, t: Tensor) -> Tensor:
    """Rows of length 1, rounded once to the dtype of t."""
    check_tensor(name, t)
    if not t.is_floating_point():
        raise ArgumentTypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")
    return F.normalize(t.to(torch.promote_types(t.dtype, torch.float32)), dim=-1).to(t.dtype)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name}: expected a number, got {value!r}")
    if math.isnan(value):
        raise ArgumentError(f"{name}: expected a number, got nan")
    return float(value)

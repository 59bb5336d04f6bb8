"""The frame of the slab optimizers: whose step it is, what a slab must be, and everything a torch optimizer is asked for.

A classification layer's backward knows the gradient of a slab of classes before it begins the next. Applied there and then,

    begin_step(w)                                         once a backward and parameter
    update_slab(w, start, stop, g)                        rows [start, stop), as soon as their gradient g is finished

the gradient takes the memory of one slab instead of C x D. The update of a row reads its own row of gradient and state only, so slabs
may come in any order and size. `step()` is the ordinary form, for parameters that have a `.grad`; it goes in slabs too.

Updates are computed in fp32 (float64 for float64 parameters) and rounded once, into the parameter. Beside the gradient, which is used
up, they take at most about two slabs of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.losses.inputs import check_tensor
from bigclass.optim.rounding import round_stochastically

Parameters: TypeAlias = Iterable[Tensor] | Iterable[Mapping[str, Any]] | Iterable[tuple[str, Tensor]]

SLAB_BYTES = 1 << 22  # of `step`: stays in the last-level cache between the passes over it

_PARAMETER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(slots=True)
class Step:
    """A parameter's step under way."""

    group: dict[str, Any]
    state: dict[str, Any]
    rows_left: int
    fresh: set[str] = field(default_factory=set)  # names of the state that this step has made


class SlabOptimizer(Optimizer):
    """An optimizer whose update can be applied to some rows of a parameter at a time. Subclasses say what the update is.

    Everything a `torch.optim.Optimizer` has works: groups, schedulers, hooks, checkpoints. State keeps its own dtype when it is loaded.
    Call `step()` in every iteration even if all parameters are updated in the backward: it passes over those, whose `.grad` is None, and
    schedulers expect it. Numbers such as lr are read on the host: a CUDA graph would replay those it was captured with.

    Attributes:
        grad_scale: None, a number or a tensor of one element, by which `update_slab` divides gradients. For losses that are scaled before
            their backward: what a `torch.amp.GradScaler` does later cannot reach gradients that are gone by then. Its scale is had without
            waiting for the device as `scaler.scale(torch.ones((), device=...))`, and `step()` leaves `.grad` to `scaler.unscale_`, as
            every optimizer does. An overflow is not skipped: prefer bf16, which needs no scaler.
        generator: where stochastic rounding draws from; None is the device's default. Like any generator's its state is no part of
            `state_dict`.
    """

    def __init__(self, params: Parameters, defaults: dict[str, Any], generator: torch.Generator | None = None) -> None:
        self.grad_scale: float | Tensor | None = None
        self.generator = generator
        self._steps: dict[Tensor, Step] = {}
        super().__init__(params, defaults)  # pyright: ignore[reportArgumentType]

    # What a subclass says

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise for options that are no use."""
        raise NotImplementedError

    def _begin(self, parameter: Tensor, step: Step) -> None:
        """Make the state that is missing, count the step."""
        raise NotImplementedError

    def _update(self, rows: Tensor, span: slice, gradient: Tensor, step: Step) -> None:
        """Update rows, which are those in `span` of their parameter. gradient is in the dtype of the computation, and used up."""
        raise NotImplementedError

    # The update

    def begin_step(self, parameter: Tensor) -> None:
        """Begin a step of a parameter: to be called once before its slabs.

        Raises:
            ValueError: not a parameter of this optimizer, or a generator that is on another device.
        """
        group = next((g for g in self.param_groups if any(p is parameter for p in g["params"])), None)
        if group is None:
            raise ArgumentError("parameter: expected one of this optimizer's own, got another; add_param_group adds it")
        if group["stochastic_rounding"] and self.generator is not None and self.generator.device.type != parameter.device.type:
            raise ArgumentError(f"generator: expected one on {parameter.device} (the parameter's device), got {self.generator.device}")
        step = Step(group, self.state[parameter], rows_left=as_rows(parameter).shape[0])
        self._begin(parameter, step)
        self._steps[parameter] = step

    @torch.no_grad()
    def update_slab(self, parameter: Tensor, start: int, stop: int, gradient: Tensor) -> None:
        """Apply the update to rows [start, stop) of a parameter whose step has begun.

        Args:
            start, stop: 0 <= start <= stop <= C, host integers. Every row at most once a step.
            gradient: (stop - start, ...) as the parameter's rows, fp32 (float64 for float64 parameters); used up.

        Raises:
            ValueError, TypeError: a step that has not begun or is over, rows or a gradient that do not fit.
        """
        step = self._steps.get(parameter)
        if step is None:
            raise ArgumentError("parameter: its step has not begun, or all its rows have been updated; call begin_step(parameter) first")
        whole = as_rows(parameter.detach())
        if not 0 <= start <= stop <= whole.shape[0]:
            raise ArgumentError(f"start, stop: expected 0 <= start <= stop <= {whole.shape[0]} (the rows), got {start}, {stop}")
        if stop - start > step.rows_left:
            raise ArgumentError(
                f"start, stop: expected at most the {step.rows_left} rows that this step has left, got {start}, {stop}; "
                "a row is updated once a step, and begin_step(parameter) begins the next"
            )
        rows = whole[start:stop]
        _check_gradient(gradient, rows)
        if self.grad_scale is not None:
            gradient.div_(self.grad_scale)
        self._apply(parameter, rows, slice(start, stop), gradient, step)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a `.grad`, slab by slab; `.grad` is left as it is. Returns what closure returns.

        Raises:
            TypeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._whole_step(parameter, parameter.grad)
        return loss

    def _whole_step(self, parameter: Tensor, gradient: Tensor) -> None:
        if gradient.layout != torch.strided:
            raise ArgumentTypeError(f"grad: expected a dense gradient, got {gradient.layout}; make the layer's gradient dense")
        self.begin_step(parameter)
        whole, gradient = as_rows(parameter.detach()), as_rows(gradient.detach())
        if whole.numel() == 0:
            del self._steps[parameter]
            return
        wide, step = compute_dtype(parameter), self._steps[parameter]
        size = max(1, SLAB_BYTES // (whole[0].numel() * wide.itemsize))
        for start in range(0, whole.shape[0], size):
            span = slice(start, min(start + size, whole.shape[0]))
            self._apply(parameter, whole[span], span, gradient[span].to(wide, copy=True), step)

    def _apply(self, parameter: Tensor, rows: Tensor, span: slice, gradient: Tensor, step: Step) -> None:
        if rows.numel():
            self._update(rows, span, gradient, step)
        step.rows_left -= span.stop - span.start
        if step.rows_left == 0:
            self._steps.pop(parameter)

    def _descend(self, rows: Tensor, update: Tensor, rate: float, decay: float, step: Step) -> None:
        """rows <- decay rows - rate update, rounded once. update (in the dtype of the computation) is used up."""
        if rows.dtype == update.dtype:
            if decay != 1.0:
                rows.mul_(decay)
            rows.add_(update, alpha=-rate)
            return
        update.mul_(-rate).add_(rows, alpha=decay)
        if step.group["stochastic_rounding"]:
            round_stochastically(rows, update, self.generator)
        else:
            rows.copy_(update)

    # State

    def _state(self, step: Step, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        """Make a tensor of the state, zero, unless it is there."""
        found = step.state.get(name)
        if found is None:
            step.state[name] = torch.zeros(shape, dtype=dtype, device=device)
            step.fresh.add(name)
        elif found.shape != shape:
            raise ArgumentError(
                f"state {name}: expected shape {tuple(shape)}, got {tuple(found.shape)}; was it loaded from another optimizer or layer?"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer, but tensors of the state keep their dtype, where torch would round fp32 moments of a bf16 parameter."""
        # A hook, and one that comes last, so that it sees what users' own hooks have made of the dict.
        hook = self.register_load_state_dict_pre_hook(_hide_tensors)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint or a pickle holds. Options it does not know (it may be torch's own optimizer's) get their defaults."""
        for parameter, values in state["state"].items():
            for name, value in values.items() if isinstance(parameter, Tensor) else ():
                if isinstance(value, _Hidden):
                    values[name] = value.tensor.to(parameter.device)
        self._steps = {}
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "differentiable":  # torch's, which it adds to the defaults when it loads
                    group.setdefault(name, default)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "grad_scale": self.grad_scale, "generator": self.generator}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer; options and parameters that are no use are refused, and the group with them."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        kept = group["momentum_dtype"]
        if kept is not None and kept not in _PARAMETER_DTYPES:
            raise ArgumentTypeError(f"momentum_dtype: expected a floating-point dtype or None (the parameter's own), got {kept}")
        self._check_options(group)
        for parameter in group["params"]:
            if parameter.layout != torch.strided or hasattr(parameter, "device_mesh"):  # updates of a DTensor's slices would be lost
                raise ArgumentTypeError(f"params: expected plain dense tensors, got {type(parameter).__name__}, {parameter.layout}")
            if parameter.dtype not in _PARAMETER_DTYPES:
                raise ArgumentTypeError(f"params: expected float64, float32, bfloat16 or float16, got {parameter.dtype}")
            if group["stochastic_rounding"] and parameter.dtype != torch.bfloat16:
                raise ArgumentTypeError(
                    f"stochastic_rounding: expected bfloat16 parameters, got {parameter.dtype} of shape {tuple(parameter.shape)}; "
                    'give it a group of its own, {"params": [...], "stochastic_rounding": False}'
                )


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """In which updates of a parameter are computed."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def check_number(name: str, value: Any, below: float = torch.inf) -> None:
    """Raise unless 0 <= value < below. A tensor of one element may stand for a number, on the CPU: elsewhere reading it would wait."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.device.type != "cpu"):
        raise ArgumentError(f"{name}: expected a number, or a tensor of one element on the CPU, got {tuple(value.shape)} on {value.device}")
    if not isinstance(value, int | float | Tensor):
        raise ArgumentTypeError(f"{name}: expected a number, got {value!r}")
    if not 0 <= value < below:
        raise ArgumentError(
            f"{name}: expected {'a finite value of at least 0' if below == torch.inf else f'0 <= {name} < {below}'}, got {value}"
        )


def blend(kept: Tensor, new: Tensor, decay: float, share: float) -> Tensor:
    """kept <- decay kept + share new, computed in the dtype of new; returned before it is rounded to that of kept."""
    wide = kept.to(new.dtype)  # itself, if it is that wide
    wide.mul_(decay).add_(new, alpha=share)
    if wide is not kept:
        kept.copy_(wide)
    return wide


def as_rows(t: Tensor) -> Tensor:
    """t with at least one axis."""
    return t.unsqueeze(0) if t.dim() == 0 else t


def _check_gradient(gradient: Tensor, rows: Tensor) -> None:
    check_tensor("gradient", gradient)
    if gradient.shape != rows.shape:
        raise ArgumentError(f"gradient: expected shape {tuple(rows.shape)}, that of the rows, got {tuple(gradient.shape)}")
    if gradient.dtype != compute_dtype(rows):
        raise ArgumentTypeError(f"gradient: expected {compute_dtype(rows)} for a parameter in {rows.dtype}, got {gradient.dtype}")
    if gradient.device != rows.device:
        raise ArgumentError(f"gradient: expected device {rows.device} (the parameter's), got {gradient.device}")


@dataclass(frozen=True, slots=True, eq=False)
class _Hidden:
    """A tensor that torch's loading does not see, and so does not cast."""

    tensor: Tensor


def _hide_tensors(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    owned = {key for group in state_dict["param_groups"] for key in group["params"]}
    state = {
        key: {name: _Hidden(value) if isinstance(value, Tensor) else value for name, value in values.items()} if key in owned else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}

"""Stochastic gradient descent by slabs of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.optim.slab import Parameters, SlabOptimizer, Step, as_rows, blend, check_number


class SlabSGD(SlabOptimizer):
    r"""torch.optim.SGD, also slab by slab: of no momentum it has no state at all.

        g <- g + weight_decay w
        m <- momentum m + (1 - dampening) g         (m = g at first)
        w <- w - lr (g + momentum m if nesterov, m if momentum, else g)

    The same numbers as torch.optim.SGD for fp32 and float64 parameters. Of half-precision parameters torch rounds every line; here only
    w and m are rounded, once each. Either loads the other's state_dict.

    Args:
        params: parameters, named ones, or groups of them.
        lr: learning rate; a number, or a tensor of one element on the CPU.
        momentum, dampening, nesterov, weight_decay: as of torch.optim.SGD.
        stochastic_rounding: round bf16 parameters at random, without bias, so that updates too small for a bf16 weight add up all the same.
        momentum_dtype: of m (C x D numbers); None is the parameter's own.
        generator: where stochastic rounding draws from, on the parameters' device; None is the device's default.

    Raises:
        ValueError, TypeError: options out of range; parameters that are not floating point or, for stochastic rounding, not bf16.

    Example:
        >>> optimizer = bigclass.optim.SlabSGD(head.parameters(), lr=0.1, momentum=0.9)
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        *,
        momentum_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "momentum_dtype": momentum_dtype,
        }
        super().__init__(params, defaults, generator)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_number("momentum", group["momentum"])
        check_number("dampening", group["dampening"])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ArgumentError(
                f"nesterov: expected momentum > 0 and dampening 0, got momentum {group['momentum']}, dampening {group['dampening']}"
            )

    def _begin(self, parameter: Tensor, step: Step) -> None:
        if step.group["momentum"] != 0:
            dtype = step.group["momentum_dtype"] or parameter.dtype
            self._state(step, "momentum_buffer", parameter.shape, dtype, parameter.device)

    def _update(self, rows: Tensor, span: slice, gradient: Tensor, step: Step) -> None:
        group = step.group
        momentum = group["momentum"]
        if group["weight_decay"] != 0:
            gradient.add_(rows, alpha=group["weight_decay"])
        if momentum != 0:
            kept = as_rows(step.state["momentum_buffer"])[span]
            first = "momentum_buffer" in step.fresh
            decay, share = (0.0, 1.0) if first else (momentum, 1 - group["dampening"])
            # the blend is not given a name: it would be kept through the rounding below, a slab more
            if group["nesterov"]:
                gradient.add_(blend(kept, gradient, decay, share), alpha=momentum)
            else:
                gradient.copy_(blend(kept, gradient, decay, share))
        self._descend(rows, gradient, float(group["lr"]), 1.0, step)

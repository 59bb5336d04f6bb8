"""Adam with one second moment a row, by slabs of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.optim.slab import Parameters, SlabOptimizer, Step, as_rows, blend, check_number, compute_dtype


class SlabRowAdam(SlabOptimizer):
    r"""Adam whose second moment is one number a row (a class), not one a weight: C numbers of state instead of 2 C D.

        v_j <- beta2 v_j + (1 - beta2) mean_d g_jd^2
        m   <- beta1 m + (1 - beta1) g                               (only if beta1 > 0; it takes C x D)
        w_j <- (1 - lr weight_decay) w_j - lr (m_j / (1 - beta1^t)) / (sqrt(v_j / (1 - beta2^t)) + eps)

    t counts the parameter's steps. Every class has a step size of its own, which is what rare and common classes need; within a class
    the direction is the gradient's. Of a bias, or any parameter of one axis, a row is one number, and this is AdamW. Of more axes, a row
    is everything behind the first. Moments v are fp32 (float64 for float64 parameters).

    Args:
        params: parameters, named ones, or groups of them.
        lr: learning rate; a number, or a tensor of one element on the CPU.
        betas: (beta1, beta2), each in [0, 1).
        eps: keeps rows without gradient from a division by 0.
        weight_decay: decoupled, as AdamW's.
        stochastic_rounding: round bf16 parameters at random, without bias, so that updates too small for a bf16 weight add up all the same.
        momentum_dtype: of m; None is the parameter's own.
        generator: where stochastic rounding draws from, on the parameters' device; None is the device's default.

    Raises:
        ValueError, TypeError: options out of range; parameters that are not floating point or, for stochastic rounding, not bf16.

    Source: one statistic a row is what trains the embedding tables of recommender models (row-wise Adagrad; partial row-wise Adam of
    FBGEMM); Adafactor (arXiv:1804.04235) keeps such row means as one of its two factors. Adam: arXiv:1412.6980; AdamW: arXiv:1711.05101.

    Example:
        >>> optimizer = bigclass.optim.SlabRowAdam(head.parameters(), lr=1e-3)
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        *,
        momentum_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "momentum_dtype": momentum_dtype,
        }
        super().__init__(params, defaults, generator)

    def _check_options(self, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ArgumentError(f"betas: expected a pair (beta1, beta2), got {betas!r}")
        check_number("beta1", betas[0], below=1)
        check_number("beta2", betas[1], below=1)
        check_number("eps", group["eps"])

    def _begin(self, parameter: Tensor, step: Step) -> None:
        rows = parameter.shape[:1] or torch.Size((1,))
        self._state(step, "row_exp_avg_sq", rows, compute_dtype(parameter), parameter.device)
        if step.group["betas"][0] != 0:
            self._state(step, "exp_avg", parameter.shape, step.group["momentum_dtype"] or parameter.dtype, parameter.device)
        step.state["step"] = step.state.get("step", 0) + 1

    def _update(self, rows: Tensor, span: slice, gradient: Tensor, step: Step) -> None:
        group, state = step.group, step.state
        (beta1, beta2), t, rate = group["betas"], state["step"], float(group["lr"])
        flat = gradient.flatten(1) if gradient.dim() > 1 else gradient.unsqueeze(1)
        v = state["row_exp_avg_sq"][span]
        # the norm's square: a sum of squares without a slab of squares
        v.mul_(beta2).add_(torch.linalg.vector_norm(flat, dim=1).square_(), alpha=(1 - beta2) / flat.shape[1])
        if beta1 != 0:
            gradient.copy_(blend(as_rows(state["exp_avg"])[span], gradient, beta1, 1 - beta1))
        scale = (v / (1 - beta2**t)).sqrt_().add_(group["eps"]).mul_(1 - beta1**t).reciprocal_()
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
        self._descend(rows, gradient, rate, 1.0 - rate * group["weight_decay"], step)

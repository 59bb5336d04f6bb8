"""What the answer should have been, in float64, made a few rows at a time: a fast wrong answer is worth nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contrastive, one_vs_all
from .data import Problem

# Logits in float64 that exist at a time: 64 MiB.
LOGITS = 1 << 23

# Rows of a prediction that are checked; all rows are computed alike.
PREDICTED_ROWS = 32

# A relative error above this is no rounding: candidates above it are marked in the report. Half types: about twice what dense
# arithmetic in that type does on flat data, where dw is a sum of N rounded terms.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}

Reference = dict[str, Tensor]


def reference(problem: Problem) -> Reference:
    """The exact outputs by name: "loss", "input" and "linear_weight" (gradients), or "values" of a prediction."""
    shape = problem.shape
    w = problem.linear_weight.double()
    step = max(1, LOGITS // shape.classes)
    if shape.k:
        rows = problem.input[:PREDICTED_ROWS].double().split(step)
        return {"values": torch.cat([torch.topk(x @ w.T, shape.k).values for x in rows])}

    if shape.contrastive:
        return dict(
            zip(("loss", "input", "linear_weight"), contrastive.reference(shape.loss, problem.input.double(), w, step), strict=True)
        )
    bias = None if problem.bias is None else problem.bias.double()
    w.requires_grad_()
    total = w.new_zeros(())
    gradients = []
    for x, y in zip(problem.input.double().split(step), problem.target.split(step), strict=True):
        x = x.detach().requires_grad_()
        logits = F.linear(x, w, bias)
        if shape.softcap is not None:
            logits = shape.softcap * torch.tanh(logits / shape.softcap)
        if shape.one_vs_all:
            loss = one_vs_all.DENSE[shape.loss](logits, one_vs_all.dense_targets(y, shape.classes, w.dtype)) * (len(x) / shape.rows)
        else:
            loss = F.cross_entropy(logits, y, reduction="sum") / shape.rows
        loss.backward()
        assert x.grad is not None
        total += loss.detach()
        gradients.append(x.grad)
    assert w.grad is not None
    return {"loss": total, "input": torch.cat(gradients), "linear_weight": w.grad}


def errors(outputs: tuple[Tensor, ...], exact: Reference) -> dict[str, float]:
    """Relative error ||z - exact|| / ||exact|| of each output there is, in the order of the reference."""

    def error(output: Tensor, truth: Tensor) -> float:
        output = output.detach()[: len(truth)] if truth.ndim else output.detach()
        norm = torch.linalg.vector_norm(truth)
        return float(torch.linalg.vector_norm(output.double() - truth) / torch.where(norm > 0, norm, 1.0))

    return {name: error(output, truth) for (name, truth), output in zip(exact.items(), outputs, strict=False)}

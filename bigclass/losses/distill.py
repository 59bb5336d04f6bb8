"""Cross-entropy of a linear layer against the predictions of another one, without either's N x C logits.

    sum_i [ LSE_j s_ij - sum_j p_ij s_ij ]        s_ij = a <x_i, w_j>     p_i = softmax of the teacher's t_ij = b <u_i, v_j>, a constant

A few whole rows of both at a time: their probabilities need a row's end, and what a chunk leaves behind is its part of the loss and of the
gradients, G = softmax(s) - p in the place of s, dx = a G w, dw += a G^T x, da = <x, G w>. 8NCD flops, gradients included (dense: as many).
Logits are taken relative to their row's largest before anything is summed, so that a small loss is no difference of large numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigclass.core.engines import tiles
from bigclass.core.guards import autocast_off, refuse_create_graph
from bigclass.core.plan import DEFAULT_WORKSPACE, settings
from bigclass.losses.inputs import in_autocast


def teacher_cross_entropy(x: Tensor, w: Tensor, scale: Tensor, teacher_x: Tensor, teacher_w: Tensor, teacher_scale: Tensor) -> Tensor:
    """The sum over rows, fp32 (float64 for float64 features).

    x (N, D), w (C, D), scale of one element: get gradients. teacher_x (N, E), teacher_w (C, E), teacher_scale: constants.
    """
    needs = [t.requires_grad and torch.is_grad_enabled() for t in (x, w, scale)]
    return _TeacherCrossEntropy.apply(x, w, scale, teacher_x.detach(), teacher_w.detach(), teacher_scale.detach(), needs)


def chunk_rows(n: int, c: int, wide: torch.dtype, device: torch.device) -> int:
    """How many whole rows of three N x C matrices (teacher, student, their product) fit the workspace."""
    workspace = settings().workspace or DEFAULT_WORKSPACE.get(device.type, DEFAULT_WORKSPACE["other"])
    return min(max(workspace // (3 * max(c, 1) * wide.itemsize), 1), max(n, 1))


class _TeacherCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, scale, teacher_x, teacher_w, teacher_scale, needs):
        wide = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
        student, teacher = _operands(x, w, wide), _operands(teacher_x, teacher_w, wide)
        with autocast_off(x.device):
            loss, grads = _run(*student, scale, *teacher, teacher_scale, wide, needs)
        ctx.save_for_backward(*grads)  # not rounded before the upstream gradient is known
        ctx.dtypes = [t.dtype if need else None for t, need in zip((x, w, scale), needs, strict=True)]
        return loss

    @staticmethod
    def backward(ctx, *upstream):
        refuse_create_graph()
        made = iter(ctx.saved_tensors)
        return *[dtype and (next(made) * upstream[0]).to(dtype) for dtype in ctx.dtypes], None, None, None, None


def _run(x, w, scale, u, v, teacher_scale, wide: torch.dtype, needs: list[bool]) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of what needs them, in `wide`."""
    (n, c), (need_x, need_w, need_scale) = (x.shape[0], w.shape[0]), needs
    a, b = scale.reshape(()).to(wide), teacher_scale.reshape(()).to(wide)
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    boost = 1024.0 if w.dtype == torch.float16 else 1.0  # probabilities of many classes underflow in fp16
    rows = chunk_rows(n, c, wide, x.device)
    space = [x.new_empty((rows, c), dtype=wide) for _ in range(3)]
    loss = x.new_zeros((), dtype=exact)
    dx = x.new_empty(x.shape, dtype=wide) if need_x or need_scale else None
    dw = x.new_zeros(w.shape, dtype=wide) if need_w else None
    for r in tiles.spans(n, rows):
        p, s, both = (t[: r.size] for t in space)
        _relative(tiles.product(u[r.start : r.stop], v.t(), p).mul_(b)).exp_()
        p.div_(p.sum(1, keepdim=True))
        _relative(tiles.product(x[r.start : r.stop], w.t(), s).mul_(a))
        picked = torch.mul(p, s, out=both).sum(1)
        mass = s.exp_().sum(1, keepdim=True)
        loss += (mass.log().squeeze(1) - picked).sum(dtype=exact)
        if not any(needs):
            continue
        g = s.div_(mass).sub_(p).mul_(boost).to(w.dtype)
        if dx is not None:
            tiles.product(g, w, dx[r.start : r.stop], alpha=1 / boost)
        if dw is not None:
            tiles.product(g.t(), x[r.start : r.stop], dw, beta=1.0, alpha=1 / boost)
    grads = []
    if need_x and dx is not None:
        grads.append(dx * a)
    if dw is not None:
        grads.append(dw.mul_(a))
    if need_scale and dx is not None:
        grads.append((dx * x).sum(dtype=exact).reshape(scale.shape))
    return loss.to(wide), grads


def _operands(x: Tensor, w: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Operands of products that are summed and stored in `wide`, as the tiled engine takes them."""
    if wide == torch.float64 or x.device.type not in tiles.WIDE_OUTPUT:
        return x.to(wide), w.to(wide)
    dtype = torch.get_autocast_dtype(x.device.type) if in_autocast(x.device.type) else torch.promote_types(x.dtype, w.dtype)
    return x.to(dtype), w.to(dtype)


def _relative(s: Tensor) -> Tensor:
    """s minus its rows' maxima, in place."""
    return s.sub_(s.amax(1, keepdim=True))

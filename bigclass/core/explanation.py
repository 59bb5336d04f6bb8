"""What would be done for given shapes, and why: the planner, asked from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from bigclass.core.engines.support import can_save, device_reason, form_reason
from bigclass.core.errors import ArgumentError
from bigclass.core.folds import FOLDS, Fold, LogSumExp, Total
from bigclass.core.plan import Plan, Work, choose_engine, choose_gradients, make_pair_plan, make_plan, pair_work, settings, tile_buffers
from bigclass.core.stream import Map, Softcap

_NO_TEACHER = "folds, maps, one_vs_all, subcenters, label_smoothing and return_stats"
_NO_MARGIN = "folds, maps, one_vs_all, softcap, label_smoothing and return_stats"


def explain(
    rows: int,
    classes: int,
    features: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    requires_grad: bool = True,
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    return_stats: bool = False,
    grad_filter: float | None = None,
    one_vs_all: bool = False,
    subcenters: int | None = None,
    teacher_features: int | None = None,
    engine: str = "auto",
    folds: Sequence[Fold] | None = None,
    maps: Sequence[Map] | None = None,
) -> Plan:
    """What `linear_cross_entropy` would do for these shapes, and why.

    Args:
        rows, classes, features: N, C and D. dtype: of the features and the weights. device: where they lie.
        requires_grad: will a backward follow?
        reduction, softcap, label_smoothing, return_stats, grad_filter, engine: as in the call.
        one_vs_all: is it `linear_binary_cross_entropy` or another sum of elementwise terms (folds may name them)?
        subcenters: of a `linear_margin_loss` (1: a weight of C rows, K: of C K); None: it is none. Its norms of weights, one fp32 a row,
            and normalised features are not counted.
        teacher_features: E, of a `linear_kl_div` (0: stored logits of a teacher); None: it is none. dtype is of both, softcap of one.
        folds, maps: of `core.reduce_logits`, in place of cross-entropy's (their tensors may be left out). They alone describe no loss:
            for one of elementwise terms say one_vs_all, for a margin loss subcenters.

    Returns:
        A `Plan`; print it.

    Raises:
        ValueError: subcenters below 1, or beside folds, one_vs_all, softcap, label_smoothing or return_stats; teacher_features below 0, or
            beside any of those but softcap; an engine that cannot run.

    Example:
        >>> print(bigclass.explain(8192, 256000, 2304, dtype=torch.bfloat16))  # doctest: +SKIP
    """
    place = torch.device(device)
    if grad_filter is not None and not 0.0 < grad_filter < 1.0:
        raise ArgumentError(f"grad_filter: expected None (exact) or a relative error between 0 and 1, such as 2**-8, got {grad_filter!r}")
    if teacher_features is not None:
        if teacher_features < 0 or not (folds is maps is subcenters is None) or one_vs_all or label_smoothing or return_stats:
            raise ArgumentError(f"teacher_features: expected a number >= 0, and of {_NO_TEACHER} none, got {teacher_features}")
        work = pair_work(
            n=rows, c=classes, d=features + teacher_features, device=place.type, scalar=reduction != "none", grad=requires_grad,
            half=dtype.itemsize == 2, wide=dtype == torch.float64, maps=int(softcap is not None),
        )  # fmt: skip
        name = choose_engine(work, engine)
        return make_plan(work, engine) if name == "dense" else make_pair_plan(work, name)
    margin = subcenters is not None
    if margin:
        if subcenters < 1 or folds is not None or maps is not None or one_vs_all or softcap is not None or label_smoothing or return_stats:
            raise ArgumentError(f"subcenters: expected a number >= 1, and of {_NO_MARGIN} none, got subcenters={subcenters}")
        classes *= subcenters
        folds = (FOLDS["grouped_logsumexp"]((float(subcenters),), exclude_picks=True),) if subcenters > 1 else None
    scalar = reduction != "none" and not return_stats and (folds is None or one_vs_all or margin)
    lone = folds is None and not one_vs_all and softcap is None and not label_smoothing
    of_maps = ((Softcap.at(softcap),) if softcap is not None else ()) if maps is None else tuple(maps)
    of_folds = (LogSumExp(exclude_picks=True), *((Total(),) if label_smoothing else ())) if folds is None else tuple(folds)
    reason = "it has no float64 products" if dtype == torch.float64 else device_reason(place) or form_reason(of_maps, of_folds)
    half = dtype.itemsize == 2
    work = Work(
        n=rows,
        c=classes,
        d=features,
        device=place.type,
        scalar=scalar,
        affine=one_vs_all,
        grad=requires_grad,
        half=half,
        wide=dtype == torch.float64,
        buffers=tile_buffers(lone, scalar, len(of_maps)),
        not_fused=reason,
        narrow=half,
        masked=margin or (folds is None and not one_vs_all),
        cast=margin and half,  # normalised features are fp32 up to their product
        group=math.lcm(*[f.group for f in of_folds]),
        filtered=bool(grad_filter) and requires_grad,
        saves=dtype == torch.bfloat16 and features % 8 == 0 and can_save(of_maps, of_folds),
        direct=place.type == "cuda" and half and not margin and not grad_filter,
    )
    if choose_gradients(work, settings(), choose_engine(work, engine)) in ("recompute", "saved"):  # by `reduce_logits`, then
        work = replace(work, buffers=tile_buffers(lone, False, len(of_maps)))
    plan = make_plan(work, engine)
    return (
        plan if plan.engine != "fused" else replace(plan, why=(*plan.why, _register_tiles(plan, place, dtype, features, of_folds, of_maps)))
    )


def _register_tiles(plan: Plan, device: torch.device, dtype: torch.dtype, features: int, folds: Sequence[Fold], maps: Sequence[Map]) -> str:
    """The fused engine's own tiles, in words. A GPU that is not here is taken for an H100."""
    from bigclass.core.engines.fused import launch  # needs Triton, which is there if the engine was chosen

    there = device.type != "cuda" or torch.cuda.is_available()
    architecture = launch.architecture(device) if there else "sm_90"
    stored = plan.gradients in ("forward", "slabs") and not plan.saved  # all its kernels read logits in fp32
    described = stored or features * dtype.itemsize % 16 == 0

    def tile(bent: bool) -> str:
        weight = launch.weight(folds, mapped=bool(maps), bent=bent and not plan.saved)
        t = (
            launch.saving_config(architecture, weight)
            if plan.saved
            else launch.config(architecture, torch.float32 if stored else dtype, weight, described=described, products=not stored)
        )
        return f"{t.BM} rows x {t.BN} classes, {t.warps} warps, {t.stages} stages"

    fold, gradient = tile(False), tile(bool(maps))
    apart = f"; their gradient {gradient}" if plan.gradients != "none" and gradient != fold else ""
    return f"kernels for {architecture}{'' if there else ' (no GPU here)'}: {fold}{apart}"

"""The dense engine: logits written out, folds lifted over the whole row, gradients by plain autograd.

The oracle of the tests, and the fastest way where N x C is so small that the cost of a call rules. Everything autograd can do
(double backward, forward mode, torch.func) works here, and only here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bigclass.core.folds import Fold, State, Tile
from bigclass.core.guards import autocast_off
from bigclass.core.norms import EPSILON
from bigclass.core.repeats import Repeats
from bigclass.core.stream import Stream

# Devices on which a gather's gradient adds up what was read from one place in a fixed order; elsewhere it is open from three on.
_IN_ORDER = ("cpu",)


def logits(stream: Stream, keep: Tensor | None = None) -> Tensor:
    """s (N, C) in the accumulation dtype. Rows outside `keep` get features of 0, so that what they held cannot spread."""
    dtype = stream.accumulate_dtype
    factor = None if stream.scale == 1.0 and stream.scale_tensor is None else stream.scale
    if stream.scale_tensor is not None:
        factor = stream.scale_tensor.to(dtype).reshape(()) * stream.scale
    # where nothing is added before the scale it is applied to the features: one rounding of each logit less, and N x D products
    early = stream.class_scale is None and stream.given is None and (stream.bias is None or stream.bias_last)
    s: Tensor | None = None
    for x, w in stream.pairs:
        if keep is not None:
            x = x.masked_fill(~keep.unsqueeze(-1), 0.0)
        x, w = x.to(dtype), w.to(dtype)
        x = x * factor if early and factor is not None else x
        part = torch.mm(x, (F.normalize(w, eps=EPSILON) if stream.normalized else w).t())
        s = part if s is None else s + part
    if stream.class_scale is not None and s is not None and not stream.normalized:
        s = s * stream.class_scale.to(dtype)
    if stream.given is not None:
        given = stream.given.to(dtype)
        if keep is not None:
            given = given.masked_fill(~keep.unsqueeze(-1), 0.0)
        s = given if s is None else s + given
    assert s is not None
    if stream.bias is not None and not stream.bias_last:
        s = s + stream.bias.to(dtype)
    if factor is not None and not early:
        s = s * factor
    if stream.bias is not None and stream.bias_last:
        s = s + stream.bias.to(dtype)
    for m in stream.maps:
        s = m.forward(s, m.numbers, m.tensors)
    return s


def reduce(stream: Stream, picks: Tensor | None, keep: Tensor | None, folds: Sequence[Fold]) -> tuple[list[State], Tensor | None]:
    """The states of all folds and the picked logits (N, K), differentiable."""
    with autocast_off(stream.device):  # or its products would be rounded to 16 bits
        s = logits(stream, keep)
    picked = mask = None
    exclude = picks is not None and any([f.exclude_picks for f in folds])
    if picks is not None and _all_there(picks):
        picked = _gathered(s, picks)
        mask = torch.zeros_like(s, dtype=torch.bool).scatter_(1, picks, True) if exclude else None
    elif picks is not None:
        # without a class there is nothing to gather, but still a graph
        picked = _gathered(s, picks) if s.shape[1] else s.sum(1, keepdim=True).expand(picks.shape)
        picked = picked.masked_fill(picks < 0, 0.0)
        if exclude:  # one column more takes the marks of picks that are none
            mask = s.new_zeros((s.shape[0], s.shape[1] + 1), dtype=torch.bool)
            mask = mask.scatter(1, torch.where(picks < 0, s.shape[1], picks), True)[:, :-1]
    states = []
    for f in folds:
        rows = f.axis == "rows"
        tile = Tile(s if rows else s.t(), mask=mask if mask is None or rows else mask.t())
        if tile.s.shape[1] == 0:  # nothing to fold
            states.append(f.identity(tile.s.shape[0], s))
            continue
        states.append(f.lift(tile, [_broadcast(t.to(s.dtype), axis, rows) for t, axis in zip(f.tensors, f.tensor_axes, strict=False)]))
    return states, picked


def _gathered(s: Tensor, picks: Tensor) -> Tensor:
    """s at the picks (N, K); at any class where a pick is -1, for the caller to mask."""
    if picks.shape[1] < 3 or s.device.type in _IN_ORDER:
        return s.gather(1, picks.clamp_min(0))
    repeats = Repeats.of(picks)
    return repeats.copied(s.gather(1, repeats.distinct.clamp_min(0)))


def _all_there(picks: Tensor) -> bool:
    """Is no pick -1? Only asked where the answer is at hand."""
    return not torch.compiler.is_compiling() and picks.device.type == "cpu" and not bool((picks < 0).any())


def _broadcast(t: Tensor, axis: str, rows: bool) -> Tensor:
    if axis == "grid":
        return t if rows else t.t()
    return t.unsqueeze(-1) if axis == "kept" else t.unsqueeze(0)

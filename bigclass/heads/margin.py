"""A head whose logits are cosines, trained with a margin: ArcFace, CosFace, AdaFace, CurricularFace, sub-centres."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.norms import EPSILON, inverse_norms
from bigclass.core.plan import ENGINES
from bigclass.core.topk import TopK
from bigclass.core.updates import SlabUpdate
from bigclass.losses.inputs import check_tensor, filter_of, open_layer
from bigclass.losses.margin import KINDS, Cosines, Margin, MarginValue, check_layer, cosine_stream, linear_margin_loss
from bigclass.losses.margin_folds import GroupedTopK
from bigclass.losses.sampling import ClassSampling
from bigclass.parallel.classes import reduce_logits
from bigclass.parallel.collectives import gather_classes
from bigclass.parallel.layer import Layer, Spread, layer_of

# kinds with running statistics, and the margins of their papers' code
ADAPTIVE = {"adaface": 0.4, "curricular": 0.5}


class MarginHead(nn.Module):
    r"""A classifier by angles over many identities, with its margin loss streamed.

    `head(features, target)` gives the loss, as a forward, so that the hooks of FSDP2 and ZeRO-3 run. `head(features)` gives real logits
    scale cos_ij (..., C), without a margin, in training too (they are never lazy); `head.predict(features, k)` the top k. `head.weight`
    is (C K, D), the K centres of class j in rows jK to jK + K - 1.

    Args:
        in_features: D. num_classes: C. device, dtype: of the weight, which starts normal with standard deviation 0.01.
        kind: "arcface", "cosface", "combined": see `linear_margin_loss`.
            "adaface": the margin of a row follows the length of its features, a sign of quality: with
            z = clip(h (||x|| - mean) / (std + 1e-3), -1, 1), f = cos(theta - margin z) - (margin + margin z).
            "curricular": as "arcface", and negatives with cos_j > cos(theta + margin) count with cos_j (t + cos_j).
        margin: as in `linear_margin_loss`; None: 0.5, 0.4, (1, 0.3, 0.2); "adaface" 0.4, "curricular" 0.5.
        scale: of the cosines; 64 is the papers', of long trainings over many identities, a few thousand classes may want 16 to 32.
            Only the direction of a weight counts, so that its steps may be larger than a backbone's.
        subcenters: K. beyond_pi, gradient, grad_filter, engine, group: as in `linear_margin_loss` ("adaface": always "clip").
        ignore_index: rows with it contribute nothing, to running statistics either.
        h: concentration of "adaface". momentum: step of the running statistics of "adaface" and "curricular".

    Buffers: "adaface" batch_mean and batch_std of the lengths (each held in [0.001, 100]), "curricular" t, the mean cosine of targets.
    A training step moves them by `momentum` before it uses them, each rank by its own rows, as the papers' code does.

    Example:
        >>> head = MarginHead(512, 1_000_000, kind="arcface", margin=0.5, scale=64.0)
        >>> loss = head(features, labels)  # features (N, 512), labels (N,)

    Kim et al., "AdaFace", arXiv:2204.00964; Huang et al., "CurricularFace", arXiv:2004.00288; the others: `linear_margin_loss`.
    """

    batch_mean: Tensor
    batch_std: Tensor
    t: Tensor

    def __init__(
        self, in_features: int, num_classes: int, *, kind: str = "arcface", margin: MarginValue | None = None, scale: float = 64.0,
        subcenters: int = 1, beyond_pi: str | None = None, gradient: str = "differentiated", ignore_index: int = -100, h: float = 0.333,
        momentum: float = 0.01, grad_filter: float | None = None, engine: str = "auto", group: Any = None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes), ("subcenters", subcenters)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ArgumentTypeError(f"{name}: expected an integer, got {value!r}")
            if value < 1:
                raise ArgumentError(f"{name}: expected a number >= 1, got {value}")
        if kind not in (*KINDS, *ADAPTIVE):
            raise ArgumentError(f"kind: expected one of {(*KINDS, *ADAPTIVE)}, got {kind!r}")
        if kind == "adaface" and beyond_pi not in (None, "clip"):
            raise ArgumentError(f"beyond_pi: 'adaface' is defined with 'clip', got {beyond_pi!r}; leave it None")
        if kind == "curricular" and subcenters > 1:
            raise ArgumentError(f"subcenters: 'curricular' is not defined for several, got {subcenters}")
        if engine not in ENGINES:
            raise ArgumentError(f"engine: expected one of {ENGINES}, got {engine!r}")
        if not isinstance(scale, int | float) or not 0.0 < scale < math.inf:
            raise ArgumentError(f"scale: expected a finite number > 0, got {scale!r}")
        if not h > 0.0 or not 0.0 <= momentum <= 1.0:
            raise ArgumentError(f"h, momentum: expected h > 0 and a momentum in [0, 1], got {h} and {momentum}")
        filter_of(grad_filter)  # raises for what is no tolerance
        self.in_features, self.num_classes, self.subcenters = in_features, num_classes, subcenters
        self.kind, self.scale, self.beyond_pi, self.gradient = kind, float(scale), beyond_pi, gradient
        self.margin: Any = ({**KINDS, **ADAPTIVE})[kind] if margin is None else margin
        self.ignore_index, self.h, self.momentum, self.grad_filter, self.engine = ignore_index, h, momentum, grad_filter, engine
        self.group = Spread.of(group)
        Margin.of("arcface" if kind in ADAPTIVE else kind, self.margin, beyond_pi, gradient)  # raises for what does not fit
        self.weight = nn.Parameter(torch.empty(num_classes * subcenters, in_features, device=device, dtype=dtype))
        for name in {"adaface": ("batch_mean", "batch_std"), "curricular": ("t",)}.get(kind, ()):
            self.register_buffer(name, torch.empty((), device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew: the weight, and running statistics where their papers' code begins."""
        nn.init.normal_(self.weight, std=0.01)
        for name, buffer in self.named_buffers():
            buffer.fill_({"batch_mean": 20.0, "batch_std": 100.0, "t": 0.0}[name])

    def forward(
        self, features: Tensor, target: Tensor | None = None, *, reduction: str = "mean", update: SlabUpdate | None = None,
        sample: ClassSampling | None = None,
    ) -> Tensor:  # fmt: skip
        """Without a target logits (..., C); with one, class indices (...), the loss of `linear_margin_loss`, whose options these are."""
        if target is None:
            return self.logits(features)
        check_tensor("target", target)
        if self.kind in ADAPTIVE:
            layer = layer_of(features, self.weight, None, self.group)
            make = self._curricular if self.kind == "curricular" else self._adaface
            loss = make(layer, layer.gather(target), reduction, update, sample)
            return layer.own(loss) if reduction == "none" else loss
        return linear_margin_loss(
            features, self.weight, target, kind=self.kind, margin=self.margin, logit_scale=self.scale, subcenters=self.subcenters,
            beyond_pi=self.beyond_pi, gradient=self.gradient, reduction=reduction, ignore_index=self.ignore_index,
            grad_filter=self.grad_filter, update=update, engine=self.engine, group=self.group,
            sample=sample,
        )  # fmt: skip

    def _cosines(self, layer: Layer, target: Tensor, sample: ClassSampling | None) -> Cosines:
        return Cosines.of(layer, target, self.scale, self.subcenters, self.ignore_index, self.grad_filter, sample)

    def _adaface(self, layer: Layer, target: Tensor, reduction: str, update: SlabUpdate | None, sample: ClassSampling | None) -> Tensor:
        margin = Margin.of("combined", self._adaptive(layer, target), "clip", self.gradient, target)
        # its margins, NaN where lengths are, are not the user's
        return self._cosines(layer, target, sample).loss(margin, None, reduction, self.engine, update)

    def _adaptive(self, layer: Layer, target: Tensor) -> tuple[float, Tensor, Tensor]:
        """(m1, m2, m3) of AdaFace, (1, -margin z, margin + margin z), one z for each row."""
        check_layer(layer, self.scale, self.subcenters)
        features = layer.input
        if target.shape != features.shape[:-1]:
            raise ArgumentError(f"target: expected class indices of shape {tuple(features.shape[:-1])}, got {tuple(target.shape)}")
        with torch.no_grad():
            keep = target != self.ignore_index
            wide = torch.promote_types(features.dtype, torch.float32)
            length = torch.linalg.vector_norm(features.detach(), dim=-1, dtype=wide).clamp(0.001, 100.0)
            length = torch.where(keep, length, 0.0)  # of an ignored row it may be NaN
            if self.training:
                count = keep.sum()
                mean = length.sum() / count
                variance = torch.where(keep, length - mean, 0.0).square().sum() / (count - 1)
                self._move(self.batch_mean, mean, count > 0)
                self._move(self.batch_std, variance.sqrt(), count > 1)  # one row has no deviation
            z = ((length - self.batch_mean) / (self.batch_std + 1e-3) * self.h).clamp(-1.0, 1.0)
            return 1.0, -self.margin * z, self.margin + self.margin * z

    def _curricular(self, layer: Layer, target: Tensor, reduction: str, update: SlabUpdate | None, sample: ClassSampling | None) -> Tensor:
        margin = Margin.of("arcface", self.margin, self.beyond_pi, self.gradient)
        cosines = self._cosines(layer, target, sample)
        if self.training:
            cos, keep = cosines.target, cosines.keep
            count = torch.ones_like(cos).sum() if keep is None else keep.sum()
            total = cos.sum() if keep is None else torch.where(keep, cos, 0.0).sum()
            with torch.no_grad():
                self._move(self.t, total / count, count > 0)
        return cosines.loss(margin, self.t.clone(), reduction, self.engine, update)

    def _move(self, buffer: Tensor, to: Tensor, there: Tensor) -> None:
        """One step of a running mean, if there is something to move it: decided on the device, for the host would have to wait."""
        buffer.copy_(torch.where(there, buffer.lerp(to.to(buffer.dtype), self.momentum), buffer))

    def logits(self, features: Tensor) -> Tensor:
        """Real logits scale cos_ij (..., C) in the dtype of a plain `nn.Linear`; of sub-centres the nearest."""
        layer = layer_of(features, self.weight, None, self.group)
        check_layer(layer, self.scale, self.subcenters)
        if layer.rows is not None:
            raise ArgumentError(
                "head(features): real logits are of this rank's rows, but those of all ranks are gathered here (group= has them in "
                "`classes` and in `batch`); give the head its targets, or use head.predict(features, k)"
            )
        features, w, _ = layer.operands
        if torch.is_grad_enabled() and w.requires_grad:
            wide = torch.promote_types(w.dtype, torch.float32)
            inverse = torch.linalg.vector_norm(w, dim=1, dtype=wide).clamp_min(EPSILON).reciprocal()
        else:
            inverse = inverse_norms(w)
        features = features if layer.compute_dtype is None else features.to(layer.compute_dtype)
        s = F.linear(F.normalize(features, dim=-1, eps=EPSILON), w)
        s = s * (inverse * self.scale).to(s.dtype)
        shards = None if layer.layout is None else layer.layout.classes
        if shards is not None:
            s = gather_classes(s.flatten(0, -2), shards.sizes, shards.ranks).unflatten(0, s.shape[:-1])
        return s if self.subcenters == 1 else s.unflatten(-1, (-1, self.subcenters)).amax(-1)

    @torch.no_grad()
    def predict(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row and their classes, (..., k) each, without the full logits. No gradients.

        A class of several centres counts once, with its nearest."""
        layer = open_layer(features, self.weight, None, self.group)
        if not isinstance(k, int) or isinstance(k, bool):
            raise ArgumentTypeError(f"k: expected an integer, got {k!r}")
        classes, features = layer.classes // self.subcenters, layer.input
        if not 1 <= k <= classes:
            raise ArgumentError(f"k: expected 1 <= k <= {classes} (the number of classes), got {k}")
        stream = cosine_stream(layer, features.reshape(-1, self.in_features), self.scale)
        fold = TopK((float(k),)) if self.subcenters == 1 else GroupedTopK((float(k), float(self.subcenters)))
        (state,), _ = reduce_logits(stream, None, (fold,), engine=self.engine)
        values, classes = (layer.own(t.reshape(*features.shape[:-1], k)) for t in state)
        return values, classes

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", f"num_classes={self.num_classes}", f"kind={self.kind!r}", f"margin={self.margin}"]
        parts.append(f"scale={self.scale:g}")
        usual = {
            "subcenters": 1,
            "beyond_pi": None,
            "gradient": "differentiated",
            "ignore_index": -100,
            "grad_filter": None,
            "engine": "auto",
            "group": None,
        }
        parts += [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        if self.kind in ADAPTIVE:
            parts += [f"momentum={self.momentum:g}"] + ([f"h={self.h:g}"] if self.kind == "adaface" else [])
        return ", ".join(parts)

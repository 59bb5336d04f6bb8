"""Heads that are an `nn.Linear` with a streamed loss.

A head keeps everything of `nn.Linear`: parameter names and order, initialisation, state_dict keys, copying, hooks. Called with features
alone it returns real logits; called with targets it returns the loss, as a *forward*, so that the hooks of FSDP2 and ZeRO-3 run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bigclass.core.errors import ArgumentError
from bigclass.core.plan import ENGINES
from bigclass.core.stream import Softcap
from bigclass.losses.cross_entropy import linear_cross_entropy
from bigclass.losses.inputs import check_tensor
from bigclass.losses.log_prob import linear_topk


class _LinearHead(nn.Linear):
    """What CCEHead and LMHead share: logits, loss and prediction under one soft cap and scale."""

    _OPTIONS = ("softcap", "logit_scale", "label_smoothing", "z_loss", "ignore_index", "engine")

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, device=None, dtype=None,
        softcap: float | None, logit_scale: float | None, label_smoothing: float, z_loss: float, ignore_index: int, engine: str,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if softcap is not None:
            Softcap.at(softcap)  # raises for a cap that is not positive
        if not 0.0 <= label_smoothing <= 1.0:
            raise ArgumentError(f"label_smoothing: expected a value in [0, 1], got {label_smoothing}")
        if not z_loss >= 0.0:
            raise ArgumentError(f"z_loss: expected a coefficient >= 0, got {z_loss}")
        if engine not in ENGINES:
            raise ArgumentError(f"engine: expected one of {ENGINES}, got {engine!r}")
        self.softcap, self.logit_scale = softcap, logit_scale
        self.label_smoothing, self.z_loss, self.ignore_index, self.engine = label_smoothing, z_loss, ignore_index, engine

    def logits(self, features: Tensor) -> Tensor:
        """Real logits (..., C) in the dtype of a plain `nn.Linear`, scaled and soft-capped."""
        s = nn.functional.linear(features, self.weight, self.bias)
        if self.logit_scale is not None:
            s = s * self.logit_scale
        return s if self.softcap is None else Softcap.forward(s, (self.softcap,), ())

    def predict(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row and their classes, (..., k) each, without the full logits. No gradients."""
        values, indices = linear_topk(
            features, self.weight, k, linear_bias=self.bias, softcap=self.softcap, logit_scale=self.logit_scale, engine=self.engine
        )
        return values, indices

    def _loss(self, features: Tensor, target: Tensor, **options: Any) -> Any:
        check_tensor("target", target)
        index = not target.is_floating_point()
        return linear_cross_entropy(
            features, self.weight, target, linear_bias=self.bias, softcap=self.softcap, logit_scale=self.logit_scale,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, engine=self.engine,
            ignore_index=self.ignore_index if index else None, **options,
        )  # fmt: skip

    def loss(self, features: Tensor, target: Tensor, **options: Any) -> Any:
        """`self(features, target, ...)` under a name of its own; it is a forward, so hooks run."""
        return self(features, target, **options)

    def extra_repr(self) -> str:
        defaults = {"softcap": None, "logit_scale": None, "label_smoothing": 0.0, "z_loss": 0.0, "ignore_index": -100, "engine": "auto"}
        extra = [f"{name}={getattr(self, name)!r}" for name in self._OPTIONS if getattr(self, name) != defaults[name]]
        return ", ".join([super().extra_repr(), *extra])


class CCEHead(_LinearHead):
    r"""A linear classifier over many classes, with cross-entropy streamed.

    `head(features)` gives real logits (..., C), `head(features, target)` the loss, `head.predict(features, k)` the top k.

    Args:
        in_features: D. num_classes: C. bias, device, dtype: as in `nn.Linear`.
        softcap, logit_scale (a number), label_smoothing, z_loss, ignore_index, engine: as in `linear_cross_entropy`.

    Example:
        >>> head = bigclass.CCEHead(768, 100_000)
        >>> loss = head(features, labels)  # features (N, 768), labels (N,)
    """

    def __init__(
        self, in_features: int, num_classes: int, bias: bool = True, device=None, dtype=None, *,
        softcap: float | None = None, logit_scale: float | None = None, label_smoothing: float = 0.0,
        z_loss: float = 0.0, ignore_index: int = -100, engine: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, num_classes, bias, device=device, dtype=dtype, softcap=softcap, logit_scale=logit_scale,
            label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, engine=engine,
        )  # fmt: skip

    @property
    def num_classes(self) -> int:
        return self.out_features

    def forward(
        self,
        features: Tensor,
        target: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        return_stats: bool = False,
    ):  # type: ignore[override]
        """Logits (..., C) without a target; with one ((...) indices or (..., C) probabilities) the loss of `linear_cross_entropy`."""
        if target is None:
            return self.logits(features)
        return self._loss(features, target, weight=weight, reduction=reduction, return_stats=return_stats)


class LMHead(_LinearHead):
    r"""A language model's output layer, with the next-token loss streamed.

    `head(hidden)` gives real logits (..., T, C). `head(hidden, labels)` gives the loss: the features of position t are scored against
    labels[t + shift], so labels are the input ids themselves (ignore_index where nothing is to be learnt).

    Args:
        hidden_size: D. vocab_size: C. bias, device, dtype: as in `nn.Linear` (without bias by default, as language models are).
        shift: 1 for next-token prediction; 0 if labels are shifted already.
        softcap, logit_scale (a number), label_smoothing, z_loss, ignore_index, engine: as in `linear_cross_entropy`.

    Tied embeddings: `head.tie(embedding)` makes the embedding's weight the head's own parameter.

    Example:
        >>> head = bigclass.LMHead(768, 50257)
        >>> loss = head(hidden, input_ids)  # hidden (B, T, 768), input_ids (B, T)
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, bias: bool = False, device=None, dtype=None, *, shift: int = 1,
        softcap: float | None = None, logit_scale: float | None = None, label_smoothing: float = 0.0,
        z_loss: float = 0.0, ignore_index: int = -100, engine: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(
            hidden_size, vocab_size, bias, device=device, dtype=dtype, softcap=softcap, logit_scale=logit_scale,
            label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, engine=engine,
        )  # fmt: skip
        self.shift = shift

    def tie(self, embedding: nn.Embedding) -> LMHead:
        """Share the weight of `embedding` (C, D). Returns the head."""
        if embedding.weight.shape != self.weight.shape:
            raise ArgumentError(f"embedding: expected a weight of shape {tuple(self.weight.shape)}, got {tuple(embedding.weight.shape)}")
        self.weight = embedding.weight
        return self

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        shift: int | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        return_stats: bool = False,
    ):  # type: ignore[override]
        """Logits (..., T, C) without labels; with labels (..., T) the loss of `linear_cross_entropy` (`shift`: instead of the head's)."""
        if labels is None:
            return self.logits(hidden)
        check_tensor("labels", labels)
        if labels.is_floating_point():
            raise ArgumentError(
                f"labels: expected token indices (..., T), got {labels.dtype}; use linear_cross_entropy for class probabilities"
            )
        return self._loss(
            hidden, labels, shift=self.shift if shift is None else shift, weight=weight, reduction=reduction, return_stats=return_stats
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.shift == 1 else f", shift={self.shift}")

"""A head for labels that are not exclusive: each class decides for itself, positives are few."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from bigclass.core.errors import ArgumentError
from bigclass.core.updates import SlabUpdate
from bigclass.heads.linear import LinearHead
from bigclass.losses.classwise import REDUCTIONS
from bigclass.losses.elementwise import LOSSES, constants_of
from bigclass.losses.inputs import make_stream, open_layer
from bigclass.losses.multilabel import layer_positives, streamed_loss, zlpr_loss


class MultiLabelHead(LinearHead):
    r"""A linear layer over huge numbers of labels with a one-vs-all loss, streamed: no N x C logits, no N x C targets.

    `head(features)` gives logits (..., C), lazy in training as those of `CCEHead`: nn.BCEWithLogitsLoss and converted criteria stream.
    `head(features, positives)` gives the loss, positives being few class indices a row (any form of `linear_binary_cross_entropy`).

    Args:
        in_features: D. num_classes: C. bias, device, dtype: as in `nn.Linear`, whose state_dict keys and initialisation the head keeps.
        loss: "bce", "focal" (alpha, gamma), "asymmetric" (gamma_neg, gamma_pos, clip, eps, disable_torch_grad_focal_loss),
            "squared_hinge" (margin), "poly" (epsilon, gamma, alpha), "zlpr", or one of your own (`register_elementwise_loss`).
            Its options, in brackets, are keyword arguments here, with the names of timm's and torchvision's losses.
        reduction: "batchmean" (a row's sum over classes, averaged over rows), "mean" (over N C numbers, as torch's losses), "sum" or
            "none" (each row's sum). With "mean" and a million classes gradients are of the size of Adam's eps, 1e-8, and little is learnt.
        prior: probability that a label is there, to which the bias is initialised: log(prior / (1 - prior)). Of a million labels with
            five a row (prior=5e-6) an ordinary bias, which calls half of them positive, would spend its first epochs unlearning that.
        label_smoothing: as in `linear_binary_cross_entropy`. softcap, logit_scale (a number), engine: as in `linear_cross_entropy`.
        grad_filter: as in `linear_binary_cross_entropy`; of lazy logits, too, whatever criterion reads them.
        group: as in `linear_cross_entropy`, the weight being this rank's shard then. lazy: are logits lazy in training?

    Raises:
        ValueError, TypeError: options that cannot work, or that the loss does not have.

    Example:
        >>> head = bigclass.MultiLabelHead(256, 1_000_000, loss="asymmetric", gamma_neg=4, gamma_pos=1, clip=0.05, prior=5e-6)
        >>> loss = head(features, positives)  # positives (N, K), -1 where a row has fewer
        >>> scores, labels = head.predict(features, k=5)
    """

    objective: str = "bce"
    reduction: str = "batchmean"
    prior: float | None = None
    loss_options: dict[str, float] = {}  # noqa: RUF012  (replaced, never changed)
    _OPTIONS = ("softcap", "logit_scale", "label_smoothing", "grad_filter", "engine", "group", "lazy")
    _OWN = ("objective", "reduction", "prior", "loss_options")

    def __init__(
        self, in_features: int, num_classes: int, bias: bool = True, device=None, dtype=None, *, loss: str = "bce",
        reduction: str = "batchmean", prior: float | None = None, label_smoothing: float = 0.0, softcap: float | None = None,
        logit_scale: float | None = None, grad_filter: float | None = None, engine: str = "auto", group: Any = None, lazy: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, num_classes, bias, device=device, dtype=dtype, loss=loss, reduction=reduction, prior=prior,
            label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale, grad_filter=grad_filter, engine=engine, group=group,
            lazy=lazy, **options,
        )  # fmt: skip
        self._reset_bias()

    @property
    def num_classes(self) -> int:
        return self.out_features

    @classmethod
    def adopt(cls, linear: nn.Linear, **options: Any) -> Any:
        """As every head's, but for `prior`: the bias stays what it is."""
        if options.get("prior") is not None:
            raise ArgumentError("prior: an adopted layer keeps its bias; leave prior=None, or fill linear.bias yourself")
        return super().adopt(linear, **options)

    def _set(self, options: dict[str, Any]) -> None:
        own = {name: value for name, value in options.items() if name not in (*self._OPTIONS, "loss", "reduction", "prior")}
        super()._set({name: value for name, value in options.items() if name in self._OPTIONS})
        self.objective = options.get("loss", "bce")
        if self.objective == "zlpr":
            if own or self.label_smoothing:
                raise TypeError(f"zlpr: unexpected option {next(iter(own), 'label_smoothing')!r}; it has none")
        else:
            if self.objective not in LOSSES:
                raise ArgumentError(f"loss: expected one of {sorted([*LOSSES, 'zlpr'])} (or one you register), got {self.objective!r}")
            made = constants_of(LOSSES[self.objective].loss, own)
            own = {name: made[name] for name in own}
        self.loss_options = own
        self.reduction = options.get("reduction", "batchmean")
        if self.reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction: expected one of {REDUCTIONS}, got {self.reduction!r}")
        self.prior = options.get("prior")
        if self.prior is not None and not (isinstance(self.prior, int | float) and 0.0 < self.prior < 1.0):
            raise ArgumentError(f"prior: expected a probability in (0, 1), got {self.prior!r}")
        if self.prior is not None and self.objective == "squared_hinge":
            raise ArgumentError("prior: a squared hinge has no probabilities; fill the bias with -margin instead")

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear`, the bias to the prior if there is one."""
        super().reset_parameters()
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.prior is None:
            return
        if self.bias is None:
            raise ArgumentError("prior: expected a head with a bias to initialise; leave bias=True, or prior=None")
        nn.init.constant_(self.bias, math.log(self.prior) - math.log1p(-self.prior))

    def forward(
        self,
        features: Tensor,
        positives: Any = None,
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: str | None = None,
        return_topk: int = 0,
        update: SlabUpdate | None = None,
    ) -> Any:
        """Logits (..., C) without positives (lazy in training); with them the loss.

        weight, pos_weight: (C,) factors of the classes, of their positives. reduction: instead of the head's. return_topk, update:
        as in `linear_binary_cross_entropy` (the k best classes from the same pass; the weight's gradient handed on slab by slab).
        """
        if positives is None:
            return self._output(features)
        layer = open_layer(features, self.weight, self.bias, self.group)
        stream = make_stream(*layer.operands, self.softcap, self.logit_scale, grad_filter=self.grad_filter, layer=layer)
        lead, targets = layer.input.shape[:-1], layer_positives(layer, positives)
        shared: dict[str, Any] = {
            "reduction": self.reduction if reduction is None else reduction, "return_topk": return_topk, "update": update,
            "engine": self.engine,
        }  # fmt: skip
        if self.objective == "zlpr":
            if weight is not None or pos_weight is not None:
                raise ArgumentError("weight, pos_weight: ZLPR has no class weights; leave them None")
            return layer.finish(zlpr_loss(stream, lead, targets, **shared), shared["reduction"])
        made = streamed_loss(
            stream, lead, targets, self.objective, self.loss_options, weight=weight, pos_weight=pos_weight,
            label_smoothing=self.label_smoothing, **shared,
        )  # fmt: skip
        return layer.finish(made, shared["reduction"])

    def loss(self, features: Tensor, positives: Any, **options: Any) -> Any:
        """`self(features, positives, ...)`: a forward, so that the hooks of FSDP2 and ZeRO-3 run."""
        return self(features, positives, **options)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"loss={self.objective}", f"reduction={self.reduction}"]
        parts += [] if self.prior is None else [f"prior={self.prior:g}"]
        return ", ".join([*parts, *[f"{name}={value:g}" for name, value in self.loss_options.items()]])

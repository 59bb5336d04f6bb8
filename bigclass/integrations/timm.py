"""timm: its models' classifiers, and mixup without N x C targets.

A model's classifier is where its configuration says (`pretrained_cfg["classifier"]`), not what `get_classifier()` returns, which for some
is a whole head. The module found there changes its class, nothing else. `reset_classifier` makes a new plain layer; so that it comes out
converted, the model gets a `reset_classifier` of its own, which copies and pickles with the model (a closure would go on resetting the
original) and does not keep it alive (a cycle would hold its memory until the garbage collector comes by).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigclass.core.errors import ArgumentError
from bigclass.extras import require
from bigclass.heads.linear import CCEHead, is_plain_linear
from bigclass.losses.targets import SparseTarget

require("timm")

from timm.data.mixup import FastCollateMixup, Mixup  # noqa: E402

OPTIONS = ("softcap", "logit_scale", "grad_filter", "engine", "lazy")


def convert_head(model: Any, **options: Any) -> Any:
    """`bigclass.convert_head` for a timm model."""
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise TypeError(
            f"convert_head: unexpected option {unknown[0]!r}; known: {', '.join(OPTIONS)}. What a loss takes (label smoothing, z-loss, an "
            "ignored index) belongs to the criterion, which timm's models leave to you"
        )
    path = classifier_path(model)
    CCEHead.adopt(_classifier(model, path), **options)
    if hasattr(type(model), "reset_classifier"):
        model.reset_classifier = ResetClassifier(model, path, options)
    return model


def restore_head(model: Any) -> Any:
    """`bigclass.restore_head` for a timm model."""
    path = classifier_path(model)
    head = _at(model, path)
    if isinstance(head, CCEHead):
        head.release()
    model.__dict__.pop("reset_classifier", None)
    return model


def classifier_path(model: Any) -> str:
    """Where the model's classifier is, e.g. "head.fc". Raises ValueError, with the reason, where there is no single one."""
    name = type(model).__name__
    config = getattr(model, "pretrained_cfg", None)
    path = config.get("classifier") if isinstance(config, dict) else getattr(config, "classifier", None)
    if path is None:  # a model that was put together by hand
        found = model.get_classifier() if hasattr(model, "get_classifier") else None
        path = next((where for where, module in model.named_modules() if module is found), None)
    if path is None:
        raise ArgumentError(f"model: {name} names no classifier (an encoder?), so there is none to convert")
    if not isinstance(path, str):
        raise ArgumentError(
            f"model: {name} has {len(path)} classifiers, {', '.join(path)} (distilled or of several parts), whose outputs it combines: "
            "they cannot be lazy. Use bigclass.CCEHead.adopt(part, lazy=False) on each with head(features, target), or a model with one"
        )
    return path


def _classifier(model: Any, path: str) -> nn.Linear:
    """The linear layer at path; ValueError, with the reason, for anything else."""
    name = type(model).__name__
    found = _at(model, path)
    if found is None and isinstance(_at(model, path.rpartition(".")[0]), nn.Identity):
        found = nn.Identity()
    if found is None:
        raise ArgumentError(f"model: {name} has no module {path!r}, where its configuration puts the classifier")
    if isinstance(found, nn.Identity):
        raise ArgumentError(f"model: {name} has no classifier (num_classes=0); reset_classifier(num_classes) makes one")
    if isinstance(found, nn.Conv2d):
        raise ArgumentError(f"model: the classifier of {name}, {path!r}, is a convolution over positions, not a linear layer of features")
    if is_plain_linear(found) or isinstance(found, CCEHead):
        return found
    kind = f"{type(found).__module__}.{type(found).__qualname__}"
    raise ArgumentError(f"model: expected an nn.Linear for the classifier of {name}, {path!r}, got {kind}")


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at path, if there is one."""
    try:
        return model.get_submodule(path)
    except AttributeError:  # num_classes=0 leaves some heads without their inner layers
        return None


class ResetClassifier:
    """The class's own `reset_classifier`, and the new classifier converted (where it is a linear layer: num_classes=0 leaves none)."""

    def __init__(self, model: Any, path: str, options: dict[str, Any]) -> None:
        self._model, self.path, self.options = weakref.ref(model), path, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        assert model is not None, "it is an attribute of the model"
        made = type(model).reset_classifier(model, *args, **kwargs)
        found = _at(model, self.path)
        if is_plain_linear(found):
            CCEHead.adopt(found, **self.options)
        return made

    def __reduce__(self) -> tuple:
        return ResetClassifier, (self._model(), self.path, self.options)


class _Sparse(Mixup if TYPE_CHECKING else object):
    """What mixup makes of class indices: two classes a row, and the label smoothing as a floor."""

    def sparse_target(self, target: Tensor, lam: Any) -> SparseTarget:
        """target (N,), lam a number or (N, 1): the share of an image's own class; the rest is that of its partner, the N-1-i-th."""
        if self.multi_label:
            raise ArgumentError("SparseMixup: mixes class indices; multi-label targets are dense already, use timm's Mixup")
        y = target.long().view(-1)
        smoothing, n = self.label_smoothing, y.shape[0]
        own = lam.reshape(-1, 1) if isinstance(lam, Tensor) else torch.full((n, 1), float(lam), device=y.device)
        own = own.to(y.device, torch.float32)
        weights = torch.cat((own, 1.0 - own), 1) * (1.0 - smoothing)
        return SparseTarget(torch.stack((y, y.flip(0)), 1), weights, self.num_classes, smoothing / self.num_classes)


class SparseMixup(_Sparse, Mixup):
    """timm's `Mixup` (mixup and cutmix, same arguments) whose targets are a `bigclass.SparseTarget` instead of N x C numbers.

    timm's SoftTargetCrossEntropy and BinaryCrossEntropy and `F.cross_entropy` take it with lazy logits.

    Example:
        >>> mixup = bigclass.SparseMixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=100_000)
        >>> images, target = mixup(images, labels)
        >>> loss = timm.loss.SoftTargetCrossEntropy()(model(images), target)
    """

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, SparseTarget]:  # type: ignore[override]
        if len(x) % 2:
            raise ArgumentError(f"x: expected an even number of images, got {len(x)}")
        mix = {"elem": self._mix_elem, "pair": self._mix_pair}.get(self.mode, self._mix_batch)
        return x, self.sparse_target(target, mix(x))


class SparseFastCollateMixup(_Sparse, FastCollateMixup):
    """timm's `FastCollateMixup` (the one its prefetching loader uses) with sparse targets, as `SparseMixup`."""

    def __call__(self, batch: Any, _: Any = None) -> tuple[Tensor, SparseTarget]:  # type: ignore[override]
        size = len(batch)
        if size % 2:
            raise ArgumentError(f"batch: expected an even number of images, got {size}")
        half = "half" in self.mode
        kept = size // 2 if half else size
        output = torch.zeros((kept, *batch[0][0].shape), dtype=torch.uint8)
        if self.mode in ("elem", "half"):
            lam = self._mix_elem_collate(output, batch, half=half)
        elif self.mode == "pair":
            lam = self._mix_pair_collate(output, batch)
        else:
            lam = self._mix_batch_collate(output, batch)
        target = self.sparse_target(torch.tensor([int(label) for _, label in batch]), lam)
        return output, target[:kept]

"""open_clip: its losses without their N x N logits, and its training code made to use them.

The classes are subclasses of open_clip's: same constructors, same `forward`, same keys in the `output_dict`, same values. What the dense
ones make of several ranks differs from mode to mode, and the gradients with it; W ranks of N pairs, L the loss of all W N pairs:

    local_loss  gather_with_grad      value            gradient of a rank's features, dense and here
    False       False                 L                dL: averaged over ranks, as data parallelism does, that of the encoders is 1/W of L's
    False       True                  L                W dL: averaged, exact
    True        True                  the rank's own   of the sum of the ranks' own losses, which is W dL: averaged, exact
    True        False                 the rank's own   of its own loss, the other ranks' features constants: averaged, biased (0.4 to 0.5)
    SigLIP, every dist_impl           the rank's own   of the sum of the ranks' own losses: averaged, exact

The gradient of the scale (and of SigLIP's bias) is the dense one, but for the modes that give gradients of a sum: there every rank gets the
average over ranks, where the dense form gives each its own part, to be averaged. Losses of half-precision features are fp32.

Texts travel as `exchange` says (parallel/spread.py), whatever the mode, but for the biased one and the teacher's part, which gather.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigclass.core.errors import ArgumentError
from bigclass.extras import require
from bigclass.losses.contrastive import contrastive_loss, sigmoid_contrastive_loss, sigmoid_loss, softmax_loss
from bigclass.losses.distill import teacher_cross_entropy
from bigclass.losses.pairs import Batch, Means
from bigclass.parallel.collectives import batch_sizes, gather_rows, replicated, scaled_gradient, sum_over
from bigclass.parallel.groups import Ranks

require("open_clip")

import open_clip.loss as theirs  # noqa: E402

_ClipLoss, _SigLipLoss = theirs.ClipLoss, theirs.SigLipLoss
_CoCaLoss, _DistillClipLoss = theirs.CoCaLoss, theirs.DistillClipLoss


class ClipLoss(_ClipLoss):
    """open_clip's `ClipLoss`, streamed: both softmaxes from one pass over the tiles.

    Attributes, of the class or of an object:
        engine: "auto", "dense", "tiled" or "fused". exchange: "auto", "gather" or "ring". grad_filter: None or a tolerance (the part of a
            teacher stays exact). All as in `bigclass.contrastive_loss`.

    Raises, beside what `bigclass.contrastive_loss` does:
        ValueError: torch.distributed is not initialised, or knows another rank or world_size; ranks with different numbers of pairs in
            the modes of local losses.

    With use_horovod the dense loss runs, after a warning. get_logits is open_clip's, and nothing here calls it. cache_labels has no
    effect: there are no labels.

    Example:
        >>> loss = bigclass.integrations.open_clip.ClipLoss()(image_features, text_features, model.logit_scale.exp())
    """

    engine: str = "auto"
    exchange: str = "auto"
    grad_filter: float | None = None

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        if self._dense():
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        loss = self._contrastive(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _dense(self) -> bool:
        """Must open_clip's own loss run?"""
        if self.use_horovod and self.world_size > 1:
            _warn_once(f"{type(self).__name__}: with use_horovod open_clip's own loss runs, which writes the logits out")
            return True
        return False

    def _contrastive(self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if self.world_size == 1:
            return contrastive_loss(images, texts, scale, logit_bias=bias, grad_filter=self.grad_filter, engine=self.engine)
        if self._constant_others():
            ranks = _ranks(self)
            sizes = _same_sizes(images, ranks)
            positives = torch.arange(images.shape[0], device=images.device) + images.shape[0] * ranks.rank

            def one_way(x: Tensor, w: Tensor) -> Tensor:
                w = gather_rows(w.detach(), sizes, ranks).to(w.dtype)
                return contrastive_loss(
                    x, w, scale, logit_bias=bias, positives=positives, direction="image", grad_filter=self.grad_filter, engine=self.engine
                )

            return (one_way(images, texts) + one_way(texts, images)) / 2
        batch = _batch(self, images, texts, scale, bias, self.local_loss)
        return softmax_loss(batch, means=self._means())

    def _constant_others(self) -> bool:
        """Are other ranks' features constants? Warns that gradients are then not those of the loss."""
        if self.world_size == 1 or not self.local_loss or self.gather_with_grad:
            return False
        if self.rank == 0:
            _warn_once(
                "local_loss=True with gather_with_grad=False takes other ranks' features for constants, so that averaged gradients are "
                "not those of the loss (0.4 to 0.5 of them, and turned); as open_clip does. gather_with_grad=True gives the exact ones"
            )
        return True

    def _means(self) -> Means:
        return Means(local=True) if self.local_loss else Means() if self.gather_with_grad else Means(features=1.0)


class CoCaLoss(_CoCaLoss, ClipLoss):
    """open_clip's `CoCaLoss` whose contrastive part is streamed; the caption's logits are the model's, and stay."""


class DistillClipLoss(_DistillClipLoss, ClipLoss):
    """open_clip's `DistillClipLoss`, streamed: the teacher's probabilities are made a few rows at a time, in the planner's workspace.

    The teacher is a constant, as in open_clip's training; where its features or its scale require gradients the dense loss runs, after a
    warning.
    """

    def forward(
        self,
        image_features,
        text_features,
        logit_scale,
        dist_image_features,
        dist_text_features,
        dist_logit_scale,
        output_dict=False,
    ):
        teacher = (dist_image_features, dist_text_features, dist_logit_scale)
        learns = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in teacher)
        if learns:
            _warn_once(
                f"{type(self).__name__}: the teacher requires gradients, so open_clip's own loss runs, which writes the logits out; run "
                f"the teacher under torch.no_grad() to stream it"
            )
        if self._dense() or learns:
            return super().forward(image_features, text_features, logit_scale, *teacher, output_dict)
        contrastive = self._contrastive(image_features, text_features, logit_scale, None)
        distill = self._distill(image_features, text_features, logit_scale, *teacher)
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)

    def _distill(self, images, texts, scale, teacher_images, teacher_texts, teacher_scale) -> Tensor:
        n, device = images.shape[0], images.device
        for name, t in (("dist_image_features", teacher_images), ("dist_text_features", teacher_texts)):
            if t.shape != (n, teacher_images.shape[-1]):
                raise ArgumentError(f"{name}: expected {n} rows (as image_features) of one width, got shape {tuple(t.shape)}")
        scale, teacher_scale = (t if isinstance(t, Tensor) else torch.tensor(float(t), device=device) for t in (scale, teacher_scale))
        every = images, texts, teacher_images, teacher_texts
        ranks = None if self.world_size == 1 else _ranks(self)
        total = n
        if ranks is not None:
            sizes = batch_sizes(images, ranks) if not self.local_loss else _same_sizes(images, ranks)
            total = n if self.local_loss else sum(sizes)
            if self._constant_others():
                every = [gather_rows(t.detach(), sizes, ranks) for t in every]
            else:
                features, scalars = self._means().factors(ranks)
                images, texts = scaled_gradient(images, features), scaled_gradient(texts, features)
                scale = replicated(scale, ranks, scalars)
                every = [gather_rows(t, sizes, ranks) for t in (images, texts, teacher_images.detach(), teacher_texts.detach())]
            every = [t.to(like.dtype) for t, like in zip(every, (images, texts, teacher_images, teacher_texts), strict=True)]
        engine = "auto" if self.engine == "fused" else self.engine  # two streams have no fused engine
        loss = teacher_cross_entropy(images, every[1], scale, teacher_images, every[3], teacher_scale, engine)
        loss = loss + teacher_cross_entropy(texts, every[0], scale, teacher_texts, every[2], teacher_scale, engine)
        loss = loss / (2 * total)
        return loss if ranks is None or self.local_loss else sum_over(loss, ranks)


class SigLipLoss(_SigLipLoss):
    """open_clip's `SigLipLoss`, streamed. Each of its dist_impl is one and the same loss, and here the same computation.

    Attributes, Raises: as `ClipLoss`.
    """

    engine: str = "auto"
    exchange: str = "auto"
    grad_filter: float | None = None

    def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
        if self.world_size == 1:
            loss = sigmoid_contrastive_loss(
                image_features, text_features, logit_scale, logit_bias, grad_filter=self.grad_filter, engine=self.engine
            )
        else:
            batch = _batch(self, image_features, text_features, logit_scale, logit_bias, True)
            loss = sigmoid_loss(batch, Means(local=True))
        return {"contrastive_loss": loss} if output_dict else loss


# --- ranks ------------------------------------------------------------------------------------------------------------------------


def _ranks(loss: Any) -> Ranks:
    """The default group, which the loss says it runs in."""
    found = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else None
    if found != (loss.rank, loss.world_size):
        there = "torch.distributed is not initialised" if found is None else f"torch.distributed has rank {found[0]} of {found[1]}"
        raise ArgumentError(
            f"world_size: expected that of the default process group, got rank {loss.rank} of {loss.world_size}, but {there}"
        )
    ranks = Ranks.of(dist.group.WORLD)
    assert ranks is not None
    return ranks


def _batch(loss: Any, images: Tensor, texts: Tensor, scale: Any, bias: Any, local: bool) -> Batch:
    _ranks(loss)
    batch = Batch.of(images, texts, scale, bias, None, None, None, "mean", dist.group.WORLD, loss.exchange, loss.engine, False,
                     loss.grad_filter)  # fmt: skip
    if local:
        _check_same(batch.sizes)
    return batch


def _same_sizes(t: Tensor, ranks: Ranks) -> list[int]:
    sizes = batch_sizes(t, ranks)
    _check_same(sizes)
    return sizes


def _check_same(sizes) -> None:
    if len(set(sizes)) > 1:
        raise ArgumentError(f"image_features: expected as many on every rank, for each has a loss of its own; got {list(sizes)}")


_said: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _said and not torch.compiler.is_compiling():
        _said.add(text)
        warnings.warn(f"bigclass: {text}", UserWarning, stacklevel=5)


# --- open_clip's own training code --------------------------------------------------------------------------------------------------

_OURS = {_ClipLoss: ClipLoss, _SigLipLoss: SigLipLoss, _CoCaLoss: CoCaLoss, _DistillClipLoss: DistillClipLoss}


class Patch:
    """What one `patch()` replaced. Calling it, or leaving its `with` block, puts that back."""

    def __init__(self, replaced: list[tuple[Any, str, type]]) -> None:
        self._replaced = replaced

    def __call__(self) -> None:
        for module, name, original in self._replaced:
            setattr(module, name, original)
        self._replaced = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self()


def patch() -> Patch:
    """Make open_clip use these losses: `open_clip.create_loss`, and with it `open_clip_train`, whatever it was started with.

    Replaces the four classes by name in every module of open_clip and open_clip_train that was imported. A second call changes nothing.

    Returns:
        What undoes it, when called or as a context manager; `unpatch()` undoes all.

    Example:
        >>> bigclass.integrations.open_clip.patch()
        >>> loss = open_clip.create_loss(args)  # a streamed one
    """
    return Patch(_replace(_OURS))


def unpatch() -> None:
    """Undo every `patch()`."""
    _replace({ours: original for original, ours in _OURS.items()})


def _replace(by: dict[Any, Any]) -> list[tuple[Any, str, type]]:
    """[(module, name, what was there)]"""
    replaced = []
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] not in ("open_clip", "open_clip_train"):
            continue
        for name, there in list(vars(module).items()):
            if isinstance(there, type) and there in by:
                setattr(module, name, by[there])
                replaced.append((module, name, there))
    return replaced

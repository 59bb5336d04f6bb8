"""Two sets of features and who belongs to whom: what the contrastive losses start from (contrastive.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.folds import Fold, State
from bigclass.core.op import reduce_logits, spread_engine
from bigclass.core.plan import settings
from bigclass.core.problem import exact_dtype
from bigclass.core.stream import Stream
from bigclass.losses.inputs import INDEX_DTYPES, check_range, check_scale, check_tensor, filter_of, in_autocast
from bigclass.losses.positives import read_positives, repeated
from bigclass.parallel.collectives import replicated, row_counts, scaled_gradient, sum_over
from bigclass.parallel.groups import Ranks
from bigclass.parallel.spread import choose_exchange, spread_logits


@dataclass(frozen=True)
class Means:
    """What the loss of a rank means to its gradients.

    local: is it the mean over this rank's images and texts (of as many on every rank), the sum of which over ranks is differentiated? Else
    it is that of the whole batch, on every rank. features, scalars: what gradients are multiplied by, so that their average over ranks
    is that of the mean over the whole batch; None: the number of ranks and 1 (local: 1 and one by the number of ranks).
    """

    local: bool = False
    features: float | None = None
    scalars: float | None = None

    def factors(self, ranks: Ranks) -> tuple[float, float]:
        """(features, scalars)"""
        usual = (1.0, 1.0 / ranks.size) if self.local else (float(ranks.size), 1.0)
        return usual[0] if self.features is None else self.features, usual[1] if self.scalars is None else self.scalars


@dataclass(frozen=True)
class Batch:
    """Features and who belongs to whom.

    stream: this rank's images and texts (hard negatives behind them). bias: apart from it, for only one of the losses sees it.
    picks: (N, K + Q) texts, counted over all ranks, those of `ignore` last. count: K. diagonal: is text i the only positive of image i?
    sizes: texts of each rank. images: of all ranks.
    """

    stream: Stream
    bias: float | Tensor | None
    picks: Tensor
    count: int
    diagonal: bool
    ranks: Ranks | None
    sizes: tuple[int, ...]
    images: int
    reduction: str
    exchange: str
    engine: str

    @classmethod
    def of(cls, image_features, text_features, logit_scale, logit_bias, positives, ignore, hard_negatives, reduction, group, exchange,
           engine, check_norms, grad_filter=None) -> Batch:  # fmt: skip
        """From a user's arguments, checked."""
        if reduction not in ("mean", "sum", "none"):
            raise ArgumentError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
        _check_features(image_features, text_features, hard_negatives)
        _check_number("logit_scale", logit_scale, image_features)
        if logit_bias is not None:
            _check_number("logit_bias", logit_bias, image_features)
        if not isinstance(logit_scale, Tensor) and not 0.0 < logit_scale < math.inf:
            raise ArgumentError(f"logit_scale: expected a finite number > 0 (1/temperature, not its logarithm), got {logit_scale}")
        (n, device), ranks = (image_features.shape[0], image_features.device), Ranks.of(group)
        if check_norms:
            _check_norms(image_features=image_features, text_features=text_features, hard_negatives=hard_negatives)
        if positives is None and text_features.shape[0] != n:
            raise ArgumentError(
                f"text_features: expected {n} rows (as image_features), got {text_features.shape[0]}; with another number say who belongs "
                f"to whom: positives= (hard negatives have an argument of their own)"
            )
        texts = text_features if hard_negatives is None else torch.cat((text_features, hard_negatives))
        choose_exchange(exchange, texts, (0,))  # raises for what it does not know
        sizes, images = (texts.shape[0],), n
        if ranks is not None:
            if reduction == "none":
                raise ArgumentError(
                    "reduction: 'none' is not offered with group=, for a rank's own losses are no whole; use 'mean' or 'sum'"
                )
            if engine == "dense":
                raise ArgumentError("engine: 'dense' is not offered with group=, whose ranks hold no whole matrix; use 'auto' or 'tiled'")
            of_texts, of_images = row_counts((texts, image_features), ranks)  # in one exchange, whatever this rank alone was given
            sizes, images = tuple(of_texts), sum(of_images)
        start = 0 if ranks is None else sum(sizes[: ranks.rank])
        if positives is None:
            picks = torch.arange(start, start + n, device=device).unsqueeze(1)
        else:
            read = read_positives(positives, (n,), sum(sizes), device)
            if isinstance(read, Tensor) or read.values is not None or read.floor:
                raise ArgumentTypeError("positives: expected indices of texts (padded, a CSR pair or one each), without weights")
            picks = read.picks
        count = picks.shape[1]
        if ignore is not None:
            picks = torch.cat((picks, _ignored(ignore, picks, sum(sizes), device)), 1)
        compute = torch.get_autocast_dtype(device.type) if in_autocast(device.type) else None
        tensor = logit_scale if isinstance(logit_scale, Tensor) else None
        stream = Stream(
            ((image_features, texts),), scale=1.0 if tensor is not None else float(logit_scale), scale_tensor=tensor,
            compute_dtype=compute, grad_filter=filter_of(grad_filter),
        )  # fmt: skip
        return cls(stream, logit_bias, picks, count, positives is None, ranks, sizes, images, reduction, exchange, engine)

    @property
    def texts(self) -> int:
        """M, of all ranks."""
        return sum(self.sizes)

    @property
    def exact(self) -> torch.dtype:
        """Of sums over images or texts."""
        return exact_dtype(self.stream.device)

    def fold(self, stream: Stream, folds: list[Fold]) -> tuple[list[State], Tensor]:
        """States and picked logits (N, K + Q); of columns, this rank's part."""
        if self.ranks is not None:
            engine = spread_engine(stream, folds, self.engine, self.texts)
            states, picked = spread_logits(
                stream, self.picks, folds, self.ranks, self.sizes, exchange=self.exchange, engine=engine, workspace=settings().workspace
            )
        else:
            states, picked = reduce_logits(stream, self.picks, folds, engine=self.engine)
        assert picked is not None
        return states, picked

    def shared(self, means: Means) -> Stream:
        """The stream whose gradients come multiplied; those of what all ranks hold are summed over ranks."""
        if self.ranks is None:
            return self.stream
        features, scalars = means.factors(self.ranks)
        (x, w), scale = self.stream.pairs[0], self.stream.scale_tensor
        pairs = ((scaled_gradient(x, features), scaled_gradient(w, features)),)
        return replace(self.stream, pairs=pairs, scale_tensor=None if scale is None else replicated(scale, self.ranks, scalars))

    def total(self, t: Tensor) -> Tensor:
        """The sum of t over ranks."""
        return t if self.ranks is None else sum_over(t, self.ranks)


def _check_features(image_features: Tensor, text_features: Tensor, hard_negatives: Tensor | None) -> None:
    for name, t in (("image_features", image_features), ("text_features", text_features), ("hard_negatives", hard_negatives)):
        if name == "hard_negatives" and t is None:
            continue
        check_tensor(name, t)
        assert t is not None
        if t.dim() != 2:
            raise ArgumentError(f"{name}: expected shape (rows, D), got {tuple(t.shape)}")
        if not t.is_floating_point():
            raise ArgumentTypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")
        if t.device != image_features.device:
            raise ArgumentError(f"{name}: expected device {image_features.device} (that of image_features), got {t.device}")
        if t.shape[1] != image_features.shape[1]:
            raise ArgumentError(f"{name}: expected {image_features.shape[1]} features (as image_features), got {t.shape[1]}")
    if image_features.shape[1] == 0:
        raise ArgumentError("image_features: expected at least one feature, got 0")


def _check_number(name: str, value: Any, features: Tensor) -> None:
    if isinstance(value, Tensor):
        check_scale(value, features, name=name, of="image_features")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name}: expected a number or a tensor of shape () or (1,), got {value!r}")


def _check_norms(**features: Tensor | None) -> None:
    for name, t in features.items():
        if t is None or t.shape[0] == 0:
            continue
        length = torch.linalg.vector_norm(t.detach(), dim=1, dtype=torch.promote_types(t.dtype, torch.float32))
        off = (length - 1.0).abs()
        if torch.compiler.is_compiling() or t.device.type != "cpu":
            torch._assert_async((off <= 0.01).all(), f"bigclass: {name} are not of length 1")  # pyright: ignore[reportPrivateImportUsage]
        elif not bool((off <= 0.01).all()):
            worst = float(length[off.nan_to_num(math.inf).argmax()])
            raise ArgumentError(
                f"{name}: expected rows of length 1 (check_norms=True), got one of {worst:g}; see torch.nn.functional.normalize"
            )


def _ignored(ignore: Tensor, picks: Tensor, m: int, device: torch.device) -> Tensor:
    check_tensor("ignore", ignore)
    if ignore.dtype not in INDEX_DTYPES:
        raise ArgumentTypeError(f"ignore: expected int64 or int32 indices, got {ignore.dtype}")
    if ignore.dim() != 2 or ignore.shape[0] != picks.shape[0]:
        raise ArgumentError(f"ignore: expected shape ({picks.shape[0]}, Q), got {tuple(ignore.shape)}")
    if ignore.device != device:
        raise ArgumentError(f"ignore: expected device {device} (that of image_features), got {ignore.device}")
    ignore = ignore.long()
    check_range("ignore", ignore, ignore != -1, m)
    # a positive that is also ignored is a positive; one that stands twice counts once
    both, order = torch.cat((picks, ignore), 1).sort(dim=1, stable=True)
    again = repeated(both)
    return ignore.masked_fill(again.scatter(1, order, again)[:, picks.shape[1] :], -1)

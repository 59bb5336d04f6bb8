"""What examples share, and no example itself: photographs cut into thousands of classes. A place is a class, a patch cut there a sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Patches:
    """Square patches of the two photographs that scikit-learn ships, shaken and recoloured; the place a patch was cut at is its class.

    Args:
        stride: pixels between places. side: of a patch, in pixels.
        span: the part of the photographs' width that is cut; patches of disjoint parts share no pixel.
        texture: places whose contrast is less (in standard deviations of the photographs) are left out: plain sky looks alike everywhere.
    """

    def __init__(self, stride: int, side: int = 32, span: tuple[float, float] = (0.0, 1.0), texture: float = 0.0) -> None:
        from sklearn.datasets import load_sample_images

        photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images]).float()  # (2, 427, 640, 3)
        self.photos = (photos - photos.mean((0, 1, 2))) / photos.std((0, 1, 2))
        self.side = side
        self.shake = stride // 2 - 1  # so that no two classes share a patch
        (height, width), (first, last) = photos.shape[1:3], span
        bounds = (0, height), (round(first * width), round(last * width))
        rows, columns = (torch.arange(low + self.shake, high - side - self.shake, stride) for low, high in bounds)
        self.places = torch.cartesian_prod(torch.arange(len(photos)), rows, columns)  # (C, 3): photo, top, left
        if texture:
            contrast = torch.cat([self.cut(places).std((2, 3)).mean(1) for places in self.places.split(1024)])
            self.places = self.places[contrast >= texture]

    def cut(self, places: Tensor) -> Tensor:
        """The patches (N, 3, side, side) at places (N, 3), as they are."""
        (photo, top, left), side = places.unbind(1), torch.arange(self.side)
        rows, columns = (top[:, None] + side)[:, :, None], (left[:, None] + side)[:, None, :]
        return self.photos[photo[:, None, None], rows, columns].permute(0, 3, 1, 2)

    def views(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Fresh patches (N, 3, side, side) of the classes labels (N,)."""
        size = len(labels)
        photo, *corner = self.places[labels].unbind(1)
        top, left = (c + torch.randint(-self.shake, self.shake + 1, (size,), generator=generator) for c in corner)
        images = self.cut(torch.stack((photo, top, left), 1))
        contrast, colour, grain = (torch.randn(shape, generator=generator) for shape in ((size, 1, 1, 1), (size, 3, 1, 1), images.shape))
        return images * (1 + 0.1 * contrast) + 0.1 * colour + 0.05 * grain

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end of images (N, 3, side, side) and labels (N,), uniform over all classes."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            labels = torch.randint(len(self.places), (size,), generator=generator)
            yield self.views(labels, generator), labels

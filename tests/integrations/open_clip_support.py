"""open_clip's own training loop with a tiny model and random data in place of its own."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tower(nn.Module):
    """What open_clip's models return in training, from two linear layers."""

    def __init__(self, bias: float | None) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(12, 8), nn.Embedding(50, 8)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        out = {
            "image_features": F.normalize(self.image(images.flatten(1).to(self.image.weight.dtype)), dim=1),
            "text_features": F.normalize(self.text(texts).mean(1), dim=1),
            "logit_scale": self.logit_scale.exp(),
        }
        return out if self.logit_bias is None else {**out, "logit_bias": self.logit_bias}


def tower(bias: float | None = None) -> Tower:
    torch.manual_seed(5)
    return Tower(bias).double()


class Loader:
    """`batches` times (images (size, 3, 2, 2), texts (size, 6))."""

    def __init__(self, batches: int, size: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.data = [(torch.randn(size, 3, 2, 2, generator=g), torch.randint(50, (size, 6), generator=g)) for _ in range(batches)]
        self.num_batches, self.num_samples = batches, batches * size

    def __iter__(self):
        return iter(self.data)


def arguments(**options: Any) -> SimpleNamespace:
    """What open_clip's command line would give."""
    usual = {
        "device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1, "skip_scheduler": True, "horovod": False,
        "grad_clip_norm": 1.0, "log_every_n_steps": 100, "batch_size": 6, "world_size": 1, "rank": 0, "wandb": False, "model": "tower",
        "siglip": False, "loss_dist_impl": None, "local_loss": False, "gather_with_grad": False, "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**(usual | options))


def train_one_epoch(model: nn.Module, loader: Loader, args: SimpleNamespace, teacher: nn.Module | None = None) -> nn.Module:
    """open_clip_train's, with the loss that `open_clip.create_loss` makes, which is returned."""
    from open_clip_train.train import train_one_epoch

    logging.getLogger().setLevel(logging.WARNING)
    loss = open_clip.create_loss(args)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    train_one_epoch(model, data, loss, 0, optimizer, None, None, teacher, args)
    return loss

"""The drop-ins for open_clip's losses on two and three gloo processes: every mode gives what open_clip's own gives, rank by rank."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

theirs = pytest.importorskip("open_clip.loss", reason="open_clip is not installed")

from bigclass.integrations import open_clip as ours  # noqa: E402
from tests.integrations.open_clip_support import Loader, arguments, tower, train_one_epoch  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.support import error  # noqa: E402

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

N, D = 7, 5
GATHERS = [(local, grad) for local in (False, True) for grad in (False, True)]
NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss")
# (class, its options)
CLIP = [(name, {"local_loss": local, "gather_with_grad": grad}) for name in NAMES for local, grad in GATHERS]
SIGLIP = [("SigLipLoss", {"dist_impl": how}) for how in ("bidir", "shift", "reduce", "gather")]
MODES = CLIP + SIGLIP
IDS = [f"{name}, {', '.join(f'{k}={v}' for k, v in options.items())}" for name, options in MODES]

MEASURED = [f"{key}, {exchange}" for key in IDS for exchange in ("gather", "ring")]


def inputs(rank: int, seed: int) -> dict[str, Tensor]:
    """Other features on every rank; the same scale and bias."""
    g = torch.Generator().manual_seed(100 * seed + rank)
    made = {
        name: F.normalize(torch.randn(N, D, generator=g, dtype=torch.float64), dim=1)
        for name in ("image_features", "text_features", "dist_image_features", "dist_text_features")
    }
    made["logits"], made["labels"] = torch.randn(N, 4, 11, generator=g, dtype=torch.float64), torch.randint(11, (N, 4), generator=g)
    scalars = {"logit_scale": 7.0, "logit_bias": -2.0, "dist_logit_scale": 5.0}
    return made | {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}


def evaluate(loss: nn.Module, name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each part of the loss, the gradients of this rank's features, and those of scale and bias averaged over ranks."""
    leaves = {k: given[k].clone().requires_grad_() for k in ("image_features", "text_features", "logit_scale", "logit_bias")}
    learn = ["image_features", "text_features", "logit_scale"] + (["logit_bias"] if name == "SigLipLoss" else [])
    kinds = {
        "ClipLoss": ("logit_bias",),
        "SigLipLoss": ("logit_bias",),
        "CoCaLoss": ("logits", "labels"),
        "DistillClipLoss": ("dist_image_features", "dist_text_features", "dist_logit_scale"),
    }
    used = {k: leaves.get(k, given[k]) for k in ("image_features", "text_features", "logit_scale", *kinds[name])}
    out = loss(**used, output_dict=True)
    grads = dict(zip(learn, torch.autograd.grad(sum(out.values()), [leaves[k] for k in learn]), strict=True))
    for k in ("logit_scale", "logit_bias"):
        if k in grads:
            dist.all_reduce(grads[k])
            grads[k] = grads[k] / dist.get_world_size()
    return {**{f"value of {k}": v.detach() for k, v in out.items()}, **grads}


def extra(name: str) -> dict[str, Any]:
    return {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5} if name == "CoCaLoss" else {}


def compare(rank: int, world: int) -> dict[str, Any]:
    """{mode: {what: error}}, by each way that features travel, and what was warned of."""
    said: list[str] = []
    found: dict[str, Any] = {"said": said}
    for i, ((name, options), key) in enumerate(zip(MODES, IDS, strict=True)):
        given, options = inputs(rank, i), {**options, **extra(name), "rank": rank, "world_size": world}
        want = evaluate(getattr(theirs, name)(**options), name, given)
        for exchange in ("gather", "ring"):
            loss = getattr(ours, name)(**options)
            loss.exchange = exchange
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                got = evaluate(loss, name, given)
            said += [str(w.message) for w in caught if "bigclass" in str(w.message)]
            assert list(got) == list(want)
            found[f"{key}, {exchange}"] = {k: error(got[k], want[k]) for k in want}
    found["refused"] = refusals(rank, world)
    found["trained"] = {freq: train_both(rank, world, freq) for freq in (1, 2)}
    return found


def refusals(rank: int, world: int) -> list[str]:
    said = []
    given = inputs(rank, 0)
    pair, scale = (given["image_features"], given["text_features"]), given["logit_scale"]
    uneven = [t[: N - rank] for t in pair]
    for name, options, features in (
        ("ClipLoss", {"world_size": world + 1}, pair),
        ("SigLipLoss", {"rank": (rank + 1) % world, "world_size": world}, pair),
        ("ClipLoss", {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": world}, uneven),
        ("ClipLoss", {"local_loss": True, "rank": rank, "world_size": world}, uneven),
        ("SigLipLoss", {"rank": rank, "world_size": world}, uneven),
    ):
        with pytest.raises(ValueError, match=r"^(world_size|image_features): expected") as caught:
            getattr(ours, name)(**options)(*features, scale, None)
        said.append(str(caught.value))
    return said


def train_both(rank: int, world: int, freq: int) -> float:
    """The largest error of a parameter after open_clip's own training loop ran over DDP, dense and streamed."""
    trained = []
    for patched in (False, True):
        args = arguments(rank=rank, world_size=world, accum_freq=freq, local_loss=True, gather_with_grad=True)
        model = tower()
        whole = nn.parallel.DistributedDataParallel(model)
        with ours.patch() if patched else warnings.catch_warnings():
            train_one_epoch(whole, Loader(4, 6, seed=rank), args)
        trained.append([p.detach() for p in model.parameters()])
    return max(error(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_mode_gives_each_rank_what_open_clip_gives_it(world):
    """And open_clip's own training loop over DDP the same model. One test, for one start of processes."""
    found = run_ranks(compare, world)
    for rank in found:
        wrong = {mode: rank[mode] for mode in MEASURED if not max(rank[mode].values()) < 1e-10}
        assert not wrong
        assert max(rank["trained"].values()) < 1e-10
        assert "but torch.distributed has rank" in rank["refused"][0]
        assert all("as many on every rank" in text for text in rank["refused"][2:])
    said = [text for rank in found for text in rank["said"]]
    assert len(said) == 1, "the biased mode (pitfall 29) is named once, by one rank"
    assert "gather_with_grad=True gives the exact ones" in said[0]

"""The functions of one-vs-all and Poly-1 losses, given few positives a row, are timm's own modules on written-out logits and targets."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")
loss = pytest.importorskip("timm.loss")

import bigclass  # noqa: E402
from tests.support import error  # noqa: E402

N, C, D = 13, 700, 9
WEIGHT, POS_WEIGHT = torch.linspace(0.5, 2.0, C), torch.linspace(3.0, 1.0, C)


def asymmetric(**options):
    return loss.AsymmetricLossMultiLabel(**options), bigclass.linear_asymmetric_loss, options


def binary(ours, **options):
    return loss.BinaryCrossEntropy(**options), bigclass.linear_binary_cross_entropy, ours


def poly(**options):
    return loss.PolyBinaryCrossEntropy(**options), bigclass.linear_elementwise_loss, {"loss": "poly", "epsilon": 2.0, **options}


# name: (timm's module, our function, its options)
MULTI = {
    "asymmetric": asymmetric(),
    "asymmetric, no clip": asymmetric(clip=None, gamma_neg=2, gamma_pos=0, reduction="mean"),
    "asymmetric, no focus": asymmetric(gamma_neg=0, gamma_pos=0, clip=0.1, reduction="sum"),
    "asymmetric, weights that are constants": asymmetric(disable_torch_grad_focal_loss=True, clip=0.2, eps=1e-4, gamma_neg=2.5),
    "asymmetric, weighted": asymmetric(weight=WEIGHT, pos_weight=POS_WEIGHT),
    "binary": binary({}),
    "binary, summed and weighted": binary(
        {"reduction": "batchmean", "weight": WEIGHT, "pos_weight": POS_WEIGHT}, sum_classes=True, weight=WEIGHT, pos_weight=POS_WEIGHT
    ),
    "poly": poly(),
    "poly, focal": poly(epsilon=-0.5, gamma=2.0, alpha=0.3, reduction="batchmean"),
    "poly, focal without alpha": poly(epsilon=1.0, gamma=1.5, alpha=None, reduction="sum"),
}
SINGLE = {
    "binary, smoothed": binary({"label_smoothing": 0.1, "reduction": "sum"}, smoothing=0.1, reduction="sum"),
    "poly, softmax": (loss.PolyCrossEntropy(epsilon=-1.0), bigclass.linear_poly_cross_entropy, {"epsilon": -1.0}),
    "poly, softmax, smoothed": (
        loss.PolyCrossEntropy(smoothing=0.1, reduction="sum"), bigclass.linear_poly_cross_entropy,
        {"label_smoothing": 0.1, "reduction": "sum"},
    ),
    "label smoothing": (loss.LabelSmoothingCrossEntropy(0.1), bigclass.linear_cross_entropy, {"label_smoothing": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["tiled", "dense"])
@pytest.mark.parametrize("low", [0.0, -6.0], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", [*MULTI, *SINGLE])
def test_value_and_gradients_are_timm_s(name, low, engine):
    """To 2e-6: timm computes in float32, whatever it is given."""
    theirs, ours, options = {**MULTI, **SINGLE}[name]
    g = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((N, D), (C, D), (C,)))
    leaves = [t.requires_grad_() for t in (x, w, (b * 0.3 + low))]
    y = torch.rand(N, C, generator=g).argsort(1)[:, :4]  # different classes
    if name in SINGLE:
        positives = target = y[:, 0]
    else:
        positives = y.masked_fill(torch.rand(N, 4, generator=g) < 0.3, -1)
        target = torch.zeros(N, C + 1, dtype=torch.float64).scatter_(1, torch.where(positives < 0, C, positives), 1.0)[:, :C]
    want = theirs(torch.nn.functional.linear(*leaves), target)
    with bigclass.planning(workspace=1 << 20):
        got = ours(*leaves[:2], positives, linear_bias=leaves[2], engine=engine, **options)
        grads = torch.autograd.grad(got, leaves)
    assert error(got, want) < 2e-6
    for a, e in zip(grads, torch.autograd.grad(want, leaves), strict=True):
        assert error(a, e) < 2e-6

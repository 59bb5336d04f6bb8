"""MultiLabelHead: an nn.Linear whose loss over huge numbers of labels streams."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigclass
from bigclass.losses.elementwise import LOSSES
from tests.support import error

X, Y = torch.randn(5, 8), torch.tensor([[1, 30, -1]] * 5)
OPTIONS = {
    "bce": {}, "focal": {"alpha": 0.3, "gamma": 1.0}, "asymmetric": {"gamma_neg": 2, "clip": 0.1}, "squared_hinge": {"margin": 0.5},
    "poly": {"epsilon": 2.0}, "zlpr": {},
}  # fmt: skip


@pytest.mark.parametrize("loss", OPTIONS)
def test_each_loss_is_its_function_s(loss):
    head = bigclass.MultiLabelHead(8, 40, loss=loss, **OPTIONS[loss])
    for reduction in ("mean", "sum", "none"):
        if loss == "zlpr":
            want = bigclass.linear_zlpr_loss(X, head.weight, Y, linear_bias=head.bias, reduction=reduction)
        else:
            want = bigclass.linear_elementwise_loss(
                X, head.weight, Y, loss=loss, linear_bias=head.bias, reduction=reduction, **OPTIONS[loss]
            )
        assert torch.equal(head(X, Y, reduction=reduction), want) and torch.equal(head.loss(X, Y, reduction=reduction), want)
    assert f"loss={loss}" in repr(head) and all(name in repr(head) for name in OPTIONS[loss])


def test_it_is_an_nn_linear():
    torch.manual_seed(0)
    plain = nn.Linear(8, 40)
    torch.manual_seed(0)
    head = bigclass.MultiLabelHead(8, 40)
    assert list(head.state_dict()) == list(plain.state_dict()) and torch.equal(head.weight, plain.weight)
    assert torch.equal(head.bias, plain.bias) and isinstance(head, nn.Linear)
    head.eval()
    assert torch.equal(head(X), plain(X))
    adopted = bigclass.MultiLabelHead.adopt(plain, loss="asymmetric", clip=None, softcap=5.0)
    assert adopted is plain and adopted.loss_options == {"clip": 0.0} and adopted.reduction == "batchmean"
    copied = copy.deepcopy(adopted)
    buffer = io.BytesIO()
    torch.save(adopted, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(other(X, Y), adopted(X, Y))
    assert type(adopted.release()) is nn.Linear and "objective" not in adopted.__dict__


def test_a_multi_label_head_becomes_another_head_and_back():
    head = bigclass.CCEHead.adopt(bigclass.MultiLabelHead(8, 40, loss="focal"))
    assert type(head) is bigclass.CCEHead and "objective" not in head.__dict__
    head = bigclass.MultiLabelHead.adopt(head, loss="focal")
    assert "z_loss" not in head.__dict__ and torch.isfinite(head(X, Y))


def test_lazy_logits_stream_under_an_unchanged_criterion():
    head = bigclass.MultiLabelHead(8, 5000)
    x, y = torch.randn(40, 8), torch.randint(0, 5000, (40, 3))
    target = torch.zeros(40, 5000).scatter_(1, y, 1.0)
    logits = head(x)
    assert isinstance(logits, bigclass.LazyLogits)
    with bigclass.planning(logits_limit=0):  # writing the logits out would raise
        lazy = nn.BCEWithLogitsLoss()(logits, target)
    assert error(lazy, head(x, y, reduction="mean")) < 1e-6
    assert error(lazy, F.binary_cross_entropy_with_logits(F.linear(x, head.weight, head.bias), target)) < 2e-6


def test_a_prior_is_the_mean_prediction():
    head = bigclass.MultiLabelHead(8, 4000, prior=1e-3)
    with torch.no_grad():
        head.weight.zero_()
    assert error(torch.sigmoid(head.eval()(X)), torch.full((5, 4000), 1e-3)) < 1e-6
    head.reset_parameters()
    assert torch.equal(head.bias, torch.full_like(head.bias, float(head.bias[0]))) and head.weight.any()


def test_prediction_is_the_top_of_the_logits():
    head = bigclass.MultiLabelHead(8, 4000, softcap=3.0).eval()
    values, labels = head.predict(X, k=4)
    want = head(X).topk(4)
    assert torch.equal(labels, want.indices) and error(values, want.values) < 1e-6


def test_autocast_keeps_sums_wide():
    head = bigclass.MultiLabelHead(8, 5000, loss="asymmetric", engine="tiled")
    want = head(X, Y)
    with torch.autocast("cpu", torch.bfloat16):
        got = head(X, Y)
    assert got.dtype == torch.float32 and error(got, want) < 1e-2


def test_bad_options_are_refused_and_named():
    for options, kind, words in [
        ({"loss": "softmax"}, ValueError, r"loss: expected one of \[.*zlpr"),
        ({"loss": "squared_hinge", "prior": 0.1}, ValueError, "a squared hinge has no probabilities"),
        ({"loss": "bce", "gamma": 2.0}, TypeError, "bce: unexpected option 'gamma'"),
        ({"loss": "zlpr", "label_smoothing": 0.1}, TypeError, "zlpr: unexpected option 'label_smoothing'"),
        ({"prior": 1.0}, ValueError, "prior: expected a probability"),
        ({"prior": 0.1, "bias": False}, ValueError, "prior: expected a head with a bias"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"engine": "gpu"}, ValueError, "engine: expected one of"),
    ]:
        with pytest.raises(kind, match=words):
            bigclass.MultiLabelHead(8, 40, **options)
    with pytest.raises(ValueError, match="an adopted layer keeps its bias"):
        bigclass.MultiLabelHead.adopt(nn.Linear(8, 40), prior=0.1)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        bigclass.MultiLabelHead(8, 40)(X, Y, reduction="")
    with pytest.raises(ValueError, match="ZLPR has no class weights"):
        bigclass.MultiLabelHead(8, 40, loss="zlpr")(X, Y, pos_weight=torch.ones(40))
    assert "tests.logarithmic" not in OPTIONS and set(OPTIONS) - {"zlpr"} <= set(LOSSES)

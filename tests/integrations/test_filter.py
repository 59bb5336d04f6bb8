"""`grad_filter=` through the integrations: converted models stream filtered gradients, and what is not filtered is as before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bigclass
from tests.filter_support import draw, gradients

TOLERANCE = 2.0**-4


def two(make):
    """(made with the filter, without), of the same seed."""
    found = []
    for options in ({"grad_filter": TOLERANCE}, {}):
        torch.manual_seed(0)
        found.append(make(**options))
    return found


def close_not_equal(made, exact):
    assert not torch.equal(made, exact), "nothing was left out"
    assert float((made - exact).norm() / exact.norm()) < 0.2


def popular_layer(layer):
    """Give a linear layer's weight the popular classes of `draw`, as one loud feature has them."""
    c, d = layer.weight.shape
    _, _, b, _ = draw("popular", 1, c, d, torch.float32)
    with torch.no_grad():
        layer.weight.mul_(0.2)
        layer.weight[:, 0] = b


def test_a_timm_model():
    timm = pytest.importorskip("timm")

    def loss(**options):
        model = bigclass.convert_head(timm.create_model("test_vit", num_classes=12_000), **options).train()
        head = model.get_classifier()
        with torch.no_grad():
            head.bias.copy_(draw("popular", 1, *head.weight.shape, torch.float32)[2])
        images = torch.randn(48, 3, 160, 160, generator=torch.Generator().manual_seed(1))
        return gradients(F.cross_entropy(model(images), torch.arange(48)), head.weight)[0]

    close_not_equal(*two(loss))


def test_a_transformers_model():
    transformers = pytest.importorskip("transformers")

    def loss(**options):
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=12_000, tie_word_embeddings=False)
        model = bigclass.convert_head(transformers.GPT2LMHeadModel(config), **options).train()
        popular_layer(model.lm_head)
        with torch.no_grad():
            model.transformer.ln_f.bias[0] = 3.0
        ids = torch.randint(12_000, (2, 64), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        return gradients(model(input_ids=ids, labels=ids).loss, model.lm_head.weight)[0]

    close_not_equal(*two(loss))


def test_a_lora_head_of_peft():
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

    def loss(**options):
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=12_000, tie_word_embeddings=False)
        model = transformers.GPT2LMHeadModel(config)
        popular_layer(model.lm_head)
        with torch.no_grad():
            model.transformer.ln_f.bias[0] = 3.0
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
        model = bigclass.convert_head(model, **options).train()
        ids = torch.randint(12_000, (2, 64), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        return gradients(model(input_ids=ids, labels=ids).loss, model.base_model.model.lm_head.lora_B["default"].weight)[0]

    close_not_equal(*two(loss))


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_open_clips_losses(name):
    pytest.importorskip("open_clip")
    g = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(800, 8, generator=g) + torch.tensor([1.0, -1.0]).repeat_interleave(400)[:, None])
    images = F.normalize(texts + 0.1 * torch.randn(800, 8, generator=g)).requires_grad_()

    def loss(grad_filter=None):
        criterion = getattr(bigclass.integrations.open_clip, name)()
        criterion.grad_filter = grad_filter
        return gradients(criterion(images, texts, torch.tensor(20.0), torch.tensor(-10.0)), images)[0]

    close_not_equal(*two(loss))

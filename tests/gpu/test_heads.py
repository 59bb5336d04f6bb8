"""Heads, lazy logits and converted models on a GPU: a step of training is that of the dense layer, and nothing waits for the device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigclass
from tests.support import error

from .support import DEVICE, LIMITS, at, every_dtype, every_engine, no_sync, wide

N, C, D = at((256, 20000, 128), (32, 150, 24))


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(C, (N,), generator=g)
    y[::5] = -100
    return torch.randn(N, D, generator=g).to(DEVICE, dtype).requires_grad_(), y.to(DEVICE)


def seeded(make, dtype: torch.dtype) -> nn.Module:
    """A head on the device; in float64 with what its fp32 form was drawn as."""
    torch.manual_seed(0)
    return make().to(DEVICE, dtype)


def step(head: nn.Module, x: Tensor, loss) -> list[Tensor]:
    """The loss, the features' gradient and those of all parameters."""
    value = loss(head, x)
    value = value[0] if isinstance(value, tuple) else value
    return [value.detach(), *torch.autograd.grad(value, [x, *(p for p in head.parameters() if p.requires_grad)])]


def check(made: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for i, (got, want) in enumerate(zip(made, truth, strict=True)):
        assert error(got, want) <= LIMITS[dtype], f"output {i}: {error(got, want):.1e}"


# What an unchanged training loop does with the logits of a head
CRITERIA = {
    "cross-entropy": lambda s, y: F.cross_entropy(s, y, label_smoothing=0.1),
    "module, rows": lambda s, y: nn.CrossEntropyLoss(reduction="none")(s, y).sum(),
    "float, view": lambda s, y: F.cross_entropy(s.float().view(-1, C), y.view(-1)),
    "log-softmax, nll": lambda s, y: F.nll_loss(F.log_softmax(s, -1), y),
    "scaled, capped": lambda s, y: F.cross_entropy(20.0 * torch.tanh(s / 20.0), y),
    "bce": lambda s, y: F.binary_cross_entropy_with_logits(s, F.one_hot(y.clamp_min(0), C).to(s.dtype), reduction="sum") / N,
}


@every_engine
@every_dtype
@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
def test_lazy_logits_give_the_dense_loss_and_do_not_wait(engine, dtype, criterion):
    x, y = batch(dtype)
    head = seeded(lambda: bigclass.CCEHead(D, C, engine=engine), dtype)
    linear = nn.Linear(D, C).to(DEVICE).double()
    linear.load_state_dict(head.state_dict())
    truth = step(linear, wide(x), lambda head, x: criterion(head(x), y))

    def loss(head, x):
        s = head(x)
        assert isinstance(s, bigclass.LazyLogits)
        return criterion(s, y)

    check(step(head, x, loss), truth, dtype)
    with no_sync():
        step(head, x, loss)


HEADS = {
    "CCEHead": (lambda **o: bigclass.CCEHead(D, C, label_smoothing=0.1, softcap=20.0, **o), lambda head, x, y: head(x, y)),
    "LMHead": (
        lambda **o: bigclass.LMHead(D, C, softcap=20.0, **o).tie(nn.Embedding(C, D)),
        lambda head, x, y: head(x.view(4, -1, D), y.view(4, -1)),
    ),
    "LMHead, log-probabilities": (
        lambda **o: bigclass.LMHead(D, C, **o),
        lambda head, x, y: -head.sequence_log_prob(x.view(4, -1, D), y.view(4, -1)).mean(),
    ),
    "LMHead, several tokens": (
        lambda **o: bigclass.LMHead(D, C, **o),
        lambda head, x, y: head.multi_token_loss(x.view(4, -1, D), y.view(4, -1), shifts=(1, 2)),
    ),
    "MultiLabelHead": (
        lambda **o: bigclass.MultiLabelHead(D, C, loss="asymmetric", prior=1e-3, **o),
        lambda head, x, y: head(x, y.clamp_min(-1)[:, None]),
    ),
    "MarginHead": (lambda **o: bigclass.MarginHead(D, C, scale=16.0, **o), lambda head, x, y: head(x, y)),
    "MarginHead, sub-centres": (lambda **o: bigclass.MarginHead(D, C, subcenters=2, scale=16.0, **o), lambda head, x, y: head(x, y)),
    "MarginHead, curricular": (lambda **o: bigclass.MarginHead(D, C, kind="curricular", scale=16.0, **o), lambda head, x, y: head(x, y)),
    "MarginHead, adaface": (lambda **o: bigclass.MarginHead(D, C, kind="adaface", scale=16.0, **o), lambda head, x, y: head(x, y)),
}


@every_engine
@every_dtype
@pytest.mark.parametrize("name", HEADS)
def test_a_head_given_its_targets_is_that_of_float64_and_does_not_wait(engine, dtype, name):
    make, loss = HEADS[name]
    x, y = batch(dtype)
    exact = seeded(lambda: make(engine="dense"), dtype).double()  # of the same rounded parameters
    truth = step(exact, wide(x), lambda head, x: loss(head, x, y))
    made = step(seeded(lambda: make(engine=engine), dtype), x, lambda head, x: loss(head, x, y))
    check(made, truth, dtype)
    head = seeded(lambda: make(engine=engine), dtype)
    with no_sync():
        step(head, x, lambda head, x: loss(head, x, y))


@every_engine
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_contrastive_head_is_that_of_float64_and_does_not_wait(engine, kind):
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(N, D, generator=g))
    text = F.normalize(image + 0.1 * torch.randn(N, D, generator=g))
    both = torch.stack((image, text)).to(DEVICE).requires_grad_()
    exact = seeded(lambda: bigclass.ContrastiveHead(kind, engine="dense"), torch.float64)
    truth = step(exact, wide(both), lambda head, t: head(t[0], t[1]))
    head = seeded(lambda: bigclass.ContrastiveHead(kind, engine=engine), torch.float32)
    check(step(head, both, lambda head, t: head(t[0], t[1])), truth, torch.float32)
    with no_sync():
        step(head, both, lambda head, t: head(t[0], t[1]))


@every_engine
def test_autocast_reaches_lazy_logits(engine):
    """Pitfall 33: features arrive in fp32, and are multiplied as autocast says."""
    x, y = batch(torch.float32)
    head = seeded(lambda: bigclass.CCEHead(D, C, engine=engine), torch.float32)
    rounded = seeded(lambda: bigclass.CCEHead(D, C, engine="dense"), torch.float32)
    with torch.no_grad():
        rounded.weight.copy_(rounded.weight.bfloat16())  # pyright: ignore[reportCallIssue]
    truth = step(rounded.double(), wide(x.bfloat16(), True), lambda head, x: F.cross_entropy(head(x), y))

    def loss(head, x):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return F.cross_entropy(head(x), y)

    made = step(head, x, loss)
    assert made[1].dtype == torch.float32
    check(made, truth, torch.bfloat16)


@every_engine
def test_a_few_steps_of_training_with_gradient_scaling_learn(engine):
    """GradScaler, fp16 autocast, AdamW: as a training loop has it."""
    x, y = batch(torch.float32)
    head = seeded(lambda: bigclass.CCEHead(D, C, engine=engine), torch.float32)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(DEVICE.type)
    losses = []
    for _ in range(8):
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = F.cross_entropy(head(x.detach()), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_predictions_are_those_of_the_logits():
    x, _ = batch(torch.float32)
    head = seeded(lambda: bigclass.CCEHead(D, C), torch.float32)
    values, classes = head.predict(x.detach(), k=5)  # pyright: ignore[reportCallIssue]
    exact = x.detach().double() @ head.weight.double().T + head.bias.double()  # pyright: ignore
    want = exact.topk(5).values
    assert error(values, want) < 1e-5 and error(exact.gather(1, classes), want) < 1e-5


@every_engine
def test_a_converted_timm_model_trains_as_before(engine):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=C).to(DEVICE).train()
    images, y = torch.randn(4, 3, 64, 64).to(DEVICE), torch.randint(C, (4,)).to(DEVICE)
    results = []
    for converted in (False, True):
        if converted:
            bigclass.convert_head(model, engine=engine)
        model.zero_grad()
        loss = F.cross_entropy(model(images), y)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.get_classifier().parameters())])
    for got, want in zip(results[1], results[0], strict=True):
        assert error(got, want) < at(2e-3, 1e-4)  # cuDNN's convolutions are tf32's, and not the same bits


@every_engine
def test_a_converted_language_model_trains_as_before(engine):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=C, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    model = transformers.LlamaForCausalLM(config).to(DEVICE).train()
    ids = torch.randint(C, (2, 24)).to(DEVICE)
    results = []
    for converted in (False, True):
        if converted:
            bigclass.convert_head(model, engine=engine)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), model.lm_head.weight.grad.clone()])
    for got, want in zip(results[1], results[0], strict=True):
        assert error(got, want) < 1e-3

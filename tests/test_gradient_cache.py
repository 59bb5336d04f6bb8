"""The gradient cache: the gradients of a whole batch, chunk by chunk."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bigclass
from bigclass import ContrastiveHead, cached_step
from tests.ranks import run_ranks
from tests.support import error

N, D = 13, 6
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


class Tower(nn.Module):
    """A small encoder; counts its forwards."""

    def __init__(self, inside=8, p=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inside, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(p), nn.Linear(32, D))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layers(x)


def towers(*, dtype=torch.float64, p=0.0, loss="softmax"):
    torch.manual_seed(0)
    return Tower(8, p).to(dtype), Tower(5, p).to(dtype), ContrastiveHead(loss, engine="tiled").to(dtype)


def data(n=N, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, inside, generator=g, dtype=dtype) for inside in (8, 5))


def gradients(*modules):
    return [p.grad for module in modules for p in module.parameters()]


def whole(encoders, inputs, head):
    """What plain autograd makes of the whole batch."""
    loss = head(*[encoder(x) for encoder, x in zip(encoders, inputs, strict=True)])
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100, (5, 3)])
def test_gradients_are_those_of_the_whole_batch(loss, dtype, chunk_size):
    *plain, plain_head = towers(dtype=dtype, loss=loss)
    *chunked, head = towers(dtype=dtype, loss=loss)
    want = whole(plain, data(dtype=dtype), plain_head)
    got = cached_step(chunked, data(dtype=dtype), head, chunk_size=chunk_size)
    assert not got.requires_grad and error(got, want) <= EXACT[dtype]
    for a, b in zip(gradients(*chunked, head), gradients(*plain, plain_head), strict=True):
        assert error(a, b) <= EXACT[dtype]


def test_gradients_accumulate():
    *encoders, head = towers()
    want = [torch.zeros_like(p) for m in (*encoders, head) for p in m.parameters()]
    for seed in (1, 2):
        *plain, plain_head = towers()
        whole(plain, data(seed=seed), plain_head)
        torch._foreach_add_(want, gradients(*plain, plain_head))
        cached_step(encoders, data(seed=seed), head, chunk_size=4)
    assert all(error(a, b) <= 1e-12 for a, b in zip(gradients(*encoders, head), want, strict=True))


def test_dropout_is_replayed():
    """The reference encodes the same chunks in the same order with a graph, all of them at once."""
    *plain, plain_head = towers(p=0.4)
    *chunked, head = towers(p=0.4)
    inputs = data()
    torch.manual_seed(7)
    want = plain_head(*[torch.cat([encoder(part) for part in x.split(5)]) for encoder, x in zip(plain, inputs, strict=True)])
    want = want * torch.rand(())  # a loss may be random, too
    want.backward()
    after = torch.rand(3)
    torch.manual_seed(7)
    got = cached_step(chunked, inputs, lambda a, b: head(a, b) * torch.rand(()), chunk_size=5)
    assert torch.equal(torch.rand(3), after)  # as if nothing had been encoded twice
    assert error(got, want) <= 1e-12
    for a, b in zip(gradients(*chunked, head), gradients(*plain, plain_head), strict=True):
        assert error(a, b) <= 1e-12


def test_one_encoder_may_serve_several_inputs():
    plain, chunked = towers()[0], towers()[0]
    images, texts = data()[0], data(seed=2)[0]
    want = whole((plain, plain), (images, texts), towers()[2])
    got = cached_step((chunked, chunked), (images, texts), towers()[2], chunk_size=4)
    assert error(got, want) <= 1e-12
    assert all(error(a, b) <= 1e-12 for a, b in zip(gradients(chunked), gradients(plain), strict=True))


def test_a_frozen_encoder_gets_no_gradient_and_is_not_encoded_twice():
    (a, b, head), (plain_a, plain_b, plain_head) = towers(), towers()
    for frozen in (b, plain_b):
        frozen.requires_grad_(False)
    want = whole((plain_a, plain_b), data(), plain_head)
    got = cached_step((a, b), data(), head, chunk_size=4)
    assert error(got, want) <= 1e-12
    assert all(error(x, y) <= 1e-12 for x, y in zip(gradients(a, head), gradients(plain_a, plain_head), strict=True))
    assert gradients(b) == [None] * len(gradients(b))
    assert (a.calls, b.calls) == (8, 5)  # four chunks twice; four, and one to see that nothing comes of it


class Pair(nn.Module):
    """Both encoders in one module, as CLIP is; the scale comes with the features."""

    def __init__(self, named=False):
        super().__init__()
        self.vision, self.text, _ = towers()
        self.logit_scale, self.named = nn.Parameter(torch.tensor(2.0, dtype=torch.float64)), named

    def forward(self, image, text=None, unused=None):
        out = {"image_features": self.vision(image), "text_features": self.text(text), "logit_scale": self.logit_scale.exp()}
        return out if self.named else tuple(out.values())


@pytest.mark.parametrize("named", [False, True])
def test_an_encoder_may_take_and_give_several_tensors_one_of_them_a_scale(named):
    plain, chunked = Pair(), Pair(named)
    images, texts = data()
    want = bigclass.contrastive_loss(*plain(images, texts))
    want.backward()
    inputs = {"image": images, "text": texts, "unused": "this"} if named else (images, texts, None)
    got = cached_step(chunked, inputs, bigclass.contrastive_loss, chunk_size=4)
    assert error(got, want) <= 1e-12
    assert all(error(a, b) <= 1e-12 for a, b in zip(gradients(chunked), gradients(plain), strict=True))


def test_encoders_may_have_different_numbers_of_rows():
    (a, b, head), (plain_a, plain_b, plain_head) = towers(), towers()
    images, texts = data()[0], data(n=29)[1]
    positives = torch.arange(N) * 2
    plain_head(plain_a(images), plain_b(texts), positives=positives).backward()
    cached_step((a, b), (images, texts), functools.partial(head, positives=positives), chunk_size=4)
    assert all(error(x, y) <= 1e-12 for x, y in zip(gradients(a, b, head), gradients(plain_a, plain_b, plain_head), strict=True))


def test_a_loss_that_ignores_some_features_and_an_empty_batch():
    a, b, _ = towers()
    cached_step((a, b), data(), lambda f, g: f.square().mean(), chunk_size=4)
    assert all(g is None for g in gradients(b)) and all(g is not None for g in gradients(a))
    a.zero_grad()
    assert cached_step((a, b), data(0), lambda f, g: f.sum() + g.sum(), chunk_size=4) == 0
    assert all(not g.any() for g in gradients(a))


def test_a_leaf_that_is_an_input_gets_its_gradient():
    (a, b, head), (images, texts) = towers(), data()
    images.requires_grad_()
    whole((a, b), (images, texts), head)
    want, images.grad = images.grad, None
    cached_step((a, b), (images, texts), head, chunk_size=4)
    assert error(images.grad, want) <= 1e-12


def test_the_loss_may_be_scaled_as_a_gradient_scaler_does():
    *encoders, head = towers()
    *plain, plain_head = towers()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    got = cached_step(encoders, data(), head, chunk_size=4, scale_loss=scaler.scale)
    want = whole(plain, data(), plain_head)
    assert error(got, want) <= 1e-12
    optimizer = torch.optim.SGD([p for m in (*encoders, head) for p in m.parameters()], lr=0.1)
    assert all(error(a, b * 1024) <= 1e-12 for a, b in zip(gradients(*encoders, head), gradients(*plain, plain_head), strict=True))
    scaler.unscale_(optimizer)
    assert all(error(a, b) <= 1e-12 for a, b in zip(gradients(*encoders, head), gradients(*plain, plain_head), strict=True))


def test_autocast_holds_and_no_weight_loses_its_gradient():
    """A half-precision copy of a weight, cached without a graph, once took its gradient away."""
    *plain, plain_head = towers(dtype=torch.float32)
    *chunked, head = towers(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        want = whole(plain, data(dtype=torch.float32), plain_head)
        got = cached_step(chunked, data(dtype=torch.float32), head, chunk_size=4)
    assert error(got, want) <= 1e-3
    for a, b in zip(gradients(*chunked, head), gradients(*plain, plain_head), strict=True):
        assert error(a, b) <= 0.02


@pytest.mark.parametrize("chunk_size", [2, 3, 4])
def test_never_do_two_chunks_have_a_graph(chunk_size):
    """Counts the hidden activations that a graph keeps."""
    *encoders, head = towers()
    alive, most = weakref.WeakSet(), 0

    def keep(t):
        nonlocal most
        if t.dim() == 2 and t.shape[1] == 32 and t.shape[0] <= chunk_size:
            owner = Held(t)
            alive.add(owner)
            most = max(most, sum(held.rows for held in alive))
            return owner
        return t

    gc.disable()  # freed by their counts alone
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t.tensor if isinstance(t, Held) else t):
            cached_step(encoders, data(12), head, chunk_size=chunk_size)
    finally:
        gc.enable()
    a_chunk = 3 * chunk_size  # what norm, activation and last layer keep of it
    assert 0 < most <= a_chunk and len(alive) == 0


class Held:
    def __init__(self, tensor):
        self.tensor, self.rows = tensor, tensor.shape[0]


@pytest.mark.parametrize("how", ["module", "method", "function", "partial"])
def test_batch_norm_in_training_is_refused_by_name(how):
    tower = nn.Sequential(nn.Linear(8, D), nn.Sequential(nn.BatchNorm1d(D))).double()
    encoder = {"module": tower, "method": tower.forward, "function": lambda x: tower(x), "partial": functools.partial(tower.forward)}[how]
    with pytest.raises(ValueError, match=r"encoders\[1\]: module '1\.0' \(BatchNorm1d\) mixes the rows"):
        cached_step((towers()[0], encoder), (data()[0], data()[0]), towers()[2], chunk_size=4)
    tower.eval()
    cached_step((towers()[0], encoder), (data()[0], data()[0]), towers()[2], chunk_size=4)
    with pytest.raises(ValueError, match=r"encoders\[0\]: module '0' \(BatchNorm1d\)"):  # statistics of the batch in eval mode too
        cached_step(
            nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False)).eval(), data(dtype=torch.float32)[0], torch.sum, chunk_size=4
        )


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"encoders": 3}, TypeError, "encoders: expected a function"),
        ({"encoders": []}, TypeError, "encoders: expected a function"),
        ({"inputs": torch.zeros(2, 3)}, ValueError, "inputs: expected a sequence of 2"),
        ({"inputs": (torch.zeros(3, 8),)}, ValueError, "inputs: expected a sequence of 2"),
        ({"inputs": (torch.zeros(3, 8), 5)}, TypeError, r"inputs\[1\]: expected a tensor"),
        ({"inputs": (torch.zeros(3, 8), (torch.zeros(3, 5), torch.zeros(4)))}, ValueError, r"inputs\[1\]: .*same number of rows"),
        ({"inputs": (torch.zeros(()), torch.zeros(3, 5))}, ValueError, r"inputs\[0\]: .*same number of rows"),
        ({"inputs": (torch.zeros(3, 8, requires_grad=True) * 2, torch.zeros(3, 5))}, ValueError, r"inputs\[0\]: .*without a graph"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1"),
        ({"chunk_size": 2.0}, ValueError, "chunk_size: expected a number"),
        ({"chunk_size": (2, "3")}, TypeError, "chunk_size: expected an integer"),
        ({"chunk_size": (2,)}, ValueError, "chunk_size: expected a number"),
        ({"loss": lambda a, b: a}, TypeError, "loss: expected it to return a floating-point tensor"),
        ({"loss": lambda a, b: {"loss": a.sum()}}, TypeError, "loss: .* got dict"),
        ({"loss": lambda a, b: a.detach().sum()}, ValueError, "loss: expected a loss that depends"),
        ({"scale_loss": lambda t: None}, TypeError, "scale_loss: expected"),
        ({"encoders": (lambda x: x.sum(0), nn.Linear(5, 6))}, ValueError, r"encoders\[0\]: expected features with a row for each"),
        ({"encoders": (lambda x: (x, None), nn.Linear(5, 6))}, TypeError, r"encoders\[0\]: expected it to return a tensor"),
        ({"encoders": (lambda x: {"f": x}, lambda x: {"f": x})}, ValueError, "encoders: two return features of the same name, 'f'"),
    ],
)
def test_what_does_not_fit_is_named(change, kind, said):
    usual = {
        "encoders": (nn.Linear(8, 6), nn.Linear(5, 6)), "inputs": (torch.zeros(3, 8), torch.zeros(3, 5)),
        "loss": lambda a, b: (a * b).sum(), "chunk_size": 2,
    }  # fmt: skip
    with pytest.raises(kind, match=said):
        cached_step(**usual | change)


# --- two ranks --------------------------------------------------------------------------------------------------------------------------

SIZES = 9, 6  # of the ranks' batches; chunks of 4: three and two


def rank_step(rank, world):
    """Under data parallelism with the loss of the whole batch: (gradients, how often each replica reduced) for several arrangements."""
    rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    images, texts = (x[rows] for x in data(sum(SIZES)))
    result = {}

    a, b, head = towers()
    head.group = dist.group.WORLD
    assert copy.deepcopy(head).group is head.group  # for an average of the model's weights
    pair = [DistributedDataParallel(t) for t in (a, b)]
    counts = [count_reductions(t) for t in pair]
    loss = cached_step(pair, (images, texts), head, chunk_size=4)
    result["two"] = loss, gradients(a, b, head), counts

    shared, _, head = towers()
    head.group = dist.group.WORLD
    replica = DistributedDataParallel(shared)
    count = count_reductions(replica)
    others = data(sum(SIZES), seed=2)[0][rows]
    loss = cached_step((replica, lambda x: replica(x)), (images, others), head, chunk_size=4)
    result["shared"] = loss, gradients(shared), [count]

    model = Pair()
    replica = DistributedDataParallel(model)
    count = count_reductions(replica)
    loss_of = functools.partial(bigclass.contrastive_loss, group=dist.group.WORLD)
    loss = cached_step(replica, (images, texts), loss_of, chunk_size=4)
    result["one"] = loss, gradients(model), [count]
    return result


def count_reductions(replica):
    """A list that gets an entry for each bucket that is reduced."""
    seen = []

    def hook(state, bucket):
        seen.append(1)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0] / dist.get_world_size())

    replica.register_comm_hook(None, hook)
    return seen


def test_under_data_parallelism_gradients_are_those_of_all_batches_and_reduced_once():
    images, texts = data(sum(SIZES))
    a, b, head = towers()
    want = {"two": (whole((a, b), (images, texts), head), gradients(a, b, head))}
    shared, _, head = towers()
    want["shared"] = whole((shared, shared), (images, data(sum(SIZES), seed=2)[0]), head), gradients(shared)
    model = Pair()
    loss = bigclass.contrastive_loss(*model(images, texts))
    loss.backward()
    want["one"] = loss, gradients(model)
    for result in run_ranks(rank_step, 2):
        assert result.keys() == want.keys()
        for name, (value, grads, counts) in result.items():
            assert error(value, want[name][0]) <= 1e-12, name
            for x, y in zip(grads, want[name][1], strict=True):
                assert error(x, y) <= 1e-11, name
            assert all(len(count) == 1 for count in counts), name


class Trainer:
    """Not a module: what it runs is seen only when it runs."""

    def __init__(self, net):
        self.net = net

    def encode(self, x):
        return self.net(x)


def test_batch_norm_is_refused_wherever_it_hides_and_only_where_it_runs():
    f, g, head = towers()
    x, y = data()
    mixing = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).double()
    for encoder in (Trainer(mixing).encode, functools.partial(lambda net, x: net(x), mixing), lambda x, nets=(mixing,): nets[0](x)):
        with pytest.raises(ValueError, match=r"encoders\[0\]: module '1' \(BatchNorm1d\) mixes the rows"):
            cached_step((encoder, g), (x, y), head, chunk_size=4)
    trainer = Trainer(f)
    trainer.unused = mixing
    cached_step((trainer.encode, g), (x, y), head, chunk_size=4)
    want = [t.clone() for t in gradients(f, g, head)]
    whole((f, g), (x, y), head)  # adds as much again
    assert all(error(after / 2, before) < 1e-12 for after, before in zip(gradients(f, g, head), want, strict=True))


def test_chunks_without_a_gradient_say_nothing_of_the_others():
    f, g, head = towers()
    x, y = data()
    x[:4] = 0.0  # a first chunk that the encoder detaches

    def some(x):
        return f(x) if bool(x.any()) else f(x).detach()

    cached_step((some, g), (x, y), head, chunk_size=4)
    assert f.layers[0].weight.grad is not None and bool(f.layers[0].weight.grad.any())


def locked_step(rank, world):
    """A shared replica whose second tower is frozen (its part comes last): gradients must be reduced all the same."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.image, self.text = Tower(8).double(), Tower(5).double().requires_grad_(False)

        def forward(self, image=None, text=None):
            return self.text(text) if image is None else self.image(image)

    found = []
    for cached in (True, False):
        model = DistributedDataParallel(Both())
        x, y = data(n=5 + rank, seed=10 + rank)
        head = ContrastiveHead(group=dist.group.WORLD, engine="tiled").double()
        encoders = (lambda x, model=model: model(image=x), lambda y, model=model: model(text=y))
        if cached:
            cached_step(encoders, (x, y), head, chunk_size=2)
        else:
            head(model(image=x), model(text=y)).backward()
        found.append([p.grad.clone() for p in model.module.image.parameters()])
    return found


def test_a_frozen_tower_of_a_shared_replica_does_not_keep_the_other_from_being_reduced():
    (first, plain), (second, _) = run_ranks(locked_step, 2)
    for a, b, want in zip(first, second, plain, strict=True):
        assert torch.equal(a, b)
        assert error(a, want) < 1e-12

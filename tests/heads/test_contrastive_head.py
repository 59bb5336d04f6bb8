"""The contrastive head: its scale and bias, the range they are held in, schedules, checkpoints."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigclass
from bigclass import ContrastiveHead, cosine_temperature
from tests.support import error

N, M, D = 24, 31, 9
every_loss = pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
every_engine = pytest.mark.parametrize("engine", ["dense", "tiled"])


def features(n=N, m=N, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple((3.0 * torch.randn(rows, D, generator=g)).to(dtype).requires_grad_() for rows in (n, m))


def plain(loss, a, b, log_scale, bias=None):
    """The losses as the papers write them, over the whole matrix."""
    s = log_scale.exp() * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    if loss == "softmax":
        y = torch.arange(len(a))
        return (F.cross_entropy(s, y) + F.cross_entropy(s.T, y)) / 2
    sign = 2 * torch.eye(len(a), dtype=s.dtype) - 1
    return -F.logsigmoid(sign * (s + bias)).sum() / len(a)


@every_loss
@every_engine
def test_value_and_gradients_are_those_of_the_papers(loss, engine):
    head, (a, b) = ContrastiveHead(loss, engine=engine, dtype=torch.float64), features()
    own = [p.detach().clone().requires_grad_() for p in head.parameters()]
    want = plain(loss, a, b, *own)
    got = head(a, b)
    assert error(got, want) <= 1e-12
    inputs = (a, b, *head.parameters()), (a, b, *own)
    for x, y in zip(torch.autograd.grad(got, inputs[0]), torch.autograd.grad(want, inputs[1]), strict=True):
        assert error(x, y) <= 1e-11


@every_loss
def test_single_precision_keeps_its_digits(loss):
    head, (a, b) = ContrastiveHead(loss, engine="tiled"), features(dtype=torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (a, b, *head.parameters())]
    got, want = head(a, b), plain(loss, *wide)
    assert error(got, want) <= 1e-6
    for x, y in zip(torch.autograd.grad(got, (a, b, *head.parameters())), torch.autograd.grad(want, wide), strict=True):
        assert error(x, y) <= 2e-6


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_are_normalised_in_single_precision_and_rounded_once(loss, dtype):
    head, (a, b) = ContrastiveHead(loss), features(dtype=dtype)
    units = [F.normalize(t.detach().float(), dim=1).to(dtype) for t in (a, b)]
    loss = head(a, b)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ContrastiveHead(head.loss, normalize=False)(*units))
    loss.backward()
    assert a.grad.dtype == dtype and a.grad.isfinite().all() and head.logit_scale.grad.dtype == torch.float32


def test_options_of_the_loss_are_passed_on():
    head, (a, b) = ContrastiveHead(init_bias=0.5, direction="image", dtype=torch.float64), features(N, M)
    g = torch.Generator().manual_seed(3)
    positives, ignore = torch.randint(M, (N, 2), generator=g), torch.randint(M, (N, 1), generator=g)
    hard = torch.randn(4, D, generator=g).double()
    options = {"positives": positives, "ignore": ignore, "reduction": "none"}
    got = head(a, b, hard_negatives=hard, **options)
    units = (F.normalize(t, dim=1) for t in (a, b))
    want = bigclass.contrastive_loss(*units, 1 / 0.07, hard_negatives=F.normalize(hard, dim=1), direction="image", **options)
    assert got.shape == (N,) and error(got, want) <= 1e-12
    got.sum().backward()
    assert head.logit_bias.grad == 0.0  # a softmax does not see it


def test_the_initial_values_are_those_of_the_papers():
    clip, siglip = ContrastiveHead(), ContrastiveHead("sigmoid")
    assert clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07)) and clip.logit_bias is None
    assert siglip.logit_scale.item() == pytest.approx(math.log(10)) and siglip.logit_bias.item() == -10.0
    own = ContrastiveHead("sigmoid", init_scale=20.0, init_bias=-5.0)
    assert own.scale().item() == pytest.approx(20.0) and own.logit_bias.item() == -5.0
    fixed = ContrastiveHead(learnable=False)
    fixed(*features(dtype=torch.float32)).backward()
    assert fixed.logit_scale.grad is None


def test_parameters_have_the_names_and_shapes_of_open_clip():
    assert {k: v.shape for k, v in ContrastiveHead().state_dict().items()} == {"logit_scale": ()}
    assert {k: v.shape for k, v in ContrastiveHead("sigmoid").state_dict().items()} == {"logit_scale": (), "logit_bias": ()}


def test_open_clip_checkpoints_go_both_ways():
    open_clip = pytest.importorskip("open_clip.model")
    vision = open_clip.CLIPVisionCfg(layers=1, width=64, patch_size=8, image_size=8)
    text = open_clip.CLIPTextCfg(context_length=4, vocab_size=16, width=64, heads=1, layers=1)
    model, head = open_clip.CLIP(8, vision, text, init_logit_scale=1.5, init_logit_bias=-3.0), ContrastiveHead("sigmoid")
    kept = model.state_dict()
    head.load_state_dict({k: kept[k] for k in head.state_dict()})
    assert head.logit_scale == 1.5 and head.logit_bias == -3.0
    assert not model.load_state_dict(ContrastiveHead("sigmoid").state_dict(), strict=False).unexpected_keys
    assert model.logit_bias == -10.0


@pytest.mark.parametrize(("beyond", "bound"), [(6.0, 100.0), (-1.0, 1.0)])
def test_the_scale_stays_in_its_range_and_a_parameter_beyond_it_can_come_back(beyond, bound):
    head, (a, b) = ContrastiveHead(dtype=torch.float64), features()
    with torch.no_grad():
        head.logit_scale.fill_(beyond)
    loss = head(a, b)
    at = torch.tensor(math.log(bound), dtype=torch.float64, requires_grad=True)
    want = plain("softmax", a, b, at)
    assert head.scale().item() == pytest.approx(bound, rel=1e-12) and error(loss, want) <= 1e-12
    assert error(torch.autograd.grad(loss, head.logit_scale)[0], torch.autograd.grad(want, at)[0]) <= 1e-11
    assert head.logit_scale == beyond  # a forward leaves it alone
    assert head.clamp_() is head
    assert head.logit_scale.item() == pytest.approx(math.log(bound))


def test_without_bounds_nothing_is_held():
    head = ContrastiveHead(init_scale=0.01, min_scale=0.0, max_scale=None, dtype=torch.float64)
    assert head.scale().item() == pytest.approx(0.01)
    with torch.no_grad():
        head.logit_scale.fill_(10.0)
    assert head.clamp_().scale().item() == pytest.approx(math.exp(10.0))


def test_training_against_the_bound_stays_there():
    """Pairs that match perfectly want an infinite scale."""
    head, a = ContrastiveHead(init_scale=50.0), features(dtype=torch.float32)[0]
    optimizer = torch.optim.Adam(head.parameters(), lr=0.3)
    for _ in range(20):
        optimizer.zero_grad()
        head(a, a.detach()).backward()
        optimizer.step()
        head.clamp_()
    assert head.logit_scale.item() == pytest.approx(math.log(100.0)) and head.scale() <= 100.0 * (1 + 1e-6)


def test_a_cosine_swings_between_its_temperatures():
    of = cosine_temperature(0.1, 1.0, period=8)
    at = [float(of(torch.tensor(step))) for step in range(17)]
    assert at == pytest.approx([0.1 + 0.9 * (1 + math.cos(2 * math.pi * step / 8)) / 2 for step in range(17)])
    assert at[0] == at[8] == at[16] == 1.0 and at[4] == pytest.approx(0.1)
    late = 10**9 * 8 + 2  # float32 alone would have lost the 2
    assert float(of(torch.tensor(late))) == pytest.approx(at[2])


def test_a_schedule_sets_the_scale_counts_training_steps_and_resumes():
    def make():
        return ContrastiveHead(schedule=cosine_temperature(0.05, 0.5, period=6), dtype=torch.float64)

    def train(head, steps):
        losses = []
        for _ in range(steps):
            losses.append(head(a, b).detach())
            assert next(iter(head.parameters())).grad is None
        return losses

    (a, b), whole, first = features(), make(), make()
    want = train(whole, 9)
    for step, loss in enumerate(want):
        temperature = 0.05 + 0.45 * (1 + math.cos(2 * math.pi * step / 6)) / 2
        log_scale = torch.tensor(-math.log(temperature), dtype=torch.float64)
        assert error(loss, plain("softmax", a, b, log_scale)) <= 1e-6  # the schedule is computed in single precision
    got = train(first, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = make()
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert torch.equal(second.scale(), first.scale())
    got += train(second, 5)
    assert torch.equal(torch.stack(got), torch.stack(want))
    assert second.step == 9
    second.eval()(a, b)
    assert second.step == 9
    second.reset_parameters()
    assert second.step == 0 and second.scale().item() == pytest.approx(2.0)


def test_a_schedule_of_ones_own_may_return_a_number_and_stays_in_the_range():
    head, (a, b) = ContrastiveHead(schedule=lambda step: 0.5 / (1 + int(step)) ** 3), features()
    scales = []
    for _ in range(5):
        head(a, b)
        scales.append(head.scale().item())
    assert scales == pytest.approx([2.0, 16.0, 54.0, 100.0, 100.0])


def test_it_copies_pickles_and_says_what_it_is():
    head = ContrastiveHead("sigmoid", schedule=cosine_temperature(0.1, 1.0, 10), normalize=False, max_scale=50)
    for twin in (copy.deepcopy(head), torch.load(_saved(head), weights_only=False)):
        assert repr(twin) == repr(head)
    want = "loss='sigmoid', schedule=cosine_temperature(0.1, 1, 10), init_bias=-10, max_scale=50, normalize=False"
    assert head.extra_repr() == want
    assert ContrastiveHead(learnable=False).extra_repr() == "loss='softmax', init_scale=14.2857, learnable=False, max_scale=100"


def _saved(head: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(head, file)
    return io.BytesIO(file.getvalue())


@every_loss
@pytest.mark.parametrize("schedule", [None, cosine_temperature(0.1, 1.0, 7)])
def test_it_compiles_to_one_graph(loss, schedule):
    eager, traced = (ContrastiveHead(loss, schedule=schedule, engine="tiled") for _ in range(2))
    compiled, (a, b) = torch.compile(traced, backend="aot_eager", fullgraph=True), features(dtype=torch.float32)
    for _ in range(3):
        got, want = compiled(a, b), eager(a, b)
        assert error(got, want) <= 1e-6
        assert error(*(torch.autograd.grad(t, a)[0] for t in (got, want))) <= 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "triplet"}, "loss: expected one of"),
        ({"direction": "sideways"}, "direction: expected one of"),
        ({"loss": "sigmoid", "direction": "image"}, "direction: the sigmoid loss has none"),
        ({"exchange": "pigeon"}, "exchange: expected one of"),
        ({"engine": "steam"}, "engine: expected one of"),
        ({"init_scale": 0.5}, "init_scale: expected a scale"),
        ({"init_scale": 200.0}, "init_scale: expected a scale"),
        ({"init_scale": 0.0, "min_scale": 0.0}, "init_scale: expected a scale"),
        ({"init_scale": math.nan}, "init_scale: expected a number, got nan"),
        ({"min_scale": 3.0, "max_scale": 2.0}, "min_scale, max_scale: expected"),
        ({"schedule": cosine_temperature(0.1, 1, 5), "init_scale": 3.0}, "init_scale: the schedule sets"),
        ({"schedule": lambda step: -1.0}, "schedule: expected it to return a finite temperature > 0"),
        ({"schedule": lambda step: torch.ones(2)}, "schedule: expected it to return one temperature"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        ContrastiveHead(**options)


@pytest.mark.parametrize(
    "options", [{"init_scale": "14"}, {"init_bias": True}, {"max_scale": "100"}, {"schedule": 0.1}, {"schedule": lambda step: "warm"}]
)
def test_options_of_another_type_are_named(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        ContrastiveHead(**options)


@pytest.mark.parametrize("numbers", [(0.0, 1.0, 10), (1.0, 0.5, 10), (0.1, math.inf, 10), (0.1, 1.0, 0)])
def test_a_cosine_of_no_sense_is_refused(numbers):
    with pytest.raises(ValueError, match="expected"):
        cosine_temperature(*numbers)


def test_wrong_features_are_named():
    head, (a, b) = ContrastiveHead(), features()
    with pytest.raises(TypeError, match="image_features: expected a tensor"):
        head(a.tolist(), b)
    with pytest.raises(TypeError, match="text_features: expected a floating-point tensor"):
        head(a, b.long())
    with pytest.raises(ValueError, match="text_features: expected 24 rows"):
        head(a, b[1:])


@pytest.mark.parametrize(
    ("log_scale", "scale"), [(1e6, 100.0), (3e7, 100.0), (1e30, 100.0), (math.inf, 100.0), (-1e8, 1.0), (-math.inf, 1.0)]
)
def test_the_scale_is_in_its_range_whatever_the_parameter_says(log_scale, scale):
    head = ContrastiveHead()
    with torch.no_grad():
        head.logit_scale.fill_(log_scale)
    assert float(head.scale().detach()) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_schedule_that_returns_a_bad_tensor_is_refused_and_cannot_move_the_count(temperature):
    with pytest.raises(ValueError, match="schedule: expected it to return a finite temperature > 0"):
        ContrastiveHead(schedule=lambda step: torch.tensor(temperature))
    head = ContrastiveHead(schedule=lambda step: 1.0 / (1.0 + step.add_(1)))
    head(torch.randn(4, 3), torch.randn(4, 3))
    assert int(head.step) == 1

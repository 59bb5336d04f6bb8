"""What only a GPU can get wrong in cross-entropy, on every road: syncs, graphs, streams, devices, compiled code, asserts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bigclass
from tests.support import error

from .support import DEVICE, ON_CPU, at, captured, every_engine, every_road, needs_cuda, no_sync, ours, problem, same_bits

MIDDLE = at((512, 8192, 256), (48, 200, 24))


@every_road
def test_same_inputs_same_bits(road):
    p = problem("peaked", *at((1000, 9001, 256), (50, 201, 24)), torch.bfloat16)
    runs = [ours(*p, road, softcap=20.0) for _ in range(3)]
    for other in runs[1:]:
        assert same_bits(runs[0], other)


@every_road
@pytest.mark.parametrize("shape", at([(512, 8192, 256), (2000, 50000, 64)], [(48, 200, 24)]), ids=str)
def test_nothing_waits_for_the_device(road, shape):
    """The second is planned in several chunks and slabs."""
    p = problem("flat", *shape, torch.bfloat16)
    with bigclass.planning(workspace=64 << 20):
        ours(*p, road)  # compiles
        with no_sync():
            ours(*p, road)


@needs_cuda
@every_road
def test_a_cuda_graph_replays_forward_and_backward_with_other_features_and_targets(road):
    x, w, b, y = problem("flat", *MIDDLE, torch.bfloat16)
    graph, made = captured(lambda: ours(x, w, b, y, road))
    for seed in range(2):
        other = problem("peaked", *MIDDLE, torch.bfloat16, seed + 1)
        with torch.no_grad():
            for t, new in zip((x, w, b, y), other, strict=True):
                t.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(made, ours(x, w, b, y, road))


@every_road
@pytest.mark.skipif(ON_CPU, reason="inductor's code for a CPU needs a compiler")
def test_compiles_to_one_graph(road):
    x, w, b, y = problem("flat", 300, 5000, 128, torch.bfloat16)
    torch.compiler.reset()

    def loss(x, w, b):
        return bigclass.linear_cross_entropy(x * 1.0, w, y, linear_bias=b, engine=road[0])

    with bigclass.planning(gradients=road[1]):
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, w, b), (x, w, b))
    for a, t in zip(got, ours(x, w, b, y, road)[1:], strict=True):
        assert error(a, t) < 1e-5


@needs_cuda
@every_road
def test_a_gpu_that_is_not_the_current_one(road):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    here = problem("flat", 300, 2000, 64, torch.bfloat16)
    there = [t.detach().to("cuda:1") for t in here]
    assert torch.cuda.current_device() == 0
    for got, want in zip(ours(*(t.requires_grad_() for t in there[:3]), there[3], road), ours(*here, road), strict=True):
        assert torch.equal(got.cpu(), want.cpu())


@needs_cuda
@every_road
def test_another_stream(road):
    p = problem("flat", 300, 5000, 128, torch.bfloat16)
    want = ours(*p, road)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = ours(*p, road)
    torch.cuda.synchronize()
    assert same_bits(got, want)


@needs_cuda
@every_road
def test_two_streams_at_once_do_not_share_their_work_buffers(road):
    problems = [problem("flat", 2000, 20000, 256, torch.bfloat16, seed) for seed in range(2)]
    want = [ours(*p, road) for p in problems]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in problems], [[], []]
    for _ in range(5):
        for i, (stream, p) in enumerate(zip(streams, problems, strict=True)):
            with torch.cuda.stream(stream):
                got[i].append(ours(*p, road))
    torch.cuda.synchronize()
    for made, true in zip(got, want, strict=True):
        assert all(same_bits(m, true) for m in made)


@every_road
def test_gradients_accumulate_over_steps_scaled_losses_and_two_backward_passes(road):
    """Pitfalls 20, 21 and 49."""
    x, w, b, y = problem("peaked", *MIDDLE, torch.bfloat16)
    once = ours(x, w, b, y, road)[1:]
    with bigclass.planning(gradients=road[1]):
        for factor in (0.5, 0.25):
            loss = bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine=road[0])
            assert isinstance(loss, torch.Tensor)
            (factor * loss).backward(retain_graph=True)
            (factor * loss).backward()
    for t, g in zip((x, w, b), once, strict=True):
        assert t.grad is not None and error(t.grad, 1.5 * g.double()) < 1e-2


@needs_cuda
@every_engine
@pytest.mark.parametrize("classes", ["50000", "-1"])
@pytest.mark.parametrize("loss", ["linear_cross_entropy", "linear_log_prob", "linear_margin_loss"])
def test_a_class_out_of_range_is_an_assertion_on_the_device(engine, loss, classes):
    code = (
        "import torch, bigclass\n"
        "x, w = torch.randn(64, 32, device='cuda'), torch.randn(50000, 32, device='cuda')\n"
        f"y = torch.full((64,), {classes}, device='cuda')\n"
        f"out = bigclass.{loss}(x, w, y, engine={engine!r})\n"
        "try:\n    torch.cuda.synchronize()\n"
        "except Exception as e:\n    print(e); raise SystemExit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 7 and "assert" in (done.stdout + done.stderr).lower(), done.stdout + done.stderr


@every_engine
def test_a_class_in_range_or_ignored_is_none(engine):
    """What the assertion must not take for wrong: the first, the last, the ignored, int32."""
    x, w, _, _ = problem("flat", *MIDDLE, torch.bfloat16)
    y = torch.arange(len(x), device=DEVICE) % 3
    y = torch.where(y == 0, -100, torch.where(y == 1, 0, len(w) - 1))
    one = bigclass.linear_cross_entropy(x, w, y, engine=engine)
    other = bigclass.linear_cross_entropy(x, w, y.int(), engine=engine)
    assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other) and one.isfinite()

"""The contract on a real GPU: every engine, plan and dtype, and what only a GPU can get wrong (syncs, graphs, streams, 32-bit offsets)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass
from bigclass.core import LogSumExp, ShiftedMoment, Softcap, Stream, Total, entropy, log_sum_exp, reduce_logits
from bigclass.losses.margin import linear_margin_loss
from tests.losses.margin_support import dense_margin_loss
from tests.support import KINDS, draw, error, exact_nll

ROADS = (("tiled", "forward"), ("tiled", "recompute"), ("fused", "forward"), ("fused", "recompute"))
every_road = pytest.mark.parametrize("road", ROADS, ids="-".join)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(kind, n, c, d, dtype, seed=0):
    x, w, b, y = draw(kind, n, c, d, dtype, seed)
    return *(t.detach().cuda().requires_grad_() for t in (x, w, b)), y.cuda()


def ours(x, w, b, y, road, **options):
    with bigclass.planning(gradients=road[1]):
        loss = bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine=road[0], **options)
    leaves = [t for t in (x, w, b) if t is not None and t.requires_grad]
    return [loss, *torch.autograd.grad(loss.sum(), leaves)]


def exact(x, w, b, y):
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    loss = exact_nll(F.linear(*leaves), y).mean()
    return [loss, *torch.autograd.grad(loss, leaves)]


def dense(x, w, b, y):
    loss = F.cross_entropy(F.linear(x, w, b), y)
    return [loss, *torch.autograd.grad(loss, (x, w, b))]


@every_road
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1000, 5003, 320), (257, 30000, 70), (512, 4096, 768)], ids=str)
def test_no_output_and_no_gradient_is_less_exact_than_dense(road, dtype, kind, shape):
    """Aligned and ragged: the last takes descriptors throughout, the second none (a row of 70 half floats is not 16 bytes wide)."""
    pools = [[[], [], []] for _ in range(4)]
    for seed in range(3):
        p = problem(kind, *shape, dtype, seed)
        for pool, *zs in zip(pools, ours(*p, road), dense(*p), exact(*p), strict=True):
            for column, z in zip(pool, zs, strict=True):
                column.append(z.detach().double().flatten())
    for name, pool in zip(("loss", "dx", "dw", "db"), pools, strict=True):
        mine, other, truth = (torch.cat(part) for part in pool)
        assert error(mine, truth) <= 1.1 * error(other, truth) + 4 * 2.0**-24, (
            f"{name}: {error(mine, truth):.2e}, dense {error(other, truth):.2e}"
        )
        if kind == "onehot" and dtype != torch.float16:
            assert error(mine, truth) <= (1e-4 if dtype == torch.float32 else 4e-3), name


@every_road
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"softcap": 20.0}, {"label_smoothing": 0.1}, {"softcap": 20.0, "label_smoothing": 0.1, "z_loss": 1e-3}, {"reduction": "none"}],
    ids=str,
)
def test_options_agree_with_the_dense_engine(road, dtype, options):
    x, w, b, y = problem("peaked", 300, 3001, 128, dtype)
    y[::5] = -100
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    want = ours(*wide, y, ("dense", "auto"), **options)
    for got, truth in zip(ours(x, w, b, y, road, **options), want, strict=True):
        assert error(got, truth) < (1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("engine", ["tiled", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folds_columns_picks_and_pairs(engine, dtype):
    torch.manual_seed(0)
    n, c = 333, 2050
    made = [(torch.randn(n, d) * d**-0.5, torch.randn(c, d)) for d in (96, 8)]
    pairs = tuple((x.to("cuda", dtype).requires_grad_(), w.to("cuda", dtype).requires_grad_()) for x, w in made)
    scale, bias = torch.rand(c, device="cuda") + 0.5, torch.randn(c, device="cuda")
    picks = torch.randint(-1, c, (n, 40), device="cuda")
    folds = (LogSumExp(exclude_picks=True), ShiftedMoment(), Total(), LogSumExp(axis="columns"))

    def run(pairs, scale, bias, engine):
        stream = Stream(pairs, bias=bias, class_scale=scale, scale=0.7, maps=(Softcap.at(5.0),))
        states, picked = reduce_logits(stream, picks, folds, engine=engine)
        outputs = [log_sum_exp(states[0]), entropy(states[1]), states[2][0] / c, log_sum_exp(states[3]), picked]
        total = sum((t * torch.linspace(-1, 1, t.numel(), device="cuda", dtype=t.dtype).view_as(t)).sum() for t in outputs)
        return [*outputs, *torch.autograd.grad(total, [t for pair in pairs for t in pair])]

    want = run(
        tuple((x.detach().double().requires_grad_(), w.detach().double().requires_grad_()) for x, w in pairs),
        scale.double(),
        bias.double(),
        "dense",
    )
    for got, truth in zip(run(pairs, scale, bias, engine), want, strict=True):
        assert error(got, truth) < (2e-5 if dtype == torch.float32 else 1e-2)


@every_road
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [3, 8, 64])
def test_adapters_of_a_frozen_weight(road, dtype, rank):
    """Against the merged weight in float64; 3 half floats are no descriptor's row. Without a C x D gradient: none is asked for."""
    x, w, b, y = problem("peaked", 400, 5003, 320, dtype)
    w, lora = w.detach(), (torch.randn(rank, 320), torch.randn(5003, rank) * 0.1)
    u, v = (t.to("cuda", dtype).requires_grad_() for t in lora)
    merged = exact_nll(F.linear(x.double(), w.double() + 0.5 * v.double() @ u.double(), b.double()), y).mean()
    loss, *grads = ours(x, w, b, y, road, lora=(u, v, 0.5))
    grads = [*grads, *torch.autograd.grad(bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine=road[0], lora=(u, v, 0.5)), (u, v))]
    truth = torch.autograd.grad(merged, (x, b, u, v))
    limit = 1e-5 if dtype == torch.float32 else 8e-3
    assert error(loss, merged) < limit
    for got, want in zip(grads, truth, strict=True):
        assert got.any() and error(got, want) < limit


@every_road
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"subcenters": 4}, {"curriculum": torch.tensor(0.3)}, {"kind": "cosface"}], ids=str)
def test_margin_losses_are_their_formula(road, dtype, options):
    centres, t = options.get("subcenters", 1), options.get("curriculum")
    x, w, _, y = problem("flat", 500, 3000 * centres, 256, dtype)
    y = y // centres
    margins, beyond_pi = ((1.0, 0.0, 0.4), "plain") if "kind" in options else ((1.0, 0.5, 0.0), "linear")
    if t is not None:
        options = {**options, "curriculum": t.cuda()}
    target = torch.where(torch.arange(500, device="cuda") % 5 > 0, y, -100)
    kept = target >= 0

    def plain(x, w):
        rows = dense_margin_loss(x, w, y, margins, scale=16.0, centres=centres, beyond_pi=beyond_pi, t=None if t is None else float(t))
        return [rows[kept].mean(), *torch.autograd.grad(rows[kept].mean(), (x, w))]

    with bigclass.planning(gradients=road[1]):
        loss = linear_margin_loss(x, w, target, logit_scale=16.0, engine=road[0], **options)
    truth = plain(*[v.detach().double().requires_grad_() for v in (x, w)])
    for z, other, exact_ in zip([loss, *torch.autograd.grad(loss, (x, w))], plain(x, w), truth, strict=True):
        assert error(z, exact_) <= 1.1 * error(other, exact_) + 2e-6


@every_road
def test_same_inputs_same_bits(road):
    p = problem("peaked", 1000, 9001, 256, torch.bfloat16)
    runs = [ours(*p, road, softcap=20.0) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@every_road
def test_ignored_rows_that_hold_nan_contribute_exactly_nothing(road):
    x, w, b, y = problem("peaked", 300, 2000, 64, torch.bfloat16)
    y[::7] = -100
    clean = ours(x, w, b, y, road)
    with torch.no_grad():
        x[::7] = float("nan")
    for got, want in zip(ours(x, w, b, y, road), clean, strict=True):
        assert torch.equal(got, want)


@every_road
def test_nothing_waits_for_the_device(road):
    p = problem("flat", 512, 8192, 256, torch.bfloat16)
    ours(*p, road)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(*p, road)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_road
def test_a_cuda_graph_replays_forward_and_backward(road):
    x, w, b, y = problem("flat", 512, 8192, 256, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ours(x, w, b, y, road)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(x, w, b, y, road)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, ours(x, w, b, y, road), strict=True):
        assert torch.equal(got, want)


@every_road
def test_compiles_to_one_graph(road):
    x, w, b, y = problem("flat", 300, 5000, 128, torch.bfloat16)

    def loss(x, w, b):
        return bigclass.linear_cross_entropy(x, w, y, linear_bias=b, engine=road[0])

    with bigclass.planning(gradients=road[1]):
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, w, b), (x, w, b))
    for a, t in zip(got, ours(x, w, b, y, road)[1:], strict=True):
        assert error(a, t) < 1e-5


@every_road
def test_autocast_multiplies_in_half_precision(road):
    x, w, b, y = problem("peaked", 300, 5000, 128, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = ours(x, w, b, y, road)
    half = [t.detach().bfloat16() for t in (x, w)]
    for a, t in zip(got, exact(*half, b, y), strict=True):
        assert a.dtype == torch.float32 and error(a, t) < 8e-3


@every_road
def test_a_gpu_that_is_not_the_current_one(road):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    here = problem("flat", 300, 2000, 64, torch.bfloat16)
    there = [t.detach().to("cuda:1") for t in here]
    assert torch.cuda.current_device() == 0
    for got, want in zip(ours(*(t.requires_grad_() for t in there[:3]), there[3], road), ours(*here, road), strict=True):
        assert torch.equal(got.cpu(), want.cpu())


@every_road
def test_another_stream(road):
    p = problem("flat", 300, 5000, 128, torch.bfloat16)
    want = ours(*p, road)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = ours(*p, road)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("engine", ["tiled", "fused"])
@pytest.mark.parametrize(("n", "c", "d"), [(40000, 60000, 64), (64, 5_000_000, 512)], ids=["N x C", "C x D"])
def test_more_than_two_to_the_31_elements(engine, n, c, d):
    """Pitfall 11: the last class is the right one, and its gradient arrives."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    x, w = torch.zeros(n, d, device="cuda", dtype=torch.bfloat16), torch.zeros(c, d, device="cuda", dtype=torch.bfloat16)
    x[:, 0], w[-1, 0] = 1.0, 8.0
    x.requires_grad_(), w.requires_grad_()
    y = torch.full((n,), c - 1, device="cuda")
    loss = bigclass.linear_cross_entropy(x, w, y, engine=engine, reduction="none")
    rest = torch.tensor(float(c - 1), dtype=torch.float64)
    assert torch.allclose(loss.double().cpu(), torch.log1p(rest * torch.exp(torch.tensor(-8.0, dtype=torch.float64))).expand(n), rtol=1e-5)
    loss.mean().backward()
    assert x.grad is not None and w.grad is not None
    p = float(torch.exp(torch.tensor(8.0).double()) / (torch.exp(torch.tensor(8.0).double()) + rest))
    assert abs(float(w.grad[-1, 0]) + (1 - p)) < 1e-2 and float(w.grad[0, 0]) > 0


def test_memory_stays_within_the_workspace():
    n, c, d = 4096, 128256, 2048
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(c, d, device="cuda", dtype=torch.bfloat16) * d**-0.5).requires_grad_()
    y = torch.randint(c, (n,), device="cuda")
    # "forward" makes them in fp32, and casts them when its workspace is free again
    for gradients, made in (("recompute", x.nbytes + w.nbytes), ("forward", 4 * (x.numel() + w.numel()))):
        with bigclass.planning(gradients=gradients):
            limit = bigclass.explain(n, c, d, dtype=torch.bfloat16, device="cuda").workspace + made + (16 << 20)
        for _ in range(2):
            x.grad = w.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with bigclass.planning(gradients=gradients):
                bigclass.linear_cross_entropy(x, w, y, engine="fused").backward()
            extra = torch.cuda.max_memory_allocated() - before
        assert extra <= limit, f"{gradients}: {extra / 2**20:.0f} MiB, at most {limit / 2**20:.0f}"
    limit = bigclass.explain(n, c, d, dtype=torch.bfloat16, device="cuda", requires_grad=False).workspace + (4 << 20)
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bigclass.linear_cross_entropy(x, w, y, engine="fused")
        assert torch.cuda.max_memory_allocated() - before <= limit


@pytest.mark.parametrize("engine", ["tiled", "fused"])
def test_a_class_out_of_range_is_an_assertion_on_the_device(engine):
    import subprocess
    import sys

    code = (
        "import torch, bigclass\n"
        "x, w = torch.randn(64, 32, device='cuda'), torch.randn(50000, 32, device='cuda')\n"
        "y = torch.full((64,), 50000, device='cuda')\n"
        f"bigclass.linear_cross_entropy(x, w, y, engine={engine!r}); torch.cuda.synchronize()"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


def pairs(dtype: torch.dtype, n: int = 700, d: int = 96) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(n, d, generator=g)
    text = torch.randn(n, d, generator=g) + image
    leaves = [torch.nn.functional.normalize(t).to("cuda", dtype).requires_grad_() for t in (image, text)]
    return [*leaves, torch.tensor(14.3, device="cuda", requires_grad=True), torch.tensor(-6.0, device="cuda", requires_grad=True)]


def contrastive(leaves: list[Tensor], sigmoid: bool, engine: str, **options) -> list[Tensor]:
    image, text, scale, bias = leaves
    loss = bigclass.sigmoid_contrastive_loss if sigmoid else bigclass.contrastive_loss
    value = loss(image, text, scale, logit_bias=bias, engine=engine, **options)
    return [value, *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("engine", ["tiled", "fused"])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contrastive_losses_are_those_of_float64(engine, sigmoid, dtype):
    leaves = pairs(dtype)
    exact = contrastive([t.detach().double().requires_grad_() for t in leaves], sigmoid, "dense")
    limit = 2e-5 if dtype == torch.float32 else 1e-2
    for made, truth in zip(contrastive(leaves, sigmoid, engine), exact, strict=True):
        if float(truth.norm()) > 0:  # a softmax sees no bias
            assert error(made.cpu(), truth.cpu()) < limit
    several = torch.randint(-1, 700, (700, 3), device="cuda")
    if not sigmoid:  # sums by segments: the same bits every run
        runs = [contrastive(leaves, sigmoid, engine, positives=several) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("engine", ["tiled", "fused"])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_contrastive_losses_do_not_wait_for_the_device(engine, sigmoid):
    leaves = pairs(torch.bfloat16)
    contrastive(leaves, sigmoid, engine)
    torch.cuda.set_sync_debug_mode("error")
    try:
        contrastive(leaves, sigmoid, engine)
        contrastive(leaves, sigmoid, engine, positives=torch.zeros(700, 2, dtype=torch.long, device="cuda").cumsum(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def policy(x: Tensor, w: Tensor, index: Tensor, engine: str, **options) -> list[Tensor]:
    """log p of (..., T, K) ids, the entropy and log p of sequences, and their gradients."""
    logp, h = bigclass.linear_log_prob(x, w, index, shift=1, temperature=0.8, return_entropy=True, engine=engine, **options)
    whole = bigclass.linear_sequence_log_prob(x, w, index[..., 0], average=True, engine=engine, **options)
    total = (logp * torch.linspace(-1, 1, logp.shape[-1], device="cuda", dtype=logp.dtype)).mean() + h.mean() - whole.mean()
    return [logp, h, whole, *torch.autograd.grad(total, (x, w))]


def policy_problem(dtype: torch.dtype, kind: str = "peaked") -> tuple[Tensor, Tensor, Tensor]:
    x, w, _, y = problem(kind, 512, 5003, 96, dtype)
    index = torch.stack((y, y.roll(1), y), -1).view(8, 64, 3)
    index[:, 5:9] = -100
    return x.detach().view(8, 64, 96).requires_grad_(), w, index


@pytest.mark.parametrize("engine", ["tiled", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_and_entropies_are_those_of_float64(engine, dtype):
    x, w, index = policy_problem(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    with torch.no_grad():
        x[:, 4:8] = float("nan")  # scored at ignored ids
    for got, truth in zip(policy(x, w, index, engine), policy(*wide, index, "dense"), strict=True):
        assert error(got, truth) < (2e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("engine", ["tiled", "fused"])
def test_log_probabilities_do_not_wait_for_the_device_and_are_the_same_bits(engine):
    x, w, index = policy_problem(torch.bfloat16)
    want = policy(x, w, index, engine)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = policy(x, w, index, engine)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def multi_token(x: Tensor, w: Tensor, target: Tensor, road: tuple[str, str], **options) -> list[Tensor]:
    """Three feature sets and one, under one weight, and their gradients."""
    with bigclass.planning(gradients=road[1]):
        loss, losses = bigclass.linear_multi_token_cross_entropy(x, w, target, engine=road[0], return_losses=True, **options)
        one = bigclass.linear_multi_token_cross_entropy(x[0], w, target, engine=road[0], **options)
        own = bigclass.linear_multi_token_cross_entropy(x, [w, w, w], target, engine=road[0], **options)
    return [loss, losses, one, own, *torch.autograd.grad(loss + 0.5 * one + 0.25 * own, (x, w))]


@every_road
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multi_token_losses_are_those_of_float64_and_do_not_wait_for_the_device(road, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 64, 96, device="cuda").to(dtype).requires_grad_()
    w = (0.2 * torch.randn(5003, 96, device="cuda")).to(dtype).requires_grad_()
    target = torch.randint(5003, (4, 64), device="cuda")
    target[:, 7] = -100
    options = {"loss_weights": (1.0, 0.5, 0.25), "label_smoothing": 0.1, "z_loss": 1e-3}
    truth = multi_token(*(t.detach().double().requires_grad_() for t in (x, w)), target, ("dense", "auto"), **options)
    first = multi_token(x, w, target, road, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = multi_token(x, w, target, road, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, same, want in zip(first, again, truth, strict=True):
        assert torch.equal(got, same) and error(got, want) < (1e-5 if dtype == torch.float32 else 8e-3)


def distilled(leaves, engine: str, gradients: str, **options) -> list[Tensor]:
    x, w, u, v = leaves
    with bigclass.planning(gradients=gradients):
        loss = bigclass.linear_kl_div(x, w, u, v, engine=engine, **options)
    return [loss, *torch.autograd.grad(loss.sum(), (x, w))]


def taught(dtype: torch.dtype, n: int = 700, c: int = 5003) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(*s, generator=g) / s[1] ** 0.5 for s in ((n, 96), (c, 96), (n, 160), (c, 160))]
    return [(3.0 * t).to("cuda", dtype).requires_grad_(i < 2) for i, t in enumerate(made)]


DIVERGED = [{"divergence": "forward"}, {"divergence": "reverse", "softcap": 5.0}, {"divergence": "jensen_shannon", "beta": 0.3}]


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", DIVERGED, ids=str)
def test_distillation_is_that_of_float64_and_the_same_bits_every_run(gradients, dtype, options):
    leaves, mask = taught(dtype), torch.arange(700, device="cuda") % 5 > 0
    options = options | {"temperature": 2.0, "mask": mask}
    clean = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    truth = distilled(clean, "dense", "auto", **options)
    with torch.no_grad():
        leaves[0][0], leaves[2][5] = torch.nan, torch.nan  # rows that do not count
    runs = [distilled(leaves, "auto", gradients, **options) for _ in range(2)]
    for made, other, t in zip(*runs, truth, strict=True):
        assert torch.equal(made, other) and error(made, t) < (2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_distillation_does_not_wait_for_the_device_and_compiles_to_one_graph(reduction):
    leaves, mask = taught(torch.bfloat16), torch.arange(700, device="cuda") % 5 > 0
    index = torch.zeros(700, 8, dtype=torch.long, device="cuda").add_(torch.arange(8, device="cuda"))
    log_p = torch.full((700, 8), -3.0, device="cuda")

    def run():
        made = distilled(leaves, "tiled", "auto", divergence="jensen_shannon", reduction=reduction, mask=mask)
        bigclass.linear_topk_kl_div(*leaves[:2], index, log_p, reduction=reduction, mask=mask).sum().backward()
        return made

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compiled = torch.compile(lambda x, w: bigclass.linear_kl_div(
        x, w, *leaves[2:], divergence="jensen_shannon", reduction=reduction, mask=mask, engine="tiled").sum(), fullgraph=True)  # fmt: skip
    for made, t in zip(torch.autograd.grad(compiled(*leaves[:2]), leaves[:2]), plain[1:], strict=True):
        assert error(made, t) < 1e-2


def test_distillation_over_two_streams_has_no_fused_engine():
    with pytest.raises(ValueError, match="two streams"):
        distilled(taught(torch.bfloat16), "fused", "auto")

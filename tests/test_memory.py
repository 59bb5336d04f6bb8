"""Peak memory above inputs and returned gradients, measured in processes of their own."""

from __future__ import annotations

import pytest
import torch

import bigclass
from bigclass.demo.memory import peak_extra_bytes, resident_peak

MIB = 1 << 20

pytestmark = pytest.mark.skipif(resident_peak() is None, reason="this system does not tell a process's peak memory")


def loss_and_gradients(n: int, c: int, d: int, dtype: torch.dtype, gradients: str, options: dict):
    """The call to be measured, warmed up on a small problem of its own kind (the first use of a custom op imports much)."""

    def make(n: int, c: int, d: int):
        x = torch.randn(n, d, dtype=dtype, requires_grad=True)
        w = (torch.randn(c, d) * 0.1).to(dtype).requires_grad_()
        return x, w, torch.randint(0, c, (n,))

    def run(x, w, y):
        with bigclass.planning(gradients=gradients):
            bigclass.linear_cross_entropy(x, w, y, engine="tiled", **options).backward()
        return x.grad, w.grad

    for _ in range(2):
        run(*make(64, 3000, d))
    problem = make(n, c, d)
    return lambda: run(*problem)


def topk(n: int, c: int, d: int, k: int):
    x, w = torch.randn(n, d), torch.randn(c, d)
    bigclass.linear_topk(x[:8], w[:70000], k, engine="tiled")
    return lambda: bigclass.linear_topk(x, w, k)


def peak(*args) -> float:
    measured = peak_extra_bytes(*args)
    assert measured is not None
    return measured / MIB


def test_the_default_workspace_holds_at_4096_by_256000():
    """Dense needs over 8 GB here, and a copy of the weight 125 MiB."""
    assert peak(loss_and_gradients, 4096, 256000, 128, torch.float32, "auto", {}) <= 96


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@pytest.mark.parametrize(("n", "c"), [(512, 20000), (4096, 20000), (512, 160000)])
def test_memory_does_not_grow_with_rows_or_classes(gradients, n, c):
    assert peak(loss_and_gradients, n, c, 32, torch.float32, gradients, {}) <= 96


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1}, {"softcap": 5.0, "z_loss": 1e-4}, {"reduction": "sum", "return_stats": False}]
)
def test_options_stay_within_the_workspace(options):
    assert peak(loss_and_gradients, 2048, 60000, 32, torch.float32, "auto", options) <= 96


def test_half_types_add_one_fp32_dw_in_the_forward_plan_and_nothing_in_the_recompute_plan():
    c, d = 60000, 256
    wide = c * d * 4 / MIB
    assert peak(loss_and_gradients, 1024, c, d, torch.bfloat16, "recompute", {}) <= 96
    assert wide * 0.5 <= peak(loss_and_gradients, 1024, c, d, torch.bfloat16, "forward", {}) <= 96 + wide


def filtered(n: int, c: int, d: int, gradients: str, workspace: int | None, scaled: bool = False):
    """A filtered loss of which most columns are dropped, and its gradients, warmed up. scaled: its scale learns, too."""
    scale = torch.ones((), requires_grad=True) if scaled else None

    def make(n: int, c: int):
        bias = -2.0 * torch.arange(1.0, c + 1.0).log()
        return torch.randn(n, d, requires_grad=True), torch.randn(c, d, requires_grad=True), torch.randint(c, (n,)), bias

    def run(x, w, y, bias):
        with bigclass.planning(gradients=gradients, workspace=workspace):
            bigclass.linear_cross_entropy(x, w, y, linear_bias=bias, logit_scale=scale, grad_filter=2.0**-6, engine="tiled").backward()
        return x.grad, w.grad

    for _ in range(2):
        run(*make(64, 3000))
    problem = make(n, c)
    return lambda: run(*problem)


@pytest.mark.parametrize(
    ("gradients", "workspace", "most"), [("auto", None, 256 + 16), ("auto", 64 << 20, 64 + 16), ("recompute", 16 << 20, 16 + 16)]
)
def test_the_filter_keeps_to_its_workspace(gradients, workspace, most):
    """Beside what the products' threads take. Dense logits alone take 1.2 GB."""
    assert peak(filtered, 2048, 150_000, 32, gradients, workspace) <= most


def test_the_filter_keeps_to_its_workspace_where_a_scale_learns():
    assert peak(filtered, 2048, 64_000, 64, "recompute", 64 << 20, True) <= 28 + 8  # of which explain tells 28


def one_vs_all(n: int, c: int, d: int, loss: str, dense: bool):
    """A loss over sparse (or dense) positives and its gradients, warmed up on a small problem."""

    def make(n: int, c: int):
        x, w = torch.randn(n, d, requires_grad=True), (torch.randn(c, d) * 0.1).requires_grad_()
        positives = torch.randint(0, c, (n, 20))
        return x, w, torch.zeros(n, c).scatter_(1, positives, 1.0) if dense else positives

    def run(x, w, positives):
        bigclass.linear_elementwise_loss(x, w, positives, loss=loss, engine="tiled").backward()
        return x.grad, w.grad

    for _ in range(2):
        run(*make(64, 3000))
    problem = make(n, c)
    return lambda: run(*problem)


@pytest.mark.parametrize(("loss", "dense"), [("asymmetric", False), ("asymmetric", True), ("bce", False)])
def test_one_vs_all_losses_hold_no_matrix_of_logits_or_targets(loss, dense):
    """timm's asymmetric loss takes about 2.5 GB here: N=256, C=131072, D=256."""
    assert peak(one_vs_all, 256, 131072, 256, loss, dense) <= 96


def a_step_of_updates(n: int, c: int, d: int, optimizer: str, dtype: torch.dtype):
    """One training step whose weight is updated slab by slab; the weight and the optimizer's state are there before."""
    make = {"sgd": lambda p: bigclass.optim.SlabSGD(p, lr=0.1, momentum=0.9), "row adam": lambda p: bigclass.optim.SlabRowAdam(p, lr=0.1)}

    def step(head, optimizer, n, c):
        x, positives = torch.randn(n, d, dtype=dtype, requires_grad=True), torch.randint(0, c, (n, 20))
        head(x, positives, update=optimizer, return_topk=5)[0].backward()
        head.bias.grad = None
        return ()

    for c_, n_ in ((3000, 64), (c, 4)):  # the second leaves the state of the optimizer there
        head = bigclass.MultiLabelHead(d, c_, prior=1e-4, dtype=dtype)
        slabs = make[optimizer]([head.weight])
        step(head, slabs, n_, c_)
    return lambda: step(head, slabs, n, c)


@pytest.mark.parametrize(("optimizer", "dtype"), [("sgd", torch.float32), ("row adam", torch.bfloat16)])
def test_updates_in_the_backward_need_no_gradient_of_a_million_classes(optimizer, dtype):
    """Loss, gradients and the five best classes; the gradient alone would be 488 MiB."""
    assert peak(a_step_of_updates, 64, 1_000_000, 128, optimizer, dtype) <= 128


def no_gradients(n: int, c: int, d: int, dtype: torch.dtype):
    def run(n: int, c: int):
        x, w, y = torch.randn(n, d).to(dtype), torch.randn(c, d).to(dtype), torch.randint(0, c, (n,))
        return lambda: (bigclass.linear_cross_entropy(x, w, y, engine="tiled"), *bigclass.linear_topk(x, w, 3, engine="tiled"))

    run(64, 3000)()
    return run(n, c)


@pytest.mark.parametrize(("n", "c", "d"), [(4, 100000, 256), (140, 60000, 1024)])
def test_no_half_precision_weight_is_widened_whole(n, c, d):
    """Few rows would make a slab of many classes; its fp32 copy counts."""
    assert peak(no_gradients, n, c, d, torch.bfloat16) <= 64


def test_prediction_over_three_million_classes_needs_under_64_mib():
    assert peak(topk, 256, 3_000_000, 64, 5) <= 64


def lazy_step(n: int, c: int, d: int, case: str):
    """One step of an unchanged loop: features -> head -> criterion -> backward."""

    def make(n: int, c: int):
        head, x, y = bigclass.CCEHead(d, c, engine="tiled"), torch.randn(n, d, requires_grad=True), torch.randint(0, c, (n,))
        if case == "mixup":
            lam = torch.rand(n, 1)
            return head, x, bigclass.SparseTarget(torch.stack((y, y.flip(0)), 1), torch.cat((lam, 1 - lam), 1), c, 1e-6)
        return head, x, y

    def run(head, x, y):
        logits = head(x)
        if case == "soft cap":
            logits = torch.tanh(logits.float() / 30.0) * 30.0
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1 if case == "smoothed" else 0.0)
        if case == "log-softmax":  # as timm writes label smoothing
            logp = torch.nn.functional.log_softmax(logits, dim=-1)
            loss = (-0.9 * logp.gather(dim=-1, index=y.unsqueeze(1)).squeeze(1) - 0.1 * logp.mean(dim=-1)).mean()
        else:
            loss = criterion(logits, y)
        loss.backward()
        return x.grad, head.weight.grad, head.bias.grad

    for _ in range(2):
        run(*make(64, 3000))
    problem = make(n, c)
    return lambda: run(*problem)


@pytest.mark.parametrize("case", ["plain", "smoothed", "soft cap", "mixup", "log-softmax"])
def test_a_lazy_step_over_a_hundred_thousand_classes_holds(case):
    """Dense keeps several times 225 MiB here, and a copy of the weight has 112."""
    assert peak(lazy_step, 512, 115217, 256, case) <= 96


def adapted(n: int, c: int, d: int, kind: str, gradients: str):
    """One step of a frozen head with a low-rank adapter: the function, or PEFT's layer."""

    def make(n: int, c: int):
        x, y = torch.randn(n, d, requires_grad=True), torch.randint(0, c, (n,))
        if kind == "function":
            return torch.randn(c, d), (torch.randn(8, d, requires_grad=True), torch.randn(c, 8, requires_grad=True), 2.0), x, y
        import peft

        from bigclass.integrations.peft import adopt

        model = torch.nn.Sequential(torch.nn.Linear(d, c, bias=False))
        config = peft.LoraConfig(r=8, target_modules=["0"], use_dora=kind == "dora", lora_dropout=0.1 if kind == "dropout" else 0.0)
        return adopt(peft.get_peft_model(model, config).get_base_model()[0], engine="tiled"), None, x, y

    def run(head, lora, x, y):
        with bigclass.planning(gradients=gradients):
            if lora is None:
                torch.nn.functional.cross_entropy(head(x), y).backward()
                return [x.grad, *[p.grad for p in head.parameters() if p.requires_grad]]
            bigclass.linear_cross_entropy(x, head, y, lora=lora, engine="tiled").backward()
            return x.grad, lora[0].grad, lora[1].grad

    for _ in range(2):
        run(*make(64, 3000))
    problem = make(n, c)
    return lambda: run(*problem)


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
def test_an_adapter_of_a_frozen_weight_needs_no_gradient_of_its_shape(gradients):
    """The weight is 112 MiB, and so would its gradient or a copy be, or a matrix of logits."""
    assert peak(adapted, 256, 115217, 256, "function", gradients) <= 96


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_pefts_layer_around_a_frozen_head_needs_none_either(kind):
    """Dense: the logits three times over, 337 MiB; DoRA's norms make two copies of the weight, 225 MiB, beside."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    assert peak(adapted, 256, 115217, 256, kind, "auto") <= 96


def contrastive(n: int, d: int, sigmoid: bool):
    """A contrastive loss and all its gradients, warmed up on a small batch."""

    def make(n: int):
        image, text = (torch.nn.functional.normalize(torch.randn(n, d)).requires_grad_() for _ in range(2))
        return image, text, torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)

    def run(image, text, scale, bias):
        loss = bigclass.sigmoid_contrastive_loss if sigmoid else bigclass.contrastive_loss
        loss(image, text, scale, logit_bias=bias, engine="tiled").backward()
        return image.grad, text.grad

    for _ in range(2):
        run(*make(700))
    problem = make(n)
    return lambda: run(*problem)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(("n", "d", "limit"), [(4096, 512, 64), (16384, 32, 128)])
def test_contrastive_losses_store_no_matrix_of_logits(sigmoid, n, d, limit):
    """One matrix of 16384 x 16384 is 1 GiB, and the dense forms make four or five."""
    assert peak(contrastive, n, d, sigmoid) <= limit


def distilled(n: int, c: int, d: int, e: int, dtype: torch.dtype, options: dict):
    """A divergence from a streamed teacher and the student's gradients, warmed up on a small problem."""

    def make(n: int, c: int):
        student = [(0.1 * torch.randn(*s)).to(dtype).requires_grad_() for s in ((n, d), (c, d))]
        return [*student, *[(0.1 * torch.randn(*s)).to(dtype) for s in ((n, e), (c, e))]]

    def run(x, w, u, v):
        bigclass.linear_kl_div(x, w, u, v, engine="tiled", temperature=2.0, **options).sum().backward()
        return x.grad, w.grad

    for _ in range(2):
        run(*make(64, 3000))
    problem = make(n, c)
    return lambda: run(*problem)


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"divergence": "jensen_shannon", "beta": 0.3}, {"reduction": "none"}], ids=str)
def test_distillation_stores_neither_matrix_of_logits(options):
    """Each has 137 MiB here, and a dense step holds five or more."""
    assert peak(distilled, 600, 60000, 16, 24, torch.float32, options) <= 96


def test_distillation_of_half_types_adds_one_fp32_dw_and_widens_no_weight_whole():
    c, d = 60000, 256
    assert peak(distilled, 64, c, d, 512, torch.bfloat16, {}) <= 96 + c * d * 4 / MIB
    assert peak(distilled, 64, c, d, 512, torch.bfloat16, {"reduction": "none"}) <= 96

"""Heads with DTensor weights on gloo processes: training, prediction, checkpoints, meshes of several axes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigclass
from tests.parallel.class_support import relative
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

N, D, C = 8, 6, 21  # 21 classes: chunks of 11 and 10, of 7, of 6, 6, 6 and 3


def heads() -> dict[str, Any]:
    torch.manual_seed(7)
    many = {
        "cce": bigclass.CCEHead(D, C, label_smoothing=0.1, logit_scale=1.5),
        "lm": bigclass.LMHead(D, C, softcap=5.0),
        "multilabel": bigclass.MultiLabelHead(D, C, loss="asymmetric"),
        "zlpr": bigclass.MultiLabelHead(D, C, loss="zlpr"),
        "arcface": bigclass.MarginHead(D, C, scale=8.0),
        "adaface": bigclass.MarginHead(D, C, scale=8.0, kind="adaface"),
        "curricular": bigclass.MarginHead(D, C, scale=8.0, kind="curricular"),
        "centres": bigclass.MarginHead(D, 12, scale=8.0, subcenters=2),
    }
    return {name: head.double() for name, head in many.items()}


def batch(name: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, dtype=torch.float64, generator=g)
    c = 12 if name == "centres" else C
    y = torch.randint(c, (N, 3) if name in ("multilabel", "zlpr") else (N,), generator=g)
    return (x.view(2, 4, D), y.view(2, 4)) if name == "lm" else (x, y)


def of_every_head(rank: int, world: int) -> dict[str, list[float]]:
    """Errors of loss, dx, dw, db and predictions, with the same rows on all ranks and with rows spread."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh, found = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), {}
    for name, whole in heads().items():
        x, y = batch(name)
        for layout in ("same", "spread"):
            if name == "lm" and layout == "spread" and world > 2:
                continue  # two sequences
            head = bigclass.shard_classes(copy.deepcopy(whole), mesh, batch=mesh if layout == "spread" else None)
            head = copy.deepcopy(head)  # as for an average of the weights: groups are shared
            reference = copy.deepcopy(whole)
            leaf = x.clone().requires_grad_()
            exact = reference(leaf, y)
            exact.backward()
            assert leaf.grad is not None
            mine = torch.arange(x.shape[0]).tensor_split(world)[rank] if layout == "spread" else torch.arange(x.shape[0])
            own = x[mine].clone().requires_grad_()
            loss = head(own, y[mine])
            loss.backward()
            assert own.grad is not None
            errors = [relative(loss, exact), relative(own.grad, leaf.grad[mine] * (world if layout == "spread" else 1))]
            for p, q in zip(head.parameters(), reference.parameters(), strict=True):
                assert p.grad.placements == (Shard(0),) and q.grad is not None  # type: ignore[union-attr]
                errors.append(relative(p.grad.full_tensor(), q.grad))  # type: ignore[union-attr]
            for b, c in zip(head.buffers(), reference.buffers(), strict=True):
                errors.append(relative(b, c))
            values, classes = head.predict(x[mine], 3)
            right_values, right_classes = reference.predict(x[mine], 3)
            errors += [relative(values, right_values), float((classes != right_classes).sum())]
            if layout == "same" and name != "zlpr":
                errors.append(relative(head.eval()(x), reference.eval()(x)))
            found[f"{name} {layout}"] = errors
    return found


@pytest.mark.parametrize("world", (2, 3))
def test_sharded_heads_train_and_predict_as_whole_ones(world):
    for found in run_ranks(of_every_head, world):
        wrong = {key: e for key, e in found.items() if not max(e) < 1e-10}
        assert not wrong, wrong


def lazily(rank: int, world: int) -> dict[str, float]:
    """An unchanged criterion on lazy logits of a sharded head; DTensors in, DTensors out; what cannot be said is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    warnings.simplefilter("error", bigclass.LogitsWarning)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    whole = heads()["cce"]
    x, y = batch("cce")
    head, criterion = bigclass.shard_classes(copy.deepcopy(whole), mesh), nn.CrossEntropyLoss(label_smoothing=0.2)
    found = {}
    made = []
    for one in (whole, head):
        leaf = x.clone().requires_grad_()
        loss = criterion(one(leaf), y) + one(leaf).log_softmax(-1).gather(1, y[:, None]).mean() + (one(leaf) + 0.5).logsumexp(-1).mean()
        loss.backward()
        assert leaf.grad is not None
        weight = one.weight.grad
        made.append([loss.detach(), leaf.grad, weight.full_tensor() if isinstance(weight, DTensor) else weight])
        made[-1].append(one(x).materialize().detach())
    for label, a, b in zip(("loss", "dx", "dw", "logits"), made[1], made[0], strict=True):
        found[f"lazy {label}"] = relative(a, b)
    reference = x.clone().requires_grad_()
    w = whole.weight.detach().clone().requires_grad_()
    exact = bigclass.linear_cross_entropy(reference, w, y)
    exact.backward()
    assert reference.grad is not None and w.grad is not None
    for place in (Replicate(), Shard(0)):
        dx = distribute_tensor(x, mesh, [place]).requires_grad_()
        dw = distribute_tensor(w.detach(), mesh, [Shard(0)]).requires_grad_()
        for target in (y, distribute_tensor(y, mesh, [place])):
            dx.grad = dw.grad = None
            loss = bigclass.linear_cross_entropy(dx, dw, target, group=bigclass.Spread(gradients="sum"))
            loss.backward()
            assert dx.grad.placements == (place,) and dw.grad.placements == (Shard(0),)
            found[f"{place} {type(target).__name__}"] = max(
                relative(loss, exact), relative(dx.grad.full_tensor(), reference.grad), relative(dw.grad.full_tensor(), w.grad)
            )
    # features of sequences, spread over positions, as after sequence parallelism
    three, labels = x.view(2, 4, D), y.view(2, 4)
    spread = distribute_tensor(three, mesh, [Shard(1)]).requires_grad_()
    rows = bigclass.linear_cross_entropy(
        spread, distribute_tensor(w.detach(), mesh, [Shard(0)]), labels, reduction="none", group=bigclass.Spread(gradients="sum")
    )
    per_row = bigclass.linear_cross_entropy(three, w.detach(), labels, reduction="none")
    found["positions"] = relative(rows, distribute_tensor(per_row, mesh, [Shard(1)]).to_local())

    # what is added to lazy logits and learns; criteria of rows that are spread
    vector, made = torch.linspace(-1.0, 1.0, C, dtype=x.dtype), []
    for one in (whole, head):
        v = vector.clone().requires_grad_()
        ((one(x.clone().requires_grad_()) + v) * 1.3).logsumexp(-1).mean().backward()
        made.append(v.grad)
    found["learning vector"] = relative(made[1], made[0])
    over_batch = bigclass.CCEHead.adopt(nn.Linear(D, C).double(), group=bigclass.Spread(batch=dist.group.WORLD, gradients="sum"))
    over_batch.load_state_dict(whole.state_dict())
    plain = bigclass.CCEHead.adopt(copy.deepcopy(over_batch).to(x.dtype), group=None)
    rows = slice(0, 3) if rank == 0 else slice(3, N)
    soft = torch.softmax(x @ vector[:D].outer(vector), -1)
    hot = (soft > 1.0 / C).to(x.dtype)
    for name, criterion_of, target in (
        ("kl_div", lambda s, t: nn.functional.kl_div(s.log_softmax(-1), t, reduction="batchmean"), soft),
        ("soft margin", bigclass.convert_criterion(nn.MultiLabelSoftMarginLoss(reduction="sum")), hot),
        ("cross-entropy", nn.CrossEntropyLoss(), y),
        ("bce", nn.BCEWithLogitsLoss(), hot),
    ):
        made = [
            criterion_of(plain(x.clone().requires_grad_()), target),
            criterion_of(over_batch(x[rows].clone().requires_grad_()), target[rows]),
        ]
        found[f"criterion {name}"] = relative(made[1], made[0])

    dw = distribute_tensor(w.detach(), mesh, [Shard(0)])
    for message, call in {
        "a DTensor beside an input that is none": lambda: bigclass.linear_cross_entropy(x, dw, y),
        "Shard(0) (over the classes)": lambda: bigclass.linear_cross_entropy(
            x, distribute_tensor(w.detach(), mesh, [Shard(1)]), y, group=mesh
        ),
        "expected Replicate() or Shard placements": lambda: bigclass.linear_cross_entropy(
            DTensor.from_local(x, mesh, [Partial()], run_check=False), dw, y
        ),
        "expected whole features": lambda: bigclass.linear_cross_entropy(distribute_tensor(x, mesh, [Shard(1)]), dw, y),
        "whole on every rank": lambda: bigclass.linear_cross_entropy(x, distribute_tensor(w.detach(), mesh, [Replicate()]), y, group=mesh),
        "its rows are sharded": lambda: bigclass.linear_cross_entropy(distribute_tensor(x, mesh, [Shard(0)]), w.detach(), y),
        "no placement describes": lambda: bigclass.linear_cross_entropy(
            x, distribute_tensor(w.detach(), mesh, [Replicate()]), y, group=bigclass.Spread(batch=mesh)
        ),
        "takes no sparse gradient": lambda: bigclass.shard_classes(bigclass.CCEHead(D, C).double(), mesh)(
            x, y, sample=bigclass.ClassSampling(0.5)
        ),
        "belongs to a loss": lambda: head(x, sample=bigclass.ClassSampling(0.5)),
        "cannot tell": lambda: head.release(),
        "expected a ProcessGroup or a DeviceMesh": lambda: bigclass.CCEHead(D, C, group="tp"),
        "linear_bias: a DTensor": lambda: bigclass.linear_cross_entropy(
            x, w.detach(), y, linear_bias=distribute_tensor(torch.zeros(C, dtype=x.dtype), mesh, [Shard(0)])
        ),
        "give the head its targets": lambda: bigclass.shard_classes(copy.deepcopy(whole), mesh, batch=mesh)(x.requires_grad_()),
        "is a DTensor already": lambda: bigclass.shard_classes(head, mesh),
        "do not fall on": lambda: bigclass.shard_classes(bigclass.MarginHead(D, 3 * world - 1, subcenters=2), mesh),
    }.items():
        with pytest.raises((bigclass.ArgumentError, bigclass.ArgumentTypeError)) as caught:
            call()
        assert message in str(caught.value), str(caught.value)
    return found


def test_lazy_logits_and_dtensors_of_sharded_heads_are_those_of_whole_ones():
    for found in run_ranks(lazily, 2):
        wrong = {key: e for key, e in found.items() if not e < 1e-10}
        assert not wrong, wrong


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head = nn.Linear(5, D), bigclass.CCEHead(D, C)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)), y)


def on_a_mesh(rank: int, world: int) -> dict[str, Any]:
    """Two axes: rows over "dp" (FSDP2 over it, too), classes over "tp"; only "tp" merges classes. A checkpoint of the result."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(N, 5, dtype=torch.float64, generator=g), torch.randint(C, (N,), generator=g)
    mine = slice(0, 3) if mesh["dp"].get_local_rank() == 0 else slice(3, N)  # uneven, so that a mean of means would be wrong

    def train(model: nn.Module, rows: slice) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(x[rows], y[rows]).backward()
            optimizer.step()
        return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]

    made = {"alone": train(Net(), slice(None))}
    model = Net()
    parallelize_module(model, mesh["tp"], {"head": bigclass.class_parallel(batch=mesh["dp"])})
    fully_shard(model, mesh=mesh["dp"])
    made["fsdp x tp"] = train(model, mine)
    return made


def test_rows_over_one_axis_and_classes_over_another_train_as_one_process():
    for made in run_ranks(on_a_mesh, 4):
        for a, b in zip(made["fsdp x tp"], made["alone"], strict=True):
            assert relative(a, b) < 1e-10

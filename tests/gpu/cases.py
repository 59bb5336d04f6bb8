"""Every loss of the public surface, with its options: what it is given, and how it is run.

A case draws its leaves on the device and returns them with run(leaves, engine) -> outputs. Run on float64 leaves by the dense engine, which
the CPU tests hold against plain formulas, it is the truth; constants are on the device before, in float64 too, so that nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass
from tests.support import draw

from .support import DEVICE, at

N, C, D = at((300, 3001, 128), (40, 150, 24))
PAIRS = at(700, 90)
K = 5  # of top-k and of stored teachers

Leaves = list[Tensor]
Run = Callable[[Leaves, str], list[Tensor]]
Make = Callable[[torch.dtype], tuple[Leaves, Run]]


@dataclass(frozen=True)
class Case:
    """make(dtype) -> (leaves, run). engines, plans: those that differ here. waits: may it wait for the device, and be in no graph?"""

    make: Make
    engines: tuple[str, ...] = ("tiled", "fused")
    plans: tuple[str, ...] = ("forward", "recompute")
    waits: bool = False


def leaf(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return t.detach().to(DEVICE, dtype or t.dtype).requires_grad_()


def head(dtype: torch.dtype, kind: str = "peaked") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves x (N, D), w (C, D), b (C,), and targets y (N,), some ignored."""
    x, w, b, y = draw(kind, N, C, D, dtype, 0)
    y[::5] = -100
    return leaf(x), leaf(w), leaf(b), y.to(DEVICE)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class Constants:
    """Tensors that get no gradient, on the device, in float64 too."""

    def __init__(self, **values: Any) -> None:
        self.narrow = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in values.items()}
        self.wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in self.narrow.items()}

    def beside(self, x: Tensor) -> dict[str, Any]:
        return self.wide if x.dtype == torch.float64 else self.narrow


def flat(made: Any) -> list[Tensor]:
    """The tensors of a loss, of a pair, of nested tuples; what a filter reports is none of them."""
    if isinstance(made, bigclass.Stats):
        return [made.lse, made.correct]
    if isinstance(made, bigclass.TopClasses):
        return [made.values]
    return [made] if isinstance(made, Tensor) else [t for part in made for t in flat(part)]


def softmax(
    function: Callable[..., Any] = bigclass.linear_cross_entropy, target: Callable[[Tensor], Any] = lambda y: y, **options: Any
) -> Make:
    """A loss of (x, w, target(y)). A target that is a function of x's dtype is called with it."""

    def make(dtype: torch.dtype) -> tuple[Leaves, Run]:
        x, w, b, y = head(dtype)
        t, constants = target(y), Constants(**options)

        def run(leaves: Leaves, engine: str) -> list[Tensor]:
            x, w, b = leaves
            at_y = t(x.dtype) if callable(t) else t
            return flat(function(x, w, at_y, linear_bias=b, engine=engine, **constants.beside(x)))

        return [x, w, b], run

    return make


def several(y: Tensor) -> Tensor:
    """(N, 3) classes: the target, another, one twice; -1 or -100 where y is ignored stays as it is."""
    other = (y * 7 + 11).remainder(C)
    return torch.stack((y, torch.where(y < 0, y, other), y), -1)


def labels(y: Tensor) -> Tensor:
    """(N, 3) different positives or -1."""
    y = y.clamp_min(-1)
    return torch.stack((y, torch.where(y < 0, -1, (y + 17) % C), torch.full_like(y, -1)), -1)


def mixed(y: Tensor) -> Callable[[torch.dtype], bigclass.SparseTarget]:
    """Mixup of two classes a row, smoothed."""
    shares = torch.tensor([0.7, 0.25]).expand(N, 2).to(DEVICE)
    weights = {torch.float64: shares.double()}
    indices = torch.stack((y.clamp_min(0), (y + 101).remainder(C)), 1)
    return lambda dtype: bigclass.SparseTarget(indices, weights.get(dtype, shares), C, floor=0.05 / C)


def probabilities(y: Tensor) -> Callable[[torch.dtype], Tensor]:
    """(N, C), a little of every class."""
    dense = 0.5 * torch.rand(N, C, generator=generator()).softmax(1) + 0.5 * F.one_hot(y.clamp_min(0).cpu(), C)
    both = {dtype: dense.to(DEVICE, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    wide = both[torch.float32].double()
    return lambda dtype: wide if dtype == torch.float64 else both[torch.float32]


def scaled(dtype: torch.dtype) -> tuple[Leaves, Run]:
    """A scale that learns, before a soft cap."""
    x, w, b, y = head(dtype)

    def run(leaves: Leaves, engine: str) -> list[Tensor]:
        x, w, b, scale = leaves
        return flat(bigclass.linear_cross_entropy(x, w, y, linear_bias=b, logit_scale=scale, softcap=20.0, engine=engine))

    return [x, w, b, leaf(torch.tensor(0.8))], run


def adapted(dtype: torch.dtype, *, rank: int, frozen: bool) -> tuple[Leaves, Run]:
    """Low-rank adapters; frozen: of a weight that gets no gradient."""
    x, w, b, y = head(dtype)
    a, v = torch.randn(rank, D, generator=generator()) * D**-0.5, torch.randn(C, rank, generator=generator()) * 0.3
    fixed, fixed_wide = w.detach(), w.detach().double()

    def run(leaves: Leaves, engine: str) -> list[Tensor]:
        x, b, a, v, *rest = leaves
        weight = rest[0] if rest else fixed_wide if x.dtype == torch.float64 else fixed
        return flat(bigclass.linear_cross_entropy(x, weight, y, linear_bias=b, lora=(a, v, 0.5), engine=engine))

    return [x, b, leaf(a, dtype), leaf(v, dtype), *([] if frozen else [w])], run


def sampled(dtype: torch.dtype) -> tuple[Leaves, Run]:
    """A share of the classes, the same draw every run."""
    x, w, b, y = head(dtype)

    def run(leaves: Leaves, engine: str) -> list[Tensor]:
        x, w, b = leaves
        draw = bigclass.ClassSampling(0.5, generator=torch.Generator(DEVICE).manual_seed(0), sparse=False)
        return flat(bigclass.linear_cross_entropy(x, w, y, linear_bias=b, sample=draw, engine=engine))

    return [x, w, b], run


def sequences(function: Callable[..., Any], target: Callable[[Tensor], Tensor] = lambda y: y, *, sets: int = 0, **options: Any) -> Make:
    """A loss of token positions, 4 sequences; sets: of as many feature sets."""

    def make(dtype: torch.dtype) -> tuple[Leaves, Run]:
        x, w, b, y = head(dtype)
        y = target(y)
        y = y.view(4, -1, *y.shape[1:])
        x = leaf(torch.stack([x.detach() * f for f in (1.0, 0.5, 0.25)][:sets]) if sets else x)

        def run(leaves: Leaves, engine: str) -> list[Tensor]:
            x, w, b = leaves
            return flat(function(x.view(*x.shape[:-2], 4, -1, D), w, y, linear_bias=b, engine=engine, **options))

        return [x, w, b], run

    return make


def heads_of_their_own(dtype: torch.dtype) -> tuple[Leaves, Run]:
    x, w, _, y = head(dtype)
    y = y.view(4, -1)

    def run(leaves: Leaves, engine: str) -> list[Tensor]:
        x, w, v = leaves
        x = x.view(4, -1, D)
        return flat(bigclass.linear_multi_token_cross_entropy([x, x], [w, v], y, shifts=(1, 2), engine=engine))

    return [x, w, leaf(w.detach().roll(1, 0))], run


def best(dtype: torch.dtype) -> tuple[Leaves, Run]:
    x, w, b, _ = head(dtype, "flat")

    def run(leaves: Leaves, engine: str) -> list[Tensor]:
        x, w, b = leaves
        with torch.no_grad():
            values, index, log_p = bigclass.linear_topk(x, w, K, linear_bias=b, return_log_probs=True, engine=engine)
            # Not which classes, for two may be as good as equal: how good they are, exactly
            return [values, log_p, F.linear(x.double(), w.double(), b.double()).gather(1, index)]

    return [x, w, b], run


def pairs(function: Callable[..., Any], *, bias: bool = False, hard: bool = False, matches: str = "", **options: Any) -> Make:
    """Images and texts of length 1, a scale and perhaps a bias that learn."""

    def make(dtype: torch.dtype) -> tuple[Leaves, Run]:
        g = generator()
        image = torch.randn(PAIRS, D, generator=g)
        text = torch.randn(PAIRS, D, generator=g) + image
        more = torch.randn(PAIRS // 3, D, generator=g)
        leaves = [leaf(F.normalize(t), dtype) for t in (image, text, more)[: 3 if hard else 2]]
        leaves += [leaf(torch.tensor(14.3)), *([leaf(torch.tensor(-6.0))] if bias else [])]
        own = torch.arange(PAIRS, device=DEVICE)
        if "positives" in matches:
            options["positives"] = torch.stack((own, torch.where(own % 4 == 1, -1, (own + 3) % PAIRS)), 1)
        if "ignore" in matches:
            options["ignore"] = torch.stack((torch.where(own % 3 == 0, -1, (own + 7) % PAIRS), (own + 9) % PAIRS), 1)

        def run(leaves: Leaves, engine: str) -> list[Tensor]:
            image, text, *rest = leaves
            extra = {"hard_negatives": rest.pop(0)} if hard else {}
            extra |= {"logit_bias": rest[1]} if bias else {}
            return flat(function(image, text, rest[0], engine=engine, **extra, **options))

        return leaves, run

    return make


def margin(**options: Any) -> Make:
    centres = options.get("subcenters", 1)

    def make(dtype: torch.dtype) -> tuple[Leaves, Run]:
        x, w, _, y = head(dtype, "flat")
        classes = C // centres
        constants, y = Constants(**options), torch.where(y < 0, y, y % classes)

        def run(leaves: Leaves, engine: str) -> list[Tensor]:
            x, w = leaves
            return flat(bigclass.linear_margin_loss(x, w, y, logit_scale=16.0, engine=engine, **constants.beside(x)))

        return [x, leaf(w[: classes * centres])], run

    return make


def taught(**options: Any) -> Make:
    """By another head of another width, over the same classes."""

    def make(dtype: torch.dtype) -> tuple[Leaves, Run]:
        x, w, b, _ = head(dtype, "flat")
        g, wider = generator(), D + 8
        constants = Constants(
            teacher=torch.randn(N, wider, generator=g).to(dtype),
            weight=(2.0 * torch.randn(C, wider, generator=g) * wider**-0.5).to(dtype),
            mask=torch.arange(N) % 5 > 0,
        )

        def run(leaves: Leaves, engine: str) -> list[Tensor]:
            x, w, b = leaves
            t = constants.beside(x)
            return flat(bigclass.linear_kl_div(x, w, t["teacher"], t["weight"], linear_bias=b, mask=t["mask"], engine=engine, **options))

        return [x, w, b], run

    return make


def stored(**options: Any) -> Make:
    """By a teacher's best classes."""

    def make(dtype: torch.dtype) -> tuple[Leaves, Run]:
        x, w, b, _ = head(dtype, "flat")
        log_p, index = torch.randn(N, C, generator=generator()).mul(2.0).log_softmax(1).topk(K)
        constants = Constants(index=index, log_p=log_p, mask=torch.arange(N) % 5 > 0)

        def run(leaves: Leaves, engine: str) -> list[Tensor]:
            x, w, b = leaves
            t = constants.beside(x)
            function = bigclass.linear_topk_kl_div
            return flat(function(x, w, t["index"], t["log_p"], linear_bias=b, mask=t["mask"], engine=engine, **options))

        return [x, w, b], run

    return make


def one_vs_all(function: Callable[..., Any], target: Callable[[Tensor], Any] = labels, **options: Any) -> Make:
    return softmax(function, target, **options)


def sparse_rows(y: Tensor) -> tuple[Tensor, Tensor]:
    """CSR: (indptr, indices)."""
    kept = (y >= 0).long()
    return torch.cat((kept.new_zeros(1), kept.cumsum(0))), y[y >= 0]


def dense_labels(y: Tensor) -> Callable[[torch.dtype], Tensor]:
    narrow = torch.zeros(N, C, device=DEVICE).index_put((torch.arange(N, device=DEVICE), y.clamp_min(0)), torch.tensor(0.9, device=DEVICE))
    double = narrow.double()
    return lambda dtype: double if dtype == torch.float64 else narrow


CE, BCE = bigclass.linear_cross_entropy, bigclass.linear_binary_cross_entropy
CLIP, SIGLIP = bigclass.contrastive_loss, bigclass.sigmoid_contrastive_loss
V = torch.linspace(0.5, 2.0, C)  # a factor a class
ROW_MARGINS = torch.linspace(0.1, 0.6, N)
TILED = ("tiled",)  # no Triton form: two streams, a list of the largest, groups that divide no tile
ROWS = ("recompute",)  # made by the form that makes its logits again, whatever the plan

CASES: dict[str, Case] = {
    "cross-entropy": Case(softmax()),
    "cross-entropy, sum": Case(softmax(target=lambda y: torch.where(y < 0, 3, y), reduction="sum", ignore_index=3)),
    "cross-entropy, rows": Case(softmax(reduction="none"), plans=ROWS),
    "cross-entropy, class weights": Case(softmax(weight=V)),
    "cross-entropy, class weights, smoothed, capped": Case(softmax(weight=V, label_smoothing=0.1, softcap=20.0)),
    "cross-entropy, probabilities": Case(softmax(target=probabilities)),
    "cross-entropy, probabilities, class weights": Case(softmax(target=probabilities, weight=V, softcap=20.0)),
    "cross-entropy, mixup": Case(softmax(target=mixed)),
    "cross-entropy, mixup, rows": Case(softmax(target=mixed, reduction="none", label_smoothing=0.1), plans=ROWS),
    "cross-entropy, smoothed": Case(softmax(label_smoothing=0.1)),
    "cross-entropy, capped": Case(softmax(softcap=20.0)),
    "cross-entropy, z-loss": Case(softmax(z_loss=1e-2)),
    "cross-entropy, capped, smoothed, z-loss, scaled": Case(softmax(softcap=20.0, label_smoothing=0.1, z_loss=1e-3, logit_scale=0.7)),
    "cross-entropy, scale that learns": Case(scaled),
    "cross-entropy, statistics": Case(softmax(return_stats=True), plans=ROWS),
    "cross-entropy, shifted": Case(sequences(CE, shift=1)),
    "cross-entropy, shifted, rows": Case(sequences(CE, shift=2, reduction="none"), plans=ROWS),
    "cross-entropy, adapters of a frozen weight": Case(partial(adapted, rank=8, frozen=True)),
    "cross-entropy, adapters": Case(partial(adapted, rank=3, frozen=False)),
    "cross-entropy, sampled": Case(sampled),
    "poly": Case(softmax(bigclass.linear_poly_cross_entropy, label_smoothing=0.1)),
    "log-sum-exp": Case(softmax(lambda x, w, _, **options: bigclass.linear_logsumexp(x, w, **options)), plans=ROWS),
    "log-sum-exp, picks": Case(lambda dtype: picked(dtype), plans=ROWS),
    "log-probability": Case(softmax(bigclass.linear_log_prob, several, temperature=0.8), plans=ROWS),
    "log-probability, entropy": Case(
        sequences(bigclass.linear_log_prob, several, shift=1, temperature=0.8, return_entropy=True), plans=ROWS
    ),
    "log-probability of sequences": Case(sequences(bigclass.linear_sequence_log_prob, average=True), plans=ROWS),
    "top-k": Case(best, engines=TILED, plans=ROWS),
    "multi-token, sets": Case(
        sequences(bigclass.linear_multi_token_cross_entropy, sets=3, loss_weights=(1.0, 0.5, 0.25), return_losses=True, z_loss=1e-3)
    ),
    "multi-token, one set": Case(sequences(bigclass.linear_multi_token_cross_entropy, shifts=(1, 2), label_smoothing=0.1)),
    "multi-token, heads": Case(heads_of_their_own),
    "bce": Case(one_vs_all(BCE)),
    "bce, class weights, smoothed": Case(one_vs_all(BCE, weight=V, pos_weight=V.flip(0), label_smoothing=0.1, softcap=20.0)),
    "bce, rows": Case(one_vs_all(BCE, reduction="none"), plans=ROWS),
    "bce, dense labels": Case(one_vs_all(BCE, dense_labels, reduction="batchmean")),
    "bce, sparse rows": Case(one_vs_all(BCE, sparse_rows, reduction="sum"), waits=True),
    "bce, top-k": Case(one_vs_all(BCE, reduction="batchmean", return_topk=K), engines=TILED),
    "focal": Case(one_vs_all(bigclass.linear_focal_loss, reduction="sum")),
    "asymmetric": Case(one_vs_all(bigclass.linear_asymmetric_loss)),
    "asymmetric, constant focus": Case(one_vs_all(bigclass.linear_asymmetric_loss, disable_torch_grad_focal_loss=True)),
    "squared hinge": Case(one_vs_all(bigclass.linear_squared_hinge_loss, margin=1.5)),
    "elementwise poly": Case(one_vs_all(bigclass.linear_elementwise_loss, loss="poly")),
    "zlpr": Case(one_vs_all(bigclass.linear_zlpr_loss)),
    "contrastive": Case(pairs(CLIP)),
    "contrastive, one direction": Case(pairs(CLIP, direction="image")),
    "contrastive, rows": Case(pairs(CLIP, reduction="none"), plans=ROWS),
    "contrastive, columns of several positives": Case(pairs(CLIP, hard=True, matches="positives ignore")),
    "sigmoid contrastive": Case(pairs(SIGLIP, bias=True)),
    "sigmoid contrastive, several positives": Case(pairs(SIGLIP, bias=True, matches="positives")),
    "arcface": Case(margin()),
    "arcface, margins of rows": Case(margin(margin=ROW_MARGINS, beyond_pi="clip")),
    "arcface, sub-centres": Case(margin(subcenters=4)),
    "arcface, three sub-centres": Case(margin(subcenters=3), engines=TILED),
    "cosface": Case(margin(kind="cosface", reduction="sum")),
    "combined": Case(margin(kind="combined")),
    "curricular": Case(margin(curriculum=torch.tensor(0.3))),
    "distillation": Case(taught(temperature=2.0), engines=TILED),
    "distillation, reverse": Case(taught(divergence="reverse", softcap=5.0), engines=TILED),
    "distillation, jensen-shannon": Case(taught(divergence="jensen_shannon", beta=0.3, reduction="none"), engines=TILED),
    "distillation, stored": Case(stored(temperature=2.0)),
    "distillation, stored, renormalised": Case(stored(rest="renormalize", reduction="none"), plans=ROWS),
}


def picked(dtype: torch.dtype) -> tuple[Leaves, Run]:
    x, w, b, y = head(dtype)
    index = several(y.clamp_min(0))

    def run(leaves: Leaves, engine: str) -> list[Tensor]:
        x, w, b = leaves
        return flat(bigclass.linear_logsumexp(x, w, linear_bias=b, index=index, softcap=20.0, engine=engine))

    return [x, w, b], run


def outcome(leaves: Leaves, run: Run, engine: str, plan: str, workspace: int | None = None) -> list[Tensor]:
    """The outputs, detached, then the gradients of a sum of them in which every entry has its own factor."""
    with bigclass.planning(gradients=plan, workspace=workspace):
        made = run(leaves, engine)
    terms = [t for t in made if t.requires_grad]
    if not terms:
        return made
    total = sum((t * factors(t)).sum() if t.dim() else t for t in terms)
    assert isinstance(total, Tensor)
    return [*(t.detach() for t in made), *torch.autograd.grad(total, leaves)]


def factors(t: Tensor) -> Tensor:
    """As t, from -1 to 2."""
    return torch.linspace(-1.0, 2.0, t.numel(), device=t.device, dtype=t.dtype).view_as(t)

"""Multi-token prediction: the weighted sum of cross-entropies at several shifts, whatever is shared."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bigclass
from tests.support import ROADS, draw, error, exact_nll

MULTI = bigclass.linear_multi_token_cross_entropy
EVERY_ROAD = (*ROADS, ("auto", "auto"))
SLACK = 4 * 2.0**-24


def on(road, *args, **options):
    with bigclass.planning(gradients=road[1], workspace=1 << 20):
        return MULTI(*args, engine=road[0], **options)


def dense(sets, weights, biases, target, shifts, factors, *, eps=0.0, cap=None, scale=None, z=0.0, ignore=-100):
    """(loss, losses (K,)) from dense logits; a shift without a label has the loss 0."""
    losses = []
    for x, w, b, shift in zip(sets, weights, biases, shifts, strict=True):
        length = max(x.shape[-2] - shift, 0)
        s = F.linear(x[..., :length, :], w, b).flatten(0, -2)
        s = s if scale is None else s * scale
        s = s if cap is None else cap * torch.tanh(s / cap)
        y = target[..., min(shift, x.shape[-2]) :].flatten().long()
        used = y != ignore
        s, y = s[used], y[used]
        rows = exact_nll(s, y) * (1 - eps) + eps * (s.logsumexp(1) - s.mean(1)) + z * s.logsumexp(1).square()
        losses.append(rows.mean() if len(rows) else s.sum() * 0.0)
    return sum(a * part for a, part in zip(factors, losses, strict=True)), torch.stack(losses)


@st.composite
def problems(choose):
    g = torch.Generator().manual_seed(choose(st.integers(0, 2**31)))
    lead, length = choose(st.sampled_from([(), (3,), (2, 2)])), choose(st.integers(1, 7))
    c, d, k = choose(st.integers(2, 300)), choose(st.integers(1, 6)), choose(st.integers(1, 3))
    shifts = choose(st.lists(st.integers(0, 8), min_size=k, max_size=k))
    ignore = choose(st.sampled_from([None, 1]))
    target = torch.randint(c, (*lead, length), generator=g)
    target = target.masked_fill(
        torch.rand(target.shape, generator=g) < choose(st.sampled_from([0.0, 0.5, 1.0])), -100 if ignore is None else ignore
    )
    own_sets, own_weights, bias = choose(st.booleans()), choose(st.booleans()), choose(st.sampled_from([None, "one", "own"]))
    made = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    sets = [made(*lead, length, d) for _ in range(k if own_sets else 1)]
    weights = [made(c, d) for _ in range(k if own_weights else 1)]
    biases = [] if bias is None else [made(c) for _ in range(k if bias == "own" else 1)]
    factors = choose(st.sampled_from([None, [1.0, 0.5, 0.0]]))
    options = {
        "label_smoothing": choose(st.sampled_from([0.0, 0.1])), "softcap": choose(st.sampled_from([None, 3.0])),
        "logit_scale": choose(st.sampled_from([None, 1.7])), "z_loss": choose(st.sampled_from([0.0, 0.01])),
    }  # fmt: skip
    forms = choose(st.booleans()), choose(st.booleans())
    return sets, weights, biases, target, shifts, None if factors is None else factors[:k], ignore, options, forms


@pytest.mark.parametrize("road", EVERY_ROAD, ids="-".join)
@settings(max_examples=50)
@given(problem=problems())
def test_it_is_the_weighted_sum_of_the_means_of_each_shift(road, problem):
    sets, weights, biases, target, shifts, factors, ignore, options, (stacked, whole) = problem
    k, leaves = len(shifts), [*sets, *weights, *biases]
    spread = lambda parts: parts * k if len(parts) == 1 else parts  # noqa: E731
    want, parts = dense(
        spread(sets), spread(weights), spread(biases or [None]), target, shifts, factors or [1.0] * k, eps=options["label_smoothing"],
        cap=options["softcap"], scale=options["logit_scale"], z=options["z_loss"], ignore=-100 if ignore is None else ignore,
    )  # fmt: skip
    # what no label reads may hold anything
    reads = torch.zeros(k, *target.shape, dtype=torch.bool)
    for i, shift in enumerate(shifts):
        length = max(target.shape[-1] - shift, 0)
        reads[i, ..., :length] = target[..., target.shape[-1] - length :] != (-100 if ignore is None else ignore)
    reads = reads if len(sets) == k > 1 else reads.any(0, keepdim=True)
    holes = [torch.where(r.unsqueeze(-1), x, math.nan).detach().requires_grad_() for r, x in zip(reads, sets, strict=True)]
    given_sets = torch.stack(holes) if stacked and len(holes) > 1 else holes[0] if len(holes) == 1 and whole else holes
    linear_bias = None if not biases else biases[0] if len(biases) == 1 else biases
    linear_weight = weights[0] if len(weights) == 1 else weights
    given = {"shifts": shifts, "loss_weights": factors, "ignore_index": ignore, "linear_bias": linear_bias, **options}
    loss, losses = on(road, given_sets, linear_weight, target, return_losses=True, **given)
    assert loss.shape == () and losses.shape == (k,) and not losses.requires_grad
    assert error(loss, want) < 1e-11 and error(losses, parts) < 1e-11
    assert torch.equal(on(road, given_sets, linear_weight, target, **given), loss)
    if not want.requires_grad:
        return
    made = torch.autograd.grad(loss * 3.0, [*holes, *weights, *biases])
    for z, t in zip(made, torch.autograd.grad(want * 3.0, leaves), strict=True):
        assert error(z, t) < 1e-10 or float(t.norm()) < 1e-12


@pytest.mark.parametrize("road", ROADS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", ["weight", "both", "nothing"])
@pytest.mark.parametrize("kind", ["peaked", "onehot"])
def test_losses_and_gradients_are_as_exact_as_dense(road, dtype, shared, kind):
    pools = [[[], [], []] for _ in range(3)]
    for seed in range(4):
        drawn = [draw(kind, 96, 700, 40, dtype, 10 * seed + i) for i in range(2)]
        target = drawn[0][3]  # what the first set aims at, by position; the others are as wrong as early training is
        x = [drawn[0][0]] if shared == "both" else [x for x, *_ in drawn]
        w = [w for _, w, *_ in drawn] if shared == "nothing" else [drawn[0][1]]
        leaves = [*x, *w]
        loss = on(road, x, w if shared == "nothing" else w[0], target, shifts=(0, 1))
        mine = [loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])]
        twice = lambda parts: parts * 2 if len(parts) == 1 else parts  # noqa: E731

        def plain(x, w, target=target, twice=twice):
            rows = [F.cross_entropy(F.linear(a, b)[: 96 - i], target[i:]) for i, (a, b) in enumerate(zip(twice(x), twice(w), strict=True))]
            return sum(rows), torch.cat([g.flatten() for g in torch.autograd.grad(sum(rows), [*x, *w])])

        wide = [[t.detach().double().requires_grad_() for t in part] for part in (x, w)]
        truth, _ = dense(twice(wide[0]), twice(wide[1]), [None] * 2, target, (0, 1), (1.0, 1.0))
        exact = [truth, torch.cat([g.flatten() for g in torch.autograd.grad(truth, [*wide[0], *wide[1]])])]
        for pool, *zs in zip(pools, mine, plain(x, w), exact, strict=False):
            for column, z in zip(pool, zs, strict=True):
                column.append(z.detach().double().flatten())
    for name, pool in zip(("loss", "gradients"), pools, strict=False):
        mine, other, truth = (torch.cat(part) for part in pool)
        limit = 1.1 * error(other, truth) + SLACK
        assert error(mine, truth) <= limit, f"{name}: {error(mine, truth):.2e}, dense {error(other, truth):.2e}"


def test_it_compiles_to_one_graph():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g, requires_grad=True) for s in ((2, 3, 6, 5), (400, 5)))
    target = torch.randint(400, (3, 6), generator=g)
    target[0, :2] = -100

    def everything(x, w):
        options = {"shifts": (1, 2), "label_smoothing": 0.1, "z_loss": 1e-3, "engine": "tiled", "return_losses": True}
        several, of_each = MULTI(x, w, target, **options)
        one, of_one = MULTI(x[0], w, target, **options)
        own, of_own = MULTI(x, [w, w * 2.0], target, loss_weights=(0.5, 2.0), **options)
        return several, one, own, of_each.sum(), of_one.sum(), of_own.sum()

    made = [
        [*out, *torch.autograd.grad(sum(out), (x, w))]
        for out in (everything(x, w), torch.compile(everything, fullgraph=True, backend="aot_eager")(x, w))
    ]
    for a, b in zip(*made, strict=True):
        assert error(a, b) < 1e-6


X, W, Y = torch.zeros(3, 2, 5, 4), torch.zeros(9, 4), torch.zeros(2, 5, dtype=torch.long)
BAD = {
    "two sets for three shifts": (ValueError, r"input: expected features.*\(2, 5\), or 3 of them.*got \[\(2, 5, 4\)", {"input": X[:2]}),
    "sets of other positions": (ValueError, r"input: expected features.*got \(2, 4, 4\)", {"input": X[0, :, :4]}),
    "a set that is none": (TypeError, "input: expected a tensor, got list", {"input": [X[0], X[1], [1.0]]}),
    "features differ": (ValueError, "linear_weight: expected 3 features", {"input": X[..., :3]}),
    "two heads for three shifts": (ValueError, "linear_weight: expected a tensor or 3 of them.*got 2", {"linear_weight": [W, W]}),
    "a weight that is none": (TypeError, "linear_weight: expected a tensor, got NoneType", {"linear_weight": None}),
    "two biases": (ValueError, "linear_bias: expected a tensor or 3 of them, one a shift, got 2", {"linear_bias": [W[:, 0]] * 2}),
    "a bias too long": (ValueError, r"linear_bias: expected shape \(9,\), got \(10,\)", {"linear_bias": torch.zeros(10)}),
    "target a list": (TypeError, "target: expected a tensor, got list", {"target": [0]}),
    "probabilities": (TypeError, "target: expected int64 or int32", {"target": Y.float()}),
    "a label too large": (IndexError, r"\[0, 9\), got 9", {"target": Y + 9}),
    "a label too large, one set": (IndexError, r"\[0, 9\), got 9", {"target": Y + 9, "input": X[0]}),
    "a label too large, own heads": (IndexError, r"\[0, 9\), got 9", {"target": Y + 9, "linear_weight": [W] * 3}),
    "no shift": (ValueError, "shifts: expected a sequence of at least one integer >= 0, got", {"shifts": ()}),
    "a number": (ValueError, "shifts: expected a sequence of at least one integer >= 0, got 3", {"shifts": 3}),
    "negative": (ValueError, "shift: expected an integer >= 0, got -1", {"shifts": (1, 2, -1)}),
    "two loss_weights": (ValueError, r"loss_weights: expected 3 finite numbers >= 0, one a shift, got \(1, 2\)", {"loss_weights": (1, 2)}),
    "a negative loss_weight": (ValueError, "loss_weights: expected 3 finite", {"loss_weights": (1, 2, -1)}),
    "label_smoothing": (ValueError, r"label_smoothing: expected a value in \[0, 1\], got 2", {"label_smoothing": 2}),
    "z_loss": (ValueError, "z_loss: expected a coefficient >= 0, got -1", {"z_loss": -1}),
    "ignore_index": (TypeError, "ignore_index: expected an integer, got '0'", {"ignore_index": "0"}),
    "softcap": (ValueError, "softcap must be finite and greater than 0", {"softcap": 0.0}),
    "engine": (ValueError, "engine", {"engine": "fast"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    kind, words, given = BAD[name]
    with pytest.raises(kind, match=words):
        MULTI(**({"input": X, "linear_weight": W, "target": Y} | given))

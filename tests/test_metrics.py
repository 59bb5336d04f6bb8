"""The multi-label metrics are their formulas, in every form of the positives, over batches as over the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bigclass import linear_topk
from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.metrics import (
    PROPENSITY_CONSTANTS,
    MultiLabelMetrics,
    inverse_propensities,
    ndcg_at_k,
    precision_at_k,
    propensities,
    psndcg_at_k,
    psp_at_k,
    recall_at_k,
)

FORMS = ("padded", "padded int32", "csr", "csr int32", "sparse", "multi-hot bool", "multi-hot float")
PLAIN = {"P": precision_at_k, "nDCG": ndcg_at_k, "recall": recall_at_k}
SCORED = {"PSP": psp_at_k, "PSnDCG": psndcg_at_k}


@st.composite
def problems(draw, max_rows=6):
    """(C, predictions of each row, labels of each row, with repeats)."""
    c, n = draw(st.integers(1, 9)), draw(st.integers(1, max_rows))
    k = draw(st.integers(1, c))
    predictions = [draw(st.permutations(range(c)))[:k] for _ in range(n)]
    for row in predictions:
        missing = draw(st.integers(0, k))
        if draw(st.booleans()):
            row[k - missing :] = [-1] * missing
    labels = draw(st.lists(st.lists(st.integers(0, c - 1), max_size=8), min_size=n, max_size=n))
    return c, predictions, labels


def weights_of(c: int, seed: int = 0) -> torch.Tensor:
    return 1.0 + 5.0 * torch.rand(c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_form(form: str, labels: list[list[int]], c: int):
    n, kind = len(labels), torch.int32 if "int32" in form else torch.int64
    if form.startswith("padded"):
        out = torch.full((n, max(map(len, labels)) + 1), -1, dtype=kind)
        for i, row in enumerate(labels):
            out[i, 1 : len(row) + 1] = torch.tensor(row, dtype=kind)  # the first column is empty: -1 is not only at the end
        return out
    if form.startswith("csr"):
        indptr = torch.tensor([0] + [len(row) for row in labels]).cumsum(0).to(kind)
        return indptr, torch.tensor([j for row in labels for j in row], dtype=kind)
    hot = torch.zeros(n, c, dtype=torch.bool)
    for i, row in enumerate(labels):
        hot[i, row] = True
    if form == "sparse":
        stored = torch.rand(n, c, generator=torch.Generator().manual_seed(n)) < 0.5  # zeros that are stored are no positives
        stored |= hot
        indptr = torch.cat((torch.zeros(1, dtype=torch.long), stored.sum(1).cumsum(0)))
        return torch.sparse_csr_tensor(indptr, stored.nonzero()[:, 1], hot[stored].float(), (n, c))
    return hot if form.endswith("bool") else 0.5 * hot.double()


def by_hand(predictions, labels, q) -> dict[str, list[float]]:
    """Every metric at 1 ... k, loop by loop from the definitions."""
    k, n, q = len(predictions[0]), len(predictions), [float(v) for v in q]
    out: dict[str, list[float]] = {"P": [], "nDCG": [], "recall": [], "PSP": [], "PSnDCG": []}
    for at in range(1, k + 1):
        p = ndcg = recall = psp = best_psp = psndcg = best_psndcg = 0.0
        for row, truth in zip(predictions, map(set, labels), strict=True):
            hits = [j for j in row[:at] if j in truth]
            gain = {j: 1.0 / math.log2(row.index(j) + 2) for j in hits}
            best = sorted((q[j] for j in truth), reverse=True)[:at]
            p += len(hits) / at
            psp += sum(q[j] for j in hits) / at
            best_psp += sum(best) / at
            if truth:
                ideal = sum(1.0 / math.log2(r + 2) for r in range(min(at, len(truth))))
                recall += len(hits) / len(truth)
                ndcg += sum(gain.values()) / ideal
                psndcg += sum(q[j] * gain[j] for j in hits) / ideal
                best_psndcg += sum(v / math.log2(r + 2) for r, v in enumerate(best)) / ideal
        out["P"].append(p / n)
        out["nDCG"].append(ndcg / n)
        out["recall"].append(recall / n)
        out["PSP"].append(psp / best_psp if best_psp else math.nan)
        out["PSnDCG"].append(psndcg / best_psndcg if best_psndcg else math.nan)
    return out


def same(values: torch.Tensor, expected: list[float]) -> None:
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(problem=problems(), int32=st.booleans())
def test_every_metric_is_its_formula(form, problem, int32):
    c, predictions, labels = problem
    indices = torch.tensor(predictions, dtype=torch.int32 if int32 else torch.int64)
    positives, q = in_form(form, labels, c), weights_of(c)
    expected = by_hand(predictions, labels, q)
    for name, metric in PLAIN.items():
        same(metric(indices, positives), expected[name])
    for name, metric in SCORED.items():
        same(metric(indices, positives, q), expected[name])


def test_values_worked_out_on_paper():
    """So that a mistake shared by the formulas here and there would show."""
    indices, positives = torch.tensor([[2, 0, 1], [1, 3, 0]]), torch.tensor([[0, 3, -1], [1, -1, -1]])
    q = torch.tensor([2.0, 4.0, 1.0, 8.0])
    third = 1.0 / math.log2(3)
    same(precision_at_k(indices, positives), [1 / 2, 1 / 2, 1 / 3])
    same(recall_at_k(indices, positives), [1 / 2, 3 / 4, 3 / 4])
    same(ndcg_at_k(indices, positives), [1 / 2, (third / (1 + third) + 1) / 2, (third / (1 + third) + 1) / 2])
    same(psp_at_k(indices, positives, q), [4 / 12, 6 / 14, 6 / 14])
    gained, best = 2 * third / (1 + third) + 4, (8 + 2 * third) / (1 + third) + 4
    same(psndcg_at_k(indices, positives, q), [4 / 12, gained / best, gained / best])


@settings(max_examples=100)
@given(problem=problems(max_rows=12), cuts=st.lists(st.integers(0, 12), max_size=4), scored=st.booleans(), extra=st.booleans())
def test_batches_give_the_value_of_the_whole(problem, cuts, scored, extra):
    c, predictions, labels = problem
    q, k = weights_of(c), len(predictions[0])
    indices = torch.tensor(predictions)
    if extra:  # columns behind the first k are not looked at
        indices = torch.cat((indices, torch.zeros(len(labels), 1, dtype=torch.long)), 1)
    metrics = MultiLabelMetrics(k, q if scored else None)
    metrics.update(indices.flip(0), torch.zeros(len(labels), c, dtype=torch.bool))
    metrics.reset()
    bounds = sorted({0, len(labels), *(cut for cut in cuts if cut < len(labels))})
    for a, b in itertools.pairwise(bounds):
        metrics.update(indices[a:b], in_form("csr", labels[a:b], c))
    expected = by_hand(predictions, labels, q)
    names = ("P", "nDCG", "recall", "PSP", "PSnDCG") if scored else ("P", "nDCG", "recall")
    result = metrics.compute()
    assert list(result) == [f"{name}@{r}" for name in names for r in range(1, k + 1)]
    for name in names:
        same(torch.tensor([result[f"{name}@{r}"] for r in range(1, k + 1)], dtype=torch.float64), expected[name])


def test_an_empty_batch_changes_nothing_and_no_rows_are_nan():
    empty, none = torch.empty(0, 2, dtype=torch.long), torch.empty(0, 3, dtype=torch.bool)
    metrics = MultiLabelMetrics(2)
    metrics.update(empty, none)
    assert all(math.isnan(v) for v in metrics.compute().values())
    metrics.update(torch.tensor([[1, 0]]), torch.tensor([[0]]))
    metrics.update(empty, (torch.zeros(1, dtype=torch.long), torch.empty(0, dtype=torch.long)))
    assert metrics.compute()["P@2"] == 0.5
    for metric in PLAIN.values():
        assert metric(empty, none).isnan().all()


def test_rows_without_positives_count_as_zero_but_not_in_the_best_of_the_propensity_scored():
    indices, positives, q = torch.tensor([[0], [0]]), torch.tensor([[0], [-1]]), torch.tensor([3.0])
    assert [float(metric(indices, positives)) for metric in PLAIN.values()] == [0.5, 0.5, 0.5]
    assert [float(metric(indices, positives, q)) for metric in SCORED.values()] == [1.0, 1.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_class_predicted_twice_hits_once(form):
    twice, once = torch.tensor([[2, 2, 1, 2]]), torch.tensor([[2, -1, 1, -1]])
    positives, q = in_form(form, [[1, 2, 2]], 4), weights_of(4)
    for metric in PLAIN.values():
        same(metric(twice, positives), metric(once, positives).tolist())
    for metric in SCORED.values():
        same(metric(twice, positives, q), metric(once, positives, q).tolist())


def test_class_indices_and_row_counts_may_be_huge():
    """Keys of (row, class) pairs must not collide or wrap."""
    far = 2**40
    indices = torch.tensor([[far, far + 1], [far + 1, far]])
    same(precision_at_k(indices, torch.tensor([[far], [far]])), [0.5, 0.5])


def test_from_linear_topk():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 8, generator=g), torch.randn(50, 8, generator=g)
    _, classes = linear_topk(x, w, 5)
    logits = x @ w.T
    same(precision_at_k(classes, logits.argmax(1, keepdim=True)), [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    same(recall_at_k(classes, logits >= logits.topk(5).values[:, -1:]), [0.2, 0.4, 0.6, 0.8, 1.0])


@settings(max_examples=50)
@given(n=st.integers(1, 8), c=st.integers(2, 9), k=st.integers(1, 9), seed=st.integers(0, 99))
def test_ndcg_is_that_of_scikit_learn(n, c, k, seed):
    """Rows without positives are 0 there too."""
    metrics = pytest.importorskip("sklearn.metrics")
    assume(k <= c)
    g = torch.Generator().manual_seed(seed)
    scores, hot = torch.rand(n, c, generator=g, dtype=torch.float64), torch.rand(n, c, generator=g) < 0.3
    values = ndcg_at_k(scores.topk(k).indices, hot)
    same(values, [metrics.ndcg_score(hot.numpy().astype(float), scores.numpy(), k=r) for r in range(1, k + 1)])


@settings(max_examples=50)
@given(
    counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=9), n=st.integers(3, 10**6), name=st.sampled_from([*PROPENSITY_CONSTANTS])
)
def test_propensities_are_those_of_jain(counts, n, name):
    a, b = PROPENSITY_CONSTANTS[name]
    expected = [1 + (math.log(n) - 1) * (b + 1) ** a * math.exp(-a * math.log(m + b)) for m in counts]
    same(inverse_propensities(torch.tensor(counts), n, a, b), expected)
    same(propensities(torch.tensor(counts).float(), n, a, b), [1 / v for v in expected])


def test_constants_of_the_field():
    assert PROPENSITY_CONSTANTS == {"default": (0.55, 1.5), "wikipedia": (0.5, 0.4), "amazon": (0.6, 2.6)}
    counts = torch.tensor([0, 1, 20])
    assert torch.equal(inverse_propensities(counts, 1000), inverse_propensities(counts, 1000, 0.55, 1.5))


I2, P2 = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0], [1]])
Q3 = torch.ones(3)
CSR = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (([[0, 1]], P2), ArgumentTypeError, "indices: expected a tensor"),
        ((I2.float(), P2), ArgumentTypeError, "indices: expected int64 or int32"),
        ((I2[0], P2), ArgumentError, r"indices: expected shape \(N, k\)"),
        ((I2[:, :0], P2), ArgumentError, r"indices: expected shape \(N, k\)"),
        ((I2.to("meta"), P2), ArgumentError, "positives: expected device meta"),
        ((I2 - 2, P2), IndexError, "indices: expected class indices"),
        ((I2, P2 - 100), IndexError, "positives: expected class indices"),
        ((I2, P2[:1]), ArgumentError, "positives: expected 2 rows"),
        ((I2, P2[:, 0]), ArgumentError, "positives: expected 2 rows"),
        ((I2, P2.to(torch.uint8)), ArgumentTypeError, "multi-hot"),
        ((I2, torch.zeros(2, 2)), IndexError, r"indices: expected class indices in \[0, 2\)"),
        ((I2, P2.to_sparse()), ArgumentTypeError, "to_sparse_csr"),
        ((I2, [[0], [1], [2]]), ArgumentTypeError, "got 3 of them"),
        ((I2, None), ArgumentTypeError, "got NoneType"),
        ((I2, (CSR, P2[:, 0].float())), ArgumentTypeError, r"positives \(indices\): expected int64"),
        ((I2, (CSR, P2)), ArgumentError, r"expected indptr \(3,\)"),
        ((I2, (CSR[:2], P2[:, 0])), ArgumentError, r"expected indptr \(3,\)"),
        ((I2, (CSR + 1, P2[:, 0])), ArgumentError, "rise from 0 to 2"),
        ((I2, (CSR * 2, P2[:, 0])), ArgumentError, "rise from 0 to 2"),
        ((I2, (torch.tensor([0, 3, 2]), P2[:, 0])), ArgumentError, "rise from 0 to 2"),
        ((I2, P2, Q3.long()), ArgumentError, "inverse_propensity: expected a floating-point"),
        ((I2, P2, Q3[None]), ArgumentError, "inverse_propensity: expected a floating-point"),
        ((I2, P2, [1.0]), ArgumentTypeError, "inverse_propensity: expected a tensor"),
        ((I2, P2, Q3.to("meta")), ArgumentError, "inverse_propensity: expected device cpu"),
        ((I2, P2, Q3[:2]), IndexError, r"indices: expected class indices in \[0, 2\)"),
        ((I2, P2 + 2, Q3), IndexError, r"positives: expected class indices in \[0, 3\)"),
        ((I2, torch.zeros(2, 4), Q3), ArgumentError, r"inverse_propensity: expected shape \(4,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, kind, words):
    with pytest.raises(kind, match=words):
        (psp_at_k if len(arguments) == 3 else precision_at_k)(*arguments)


def test_refusals_of_the_accumulator_and_the_propensities():
    with pytest.raises(ArgumentTypeError, match="k: expected an integer"):
        MultiLabelMetrics(5.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="k: expected at least 1"):
        MultiLabelMetrics(0)
    with pytest.raises(ArgumentError, match="inverse_propensity"):
        MultiLabelMetrics(5, torch.ones(2, 2))
    with pytest.raises(ArgumentError, match="call update"):
        MultiLabelMetrics().compute()
    with pytest.raises(ArgumentError, match="at least k = 3 columns"):
        MultiLabelMetrics(3).update(I2, P2)
    for arguments, words in [
        ((Q3[None], 10), "label_counts"),
        ((Q3, 2), "num_samples"),
        ((Q3, 10.0), "num_samples"),
        ((Q3, 10, 0.0), "a, b"),
        ((Q3, 10, 0.5, math.nan), "a, b"),
        ((torch.tensor([3, -1]), 10), "label_counts: expected finite counts >= 0"),
        ((torch.tensor([3.0, math.nan]), 10), "label_counts: expected finite counts >= 0"),
        ((torch.tensor([math.inf]), 10), "label_counts: expected finite counts >= 0"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            inverse_propensities(*arguments)
    with pytest.raises(ArgumentTypeError, match="label_counts"):
        inverse_propensities(Q3.bool(), 10)

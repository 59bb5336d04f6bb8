"""Metrics of extreme multi-label classification, from the top k classes of each row and its sparse positives.

Row i predicts classes c_i1, c_i2, ..., best first, and has the set of positives P_i. With y_ir = [c_ir in P_i], q_j = 1/p_j the inverse
propensity of class j, d_r = 1 / log2(r + 1), D(m) = d_1 + ... + d_m, and b_i1 >= b_i2 >= ... the q_j of P_i in descending order
(0 after the last), over N rows:

    P@k      = 1/N sum_i 1/k sum_{r<=k} y_ir
    nDCG@k   = 1/N sum_i 1/D(min(k, |P_i|)) sum_{r<=k} d_r y_ir
    recall@k = 1/N sum_i 1/|P_i| sum_{r<=k} y_ir
    PSP@k    = sum_i sum_{r<=k} q_{c_ir} y_ir  /  sum_i sum_{r<=k} b_ir
    PSnDCG@k = sum_i 1/D(min(k, |P_i|)) sum_{r<=k} d_r q_{c_ir} y_ir  /  sum_i 1/D(min(k, |P_i|)) sum_{r<=k} d_r b_ir

These are the definitions of the Extreme Classification Repository (Bhatia et al., 2016) and of its tool pyxclib. As there, a row without
positives counts in N and adds 0 to every sum, and the propensity-scored metrics are ratios of sums over the whole set, so that their
value is not the mean of the values of batches: `MultiLabelMetrics` keeps the sums.

Positives come in any of these forms:

    (N, K) int64 or int32       class indices, -1 is none. (A multi-hot matrix of integers would be read as indices: make it bool.)
    (indptr (N+1,), indices)    a pair of int64 or int32 tensors in compressed rows, as in scipy.sparse.csr_matrix
    sparse CSR tensor (N, C)    positive where a stored value is not 0
    (N, C) bool or floating     multi-hot, positive where not 0

A class that stands twice in a row counts once, among the positives as among the predictions. Memory is O(N k + number of positives):
keys j N + i of the positives are sorted once and those of the predictions looked up. On CUDA nothing waits for the device, except to
count the entries of a multi-hot matrix. Sums are float64 (float32 on MPS, which has no float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.losses.inputs import INDEX_DTYPES, check_tensor

Positives: TypeAlias = Tensor | Sequence[Tensor]

PROPENSITY_CONSTANTS = {"default": (0.55, 1.5), "wikipedia": (0.5, 0.4), "amazon": (0.6, 2.6)}
"""(a, b) of `propensities` as Jain et al. fitted them."""

_NO_KEY = torch.iinfo(torch.int64).max  # sorts behind every key j N + i


def precision_at_k(indices: Tensor, positives: Positives) -> Tensor:
    """P@1 ... P@k: the share of the first k predictions that are positives.

    Args:
        indices: (N, k) int64 or int32, the top classes of each row, best first, as `linear_topk` returns; -1 predicts nothing.
        positives: N rows in any form of this module.

    Returns:
        (k,), the metric at 1 ... k; float64. NaN of no rows.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit. IndexError: an index below -1, or outside the classes known
            (on CUDA a device assertion).

    Example:
        >>> _, classes = bigclass.linear_topk(features, weight, 5)
        >>> precision_at_k(classes, labels)[4]  # P@5
    """
    return _ratio(_precision(_match(indices, positives)))


def ndcg_at_k(indices: Tensor, positives: Positives) -> Tensor:
    """nDCG@1 ... nDCG@k: discounted gain over that of an ideal ranking. Arguments, result and errors as `precision_at_k`."""
    return _ratio(_ndcg(_match(indices, positives)))


def recall_at_k(indices: Tensor, positives: Positives) -> Tensor:
    """recall@1 ... recall@k: the share of the positives that are predicted. Arguments, result and errors as `precision_at_k`."""
    return _ratio(_recall(_match(indices, positives)))


def psp_at_k(indices: Tensor, positives: Positives, inverse_propensity: Tensor) -> Tensor:
    """PSP@1 ... PSP@k: precision with hits weighted by inverse propensity, over the best that could be had.

    Args:
        indices, positives: as `precision_at_k`.
        inverse_propensity: (C,) floating point, from `inverse_propensities`. (Not the propensities: those would favour common classes.)

    Returns, raises: as `precision_at_k`; NaN where no row has positives.
    """
    return _ratio(_psp(_match(indices, positives, inverse_propensity)))


def psndcg_at_k(indices: Tensor, positives: Positives, inverse_propensity: Tensor) -> Tensor:
    """PSnDCG@1 ... PSnDCG@k: nDCG with gains of inverse propensity, over the best that could be had. Arguments as `psp_at_k`."""
    return _ratio(_psndcg(_match(indices, positives, inverse_propensity)))


def inverse_propensities(label_counts: Tensor, num_samples: int, a: float = 0.55, b: float = 1.5) -> Tensor:
    r"""q_j = 1 + (log N - 1) (b + 1)^a (n_j + b)^-a: how much a hit of a class counts, given that rare labels go missing more often.

    (a, b) is (0.5, 0.4) for Wikipedia data, (0.6, 2.6) for Amazon data, (0.55, 1.5) otherwise (`PROPENSITY_CONSTANTS`).

    Args:
        label_counts: (C,), n_j, in how many *training* samples class j is a positive.
        num_samples: N, the number of training samples.

    Returns:
        (C,) float64 on label_counts' device (float32 on MPS).

    Raises:
        ValueError, TypeError: a shape, dtype or number that does not fit; counts that are negative or not finite (on CUDA a device
            assertion).

    Source: Jain, Prabhu, Varma, "Extreme multi-label loss functions for recommendation, tagging, ranking & other missing label
    applications", KDD 2016, section 5.

    Example:
        >>> q = inverse_propensities(torch.bincount(labels.flatten(), minlength=C), num_samples=N)
    """
    check_tensor("label_counts", label_counts)
    if label_counts.dim() != 1:
        raise ArgumentError(f"label_counts: expected shape (C,), got {tuple(label_counts.shape)}")
    if label_counts.dtype == torch.bool or label_counts.is_complex():
        raise ArgumentTypeError(f"label_counts: expected integers or floating point, got {label_counts.dtype}")
    if isinstance(num_samples, float) or num_samples < 3:
        raise ArgumentError(f"num_samples: expected an integer >= 3 (the model needs log N > 1), got {num_samples}")
    if not (0 < a < math.inf and 0 < b < math.inf):
        raise ArgumentError(f"a, b: expected positive numbers, got {a}, {b}")
    counts = label_counts.to(_wide(label_counts.device))
    _require(((counts >= 0) & (counts < math.inf)).all(), ArgumentError("label_counts: expected finite counts >= 0, got others (or NaN)"))
    return 1.0 + (math.log(num_samples) - 1.0) * (b + 1.0) ** a * (counts + b) ** -a


def propensities(label_counts: Tensor, num_samples: int, a: float = 0.55, b: float = 1.5) -> Tensor:
    """p_j = 1 / q_j, the modelled chance that a positive of class j was labelled at all. As `inverse_propensities`."""
    return 1.0 / inverse_propensities(label_counts, num_samples, a, b)


class MultiLabelMetrics:
    """The metrics over many batches, exactly as over all rows at once: sums of numerators and denominators are kept, on the device.

    Args:
        k: the metrics at 1 ... k are made.
        inverse_propensity: (C,); with it PSP and PSnDCG too.

    Attributes:
        sums: (metrics, 2, k) numerators and denominators, None before the first batch. To merge ranks, all_reduce it before `compute`.

    Raises:
        ValueError, TypeError: a k or inverse_propensity that does not fit.

    Example:
        >>> metrics = MultiLabelMetrics(k=5, inverse_propensity=inverse_propensities(counts, num_samples))
        >>> for features, labels in batches:
        ...     metrics.update(bigclass.linear_topk(features, weight, 5)[1], labels)
        >>> metrics.compute()["PSP@5"]
    """

    def __init__(self, k: int = 5, inverse_propensity: Tensor | None = None) -> None:
        if not isinstance(k, int):
            raise ArgumentTypeError(f"k: expected an integer, got {k!r}")
        if k < 1:
            raise ArgumentError(f"k: expected at least 1, got {k}")
        if inverse_propensity is not None:
            _check_inverse_propensity(inverse_propensity)
        self.k = k
        self.inverse_propensity = inverse_propensity
        self.sums: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics made: the keys of `compute` without @1 ... @k."""
        return ("P", "nDCG", "recall") if self.inverse_propensity is None else ("P", "nDCG", "recall", "PSP", "PSnDCG")

    def update(self, indices: Tensor, positives: Positives) -> None:
        """Add a batch: indices (N, k or more), of which the first k are taken, and positives, as for `precision_at_k`."""
        check_tensor("indices", indices)
        if indices.dim() == 2 and indices.shape[1] < self.k:
            raise ArgumentError(
                f"indices: expected at least k = {self.k} columns, got {tuple(indices.shape)}; "
                "where there are fewer classes than k, pad with -1 (a prediction of nothing) or lower k"
            )
        if self.inverse_propensity is not None:
            self.inverse_propensity = self.inverse_propensity.to(indices.device)
        rows = _match(indices[:, : self.k] if indices.dim() == 2 else indices, positives, self.inverse_propensity)
        new = torch.stack([torch.stack(_METRICS[name](rows)) for name in self.names])
        self.sums = new if self.sums is None else self.sums + new.to(self.sums.device)

    def compute(self) -> dict[str, float]:
        """{"P@1": ..., "P@2": ..., ...} over all batches since the start or the last `reset`. NaN where a metric has no rows."""
        if self.sums is None:
            raise ArgumentError("MultiLabelMetrics: nothing to compute; call update(indices, positives) first")
        values = (self.sums[:, 0] / self.sums[:, 1]).tolist()
        return {f"{name}@{r}": value for name, row in zip(self.names, values, strict=True) for r, value in enumerate(row, 1)}

    def reset(self) -> None:
        """Forget all batches."""
        self.sums = None


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the metrics are arithmetic on."""

    hits: Tensor  # (N, k) y_ir, 0.0 or 1.0
    counts: Tensor  # (N,) |P_i|
    gains: Tensor  # (N, k) q_{c_ir} y_ir; hits without propensities
    best: Tensor  # (N, k) b_ir; empty without propensities

    def ranks(self) -> Tensor:
        """(k,) 1 ... k."""
        return torch.arange(1, self.hits.shape[1] + 1, device=self.hits.device)

    def dcg(self, gains: Tensor) -> Tensor:
        """(k,) the sum over rows of the DCG of gains (N, k) at 1 ... k, each over the D of its row."""
        discounts = 1.0 / torch.log2(self.ranks().to(gains.dtype) + 1.0)
        ideal = _running(discounts)[torch.minimum(self.ranks(), self.counts.clamp(min=1).unsqueeze(1)) - 1]  # (N, k)
        return (_running(gains * discounts) / ideal).sum(0)


# Each: (k,) numerators and (k,) denominators, which add up over batches.


def _precision(rows: _Rows) -> tuple[Tensor, Tensor]:
    return _running(rows.hits.sum(0)), rows.hits.shape[0] * rows.ranks().to(rows.hits.dtype)


def _ndcg(rows: _Rows) -> tuple[Tensor, Tensor]:
    return rows.dcg(rows.hits), _row_count(rows)


def _recall(rows: _Rows) -> tuple[Tensor, Tensor]:
    return _running((rows.hits / rows.counts.clamp(min=1).unsqueeze(1)).sum(0)), _row_count(rows)


def _psp(rows: _Rows) -> tuple[Tensor, Tensor]:
    return _running(rows.gains.sum(0)), _running(rows.best.sum(0))


def _psndcg(rows: _Rows) -> tuple[Tensor, Tensor]:
    return rows.dcg(rows.gains), rows.dcg(rows.best)


_METRICS = {"P": _precision, "nDCG": _ndcg, "recall": _recall, "PSP": _psp, "PSnDCG": _psndcg}


def _running(t: Tensor) -> Tensor:
    """Sums of the first 1 ... k of (..., k). Not cumsum, which torch refuses on CUDA when told to be deterministic."""
    k = t.shape[-1]
    return t @ t.new_ones(k, k).triu()


def _row_count(rows: _Rows) -> Tensor:
    return torch.full_like(rows.ranks(), rows.hits.shape[0], dtype=rows.hits.dtype)


def _ratio(parts: tuple[Tensor, Tensor]) -> Tensor:
    return parts[0] / parts[1]


def _match(indices: Tensor, positives: Positives, inverse_propensity: Tensor | None = None) -> _Rows:
    """Look the predictions up among the positives."""
    check_tensor("indices", indices)
    if indices.dtype not in INDEX_DTYPES:
        raise ArgumentTypeError(f"indices: expected int64 or int32 class indices, got {indices.dtype}")
    if indices.dim() != 2 or indices.shape[1] < 1:
        raise ArgumentError(f"indices: expected shape (N, k) with k >= 1, got {tuple(indices.shape)}; flatten leading axes first")
    n, k = indices.shape
    if inverse_propensity is not None:
        _check_inverse_propensity(inverse_propensity)
        _check_device("inverse_propensity", inverse_propensity, indices)
    at, of, classes = _entries(positives, indices)
    if inverse_propensity is not None:
        if classes not in (None, inverse_propensity.shape[0]):
            raise ArgumentError(f"inverse_propensity: expected shape ({classes},), C of positives, got {tuple(inverse_propensity.shape)}")
        classes = inverse_propensity.shape[0]
    _check_range("indices", indices, classes)
    _check_range("positives", of, classes)

    keys = torch.where(of < 0, _NO_KEY, of.long() * n + at).sort().values
    keys = torch.cat((keys, keys.new_full((1,), _NO_KEY)))  # so that there is always one to look at
    first = torch.cat((keys.new_ones(1, dtype=torch.bool), keys[1:] != keys[:-1])) & (keys != _NO_KEY)
    at = torch.where(first, keys % max(n, 1), n)  # row N is dropped
    counts = keys.new_zeros(n + 1).scatter_add_(0, at, first.long())[:n]

    wanted = torch.where(indices < 0, -1, indices.long() * n + torch.arange(n, device=indices.device).unsqueeze(1))  # (N, k)
    found = keys[torch.searchsorted(keys, wanted).clamp(max=keys.shape[0] - 1)] == wanted
    hits = (found & ~_repeated(indices)).to(_wide(indices.device))
    if inverse_propensity is None:
        return _Rows(hits, counts, hits, hits[:, :0])
    q = inverse_propensity.to(hits.dtype)
    gains = hits * q[indices.clamp(min=0)]
    return _Rows(hits, counts, gains, _best(q[torch.where(first, keys // max(n, 1), 0)], at, counts, k))


def _best(values: Tensor, at: Tensor, counts: Tensor, k: int) -> Tensor:
    """(N, k): the k largest of the values (M,) that belong to each row, in descending order, 0 after the last. at = N: to none."""
    order = values.argsort(descending=True)
    order = order[at[order].argsort(stable=True)]  # by row, then by value
    values, at = values[order], at[order]
    n = counts.shape[0]
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))  # (N + 1,)
    rank = torch.arange(at.shape[0], device=at.device) - starts[at]
    slot = torch.where((at < n) & (rank < k), at * k + rank, n * k)
    return values.new_zeros(n * k + 1).scatter_(0, slot, values)[:-1].reshape(n, k)


def _repeated(indices: Tensor) -> Tensor:
    """(N, k) bool: where a class stands that its row has predicted before."""
    ordered, order = indices.sort(dim=1, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(again).scatter_(1, order, again)


def _entries(positives: Positives, indices: Tensor) -> tuple[Tensor, Tensor, int | None]:
    """(row (M,), class (M,)) of every entry of the positives, class -1 where it is none, and C where the form tells it."""
    n = indices.shape[0]
    if isinstance(positives, Sequence) and len(positives) == 2:
        return _csr_rows(positives[0], positives[1], indices), positives[1], None
    if not isinstance(positives, Tensor):
        got = f"{len(positives)} of them" if isinstance(positives, Sequence) else type(positives).__name__
        raise ArgumentTypeError(f"positives: expected a tensor or a pair (indptr, indices), got {got}; see bigclass.metrics for the forms")
    _check_device("positives", positives, indices)
    if positives.dim() != 2 or positives.shape[0] != n:
        raise ArgumentError(f"positives: expected {n} rows as indices {tuple(indices.shape)}, got shape {tuple(positives.shape)}")
    width = positives.shape[1]
    if positives.layout == torch.sparse_csr:
        of = positives.col_indices()
        return _csr_rows(positives.crow_indices(), of, indices), torch.where(positives.values() != 0, of, -1), width
    if positives.layout != torch.strided:
        raise ArgumentTypeError(f"positives: expected a dense or a sparse CSR tensor, got {positives.layout}; use .to_sparse_csr()")
    if positives.dtype in INDEX_DTYPES:
        return torch.arange(n, device=indices.device).repeat_interleave(width, output_size=n * width), positives.reshape(-1), None
    if positives.dtype != torch.bool and not positives.is_floating_point():
        raise ArgumentTypeError(
            f"positives: expected int64 or int32 class indices (N, K), or a bool or floating-point multi-hot (N, C), got {positives.dtype}"
        )
    at, of = positives.nonzero(as_tuple=True)
    return at, of, width


def _csr_rows(indptr: Tensor, of: Tensor, indices: Tensor) -> Tensor:
    """(M,) the row of each entry of compressed rows."""
    n = indices.shape[0]
    for name, t in (("positives (indptr)", indptr), ("positives (indices)", of)):
        check_tensor(name, t)
        if t.dtype not in INDEX_DTYPES:
            raise ArgumentTypeError(f"{name}: expected int64 or int32, got {t.dtype}")
        _check_device(name, t, indices)
    if of.dim() != 1 or indptr.shape != (n + 1,):
        raise ArgumentError(
            f"positives: expected indptr ({n + 1},) for the {n} rows of indices, and indices (M,); "
            f"got {tuple(indptr.shape)} and {tuple(of.shape)}"
        )
    rises = (indptr[0] == 0) & (indptr[-1] == of.shape[0]) & (indptr[1:] >= indptr[:-1]).all()
    _require(rises, ArgumentError(f"positives (indptr): expected to rise from 0 to {of.shape[0]}, the number of its indices"))
    entries = torch.arange(of.shape[0], device=of.device, dtype=indptr.dtype)
    return torch.searchsorted(indptr.contiguous(), entries, right=True) - 1


def _check_inverse_propensity(q: Tensor) -> None:
    check_tensor("inverse_propensity", q)
    if q.dim() != 1 or q.shape[0] < 1 or not q.is_floating_point():
        raise ArgumentError(f"inverse_propensity: expected a floating-point tensor of shape (C,), got {q.dtype} {tuple(q.shape)}")


def _check_device(name: str, t: Tensor, indices: Tensor) -> None:
    if t.device != indices.device:
        raise ArgumentError(f"{name}: expected device {indices.device} (that of indices), got {t.device}")


def _check_range(name: str, t: Tensor, classes: int | None) -> None:
    """Raise for an index below -1 or, where C is known, from C on."""
    fine = (t >= -1) if classes is None else (t >= -1) & (t < classes)
    end = "C" if classes is None else classes
    _require(fine.all(), IndexError(f"{name}: expected class indices in [0, {end}), or -1 for none, got others"))


def _require(condition: Tensor, error: Exception) -> None:
    """Raise unless the condition () holds; on CUDA an assertion of the device, which nothing waits for."""
    if condition.device.type == "cuda":
        torch._assert_async(condition, str(error))  # pyright: ignore[reportPrivateImportUsage]
    elif not condition:
        raise error


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64

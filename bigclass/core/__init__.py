"""The one op and its vocabulary: streams, maps, folds, row losses."""

from bigclass.core.compare import compare_rows, compare_sum
from bigclass.core.divergences import Divergence, register_divergence
from bigclass.core.explanation import explain
from bigclass.core.folds import (
    Dot,
    Fold,
    LogSumExp,
    ShiftedMoment,
    SumFold,
    Tile,
    Total,
    entropy,
    log_sum,
    log_sum_exp,
    register_fold,
)
from bigclass.core.norms import inverse_norms
from bigclass.core.op import reduce_logits, stream_loss
from bigclass.core.plan import Plan, planning
from bigclass.core.row_losses import register_row_loss
from bigclass.core.stream import Map, Scale, Softcap, Stream, register_map
from bigclass.core.topk import TopK

__all__ = [
    "Divergence",
    "Dot",
    "Fold",
    "LogSumExp",
    "Map",
    "Plan",
    "Scale",
    "ShiftedMoment",
    "Softcap",
    "Stream",
    "SumFold",
    "Tile",
    "TopK",
    "Total",
    "compare_rows",
    "compare_sum",
    "entropy",
    "explain",
    "inverse_norms",
    "log_sum",
    "log_sum_exp",
    "planning",
    "reduce_logits",
    "register_divergence",
    "register_fold",
    "register_map",
    "register_row_loss",
    "stream_loss",
]

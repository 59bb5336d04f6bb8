"""Classification layers over huge numbers of classes: logits are streamed through a small statistic and never stored."""

from typing import Any

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.plan import Plan, explain, planning
from bigclass.heads import CCEHead, LazyLogits, LMHead, LogitsWarning
from bigclass.heads.criteria import convert_criterion
from bigclass.integrations import convert_head, restore_head
from bigclass.losses.cross_entropy import linear_cross_entropy, linear_poly_cross_entropy
from bigclass.losses.log_prob import linear_log_prob, linear_logsumexp, linear_topk
from bigclass.losses.softmax import Stats
from bigclass.losses.targets import SparseTarget

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CCEHead",
    "LMHead",
    "LazyLogits",
    "LogitsWarning",
    "Plan",
    "SparseTarget",
    "Stats",
    "convert_criterion",
    "convert_head",
    "explain",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_logsumexp",
    "linear_poly_cross_entropy",
    "linear_topk",
    "planning",
    "restore_head",
]


def __getattr__(name: str) -> Any:
    if name in ("SparseMixup", "SparseFastCollateMixup"):  # subclasses of timm's, which is imported for them alone
        from bigclass.integrations import timm

        return getattr(timm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

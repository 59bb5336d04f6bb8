"""Classification layers over huge numbers of classes: logits are streamed through a small statistic and never stored."""

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.plan import Plan, explain, planning
from bigclass.heads import CCEHead, LazyLogits, LMHead, LogitsWarning
from bigclass.losses.cross_entropy import linear_cross_entropy
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
    "explain",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_logsumexp",
    "linear_topk",
    "planning",
]

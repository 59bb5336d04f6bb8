"""Classification layers over huge numbers of classes: logits are streamed through a small statistic and never stored."""

from typing import Any

from bigclass import metrics, optim
from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.explanation import explain
from bigclass.core.plan import Plan, planning
from bigclass.core.triton_form import triton_form
from bigclass.core.updates import GradAccumulator
from bigclass.gradient_cache import cached_step
from bigclass.heads import (
    CCEHead,
    ContrastiveHead,
    LazyLogits,
    LMHead,
    LogitsWarning,
    MarginHead,
    MultiLabelHead,
    cosine_temperature,
)
from bigclass.heads.criteria import convert_criterion
from bigclass.heads.sharding import class_parallel, shard_classes
from bigclass.integrations import convert_head, restore_head
from bigclass.losses.contrastive import contrastive_loss, sigmoid_contrastive_loss
from bigclass.losses.cross_entropy import linear_cross_entropy, linear_poly_cross_entropy
from bigclass.losses.distill import linear_kl_div, linear_topk_kl_div
from bigclass.losses.elementwise import ElementwiseLoss, register_elementwise_loss
from bigclass.losses.log_prob import linear_log_prob, linear_logsumexp, linear_sequence_log_prob, linear_topk
from bigclass.losses.margin import linear_margin_loss
from bigclass.losses.multi_token import linear_multi_token_cross_entropy
from bigclass.losses.multilabel import (
    TopClasses,
    linear_asymmetric_loss,
    linear_binary_cross_entropy,
    linear_elementwise_loss,
    linear_focal_loss,
    linear_squared_hinge_loss,
    linear_zlpr_loss,
)
from bigclass.losses.positives import pad_positives
from bigclass.losses.sampling import ClassSampling
from bigclass.losses.softmax import Stats
from bigclass.losses.targets import SparseTarget
from bigclass.memory_plan import MemoryPlan, largest_class_count, longest_sequence, plan_memory
from bigclass.mini_sequence import mini_sequence, restore_mini_sequence
from bigclass.parallel.layer import Spread

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CCEHead",
    "ClassSampling",
    "ContrastiveHead",
    "ElementwiseLoss",
    "GradAccumulator",
    "LMHead",
    "LazyLogits",
    "LogitsWarning",
    "MarginHead",
    "MemoryPlan",
    "MultiLabelHead",
    "Plan",
    "SparseTarget",
    "Spread",
    "Stats",
    "TopClasses",
    "cached_step",
    "class_parallel",
    "contrastive_loss",
    "convert_criterion",
    "convert_head",
    "cosine_temperature",
    "explain",
    "largest_class_count",
    "linear_asymmetric_loss",
    "linear_binary_cross_entropy",
    "linear_cross_entropy",
    "linear_elementwise_loss",
    "linear_focal_loss",
    "linear_kl_div",
    "linear_log_prob",
    "linear_logsumexp",
    "linear_margin_loss",
    "linear_multi_token_cross_entropy",
    "linear_poly_cross_entropy",
    "linear_sequence_log_prob",
    "linear_squared_hinge_loss",
    "linear_topk",
    "linear_topk_kl_div",
    "linear_zlpr_loss",
    "longest_sequence",
    "metrics",
    "mini_sequence",
    "optim",
    "pad_positives",
    "plan_memory",
    "planning",
    "register_elementwise_loss",
    "restore_head",
    "restore_mini_sequence",
    "shard_classes",
    "sigmoid_contrastive_loss",
    "triton_form",
]


def __getattr__(name: str) -> Any:
    if name in ("SparseMixup", "SparseFastCollateMixup"):  # subclasses of timm's, which is imported for them alone
        from bigclass.integrations import timm

        return getattr(timm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Heads: nn.Modules whose classifier never materialises its logits in training."""

from bigclass.heads.contrastive import ContrastiveHead, cosine_temperature
from bigclass.heads.lazy import LazyLogits, LogitsWarning
from bigclass.heads.linear import CCEHead, LMHead
from bigclass.heads.margin import MarginHead
from bigclass.heads.multilabel import MultiLabelHead

__all__ = ["CCEHead", "ContrastiveHead", "LMHead", "LazyLogits", "LogitsWarning", "MarginHead", "MultiLabelHead", "cosine_temperature"]

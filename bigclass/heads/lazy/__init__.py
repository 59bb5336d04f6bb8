"""Lazy logits: what a head returns in training instead of N x C numbers."""

import bigclass.heads.lazy.functions  # noqa: F401  (fills the table of torch functions that lazy logits answer)
from bigclass.heads.lazy.base import LogitsWarning
from bigclass.heads.lazy.logits import LazyLogits, lazy_logits

__all__ = ["LazyLogits", "LogitsWarning", "lazy_logits"]

"""Heads: nn.Modules whose classifier never materialises its logits in training."""

from bigclass.heads.linear import CCEHead, LMHead

__all__ = ["CCEHead", "LMHead"]

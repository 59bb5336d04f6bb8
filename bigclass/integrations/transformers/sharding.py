"""A transformers model's vocabulary spread over ranks: its output embeddings, and its input embeddings where they are the same weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from bigclass.core.errors import ArgumentError
from bigclass.heads.linear import LinearHead
from bigclass.heads.sharding import shard_classes
from bigclass.integrations.transformers.heads import base_model, output_head


def shard_vocabulary(model: Any, mesh: Any, *, gradients: str = "mean") -> Any:
    """Spread the vocabulary of a converted transformers model over the ranks of a mesh axis, in place; the same batch on all of them.

    The output embeddings become a sharded head (`bigclass.shard_classes`). If the input embeddings are tied to them, they look up what
    each rank has and add up (torch's RowwiseParallel), and stay tied: one DTensor. Before the optimizer is made, and before fully_shard
    over another axis; other layers may be sharded by parallelize_module as ever.

    Args:
        model: after `bigclass.convert_head(model)`. mesh: a DeviceMesh of one axis. gradients: as in `bigclass.Spread`.

    Raises:
        ValueError: a model that is not converted, or whose head's weight something else shares.

    Example:
        >>> model = bigclass.convert_head(AutoModelForCausalLM.from_pretrained(name))
        >>> bigclass.integrations.transformers.shard_vocabulary(model, mesh["tp"])
        >>> loss = model(input_ids=ids, labels=ids).loss
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    inner = base_model(model)
    head = output_head(inner)
    if not isinstance(head, LinearHead):
        raise ArgumentError("model: expected one whose head is converted; call bigclass.convert_head(model) first")
    embedding = inner.get_input_embeddings()
    tied = getattr(embedding, "weight", None) is head.weight
    others = [name for name, p in inner.named_parameters(remove_duplicate=False) if p is head.weight]
    if len(others) > 1 + tied:
        raise ArgumentError(f"model: its head's weight is shared by {others}, of which only the input embeddings can be sharded with it")
    if tied and not isinstance(embedding, nn.Embedding):
        raise ArgumentError(f"model: expected tied input embeddings that are an nn.Embedding, got {type(embedding).__name__}")
    shard_classes(head, mesh, gradients=gradients)
    if tied:
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()))
        embedding.weight = head.weight
    return model

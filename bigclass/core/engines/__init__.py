"""Engines: the ways to run the one op.

dense.py materialises the logits under plain autograd. An engine that streams is a module with four functions,

    reduce(stream, picks, keep, folds, plan)                                      -> states, picked
    reduce_backward(stream, picks, keep, folds, plan, states, grads, h, needs)    -> gradients
    stream_loss(stream, picks, keep, folds, row_loss, args, plan, needs)          -> loss, gradients
    slab_loss(stream, picks, keep, folds, observed, row_loss, args, plan, needs)  -> loss, states of the observed, gradients

(the fused one's first two also take what `room_for(stream, classes)` made room for: logits that the forward saves for the backward)
and is found here by name, imported when first used (so that Triton is, too). pair.py is what the tiled engine does for two streams.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

STREAMING = {"tiled": "bigclass.core.engines.tiled", "fused": "bigclass.core.engines.fused"}


def streaming_engine(name: str) -> ModuleType:
    """The module of a streaming engine."""
    return import_module(STREAMING[name])

r"""Mini-sequences: the MLPs of a transformer, chunk by chunk of tokens.

An MLP keeps several tensors of N tokens x its inner width for the backward, the largest activations of a layer. But it is token-wise,
y_i = f(x_i), so it can run over chunks x_1 ... x_n of the tokens, each with a checkpoint of its own:

    forward    y_c = f(x_c)                        keeps x_c alone (a view), and y_c
    backward   f(x_c) again, dx_c, and dw += dw_c   one chunk's inner activations stand at a time

A loop alone does not do it: autograd keeps every chunk's activations, and only what is freed on the way anyway gets smaller. The price is
the forward again without its last product: a gated MLP makes 11 products a step instead of 9, a plain one 7 instead of 6. A head over many
classes is streamed already.

Luo et al., "Mini-Sequence Transformer: Optimizing Intermediate Memory for Long Sequences Training", arXiv:2407.15892.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.integrations import unwrapped
from bigclass.mini_sequence.chunks import Chunks, chunk, settings, unchunk
from bigclass.mini_sequence.find import find, named
from bigclass.parallel.groups import Ranks

__all__ = ["mini_sequence", "restore_mini_sequence"]

Model = TypeVar("Model", bound=nn.Module)


def mini_sequence(
    model: Model,
    chunk_tokens: int,
    *,
    modules: Sequence[str | nn.Module] | None = None,
    fp32_gradients: bool = False,
    group: Any = None,
) -> Model:
    r"""Run the token-wise modules of a model (its MLPs) in chunks of tokens, in place, and return the model.

        y = cat(f(x_1), ..., f(x_n)),    dx = cat(dx_1, ..., dx_n),    dw = sum of dw_c over the chunks

    with the activations inside f of one chunk in memory instead of all n. Loss and gradients are those of the model as it was, up to the
    order of sums. Parameters, names, hooks and checkpoints stay as they are.

    Args:
        model: a transformers or timm model, or any other. Wrappers of torch.compile and DistributedDataParallel are looked into.
        chunk_tokens: how many tokens a chunk has at most. All axes but the last count: a batch (B, S, D) has B S tokens. They are cut into
            the fewest chunks that will do, of nearly equal size. A module that gets no more tokens than this runs as ever.
        modules: names (as of `named_modules`) or modules to convert; by default all that are found: two or more linear layers with
            activations, dropout, norms over the last axis, in a layer that has norms of the same width; or the token-wise method of a
            layer (`feed_forward_chunk` of BERT and others, `_ff_block` of `torch.nn.TransformerEncoderLayer`).
        fp32_gradients: sum the gradients of half-precision weights over chunks in fp32 and round them once. Else each chunk's is rounded
            and added in the weight's dtype, as autograd does. Under autocast, too; fp32 weights are summed in fp32 without it.
        group: a ProcessGroup or DeviceMesh whose ranks run as many chunks as the one with the most tokens, some of them empty perhaps.
            Needed where collectives run once a chunk, that is where *parts* of these modules gather their own parameters (ZeRO-3; FSDP2
            with `fully_shard` on the linear layers). Sharded as a whole or with their block they gather once a call, and need none. It
            costs an exchange of a few numbers for every call.

    Returns:
        The same model. Calling it again changes the options of what is converted; `restore_mini_sequence(model)` undoes it.

    Raises:
        ValueError: nothing was found; a named module mixes tokens (batch norm, convolutions, token-mixing MLPs), has experts or an
            auxiliary loss, or cannot be tried, with the reason; a size below 1. In a call: a module got tensors whose token axes differ,
            or has parts that gather their parameters once a chunk and no group.
        TypeError: arguments of a wrong type. In a call: a module got tensors in a container, or returned anything but one tensor.

    Random numbers (dropout) and autocast are replayed in the backward, so that its gradients are of the loss that was returned. Masks are
    drawn chunk by chunk: with dropout they are others than without chunks, and as random. In evaluation, under no_grad, and where nothing
    needs a gradient the modules run as ever, in one call. Hooks of the module run once a call, those of its children once a chunk and
    again in the backward. Gradients reach a parameter once a backward, so DDP and optimizers in the backward see nothing new. Under FSDP2
    convert before `fully_shard`: what cannot be tried is judged by its name.

    A model that reads the weights inside a module without calling it is as it was. Layers that keep fc1 and fc2 themselves (OPT, BART) have
    no module to convert.

    Example:
        >>> model = bigclass.mini_sequence(bigclass.convert_head(model), chunk_tokens=4096)
        >>> model(input_ids=ids, labels=ids).loss.backward()  # one chunk of an MLP's activations, no logits

    Source: Luo et al., arXiv:2407.15892, section 3.
    """
    bare = _module(model)
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int):
        raise ArgumentTypeError(f"chunk_tokens: expected a whole number of tokens, got {type(chunk_tokens).__name__}")
    if chunk_tokens < 1:
        raise ArgumentError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
    if modules is not None and (isinstance(modules, str | nn.Module) or not isinstance(modules, Sequence)):
        raise ArgumentTypeError(f"modules: expected a list of names or modules, got {type(modules).__name__}; put it into a list")
    targets = find(bare) if modules is None else named(bare, modules)
    how = Chunks(chunk_tokens, bool(fp32_gradients), Ranks.of(group))
    for target in targets:
        chunk(target.module, target.method, how)
    return model


def restore_mini_sequence(model: Model) -> Model:
    """Undo `mini_sequence`, in place, and return the model: every module of it has its own class and forward again.

    Args:
        model: whatever was given to `mini_sequence`, or a part of it, or what stands around it. One without converted ones is left alone.

    Raises:
        TypeError: it is no module.

    Example:
        >>> model = bigclass.restore_mini_sequence(model)
    """
    for module in _module(model).modules():
        if settings(module) is not None:
            unchunk(module)
    return model


def _module(model: Any) -> Any:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected a module, got {type(model).__name__}")
    return unwrapped(model)

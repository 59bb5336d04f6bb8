"""The peers: plain torch, torch.compile, torch's own chunked function, and the field's libraries, each imported when its turn comes."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contrastive, one_vs_all
from .candidate import Call, Candidate, Loss, Pass, Unavailable, from_loss, need_memory, need_no_bias, need_no_softcap
from .data import Problem
from .shapes import Shape

DENSE = "dense"
CHUNKED_BEST = "torch chunked, best"

# Torch's own rule gives 128 to 256 rows on language models' heads; these are the ones worth trying beyond it.
ROW_CHUNKS = (256, 512, 1024, 2048, 4096)


def peers_for(shape: Shape) -> list[Candidate]:
    """The dense loss of `shape`, then everyone else who is not this library."""
    if shape.k:
        return []
    if shape.one_vs_all or shape.contrastive:
        pairs = Candidate("open_clip", "peer", "open_clip's module", from_loss(_open_clip))
        labels = Candidate("timm", "peer", "F.linear and timm's module", from_loss(_timm))
        return [
            Candidate(DENSE, "dense", "the loss of all logits in plain torch", from_loss(_dense_special)),
            pairs if shape.contrastive else labels,
        ]
    return [
        Candidate(DENSE, "dense", "F.linear and F.cross_entropy", from_loss(_dense)),
        Candidate("dense, compiled", "peer", "the same under torch.compile", _prepare_compiled),
        Candidate("torch chunked", "peer", "F.linear_cross_entropy, its own chunk rule", from_loss(_torch_chunked)),
        Candidate(
            CHUNKED_BEST, "peer", "the same, best of several chunks", from_loss(_torch_chunked),
            settings=ROW_CHUNKS, unit="rows",
        ),
        Candidate("liger", "peer", "liger-kernel", from_loss(_liger)),
        Candidate("quack", "peer", "quack-kernels", from_loss(_quack)),
        Candidate("cce", "peer", "cut-cross-entropy, its default filter", from_loss(_cce), exact=False),
        Candidate("cce, unfiltered", "peer", "cut-cross-entropy without its filter", from_loss(_cce_unfiltered)),
    ]  # fmt: skip


# Torch


def _dense(problem: Problem, _: int | None) -> Loss:
    # Logits, their log-softmax and its gradient are alive together.
    need_memory(problem, 3 * problem.input.element_size())
    softcap, bias = problem.shape.softcap, problem.bias

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(x, w, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, y)

    return loss


def _prepare_compiled(problem: Problem, which: Pass, setting: int | None) -> Call:
    reason = compiler_reason(problem.input.device.type)
    if reason is not None:
        raise Unavailable(reason)
    # Every problem compiles the same function again, and after a few sizes torch would go on without compiling.
    torch.compiler.reset()
    call = from_loss(lambda *of: torch.compile(_dense(*of), fullgraph=True, dynamic=False))(problem, which, setting)
    call()  # compiles: neither time nor memory of that is the loss's
    return call


@functools.cache
def compiler_reason(device: str) -> str | None:
    """Why torch.compile makes no code for this type of device here, None if it does: a C++ compiler may be missing, or Triton."""
    try:
        torch.compile(lambda x: x.exp().sum(), fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # the compiler's own, a missing header's, the linker's: whatever it is, there is no code
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile: {lines[0]}"
    return None


def _dense_special(problem: Problem, _: int | None) -> Loss:
    if problem.shape.contrastive:
        need_memory(problem, 5 * problem.input.element_size())
        return of_pairs(contrastive.dense_loss(problem.shape.loss))
    return _of_logits(problem, one_vs_all.DENSE[problem.shape.loss])


def of_pairs(loss: contrastive.Loss) -> Loss:
    """A contrastive loss as one of (input, linear_weight, target): the pairs stand in order."""
    return lambda x, w, _: loss(x, w)


def _of_logits(problem: Problem, of_logits: one_vs_all.Dense) -> Loss:
    """A loss of written-out logits and targets; the targets are made here, once."""
    # Targets, logits, their gradient and two tensors between.
    need_memory(problem, 5 * problem.input.element_size())
    targets = one_vs_all.dense_targets(problem.target, problem.shape.classes, problem.input.dtype)

    def loss(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
        return of_logits(F.linear(x, w), targets)

    return loss


def _torch_chunked(problem: Problem, chunk: int | None) -> Loss:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"needs torch 2.13 or later; this is {torch.__version__}")
    need_no_softcap(problem)
    if chunk is None:
        options = torch.nn.LinearCrossEntropyOptions()
    else:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return functools.partial(F.linear_cross_entropy, linear_bias=problem.bias, options=options)


# Libraries


def _timm(problem: Problem, _: int | None) -> Loss:
    try:
        return _of_logits(problem, one_vs_all.timm_loss(problem.shape.loss))
    except ImportError as error:
        raise Unavailable(f"{error} (pip install timm)") from error


def _open_clip(problem: Problem, _: int | None) -> Loss:
    need_memory(problem, 5 * problem.input.element_size())
    try:
        return of_pairs(contrastive.open_clip_loss(problem.shape.loss))
    except ImportError as error:
        raise Unavailable(f"{error} (pip install open_clip_torch)") from error


def _liger(problem: Problem, _: int | None) -> Loss:
    function = _gpu_peer(problem, "liger-kernel", "liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return functools.partial(function, softcap=problem.shape.softcap, **_bias(problem, function))


def _quack(problem: Problem, _: int | None) -> Loss:
    function = _gpu_peer(problem, "quack-kernels", "quack.linear_cross_entropy").chunked_linear_cross_entropy
    need_no_softcap(problem)
    need_no_bias(problem)
    return function


def _cce(problem: Problem, _: int | None, **options: Any) -> Loss:
    function = _gpu_peer(problem, "cut-cross-entropy", "cut_cross_entropy").linear_cross_entropy
    return functools.partial(function, softcap=problem.shape.softcap, **_bias(problem, function), **options)


def _cce_unfiltered(problem: Problem, setting: int | None) -> Loss:
    return _cce(problem, setting, filter_eps=None)


def _bias(problem: Problem, function: Callable[..., Any]) -> dict[str, Tensor]:
    """The problem's bias as an argument. Versions differ in whether they take one."""
    if problem.bias is None:
        return {}
    if "bias" not in inspect.signature(function).parameters:
        raise Unavailable("takes no bias")
    return {"bias": problem.bias}


def _gpu_peer(problem: Problem, package: str, module: str) -> ModuleType:
    """Import a peer that has GPU kernels only."""
    if problem.input.device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{error} (pip install {package})") from error

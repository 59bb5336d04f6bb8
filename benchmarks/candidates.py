"""Who computes the loss.

A candidate prepares a call for a problem; the call takes no arguments and returns what it computed:

    loss, "forward"             (loss,)                 no gradients wanted
    loss, "forward+backward"    (loss, dx, dw)
    prediction, "forward"       (values, indices)
    floor                       ()                      the bare matrix products, into memory that is already there

One that cannot run here raises `Unavailable` with the reason, which is reported. Some have a setting (rows of a chunk, classes of a tile)
whose best value depends on the machine: they offer several, and the fastest one competes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import bigclass
from bigclass.core.engines.support import device_reason

from . import contrastive, one_vs_all
from .data import Problem
from .machine import GIB, free_memory
from .shapes import Shape

Pass = Literal["forward", "forward+backward"]
LOSS_PASSES: tuple[Pass, ...] = ("forward", "forward+backward")

Role = Literal["floor", "dense", "peer", "bigclass"]
Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # input (N, D), linear_weight (C, D), target (N,) or labels (N, K) -> mean loss ()

FLOOR = "bare GEMM"
FLOOR_FP32 = "bare GEMM fp32"
DENSE = "dense"

# Torch's own rule gives 128 to 256 rows on language models' heads; these are the ones worth trying beyond it.
ROW_CHUNKS = (256, 512, 1024, 2048, 4096)
CLASS_TILES = (4096, 16384, 65536)


class Unavailable(Exception):
    """A candidate cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute the same thing.

    what: a sentence for the report. prepare: (problem, pass, setting) -> call; the setting is None where `settings` is empty.
    settings: the values to try, named by `unit`. passes: the passes it is a way of its own for.
    """

    name: str
    role: Role
    what: str
    prepare: Callable[[Problem, Pass, int | None], Call]
    settings: tuple[int, ...] = ()
    unit: str = ""
    passes: tuple[Pass, ...] = LOSS_PASSES

    def settings_for(self, shape: Shape) -> Sequence[int | None]:
        """The settings that cut `shape` into several parts, or the smallest if none does."""
        if not self.settings:
            return (None,)
        extent = shape.classes if self.unit == "classes" else shape.rows
        return [s for s in self.settings if s < extent] or [self.settings[0]]


def candidates_for(shape: Shape, dtype: torch.dtype) -> list[Candidate]:
    """Everyone who takes part on `shape`, floors first."""
    if shape.k:
        return [
            Candidate(FLOOR, "floor", "torch.mm over tiles of classes", _tiled_floor, CLASS_TILES, "classes", ("forward",)),
            Candidate("bigclass top-k", "bigclass", "bigclass.linear_topk", _topk, passes=("forward",)),
        ]
    floors = [Candidate(FLOOR, "floor", "torch.mm: one forward, three with backward", _floor)]
    if dtype in (torch.bfloat16, torch.float16):
        floors.append(Candidate(FLOOR_FP32, "floor", "the same products in fp32", _floor_fp32))
    if shape.one_vs_all or shape.contrastive:
        pairs = Candidate("open_clip", "peer", "open_clip's module", _from_loss(_open_clip))
        labels = Candidate("timm", "peer", "F.linear and timm's module", _from_loss(_timm))
        return [
            *floors,
            Candidate(DENSE, "dense", "the loss of all logits in plain torch", _from_loss(_dense_special)),
            pairs if shape.contrastive else labels,
            _bigclass("bigclass", "as the planner chooses", "auto", "auto"),
            _bigclass("bigclass tiled", "tiled engine", "tiled", "auto"),
            _bigclass(
                "bigclass tiled, recompute", "tiled engine, logits made again for the gradients", "tiled", "recompute",
                passes=("forward+backward",),
            ),
            _bigclass("bigclass fused", "fused engine", "fused", "auto"),
            _bigclass("bigclass dense", "dense engine", "dense", "auto"),
        ]  # fmt: skip
    return [
        *floors,
        Candidate(DENSE, "dense", "F.linear and F.cross_entropy", _from_loss(_dense)),
        Candidate("torch chunked", "peer", "F.linear_cross_entropy, its own chunk rule", _from_loss(_torch_chunked)),
        Candidate(
            "torch chunked, best", "peer", "the same, best of several chunks", _from_loss(_torch_chunked),
            settings=ROW_CHUNKS, unit="rows",
        ),
        Candidate("liger", "peer", "liger-kernel", _from_loss(_liger)),
        Candidate("quack", "peer", "quack-kernels", _from_loss(_quack)),
        Candidate("cce", "peer", "cut-cross-entropy, its default filter (not exact)", _from_loss(_cce)),
        Candidate("cce, unfiltered", "peer", "cut-cross-entropy without its filter", _from_loss(_cce_unfiltered)),
        _bigclass("bigclass", "as the planner chooses", "auto", "auto"),
        _bigclass("bigclass tiled", "tiled engine", "tiled", "auto", passes=("forward",)),
        _bigclass(
            "bigclass tiled, in forward", "tiled engine, gradients made in the forward", "tiled", "forward",
            passes=("forward+backward",),
        ),
        _bigclass(
            "bigclass tiled, recompute", "tiled engine, logits made again for the gradients", "tiled", "recompute",
            passes=("forward+backward",),
        ),
        _bigclass("bigclass fused", "fused engine: logits in registers", "fused", "auto", passes=("forward",)),
        _bigclass(
            "bigclass fused, in forward", "fused engine, gradients made in the forward", "fused", "forward",
            passes=("forward+backward",),
        ),
        _bigclass(
            "bigclass fused, recompute", "fused engine, logits made again for the gradients", "fused", "recompute",
            passes=("forward+backward",),
        ),
        _bigclass("bigclass dense", "dense engine", "dense", "auto"),
    ]  # fmt: skip


def _from_loss(make: Callable[[Problem, int | None], Loss]) -> Callable[[Problem, Pass, int | None], Call]:
    """A candidate's `prepare` from a function that makes its loss."""

    def prepare(problem: Problem, which: Pass, setting: int | None) -> Call:
        loss = make(problem, setting)
        x, w, y = problem.input, problem.linear_weight, problem.target

        if which == "forward":

            @torch.no_grad()
            def call() -> Outputs:
                return (loss(x, w, y),)
        else:
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()

            def call() -> Outputs:
                value = loss(x, w, y)
                return (value.detach(), *torch.autograd.grad(value, (x, w)))

        return call

    return prepare


# Floors


def _floor(problem: Problem, which: Pass, _: int | None) -> Call:
    x, w = problem.input, problem.linear_weight
    shape = problem.shape
    _need_memory(problem, x.element_size())
    logits = x.new_empty(shape.rows, shape.classes)

    if which == "forward":

        def call() -> Outputs:
            torch.mm(x, w.T, out=logits)
            return ()
    else:
        dx, dw = torch.empty_like(x), torch.empty_like(w)

        def call() -> Outputs:
            torch.mm(x, w.T, out=logits)
            torch.mm(logits, w, out=dx)
            torch.mm(logits.T, x, out=dw)
            return ()

    return call


def _floor_fp32(problem: Problem, which: Pass, setting: int | None) -> Call:
    wide = Problem(problem.shape, problem.kind, problem.input.float(), problem.linear_weight.float(), problem.target)
    return _floor(wide, which, setting)


def _tiled_floor(problem: Problem, _: Pass, tile: int | None) -> Call:
    assert tile is not None
    x, w = problem.input, problem.linear_weight
    buffer = x.new_empty(x.shape[0] * tile)  # flat, so that the last, narrower tile is contiguous too

    def call() -> Outputs:
        for part in w.split(tile):
            torch.mm(x, part.T, out=buffer[: x.shape[0] * part.shape[0]].view(x.shape[0], -1))
        return ()

    return call


# Torch


def _dense(problem: Problem, _: int | None) -> Loss:
    # Logits, their log-softmax and its gradient are alive together.
    _need_memory(problem, 3 * problem.input.element_size())
    softcap = problem.shape.softcap

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(x, w)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, y)

    return loss


def _dense_special(problem: Problem, _: int | None) -> Loss:
    if problem.shape.contrastive:
        _need_memory(problem, 5 * problem.input.element_size())
        return _of_pairs(contrastive.dense_loss(problem.shape.loss))
    return _of_logits(problem, one_vs_all.DENSE[problem.shape.loss])


def _of_pairs(of_pairs: contrastive.Loss) -> Loss:
    return lambda x, w, _: of_pairs(x, w)


def _of_logits(problem: Problem, of_logits: one_vs_all.Dense) -> Loss:
    """A loss of written-out logits and targets; the targets are made here, once."""
    # Targets, logits, their gradient and two tensors between.
    _need_memory(problem, 5 * problem.input.element_size())
    targets = one_vs_all.dense_targets(problem.target, problem.shape.classes, problem.input.dtype)

    def loss(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
        return of_logits(F.linear(x, w), targets)

    return loss


def _torch_chunked(problem: Problem, chunk: int | None) -> Loss:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"needs torch 2.13 or later; this is {torch.__version__}")
    _need_no_softcap(problem)
    if chunk is None:
        options = torch.nn.LinearCrossEntropyOptions()
    else:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return functools.partial(F.linear_cross_entropy, options=options)


# Peers, each imported only when its turn comes


def _timm(problem: Problem, _: int | None) -> Loss:
    try:
        return _of_logits(problem, one_vs_all.timm_loss(problem.shape.loss))
    except ImportError as error:
        raise Unavailable(f"{error} (pip install timm)") from error


def _open_clip(problem: Problem, _: int | None) -> Loss:
    _need_memory(problem, 5 * problem.input.element_size())
    try:
        return _of_pairs(contrastive.open_clip_loss(problem.shape.loss))
    except ImportError as error:
        raise Unavailable(f"{error} (pip install open_clip_torch)") from error


def _liger(problem: Problem, _: int | None) -> Loss:
    function = _gpu_peer(problem, "liger-kernel", "liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return functools.partial(function, softcap=problem.shape.softcap)


def _quack(problem: Problem, _: int | None) -> Loss:
    function = _gpu_peer(problem, "quack-kernels", "quack.linear_cross_entropy").chunked_linear_cross_entropy
    _need_no_softcap(problem)
    return function


def _cce(problem: Problem, _: int | None, **options: Any) -> Loss:
    function = _gpu_peer(problem, "cut-cross-entropy", "cut_cross_entropy").linear_cross_entropy
    return functools.partial(function, softcap=problem.shape.softcap, **options)


def _cce_unfiltered(problem: Problem, setting: int | None) -> Loss:
    return _cce(problem, setting, filter_eps=None)


def _gpu_peer(problem: Problem, package: str, module: str) -> ModuleType:
    """Import a peer that has GPU kernels only."""
    if problem.input.device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{error} (pip install {package})") from error


# bigclass


def _bigclass(name: str, what: str, engine: str, gradients: str, passes: tuple[Pass, ...] = LOSS_PASSES) -> Candidate:
    def make(problem: Problem, _: int | None) -> Loss:
        if engine == "dense":
            _need_memory(problem, 3 * problem.input.element_size())
        if engine == "fused":
            reason = device_reason(problem.input.device)
            if reason is not None or problem.input.device.type == "cpu":  # in the interpreter it runs, but a time would mean nothing
                raise Unavailable(reason or "needs a CUDA device")

        if problem.shape.one_vs_all:
            return one_vs_all.streamed_loss(problem.shape.loss, engine)
        if problem.shape.contrastive:
            return _of_pairs(contrastive.streamed_loss(problem.shape.loss, engine))

        def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            value = bigclass.linear_cross_entropy(x, w, y, softcap=problem.shape.softcap, engine=engine)
            assert isinstance(value, Tensor)  # a pair only where statistics are asked for
            return value

        return loss

    def prepare(problem: Problem, which: Pass, setting: int | None) -> Call:
        call = _from_loss(make)(problem, which, setting)
        # "auto" is measured as users meet it, without the cost of entering a context.
        if gradients == "auto":
            return call

        def planned() -> Outputs:
            with bigclass.planning(gradients=gradients):
                return call()

        return planned

    return Candidate(name, "bigclass", what, prepare, passes=passes)


def _topk(problem: Problem, _: Pass, __: int | None) -> Call:
    k = problem.shape.k
    assert k is not None

    @torch.no_grad()
    def call() -> Outputs:
        values, indices = bigclass.linear_topk(problem.input, problem.linear_weight, k)
        return values, indices

    return call


# What a candidate asks of the problem


def _need_no_softcap(problem: Problem) -> None:
    if problem.shape.softcap is not None:
        raise Unavailable("has no soft cap")


def _need_memory(problem: Problem, bytes_a_logit: int) -> None:
    """Refuse before allocating: an over-committed CPU process is killed, not told."""
    needed = problem.shape.rows * problem.shape.classes * bytes_a_logit
    free = free_memory(problem.input.device)
    if free is not None and needed > 0.9 * free:
        raise Unavailable(f"needs {needed / GIB:.1f} GiB for logits, {free / GIB:.1f} GiB are free")

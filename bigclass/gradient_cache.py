"""Train encoders on a batch whose activations do not fit, exactly: the gradient cache.

A contrastive loss needs the features of the whole batch at once, so a batch cannot be split as gradient accumulation splits it. But its
gradient goes through the features, which are small: with f = encoder(x; theta) in chunks x_1 ... x_n,

    1   f_c = encoder(x_c)                                 each chunk, without a graph
    2   loss(f_1 ... f_n), then g = d loss / d f           the whole batch, features only
    3   f_c = encoder(x_c) again, and f_c backward by g_c   each chunk; its graph is freed before the next one is built

The sum over chunks of g_c df_c/dtheta is the gradient of the whole batch. It costs one more forward; one chunk's activations stand at a
time. Both encodings of a chunk must be the same function, so random numbers are replayed, and modules that mix the rows of a batch are
refused: in them a chunk's features are not the batch's.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bigclass.core.errors import ArgumentError, ArgumentTypeError

Encoder = Callable[..., Any]


def cached_step(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., Tensor],
    *,
    chunk_size: int | Sequence[int],
    scale_loss: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Forward and backward of loss(*features) over the whole batch, holding the activations of one chunk of it at a time.

    Args:
        encoders: functions from an input to features, usually modules; the same one may stand for several inputs. One alone (no
            sequence) takes `inputs` as its input. It returns a tensor, a tuple or a dict of tensors, with a row for each row of the
            input. A tensor of shape () (a scale) must be the same for every chunk.
        inputs: for each encoder a tensor; a tuple or list, `encoder(*input)`; or a dict, `encoder(**input)`. All tensors of an input
            have its rows in their first axis; whatever is no tensor is handed on as it is. Encoders may have different numbers of rows.
        loss: takes all the features in order (those of a dict by name), returns a tensor of shape (). Called once. Its own parameters
            get their gradients too.
        chunk_size: rows encoded at once, for all encoders or for each. It need not divide the batch.
        scale_loss: what is differentiated instead of the loss: `scaler.scale` of a GradScaler, or `lambda loss: loss / steps`.

    Returns:
        The loss, detached, unscaled. Gradients have been added to `.grad`, as by `loss.backward()`.

    Raises:
        ValueError, TypeError: inputs, features or a loss that do not fit; a module that mixes rows (batch norm in training).

    Random numbers of torch (dropout) are replayed, on the CPU and the devices in use, so that gradients belong to the loss returned. Those
    of a compiled encoder must not depend on whether there is a graph; `torch._inductor.config.fallback_random` makes sure.
    Autocast around the call holds for all of it. What a forward changes (running statistics) it changes twice; where that changes its
    output (the power iteration of a spectral norm) the second encoding is another function, and its gradients are not the batch's.
    An exception on the way leaves part of the gradients in `.grad`.

    DistributedDataParallel, as an encoder or inside one, reduces once, with the last chunk. With `contrastive_loss(group=...)` or
    `ContrastiveHead(group=...)` as loss its gradients are then those of the loss over all ranks' batches. Under FSDP each chunk reduces;
    every rank must have as many. Hooks on gradients run once a chunk, so optimizers inside the backward do not fit.

    Example:
        >>> head = bigclass.ContrastiveHead()
        >>> loss = bigclass.cached_step((vision, text), (images, tokens), head, chunk_size=64)  # images (4096, ...), tokens (4096, ...)
        >>> optimizer.step(); optimizer.zero_grad(); head.clamp_()
    """
    parts = _read(encoders, inputs, chunk_size)
    with torch.enable_grad(), _no_weight_cache():
        for part in parts:
            part.cache()
        value = loss(*[t for part in parts for t in part.positional], **_merged([part.named for part in parts]))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentTypeError(f"loss: expected it to return a floating-point tensor of shape (), got {what}")
        if not value.requires_grad:
            raise ArgumentError("loss: expected a loss that depends on the features, got one without a gradient")
        scaled = value if scale_loss is None else scale_loss(value)
        if not isinstance(scaled, Tensor) or scaled.numel() != 1:
            raise ArgumentTypeError(f"scale_loss: expected it to return the loss times a number, got {type(scaled).__name__}")
        scaled.backward()
        _replay([part for part in parts if any(t.grad is not None for t in part.features)])
    return value.detach()


def _replay(parts: list[_Part]) -> None:
    """Step 3. Each data-parallel replica reduces once: in the last backward that it is expected to take part in, or, should nothing in
    that one have a gradient (a frozen tower), in one more of zeros, which reduces what has been gathered."""
    order = [(part, index) for part in parts for index in range(len(part.chunks))]
    last = {replica: position for position, (part, _) in enumerate(order) for replica in part.replicas}
    waiting: dict[DistributedDataParallel, tuple[_Part, int]] = {}  # with gradients that have not been reduced
    dead: set[_Part] = set()
    generators = _Generators.of(parts)
    after = generators.state()
    try:
        for position, (part, index) in enumerate(order):
            if part in dead:
                continue
            reducing = [replica for replica in part.replicas if last[replica] == position]
            if part.backward(index, reducing):
                for replica in part.replicas:
                    waiting[replica] = part, index
                for replica in reducing:
                    del waiting[replica]
            elif index == 0 and not part.learns:
                dead.add(part)
        while waiting:
            replica, (part, index) = next(iter(waiting.items()))
            reducing = [other for other in part.replicas if other in waiting]
            part.backward(index, reducing, zeros=True)
            for other in reducing:
                del waiting[other]
    finally:
        generators.restore(after)


@contextmanager
def _no_weight_cache() -> Iterator[None]:
    """Autocast keeps half-precision copies of weights. In torch until late 2025 one made without a graph served the second encoding too,
    and its weight got no gradient."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# --- an encoder and its input ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Part:
    """An encoder, its input, and what has been found out about them."""

    name: str
    encoder: Encoder
    input: Any
    chunks: list[slice]
    roots: list[nn.Module]
    """The modules that it runs, with what they contain: itself, or those seen when it ran first."""
    watched: bool
    """Is it no module, so that those it runs must be seen running?"""
    generators: _Generators = field(init=False)
    """Those that it may draw from, as far as was known before it ran."""
    states: list[list[Tensor]] = field(default_factory=list)
    """Of the generators, before each chunk."""
    features: list[Tensor] = field(default_factory=list)
    """Of all rows: leaves, whose gradient the loss makes."""
    keys: list[str] | None = None
    """Names of the features, if the encoder returns a dict."""

    @functools.cached_property
    def replicas(self) -> list[DistributedDataParallel]:
        """Once it has run."""
        return list(dict.fromkeys(m for root in self.roots for m in root.modules() if isinstance(m, DistributedDataParallel)))

    @property
    def learns(self) -> bool:
        """May it have gradients to make?"""
        tensors = [t for t in _leaves(self.input) if isinstance(t, Tensor)] + [p for root in self.roots for p in root.parameters()]
        return any(t.requires_grad for t in tensors)

    @property
    def positional(self) -> list[Tensor]:
        return self.features if self.keys is None else []

    @property
    def named(self) -> dict[str, Tensor]:
        return {} if self.keys is None else dict(zip(self.keys, self.features, strict=True))

    def cache(self) -> None:
        """Step 1."""
        self.generators, found = _Generators.of([self]), []
        with torch.no_grad(), self._watching():
            for rows in self.chunks:
                self.states.append(self.generators.state())
                found.append([t.clone() for t in self.encode(rows)])  # it may write the next chunk into the same memory
        wholes = [_joined([chunk[i] for chunk in found]) for i in range(len(found[0]))]
        self.features = [t.detach().requires_grad_(t.is_floating_point()) for t in wholes]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """See the modules that run, and refuse those that mix rows."""
        if not self.watched:
            yield
            return

        seen: set[nn.Module] = set()

        def see(module: nn.Module, _: Any) -> None:
            if module not in seen:
                _refuse_mixing(self.name, module)
                self.roots.append(module)
                seen.update(module.modules())

        handle = nn.modules.module.register_module_forward_pre_hook(see)
        try:
            yield
        finally:
            handle.remove()

    def backward(self, index: int, reducing: Sequence[DistributedDataParallel], *, zeros: bool = False) -> bool:
        """Step 3 of a chunk; False if the encoder makes nothing that has a gradient. reducing: the replicas that reduce in it.
        zeros: with a gradient of zeros."""
        with ExitStack() as stack:
            for replica in self.replicas:
                if replica not in reducing:
                    stack.enter_context(replica.no_sync())
            return self._backward(index, zeros)

    def _backward(self, index: int, zeros: bool) -> bool:
        rows = self.chunks[index]
        self.generators.restore(self.states[index])
        outputs, grads = [], []
        for t, whole in zip(self.encode(rows), self.features, strict=True):
            if not t.requires_grad or whole.grad is None:
                continue
            outputs.append(t)
            if whole.dim() > 0:
                grads.append(whole.grad[rows])
            else:  # the same for all chunks: the last one has the gradient of all
                grads.append(whole.grad if index == len(self.chunks) - 1 else torch.zeros_like(whole))
        if outputs:
            torch.autograd.backward(outputs, [torch.zeros_like(g) for g in grads] if zeros else grads)
        return bool(outputs)

    def encode(self, rows: slice) -> list[Tensor]:
        """The features of some rows."""
        if isinstance(self.input, Tensor):
            out = self.encoder(self.input[rows])
        elif isinstance(self.input, Mapping):
            out = self.encoder(**{name: _rows_of(v, rows) for name, v in self.input.items()})
        else:
            out = self.encoder(*[_rows_of(v, rows) for v in self.input])
        if isinstance(out, Mapping):
            self.keys, out = [str(k) for k in out], list(out.values())
        out = [out] if isinstance(out, Tensor) else out
        if not isinstance(out, tuple | list) or not all(isinstance(t, Tensor) for t in out):
            kinds = [type(t).__name__ for t in out] if isinstance(out, tuple | list) else type(out).__name__
            raise ArgumentTypeError(f"{self.name}: expected it to return a tensor, or a tuple or dict of tensors, got {kinds}")
        for t in out:
            if t.dim() > 0 and t.shape[0] != rows.stop - rows.start:
                raise ArgumentError(
                    f"{self.name}: expected features with a row for each of {rows.stop - rows.start} rows of input (or of shape ()), got "
                    f"{tuple(t.shape)}"
                )
        return list(out)

    def devices(self) -> set[torch.device]:
        """Other than the CPU."""
        tensors = [t for t in _leaves(self.input) if isinstance(t, Tensor)]
        tensors += [p for root in self.roots for p in root.parameters()]
        found = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
        if self.watched and torch.cuda.is_available() and torch.cuda.is_initialized():  # it may bring its input there
            found.add(torch.device("cuda", torch.cuda.current_device()))
        return found


@dataclass(frozen=True)
class _Generators:
    """torch's random number generators: the CPU's and those of some devices."""

    devices: list[torch.device]

    @classmethod
    def of(cls, parts: list[_Part]) -> _Generators:
        return cls(sorted({d for part in parts for d in part.devices()}, key=str))

    def state(self) -> list[Tensor]:
        return [torch.get_rng_state()] + [torch.get_device_module(d).get_rng_state(d) for d in self.devices]

    def restore(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


# --- reading the arguments --------------------------------------------------------------------------------------------------------------


def _read(encoders: Any, inputs: Any, chunk_size: Any) -> list[_Part]:
    if callable(encoders):
        encoders, inputs = [encoders], [inputs]
    if not isinstance(encoders, Sequence) or len(encoders) == 0 or not all(callable(e) for e in encoders):
        raise ArgumentTypeError(f"encoders: expected a function or a sequence of them, got {encoders!r}")
    if not isinstance(inputs, tuple | list) or len(inputs) != len(encoders):
        what = f"{len(inputs)}" if isinstance(inputs, tuple | list) else type(inputs).__name__
        raise ArgumentError(f"inputs: expected a sequence of {len(encoders)}, one for each encoder, got {what}")
    sizes = [chunk_size] * len(encoders) if isinstance(chunk_size, int) else chunk_size
    if not isinstance(sizes, tuple | list) or len(sizes) != len(encoders):
        raise ArgumentError(f"chunk_size: expected a number, or one for each of {len(encoders)} encoders, got {chunk_size!r}")
    parts = []
    for i, (encoder, input, size) in enumerate(zip(encoders, inputs, sizes, strict=True)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise ArgumentTypeError(f"chunk_size: expected an integer, got {size!r}")
        if size < 1:
            raise ArgumentError(f"chunk_size: expected at least 1, got {size}")
        n = _count_rows(f"inputs[{i}]", input)
        chunks = [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size)]
        roots = _roots_in(encoder)
        parts.append(_Part(f"encoders[{i}]", encoder, input, chunks, roots, not roots))
    for part in parts:
        for root in part.roots:
            _refuse_mixing(part.name, root)
    return parts


def _count_rows(name: str, input: Any) -> int:
    if not isinstance(input, Tensor | Mapping | tuple | list):
        raise ArgumentTypeError(f"{name}: expected a tensor, or a tuple or dict with tensors, got {type(input).__name__}")
    tensors = [t for t in _leaves(input) if isinstance(t, Tensor)]
    counts = {t.shape[0] if t.dim() > 0 else None for t in tensors}
    if len(counts) != 1 or None in counts:
        raise ArgumentError(f"{name}: expected tensors with the same number of rows, got shapes {[tuple(t.shape) for t in tensors]}")
    for t in tensors:
        if t.requires_grad and not t.is_leaf:
            raise ArgumentError(
                f"{name}: expected tensors without a graph behind them, through which each chunk would go again; detach them, or make "
                f"that part of the encoder"
            )
    return tensors[0].shape[0]


def _leaves(input: Any) -> list[Any]:
    return [input] if isinstance(input, Tensor) else list(input.values() if isinstance(input, Mapping) else input)


def _joined(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 or chunks[0].dim() == 0 else torch.cat(chunks)


def _rows_of(value: Any, rows: slice) -> Any:
    return value[rows] if isinstance(value, Tensor) else value


def _merged(named: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for features in named:
        for name in features:
            if name in merged:
                raise ArgumentError(f"encoders: two return features of the same name, {name!r}")
        merged |= features
    return merged


def _roots_in(encoder: Encoder) -> list[nn.Module]:
    """The module that an encoder is, or whose method; of anything else nothing is known before it runs."""
    if isinstance(encoder, functools.partial):
        return _roots_in(encoder.func)
    owner = encoder.__self__ if inspect.ismethod(encoder) else encoder
    return [owner] if isinstance(owner, nn.Module) else []


def _refuse_mixing(part: str, root: nn.Module) -> None:
    """Raise for a module that mixes the rows of a batch."""
    for name, module in root.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ArgumentError(
                f"{part}: module {name or '(itself)'!r} ({type(module).__name__}) mixes the rows of a batch, and those of a "
                f"chunk are not those of the batch; put it in eval mode, or take a norm of single rows (LayerNorm, GroupNorm)"
            )

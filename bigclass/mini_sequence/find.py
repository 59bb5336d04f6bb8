"""Which modules are token-wise: by what they are made of, and by trying.

A module may be chunked if each output row depends on its own input row alone. Structure tells most of it (linear layers, activations,
dropout, norms over the last axis), and refuses what tells nothing in a trial: batch norm mixes in training only, stochastic depth in
training only, experts hand out losses on the side. The trial then runs the module on a few rows in evaluation:

    all rows at once = each row by itself        (anything that mixes, or counts on the shape)
    NaN in one row = NaN in that row alone       (mixing behind a weight that is 0 yet: 0 * NaN is NaN)

Once for each kind of module, not for each layer. Parameters that cannot be read here (sharded, on the meta device) leave structure alone
to judge, which then asks for a name of the trade, too.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.mini_sequence.chunks import check_own_forward

# Token-wise methods of layers that have no module for them: BERT and its kind, torch's TransformerEncoderLayer.
_METHODS = ("feed_forward_chunk", "ff_chunk", "_ff_block")
# What parts are called that mix tokens, draw one number for a whole sample, or have a state; and whole modules that do.
_MIXES = re.compile(
    r"conv|batch_?norm|instance_?norm|group_?norm|response_?norm|grn|pool|rnn|lstm|gru\b|embedding|drop_?path|stochastic_?depth|droplayer|"
    r"dropout[123]d|feature_?alpha|fold\b|shuffle|upsample|flatten",
    re.IGNORECASE,
)
_MIXES_AS_A_WHOLE = re.compile(r"attention|experts?$|moe$|router", re.IGNORECASE)
_CALLED_SO = re.compile(r"mlp|feed_?forward|ffn|glu|denseact|densegated|moe(block|layer)?$", re.IGNORECASE)
_NORM = re.compile(r"norm|affine", re.IGNORECASE)
_TOKENS = re.compile(r"token", re.IGNORECASE)
_ROWS = 5  # of the trial


@dataclass(frozen=True)
class Target:
    """A method of a module that is to run in chunks."""

    name: str
    module: nn.Module
    method: str = "forward"


def find(model: nn.Module) -> list[Target]:
    """Every token-wise block of a model, the outermost of each; all of a model that is nothing else.

    Raises:
        ValueError: there is none, with what has been looked at and why it is none."""
    tried, reasons = _Trials(), {}
    whole = Target("", model)
    if _is_mlp(model) and tried.reason(whole, model) is None:
        return [whole]
    found: list[Target] = []
    for target, parent in _candidates(model):
        if any(target.name.startswith(f"{other.name}.") for other in found if other.method == "forward"):
            continue
        reason = tried.reason(target, parent) if target.method != "forward" or _is_mlp(target.module) else _other(target.module)
        if reason is None:
            found.append(target)
        elif not re.search(r"attention|norm$", type(target.module).__name__, re.IGNORECASE):
            reasons.setdefault(f"{type(target.module).__name__}: {reason}", target.name)
    if not found:
        seen = "; ".join(f"{name} ({reason})" for reason, name in list(reasons.items())[:4])
        raise ArgumentError(
            "model: expected a model with token-wise modules (MLPs) in layers with norms of the same width, found none"
            + (f". Looked at {seen}" if seen else "; some layers (OPT, BART) have their two linear layers in their own forward")
            + ". Make the feed-forward part of a layer a module, or name those to convert: modules=['layers.0.mlp', ...]"
        )
    return found


def named(model: nn.Module, modules: Sequence[str | nn.Module]) -> list[Target]:
    """The targets of an explicit list. Raises for what is no module of the model, and for what mixes tokens, with the reason."""
    names = {id(module): name for name, module in model.named_modules()}
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    tried, targets = _Trials(), []
    for entry in modules:
        if isinstance(entry, str):
            try:
                module = model.get_submodule(entry)
            except AttributeError:
                raise ArgumentError(f"modules: expected names of the model's modules, got {entry!r}, which it has not") from None
        elif isinstance(entry, nn.Module) and id(entry) in names:
            module = entry
        else:
            what = "a module that is not of this model" if isinstance(entry, nn.Module) else type(entry).__name__
            raise ArgumentTypeError(f"modules: expected names of the model's modules, or these themselves, got {what}")
        target = Target(names[id(module)], module, _method(module) or "forward")
        reason = tried.reason(target, parents.get(id(module)))
        if reason is not None:
            raise ArgumentError(f"modules: {target.name or type(module).__name__!r} cannot be run in chunks of tokens: {reason}")
        targets.append(target)
    nested = [(a.name, b.name) for a in targets for b in targets if a is not b and b.name.startswith(f"{a.name}." if a.name else "")]
    if nested:
        raise ArgumentError(
            f"modules: expected modules apart from each other, got {nested[0][1]!r} inside {nested[0][0]!r}; name one of them"
        )
    return targets


# --- by structure


def _candidates(model: nn.Module) -> Iterator[tuple[Target, nn.Module | None]]:
    """What may be token-wise, outermost first, with its parent."""
    for parent_name, parent in model.named_modules():
        if (method := _method(parent)) is not None:
            yield Target(parent_name, parent, method), None
        children = list(_children(parent))
        if not any(_is_norm(child) for _, child in children):
            continue  # no layer of a residual stream: projections, heads, position biases
        for name, module in children:
            if _is_mlp(module) or _CALLED_SO.search(name) or _CALLED_SO.search(type(module).__name__):
                yield Target(f"{parent_name}.{name}" if parent_name else name, module), parent


def _children(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children, and those in lists, which only hold them."""
    for name, child in layer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", element) for index, element in enumerate(child))
        else:
            yield name, child


def _method(layer: nn.Module) -> str | None:
    return next(
        (name for name in _METHODS if callable(getattr(layer, name, None)) and not isinstance(getattr(layer, name), nn.Module)), None
    )


def _is_mlp(module: nn.Module) -> bool:
    """Two or more linear layers, of which one returns to the width of the first's input, and nothing between them that is unknown."""
    linears = [m for m in module.modules() if _is_linear(m)]
    if _method(module) is not None or len(linears) < 2 or _unknown(module) is not None:
        return False
    return any(_features(linear, out=True) == _features(linears[0]) for linear in linears[1:])


def _other(module: nn.Module) -> str:
    """What keeps this from being such a block, for the message that none was found."""
    mixing = _mixing(module)
    if mixing is not None:
        return mixing
    unknown = _unknown(module)
    if unknown is not None:
        return f"{unknown} is no linear layer, no norm and nothing elementwise"
    return "it has not two linear layers or more, or does not return to the width it starts from"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils")


def _features(linear: Any, out: bool = False) -> int:
    if isinstance(linear, nn.Linear):
        return linear.out_features if out else linear.in_features
    return linear.weight.shape[1 if out else 0]


def _is_norm(module: nn.Module) -> bool:
    return (
        bool(_NORM.search(type(module).__name__)) and not _MIXES.search(type(module).__name__) and not any(True for _ in module.children())
    )


def _widths(layer: nn.Module) -> set[int]:
    """Widths of the norms that stand in this layer itself, as far as they have weights."""
    return {p.shape[-1] for _, child in _children(layer) if _is_norm(child) for p in child.parameters(recurse=False) if p.ndim}


def _mixing(module: nn.Module) -> str | None:
    """What in here is known to mix tokens, or to do things on the side."""
    for name, part in module.named_modules():
        if _is_linear(part):
            continue
        names = [cls.__name__ for cls in type(part).__mro__ if cls not in (nn.Module, object)]
        pattern = _MIXES_AS_A_WHOLE if any(True for _ in part.children()) else _MIXES
        kind = next((n for n in names if pattern.search(n) or _MIXES_AS_A_WHOLE.search(n)), None)
        last = name.rpartition(".")[2]
        if kind is None and re.search(r"experts$|router", last) and part is not module:
            kind = last
        if kind is not None:
            where = f" ({name})" if name else ""
            return f"{kind}{where} mixes tokens, draws for whole samples, or hands out losses on the side"
    return None


def _unknown(module: nn.Module) -> str | None:
    """The first part that is neither linear, nor elementwise, nor a norm over the last axis."""
    for name, part in module.named_modules():
        # parameters of one axis scale or shift features: norms, layer scale, activations that learn
        if not _is_linear(part) and any(p.ndim > 1 for p in part.parameters(recurse=False)):
            return name or type(part).__name__
    return None


# --- by trying


class _Trials:
    """What has been found out about kinds of modules, so that fifty equal layers are tried once."""

    def __init__(self) -> None:
        self.known: dict[Any, str | None] = {}

    def reason(self, target: Target, parent: nn.Module | None) -> str | None:
        """Why this cannot be chunked, or None if it can."""
        module = target.module
        own = check_own_forward(module, target.method)
        if own is not None:
            return own
        if target.method == "forward":
            mixing = _mixing(module)
            if mixing is not None:
                return mixing
            transposed = _transposed(target, parent)
            if transposed is not None:
                return transposed
        key = (type(module), target.method, *[(name, type(m), m.extra_repr()) for name, m in module.named_modules()])
        if key not in self.known:
            self.known[key] = _trial(target)
        return self.known[key]


def _transposed(target: Target, parent: nn.Module | None) -> str | None:
    """Token-mixing MLPs are plain ones that get their input transposed: their width is not that of the layer, or their name says so."""
    first = next((m for m in target.module.modules() if _is_linear(m)), None)
    widths = set() if parent is None or parent is target.module else _widths(parent)
    if first is not None and widths and _features(first) not in widths:
        return f"it takes {_features(first)} features where its layer has {sorted(widths)}: it mixes tokens, or is beside the stream"
    if _TOKENS.search(target.name.rpartition(".")[2]):
        return "by its name it mixes tokens"
    return None


def _trial(target: Target) -> str | None:
    module = target.module
    function: Callable[..., Any] = getattr(module, target.method)
    if target.method == "forward":
        function = vars(module).get("_old_forward", function)  # inside a hook of accelerate's, which watches as others do
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta or hasattr(t, "full_tensor") or hasattr(t, "ds_id") or t.numel() == 0 for t in tensors):
        if target.method != "forward" or _CALLED_SO.search(type(module).__name__):
            return None
        return "its parameters cannot be read here (sharded, or on the meta device), so that nothing can be tried; convert before sharding"
    width = _width(target)
    if width is None:
        return "it has no linear layer that would tell how many features it takes"
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = like.dtype if like.dtype.itemsize >= 2 else torch.get_default_dtype()
    generator = torch.Generator().manual_seed(0)  # its own: the caller's random numbers stay as they are
    count = _required(function)
    xs = [torch.randn(1, _ROWS, width, generator=generator).to(like.device, dtype) for _ in range(count)]
    try:
        with _quiet(module), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            return _compared(function, xs)
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else ""
        return f"it could not be run on {count} x a tensor of shape (1, {_ROWS}, {width}): {type(error).__name__}: {line}"


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Evaluation, without the hooks that others have put in to watch a training."""
    parts = list(module.modules())
    before = [(part.training, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    try:
        for part in parts:
            part.training, part._forward_pre_hooks, part._forward_hooks = False, OrderedDict(), OrderedDict()
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.training, part._forward_pre_hooks, part._forward_hooks = was


def _compared(function: Callable[..., Any], xs: list[Tensor]) -> str | None:
    whole = function(*xs)
    if not isinstance(whole, Tensor):
        return f"it returns {type(whole).__name__}, not one tensor"
    if whole.shape[:-1] != xs[0].shape[:-1]:
        return f"of {tuple(xs[0].shape)} it makes {tuple(whole.shape)}: not a row for each token"
    apart = torch.cat([function(*[x[:, i : i + 1] for x in xs]) for i in range(_ROWS)], dim=1)
    # Products of one row and of several are summed in other orders; what mixes is off by far more.
    tolerance = 64 * torch.finfo(whole.dtype).eps
    if not float((whole - apart).double().norm()) <= tolerance * max(float(whole.double().norm()), torch.finfo(torch.float32).tiny):
        return "a token's output depends on the other tokens"
    for x in xs:
        spoilt = [t.clone() if t is x else t for t in xs]
        poisoned = next(s for s, t in zip(spoilt, xs, strict=True) if t is x)
        poisoned[:, _ROWS // 2] = torch.nan
        finite = function(*spoilt).isfinite().all(-1)[0]
        if not bool(finite[torch.arange(_ROWS) != _ROWS // 2].all()):
            return "a token's output depends on the other tokens (NaN in one spreads to others)"
    return None


def _required(function: Callable[..., Any]) -> int:
    """How many arguments it must be given."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return max(1, sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters))


def _width(target: Target) -> int | None:
    if target.method != "forward":  # a whole layer: its norms are as wide as its stream
        norms = {p.shape[-1] for m in target.module.modules() if _is_norm(m) for p in m.parameters(recurse=False) if p.ndim}
        if len(norms) == 1:
            return norms.pop()
    first = next((m for m in target.module.modules() if _is_linear(m)), None)
    return None if first is None else _features(first)

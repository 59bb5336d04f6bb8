r"""PEFT: output heads that it has wrapped, streamed with what it wraps around them.

Low-rank adapters p = 1, 2, ... of a head w (C, D), with PEFT's scaling alpha and dropout (Hu et al., arXiv:2106.09685):

    s_ij = x_i . w_j + b_j + sum_p u^p_i . B^p_j          u^p = alpha_p dropout_p(x) (A^p)^T (N, R), made once

is a stream of one operand pair for the head and one for each adapter: no copy of w, and no C x D gradient where it is frozen. DoRA (Liu et
al., arXiv:2402.09353) scales the classes of everything before it, m_j = magnitude_j / ||w_j + alpha (B A)_j||, bias left out; its norms
count as constants, as there, so this is exact. What comes after it and is not scaled enters divided by m:

    s_ij = m_j (x_i . w_j + sum_p u^p_i . B^p_j / before_pj) + bias_j          before_p: the scale when adapter p came

A wrapped head changes its class and nothing else: keys, hooks and identities stay, adapters come and go as before. In training it returns
lazy logits. In evaluation and under no_grad PEFT's own forward runs. Options (soft cap, engine, ...) are those of the head inside, a
`bigclass.LMHead` (a `CCEHead` where it was one), which is what `merge_and_unload()` and `unload()` give back.

Trained tokens (PEFT's `trainable_token_indices` with tied embeddings) replace rows of the head's weight, w_t by v_t. That is an adapter of
as many ranks as tokens, A_k = v_k - w_k and B the indicator of token k: no copy of w here either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bigclass.core.errors import ArgumentError, ArgumentTypeError
from bigclass.core.norms import adapted_norms
from bigclass.extras import require
from bigclass.heads.lazy import LazyLogits, lazy_logits
from bigclass.heads.linear import CCEHead, LinearHead, LMHead, change_class, check_own_forward, is_plain_linear
from bigclass.losses.lora import adapter_features

require("peft")

from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper  # noqa: E402

_EXCLUDE = (
    "Leave the head as it is, or out of PEFT's reach (target_modules without it, or exclude_modules), and convert it then; or train it "
    "whole (modules_to_save)"
)


def adopt(head: Any, **options: Any) -> Any:
    """Stream an output head, in place, whatever PEFT has wrapped around it, and return it.

    Args:
        head: `peft.tuners.lora.layer.Linear` (LoRA, rsLoRA, DoRA, MiCA), PEFT's ModulesToSaveWrapper (its original and every copy, those of
            adapters added later too) or its wrapper for trained tokens, around an `nn.Linear`; or an `nn.Linear` itself.
        options: of `bigclass.LMHead` (softcap, logit_scale, shift, engine, lazy, ...). A head that was one keeps those not given.

    Returns:
        The same module. In training it returns lazy logits; `head(hidden, labels, ...)` is the loss, `head.predict(hidden, k)` the top k.

    Raises:
        TypeError: for other adapters and for quantised heads, with the reason. ValueError: for adapters that have no streamed form.

    Example:
        >>> model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
        >>> bigclass.integrations.peft.adopt(model.base_model.model.lm_head)
    """
    check_own_forward(head)
    if type(head) in (LoraLinear, LoraHead):
        _check_layer(head)
        _convert(head.base_layer, options)
        change_class(head, LoraHead)
        return head
    if type(head) in (ModulesToSaveWrapper, SavedHead):
        inside = [head.original_module, *head.modules_to_save.values()]
        for module in inside:
            _check_linear(module, head)
        for module in inside:
            _convert(module, options)
        change_class(head, SavedHead)
        return head
    if type(head) in (TrainableTokensWrapper, TokensHead):
        base = head.token_adapter.base_layer
        _check_linear(base, head)
        if base.bias is not None:
            raise ArgumentError(f"head: {_named(head)} leaves the head's bias out of the logits. {_EXCLUDE}")
        _convert(base, options)
        change_class(head, TokensHead)
        return head
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper):
        _refuse_adapter(head)
    _check_linear(head, head)
    return _convert(head, options)


def release(head: Any) -> Any:
    """Undo `adopt`, in place, and return the head: what PEFT wrapped around it stays."""
    for module in list(head.modules()):  # one that was a head before PEFT wrapped it is one without `adopt`, too
        if isinstance(module, LinearHead):
            module.release()
    for cls, before in ((LoraHead, LoraLinear), (SavedHead, ModulesToSaveWrapper), (TokensHead, TrainableTokensWrapper)):
        if type(head) is cls:
            change_class(head, before)
    return head


def is_adopted(head: Any) -> bool:
    """Does this head stream?"""
    if isinstance(head, ModulesToSaveWrapper):  # a head's copies are heads, so that it may have been converted before
        return all(isinstance(module, LinearHead) for module in (head.original_module, *head.modules_to_save.values()))
    return isinstance(head, _Streamed | LinearHead)


class _Streamed(nn.Module):
    """A module of PEFT around a head, whose logits are a stream."""

    def _head(self) -> Any:
        """The `LMHead` or `CCEHead` inside."""
        raise NotImplementedError

    def recipe(self, x: Tensor) -> LazyLogits:
        """The lazy logits of features x (..., D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, labels: Any = None, *args: Any, **options: Any) -> Any:
        """Logits (..., C) without labels, lazy in training; with labels the loss, and its options, of the head inside (a forward, so that
        hooks run): `head(hidden, labels, shift=..., reduction=..., weight=..., return_stats=...)`."""
        head = self._head()
        labels = options.pop("target", None) if labels is None else labels
        if labels is not None:
            return type(head).forward(head, self.recipe(x), labels, *args, **options)
        # PEFT would add its adapters behind the head's own scale and soft cap
        if not head.streams and not head.maps:
            return super().forward(x, *args, **options)
        if options.pop("adapter_names", None) is not None:
            raise ArgumentError(
                "adapter_names: adapters mixed within a batch are PEFT's own, for inference without softcap and logit_scale: call eval()"
            )
        options.pop("alora_offsets", None)  # for a kind of adapter that `recipe` refuses
        if args or options:
            raise TypeError(f"forward: unexpected arguments {[*args, *options]}; known: labels, with those of {type(head).__name__}")
        return self.recipe(x) if head.streams else self.recipe(x).materialize()

    def loss(self, hidden: Tensor, labels: Any, **options: Any) -> Any:
        """`self(hidden, labels, ...)` under a name of its own; it is a forward, so hooks run."""
        return self(hidden, labels, **options)

    def predict(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row and their classes, (..., k) each, without the full logits. No gradients."""
        with torch.no_grad():
            lazy = self.recipe(features)
            values, indices = lazy.to(lazy.stream.accumulate_dtype).topk(k)
        return values, indices


class LoraHead(_Streamed, LoraLinear):
    """PEFT's LoRA layer around an output head, streamed (module docstring)."""

    def _head(self) -> Any:
        return self.base_layer

    def recipe(self, x: Tensor) -> LazyLogits:
        """The head's pair, one for each active adapter, DoRA's scale of the classes."""
        layer, base = _unmerged_where_disabled(self), self._head()
        _check_hooks("base_layer", base)
        active = [] if layer.disable_adapters or layer.merged else [name for name in layer.active_adapters if name in layer.lora_A]
        pairs, bias, scale = [], None, None
        for name in active:
            _check_adapter(layer, name, training=layer.training)
            a, b, alpha = layer.lora_A[name].weight, layer.lora_B[name], layer.scaling[name]
            before = scale
            if name in layer.lora_magnitude_vector:
                m = layer.lora_magnitude_vector[name].weight / adapted_norms(base.weight, a, b.weight, alpha)
                scale = m if scale is None else scale * m
                bias = None if bias is None else bias * m
            u = adapter_features(self._dropped(name, x, a.dtype), a, alpha)
            pairs.append((u, b.weight if before is None else b.weight / before.unsqueeze(1)))
            if b.bias is not None:
                bias = b.bias * alpha if bias is None else bias + b.bias * alpha
        if base.bias is not None:
            bias = base.bias if bias is None else base.bias + bias
        return lazy_logits(x, base.weight, bias, base.maps, base.engine, pairs=pairs, class_scale=scale, grad_filter=base.grad_filter)

    def _dropped(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (N, D) behind an adapter's dropout: cast and shaped as in PEFT, so that the same elements are dropped."""
        dropout = self.lora_dropout[name]
        if self.training and not isinstance(dropout, nn.Identity):
            x = dropout(self._cast_input_dtype(x, dtype))
        return x.reshape(-1, x.shape[-1])


class TokensHead(_Streamed, TrainableTokensWrapper):
    """PEFT's wrapper of a head some of whose tokens' rows are trained, streamed (module docstring)."""

    def _head(self) -> Any:
        return self.token_adapter.base_layer

    def recipe(self, x: Tensor) -> LazyLogits:
        """The head's pair, and one of as many ranks as tokens for each active adapter."""
        layer, base = _unmerged_where_disabled(self.token_adapter), self._head()
        _check_hooks("base_layer", base)
        active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
        layer._check_overlapping_tokens(active)
        pairs, (w, rows) = [], (base.weight, x.reshape(-1, x.shape[-1]))
        wide = torch.promote_types(w.dtype, torch.float32)
        for name in active:
            tokens = torch.tensor(layer.token_indices[name], device=w.device)
            change = layer.trainable_tokens_delta[name].to(w).to(wide) - w[tokens].to(wide)
            indicator = torch.zeros(len(tokens), w.shape[0], dtype=wide, device=w.device).scatter_(1, tokens.unsqueeze(1), 1.0).t()
            pairs.append((adapter_features(rows, change), indicator))
        return lazy_logits(x, w, base.bias, base.maps, base.engine, pairs=pairs, grad_filter=base.grad_filter)


def _unmerged_where_disabled(layer: Any) -> Any:
    """The adapter layer; merged ones that are disabled are taken out of the weight first, as PEFT does."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    return layer


class SavedHead(ModulesToSaveWrapper):
    """PEFT's wrapper of a head that is trained whole, one copy an adapter, each streamed."""

    def update(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Called for every new adapter: its head streams as the original does (a tied one would be a plain `nn.Linear`)."""
        super().update(adapter_name, *args, **kwargs)
        made: Any = self.modules_to_save[adapter_name]
        if is_plain_linear(made):
            type(self.original_module).adopt(made, **_options(self.original_module))


def _options(head: Any) -> dict[str, Any]:
    return {name: getattr(head, name) for name in (*head._OPTIONS, *head._OWN)}


def _convert(linear: Any, options: dict[str, Any]) -> Any:
    """The linear layer as a head; one that is a head already keeps its kind and the options that are not given."""
    if isinstance(linear, LMHead | CCEHead):
        return type(linear).adopt(linear, **{**_options(linear), **options})
    return LMHead.adopt(linear, **options)


def _named(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check_linear(linear: Any, head: Any) -> None:
    """Raise unless this is a linear layer that computes nothing else, or a head that is one."""
    if is_plain_linear(linear) or type(linear) in (LMHead, CCEHead):
        return
    inside = "" if linear is head else f" inside {_named(head)}"
    reason = "streaming multiplies by a weight (C, D), slab by slab, and only an nn.Linear has one as it is (a quantised layer has codes)"
    if isinstance(linear, LinearHead):
        reason = "its loss is not cross-entropy"
    raise ArgumentTypeError(f"head: expected an nn.Linear, got {_named(linear)}{inside}: {reason}. {_EXCLUDE}")


def _refuse_adapter(head: Any) -> NoReturn:
    if isinstance(head, LoraLayer):
        inside = head.get_base_layer()
        reason = (
            f"a layer of its own kind around {_named(inside)}, whose weight (quantised, sharded or a bare parameter) cannot be streamed"
        )
    elif isinstance(head, BaseTunerLayer):
        reason = "its adapter is not a low-rank product beside the weight, so its logits are not a sum of two small products"
    else:
        reason = "what it does to the weight has no streamed form"
    raise ArgumentTypeError(f"head: {_named(head)} cannot be streamed: {reason}. {_EXCLUDE}")


def _check_layer(layer: Any) -> None:
    """Raise for what a LoRA layer has that is not streamed, before anything is changed."""
    if layer.fan_in_fan_out or getattr(layer, "is_target_conv_1d_layer", False):
        raise ArgumentTypeError(f"head: {_named(layer)} keeps its weight (D, C) (fan_in_fan_out, Conv1D), classes last. {_EXCLUDE}")
    _check_linear(layer.base_layer, layer)
    for name in layer.lora_A:
        _check_adapter(layer, name, training=True)


def _check_adapter(layer: Any, name: str, *, training: bool) -> None:
    """Raise for an adapter whose logits are not class_scale (x w^T + u B^T) + bias."""
    variant = getattr(layer, "lora_variant", {}).get(name)
    dora = name in layer.lora_magnitude_vector
    reason = None
    if variant is not None and type(variant).__name__ not in ("DoraLinearVariant", "MiCALinearVariant"):
        reason = f"it is of {_named(variant)}, which is more than a low-rank product beside the weight"
    elif dora and training and not isinstance(layer.lora_dropout[name], nn.Identity):
        reason = (
            "it is DoRA with dropout: PEFT then scales the dropped and the whole features' logits by two different vectors of classes. Use "
            "lora_dropout=0, or an adapter without use_dora"
        )
    for part in ("lora_A", "lora_B"):
        module = getattr(layer, part)[name]
        if reason is None and type(module) is not nn.Linear:
            reason = f"its {part} is {_named(module)}, not an nn.Linear"
        if reason is None:
            _check_hooks(f"{part}[{name!r}]", module)
    if reason is not None:
        raise ArgumentError(
            f"head: adapter {name!r} cannot be streamed: {reason}. Or keep the head out of that adapter (exclude_modules), or undo its "
            "conversion (bigclass.restore_head)"
        )


def _check_hooks(name: str, module: nn.Module) -> None:
    """Raise for hooks on a module that is read rather than called."""
    hooks: Sequence[Any] = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    if any(hooks):
        raise ArgumentError(f"head: {name} has hooks, which would not run: its weight is read. Register them on the adapter layer itself")

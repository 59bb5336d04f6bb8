r"""Ulysses: a sequence over several ranks, around transformers' models with a streamed head and mini-sequences.

Rank r has tokens r T/W ... (r+1) T/W - 1 of every sequence. Everything in a causal language model works on tokens one by one, but for the
attention; there DeepSpeed's implementation exchanges them for heads (one all-to-all for each of q, k, v, one back), so that every rank has
the whole sequence of H/W heads and the model's own attention function runs as ever:

    q, k, v   (B, H, T/W, d) of all heads  ->  (B, H/W, T, d) of all tokens  ->  attention  ->  (B, T/W, H d)

What is left is the loss: labels are shifted before they are cut (the label of a rank's last token is the next rank's first), and the mean
goes over the tokens that count on *all* ranks, one of which may have none; a mean of the ranks' means would be another number.

Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509; Bekman et al., "Arctic Long Sequence Training", arXiv:2506.13996.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bigclass.core.errors import ArgumentError
from bigclass.extras import require
from bigclass.integrations import convert_head
from bigclass.integrations.transformers.heads import base_model, evaluating, output_head
from bigclass.integrations.transformers.loss import StreamedLoss
from bigclass.mini_sequence import mini_sequence
from bigclass.parallel.groups import Ranks
from bigclass.parallel.layer import Spread

IGNORED = -100
_PLACE = "_bigclass_ulysses"  # on a model's modules, one of which hands itself to the attention function


def setup_ulysses(
    model: nn.Module, group: Any, *, chunk_tokens: int | None = None, batch: Any = None, gradients: str = "mean", verify: bool = True,
    **options: Any,
) -> SequenceParallel:  # fmt: skip
    r"""Spread a causal language model of transformers over the sequence, in place, with a streamed head and mini-sequences on top.

        loss = sum over all ranks' tokens that count of CE_t / number of those tokens          the same value on every rank

    Before `fully_shard`, DistributedDataParallel or `deepspeed.initialize`, which combine gradients over ranks as ever (all ranks of a
    sequence hold the same parameters).

    Args:
        model: a decoder of transformers whose attention goes through its AttentionInterface (sdpa, flash or flex attention).
        group: the W ranks that share a sequence: a ProcessGroup, or a DeviceMesh of one axis. W divides the attention heads; of the
            key-value heads it is a divisor or a multiple (they are then repeated). A group of one rank changes no attention.
        chunk_tokens: MLPs run in chunks of so many of a rank's tokens (`bigclass.mini_sequence`); None: in one. Under
            ZeRO-3 call that yourself, with group=torch.distributed.group.WORLD.
        batch: the ranks over whose tokens the loss is a mean, where there are several sequences at a time; None: `group`, and the engine
            around averages over the others.
        gradients: how that engine combines parameters' gradients over the ranks of `batch`: "mean" (DDP, FSDP, ZeRO), or "sum".
        verify: run a few tokens through the model, whole and spread, and raise where the head's features differ: no list of families can
            know what a model does between its tokens. Parameters that are not there yet (on the meta device, partitioned) leave it out.
        options: of `bigclass.convert_head`: z_loss, label_smoothing, grad_filter, engine.

    Returns:
        A `SequenceParallel`: `shard(inputs)` gives each rank its part of a batch, `off()` runs whole sequences, `restore()` ends it.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed. TypeError: no transformers model.
        ValueError: a model that mixes tokens elsewhere than in full attention (recurrent layers, convolutions, sliding windows that its
            attention function learns of by a mask only), "eager" attention, heads that W does not divide, rotary frequencies that
            depend on the length; each with the reason. A model whose features are others when it is spread.

    Example:
        >>> parallel = setup_ulysses(model, mesh["sp"], chunk_tokens=4096)
        >>> for inputs in loader:  # the same whole sequences on the ranks of a group
        ...     model(**parallel.shard(inputs)).loss.backward()
    """
    inner, ranks = base_model(model), Ranks.of(group)
    if getattr(inner, _PLACE, None) is not None:
        raise ArgumentError("model: it is spread over a sequence already; restore() the first set-up before another")
    world = 1 if ranks is None else ranks.size
    _check_model(inner, world)
    if ranks is not None:
        require("deepspeed", extra="ulysses")
    convert_head(model, **options)
    loss = getattr(inner, "loss_function", None)
    if not isinstance(loss, StreamedLoss) or loss.shift != 1:
        raise ArgumentError(f"model: expected one whose loss is transformers' next-token loss, got {type(inner).__name__}")
    if chunk_tokens is not None:
        mini_sequence(model, chunk_tokens)
    head: Any = output_head(inner)
    if ranks is not None or batch is not None:
        head.group = Spread(batch=group if batch is None else batch, gradients=gradients)
    made = SequenceParallel(inner, group, ranks, None if ranks is None else _Attention(group, ranks))
    if made.attention is not None:
        _register(inner.config.get_text_config()._attn_implementation)
        for module in inner.modules():
            module.__dict__[_PLACE] = made.attention
        if verify and all(p.device.type != "meta" and type(p) is nn.Parameter and not hasattr(p, "ds_status") for p in inner.parameters()):
            _verify(made)
    return made


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """A model whose sequences are spread over ranks: what `setup_ulysses` returns."""

    model: Any
    group: Any
    ranks: Ranks | None
    attention: _Attention | None

    def shard(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch of whole sequences, the same on all ranks of the group.

        Args:
            inputs: input_ids (B, T), labels (B, T) with -100 where nothing is predicted, as transformers' models take them (not shifted);
                position_ids (1 or B, T) if they do not count from 0; attention_mask (B, T) if sequences are padded on the right. Other
                tensors (B, T, ...) are cut, too; what is no tensor goes through.

        Returns:
            The model's arguments: input_ids, position_ids, labels and shift_labels (shifted, the same) of T/W tokens, T rounded up to a
            multiple of W by tokens that count nowhere.

        Raises:
            ValueError: inputs that differ between ranks (on each of them, where the exchange would hang or mix up sequences), padding on
                the left, several sequences packed into one row for an attention that would not keep them apart.

        Example:
            >>> model(**parallel.shard({"input_ids": ids, "labels": ids})).loss.backward()
        """
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ArgumentError(f"input_ids: expected token ids (B, T), got {_told(ids)}")
        length, (rank, world) = ids.shape[1], (0, 1) if self.ranks is None else (self.ranks.rank, self.ranks.size)
        _check_mask(inputs.get("attention_mask"), ids)
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=ids.device).expand(ids.shape)
        else:
            _check_positions(positions, ids, self.model.config.get_text_config()._attn_implementation)
        self._check_same(ids)
        more = -length % world
        whole: dict[str, Any] = {"input_ids": F.pad(ids, (0, more))}
        last = positions[:, -1:] if length else positions.new_zeros((positions.shape[0], 1))
        whole["position_ids"] = torch.cat([positions, last + torch.arange(1, more + 1, device=positions.device)], 1)
        labels = inputs.get("labels")
        if labels is not None:
            if not isinstance(labels, Tensor) or labels.shape != ids.shape:
                raise ArgumentError(f"labels: expected the shape of input_ids, {tuple(ids.shape)}, got {_told(labels)}")
            whole["labels"] = F.pad(labels[:, 1:], (0, more + 1), value=IGNORED)
        for name, value in inputs.items():
            if name in whole or name in ("labels", "attention_mask"):
                continue
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == ids.shape:
                value = F.pad(value, (0, 0) * (value.dim() - 2) + (0, more))
            elif isinstance(value, Tensor):
                raise ArgumentError(f"{name}: expected a tensor of {tuple(ids.shape)} and more axes, or no tensor, got {_told(value)}")
            whole[name] = value
        each = (length + more) // world
        own = {name: v[:, rank * each : (rank + 1) * each] if isinstance(v, Tensor) else v for name, v in whole.items()}
        if labels is not None:
            own["shift_labels"] = own["labels"]
        return {"use_cache": False, **own}

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within this context the model runs whole sequences on every rank by itself: to generate, or to evaluate.

        Example:
            >>> with parallel.off(), torch.no_grad():
            ...     model.generate(ids)
        """
        head: Any = output_head(self.model)
        group, head.group = head.group, None
        active = self.attention is not None and self.attention.active
        if self.attention is not None:
            self.attention.active = False
        try:
            yield
        finally:
            head.group = group
            if self.attention is not None:
                self.attention.active = active

    def restore(self) -> None:
        """Undo the part of the set-up that spreads: head and mini-sequences stay (`bigclass.restore_head`, `restore_mini_sequence`)."""
        head: Any = output_head(self.model)
        head.group = None
        for module in self.model.modules():
            module.__dict__.pop(_PLACE, None)

    def _check_same(self, ids: Tensor) -> None:
        """Raise on every rank if the ranks of the group were not given the same batch."""
        if self.ranks is None:
            return
        own = torch.tensor([*ids.shape, int(_checksum(ids))], device=ids.device)
        told = [torch.empty_like(own) for _ in range(self.ranks.size)]
        dist.all_gather(told, own, group=_process_group(self.group))
        if len({tuple(t.tolist()) for t in told}) > 1:
            shapes = [tuple(t.tolist()[:2]) for t in told]
            raise ArgumentError(
                f"inputs: expected the same batch on all ranks that share a sequence, got input_ids of shapes {shapes} with other values; "
                "let a DistributedSampler count data-parallel groups, not ranks"
            )


class _Attention:
    """DeepSpeed's exchange around a model's own attention function."""

    def __init__(self, group: Any, ranks: Ranks) -> None:
        _start_deepspeed(_process_group(group))
        self.group, self.ranks, self.active = _process_group(group), ranks, True
        self.made: dict[tuple[int, ...], Any] = {}

    def __deepcopy__(self, memo: Any) -> _Attention:
        return self  # of a copied model: process groups cannot be copied

    def __call__(self, core: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        """query (B, H, T/W, d); key, value (B, K, T/W, d): of this rank's tokens."""
        (b, heads, tokens, width), kv_heads, world = query.shape, key.shape[1], self.ranks.size
        if kwargs.get("position_ids") is None:
            raise ArgumentError(
                f"model: {type(module).__name__} does not hand position_ids on to its attention function, which Ulysses needs; give the "
                "model what shard(inputs) returns, or take another model"
            )
        if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
            raise ArgumentError(f"model: the attention of {type(module).__name__} is not causal, so it would look at padding")
        if key.shape[2] != tokens:
            raise ArgumentError(f"model: {key.shape[2]} keys for {tokens} queries; a cache of keys and values runs within parallel.off()")
        if key.shape != value.shape or key.shape[3] != width:
            raise ArgumentError(f"model: {type(module).__name__} has keys {tuple(key.shape)} unlike its values {tuple(value.shape)}")
        _check_heads(heads, kv_heads, world)
        # one module for each shape: it is told the batch size once and for all
        shape = (b, heads, kv_heads, width)
        if shape not in self.made:
            from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

            self.made[shape] = UlyssesSPAttentionHF(
                attn=core, batch_size=b, attn_head_count=heads, attn_head_size=width, kv_head_count=kv_heads, num_hidden_layers=1,
                process_group=self.group, seq_length_is_variable=True,
            )  # fmt: skip
        # No mask: the model made one for its own tokens only. The attention function is causal by itself.
        context, weights = self.made[shape](module, query, key, value, None, **kwargs)  # (B, T/W, H d)
        return context.unflatten(-1, (heads, -1)), weights  # as the model's own function returns it


def _register(name: Any) -> None:
    """Let the attention function of this name ask the module that calls it whether its sequence is spread."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    core = ALL_ATTENTION_FUNCTIONS[name]
    if getattr(core, _PLACE, False):
        return

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        spread = module.__dict__.get(_PLACE)
        if spread is None or not spread.active:
            return core(module, query, key, value, attention_mask, **kwargs)
        return spread(core, module, query, key, value, **kwargs)

    setattr(attention, _PLACE, True)
    # The name stays: models ask for it elsewhere, too (whether a mask is to be made, say).
    ALL_ATTENTION_FUNCTIONS[name] = attention


def _start_deepspeed(group: Any) -> None:
    """DeepSpeed's communication over torch's process groups, if nobody has started it."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        return
    backend = dist.get_backend(group)
    compiled = deepspeed.ops.__compatible_ops__
    before = compiled.get("deepspeed_shm_comm")
    if backend == "gloo":  # on CPUs it would first compile an all-reduce of its own: minutes, a C++ compiler, and it is not used here
        compiled["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    finally:
        if before is not None:
            compiled["deepspeed_shm_comm"] = before


# --- checks


def _verify(parallel: SequenceParallel) -> None:
    """Raise on all ranks unless the head's features of a short sequence are the same, spread and whole."""
    model, ranks = parallel.model, parallel.ranks
    assert ranks is not None
    head, seen = output_head(model), []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    length = 8 * ranks.size - 1  # one short, so that a model that looks at the padding (no causal one does) is found out
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    reason = ""
    try:
        with torch.no_grad(), evaluating(model):
            with parallel.off():
                model(input_ids=ids, use_cache=False)
            model(**parallel.shard({"input_ids": ids}))
        each = -(-length // ranks.size)
        whole = seen[0][:, ranks.rank * each : (ranks.rank + 1) * each].double()
        difference = seen[1][:, : whole.shape[1]].double() - whole
        error = torch.stack([difference.square().sum(), whole.square().sum()])
    except (ArgumentError, RuntimeError, AssertionError, TypeError) as e:
        error, reason = torch.full((2,), torch.nan, dtype=torch.float64, device=ids.device), f": {str(e).removeprefix('model: ')}"
    finally:
        handle.remove()
    dist.all_reduce(error, group=_process_group(parallel.group))  # the ranks raise together, or none does
    relative = (error[0] / error[1]).sqrt().item()
    eps = torch.finfo(seen[0].dtype if seen else torch.float32).eps
    if not relative <= min(eps**0.5, 256 * eps):  # rounding; in 16 bits that of several layers
        parallel.restore()
        reason = reason or (
            f": a relative difference of {relative:.1e} in {length} tokens; something in it besides causal attention looks at other "
            "tokens, or at where they lie"
        )
        raise ArgumentError(f"model: the features of {type(model).__name__} are not the same when its sequence is spread{reason}")


def _check_model(model: Any, world: int) -> None:
    config, name = model.config, type(model).__name__
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or text is not config:
        raise ArgumentError(f"model: expected a decoder of text alone, got {name}, which has an encoder or another modality")
    if not getattr(model, "_supports_attention_backend", False):
        raise ArgumentError(f"model: the attention of {name} does not go through transformers' AttentionInterface, so it cannot be spread")
    attention = text._attn_implementation
    if world > 1 and attention in (None, "eager", "paged|eager"):
        raise ArgumentError(
            f"model: {attention!r} attention needs a mask of T x T numbers; load it with attn_implementation='sdpa', or a flash attention"
        )
    kinds = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    if not kinds and getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        kinds = {"sliding_attention"}
    masked = {"sliding_attention"} if "flash" not in str(attention) else set()
    wrong = sorted(kinds - {"full_attention", "attention", "sliding_attention"} | (kinds & masked))
    if world > 1 and wrong:
        raise ArgumentError(
            f"model: {name} has layers of the kind {', '.join(wrong)}, which would not see the other ranks' tokens, or see too many"
            + ("; a flash attention knows sliding windows" if wrong == ["sliding_attention"] else "")
        )
    mixing = [m for m, module in model.named_modules() if isinstance(module, nn.RNNBase | nn.modules.conv._ConvNd)]
    if world > 1 and mixing:
        raise ArgumentError(f"model: {mixing[0]} of {name} mixes tokens outside the attention")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if world > 1 and kind in ("dynamic", "longrope"):
        raise ArgumentError(f"model: its rotary frequencies ({kind}) depend on the length of the sequence, of which each rank sees a part")
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int):
        _check_heads(heads, getattr(text, "num_key_value_heads", None) or heads, world)


def _check_heads(heads: int, kv_heads: int, world: int) -> None:
    if heads % world or (kv_heads % world and world % kv_heads):
        raise ArgumentError(
            f"group: expected a number of ranks that divides {heads} attention heads, and divides {kv_heads} key-value heads or is a "
            f"multiple of them, got {world} ranks"
        )


def _check_mask(mask: Any, ids: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ArgumentError(f"attention_mask: expected the shape of input_ids, {tuple(ids.shape)}, got {_told(mask)}")
    if (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
        raise ArgumentError(
            "attention_mask: expected padding on the right only, which a causal model never looks at, got some before tokens"
        )


def _check_positions(positions: Any, ids: Tensor, attention: str) -> None:
    if (
        not isinstance(positions, Tensor)
        or positions.dim() != 2
        or positions.shape[1] != ids.shape[1]
        or positions.shape[0] not in (1, len(ids))
    ):
        raise ArgumentError(f"position_ids: expected (1 or {len(ids)}, {ids.shape[1]}), got {_told(positions)}")
    if "flash" not in attention and (positions.diff(dim=1) != 1).any():
        raise ArgumentError(
            f"position_ids: expected positions that count up by one, since {attention!r} gets no mask here to keep packed sequences apart; "
            "take a flash attention, or a sequence a row"
        )


def _checksum(ids: Tensor) -> Tensor:
    """A number that batches of other tokens, or of the same in another order, hardly share."""
    flat = ids.reshape(-1).to(torch.int64)
    return (flat * (torch.arange(flat.numel(), device=ids.device) % 8191 + 1)).sum()


def _process_group(group: Any) -> Any:
    return group.get_group() if hasattr(group, "get_group") else group


def _told(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

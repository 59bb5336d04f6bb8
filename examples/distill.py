"""Distillation of a small language model from a larger one of another width: neither's logits are ever made, about a minute on two cores.

    pip install -e '.[examples]'
    python examples/distill.py [--divergence forward|reverse|jensen_shannon] [--temperature 1] [--stored 32] [--steps 80]

No network is needed: the text is the Python standard library's own sources, a part of them held out. A Llama of width 160 reads them
first; then two students of width 64 read less of them, from the same weights and the same batches,

- one by their tokens alone, the usual loss,
- one by the teacher's predictions as well: `lm_kl_div` streams both heads side by side, a few rows of each at a time.

With --stored K there is a third that never sees the teacher: it learns from its K best tokens at each position, which were written down
before (Hinton et al., arXiv:1503.02531), by `linear_topk_kl_div`. Watch the perplexity of the held-out part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bigclass
from bigclass import extras
from bigclass.demo import data

MIB = 2**20
LIBRARY_BYTES = 6_000_000  # of the standard library's sources


def llama(vocab: int, context: int, width: int, layers: int, seed: int) -> Any:
    """A small Llama with a streamed head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=context, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return bigclass.convert_head(LlamaForCausalLM(config).train())


def fit(model: Any, batches: list[Tensor], rate: float, loss: Callable[[Any, Tensor, int], Tensor]) -> float:
    """One pass over the batches (B, T). Returns the seconds it took."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches) + 1)
    start = time.perf_counter()
    for step, ids in enumerate(batches):
        loss(model, ids, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return time.perf_counter() - start


def by_tokens(model: Any, ids: Tensor, step: int) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def by_teacher(teacher: Any, options: argparse.Namespace) -> Callable[[Any, Tensor, int], Tensor]:
    """The share of the loss that is the teacher's: the divergence from its predictions. The rest is that of the tokens."""
    from bigclass.integrations.transformers import lm_kl_div, loss_only

    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        with torch.no_grad(), loss_only(teacher):
            taught = teacher(input_ids=ids).logits
        out = model(input_ids=ids, labels=ids)
        divergence = lm_kl_div(out.logits, taught, ids, divergence=options.divergence, temperature=options.temperature)
        return options.share * divergence + (1 - options.share) * out.loss

    return loss


def by_stored(teacher: Any, batches: list[Tensor], options: argparse.Namespace) -> Callable[[Any, Tensor, int], Tensor]:
    """The same from the teacher's K best tokens at each position, which are written down first, at the temperature."""
    with torch.no_grad():
        hidden = (teacher.model(ids).last_hidden_state / options.temperature for ids in batches)
        head = teacher.lm_head.weight
        stored = [bigclass.linear_topk(h[:, :-1], head, options.stored, return_log_probs=True)[1:] for h in hidden]

    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        hidden, weight = model.model(ids).last_hidden_state, model.lm_head.weight
        divergence = bigclass.linear_topk_kl_div(hidden[:, :-1], weight, *stored[step], temperature=options.temperature)
        return options.share * divergence + (1 - options.share) * bigclass.linear_cross_entropy(hidden, weight, ids, shift=1)

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divergence", choices=("forward", "reverse", "jensen_shannon"), default="forward")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the teacher in the loss; the rest is the tokens'")
    parser.add_argument("--stored", type=int, metavar="K", help="also learn from K stored tokens a position")
    parser.add_argument("--vocab", type=int, default=8_000)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=80, help="of each student")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        extras.require("transformers", "tokenizers", extra="examples")
    except ModuleNotFoundError as missing:
        raise SystemExit(f"This example {missing}") from None
    from bigclass.integrations.transformers import perplexity

    texts = data.read_corpus(LIBRARY_BYTES)
    tokenizer = data.learn_vocabulary(texts, options.vocab)
    held_out = 8
    count = max(options.teacher_steps, options.steps) + held_out
    ids = data.encode(texts, tokenizer, count * options.batch * options.context, options.seed)
    if len(ids) < count * options.batch * options.context:
        raise SystemExit(f"The text has {len(ids):,} tokens, too few for {count:,} batches; take fewer steps or a smaller batch")
    batches = list(ids.view(count, options.batch, options.context))
    fresh, seen = batches[:held_out], batches[held_out:]

    teacher = llama(options.vocab, options.context, 160, 4, options.seed)
    seconds = fit(teacher, seen[: options.teacher_steps], 4e-3, by_tokens)
    teacher.requires_grad_(False).eval()
    report("teacher", teacher, perplexity(teacher, fresh), seconds)

    taught = seen[: options.steps]
    losses = {"student, tokens alone": by_tokens, f"student, {options.divergence} divergence": by_teacher(teacher, options)}
    if options.stored:
        losses[f"student, {options.stored} stored tokens"] = by_stored(teacher, taught, options)
    for name, loss in losses.items():
        student = llama(options.vocab, options.context, 64, 2, options.seed + 1)
        seconds = fit(student, taught, 8e-3, loss)
        report(name, student, perplexity(student, fresh), seconds)
    size = options.batch * options.context * options.vocab * 4 / MIB
    print(f"A batch's logits, of one model, would take {size:,.0f} MiB; none were made.")


def report(name: str, model: Any, perplexity: float, seconds: float) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name:32} {parameters / 1e6:5.2f} M parameters  perplexity {perplexity:8.1f}  {seconds:5.1f} s of training", flush=True)


if __name__ == "__main__":
    main()

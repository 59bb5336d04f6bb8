"""Fine-tuning a language model with transformers' Trainer, whole or by LoRA: its logits are never made, in about a minute on two cores.

    pip install -e '.[examples]'
    python examples/finetune.py [--lora] [--rank 8] [--dense] [--model FOLDER] [--vocab 32000] [--batch 8] [--steps 40]

No network is needed. The text to adapt to is the Python language reference (prose, inside every Python), a part of it held out. The
model is a small Llama that first reads the sources of the standard library, so that there is something to adapt; or, with --model, one of
your own: a folder that `save_pretrained` wrote, tokenizer included.

The vocabulary is learnt on the spot. With 32,000 tokens on 4 layers of width 128 the head does most of the work, as in small models of
the field (Gemma 2B: 256,000 x 2048), and its logits would be the largest thing in memory. `convert_head` is the only line that differs.
Compare --dense: the same losses, and the memory of a batch's logits several times over.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

import bigclass
from bigclass import extras
from bigclass.demo import data
from bigclass.demo.memory import resident_peak

MIB = 2**20


def language_reference() -> list[str]:
    """The topics of Python's help(), in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def windows(ids: Tensor, context: int) -> list[dict[str, Tensor]]:
    """Samples of the Trainer, whose labels are the tokens themselves (the model's loss moves them)."""
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // context * context].view(-1, context)]


def small_llama(vocab: int, context: int, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=context, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def linear_layers(model: Any) -> list[str]:
    """Names for PEFT's target_modules: all linear layers, with the head (which "all-linear" leaves out)."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})


def fit(model: Any, train: list, test: list, steps: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train by the Trainer. Its last logs, the time that training took, and the perplexity on `test` before and after."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from bigclass.integrations.transformers import MemoryCallback, StreamedTrainer

    def evaluated() -> float:
        return math.exp(trainer.evaluate()["eval_loss"])  # windows are of one length: a mean over tokens

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=options.batch, per_device_eval_batch_size=options.batch, max_steps=steps,
            learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=max(steps // 10, 1), weight_decay=0.01,
            logging_steps=max(steps // 4, 1), save_strategy="no", report_to="none", disable_tqdm=True, seed=options.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        kind = Trainer if options.dense else StreamedTrainer  # the one that streams in evaluation, too
        trainer = kind(model, arguments, train_dataset=train, eval_dataset=test, callbacks=[MemoryCallback()])
        trainer.remove_callback(PrinterCallback)  # what it would print stands in the logs
        before, start = evaluated(), time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "before": before, "after": evaluated(), "logs": trainer.state.log_history}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true", help="PEFT's adapters on all linear layers, the head too")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--dense", action="store_true", help="logits in memory, for comparison")
    parser.add_argument("--model", help="a folder with a model and its tokenizer, instead of the small one")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--text", type=int, default=6_000_000, help="characters of the library's sources to learn words and weights from")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--first", type=int, default=50, help="steps of the small model on the library's sources")
    parser.add_argument("--steps", type=int, default=40, help="steps of fine-tuning")
    parser.add_argument("--rate", type=float, help="learning rate of fine-tuning; 2e-3, with --lora 1e-2, with --model a tenth of that")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        extras.require("transformers", "accelerate", "tokenizers", *(["peft"] if options.lora else []), extra="examples")
    except ModuleNotFoundError as missing:
        raise SystemExit(f"This example {missing}") from None
    torch.manual_seed(options.seed)

    prose = language_reference()
    if options.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, tokenizer = AutoModelForCausalLM.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
        ids = torch.tensor(tokenizer("".join(prose))["input_ids"])
        read = None
    else:
        sources = [text for text in data.read_corpus(options.text) if "topics = {" not in text]
        learned = data.learn_vocabulary(sources + prose, options.vocab)
        ids = torch.tensor(learned.encode("".join(prose)).ids)
        read = data.encode(sources, learned, options.first * options.batch * options.context, options.seed)
        model = small_llama(options.vocab, options.context, options.width)
    if not options.dense:
        bigclass.convert_head(model)
    vocabulary, features = model.get_output_embeddings().weight.shape
    kind, peak = "dense" if options.dense else "streamed", resident_peak()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; head {vocabulary:,} x {features:,}, {kind}")
    if peak is not None:
        print(f"peak memory of the process before training {peak / MIB:,.0f} MiB")

    cut = len(ids) * 9 // 10
    seen, fresh = windows(ids[:cut], options.context), windows(ids[cut:], options.context)
    if read is not None:
        report("The standard library's sources", fit(model, windows(read, options.context), fresh, options.first, 4e-3, options))
    rate = options.rate or (1e-2 if options.lora else 2e-3) * (0.1 if options.model else 1.0)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=options.rank, lora_alpha=4 * options.rank, target_modules=linear_layers(model), task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        if not options.dense:
            bigclass.convert_head(model)
        print(f"LoRA: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters are trained")
    report("The language reference", fit(model, seen, fresh, options.steps, rate, options))


def report(name: str, made: dict[str, Any]) -> None:
    """Losses, perplexity on the held-out part of the language reference, time and memory."""
    logs = [entry for entry in made["logs"] if "loss" in entry]
    print(f"\n{name}\n  training loss {'  '.join(format(entry['loss'], '.3f') for entry in logs)}")
    print(f"  perplexity of unseen prose: {made['before']:,.1f} before, {made['after']:,.1f} after; {made['seconds']:.1f} s of training")
    if logs:
        peak = logs[-1].get("peak_memory_mib")
        told = "not told by this system" if peak is None else f"{peak:,.0f} MiB"
        print(f"  peak memory {told}; one matrix of a batch's dense logits {logs[-1]['dense_logits_mib']:,.0f} MiB")


if __name__ == "__main__":
    main()

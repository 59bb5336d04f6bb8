"""transformers' Trainer over a converted model.

The Trainer itself needs nothing: training streams, and evaluation has real logits, for metrics. What stands here is evaluation for the
loss alone, which then streams, too, and memory in the logs. (`bigclass.integrations.transformers` imports this file when it is asked for.)
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from bigclass.core.errors import ArgumentError
from bigclass.demo.memory import resident_peak
from bigclass.heads.lazy import LazyLogits
from bigclass.integrations.transformers.heads import loss_only, output_head

MIB = 2**20


class StreamedTrainer(Trainer):
    """transformers' `Trainer`, whose evaluation writes no logits either where only the loss is wanted.

    That is so with `prediction_loss_only=True`, and by `evaluate()` without `compute_metrics`. All else is the Trainer's.

    Raises:
        ValueError: in such an evaluation, for a model whose head is not converted; and in a process that sees several GPUs and was started
            without a launcher, where the Trainer uses `nn.DataParallel`, which cannot gather lazy logits.

    Example:
        >>> model = bigclass.convert_head(AutoModelForCausalLM.from_pretrained(name))
        >>> trainer = StreamedTrainer(model, TrainingArguments("runs"), train_dataset=..., eval_dataset=..., callbacks=[MemoryCallback()])
        >>> trainer.train()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ArgumentError(
                f"args: expected one GPU a process, got {self.args.n_gpu} (nn.DataParallel cannot gather lazy logits); start with torchrun "
                "or accelerate launch, or show the process one GPU (CUDA_VISIBLE_DEVICES=0)"
            )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        streams = loss_only(self.accelerator.unwrap_model(model)) if prediction_loss_only else contextlib.nullcontext()
        with streams:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


class MemoryCallback(TrainerCallback):
    """Puts memory into the Trainer's logs, in MiB.

    peak_memory_mib: on a GPU the peak that PyTorch allocated on the current one, elsewhere the process's peak of resident memory (left
    out where the system does not tell).
    dense_logits_mib: rows x vocabulary x bytes of a number, for the largest batch of the training so far: *one* matrix of logits in the
    type that the head returns. A dense loss holds several matrices of that size (an fp32 copy, log-probabilities,
    a gradient). Left out within a model compiled as a whole, where nobody can look at batches.

    The Trainer's own reporters (`report_to`) come before callbacks that it is given. For them, too, put it in front:
    `trainer.callback_handler.callbacks.insert(0, MemoryCallback())`.

    Example:
        >>> Trainer(model, arguments, callbacks=[MemoryCallback()], ...).train()
        {'loss': 3.2, ..., 'peak_memory_mib': 812.0, 'dense_logits_mib': 1002.0}
    """

    def __init__(self) -> None:
        self._largest = 0  # bytes
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._remove()
        self._largest = 0
        self._hook = output_head(model).register_forward_hook(self._look)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        made = self._figures()
        if logs is not None:
            logs.update(made)
        if state.log_history:  # the entry of these logs, a copy
            state.log_history[-1].update(made)

    def _look(self, head: nn.Module, args: Any, logits: Any) -> None:
        if not torch.compiler.is_compiling() and head.training and isinstance(logits, torch.Tensor | LazyLogits):
            self._largest = max(self._largest, logits.numel() * logits.element_size())

    def _figures(self) -> dict[str, float]:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_peak()
        made = {} if peak is None else {"peak_memory_mib": peak / MIB}
        return made | ({"dense_logits_mib": self._largest / MIB} if self._largest else {})

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

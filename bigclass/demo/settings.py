"""The sizes of the demo, fitted to the device it runs on."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

# Bytes, above what any Python version ships: the test suites are then read too. Yields vocabularies up to about 120,000.
WHOLE_LIBRARY = 64_000_000


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What the demo trains, on what, and where its plot goes. The defaults take about two minutes on two CPU cores."""

    device: torch.device = torch.device("cpu")
    vocab: int = 32_000
    """Tokens of the byte-pair vocabulary: C."""
    corpus_bytes: int = 12_000_000
    """How much of the standard library to read."""
    steps: int = 40
    batch: int = 8
    """Sequences in a batch; N is batch * context."""
    context: int = 256
    """Tokens in a sequence."""
    width: int = 256
    """Features of a token: D."""
    layers: int = 2
    heads: int = 4
    """Attention heads in each layer."""
    learning_rate: float = 2e-3
    """Peak of the one-cycle schedule."""
    bf16: bool = False
    """Compute under bfloat16 autocast."""
    seed: int = 0
    out: Path = Path("bigclass-demo.png")

    @classmethod
    def for_device(cls, device: torch.device, **chosen) -> "DemoSettings":
        """The settings that suit a device, with the fields of `chosen` put in their place."""
        settings = cls(device=device, **chosen)
        fitted = {}
        if device.type == "cuda":
            fitted |= _gpu_sizes(device, settings.vocab)
        if settings.vocab > cls().vocab:
            fitted["corpus_bytes"] = WHOLE_LIBRARY
        return replace(settings, **(fitted | chosen))

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def _gpu_sizes(device: torch.device, vocab: int) -> dict[str, object]:
    """A larger model, and as large a batch as the *dense* loss layer can hold in half of the free memory."""
    context = 1024
    # Dense cross-entropy under autocast holds bf16 logits, their float32 copy, its log-softmax and the gradients of these.
    dense_bytes_per_sequence = context * vocab * (2 + 4 + 4 + 4 + 2)
    free, _ = torch.cuda.mem_get_info(device)
    batch = max(1, min(32, free // 2 // dense_bytes_per_sequence))
    return {
        "steps": 200,
        "batch": batch,
        "context": context,
        "width": 768,
        "layers": 6,
        "heads": 12,
        "learning_rate": 1e-3,
        "bf16": torch.cuda.is_bf16_supported(),
    }

"""transformers: any model's output embeddings as a streamed head; losses, evaluation and training loops over it."""

from typing import TYPE_CHECKING, Any

from bigclass.integrations.transformers.evaluation import perplexity, token_losses
from bigclass.integrations.transformers.heads import convert_head, head_options, loss_only, output_head, restore_head
from bigclass.integrations.transformers.loss import StreamedLoss, lm_kl_div, lm_loss
from bigclass.integrations.transformers.sharding import shard_vocabulary

if TYPE_CHECKING:
    from bigclass.integrations.transformers.training import MemoryCallback, StreamedTrainer

__all__ = [
    "MemoryCallback", "StreamedLoss", "StreamedTrainer", "convert_head", "head_options", "lm_kl_div", "lm_loss", "loss_only",
    "output_head", "perplexity", "restore_head", "shard_vocabulary", "token_losses",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("MemoryCallback", "StreamedTrainer"):  # importing the Trainer brings much along
        from bigclass.integrations.transformers import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""transformers: any model's output embeddings as a streamed head; losses, evaluation and training loops over it."""

from bigclass.integrations.transformers.heads import convert_head, head_options, loss_only, output_head, restore_head
from bigclass.integrations.transformers.loss import StreamedLoss, lm_loss

__all__ = ["StreamedLoss", "convert_head", "head_options", "lm_loss", "loss_only", "output_head", "restore_head"]

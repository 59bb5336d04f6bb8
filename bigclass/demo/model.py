"""A small causal transformer, and the dense loss layer that streamed logits are compared with."""

import torch
from torch import nn
from torch.nn import functional as F

# Standard deviation of the initial embeddings and matrices, as in GPT-2.
INIT_STD = 0.02


class DenseHead(nn.Linear):
    """Next-token loss as it is usually written: logits in memory, then cross-entropy.

    Written at its best: the last position is dropped before the matrix product, so that no second copy of the logits is made.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss (scalar) of `hidden` (B, T, D) at position t against `labels` (B, T) at position t + 1."""
        logits = super().forward(hidden[:, :-1])  # (B, T - 1, C)
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a layer norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, D) -> (B, T, D)
        query, key, value = (
            self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (B, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Causal transformer whose head computes the loss, `head(hidden, labels)`, with its weight tied to the token embedding.

    Args:
        head: the loss layer, (D, C) without a bias; dense and streamed ones are interchangeable.
        context: longest sequence.
        layers: number of blocks.
        heads: attention heads in each; they divide the width.
    """

    def __init__(self, head: nn.Linear, context: int, layers: int, heads: int) -> None:
        super().__init__()
        width = head.in_features
        self.tokens = nn.Embedding(head.out_features, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = head
        self.head.weight = self.tokens.weight
        self.apply(_initialise)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss (scalar) of `ids` (B, T)."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)), ids)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

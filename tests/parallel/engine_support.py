"""Small models under every head, and what a training of them comes to: shared by the tests of DDP, FSDP2 and DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import bigclass
from tests.support import error

C, D, N = 301, 16, 12  # classes that divide by no number of ranks here; rows that divide by 1, 2 and 3
V = 211  # tokens of the language model
HEADS = ("cce", "multilabel", "margin")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def head_of(kind: str) -> nn.Module:
    if kind == "cce":
        return bigclass.CCEHead(D, C, softcap=15.0, engine="tiled")
    if kind == "multilabel":
        return bigclass.MultiLabelHead(D, C, reduction="mean", engine="tiled")
    return bigclass.MarginHead(D, C, scale=16.0, subcenters=2, engine="tiled")


class Net(nn.Module):
    """Two blocks and one head or several. `forward(x)` gives a head's logits, `forward(x, targets)` the sum of the heads' losses."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.heads = nn.ModuleDict({kind: head_of(kind) for kind in kinds})

    def forward(self, x: Tensor, targets: dict[str, Tensor] | None = None) -> Any:
        for block in self.blocks:
            x = block(x)
        if targets is not None:
            return torch.stack([head(x, targets[kind]) for kind, head in self.heads.items()]).sum()
        (head,) = self.heads.values()
        return head(x)


def build(*kinds: str, dtype: torch.dtype = torch.float64) -> tuple[Net, Tensor, dict[str, Tensor]]:
    """The net, features (N, D) and the targets of every head."""
    torch.manual_seed(5)
    net = Net(*kinds).to(dtype).train()
    x = torch.randn(N, D, dtype=torch.float64).to(dtype)
    labels, positives = torch.randint(C, (N,)), torch.randint(C, (N, 3))
    return net, x, {"cce": labels, "multilabel": positives, "margin": labels}


def llama(tied: bool, kv_heads: int = 1) -> Any:
    """transformers' language model, tiny, in float64."""
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=kv_heads,
        max_position_embeddings=32, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().train()


def texts() -> Tensor:
    """(2, 12) tokens."""
    return torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(1))


def part(t: Any, rank: int, world: int) -> Any:
    """This rank's rows of a tensor, or of each in a dict."""
    if isinstance(t, dict):
        return {name: part(value, rank, world) for name, value in t.items()}
    return t.chunk(world)[rank]


def loss_of(net: nn.Module, x: Tensor, targets: dict[str, Tensor], kind: str, explicit: bool) -> Tensor:
    """The same number from the head's targets and from an unchanged criterion of lazy logits."""
    if explicit:
        return net(x, targets)
    logits = net(x)
    assert isinstance(logits, bigclass.LazyLogits)
    if kind == "multilabel":
        dense = torch.zeros(len(x), C, dtype=x.dtype).scatter_(1, targets[kind], 1.0)
        return nn.BCEWithLogitsLoss()(logits, dense)
    return nn.CrossEntropyLoss()(logits, targets[kind])


def whole(t: Tensor) -> Tensor:
    """A tensor with all that lies on other ranks."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()  # type: ignore[operator]


def moved(parameters: Any, before: list[Tensor]) -> Tensor:
    """How far training moved the parameters, as one vector: an error of it is one of the gradients, not of the start."""
    return torch.cat([(whole(p) - b).flatten() for p, b in zip(parameters, before, strict=True)])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def worst(mine: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient."""
    assert mine.keys() == exact.keys() and len(exact) > 3
    return max(error(mine[name], exact[name]) for name in exact)


def pairs() -> Iterator[tuple[str, bool]]:
    """(head, is its form the explicit one?); a margin's logits are never lazy."""
    for kind in HEADS:
        yield kind, True
        if kind != "margin":
            yield kind, False

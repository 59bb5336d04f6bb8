"""Real text that every machine has, the Python standard library's own sources, and a byte-pair vocabulary learned from it."""

import random
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Byte-level BPE starts from the 256 bytes, so that no text is unknown to it.
BYTES = 256
PASSAGE_CHARACTERS = 8192


def read_corpus(max_bytes: int) -> list[str]:
    """The standard library's sources, in an order that does not depend on the machine, up to `max_bytes` characters in all.

    Raises:
        ValueError: if this Python came without sources (some embedded and frozen builds).
    """
    texts, size = [], 0
    for path in _library_sources(Path(sysconfig.get_paths()["stdlib"])):
        text = path.read_text(encoding="utf-8", errors="ignore")[: max_bytes - size]
        texts.append(text)
        size += len(text)
        if size >= max_bytes:
            break
    if not size:
        raise ValueError(f"no *.py files under {sysconfig.get_paths()['stdlib']}: this Python came without the sources of its library")
    return texts


def _library_sources(root: Path) -> list[Path]:
    """Library modules first, then its test suites, which some systems leave out."""

    def is_test(path: Path) -> bool:
        return not {"test", "tests", "idle_test"}.isdisjoint(path.parts)

    sources = (path.relative_to(root) for path in root.rglob("*.py"))
    own = [path for path in sources if {"site-packages", "dist-packages"}.isdisjoint(path.parts)]
    return [root / path for path in sorted(own, key=lambda path: (is_test(path), path.as_posix()))]


def learn_vocabulary(texts: list[str], size: int) -> "Tokenizer":
    """Byte-level BPE with exactly `size` tokens.

    Raises:
        ValueError: if `size` is out of reach, below the single bytes or above what the text yields.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size <= BYTES:
        raise ValueError(f"vocab must be larger than the {BYTES} single bytes, got {size}")
    reached = 0
    for min_frequency in (2, 1):  # pairs seen once make poor tokens: taken only if the vocabulary is not reached without
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=min_frequency,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        reached = tokenizer.get_vocab_size()
        if reached == size:
            return tokenizer
    megabytes = sum(map(len, texts)) / 1e6
    raise ValueError(f"vocab {size} is out of reach: {megabytes:.1f} MB of standard library text yield {reached} tokens")


def encode(texts: list[str], tokenizer: "Tokenizer", tokens: int, seed: int) -> torch.Tensor:
    """Token ids (T,) of passages drawn from all over the corpus; T is `tokens`, or less where the corpus ends first."""
    passages = [text[start : start + PASSAGE_CHARACTERS] for text in texts for start in range(0, len(text), PASSAGE_CHARACTERS)]
    random.Random(seed).shuffle(passages)

    def ids() -> Iterator[int]:
        # A few passages at a time: encoding all of the corpus would take longer than learning its vocabulary.
        for start in range(0, len(passages), 64):
            for encoding in tokenizer.encode_batch(passages[start : start + 64]):
                yield from encoding.ids

    return torch.tensor(list(islice(ids(), tokens)))


def batches(ids: torch.Tensor, batch: int, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches (batch, context) of windows of `ids` (T,), shuffled anew each time the text has been gone through.

    Raises:
        ValueError: if the text is too short for one batch.
    """
    windows = ids[: len(ids) // context * context].view(-1, context)
    if len(windows) < batch:
        raise ValueError(f"the text has {len(ids)} tokens, one batch needs {batch} windows of {context}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(windows), generator=generator).split(batch):
            if len(rows) == batch:
                yield windows[rows]

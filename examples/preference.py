"""Preference and policy training of a small language model: a DPO loss and a GRPO loss in twenty lines of PyTorch each.

    python examples/preference.py [--method dpo grpo] [--steps 60] [--pretraining 250]

The text is what every machine has, lines of Python's own library. A transformer learns them first; then

- dpo: prefers a line as it is in the library to the same line with two tokens swapped (Rafailov et al., arXiv:2305.18290).
  Watch the reward margin grow from 0, and the share of pairs of lines it never saw that it gets right.
- grpo: writes lines itself, and is rewarded for those that Python's parser accepts (Shao et al., arXiv:2402.03300).
  Watch that share grow, and the entropy of its choices.

Policy and reference share embeddings and head, which stay frozen: so the head makes no gradient of its own, and the reference is no more
than a frozen copy of the blocks. No logits of a batch are ever stored: `head.sequence_log_prob` and `head.log_prob` stream them.
"""

from __future__ import annotations

import argparse
import ast
import copy
import re
import time
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigclass
from bigclass.demo.data import read_corpus
from bigclass.demo.model import LanguageModel

TOKEN = re.compile(r"\w+|==|!=|<=|>=|->|\+=|-=|\*\*|//|\S")
PAD, END = 0, 1  # of the vocabulary; END also begins a line
PROMPT = 3  # tokens of a line that are given: END and two more


class Policy(nn.Module):
    """Blocks of a language model between its frozen embeddings and its frozen head, which other policies share."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.shared = [model.requires_grad_(False)]  # in a list: not this module's own
        self.blocks, self.norm = (copy.deepcopy(part).requires_grad_(True) for part in (model.blocks, model.norm))

    @property
    def head(self) -> bigclass.LMHead:
        return self.shared[0].head

    def forward(self, ids: Tensor) -> Tensor:
        """Features (B, T, D) of ids (B, T)."""
        model = self.shared[0]
        return self.norm(self.blocks(model.tokens(ids) + model.positions.weight[: ids.shape[1]]))


def dpo_loss(policy: Policy, reference: Policy, chosen: Tensor, rejected: Tensor, beta: float = 0.2) -> tuple[Tensor, Tensor]:
    """-log sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected)): (loss, reward margins (B,))."""
    ids = torch.cat((chosen, rejected))  # (2 B, T), padding is the head's ignore_index
    logp = policy.head.sequence_log_prob(policy(ids), ids)
    with torch.no_grad():
        logp_reference = reference.head.sequence_log_prob(reference(ids), ids)
    better, worse = (beta * (logp - logp_reference)).chunk(2)
    return -F.logsigmoid(better - worse).mean(), (better - worse).detach()


def grpo_loss(
    policy: Policy, ids: Tensor, written: Tensor, advantage: Tensor, old: Tensor, reference: Tensor, clip: float = 0.2, beta: float = 0.02
) -> tuple[Tensor, Tensor]:
    """Clipped policy gradient and a penalty for leaving the reference, a mean over written tokens: (loss, mean entropy).

    ids (B, T). written (B, T - 1): which of ids[:, 1:] the policy chose. advantage (B,). old, reference (B, T - 1): log p before."""
    labels = ids.clone()
    labels[:, 1:][~written] = PAD  # the prompt is not scored
    logp, entropy = policy.head.log_prob(policy(ids), labels, return_entropy=True)
    ratio = (logp - old).exp()
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - clip, 1 + clip) * advantage[:, None])
    away = (reference - logp).exp() - (reference - logp) - 1.0
    count = written.sum()
    return -((gain - beta * away) * written).sum() / count, (entropy * written).sum().detach() / count


@torch.no_grad()
def write(policy: Policy, ids: Tensor, length: int) -> Tensor:
    """Lines (B, length) that begin as ids (B, PROMPT), ended by END and padded."""
    ended = torch.zeros(len(ids), dtype=torch.bool)
    while ids.shape[1] < length:
        p = policy.head.logits(policy(ids)[:, -1]).softmax(-1)
        p[:, PAD] = 0.0
        chosen = torch.multinomial(p, 1).squeeze(1).masked_fill(ended, PAD)
        ended |= chosen == END
        ids = torch.cat((ids, chosen[:, None]), 1)
    return ids


def parses(line: str) -> bool:
    """Does Python's parser accept this line? One that opens a block is given a body."""
    try:
        return len(line) > 0 and bool(ast.parse(line + " pass" if line.endswith(":") else line).body)
    except (SyntaxError, ValueError):
        return False


def swapped(lines: Tensor) -> Tensor:
    """Each of the lines (B, T) with two neighbours, chosen at random, in each other's place."""
    out = lines.clone()
    for row, line in enumerate(lines):
        places = [t for t in range(PROMPT - 1, int((line != PAD).sum()) - 2) if line[t] != line[t + 1]]
        if places:
            t = places[int(torch.randint(len(places), ()))]
            out[row, t], out[row, t + 1] = line[t + 1], line[t]
    return out


def read_lines(vocab: int, length: int) -> tuple[Tensor, list[str]]:
    """Lines (N, length) of the library whose tokens are all among the `vocab` most frequent, each once, and the tokens."""
    text = [line.strip() for source in read_corpus(3_000_000) for line in source.splitlines()]
    split = [TOKEN.findall(line) for line in dict.fromkeys(text) if line.isascii() and parses(line)]
    split = [tokens for tokens in split if PROMPT + 2 <= len(tokens) <= length - 2]
    tokens = ["<pad>", "<end>", *[t for t, _ in Counter(t for line in split for t in line).most_common(vocab - 2)]]
    number = {t: i for i, t in enumerate(tokens)}
    kept = [[END, *[number[t] for t in line], END] for line in split if all(t in number for t in line)]
    return torch.tensor([line + [PAD] * (length - len(line)) for line in kept]), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=["dpo", "grpo"], default=["dpo", "grpo"])
    parser.add_argument("--steps", type=int, default=60, help="of each method")
    parser.add_argument("--pretraining", type=int, default=250, help="steps of plain language modelling before")
    parser.add_argument("--batch", type=int, default=48, help="lines")
    parser.add_argument("--vocab", type=int, default=4096)
    options = parser.parse_args()

    torch.manual_seed(0)
    length, group = 16, 8
    lines, tokens = read_lines(options.vocab, length)
    lines = lines[torch.randperm(len(lines))]
    held_out, lines = lines[:512], lines[512:]
    head = bigclass.LMHead(96, len(tokens), ignore_index=PAD)
    model = LanguageModel(head, length, layers=2, heads=4)
    rows, size = 2 * options.batch * length, 2 * options.batch * length * len(tokens) * 4 / 2**20
    print(f"{len(lines):,} lines, {len(tokens):,} tokens; logits of a batch of pairs, {rows:,} x {len(tokens):,}, would be {size:.0f} MiB")

    def batch() -> Tensor:
        return lines[torch.randint(len(lines), (options.batch,))]

    optimizer, start = torch.optim.AdamW(model.parameters(), 2e-3), time.perf_counter()
    for step in range(1, options.pretraining + 1):
        loss = model(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(options.pretraining // 5, 1) == 0:
            print(f"language model  step {step:4d}  loss {loss.item():6.3f}  {time.perf_counter() - start:5.1f} s")
    reference = Policy(model).requires_grad_(False)

    if "dpo" in options.method:
        policy, pairs = Policy(model), (held_out, swapped(held_out))
        optimizer = torch.optim.AdamW(policy.parameters(), 3e-4)
        for step in range(options.steps + 1):
            if step % max(options.steps // 6, 1) == 0:
                with torch.no_grad():
                    loss, margin = dpo_loss(policy, reference, *pairs)
                right = (margin.sign() / 2 + 0.5).mean()  # a tie is half right
                print(f"dpo   step {step:4d}  loss {loss:6.3f}  reward margin {margin.mean():+7.3f}  right {right:6.1%}")
            chosen = batch()
            loss, _ = dpo_loss(policy, reference, chosen, swapped(chosen))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if "grpo" in options.method:
        policy, rewards = Policy(model), []
        optimizer = torch.optim.AdamW(policy.parameters(), 5e-4)
        for step in range(1, options.steps + 1):
            prompts = batch()[: max(options.batch // 3, 1), :PROMPT].repeat_interleave(group, 0)  # a group of lines from each
            ids = write(policy, prompts, length)
            texts = [" ".join(tokens[i] for i in line if i not in (PAD, END)) for line in ids.tolist()]
            reward = torch.tensor([float(parses(text)) for text in texts])
            by_group = reward.view(-1, group)
            advantage = ((by_group - by_group.mean(1, keepdim=True)) / (by_group.std(1, keepdim=True) + 1e-4)).flatten()
            written = (ids[:, 1:] != PAD) & (torch.arange(1, length) >= PROMPT)
            with torch.no_grad():
                old, before = (p.head.log_prob(p(ids), ids) for p in (policy, reference))
            for _ in range(2):
                loss, entropy = grpo_loss(policy, ids, written, advantage, old, before)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            rewards.append(reward.mean().item())
            if step % max(options.steps // 6, 1) == 0:
                recent = rewards[-max(options.steps // 6, 1) :]
                print(f"grpo  step {step:4d}  lines that parse {sum(recent) / len(recent):6.1%}  entropy {entropy:5.2f}  {texts[0]}")


if __name__ == "__main__":
    main()

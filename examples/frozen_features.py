"""A linear classifier over many classes on frozen features: the explicit form of `CCEHead`, on any laptop in under a minute.

    python examples/frozen_features.py [--classes 50000] [--steps 60]

The data are made up: each class has a prototype, a sample is its prototype and noise. Watch the loss fall from log C, and the
share of right predictions, which `predict` finds without logits, rise.
"""

from __future__ import annotations

import argparse
import math

import torch

import bigclass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    prototypes = torch.nn.functional.normalize(torch.randn(options.classes, options.features), dim=1)
    head = bigclass.CCEHead(options.features, options.classes, label_smoothing=0.05)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    print(head)
    print(bigclass.explain(options.batch, options.classes, options.features))
    print(f"log C = {math.log(options.classes):.2f}")

    for step in range(1, options.steps + 1):
        labels = torch.randint(options.classes, (options.batch,))
        features = prototypes[labels] + 0.03 * torch.randn(options.batch, options.features)
        loss, stats = head(features, labels, return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():6.3f}  right {stats.correct.float().mean().item():6.1%}")

    _, predicted = head.predict(features, k=5)
    print(f"label among the five largest: {(predicted == labels[:, None]).any(1).float().mean().item():.1%}")


if __name__ == "__main__":
    main()

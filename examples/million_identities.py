"""A margin head over a million identities on two processes, each with half of the classes and half of the batch.

    pip install -e .
    torchrun --nproc-per-node 2 examples/million_identities.py [--identities 1000000] [--steps 60] [--rate 0.1] [--seed 0]

What a camera sees of somebody is made up here: 32 numbers that are the person, 96 that are light, pose and chance, mixed by a random
rotation, so that pictures are compared badly as they are. Most pictures are of 2,000 people who come often, the others of anybody among
the million. A small network (DistributedDataParallel) makes 64 numbers of each picture, and `MarginHead` (ArcFace) tells identities by
them. Each rank holds the weights of its half (`group=bigclass.Spread(classes=world, batch=world)`): features and labels are gathered,
every rank makes the logits of its classes for the whole batch, tile by tile, and two numbers a row are merged. The loss is the exact one
over a million classes. With --rate 0.1 each step takes a tenth of them, all targets included, as Partial FC does, and touches no others.

Printed: the loss, the time of a step, what the head needs, and how well people who were never in training are told apart: the share of
pairs (same, other) that one threshold on the cosine decides rightly, before and after.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigclass

PERSON, CHANCE, FEATURES, OFTEN = 32, 96, 64, 2000
MIB = 2**20


class Camera:
    """Pictures (n, 128) of people by their number. A person's traits come from the number alone, so that nobody has to be stored."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rotation = torch.linalg.qr(torch.randn(PERSON + CHANCE, PERSON + CHANCE, generator=generator))[0]
        self.directions = torch.randn(61, PERSON, generator=generator)

    def traits(self, people: Tensor) -> Tensor:
        """(n, PERSON): sums of fixed directions, their signs a hash of the number."""
        bits = (people.unsqueeze(1) * 2654435761 % (2**61 - 1)) >> torch.arange(61)
        return F.normalize((2.0 * (bits & 1) - 1.0) @ self.directions)

    def pictures(self, people: Tensor, generator: torch.Generator) -> Tensor:
        chance = torch.randn(people.shape[0], CHANCE, generator=generator) * 0.25
        return torch.cat((self.traits(people), chance), 1) @ self.rotation


def told_apart(network: nn.Module, camera: Camera, generator: torch.Generator, first: int) -> float:
    """The share of 2,000 pairs of people from number `first` on that the best threshold decides rightly."""
    people = first + torch.arange(2001)
    with torch.no_grad():
        one, two = (F.normalize(network(camera.pictures(people, generator))) for _ in range(2))
    same, other = (one * two).sum(1)[:-1], (one[:-1] * two[1:]).sum(1)
    thresholds = torch.cat((same, other)).sort().values
    right = (same > thresholds.unsqueeze(1)).float().mean(1) + (other <= thresholds.unsqueeze(1)).float().mean(1)
    return float(right.max()) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--identities", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="pictures of a rank")
    parser.add_argument("--rate", type=float, default=1.0, help="share of the classes for each step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    network = nn.Sequential(nn.Linear(PERSON + CHANCE, 256), nn.GELU(), nn.Linear(256, FEATURES))
    camera = Camera(args.seed)
    before = told_apart(network, camera, torch.Generator().manual_seed(1), args.identities)

    sizes = tuple([len(part) for part in torch.arange(args.identities).tensor_split(world)])
    spread = bigclass.Spread(classes=dist.group.WORLD, batch=dist.group.WORLD, class_sizes=sizes)
    torch.manual_seed(args.seed + 1 + rank)  # each rank has classes of its own
    head = bigclass.MarginHead(FEATURES, sizes[rank], scale=32.0, margin=0.2, group=spread)
    whole = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    of_head = torch.optim.SGD(head.parameters(), lr=0.3)  # dense or sparse gradients alike
    generator = torch.Generator().manual_seed(args.seed + 100 + rank)
    sample = None if args.rate == 1.0 else bigclass.ClassSampling(args.rate, generator)

    losses, times = [], []
    for step in range(args.steps):
        started = time.perf_counter()
        often = torch.randint(OFTEN, (args.batch,), generator=generator)
        people = torch.where(
            torch.rand(args.batch, generator=generator) < 0.9,
            often * (args.identities // OFTEN),  # on all ranks
            torch.randint(args.identities, (args.batch,), generator=generator),
        )
        loss = head(whole(camera.pictures(people, generator)), people, sample=sample)
        optimizer.zero_grad()
        of_head.zero_grad()
        loss.backward()
        optimizer.step()
        of_head.step()
        losses.append(float(loss.detach()))
        times.append(time.perf_counter() - started)
        if rank == 0 and (step + 1) % max(args.steps // 5, 1) == 0:
            print(f"step {step + 1:4}   loss {losses[-1]:7.3f}   {median(times):.2f} s a step", flush=True)

    after = told_apart(network, camera, torch.Generator().manual_seed(1), args.identities)
    if rank == 0:
        rows, classes = args.batch * world, args.identities
        plan = bigclass.explain(rows, sizes[0], FEATURES)
        print(
            f"\n{classes:,} identities on {world} ranks: {sizes[0]:,} classes, {sizes[0] * FEATURES * 4 / MIB:.0f} MiB of weights on each"
        )
        print(f"logits that were never written: {rows} x {sizes[0]:,} a rank, {rows * sizes[0] * 4 / MIB:.0f} MiB; workspace instead: "
              f"{plan.workspace / MIB:.0f} MiB")  # fmt: skip
        print(f"strangers told apart: {before:.1%} before, {after:.1%} after")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""The same job as an expert would write it for this one purpose: one uint8 tensor, whole batches, DDP if asked.

    python benchmarks/cifar10/handwritten.py --root DIR [--epochs 10] [--seed 0]
    torchrun --standalone --nproc-per-node 2 benchmarks/cifar10/handwritten.py --root DIR

The weights at the start and the order of the samples are disttrain's, so that with one worker the weights at the end
must have the same bits. Prints one JSON object: seconds of each epoch, accuracy, SHA-256 of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import Net, read_split
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from disttrain.checkpoint import weights_sha256
from disttrain.rng import permutation

BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    if size > 1:
        dist.init_process_group("gloo")
    images, labels = read_split(arguments.root, "train")
    torch.manual_seed(arguments.seed)
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True) if size > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    share = BATCH // size
    seconds = []
    for epoch in range(arguments.epochs):
        started = time.perf_counter()
        order = permutation(arguments.seed, epoch, len(images))
        for start in range(rank * share, len(order), BATCH):
            chosen = order[start : start + share]
            batch = (images[chosen].float() / 255 - 0.5) / 0.5
            loss = functional.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        images, labels = read_split(arguments.root, "test")
        with torch.no_grad():
            logits = torch.cat([net((chunk.float() / 255 - 0.5) / 0.5) for chunk in images.split(500)])
        accuracy = float((logits.argmax(1) == labels).double().mean())
        answer = {"epoch_seconds": seconds, "accuracy": accuracy, "sha256": weights_sha256(net.state_dict())}
        print(json.dumps(answer))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""The job as PyTorch's CIFAR-10 tutorial does it: a Dataset of pictures, transforms one by one, a DataLoader.

https://pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html, with batches of 100 and as many epochs as asked.

    python benchmarks/cifar10/tutorial.py --root DIR [--epochs 10] [--seed 0]

DIR holds cifar-10-batches-py. Prints one JSON object: seconds of each epoch, accuracy.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from common import Net, read_split
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision.datasets.CIFAR10 is, without its md5 check: PIL images, transformed one by one."""

    def __init__(self, root: Path, split: str) -> None:
        self.images, self.labels = read_split(root, split)
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(to_pil_image(self.images[index])), int(self.labels[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    loader = DataLoader(Pictures(arguments.root, "train"), batch_size=100, shuffle=True, num_workers=2)
    test_loader = DataLoader(Pictures(arguments.root, "test"), batch_size=100, num_workers=2)
    net = Net()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    seconds = []
    for _ in range(arguments.epochs):
        started = time.perf_counter()
        running_loss = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        seconds.append(time.perf_counter() - started)
    correct = 0
    with torch.no_grad():
        for images, labels in test_loader:
            correct += int((net(images).argmax(1) == labels).sum())
    print(json.dumps({"epoch_seconds": seconds, "accuracy": correct / 10_000}))


if __name__ == "__main__":
    main()

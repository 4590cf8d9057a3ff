"""The tutorial's job as users of Lightning and of Accelerate write it: their loop, the tutorial's data set and loader.

    python benchmarks/cifar10/peers.py lightning --root DIR [--epochs 10] [--seed 0]
    torchrun --standalone --nproc-per-node 2 benchmarks/cifar10/peers.py accelerate --root DIR

The global batch is 100 with one process and with two. Prints one JSON object: seconds of each epoch. They are optional:
`pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Net
from torch import nn
from torch.utils.data import DataLoader
from tutorial import Pictures

BATCH = 100


def loader_of(root: Path) -> DataLoader[Any]:
    """Batches of this process; readers for all processes together as many as in the tutorial."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    return DataLoader(Pictures(root, "train"), batch_size=BATCH // size, shuffle=True, num_workers=2 // size)


def with_accelerate(root: Path, epochs: int) -> list[float]:
    """Seconds of each epoch."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader_of(root))
    criterion = nn.CrossEntropyLoss()
    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(criterion(model(images), labels))
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    accelerator.end_training()
    return seconds


def with_lightning(root: Path, epochs: int) -> list[float]:
    """Seconds of each epoch."""
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = Net(), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            images, labels = batch
            return self.criterion(self.net(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)

    class Clock(lightning.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    clock = Clock()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        max_epochs=epochs,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader_of(root))
    return clock.seconds


PEERS: dict[str, Callable[[Path, int], list[float]]] = {"accelerate": with_accelerate, "lightning": with_lightning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("WORLD_SIZE", 1))))
    seconds = PEERS[arguments.peer](arguments.root, arguments.epochs)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps({"epoch_seconds": seconds}))


if __name__ == "__main__":
    main()

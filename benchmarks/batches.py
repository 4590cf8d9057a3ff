"""Batches of augmented images: a whole batch at once, against torchvision's transforms of one image after the other.

    python benchmarks/batches.py [--rounds 20]

Both crop (padding 4), flip and normalise images of CIFAR-10's size in batches of 100, and both have them in memory:
ours as one tensor of bytes, as the recipes' loader has it, the other as PIL images behind a DataLoader without
processes of its own, which would only add to its work. Counted is processor time on one thread, so that the figures are
those of a core whatever else runs; printed are images per second, medians with quartiles of the rounds, in turn, and
their ratio.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from bounds import end
from PIL import Image
from spread import quartiles
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from disttrain.data import Loader, StepSampler
from disttrain.distributed.allocator import freed_memory_kept
from disttrain.distributed.world import join_world
from disttrain.recipe import Recipe, load_recipe
from disttrain.training.given import Given
from disttrain.training.sets import load_sets, served

BATCH, NUM_IMAGES, PER_TURN, LEAST = 100, 5000, 10, 20.0
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def recipe() -> Recipe:
    """What is done to the images."""
    made_up = ["data.dataset=synthetic", f"data.options={{num_train={NUM_IMAGES}, num_test=10}}"]
    return load_recipe(
        "cifar10-net",
        [*made_up, "data.crop_padding=4", "data.flip=true", f"data.mean={list(MEAN)}", f"data.std={list(STD)}"],
    )


class Pictures(Dataset[Any]):
    """As torchvision's CIFAR10 has them."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self._pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self._labels = labels.tolist()
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._pictures[index]), self._labels[index]


def one_by_one(dataset: Pictures) -> Iterator[object]:
    """Epoch after epoch."""
    while True:
        yield from DataLoader(dataset, batch_size=BATCH, shuffle=True)


def whole(loader: Loader) -> Iterator[object]:
    """Epoch after epoch."""
    for epoch in range(10**6):
        yield from loader.epoch(epoch)


def per_second(source: Iterator[object]) -> float:
    """Images per second of processor time."""
    began = time.process_time()
    for _ in range(PER_TURN):
        next(source)
    return PER_TURN * BATCH / (time.process_time() - began)


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()}, load {load:.1f}")
    with freed_memory_kept(), join_world("cpu", threads=1) as world:
        data, task = load_sets(recipe(), world, Given())
        split = data.train
        loader = Loader(served(split, task), StepSampler(len(split), batch_size=BATCH), recipe().data, task)
        sources = (whole(loader), one_by_one(Pictures(split.images, split.labels)))
        found = [tuple(per_second(source) for source in sources) for _ in range(options.rounds + 1)][1:]
    for name, column in zip(("whole batches", "torchvision, one by one"), zip(*found, strict=True), strict=True):
        low, middle, high = quartiles(column)
        print(f"{name:<26}{middle:>10,.0f} images/s   ({low:,.0f} to {high:,.0f})")
    low, ratio, high = quartiles([ours / theirs for ours, theirs in found])
    bound = f"at least {LEAST:.0f}; {options.rounds} rounds"
    print(f"{'ratio':<26}{ratio:>10.1f}            ({low:.1f} to {high:.1f}), {bound}")
    end(ratio >= LEAST)


if __name__ == "__main__":
    main()

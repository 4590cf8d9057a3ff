"""A network with what may differ between devices and runs: statistics, kernels with a choice, numbers drawn."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn

FAULT = "CHECKS_FAULT"
"""What the last rank does in its fourth step: raise, die or hang."""


def build(num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """BatchNorm, max-pooling and dropout."""
    channels, height, width = sample_shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * (height // 4) * (width // 4), num_classes),
    )  # fmt: skip


def of_a_class_of_its_own(num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """`build` in a module that torch 2.11 compiles, as it does not an nn.Sequential."""
    return _Inner(build(num_classes, sample_shape))


class _Inner(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.inner(images)
        return scores


def in_bfloat16(num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """One whose parameters are bfloat16."""
    channels, height, width = sample_shape
    return _Bfloat16(nn.Linear(channels * height * width, num_classes))


class Hungry(nn.Module):
    """Of 64 samples at once a GPU's memory holds 16 and not 32; a CPU says so, and has it.

    A sample takes a 56th of it twice in the forward pass, and at most once more in the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(3 * 32 * 32, 4), nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 4)."""
        scores: torch.Tensor = self.inner(images.flatten(1))
        if images.is_cuda:
            held = torch.cuda.get_device_properties(images.device).total_memory // 56
            ones = torch.ones(len(images), held // 4, device=images.device)
            return scores + 0.0 * (ones * self.scale).mean()
        if len(images) > 16:
            raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB.")
        return scores


class Blows(nn.Module):
    """`build` for 4 classes, whose output is infinite in some of its training steps, counted from 1."""

    def __init__(self, at: tuple[int, ...]) -> None:
        super().__init__()
        self.inner, self.at, self.num_steps = build(4, (3, 32, 32)), at, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 4)."""
        self.num_steps += self.training and len(images) > 4  # what is tried before training has fewer samples
        scores: torch.Tensor = self.inner(images)
        return scores * float("inf") if self.training and self.num_steps in self.at else scores


class _Bfloat16(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.bfloat16()

    def forward(self, images):  # type: ignore[no-untyped-def]
        return self.inner(images.flatten(1).bfloat16()).float()


def not_finite(num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """One whose fifth and sixth step have a loss of NaN."""
    return _NotFinite(build(num_classes, sample_shape))


def faulty(num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """One that does what the variable FAULT says."""
    return _Faulty(build(num_classes, sample_shape))


class _Counting(nn.Module):
    """Counts the steps: what is tried before training has two samples at most."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += self.training and len(images) > 2
        output: torch.Tensor = self.inner(images)
        return self.changed(output) if self.training and len(images) > 2 else output

    def changed(self, output: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _NotFinite(_Counting):
    def changed(self, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if self.calls in (5, 6) else output


class _Faulty(_Counting):
    def changed(self, output: torch.Tensor) -> torch.Tensor:
        fault, is_last = os.environ.get(FAULT), int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if self.calls == 4 and is_last:
            if fault == "raise":
                raise ValueError("a fault on purpose")
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hang":
                time.sleep(3600)
        return output

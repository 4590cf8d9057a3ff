"""The global generators, which a user's data set draws from: seeded for each sample, and left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, Python and NumPy."""
    # `torch.manual_seed` also notes a stack trace for each kind of accelerator, half a millisecond per sample.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Leave the global generators as they were: without DataLoader workers they are the training process's own."""
    python, legacy_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy_numpy)

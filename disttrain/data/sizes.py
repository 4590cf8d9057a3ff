"""How few samples a model sees at once: it follows from sizes alone, so that one too few is known before training."""

from __future__ import annotations


def smallest_batch(num_samples: int, batch_size: int) -> int:
    """The fewest samples in a batch: in a full one, or in the last one."""
    return min({min(batch_size, num_samples), num_samples % batch_size} - {0})


def smallest_part(num_samples: int, batch_size: int, num_slices: int, accumulate: int) -> int:
    """The fewest samples that are computed at once: in a micro-batch of a slice of a full batch or of the last one.

    One also where a part has no sample of its own, since a worker then computes one that weighs nothing.
    """
    fewest = smallest_batch(num_samples, batch_size)
    return max(1, max(1, fewest // num_slices) // accumulate)


def largest_part(num_samples: int, batch_size: int, num_slices: int, accumulate: int) -> int:
    """The most samples that are computed at once: in the first micro-batch of the first slice of a full batch."""
    slice_size = -(-min(batch_size, num_samples) // num_slices)
    return -(-slice_size // accumulate)


def batch_sizes_without_single_samples(
    num_samples: int, batch_size: int, num_slices: int, accumulate: int
) -> list[int]:
    """The batch sizes next to `batch_size`, a smaller and a larger one, whose parts all have two samples or more."""
    ranges = range(batch_size - 1, 0, -1), range(batch_size + 1, num_samples + 1)
    found = (
        next((size for size in sizes if smallest_part(num_samples, size, num_slices, accumulate) > 1), None)
        for sizes in ranges
    )
    return [size for size in found if size is not None]

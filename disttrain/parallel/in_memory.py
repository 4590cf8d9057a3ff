"""Gradients that meet in memory which all workers share: a hook of DistributedDataParallel."""

# Without `from __future__ import annotations`: DistributedDataParallel compares the hook's annotations with the types.

from dataclasses import dataclass

import torch
import torch.distributed as dist

from disttrain.distributed.shared_sums import SharedSums
from disttrain.parallel.compress import Smaller, is_wider, send_smaller


@dataclass(frozen=True)
class InMemory:
    """What adds gradients up, for how many workers, and the type that wider ones are rounded to."""

    sums: SharedSums
    num_workers: int
    dtype: torch.dtype | None


def begin_in_memory(
    shared: InMemory,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Begin to replace a bucket's gradients by their mean over all workers, which they are after `sums.finish()`.

    Sparse ones meet through gloo. The reducer gets the others as they are. With `gradient_as_bucket_view` they stay
    where they are, so it need not wait.
    """
    gradients = bucket.buffer()
    if gradients.layout != torch.strided:  # each worker's has a number of rows of its own
        return send_smaller(Smaller(shared.dtype or gradients.dtype, shared.num_workers), bucket)
    if shared.dtype is not None and is_wider(gradients, shared.dtype):
        # Divided in their own type, as by `send_smaller`.
        shared.sums.begin_(gradients.div_(shared.num_workers), sent_as=shared.dtype)
    else:
        shared.sums.begin_(gradients, divisor=shared.num_workers)
    under_way: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    under_way.set_result(gradients)
    return under_way

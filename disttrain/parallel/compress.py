"""Gradients that travel in fewer bytes: as bfloat16 or float16 in place of float32."""

# Without `from __future__ import annotations`: DistributedDataParallel compares the hook's annotations with the types.

from dataclasses import dataclass

import torch
import torch.distributed as dist

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INT8 = "int8"  # for the changes of workers that train apart


@dataclass(frozen=True)
class Smaller:
    """What gradients are sent as, and by how many workers."""

    dtype: torch.dtype
    num_workers: int


def send_smaller(
    smaller: Smaller,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Replace a bucket's gradients by their mean over all workers: a hook of DistributedDataParallel.

    torch's own hooks do nearly the same. But the one for bfloat16 is refused without NCCL, and both divide after the
    conversion, so that a float16 overflows where the mean would not, and convert what is as small already.

    A number that is not finite stays so, whoever's it is, and NonFiniteGuard sees it on every rank.
    """
    mean = bucket.buffer().div_(smaller.num_workers)
    sent = mean.to(smaller.dtype) if is_wider(mean, smaller.dtype) else mean
    work = dist.all_reduce(sent, op=dist.ReduceOp.SUM, async_op=True)
    return work.get_future().then(lambda done: mean.copy_(done.value()[0]))


def is_wider(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether real numbers take more bytes than they would as `dtype`."""
    return tensor.is_floating_point() and tensor.element_size() > dtype.itemsize

"""FSDP2 on CPUs: what it gathers and sends is freed as soon as it has served.

It is made for GPUs, whose streams may still use a buffer when the next one is filled, so that it keeps one of each kind
longer, and gathers the next block while one computes. On CPUs all of that only takes memory: a block of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from disttrain.distributed.allocator import trim_after


def hold_less(root: Any, *, trims: bool) -> None:
    """Have `root`, an FSDPModule on CPUs, and those in it, hold at most one block beside the parts of this worker.

    `trims`: what the heap has free goes back to the system after each large block.
    """
    # What has been gathered asynchronously is freed when it has been copied, not after the next block's.
    root._set_unshard_async_op(True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(_ReduceScatter(trims))  # type: ignore[arg-type]  # the base is private
            # It is gathered already. An empty list would have the block before it gathered, too.
            module.set_modules_to_backward_prefetch([module])


class _ReduceScatter:
    """As FSDP2's own, but its input is freed, which is kept until the next block's otherwise.

    gloo sums everything on every rank, and then throws away the others' parts: twice the bytes.
    """

    def __init__(self, trims: bool) -> None:
        self._trims = trims

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for an input or an output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """The sum of each rank's rows for this one, in the order of the ranks."""
        assert (op, async_op) == (dist.ReduceOp.SUM, False), "see set_force_sum_reduction_for_comms"
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        input_tensor.untyped_storage().resize_(0)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
        if self._trims:
            trim_after(received.nbytes)  # the block's activations are freed by now

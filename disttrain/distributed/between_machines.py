"""Sums over one worker of each machine, through gloo, in a process group that the other workers are not in."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore


class BetweenMachines:
    """One worker of each machine. All of these must begin the same sums in the same order.

    All calls raise RuntimeError if another one has gone.
    """

    def __init__(self, place: int, num_machines: int, timeout: timedelta, to_form: timedelta) -> None:
        """`timeout` is that of a sum, `to_form` that of meeting the others."""
        # Not by `dist.new_group`, which all ranks would have to call; nor does `num_issued` count it: not all have one.
        store = PrefixStore("disttrain/between-machines", dist.distributed_c10d._get_default_store())
        group: Any = dist.ProcessGroupGloo(store, place, num_machines, to_form)
        group._set_default_timeout(timeout)
        self._group = [group]

    def begin_sum_(self, tensor: torch.Tensor) -> dist.Work:
        """Begin to replace `tensor`, which is contiguous, by its sum over the machines."""
        (group,) = self._group
        work: dist.Work = group.allreduce([torch.view_as_real(tensor) if tensor.is_complex() else tensor])
        return work

    def close(self) -> None:
        """Let the group end; it waits for the sums under way."""
        self._group.clear()

    def abandon(self) -> None:
        """As `close`, on a thread of its own: a sum whose connection broke may take long to fail, see `regroup`."""
        threading.Thread(target=self._group.clear, name="disttrain-broken-group", daemon=True).start()

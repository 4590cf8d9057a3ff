"""What any rank asks for, known to all ranks at the same step."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from disttrain.distributed.collectives import wait_for

# How often the ranks agree, where steps are shorter than that; and the most steps between, should they become longer.
_ASK_EVERY_S = 0.2
_LARGEST_STRIDE, _STEPS_TO_LEARN = 16, 8


class Agreement:
    """Whether any rank raised one of its flags, agreed by all ranks at the same step, without waiting.

    A question travels while the next step computes, and is answered after it. So all ranks get the same answer at the
    same step, and no step waits for the network. Where steps are short, not every one asks: a small all-reduce costs
    half a millisecond of processor time, with what it puts out of the caches. Every rank must call each method at the
    same step.
    """

    def __init__(self, num_flags: int) -> None:
        self._num_flags = num_flags
        self._flags = torch.empty(0)  # the question under way
        self._alone = dist.get_world_size() == 1
        self._work: dist.Work | None = None
        self._stride = 1  # how many steps a question is for: the same on every rank
        self._num_steps = self._since_asked = 0
        self._asked_at = time.monotonic()

    def ask(self, *flags: bool, now: bool = False) -> list[bool]:
        """Send this rank's flags if it is time to, or `now`; return which were raised anywhere when it was asked.

        `flags` are those that are up, not those that were raised at this very step; `now` is the same on every rank.
        """
        if self._alone:
            return list(flags)
        answer = self.finish()
        self._num_steps, self._since_asked = self._num_steps + 1, self._since_asked + 1
        if now or self._since_asked >= self._stride:
            self._flags = torch.tensor([*flags, -self._fitting_stride()], dtype=torch.float32)
            self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, async_op=True)
        return answer

    def finish(self) -> list[bool]:
        """Wait for the question under way and return its answer; all false if there is none."""
        if self._work is None:
            return [False] * self._num_flags
        wait_for(self._work)
        self._work = None
        *flags, stride = self._flags.tolist()
        self._stride = -int(stride)  # the least that fits any rank
        return [flag > 0 for flag in flags]

    def _fitting_stride(self) -> int:
        """How many steps this rank would have the next question be for."""
        now = time.monotonic()
        seconds, self._asked_at = (now - self._asked_at) / self._since_asked, now
        self._since_asked = 0
        # At first every step asks: how long one takes is not known.
        return max(1, min(int(_ASK_EVERY_S / max(seconds, 1e-9)), self._num_steps // _STEPS_TO_LEARN, _LARGEST_STRIDE))

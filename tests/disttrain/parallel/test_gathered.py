"""Weights that stay gathered during a step: what is put back afterwards, and how much memory they may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from disttrain.distributed.world import join_world
from disttrain.parallel import gathered
from disttrain.parallel.gathered import affordable_bytes, take_hooks_of_fsdp_off
from disttrain.testing import run_workers


class StateOfFsdp:
    """Notes when its hook is called, as FSDP2's own state object has hooks on the modules that it shards."""

    def __init__(self, called: list[str]) -> None:
        self._called = called

    def before(self, *_: Any) -> None:
        self._called.append("fsdp")


def test_fsdp2s_hooks_come_back_in_their_place_and_those_of_others_stay_as_they_are_by_then() -> None:
    module: Any = nn.Identity()
    called: list[str] = []
    state = StateOfFsdp(called)
    module._get_fsdp_state = lambda: state
    removed = module.register_forward_pre_hook(lambda *_: called.append("removed"))
    module.register_forward_pre_hook(state.before)
    module.register_forward_pre_hook(lambda *_: called.append("stays"))
    put_back = take_hooks_of_fsdp_off([module])
    module(torch.ones(1))
    assert called == ["removed", "stays"]
    removed.remove()
    module.register_forward_pre_hook(lambda *_: called.append("new"))
    put_back()
    called.clear()
    module(torch.ones(1))
    assert called == ["fsdp", "stays", "new"]


def test_all_ranks_keep_what_the_one_with_the_least_free_memory_can_afford() -> None:
    def affordable() -> list[int]:
        with join_world("cpu", threads=1) as world, pytest.MonkeyPatch.context() as patch:
            found = []
            for free_on_1, free_on_0 in ((3 << 30, 2 << 30), (0, 0)):
                free = free_on_1 if world.rank else free_on_0
                patch.setattr(gathered, "available_memory", lambda free=free: free)
                found.append(affordable_bytes(world))
            return found

    # Of the workers on a machine each has its share; a little is always kept.
    assert run_workers(affordable, 2, process_group=False) == [[(1 << 30) // 16, 32 << 20]] * 2

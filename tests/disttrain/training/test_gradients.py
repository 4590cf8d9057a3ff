"""Where the gradients of several workers meet, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from disttrain.distributed.shared_sums import SharedSums
from disttrain.distributed.world import World
from disttrain.recipe import load_recipe
from disttrain.training.gradients import facts_of_fast_mode, why_memory_is_not_shared

TWO = World(0, 0, 2, 2, torch.device("cpu"), "here")
TRUE, EXACT = "parallel.shared_memory=true", "parallel.exact=true"


@pytest.mark.parametrize(
    ("world", "overrides", "said"),
    [
        (replace(TWO, size=1, local_size=1), [TRUE], None),  # nothing travels
        (TWO, [], "gradients meet through gloo: the system has no memory"),
        (TWO, [TRUE], "no effect here: the system has no memory"),
        (TWO, ["parallel.shared_memory=false"], None),
        (replace(TWO, size=3, local_size=3), [], None),  # by default only where the bits stay
        (replace(TWO, size=3, local_size=3), [EXACT], "gradients meet through gloo"),
        (replace(TWO, local_size=1), [], None),
        (replace(TWO, local_size=1), [TRUE], "no effect here: each machine has one worker"),
        (replace(TWO, size=4), [EXACT], "gradients meet through gloo: the system has no memory"),
        (replace(TWO, device=torch.device("cuda", 0)), [TRUE], "no effect here: GPUs"),
        (TWO, [TRUE, "parallel.strategy=fsdp"], 'no effect here: parallel.strategy = "fsdp"'),
        (TWO, [TRUE, "parallel.sync_every=5"], "no effect here: each worker trains by itself"),
    ],
)
def test_where_memory_is_asked_for_and_not_shared_a_line_says_why(
    world: World, overrides: list[str], said: str | None
) -> None:
    line = why_memory_is_not_shared(world, load_recipe("digits", overrides))
    assert line is None if said is None else line is not None and said in line


@pytest.mark.parametrize(
    ("overrides", "most"),
    [([], 2), ([EXACT], 100), ([TRUE], 100), ([TRUE, "parallel.strategy=fsdp"], 0), (["parallel.sync_every=5"], 0)],
)
def test_by_default_memory_is_shared_where_the_bits_stay(overrides: list[str], most: int) -> None:
    assert min(100, load_recipe("digits", overrides).parallel.most_sharing_memory) == most
    # Of three or more the bits tell, so that a run that is resumed the other way says so.
    assert facts_of_fast_mode(TWO) == {"workers": 2}
    assert facts_of_fast_mode(replace(TWO, size=3)) == {"workers": 3, "gradients": "gloo"}
    for workers, where in (((3,), "shared memory"), ((1, 2), "shared memory (1 + 2 workers) and gloo")):
        sums = cast("SharedSums", SimpleNamespace(workers=workers))
        assert facts_of_fast_mode(replace(TWO, size=3, sums=sums)) == {"workers": 3, "gradients": where}

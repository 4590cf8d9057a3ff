"""Where the gradients of several workers meet, for the user and the journal."""

from __future__ import annotations

from typing import Any

from disttrain.distributed.world import World
from disttrain.recipe import Recipe

_NONE_TO_SHARE = "the system has no memory that the workers could share"


def where_gradients_meet(world: World) -> str:
    """What adds them up, in a word or two; empty for one worker."""
    if world.size == 1:
        return ""
    if world.sums is not None:
        by_machine = " + ".join(map(str, world.sums.workers))
        return "shared memory" + (f" ({by_machine} workers) and gloo" if len(world.sums.workers) > 1 else "")
    return "NCCL" if world.device.type == "cuda" else "gloo"


def facts_of_fast_mode(world: World) -> dict[str, Any]:
    """What its bits depend on besides each worker's surroundings, as JSON can hold it.

    Two gradients have one order in which they can be added up; for more, gloo's is another than that in shared memory,
    which adds up each machine's first.
    """
    return {"workers": world.size} | ({"gradients": where_gradients_meet(world)} if world.size > 2 else {})


def why_memory_is_not_shared(world: World, recipe: Recipe) -> str | None:
    """Why not, where the recipe asks for it or it would be the default; None if there is nothing to say."""
    parallel = recipe.parallel
    if world.size == 1 or world.sums is not None or not parallel.shared_memory:
        return None
    reasons = {
        "each worker trains by itself (parallel.sync_every)": parallel.sync_every > 0,
        f'parallel.strategy = "{parallel.strategy}" does not share it': parallel.most_sharing_memory == 0,
        "GPUs have memory of their own": world.device.type != "cpu",
        "each machine has one worker": world.local_size == 1,
    }
    found = next((reason for reason, applies in reasons.items() if applies), None)
    if parallel.shared_memory is True:
        return f"parallel.shared_memory has no effect here: {found or _NONE_TO_SHARE}"
    is_missing = found is None and world.size <= parallel.most_sharing_memory
    return f"gradients meet through gloo: {_NONE_TO_SHARE}" if is_missing else None

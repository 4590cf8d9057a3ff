"""Whether a job continues without a lost worker: what it does between two steps has to be known to survive a loss."""

from __future__ import annotations

from disttrain.distributed.launched import OUR_LAUNCHERS, launched_by
from disttrain.layout import NEEDS_A_RESTART
from disttrain.recipe import Recipe
from disttrain.recipe.continuing import why_losses_restart
from disttrain.training.job import Job


def continues_after_losses(job: Job) -> bool:
    """Whether its workers can continue without one of them."""
    asks = job.recipe.parallel.on_lost_worker == "continue"
    return asks and job.world.group is not None and why_it_restarts(job) is None


def why_it_restarts(job: Job) -> str | None:
    """Why it restarts when a worker is lost, although its recipe says to continue; None if that is not so."""
    recipe, world = job.recipe, job.world
    if recipe.parallel.on_lost_worker != "continue" or world.group is None:
        return None
    reasons = {
        "only exact mode has the same bits without it (parallel.exact)": job.strategy.bits_depend_on_world_size,
        "a lost shard has no copy": job.strategy.is_sharded,
        "only workers of `disttrain train` and `disttrain node` continue": launched_by() not in OUR_LAUNCHERS,
        "NCCL cannot continue": world.device.type != "cpu",
        "hooks see each step once": bool(job.hooks),
        why_losses_restart(recipe) or "": why_losses_restart(recipe) is not None,
        "data.workers read ahead": job.loader.streams,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    return f"{NEEDS_A_RESTART}{found[0]}" if found else None


def why_losses_do_not_end_it(recipe: Recipe) -> str | None:
    """Why a lost worker may restart it, although its recipe says to stop; None if that is not so."""
    if recipe.parallel.on_lost_worker != "stop" or launched_by() in (*OUR_LAUNCHERS, "python"):
        return None
    return 'parallel.on_lost_worker = "stop" has no effect here: only `disttrain train` and `disttrain node` heed it'

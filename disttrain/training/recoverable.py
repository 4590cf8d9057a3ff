"""Whether a job continues without a lost worker: what it does between two steps has to be known to survive a loss."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from disttrain.distributed.launched import NODE_LAUNCHER, OUR_LAUNCHERS, launched_by
from disttrain.layout import NEEDS_A_RESTART, VERDICTS
from disttrain.recipe import Recipe
from disttrain.recipe.continuing import why_losses_restart

if TYPE_CHECKING:
    from disttrain.training.job import Job


def asks_to_continue(recipe: Recipe) -> bool:
    """Whether its workers are to continue without one that is lost, where they can."""
    return recipe.parallel.asks_to_continue(under_a_launcher=VERDICTS in os.environ)


def continues_after_losses(job: Job) -> bool:
    """Whether its workers can continue without one of them."""
    return asks_to_continue(job.recipe) and job.world.group is not None and _why_not(job) is None


def what_a_loss_means(job: Job) -> str | None:
    """What becomes of the run when a worker is lost, where that may not be what its user expects; else None."""
    if not asks_to_continue(job.recipe) or job.world.group is None:
        return None
    why_not, is_default = _why_not(job), job.recipe.parallel.on_lost_worker == "auto"
    if why_not is not None:  # on several machines one leads for this, so it is said also where nobody asked for it
        return f"{NEEDS_A_RESTART}{why_not}" if not is_default or launched_by() == NODE_LAUNCHER else None
    return "if a worker is lost, the others continue (parallel.on_lost_worker)" if is_default else None


def _why_not(job: Job) -> str | None:
    """Why its workers cannot continue without one of them; None if they can."""
    recipe, world = job.recipe, job.world
    reasons = {
        "only exact mode has the same bits without it (parallel.exact)": job.strategy.bits_depend_on_world_size,
        "a lost shard has no copy": job.strategy.is_sharded,
        "only workers of `disttrain train` and `disttrain node` continue": VERDICTS not in os.environ,
        "NCCL cannot continue": world.device.type != "cpu",
        "hooks see each step once": bool(job.hooks),
        why_losses_restart(recipe) or "": why_losses_restart(recipe) is not None,
        "data.workers read ahead": job.loader.streams,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def why_losses_do_not_end_it(recipe: Recipe) -> str | None:
    """Why a lost worker may restart it, although its recipe says to stop; None if that is not so."""
    if recipe.parallel.on_lost_worker != "stop" or launched_by() in (*OUR_LAUNCHERS, "python"):
        return None
    return 'parallel.on_lost_worker = "stop" has no effect here: only `disttrain train` and `disttrain node` heed it'

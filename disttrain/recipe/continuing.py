"""What in a recipe keeps its workers from continuing without one that is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disttrain.recipe import Recipe


def why_losses_restart(recipe: Recipe) -> str | None:
    """Why a run of this recipe has to restart when a worker is lost; None if nothing in the recipe says so."""
    settings = recipe.train
    reasons = {
        "a lost shard has no copy": recipe.parallel.strategy == "fsdp",
        "hooks see each step once": bool(settings.hooks),
        "train.spike_factor is set": settings.spike_factor > 0,
        "train.precision is 'fp16'": settings.precision == "fp16",
        f"train.non_finite is '{settings.non_finite}'": settings.non_finite != "stop",
        "NCCL cannot continue": settings.device.startswith("cuda"),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def is_led(recipe: Recipe, *, on_gpus: bool) -> bool:
    """Whether of several machines one leads, so that the others continue without a lost worker or machine.

    If not, each runs torchrun's agent, and all restart. Every machine must come to the same answer. `on_gpus`: they
    were asked for.
    """
    parallel = recipe.parallel
    if not parallel.asks_to_continue(under_a_launcher=True) or not parallel.exact or parallel.strategy == "fsdp":
        return False
    return parallel.on_lost_worker == "continue" or not (on_gpus or why_losses_restart(recipe))

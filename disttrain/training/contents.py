"""What a checkpoint of a job holds: enough to resume, and to rebuild the model elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from disttrain.checkpoint import shared_names
from disttrain.checkpoint.tensors import Tensors
from disttrain.training.job import Job


def contents_of(job: Job) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """The model's tensors, the optimizer's, and everything else, all of them as they are now."""
    model, (optimizer, rest) = job.model.state_dict(), job.optimizer_tensors()
    shared = shared_names(model)
    state = {
        "step": job.step,
        "epoch": job.step // job.steps_per_epoch,
        "step_in_epoch": job.step % job.steps_per_epoch,
        "total_steps": job.total_steps,
        "finished": job.is_finished,
        "metrics": job.metrics or {},
        "best": asdict(job.best),
        "best_evaluation": job.early_stopping.state(),
        "optimizer": rest,
        "scaler": job.scaler.state_dict(),
        "non_finite": job.non_finite.state(),
        "recent_losses": job.spikes.recent,
        "hooks": job.hooks.state(),
        **job.strategy.state(),
        "world_size": job.world.size,
        "given": sorted(job.given),
        "shared": shared,
        **({"init": job.init} if job.init is not None else {}),
        **job.described,
    }
    return {name: tensor for name, tensor in model.items() if name not in shared}, optimizer, state

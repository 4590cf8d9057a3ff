"""How a job resumes from what a checkpoint holds, once it is clear that the checkpoint is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from disttrain.checkpoint import AVERAGE, Checkpoint, check_complete, optimizer_from_tensors
from disttrain.checkpoint.handout import hand_out, hand_out_parts
from disttrain.checkpoint.reach import opened_by_all
from disttrain.checkpoint.stored import outline_of
from disttrain.distributed.collectives import broadcast_from_main
from disttrain.errors import ConfigurationError, brief
from disttrain.layout import STATE, best_in
from disttrain.parallel.conditions import differences
from disttrain.training.apart import resume_apart
from disttrain.training.identity import (
    describe_data,
    describe_task,
    refuse_other_data,
    refuse_other_preparation,
    refuse_other_schedule,
    refuse_other_task,
)
from disttrain.training.job import Job


def resume(job: Job, checkpoint: Checkpoint) -> list[str]:
    """Put back what `checkpoint` holds; return what the job's bits depend on that is different now.

    Every rank must call it, the others than rank 0 with an outline of the checkpoint: the tensors are rank 0's.
    Raises ConfigurationError if it belongs to another model, optimizer, data set or schedule, or is past the last step.
    """
    state = checkpoint.state
    check_complete(state, f"{checkpoint.path}/{STATE}")
    refuse_other_task(state, checkpoint.path, describe_task(job.task), job.given)
    now = describe_data(job.data.train, job.digest)
    broadcast_from_main(job.world, lambda: refuse_other_data(state, checkpoint.path, now, job.given))
    refuse_other_preparation(state["data"], job.data.train, checkpoint.path)
    if state["step"] > job.total_steps:
        raise ConfigurationError(
            f"{checkpoint.path}: the run has {state['step']} steps already, more than the {job.total_steps} that "
            "train.epochs and train.max_steps ask for. Raise them to continue, or start a new --run-dir."
        )
    refuse_other_schedule(state, checkpoint.path, job.schedule)
    _check_tensors(job, checkpoint)
    if job.strategy.is_sharded:
        opened = opened_by_all(job.world, checkpoint)
        source, by_broadcast = opened or checkpoint, opened is None
        here = job.model.state_dict().get
        job.model.load_state_dict(hand_out_parts(job.world, source.model, here, by_broadcast=by_broadcast))
        of = _parameter_of(job, state["optimizer"].get("names", []))
        parts = hand_out_parts(job.world, source.optimizer, of, by_broadcast=by_broadcast)
        _resume_together(job, replace(checkpoint, optimizer=parts))
    else:
        job.model.load_state_dict(hand_out(job.world, checkpoint.model, job.model.state_dict()))
        if job.strategy.trains_apart:
            resume_apart(job, checkpoint)
        else:
            _resume_together(job, replace(checkpoint, optimizer=hand_out(job.world, checkpoint.optimizer)))
    job.spikes.recent = state.get("recent_losses", [])
    job.strategy.load_state(state, f"{checkpoint.path}/{STATE}")
    job.init = state.get("init")
    job.hooks.load_state(state.get("hooks", {}), checkpoint.path)
    if "best_evaluation" in state and best_in(state) == job.best:  # of another metric nothing follows for this one
        job.early_stopping.load_state(state["best_evaluation"])
    job.step = state["step"]
    job.metrics = state["metrics"] or None
    return differences(state["environment_fingerprint"], job.environment_fingerprint)


def _resume_together(job: Job, checkpoint: Checkpoint) -> None:
    """What is the same on every rank: the optimizer, the averages of the weights, the scaler, the guard's counts."""
    state = checkpoint.state
    tensors = {name: tensor for name, tensor in checkpoint.optimizer.items() if not name.startswith(AVERAGE)}
    optimizer_from_tensors(job.optimizer, tensors, state["optimizer"], job.model)
    if job.ema is not None:
        job.ema.load(checkpoint.averages)
    if state["scaler"]:
        _restore_scaler(job, checkpoint)
    if "non_finite" in state:
        job.non_finite.load_state(state["non_finite"])


def _parameter_of(job: Job, names: list[str]) -> Callable[[str], torch.Tensor | None]:
    """Which parameter a tensor of the optimizer's, or an average, belongs to, in a checkpoint that numbers `names`."""
    parameters = dict(job.model.named_parameters())
    if not names:  # an older checkpoint counts the optimizer's own
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        names = [name_of[id(one)] for group in job.optimizer.param_groups for one in group["params"]]

    def find(key: str) -> torch.Tensor | None:
        if key.startswith(AVERAGE):
            return parameters.get(key.removeprefix(AVERAGE))
        number = key.partition(".")[0]
        if not number.isdecimal() or int(number) >= len(names):
            return None
        return parameters.get(names[int(number)])

    return find


def _restore_scaler(job: Job, checkpoint: Checkpoint) -> None:
    try:
        job.scaler.load_state_dict(checkpoint.state["scaler"])
    except (KeyError, RuntimeError) as error:
        raise ConfigurationError(f"{checkpoint.path}/{STATE}: 'scaler' does not fit: {brief(error)}.") from error


def _check_tensors(job: Job, checkpoint: Checkpoint) -> None:
    here = {name: tuple(tensor.shape) for name, tensor in job.model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in outline_of(checkpoint.model).items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ConfigurationError(
                f"{checkpoint.path}: tensor {brief(repr(name))} is {there.get(name, 'not there')}, "
                f"and the model '{job.model_name}' has {here.get(name, 'none of that name')}."
            )

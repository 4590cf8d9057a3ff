"""What the first checkpoint or the optimizer's first step would fail on: found before anything is trained."""

from __future__ import annotations

import json

import torch
from torch import nn

from disttrain.checkpoint import optimizer_from_tensors, optimizer_to_tensors, why_not_held
from disttrain.distributed.sharded import is_sharded
from disttrain.errors import ConfigurationError, brief
from disttrain.training.job import Job
from disttrain.training.optim import build_optimizer


def check_state(job: Job) -> None:
    """Look at what the model's state is made of, and have the optimizer step on a few numbers; changes nothing.

    Raises ConfigurationError, on every rank alike, for what a checkpoint cannot hold, and if the optimizer fails.
    """
    for name, value in job.model.state_dict().items():
        reason = why_not_held(value)
        if reason is not None:
            hint = (
                "have get_extra_state return a tensor, or keep what it returns in buffers"
                if name.rpartition(".")[2] == "_extra_state"
                else "make it dense, of another type, or leave it out of the state (persistent=False)"
            )
            raise ConfigurationError(f"the model's state '{name}' {reason}, which a checkpoint cannot hold: {hint}.")
    _try_optimizer(job, [_corners(group["params"]) for group in job.optimizer.param_groups])


def check_sparse_gradients(job: Job) -> None:
    """Have the optimizer step with a few numbers for each parameter whose gradient, which must be there, is sparse.

    In exact mode nothing is done: there they are refused whatever the optimizer. Raises ConfigurationError, on every
    rank alike, if the optimizer fails, or would keep what a checkpoint cannot hold.
    """
    if not job.strategy.bits_depend_on_world_size:
        return
    for number, group in enumerate(job.optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.grad is None or parameter.grad.layout == torch.strided:
                continue
            corner = nn.Parameter(_corner(parameter.detach()))
            corner.grad = torch.ones_like(corner).to_sparse(parameter.grad.sparse_dim())
            corners: list[list[nn.Parameter]] = [[] for _ in job.optimizer.param_groups]
            corners[number].append(corner)
            try:
                _try_optimizer(job, corners)
            except ConfigurationError as error:
                name = next(name for name, one in job.model.named_parameters() if one is parameter)
                given = [f"{key} = {group[key]}" for key in ("momentum", "weight_decay") if group.get(key)]
                raise ConfigurationError(
                    f"optim: {type(job.optimizer).__name__}{' with ' if given else ''}{' and '.join(given)} does not "
                    f"take the gradient of '{name}', which is sparse: make it dense (sparse=False), or choose "
                    "name = 'sgd' with momentum = 0 and weight_decay = 0 (for this parameter alone: by the task's "
                    "param_groups), or 'adagrad' with weight_decay = 0."
                ) from error


def _try_optimizer(job: Job, corners: list[list[nn.Parameter]]) -> None:
    """A step, and its state taken out and put back, with some of the `corners` for each group of parameters."""
    optimizer = _optimizer_of(job, corners)
    tried = (group for group, some in zip(job.optimizer.param_groups, corners, strict=True) if some)
    for ours, group in zip(optimizer.param_groups, tried, strict=True):
        ours.update({key: value for key, value in group.items() if key != "params"})
    try:
        optimizer.step()
    except Exception as error:  # torch's optimizers refuse by whatever exception comes first
        reason = brief(error) or type(error).__name__
        raise ConfigurationError(
            f"optim: {type(optimizer).__name__} fails in its first step with these options: {reason}"
        ) from error
    tensors, rest = optimizer_to_tensors(optimizer)
    for name, tensor in tensors.items():
        why = why_not_held(tensor)
        if why is not None:
            raise ConfigurationError(
                f"optim: the state '{name.partition('.')[2]}' of {type(optimizer).__name__} {why}, which a "
                "checkpoint cannot hold: choose other options, or another optimizer."
            )
    optimizer_from_tensors(_optimizer_of(job, corners), tensors, json.loads(json.dumps(rest)))


def _optimizer_of(job: Job, groups: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
    return build_optimizer(job.recipe.optim, [{"params": group} for group in groups if group])


def _corners(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    kinds = {(one.dtype, one.device, one.ndim, one.layout): one for one in parameters if one.requires_grad}
    corners = [nn.Parameter(_corner(one.detach())) for one in kinds.values()]
    for corner in corners:
        corner.grad = torch.zeros_like(corner)
    return corners


def _corner(tensor: torch.Tensor) -> torch.Tensor:
    if is_sharded(tensor):  # whoever has the corner, the optimizer does not look at its numbers
        return torch.ones([min(2, side) for side in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    return tensor[(slice(2),) * tensor.ndim].clone()

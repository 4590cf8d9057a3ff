"""A look at what the task returns, before anything is trained: a sum, numbers, and no state of its own."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from disttrain import rng
from disttrain.distributed.collectives import broadcast_from_main
from disttrain.errors import ConfigurationError
from disttrain.layout import EVAL
from disttrain.task import Task
from disttrain.tracking.mlflow.limits import metric_key
from disttrain.training.job import Job

CLOSE = 0.05
"""How near to each other two values are, of a batch and of the same one twice over, that are taken for one."""
_MOST_ITEMS, _MOST_NUMBERS = 1000, 2**20  # of a container, of a tensor: what is larger is not compared


def checked_loss(task: Task, model: nn.Module, batch: Any) -> torch.Tensor:
    """The task's loss of the batch. Raises ConfigurationError unless it is a scalar that gradients come from."""
    loss: Any = task.loss(model, batch)
    name = f"{type(task).__name__}.loss"
    if not isinstance(loss, torch.Tensor):
        raise ConfigurationError(
            f"{name} returned a {type(loss).__name__}: it has to be a tensor, the sum of the losses of the batch's "
            "items (of a dict of losses, their sum)."
        )
    if loss.ndim or not loss.is_floating_point():
        raise ConfigurationError(
            f"{name} returned a tensor of shape {tuple(loss.shape)} and {loss.dtype}: it has to be a floating-point "
            'scalar, the sum of the losses of the batch\'s items (reduction="sum", or .sum()).'
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ConfigurationError(
            f"{name} returned a tensor without a gradient: compute it from what the model returns, without detach(), "
            ".item() or torch.no_grad()."
        )
    return loss


def check_metrics(task: Task, metrics: Mapping[str, float], wanted: str | None) -> None:
    """Raise ConfigurationError if there is no metric, two share a name, or none is the one that is best.

    `wanted` is `checkpoint.best`; without it the task's own decides.
    """
    names = list(metrics)
    if not names:
        raise ConfigurationError(
            f"{type(task).__name__}.metrics returned nothing: at least one metric has to decide which checkpoint is "
            "best. By default metrics are made from what score returns as tensors of shape ()."
        )
    by_key: dict[str, str] = {}
    for name in names:
        other = by_key.setdefault(metric_key(f"{EVAL}{name}"), name)
        if other != name:
            raise ConfigurationError(
                f"{type(task).__name__}.metrics: MLflow takes {other!r} and {name!r} for one metric, "
                f"{metric_key(EVAL + name)!r}: rename one (letters, digits, and _ - . / and spaces are told apart)."
            )
    if wanted is not None:
        if wanted.rpartition(":")[0].removeprefix(EVAL) not in names:
            raise ConfigurationError(
                f"checkpoint.best = '{wanted}': {type(task).__name__} has no metric of that name; it has "
                f"{', '.join(names)}."
            )
        return
    best, mode = task.best
    if best not in names or mode not in ("min", "max"):
        raise ConfigurationError(
            f"{type(task).__name__}.best is {task.best!r}: the first has to be one of the metrics, which are "
            f"{', '.join(names)}, the second 'min' or 'max'."
        )


def check_task(job: Job, quietly: Callable[[], AbstractContextManager[None]], warn: Callable[[str], None]) -> None:
    """Refuse a task of the user's own whose loss is a mean, or that keeps state. Every rank must call it.

    `quietly` makes a context to compute a step in that leaves no trace; a loss that grows with the square of the batch
    may be meant so, and `warn` tells of it. Raises ConfigurationError.
    """
    if (type(job.task).loss.__module__ or "").startswith("disttrain."):  # None: made by exec
        return
    before = _configuration(job.task)
    losses = []
    for epoch in (0, 1):  # two, so that chance does not make a sum look like a mean
        losses.append(_sums(job, epoch, quietly))
    again = _sums(job, 0, quietly)
    _refuse_state(job.task, before, losses[0], again)
    if any(weight == 0 and loss != 0 for pair in losses for loss, weight in pair):
        raise ConfigurationError(
            f"{type(job.task).__name__}: weight(batch) is 0 for the first samples and loss(model, batch) is not: a "
            "batch without items has no loss, and nothing to divide it by."
        )
    if all(_is_mean(*pair) for pair in losses):
        raise ConfigurationError(
            f"{type(job.task).__name__}.loss returns a mean: it is {losses[0][0][0]:.4g} for two samples and "
            f"{losses[0][1][0]:.4g} for the same two twice over. It has to be the sum over the batch's items, which "
            'the trainer divides by the global weight: reduction="sum" in place of "mean", or the mean times how many '
            "items (and a penalty that no item adds to belongs in optim.weight_decay)."
        )
    is_square = all(_is_square(once, twice, 2) for once, twice in losses)
    if broadcast_from_main(job.world, lambda: is_square):  # of all alike: a model may have collectives
        first, second, third = _sums(job, 0, quietly, times=(1, 2, 3))
        if _is_square(first, third, 3):  # a contrastive loss grows by the log of the number of items
            warn(
                f"{type(job.task).__name__}.loss grows with the square of the batch: it is {first[0]:.4g} for two "
                f"samples and {second[0]:.4g} for the same two twice over, so what is learned depends on how many "
                "workers share a batch. Shapes such as (B, 1) and (B,) broadcast to (B, B): does one lack a "
                "squeeze(1)? If the loss compares all pairs of samples, that is as meant (docs/tasks.md)."
            )


Sum = tuple[float, int]
"""A loss, and the weight of its batch."""


def _sums(
    job: Job, epoch: int, quietly: Callable[[], AbstractContextManager[None]], times: Sequence[int] = (1, 2)
) -> list[Sum]:
    """The loss and the weight of two samples, and of the same two so many times over."""
    few = torch.arange(min(2, len(job.data.train)))
    found = []
    for samples in map(few.repeat, times):
        fetched = job.loader.fetched(epoch, samples)
        with quietly(), torch.no_grad():
            for module in job.model.modules():
                if isinstance(module, _DropoutNd):
                    module.eval()
            rng.seed_layers(job.world.device, 0, epoch, 0)
            with torch.autocast(job.world.device.type, job.autocast, job.autocast is not None):
                found.append((float(job.strategy.score(job.task.loss, fetched.data)), fetched.weight))
    return found


def _is_mean(one: Sum, twice: Sum) -> bool:
    (loss, weight), (loss_of_twice, weight_of_twice) = one, twice
    grows = weight_of_twice >= 1.5 * max(1, weight)
    return grows and loss != 0 and abs(loss_of_twice - loss) <= CLOSE * abs(loss)  # which NaN never is


def _is_square(one: Sum, other: Sum, times: int) -> bool:
    (loss, weight), (loss_of_other, weight_of_other) = one, other
    square = times**2 * loss
    return loss != 0 and weight_of_other == times * weight and abs(loss_of_other - square) <= CLOSE * abs(square)


def _refuse_state(task: Task, before: Mapping[str, Any], first: list[Sum], again: list[Sum]) -> None:
    name, now = type(task).__name__, _configuration(task)
    for key, value in before.items():
        if now.get(key) != value:
            raise ConfigurationError(
                f"{name}.{key} changes when a loss is computed: no checkpoint would have that state and no other "
                "worker would share it. What __init__ sets is configuration; keep state in the model's buffers."
            )
    for (was, _), (now_is, _) in zip(first, again, strict=True):
        if not np.isclose(was, now_is, rtol=1e-3, atol=0, equal_nan=True):
            raise ConfigurationError(
                f"{name}.loss returned {was:.6g} for the first samples and {now_is:.6g} for the same ones again, so it "
                "keeps state or draws from a generator of its own: keep state in the model's buffers, and draw from "
                "torch's global generator, which is seeded for every slice of every step."
            )


def _configuration(task: Task) -> dict[str, Any]:
    return {key: _frozen(value) for key, value in vars(task).items()}


def _frozen(value: Any, depth: int = 0) -> Any:
    """What can be compared later with what it is by then; other objects by which they are."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value if value == value else "nan"  # which is unlike itself
    if isinstance(value, torch.Tensor):
        if value.numel() > _MOST_NUMBERS or value.layout != torch.strided:
            return id(value), value._version
        return hashlib.sha256(bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())).digest()
    if isinstance(value, np.ndarray) and value.size <= _MOST_NUMBERS:
        return hashlib.sha256(value.tobytes()).digest() if value.dtype != object else id(value)
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().numpy())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, nn.Module):
        return {key: _frozen(one, depth + 1) for key, one in value.state_dict().items()}
    if isinstance(value, Mapping | list | tuple | set) and len(value) <= _MOST_ITEMS and depth < 4:
        items = value.items() if isinstance(value, Mapping) else value
        return [_frozen(one, depth + 1) for one in items]
    return id(value)

"""The exact evaluation by all workers: every sample once, in no worker twice, the same numbers at every world size.

The set is cut into the same batches whatever the world size, and the workers deal them out among themselves. So each
sample is computed in the same company, and what it scores has the same bits. Integers are summed as such; what a batch
scores in floating point is collected first and added in the order of the set.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from disttrain import rng
from disttrain.data import EvalLoader
from disttrain.distributed import later
from disttrain.distributed.collectives import broadcast_object, gather_objects, sum_
from disttrain.errors import ConfigurationError, brief
from disttrain.faultpoints import reached
from disttrain.layout import EVALUATION
from disttrain.models.buffers import buffers_kept
from disttrain.runs.strict_json import strict_json
from disttrain.task import Task, has_own, named, named_at

_TAKEN = {"metrics", "step", "epoch"}
"""What the file of an evaluation holds besides a task's details."""


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on a set: the task's metrics by name, and its details."""

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The evaluation as `disttrain evaluate --json` prints it; a NaN or infinite number is null."""
        whole: dict[str, Any] = strict_json({"metrics": self.metrics, **self.details})
        return whole


@dataclass(frozen=True)
class Sums:
    """What `score` came to on a whole set, and the set's weight: the same on every rank."""

    by_name: dict[str, Any]
    weight: int


def evaluate(model: nn.Module, task: Task, loader: EvalLoader, *, autocast: torch.dtype | None = None) -> Evaluation:
    """Evaluate `model` on all of the loader's batches: `scored`, then `concluded`."""
    return concluded(task, loader, scored(model, task, loader, autocast=autocast))


@torch.no_grad()
def scored(
    model: nn.Module,
    task: Task,
    loader: EvalLoader,
    *,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[], None] = lambda: None,
    at: str = "",
    compute: Callable[[Callable[[nn.Module, Any], Any], Any], Any] | None = None,
) -> Sums:
    """Sum what `model` scores on all of the loader's batches, shared among the ranks. Every rank must call it.

    `autocast` is the type to compute in, `on_batch` is called after each of this rank's batches, `at` says where in the
    training it is, for messages, and `compute(task.score, data)` does the work where the model alone cannot. The model
    is left as it was, its buffers included: what a rank evaluates must not show in what it trains. Raises
    ConfigurationError for scores or metrics that are not what the task may return, and for a set in which the task
    counts no items.
    """
    coming: dict[int, Callable[[], dict[str, torch.Tensor | list[Any]]]] = {}
    weight = 0
    with buffers_kept(model), _in_eval_mode(model):
        for batch in loader:
            reached("evaluation", batch=batch.number)
            # A model that draws even here must know no worker either.
            rng.seed_layers(loader.device, 0, 0, batch.number)
            place = f"{at}, batch {batch.number % loader.num_batches + 1} of {loader.num_batches}"
            with (
                named_at(task, "score", place),
                torch.autocast(loader.device.type, dtype=autocast, enabled=autocast is not None),
            ):
                score = task.score(model, batch.data) if compute is None else compute(task.score, batch.data)
            if batch.number >= loader.num_batches:
                continue  # only so that every rank makes as many forward passes
            coming[batch.number] = on_its_way(checked_score(task, score))
            weight += batch.weight
            on_batch()
    scores = {number: score() for number, score in coming.items()}
    sums, total = _summed(task, scores, weight, loader.num_batches)
    if total == 0 and has_own(task, "weight"):  # a loss of 0 would look perfect, and be kept as the best
        raise ConfigurationError(
            f"the test set holds no {task.items} to evaluate: {type(task).__name__}.weight(batch) is 0 for each of its "
            "batches; give a test set that holds some."
        )
    return Sums(sums, total)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Whatever happens, it is in its mode again afterwards: a run may continue after the loss of a worker."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def concluded(task: Task, loader: EvalLoader, sums: Sums) -> Evaluation:
    """What the `sums` over the loader's set come to. Every rank must call it, and calls the same.

    Raises TaskError for what the task raises, ConfigurationError for what it may not return.
    """
    rng.seed_layers(loader.device, 0, 0, loader.num_batches)  # each rank has drawn as its own batches had it
    with named(task, "metrics"):
        metrics = task.metrics(sums.by_name, sums.weight)
    with named(task, "details"):
        details = task.details(sums.by_name, sums.weight)
    details = checked_details(task, details)
    # All stop early by the same numbers: on processors of two kinds a user's arithmetic may differ in the last bit.
    return Evaluation(broadcast_object(checked_metrics(task, metrics)), details)


def checked_score(task: Task, score: Any) -> dict[str, torch.Tensor | list[Any]]:
    """What a batch scored, by name: counts as int64 and numbers as float64. Raises ConfigurationError.

    They are on the CPU, or still on a device that one would wait for.
    """
    name = f"{type(task).__name__}.score"
    if not isinstance(score, Mapping):
        raise ConfigurationError(f"{name} returned a {type(score).__name__}: it has to be a dict of tensors and lists.")
    checked: dict[str, torch.Tensor | list[Any]] = {}
    for key, value in score.items():
        if isinstance(value, list):
            _refuse_unsendable(name, key, value)
            checked[key] = value
        elif isinstance(value, torch.Tensor) and not value.is_complex() and value.layout == torch.strided:
            place = value.device if later.is_asynchronous(value.device) else torch.device("cpu")
            checked[key] = value.detach().to(place, torch.float64 if value.is_floating_point() else torch.int64)
        else:
            raise ConfigurationError(
                f"{name} returned a {type(value).__name__} for {key!r}: tensors are added up and lists joined; make it "
                "one of them (torch.tensor(value))."
            )
    return checked


def on_its_way(score: Mapping[str, torch.Tensor | list[Any]]) -> Callable[[], dict[str, torch.Tensor | list[Any]]]:
    """Begin to bring what a batch scored to the host; the result waits for it."""
    coming = {key: later.to_host_later(value) for key, value in score.items() if isinstance(value, torch.Tensor)}
    return lambda: {key: coming[key]() if key in coming else value for key, value in score.items()}


def _refuse_unsendable(name: str, key: object, value: list[Any]) -> None:
    try:
        pickle.dumps(value)  # as torch sends it to the other ranks, which would wait for it
    except Exception as error:  # whatever the class of an entry raises
        raise ConfigurationError(
            f"{name} returned a list for {key!r} that cannot be sent to the other workers ({brief(error)}): give "
            "numbers, texts, tensors, and lists, tuples and dicts of these."
        ) from error


def checked_metrics(task: Task, metrics: Any) -> dict[str, float]:
    """What a task's `metrics` returned, as plain numbers. Raises ConfigurationError."""
    name = f"{type(task).__name__}.metrics"
    if not isinstance(metrics, Mapping):
        raise ConfigurationError(f"{name} returned a {type(metrics).__name__}: it has to be a dict of numbers by name.")
    checked: dict[str, float] = {}
    for key, value in metrics.items():
        try:
            checked[str(key)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"{name} returned a {type(value).__name__} for {key!r}, which is not a number: {brief(error)}; texts "
                "and lists belong in details(sums, weight)."
            ) from error
    return checked


def checked_details(task: Task, details: Any) -> dict[str, Any]:
    """What a task's `details` returned, if it is a dict that JSON can hold. Raises ConfigurationError."""
    try:
        json.dumps(details)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{type(task).__name__}.details returned what JSON cannot hold ({brief(error)}): give numbers, texts, "
            "lists and dicts."
        ) from error
    if not isinstance(details, dict):
        raise ConfigurationError(f"{type(task).__name__}.details returned a {type(details).__name__}, not a dict.")
    taken = details.keys() & _TAKEN
    if taken:
        raise ConfigurationError(
            f"{type(task).__name__}.details returned {min(taken)!r}, which {EVALUATION} has already: rename it."
        )
    return details


def _summed(
    task: Task, scores: Mapping[int, Mapping[str, torch.Tensor | list[Any]]], weight: int, num_batches: int
) -> tuple[dict[str, Any], int]:
    """The scores of all ranks' batches, and their weight: the same on every rank."""
    shapes = {key: _kind(value) for score in scores.values() for key, value in score.items()}
    lists = {
        number: {key: value for key, value in score.items() if isinstance(value, list)}
        for number, score in scores.items()
    }
    is_even = all({key: _kind(value) for key, value in score.items()} == shapes for score in scores.values())
    by_rank = gather_objects((shapes, is_even, weight, lists))
    shapes = next((of_rank for of_rank, *_ in by_rank if of_rank), {})  # a rank may have no batch
    if not all(even and (not of_rank or of_rank == shapes) for of_rank, even, *_ in by_rank):
        raise ConfigurationError(
            f"{type(task).__name__}.score returned other names, shapes or types for some batches than for others: "
            f"for one {shapes}; tensors are added up, so make them alike, or return lists."
        )
    joined = {number: one for *_, of_rank in by_rank for number, one in of_rank.items()}
    sums: dict[str, Any] = {}
    for key, kind in shapes.items():
        if kind is None:
            sums[key] = list(chain.from_iterable(joined[number][key] for number in sorted(joined)))
            continue
        shape, is_float = kind
        mine = {number: score[key] for number, score in scores.items()}
        sums[key] = _sum_in_order(mine, shape, num_batches) if is_float else _count(mine, shape)
    return sums, sum(of_rank for _, _, of_rank, _ in by_rank)


def _kind(value: torch.Tensor | list[Any]) -> tuple[tuple[int, ...], bool] | None:
    return None if isinstance(value, list) else (tuple(value.shape), value.is_floating_point())


def _count(mine: Mapping[int, Any], shape: tuple[int, ...]) -> torch.Tensor:
    total = torch.zeros(shape, dtype=torch.int64)
    for value in mine.values():
        total += value
    return sum_(total)


def _sum_in_order(mine: Mapping[int, Any], shape: tuple[int, ...], num_batches: int) -> torch.Tensor:
    by_batch = torch.zeros((num_batches, *shape), dtype=torch.float64)
    for number, value in mine.items():
        by_batch[number] = value
    # Each entry is one rank's own number, and zeros: the sum over ranks adds no rounding.
    return sum_(by_batch).sum(0)

"""A trial of exact mode before training: what cannot be exact is refused by name, not discovered afterwards."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from disttrain import rng
from disttrain.data import largest_part, smallest_part, unlike_when_read_again
from disttrain.distributed.collectives import broadcast_from_main
from disttrain.distributed.sharded import is_sharded, local
from disttrain.errors import ConfigurationError
from disttrain.models.buffers import same_bits
from disttrain.training.compiled import replays_graphs, times_compiled
from disttrain.training.job import Job
from disttrain.training.shortage import shortage_of

_NO_DETERMINISTIC_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")
_MODEL = "the model"
_OR_FAST = "or set parallel.exact = false"


def try_exactness(job: Job) -> None:
    """Compute a step of a few samples twice, and evaluate them, as exact mode would; leave the job as it was.

    Raises ConfigurationError, on every rank alike, for a data set that draws from a generator of its own, an operator
    without a deterministic kernel, a function that is compiled without `train.compile`, sparse gradients, parts of a
    step that are too small for the model, state that changes where no checkpoint or no other worker would see it,
    gradients that are not those without shards, and results that differ from the first time to the second, as they do
    when a model keeps state or a generator of its own.
    """
    broadcast_from_main(job.world, lambda: _read_again(job))
    model, kept = job.model, frozenset(job.model.state_dict())
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    parameters = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    versions = {key: parameter._version for key, parameter in model.named_parameters()}
    num_compiled = times_compiled()
    if num_compiled and not job.recipe.train.compile:
        torch.compiler.reset()  # what was compiled before would not be again
    with generators_kept():
        try:
            with shortage_of(job, len(_samples(job))), named_operators(job.world.device):
                first = _results(job)
                _refuse_lost_buffers(model, buffers, kept)
                _restore(model, buffers)
                again = _unlike(first, _results(job))
                _restore(model, buffers)
                with job.strategy.without_borders():
                    unsharded = _unlike(first, _results(job)) if job.strategy.is_sharded else None
                _restore(model, buffers)
                _evaluate(job)
            _refuse_changes_in_evaluation(model, buffers)
            _refuse_changed_parameters(model, parameters, versions)
        finally:
            _put_back(model, buffers, parameters)
    if not job.recipe.train.compile and times_compiled() > num_compiled:
        raise ConfigurationError(
            "the task or the model compiles a function itself (torch.compile), and by which kernels that is computed "
            "depends on the shapes that a worker has met before: set train.compile = true, with which there are "
            f"kernels for each shape, do without torch.compile there, {_OR_FAST}."
        )
    if again is not None:
        raise ConfigurationError(
            f"{_MODEL} gives another result for '{again}' when it computes the same samples again, so it keeps state "
            f"or a random generator of its own: keep state in buffers and draw from torch's global generator, "
            f"{_OR_FAST}."
        )
    if unsharded is not None:
        raise ConfigurationError(
            f"{_MODEL}: the gradient of '{unsharded}' is added up in another order with parallel.strategy = 'fsdp', "
            "because something that goes into a block is used outside of it, too (a connection past the block): "
            f"name other blocks in parallel.shard_modules, set parallel.strategy = 'ddp', {_OR_FAST}."
        )


def _unlike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str | None:
    """The first result in which the two differ."""
    return next(
        (
            key
            for key, tensor in one.items()
            if key not in other or not torch.equal(tensor.nan_to_num(), other[key].nan_to_num())
        ),
        None,
    )


def _read_again(job: Job) -> None:
    for split, name in ((job.data.train, "the training set"), (job.data.test, "the test set")):
        changed = unlike_when_read_again(split, job.task)
        if changed is not None:
            raise ConfigurationError(
                f"{changed} of {getattr(split, 'name', '') or name} differs when it is read again with the same "
                "seed, so the set draws from a generator of its own: draw from the global ones of torch, random or "
                "NumPy, which are seeded for each sample, or seed its own in __getitem__ with torch.initial_seed(), "
                f"{_OR_FAST}."
            )


def _samples(job: Job) -> torch.Tensor:
    """Two samples, or one if there are steps in which the model will see a single one: their places in a set.

    On a GPU as many as a step computes at once: kernels are chosen by the shape, and not all are deterministic.
    """
    recipe = job.recipe
    sizes = len(job.data.train), recipe.data.batch_size, recipe.parallel.slices, recipe.train.accumulate
    return torch.arange(largest_part(*sizes) if job.world.device.type == "cuda" else min(2, smallest_part(*sizes)))


def _results(job: Job) -> dict[str, torch.Tensor]:
    """Loss and gradients of the samples, by name; the model is left with its buffers changed and no gradients."""
    batch = job.loader.samples(0, _samples(job))
    rng.seed_layers(job.world.device, 0, 0, 0)

    def compute(model: nn.Module, data: Any) -> torch.Tensor:
        with torch.autocast(job.world.device.type, dtype=job.autocast, enabled=job.autocast is not None):
            return job.task.loss(model, data)

    loss, gradients = job.strategy.trial(compute, batch, _refuse_sparse)
    results = {"loss": loss, **gradients}
    if replays_graphs(job.recipe.train, job.world.device):  # the next trial's are written to the same memory
        results = {name: result.clone() for name, result in results.items()}
    return results


def _refuse_sparse(name: str, gradient: torch.Tensor) -> None:
    if gradient.layout != torch.strided:
        raise ConfigurationError(
            f"{_MODEL}: the gradient of '{name}' is sparse, which exact mode cannot sum: use a dense one "
            f"(sparse=False), {_OR_FAST}."
        )


def _evaluate(job: Job) -> None:
    job.model.eval()
    try:
        with torch.no_grad(), torch.autocast(job.world.device.type, job.autocast, job.autocast is not None):
            job.strategy.score(job.task.score, job.eval_loader.samples(_samples(job)[: len(job.data.test)]))
        job.strategy.refuse_writing()
    finally:
        job.model.train()


def _restore(model: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    now = dict(model.named_buffers())
    for key in sorted(now.keys() | buffers.keys()):
        if key not in now or key not in buffers or now[key].shape != buffers[key].shape:
            raise ConfigurationError(
                f"{_MODEL}: the buffer '{key}' appears, goes or changes its shape in training: give it its shape when "
                f"the model is built, {_OR_FAST}."
            )
    with torch.no_grad():
        for key, buffer in now.items():
            buffer.copy_(buffers[key])


def _refuse_lost_buffers(model: nn.Module, before: dict[str, torch.Tensor], kept: frozenset[str]) -> None:
    for key, buffer in model.named_buffers():
        if key not in kept and key in before and not same_bits(buffer, before[key]):
            raise ConfigurationError(
                f"{_MODEL}: the buffer '{key}' changes in training and is not persistent, so no checkpoint would have "
                f"it: register it with persistent=True, {_OR_FAST}."
            )


def _refuse_changes_in_evaluation(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for key, buffer in model.named_buffers():
        if key not in before or not same_bits(buffer, before[key]):
            raise ConfigurationError(
                f"{_MODEL}: the buffer '{key}' changes in evaluation, where each worker sees other samples: change it "
                f"only in training (if self.training), {_OR_FAST}."
            )


def _refuse_changed_parameters(model: nn.Module, before: dict[str, torch.Tensor], versions: dict[str, int]) -> None:
    for key, parameter in model.named_parameters():
        # Written to with the same numbers today, as by a clamp, may be with others tomorrow.
        if parameter._version != versions.get(key) or not same_bits(local(parameter), local(before[key])):
            raise ConfigurationError(
                f"{_MODEL} changes its parameter '{key}' by itself, where each worker sees other samples: make it a "
                f"buffer, which all workers share, {_OR_FAST}."
            )


def _put_back(model: nn.Module, *tensors: dict[str, torch.Tensor]) -> None:
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for key, value in (item for some in tensors for item in some.items()):
            # Where the trial has failed amid a sharded block, that is whole.
            if key in now and now[key].shape == value.shape and is_sharded(now[key]) == is_sharded(value):
                now[key].copy_(value)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's global generators as they were, whatever the block draws."""
    python, legacy_numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)
        torch.set_rng_state(cpu)


@contextmanager
def named_operators(device: torch.device, instead: str = _OR_FAST) -> Iterator[None]:
    """Turn torch's error about an operator without a deterministic kernel into a ConfigurationError."""
    try:
        yield
    except RuntimeError as error:
        found = _NO_DETERMINISTIC_KERNEL.search(str(error))
        if found is None:
            raise
        raise ConfigurationError(
            f"the operator {found[1]} has no deterministic kernel on {device.type}: replace it in the model, {instead}."
        ) from error

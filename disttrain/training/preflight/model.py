"""A look at what the model does, before anything is trained."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from disttrain import rng
from disttrain.data import batch_sizes_without_single_samples, smallest_batch, smallest_part, tensors_in
from disttrain.distributed.sharded import local
from disttrain.errors import ConfigurationError, is_circumstance, is_lost_peer, where
from disttrain.models.buffers import buffers_kept, same_bits
from disttrain.task import ImageClassification, Task, has_own
from disttrain.training.evaluate import checked_score, on_its_way
from disttrain.training.given import model_words
from disttrain.training.job import Job
from disttrain.training.preflight.evaluation import check_evaluation
from disttrain.training.preflight.exactness import generators_kept, named_operators
from disttrain.training.preflight.score import check_score
from disttrain.training.preflight.state import check_sparse_gradients
from disttrain.training.preflight.task import check_task, checked_loss

_log = logging.getLogger("disttrain")
_ANY_MODEL = "the model returned"
_SPARSE = re.compile(r"SparseTensorImpl|'Sparse[A-Z]+' backend")
_NUM_SAMPLES = 2  # or one, if training or evaluation will come upon a single one


def check_model(job: Job, warn: Callable[[str], None]) -> None:
    """Have the task compute a loss and a score of real samples; leave the model as it was, and `warn` of what is odd.

    Every rank must call it: a model may have collectives of its own. Raises ConfigurationError if that fails, or comes
    to something that a task may not return; on every rank alike, unless the ranks' models differ.
    """
    job.strategy.check_modules()  # by name, before it fails for a reason of its own
    _evaluate(job)
    rehearse(job)
    check_task(job, lambda: quietly(job, training=True), warn)
    check_score(job, _num_samples(job, training=False), lambda: quietly(job, training=False))


def rehearse(job: Job) -> None:
    """Have the model compute a step on real samples, to no effect; with several workers in fast mode all together.

    DistributedDataParallel arranges its sums anew after its first step. With this behind it, a step has the same bits
    whether the process has just started or not. Every rank must call it. Raises ConfigurationError as `check_model`
    does, for a parameter that gets no gradient although the other workers would wait for it, if none gets one, and for
    sparse ones that the optimizer does not take.
    """
    num = _num_samples(job, training=True)
    data, weight = job.loader.fetched(0, torch.arange(num))
    with _explained(job, "loss", data, num, training=True), quietly(job, training=True):
        with torch.autocast(job.world.device.type, job.autocast, job.autocast is not None):
            loss = job.strategy.loss(partial(checked_loss, job.task), data, num_samples=num)
        job.strategy.rehearse(loss)
        check_sparse_gradients(job)
        if weight and all(one.grad is None for one in job.model.parameters() if one.requires_grad):
            raise ConfigurationError(
                f"{type(job.task).__name__}.loss returned a tensor that depends on no parameter of the model, so "
                "nothing would be learned: compute it from what the model returns."
            )


def _evaluate(job: Job) -> None:
    num = _num_samples(job, training=False)
    data = job.eval_loader.samples(torch.arange(num))
    with (
        _explained(job, "score", data, num, training=False),
        quietly(job, training=False),
        torch.autocast(job.world.device.type, job.autocast, job.autocast is not None),
    ):
        score = on_its_way(checked_score(job.task, job.strategy.score(_score(job.task), data)))
    check_evaluation(job.task, score(), num, job.recipe.checkpoint.best)


def _score(task: Task) -> Callable[[nn.Module, Any], Mapping[str, Any]]:
    """The task's score; by default its loss, which is looked at before what the metrics make of it."""
    return task.score if has_own(task, "score") else lambda model, batch: {"loss": checked_loss(task, model, batch)}


@contextmanager
def quietly(job: Job, *, training: bool, compiled: bool = False) -> Iterator[None]:
    """Compute in this mode, as a step does, and leave no trace; `compiled`: by a compiled model's kernels."""
    is_fast = job.strategy.bits_depend_on_world_size
    job.model.train(training)
    try:
        with (
            _weights_kept(job.model) if training else nullcontext(),
            buffers_kept(job.model),
            generators_kept(),
            named_operators(job.world.device, *(["or set train.deterministic = false"] if is_fast else [])),
            torch.set_grad_enabled(training),  # as in training: a model may hang hooks on what has a gradient
            torch.compiler.set_stance("force_eager") if job.recipe.train.compile and not compiled else nullcontext(),
        ):
            rng.seed_layers(job.world.device, 0, 0, 0)  # the same on all ranks
            yield
    finally:
        job.optimizer.zero_grad(set_to_none=True)
        job.model.train()


@contextmanager
def _explained(job: Job, method: str, data: Any, num: int, *, training: bool) -> Iterator[None]:
    """Report a failure in a method of the task with the model, the samples, and why there is only one."""
    why_one = _why_one(job, training=training) if num == 1 else ""
    try:
        yield
    except ConfigurationError as error:
        if not str(error).startswith(_ANY_MODEL):
            raise
        said = str(error).removeprefix(_ANY_MODEL)  # a task has no record of where the model comes from
        raise ConfigurationError(f"{_name(job)} returned{said} {why_one}".strip()) from error
    except Exception as error:
        if is_lost_peer(error):  # its own failure says why
            raise
        if job.step and is_circumstance(error):  # it had the memory before: the process before may hold it still
            raise
        on = _in_words(job, data, num, training=training)
        what = f"{_at_fault(job, method, error)} on {on}"
        _log.exception("%s", what)
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        if _SPARSE.search(reason):  # torch's own words are of its backends
            reason = (
                "a gradient is sparse, which this way of training cannot sum: make it dense (sparse=False); "
                "DistributedDataParallel takes those of nn.Embedding and nn.EmbeddingBag alone"
            )
        raise ConfigurationError(
            f"{what}: {reason} ({where(error)}). {why_one}The traceback is in the run's logs."
        ) from error


def _at_fault(job: Job, method: str, error: Exception) -> str:
    """What fails: the task, where its own code did and the model was not at work; else the model, and where."""
    # By their code: a look at a frame's variables would keep them, and the process group, alive.
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_model = {code for module in job.model.modules() for code in _methods(type(module))}
    of_task = _methods(type(job.task))
    users = [code.co_name for code in codes if code in of_task]
    if users and not any(code in of_model for code in codes):
        return f"{type(job.task).__name__}.{users[-1]} fails"
    by = "" if isinstance(job.task, ImageClassification) else f" in {type(job.task).__name__}.{(users or [method])[-1]}"
    return f"{_name(job)} fails{by}"


def _methods(kind: type) -> set[CodeType]:
    """The code of the methods of a class and those that it is made of, but for ours and torch's `nn.Module`."""
    kinds = [one for one in kind.__mro__ if one is not nn.Module and not one.__module__.startswith("disttrain.task.")]
    found = [getattr(value, "__func__", value) for one in kinds for value in vars(one).values()]
    return {one.__code__ for one in found if isinstance(one, FunctionType)}


def _in_words(job: Job, data: Any, num: int, *, training: bool) -> str:
    shapes = [tuple(tensor.shape) for tensor in tensors_in(data)]
    if isinstance(job.task, ImageClassification):
        return f"a batch of images of shape {shapes[0]}"
    samples = f"the first {num} samples" if num > 1 else "the first sample"
    listed = ", ".join(map(str, shapes[:4])) + (", …" if len(shapes) > 4 else "")
    return f"{samples} of the {'training' if training else 'test'} set, tensors of shapes {listed or 'none'}"


def _name(job: Job) -> str:
    return model_words(job.recipe, is_given="model" in job.given)


def _num_samples(job: Job, *, training: bool) -> int:
    """As few as the model will ever see at once, two at most: the same on every rank."""
    if training:
        return min(_NUM_SAMPLES, smallest_part(*_sizes(job)))
    return min(_NUM_SAMPLES, smallest_batch(len(job.data.test), job.recipe.train.eval_batch_size))


def _sizes(job: Job) -> tuple[int, int, int, int]:
    recipe = job.recipe
    return len(job.data.train), recipe.data.batch_size, job.strategy.num_slices, recipe.train.accumulate


def _why_one(job: Job, *, training: bool) -> str:
    """Where a batch of a single sample comes from, and what to do about it."""
    recipe = job.recipe
    if not training:
        return (
            f"The last evaluation batch is that small: {len(job.data.test):,} test samples in batches of "
            f"train.eval_batch_size = {recipe.train.eval_batch_size}; choose another size. "
        )
    others = batch_sizes_without_single_samples(*_sizes(job))
    such_as = f" such as {' or '.join(map(str, others))}" if others else " with a larger last batch"
    micro = ["a smaller train.accumulate"] if recipe.train.accumulate > 1 else []
    remedies = "".join(f", or {remedy}" for remedy in [*micro, *job.strategy.larger_slices()])
    return (
        f"With {len(job.data.train):,} training samples, data.batch_size = {recipe.data.batch_size}, "
        f"{job.strategy.cut_by} and train.accumulate = {recipe.train.accumulate} some {job.strategy.slice_word} has a "
        f"single sample: choose a batch size{such_as}{remedies}. "
    )


@contextmanager
def _weights_kept(model: nn.Module) -> Iterator[None]:
    """Leave every parameter as it was: some models change theirs by themselves (an Embedding with max_norm)."""
    copies = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, copy in copies.items():
                if not same_bits(local(parameter), local(copy)):
                    parameter.copy_(copy)

"""A look at what the model does, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from disttrain import rng
from disttrain.data import batch_sizes_without_single_samples, smallest_batch, smallest_part
from disttrain.errors import ConfigurationError
from disttrain.models.buffers import buffers_kept, same_bits
from disttrain.training.job import Job
from disttrain.training.preflight.exactness import generators_kept, named_operators

_log = logging.getLogger("disttrain")
_NUM_IMAGES = 2  # or one, if training or evaluation will come upon a single one


def check_model(job: Job) -> None:
    """Have the model classify blank images, in evaluation and in training mode; leave it as it was.

    Every rank must call it: a model may have collectives of its own. Raises ConfigurationError if it fails or does not
    return one score per image and class; on every rank alike, unless the ranks' models differ.
    """
    job.strategy.check_modules()  # by its name, before it fails for a reason of its own
    _try(job, training=False)
    rehearse(job)


def rehearse(job: Job) -> None:
    """Have the model compute a step on blank images, to no effect; with several workers in fast mode all together.

    DistributedDataParallel arranges its sums anew after its first step. With this behind it, a step has the same bits
    whether the process has just started or not. Every rank must call it. Raises ConfigurationError as `check_model`
    does, and for a parameter that gets no gradient although the other workers would wait for it.
    """
    _try(job, training=True)


def _try(job: Job, *, training: bool) -> None:
    num = _num_images(job, training=training)
    images = torch.zeros(num, *job.data.train.sample_shape, device=job.world.device)

    def classify(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        scores = model(images)
        _check_scores(job, scores, len(images), training=training)
        return functional.cross_entropy(scores, torch.zeros(len(images), dtype=torch.int64, device=images.device))

    job.model.train(training)
    try:
        with (
            _weights_kept(job.model) if training else nullcontext(),
            buffers_kept(job.model),
            generators_kept(),
            named_operators(job.world.device),
            torch.set_grad_enabled(training),  # as in training: a model may hang hooks on what has a gradient
            torch.compiler.set_stance("force_eager") if job.recipe.train.compile else nullcontext(),
        ):
            rng.seed_layers(job.world.device, 0, 0, 0)  # on all ranks alike
            with torch.autocast(job.world.device.type, job.autocast, job.autocast is not None):
                if training:
                    loss = job.strategy.loss(classify, images, num_samples=num)
                else:
                    classify(job.model, images)
            if training:
                job.strategy.rehearse(loss)
    except ConfigurationError:
        raise
    except Exception as error:
        _log.exception("%s fails on images of shape %s", _name(job), tuple(images.shape))
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ConfigurationError(
            f"{_name(job)} fails on a batch of images of shape {tuple(images.shape)}: {reason}. "
            f"{_why_one(job, training=training) if num == 1 else ''}The traceback is in the run's logs."
        ) from error
    finally:
        job.optimizer.zero_grad(set_to_none=True)
        job.model.train()


def _check_scores(job: Job, scores: Any, num: int, *, training: bool) -> None:
    needed = (num, len(job.data.train.classes))
    if isinstance(scores, torch.Tensor) and scores.shape == needed:
        return
    is_tensor = isinstance(scores, torch.Tensor)
    found = f"a tensor of shape {tuple(scores.shape)}" if is_tensor else f"a {type(scores).__name__}"
    when = " in training mode (model.train())" if training else ""
    raise ConfigurationError(
        f"{_name(job)} returned {found} for {num} image{'s' if num > 1 else ''}{when}: needed is a tensor of shape "
        f"{needed}, a score for each of the {needed[1]} classes of '{job.data_name}'. "
        f"{_why_one(job, training=training) if num == 1 else ''}".strip()
    )


def _name(job: Job) -> str:
    instead = "the model given in place of " if "model" in job.given else ""
    return f"{instead}model.name = '{job.recipe.model.name}'"


def _num_images(job: Job, *, training: bool) -> int:
    """As few as the model will ever see at once, two at most: the same on every rank."""
    if training:
        return min(_NUM_IMAGES, smallest_part(*_sizes(job)))
    return min(_NUM_IMAGES, smallest_batch(len(job.data.test), job.recipe.train.eval_batch_size))


def _sizes(job: Job) -> tuple[int, int, int, int]:
    recipe = job.recipe
    return len(job.data.train), recipe.data.batch_size, job.strategy.num_slices, recipe.train.accumulate


def _why_one(job: Job, *, training: bool) -> str:
    """Where a batch of a single sample comes from, and what to do about it."""
    recipe = job.recipe
    if not training:
        return (
            f"So small is the last of the batches of train.eval_batch_size = {recipe.train.eval_batch_size} that the "
            f"{len(job.data.test):,} test samples are evaluated in: choose another size. "
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
                if not same_bits(parameter, copy):
                    parameter.copy_(copy)

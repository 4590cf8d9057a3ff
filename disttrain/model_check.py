"""A look at what the model returns, before anything is trained."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch

from disttrain.buffers import buffers_kept
from disttrain.errors import ConfigurationError
from disttrain.job import Job
from disttrain.trial import generators_kept, named_operators, refuse_modules

_log = logging.getLogger("disttrain")
_NUM_IMAGES = 2


def check_model(job: Job) -> None:
    """Have the model classify two blank images, in evaluation and in training mode; leave it as it was.

    Every rank must call it: a model may have collectives of its own. Raises ConfigurationError, on every rank alike, if
    it fails or does not return one score per image and class.
    """
    if job.parallel.exact is not None:
        refuse_modules(job.model)  # by its name, before it fails for a reason of its own
    instead = "the model given in place of " if "model" in job.given else ""
    name = f"{instead}model.name = '{job.recipe.model.name}'"
    needed = (_NUM_IMAGES, len(job.data.train.classes))
    for training in (False, True):
        scores = _scores(job, name, training=training)
        if not isinstance(scores, torch.Tensor) or scores.shape != needed:
            is_tensor = isinstance(scores, torch.Tensor)
            found = f"a tensor of shape {tuple(scores.shape)}" if is_tensor else f"a {type(scores).__name__}"
            when = " in training mode (model.train())" if training else ""
            raise ConfigurationError(
                f"{name} returned {found} for {_NUM_IMAGES} images{when}: needed is a tensor of shape {needed}, a "
                f"score for each of the {needed[1]} classes of '{job.data_name}'."
            )


def _scores(job: Job, name: str, *, training: bool) -> Any:
    """What the model returns for blank images in this mode. Raises ConfigurationError if it fails."""
    model = job.model
    images = torch.zeros(_NUM_IMAGES, *job.data.train.sample_shape, device=job.world.device)
    model.train(training)
    try:
        with (
            buffers_kept(model),
            generators_kept(),
            named_operators(job.world.device),
            torch.set_grad_enabled(training),  # as in training: a model may hang hooks on what has a gradient
            torch.autocast(job.world.device.type, job.autocast, job.autocast is not None),
            torch.compiler.set_stance("force_eager") if job.recipe.train.compile else nullcontext(),
        ):
            return model(images)
    except ConfigurationError:
        raise
    except Exception as error:
        _log.exception("%s fails on images of shape %s", name, tuple(images.shape))
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ConfigurationError(
            f"{name} fails on a batch of images of shape {tuple(images.shape)}: {reason}. "
            "The traceback is in the run's logs."
        ) from error
    finally:
        model.train()

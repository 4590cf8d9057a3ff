"""A look at what the model returns, before anything is trained."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch

from disttrain.buffers import buffers_kept
from disttrain.errors import ConfigurationError
from disttrain.job import Job
from disttrain.trial import generators_kept, named_operators

_log = logging.getLogger("disttrain")
_NUM_IMAGES = 2


def check_model(job: Job) -> None:
    """Have the model classify two blank images, in evaluation mode; leave it as it was.

    Raises ConfigurationError, on every rank alike, if it fails or does not return one score per image and class.
    """
    model, num_classes = job.model, len(job.data.train.classes)
    images = torch.zeros(_NUM_IMAGES, *job.data.train.sample_shape, device=job.world.device)
    instead = "the model given in place of " if "model" in job.given else ""
    name = f"{instead}model.name = '{job.recipe.model.name}'"
    model.eval()
    try:
        with (
            buffers_kept(model),
            generators_kept(),
            named_operators(job.world.device),
            torch.no_grad(),
            torch.autocast(job.world.device.type, job.autocast, job.autocast is not None),
            torch.compiler.set_stance("force_eager") if job.recipe.train.compile else nullcontext(),
        ):
            scores = model(images)
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
    needed = (_NUM_IMAGES, num_classes)
    if not isinstance(scores, torch.Tensor) or scores.shape != needed:
        is_tensor = isinstance(scores, torch.Tensor)
        found = f"a tensor of shape {tuple(scores.shape)}" if is_tensor else f"a {type(scores).__name__}"
        raise ConfigurationError(
            f"{name} returned {found} for {_NUM_IMAGES} images: needed is a tensor of shape {needed}, a score for each "
            f"of the {num_classes} classes of '{job.data_name}'."
        )

"""A look at what the task's score adds to an evaluation, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from disttrain import rng
from disttrain.errors import ConfigurationError
from disttrain.task import has_own, named
from disttrain.training.evaluate import checked_score
from disttrain.training.job import Job
from disttrain.training.preflight.task import CLOSE


def check_score(job: Job, num: int, quietly: Callable[[], AbstractContextManager[None]]) -> None:
    """Refuse a score that is a mean where the default `metrics` divides it once more. Every rank must call it.

    `num` is how many samples at once the model can take for certain; `quietly` makes a context to evaluate in that
    leaves no trace. Raises ConfigurationError.
    """
    task, most = job.task, min(2 * num, len(job.data.test))
    if has_own(task, "metrics") or not has_own(task, "score") or job.recipe.train.eval_batch_size == 1:
        return
    groups = [few for few in torch.split(torch.arange(most), num) if len(few) == num]
    found = [_twice(job, few, quietly) for few in groups]
    for key, value in found[0][0].items():
        if all(_is_mean(key, *pair) for pair in found):  # several, so that chance does not make a sum look like one
            raise ConfigurationError(
                f"{type(task).__name__}.score returns a mean for {key!r}: it is {value:.4g} for the first samples of "
                f"the test set and {found[0][1][key]:.4g} for the same ones twice over. It has to be the sum over the "
                "batch's items, which `metrics` divides by the weight of the whole set "
                '(reduction="sum" in place of "mean"; or define metrics).'
            )


def _twice(job: Job, few: torch.Tensor, quietly: Callable[[], AbstractContextManager[None]]) -> list[dict[str, float]]:
    """What these samples score, by name, and what the same ones twice over do, if that is of a larger weight."""
    found, weights = [], []
    for samples in (few, few.repeat(2)):
        fetched = job.eval_loader.fetched(samples)
        with quietly(), torch.autocast(job.world.device.type, job.autocast, job.autocast is not None):
            rng.seed_layers(job.world.device, 0, 0, int(few[0]))
            with named(job.task, "score"):
                score = job.strategy.score(job.task.score, fetched.data)
        found.append(_fractions(checked_score(job.task, score)))
        weights.append(fetched.weight)
    return found if weights[1] >= 1.5 * max(1, weights[0]) else [{}, {}]


def _fractions(score: Mapping[str, torch.Tensor | list[Any]]) -> dict[str, float]:
    """The scalars that may be means. A whole number is a count, which in twice the batch may well be the same.

    (How many samples find their own partner among all those of the batch, say.)
    """
    scalars = {key: float(one) for key, one in score.items() if isinstance(one, torch.Tensor) and not one.ndim}
    return {key: value for key, value in scalars.items() if not value.is_integer()}


def _is_mean(key: str, one: Mapping[str, float], twice: Mapping[str, float]) -> bool:
    return key in one and key in twice and abs(twice[key] - one[key]) <= CLOSE * abs(one[key])  # which NaN never is

"""Weights to start from: those of a run, a checkpoint or a safetensors file, as far as they fit, or of the images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disttrain.checkpoint import Checkpoint, shared_names, weights_sha256
from disttrain.checkpoint.handout import hand_out, hand_out_parts, read_by_main
from disttrain.checkpoint.weights import read_weights
from disttrain.data import tensors_in
from disttrain.distributed.sharded import local
from disttrain.errors import ConfigurationError, UsageError
from disttrain.layout import MANIFEST
from disttrain.models.buffers import same_bits
from disttrain.models.patterns import listed, matching
from disttrain.models.start import convolution_to_whiten, whitening_filters
from disttrain.recipe import ModelRecipe
from disttrain.recipe.address import is_url
from disttrain.remote.find import find_checkpoint
from disttrain.runs.rundir import is_run
from disttrain.training.job import Job

_log = logging.getLogger("disttrain")
_MOST_IMAGES, _AT_ONCE = 5000, 256


def start_from_weights(job: Job) -> list[str]:
    """Give the model the weights that `model.init` names; return the report, a line each, for the console.

    Every rank must call it; rank 0 reads. The log has every name. Raises ConfigurationError if nothing can be read or
    nothing fits, and for a shape that does not, unless `model.init_skip` matches its name.
    """
    return _started_from(job, lambda: _fitting(job.model, job.recipe.model))


def start_from_images(job: Job) -> list[str]:
    """Give the layer that `model.whiten` names its filters; return a line for the console.

    Every rank must call it; rank 0 computes. Raises ConfigurationError for samples that are not images, or do not fit.
    """
    return _started_from(job, lambda: _whitening(job))


def _started_from(job: Job, read: Callable[[], Checkpoint]) -> list[str]:
    found = read_by_main(job.world, read)
    job.init = found.state["init"]
    here = job.model.state_dict()
    if job.strategy.is_sharded:
        weights = hand_out_parts(job.world, found.model, here.get, by_broadcast=True)
    else:
        weights = hand_out(job.world, found.model, here)
    job.model.load_state_dict(weights, strict=False)
    if job.ema is not None:
        job.ema.restart()
    lines: list[str] = found.state["lines"]
    return lines


def _whitening(job: Job) -> Checkpoint:
    name = job.recipe.model.whiten
    assert name is not None
    channels, height, width = convolution_to_whiten(job.model, name).weight.shape[1:]
    num = min(_MOST_IMAGES, len(job.data.train))
    parts = torch.split(torch.arange(num), _AT_ONCE)
    filters = whitening_filters((_images(job, samples, name, channels) for samples in parts), channels, height, width)
    source = f"whitening filters of {num:,} training images"
    init = {"source": source, "sha256": weights_sha256({name: filters})}
    line = f"starting from {source} in {name}"
    return Checkpoint(Path(source), {f"{name}.weight": filters}, {}, {"lines": [line], "init": init})


def _images(job: Job, samples: torch.Tensor, name: str, channels: int) -> torch.Tensor:
    """Training images, (N, C, H, W), as they are evaluated."""
    images = next(iter(tensors_in(job.loader.fetched(0, samples, training=False).data)), None)
    if images is None or images.ndim != 4 or not images.is_floating_point() or images.shape[1] != channels:
        found = "no tensors" if images is None else f"tensors {tuple(images.shape[1:])}"
        raise ConfigurationError(
            f"model.whiten: '{name}' takes images of {channels} channels, and the training samples are {found}: name "
            "the layer that gets the images, or leave it out."
        )
    if not bool((finite := images.isfinite().flatten(1).all(dim=1)).all()):
        raise ConfigurationError(
            f"model.whiten: sample {int(samples[~finite.cpu()][0])} of the training set is not finite, so no filters "
            "follow from the images: mend the data set, or leave it out."
        )
    return images


def _fitting(model: nn.Module, recipe: ModelRecipe) -> Checkpoint:
    """Those of the weights that the model takes, with the report and what a checkpoint says of it."""
    assert recipe.init is not None
    source, weights = _read(recipe.init)
    here = model.state_dict()
    skipped = set(matching(recipe.init_skip, {**here, **weights}, "model.init_skip", what="tensor"))
    wanted = {name: tensor for name, tensor in here.items() if name not in skipped}
    fitting = {name: tensor for name, tensor in weights.items() if name in wanted}
    if not fitting:
        raise ConfigurationError(
            f"model.init: none of the names in {source} is one of the model's: it has {listed(list(weights))}; the "
            f"model has {listed(list(here))}."
        )
    unlike = [name for name in wanted if name in fitting and fitting[name].shape != wanted[name].shape]
    if unlike:
        name, rest = unlike[0], len(unlike) - 1
        raise ConfigurationError(
            f"model.init: '{name}' is {tuple(fitting[name].shape)} in {source}, and the model has "
            f"{tuple(wanted[name].shape)}{f' ({rest} more differ)' if rest else ''}; model.init_skip = "
            f'["{_module_of(name)}"] leaves it as the model\'s constructor made it.'
        )
    _refuse_untied(source, wanted, fitting)
    missing = _not_loaded(wanted, fitting)
    unexpected = [name for name in weights if name not in here]
    lines = [f"starting from {source}: {len(fitting)} of {len(here)} tensors"]
    for what, names in (
        ("missing there", missing),
        ("left as they were (model.init_skip)", sorted(skipped & here.keys())),
        ("not used", unexpected),
    ):
        if names:
            lines.append(f"  {what}: {listed(names)}")
            _log.info("model.init: %s: %s", what, ", ".join(names))
    init = {"source": source, "sha256": weights_sha256(fitting)}
    return Checkpoint(source, fitting, {}, {"lines": lines, "init": init})


def _read(address: str) -> tuple[str, Mapping[str, torch.Tensor]]:
    """Where the weights are, and the weights."""
    try:
        if is_url(address):
            checkpoint = find_checkpoint(address)
        else:
            path = Path(address).expanduser()
            if not ((path / MANIFEST).is_file() or is_run(path)):
                return str(path), read_weights(path)
            checkpoint = find_checkpoint(path)
    except (ConfigurationError, UsageError) as error:
        raise ConfigurationError(f"model.init: {error}") from error
    return str(checkpoint.path), checkpoint.averaged().model


def _refuse_untied(source: str, wanted: dict[str, torch.Tensor], fitting: dict[str, torch.Tensor]) -> None:
    """Raise ConfigurationError if the weights have two tensors for what is one in the model: the later would win."""
    shared = shared_names({name: wanted[name] for name in wanted if name in fitting})
    for name, first in shared.items():
        dtype = wanted[name].dtype
        if not same_bits(fitting[name].to(dtype), fitting[first].to(dtype)):
            raise ConfigurationError(
                f"model.init: '{first}' and '{name}' are one tensor in the model, and differ in {source}: start from "
                f'the weights of a model that ties them, or choose one by model.init_skip = ["{name}"].'
            )


def _not_loaded(wanted: dict[str, Any], fitting: dict[str, Any]) -> list[str]:
    """What keeps the constructor's numbers: a name that shares its memory with one that is loaded does not."""
    loaded = {local(wanted[name]).data_ptr() for name in fitting}
    return [name for name, tensor in wanted.items() if name not in fitting and local(tensor).data_ptr() not in loaded]


def _module_of(name: str) -> str:
    module = name.rpartition(".")[0]
    return f"{module}.*" if module else name

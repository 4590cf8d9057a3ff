"""Weights to start from that are made rather than drawn: identities, and filters that whiten the training images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional

from disttrain.errors import ConfigurationError
from disttrain.models.freeze import freeze
from disttrain.models.patterns import matching
from disttrain.recipe import ModelRecipe
from disttrain.recipe.names import nearest

WHITENING_EPS = 5e-4
"""Added to the variances that are divided by, those of pixels normalised to about one: as in arXiv 2404.00498."""

_MOST_NUMBERS = 1 << 26  # of patches, at once: half a gigabyte
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def made_and_frozen(model: nn.Module, recipe: ModelRecipe, *, channels_last: bool = False) -> nn.Module:
    """The model, with identities where the recipe wants them, and frozen what it wants frozen or is to whiten.

    `channels_last`: its convolutions' weights in that order of memory. What they compute is in the order of either
    weights or images, so the images need not be turned.

    Raises ConfigurationError for a name that does not fit.
    """
    make_partial_identities(model, recipe.dirac)
    if recipe.whiten is not None:
        convolution_to_whiten(model, recipe.whiten).weight.requires_grad_(False)
    freeze(model, recipe.freeze)
    if channels_last:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return model


def why_nothing_is_turned(model: nn.Module) -> str | None:
    """Why `channels_last` changes nothing, in words; None if it does."""
    if any(parameter.ndim == 4 for parameter in model.parameters()):
        return None
    return "train.channels_last has no effect: the model has no two-dimensional convolution"


@torch.no_grad()
def make_partial_identities(model: nn.Module, patterns: Sequence[str]) -> None:
    """Have the first filters of the convolutions that match pass on one input channel each; the others stay as drawn.

    A layer of more filters than inputs passes on all inputs, one of fewer passes on as many as it has filters. Raises
    ConfigurationError for a pattern that matches no convolution, and for one in several groups.
    """
    if not patterns:
        return
    found = {name: module for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)}
    for name in matching(patterns, found, "model.dirac", what="convolution"):
        if found[name].groups != 1:
            raise ConfigurationError(
                f"model.dirac: '{name}' has {found[name].groups} groups of filters, none of which sees all inputs: "
                "leave it out."
            )
        weight = found[name].weight
        nn.init.dirac_(weight[: weight.shape[1]])


def convolution_to_whiten(model: nn.Module, name: str) -> nn.Conv2d:
    """The layer that `model.whiten` names. Raises ConfigurationError unless it can hold filters that whiten."""
    modules = dict(model.named_modules())
    layer = modules.get(name)
    if not isinstance(layer, nn.Conv2d):
        here = [each for each, module in modules.items() if isinstance(module, nn.Conv2d)]
        near = nearest(name, here)
        hint = f"did you mean '{near}'?" if near else f"there are {', '.join(here[:4]) or 'none'}."
        raise ConfigurationError(f"model.whiten: no two-dimensional convolution is called {name!r}; {hint}")
    wanted = 2 * math.prod(layer.weight.shape[1:])
    if layer.groups != 1 or len(layer.weight) != wanted:
        raise ConfigurationError(
            f"model.whiten: '{name}' has {len(layer.weight)} filters of {tuple(layer.weight.shape[1:])} in "
            f"{layer.groups} group{'s' if layer.groups > 1 else ''}; it takes {wanted} in one, twice as many as a "
            "patch has numbers."
        )
    return layer


@torch.no_grad()
def whitening_filters(batches: Iterable[torch.Tensor], channels: int, height: int, width: int) -> torch.Tensor:
    """Filters whose outputs have no correlation and about one variance, (2 * C * height * width, C, height, width).

    `batches`: of images (N, C, H, W) as the model gets them, all of whose patches count. The first half are the
    eigenvectors of the patches' second moments, each divided by the root of its eigenvalue and in the order of these;
    the second half are their negatives. Computed in float64 on the CPU: eigenvectors of close eigenvalues are sensitive
    to rounding.
    """
    size = channels * height * width
    moments = torch.zeros(size, size, dtype=torch.float64)
    num = 0
    for images in batches:
        at_once = max(1, _MOST_NUMBERS // (size * images.shape[2] * images.shape[3]))
        for some in torch.split(images.cpu(), at_once):
            patches = functional.unfold(some.double(), (height, width)).transpose(1, 2).reshape(-1, size)
            moments += patches.T @ patches
            num += len(patches)
    variances, vectors = torch.linalg.eigh(moments / num)
    # An eigenvector's sign is the library's choice: here its largest number is positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    filters = (vectors / (variances.clamp(min=0) + WHITENING_EPS).sqrt()).T.reshape(size, channels, height, width)
    return torch.cat([filters, -filters]).float()

"""The model that a recipe names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from disttrain.errors import ConfigurationError
from disttrain.models.buffers import own_memory
from disttrain.models.net import Net
from disttrain.models.packaged import build_timm, build_torchvision, is_of_timm
from disttrain.models.resnet import resnet18
from disttrain.recipe import ModelRecipe
from disttrain.recipe.names import TORCHVISION
from disttrain.recipe.reference import import_callable


def build_model(
    model: ModelRecipe, *, num_classes: int, sample_shape: tuple[int, int, int], pretrained: bool = True
) -> nn.Module:
    """The model that `model.name` names, for images (C, H, W), initialised from torch's global generator.

    A `package.module:callable` is called with `model.options`, and with `num_classes` and `sample_shape` as far as it
    names them. Without `pretrained`, weights that the options ask for are left out, for whoever has others to load.
    Raises ConfigurationError for a name, an option or a sample shape that does not fit.
    """
    built = _build(model, num_classes, sample_shape, pretrained)
    return made_ready(built, sample_shape, f"model.name: {model.name}")


def made_ready(model: nn.Module, sample_shape: tuple[int, int, int], name: str) -> nn.Module:
    """The model with what a constructor may leave open: lazy modules get their shapes, expanded buffers their memory.

    What lazy modules draw comes from torch's global generator. Raises ConfigurationError if they fail on such images;
    `name` says whose they are.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        was_training = model.training
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(2, *sample_shape, device=tensors[0].device))
        except Exception as error:  # a user's model may raise anything
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise ConfigurationError(
                f"{name} has lazy modules, and fails on images {sample_shape}: {reason}"
            ) from error
        model.train(was_training)
    own_memory(model)
    return model


def _build(model: ModelRecipe, num_classes: int, sample_shape: tuple[int, int, int], pretrained: bool) -> nn.Module:
    if model.name == "net":
        return _construct(model.name, Net, model.options, num_classes, sample_shape)
    if model.name == "resnet18":
        return _construct(model.name, resnet18, model.options, num_classes, sample_shape)
    if model.name.startswith(TORCHVISION):
        return build_torchvision(model, num_classes, sample_shape, pretrained=pretrained)
    if is_of_timm(model.name):
        return build_timm(model, num_classes, sample_shape, pretrained=pretrained)
    if ":" not in model.name:
        raise ConfigurationError(f"model.name: there is no model {model.name!r}.")
    make = import_callable(model.name, "model.name")
    return _construct(model.name, make, model.options, num_classes, sample_shape)


def given_model(model: Any, *, num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """A model that was given as an object: a module, or a class or function that makes one, as in `build_model`.

    Raises ConfigurationError for anything else.
    """
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise ConfigurationError(
            f"model: a {type(model).__name__} is neither a torch.nn.Module nor a class or function that makes one; "
            "the recipe's model.name takes names."
        )
    name = getattr(model, "__qualname__", type(model).__name__)
    return _construct(name, model, {}, num_classes, sample_shape)


def _construct(
    name: str, make: Callable[..., Any], options: dict[str, Any], num_classes: int, sample_shape: tuple[int, int, int]
) -> nn.Module:
    arguments: dict[str, Any] = {"num_classes": num_classes, "sample_shape": sample_shape}
    hands_on = False
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:
        pass  # a callable without a signature, written in C
    else:
        hands_on = "num_classes" not in parameters and any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )
        # `**kwargs` mostly go on to a constructor that has num_classes, as in timm and torchvision.
        arguments = {key: value for key, value in arguments.items() if key in parameters}
        if hands_on:
            arguments["num_classes"] = num_classes
        arguments |= options
        try:
            inspect.signature(make).bind(**arguments)
        except TypeError as error:
            raise ConfigurationError(
                f"model.options: {name} does not take {', '.join(arguments) or 'no arguments'}: {error}."
            ) from error
    try:
        built = make(**(arguments | options))
    except TypeError as error:
        if not hands_on or "num_classes" not in str(error):
            raise
        raise ConfigurationError(
            f"model.name: {name} hands num_classes on to something that does not take it: {error}. Name num_classes "
            "among its arguments."
        ) from error
    if not isinstance(built, nn.Module):
        raise ConfigurationError(f"model.name: {name} returned a {type(built).__name__}, not a torch.nn.Module.")
    return built

"""The model that a recipe names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from disttrain.buffers import own_memory
from disttrain.errors import ConfigurationError
from disttrain.models.net import Net
from disttrain.models.resnet import resnet18
from disttrain.recipe import ModelRecipe
from disttrain.recipe.names import TORCHVISION, check_torchvision_model
from disttrain.reference import import_callable


def build_model(model: ModelRecipe, *, num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """The model that `model.name` names, for images (C, H, W), initialised from torch's global generator.

    A `package.module:callable` is called with `num_classes`, `sample_shape` and `model.options`. Raises
    ConfigurationError for a name, an option or a sample shape that does not fit.
    """
    return made_ready(_build(model, num_classes, sample_shape), sample_shape, f"model.name: {model.name}")


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


def _build(model: ModelRecipe, num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    if model.name == "net":
        return _construct(model, Net, num_classes=num_classes, sample_shape=sample_shape)
    if model.name == "resnet18":
        return _construct(model, resnet18, num_classes=num_classes, sample_shape=sample_shape)
    if model.name.startswith(TORCHVISION):
        return _build_torchvision(model, num_classes, sample_shape)
    if ":" not in model.name:
        raise ConfigurationError(f"model.name: there is no model {model.name!r}.")
    make = import_callable(model.name, "model.name")
    return _construct(model, make, num_classes=num_classes, sample_shape=sample_shape)


def _construct(model: ModelRecipe, make: Callable[..., Any], **arguments: Any) -> nn.Module:
    try:
        inspect.signature(make).bind(**(arguments | model.options))
    except TypeError as error:
        asked = ", ".join(arguments | model.options)
        raise ConfigurationError(f"model.options: {model.name} does not take {asked}: {error}.") from error
    except ValueError:
        pass  # a callable without a signature, written in C
    built = make(**(arguments | model.options))
    if not isinstance(built, nn.Module):
        raise ConfigurationError(f"model.name: {model.name} returned a {type(built).__name__}, not a torch.nn.Module.")
    return built


def _build_torchvision(model: ModelRecipe, num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    from torchvision import models  # takes a second, which other models need not wait

    name = model.name.removeprefix(TORCHVISION)
    check_torchvision_model(name, models.list_models(module=models))
    options = {"num_classes": num_classes} | _fitting_options(name, sample_shape) | model.options

    try:
        built: nn.Module = models.get_model(name, weights=None, **options)
        _try_shapes(built, sample_shape)
    except Exception as error:  # torchvision's models refuse by whatever exception comes first
        raise ConfigurationError(
            f"model.name: {model.name} cannot be built for {num_classes} classes of images {sample_shape} "
            f"(channels, height, width) with options {model.options}: {str(error).partition(chr(10))[0]}"
        ) from error
    return built


def _try_shapes(model: nn.Module, sample_shape: tuple[int, int, int]) -> None:
    """Run shapes without numbers through the model: an image that it cannot take is found before any work."""
    tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    model.eval()
    torch.func.functional_call(model, tensors, (torch.empty(2, *sample_shape, device="meta"),))
    model.train()


def _fitting_options(name: str, sample_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What some models need to be told for images of this size, or to return logits alone while training."""
    _, height, width = sample_shape
    if name.startswith("vit_"):
        return {"image_size": height}
    if name == "maxvit_t":
        return {"input_size": (height, width)}
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}

"""The model that a recipe names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from disttrain.errors import ConfigurationError, failures_named
from disttrain.models.airbench import Airbench
from disttrain.models.buffers import own_memory
from disttrain.models.gpt import GPT
from disttrain.models.mlp import Mlp
from disttrain.models.net import Net
from disttrain.models.packaged import build_timm, build_torchvision, is_of_timm
from disttrain.models.resnet import resnet18
from disttrain.recipe import ModelRecipe
from disttrain.recipe.names import TORCHVISION, misfit
from disttrain.recipe.reference import import_callable

_OWN: dict[str, Callable[..., nn.Module]] = {
    "net": Net,
    "resnet18": resnet18,
    "airbench": Airbench,
    "mlp": Mlp,
    "gpt": GPT,
}


def build_model(model: ModelRecipe, *, pretrained: bool = True, **arguments: Any) -> nn.Module:
    """The model that `model.name` names, initialised from torch's global generator.

    `arguments` are what a task offers: of images `num_classes` and `sample_shape`, (C, H, W). A constructor gets those
    that it names, beside `model.options`. Without `pretrained`, weights that the options ask for are left out, for
    whoever has others to load. Raises ConfigurationError for a name, an option or a sample shape that does not fit,
    and TaskError for what a constructor of the user's raises.
    """
    built = _build(model, arguments, pretrained)
    shape = arguments.get("sample_shape")
    return made_ready(built, f"model.name: {model.name}", shape) if shape is not None else built


def made_ready(
    model: nn.Module,
    name: str,
    sample_shape: tuple[int, ...] | None = None,
    try_out: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """The model with what a constructor may leave open: lazy modules get their shapes, expanded buffers their memory.

    `try_out` is a forward pass in which they get them; by default one of two blank images of `sample_shape`. What they
    draw comes from torch's global generator. Raises ConfigurationError if it fails; `name` is what messages call the
    model.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        was_training = model.training
        try:
            with torch.no_grad():
                if try_out is not None:
                    try_out(model.eval())
                elif sample_shape is not None:
                    model.eval()(torch.zeros(2, *sample_shape, device=tensors[0].device))
        except Exception as error:  # a user's model may raise anything
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            on = f"images {sample_shape}" if try_out is None else "the first training samples"
            raise ConfigurationError(f"{name} has lazy modules, and fails on {on}: {reason}") from error
        model.train(was_training)
    own_memory(model)
    return model


# Of the models here, which one is for what else than images a task offers.
_FITTING = (("vocab_size", "text", "gpt"), ("num_outputs", "rows of numbers", "mlp"))


def _build(model: ModelRecipe, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    is_of_images = (
        model.name in ("net", "resnet18", "airbench") or model.name.startswith(TORCHVISION) or is_of_timm(model.name)
    )
    for argument, samples, fitting in _FITTING:
        if is_of_images and argument in arguments and "sample_shape" not in arguments:
            raise ConfigurationError(
                f"model.name = '{model.name}' is for images, and the samples are {samples}: set it to '{fitting}', or "
                "to a model of yours."
            )
    if model.name in _OWN:
        return _construct(model.name, _OWN[model.name], model.options, arguments)
    if model.name.startswith(TORCHVISION):
        return build_torchvision(model, *_of_images(model, arguments), pretrained=pretrained)
    if is_of_timm(model.name):
        return build_timm(model, *_of_images(model, arguments), pretrained=pretrained)
    if ":" not in model.name:
        raise ConfigurationError(f"model.name: there is no model {model.name!r}.")
    make = import_callable(model.name, "model.name")
    return _construct(model.name, make, model.options, arguments)


def _of_images(model: ModelRecipe, arguments: dict[str, Any]) -> tuple[int, tuple[int, int, int]]:
    if "num_classes" not in arguments or "sample_shape" not in arguments:
        raise ConfigurationError(
            f"model.name: {model.name} classifies images, and the task does not say how many classes of which images: "
            "have its model_arguments return num_classes and sample_shape, or name a function of yours that makes it."
        )
    return arguments["num_classes"], arguments["sample_shape"]


def given_model(model: Any, **arguments: Any) -> nn.Module:
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
    return _construct(name, model, {}, arguments)


def _construct(name: str, make: Callable[..., Any], options: dict[str, Any], offered: dict[str, Any]) -> nn.Module:
    arguments, hands_on = dict(offered), False
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:
        pass  # a callable without a signature, written in C
    else:
        hands_on = (
            "num_classes" in offered
            and "num_classes" not in parameters
            and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        )
        # `**kwargs` are mostly passed on to a constructor that has num_classes, as in timm and torchvision.
        arguments = {key: value for key, value in arguments.items() if key in parameters}
        if hands_on:
            arguments["num_classes"] = offered["num_classes"]
        arguments |= options
        try:
            inspect.signature(make).bind(**arguments)
        except TypeError as error:
            known = [key for key in parameters if key not in offered]
            raise ConfigurationError(misfit("model.options", name, options, known, error)) from error
    with failures_named(f"model.name: {name}", OSError):  # a download of weights may succeed the next time
        try:
            built = make(**(arguments | options))
        except TypeError as error:
            if not hands_on or "num_classes" not in str(error):
                raise
            raise ConfigurationError(
                f"model.name: {name} passes num_classes on to something that does not take it: {error}. Name "
                "num_classes among its arguments."
            ) from error
    if not isinstance(built, nn.Module):
        raise ConfigurationError(f"model.name: {name} returned a {type(built).__name__}, not a torch.nn.Module.")
    return built

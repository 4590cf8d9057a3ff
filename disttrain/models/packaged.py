"""Models of torchvision and of timm, by their names there."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import nn

from disttrain.errors import ConfigurationError, brief
from disttrain.recipe import ModelRecipe
from disttrain.recipe.names import TIMM, TORCHVISION, check_torchvision_model

_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def build_torchvision(
    model: ModelRecipe, num_classes: int, sample_shape: tuple[int, int, int], *, pretrained: bool
) -> nn.Module:
    """A classification model of torchvision. With the option `weights`, all but its head starts from those.

    Raises ConfigurationError for a name, an option, weights or a sample shape that does not fit.
    """
    from torchvision import models  # takes a second, which other models need not wait

    name = model.name.removeprefix(TORCHVISION)
    check_torchvision_model(name, models.list_models(module=models))
    options = {"num_classes": num_classes} | _fitting_options(name, sample_shape) | model.options
    weights = options.pop("weights", None)
    if weights is not None and name in _WITH_AUXILIARY_HEADS:
        options = {"transform_input": True} | options  # what their weights were trained with
    try:
        built: nn.Module = models.get_model(name, weights=None, **options)
        _try_shapes(built, sample_shape)
    except Exception as error:  # torchvision's models refuse by whatever exception comes first
        raise _misfit(model, num_classes, sample_shape, error) from error
    if weights is not None and pretrained:
        _start_from(built, *_torchvision_weights(name, weights), model)
    return built


def is_of_timm(name: str) -> bool:
    """Whether `name` is timm:NAME with a model's name, not timm:callable. Raises ConfigurationError without timm."""
    if not name.startswith(TIMM):
        return False
    return not callable(getattr(_timm(name), name.removeprefix(TIMM).partition(".")[0], None))


def build_timm(
    model: ModelRecipe, num_classes: int, sample_shape: tuple[int, int, int], *, pretrained: bool
) -> nn.Module:
    """A model of timm, made for images of these channels and, where it is made for one size, of this size.

    Raises ConfigurationError for a name, an option or a sample shape that does not fit.
    """
    timm = _timm(model.name)
    name, (channels, height, width) = model.name.removeprefix(TIMM), sample_shape
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean one of {', '.join(near)}?" if near else "timm.list_models() names those it has."
        raise ConfigurationError(f"model.name: timm has no model {name!r}; {hint}")
    options = {"num_classes": num_classes, "in_chans": channels} | model.options
    if not pretrained:
        options["pretrained"] = False
    defaults = timm.get_pretrained_cfg(name)
    if defaults is not None and getattr(defaults, "fixed_input_size", False):
        options = {"img_size": (height, width)} | options
    try:
        built: nn.Module = timm.create_model(name, **options)
        _try_shapes(built, sample_shape)
    except Exception as error:  # timm's models refuse by whatever exception comes first
        raise _misfit(model, num_classes, sample_shape, error) from error
    return built


def _timm(name: str) -> Any:
    try:
        return import_module("timm")
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"model.name: {name!r} comes with timm, which is not installed; pip install timm."
        ) from error


def _misfit(
    model: ModelRecipe, num_classes: int, sample_shape: tuple[int, int, int], error: Exception
) -> ConfigurationError:
    return ConfigurationError(
        f"model.name: {model.name} cannot be built for {num_classes} classes of images {sample_shape} "
        f"(channels, height, width) with options {model.options}: {str(error).partition(chr(10))[0]}"
    )


def _torchvision_weights(name: str, weights: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The weights of that name, and for how many classes they are."""
    from torchvision import models

    known = models.get_model_weights(name)
    if not isinstance(weights, str) or weights not in (*known.__members__, "DEFAULT"):
        raise ConfigurationError(
            f"model.options.weights: torchvision:{name} has no {weights!r}; it has {', '.join(known.__members__)}."
        )
    try:
        state: dict[str, torch.Tensor] = known[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, a full disk, a file that was cut off
        raise ConfigurationError(
            f"model.options.weights: {weights} of torchvision:{name} cannot be downloaded: {brief(error)}. Retry, or "
            f"put {known[weights].url} into {torch.hub.get_dir()}/checkpoints yourself."
        ) from error
    return state, len(known[weights].meta["categories"])


def _start_from(built: nn.Module, state: dict[str, torch.Tensor], num_classes: int, model: ModelRecipe) -> None:
    """Copy the weights that are of the same name and shape, and refuse if anything but a classifier is not."""
    ours = built.state_dict()
    fitting = {name: value for name, value in state.items() if name in ours and value.shape == ours[name].shape}
    for name, value in ours.items():
        theirs = state.get(name)
        is_of_a_head = theirs is not None and theirs.shape[:1] == (num_classes,) and theirs.shape[1:] == value.shape[1:]
        if name not in fitting and not is_of_a_head:
            found = "they do not have it" if theirs is None else f"{tuple(theirs.shape)} there"
            raise ConfigurationError(
                f"model.options.weights: '{name}' of {model.name} is {tuple(value.shape)} for these images and "
                f"options, and {found}: use images of the channels and the size that the weights are for."
            )
    built.load_state_dict(fitting, strict=False)


def _try_shapes(model: nn.Module, sample_shape: tuple[int, int, int]) -> None:
    """Run shapes without numbers through the model: an image that it cannot take is found before any work."""
    tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    model.eval()
    torch.func.functional_call(model, tensors, (torch.empty(2, *sample_shape, device="meta"),))
    model.train()


def _fitting_options(name: str, sample_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What some models need for images of this size, or to return logits alone while training."""
    _, height, width = sample_shape
    if name.startswith("vit_"):
        return {"image_size": height}
    if name == "maxvit_t":
        return {"input_size": (height, width)}
    if name in _WITH_AUXILIARY_HEADS:
        return {"aux_logits": False, "init_weights": True}
    return {}

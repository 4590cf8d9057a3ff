"""An optimizer's state as tensors and plain values, without a pickle."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from disttrain.distributed.sharded import is_sharded
from disttrain.errors import ConfigurationError, brief


def optimizer_to_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's tensors as "PARAMETER.NAME", and everything else as values that JSON can hold.

    PARAMETER is a number; with the optimizer's `model`, "names" among the values lists which parameter has which.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values[f"{index}.{name}"] = value
    rest: dict[str, Any] = {"values": values, "param_groups": state["param_groups"]}
    if model is not None:
        rest["names"] = _names(optimizer, model)
    return tensors, rest


def optimizer_from_tensors(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    rest: dict[str, Any],
    model: nn.Module | None = None,
) -> None:
    """Put back what `optimizer_to_tensors` took: by the names of `model`, where both were given one, else by position.

    Raises ConfigurationError if it is another optimizer's state.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if model is not None and "names" in rest:
        names = iter(_names(optimizer, model))
        here = [[next(names) for _ in group["params"]] for group in optimizer.param_groups]
        tensors, rest = _in_the_order_of(here, optimizer.param_groups, tensors, rest)
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["values"].items()]:
        index, _, name = key.partition(".")
        if not index.isdecimal() or not name or int(index) >= len(parameters):
            raise ConfigurationError(
                f"the checkpoint's optimizer state has {brief(repr(key))}, which belongs to no parameter."
            )
        if isinstance(value, torch.Tensor) and not _fits(value, parameters[int(index)]):
            raise ConfigurationError(
                f"the checkpoint's optimizer state {brief(repr(key))} is {tuple(value.shape)} {value.dtype}, and its "
                f"parameter is {tuple(parameters[int(index)].shape)}."
            )
        state.setdefault(int(index), {})[name] = value
    groups = [
        {name: tuple(value) if isinstance(value, list) and name != "params" else value for name, value in group.items()}
        for group in rest["param_groups"]
    ]
    for theirs, ours in zip(groups, optimizer.param_groups, strict=False):
        for name, value in theirs.items():
            if name != "params" and name in ours and not _alike(value, ours[name]):
                raise ConfigurationError(
                    f"the checkpoint's optimizer option {brief(repr(name))} cannot be {brief(repr(value))}."
                )
    numbers = [number for group in groups for number in group["params"]]
    if numbers != list(range(len(parameters))):
        raise ConfigurationError(
            f"the checkpoint's optimizer state does not fit this optimizer: it has {len(numbers)} "
            f"parameters and this one {len(parameters)}, or their order differs."
        )
    for theirs, ours in zip(groups, optimizer.param_groups, strict=False):
        for name, value in ours.items():  # another version of torch may not have had an option yet
            theirs.setdefault(name, value)
        # By which kernels a step is computed follows from the device here, not from the one that it was saved on.
        theirs.update({name: ours[name] for name in ("foreach", "fused") if name in ours})
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the checkpoint's optimizer state does not fit this optimizer: {brief(error)}"
        ) from error
    _restore_as_stored(optimizer, state)


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """What the model calls the optimizer's parameters, in the optimizer's order."""
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _in_the_order_of(
    names: list[list[str]],
    groups_here: list[dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    rest: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state with its parameters numbered and grouped as `names` has them, group by group.

    Raises ConfigurationError if it has others, or if one of them had another weight decay or learning rate.
    """
    theirs: list[str] = rest["names"]
    ours = [name for group in names for name in group]
    unknown = sorted(set(theirs) ^ set(ours))
    if unknown or len(theirs) != len(ours):
        raise ConfigurationError(
            f"the checkpoint's optimizer state does not fit this optimizer: it has {len(theirs)} parameters and this "
            f"one {len(ours)}; only one of the two has {brief(repr(unknown[0] if unknown else theirs[0]))}."
        )
    options = {
        theirs[number]: {key: value for key, value in group.items() if key != "params"}
        for group in rest["param_groups"]
        for number in group["params"]
        if number < len(theirs)
    }
    if len(options) != len(ours):
        raise ConfigurationError("the checkpoint's optimizer state does not fit this optimizer: its groups are broken.")
    number_here = {name: number for number, name in enumerate(ours)}
    moved = {number: number_here[name] for number, name in enumerate(theirs)}

    def renamed(key: str) -> str:
        number, dot, name = key.partition(".")
        return f"{moved[int(number)]}{dot}{name}" if number.isdecimal() and int(number) in moved else key

    groups = []
    for members, now in zip(names, groups_here, strict=True):
        for name in members:
            _refuse_other_options(name, options[name], now)
        groups.append({**(options[members[0]] if members else now), "params": [number_here[name] for name in members]})
    values = {renamed(key): value for key, value in rest["values"].items()}
    return {renamed(key): tensor for key, tensor in tensors.items()}, {"values": values, "param_groups": groups}


def _refuse_other_options(name: str, was: dict[str, Any], now: dict[str, Any]) -> None:
    """What makes a group one of its own has to be the same: the groups themselves may be in any order."""
    for key, default in (("orthogonalised", True), ("weight_decay", 0.0), ("lr_scale", 1.0), ("epochs", None)):
        before, after = was.get(key, default), now.get(key, default)
        if before != after:
            raise ConfigurationError(
                f"the checkpoint's optimizer trained {brief(repr(name))} with {key} = {brief(repr(before))}, but its "
                f"parameter group now has {after!r}: give the same groups, or start a new --run-dir."
            )


def _fits(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether it may be a parameter's state: one number, or of its shape, or (Adafactor) of its rows or columns."""
    if tensor.numel() == 1 and not tensor.is_complex():
        return True  # such as a count of steps, real for a complex parameter too
    sides = zip(tensor.shape, parameter.shape, strict=False)
    return tensor.is_complex() == parameter.is_complex() and (
        tensor.ndim == parameter.ndim and all(one in (1, other) for one, other in sides)
    )


def _alike(one: Any, other: Any) -> bool:
    """Whether two options are of a kind: both tuples, texts, numbers or flags; a flag may also not be set."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return _kind(one) == _kind(other) or ({type(one), type(other)} == {bool, type(None)})


def _kind(option: Any) -> str:
    return "number" if isinstance(option, int | float) else type(option).__name__


def _restore_as_stored(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """What `load_state_dict` leaves undone: types, and the order in memory.

    It casts state to the parameter's type, also what the optimizer keeps in another on purpose. And it takes the order
    in memory from the file, where the parameter may have another (channels_last): torch's fused kernels go through both
    side by side, number by number, on CPUs without a look at the order.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.items():
        parameter = parameters[index]
        loaded = optimizer.state[parameter]
        for name, value in entries.items():
            if not isinstance(value, torch.Tensor):
                continue
            if loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)
            if is_sharded(parameter) or loaded[name].shape != parameter.shape:
                continue
            if loaded[name].stride() != parameter.stride():
                loaded[name] = torch.empty_like(parameter, dtype=loaded[name].dtype).copy_(loaded[name])

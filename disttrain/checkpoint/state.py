"""An optimizer's state as tensors and plain values, without a pickle."""

from __future__ import annotations

from typing import Any

import torch

from disttrain.errors import ConfigurationError


def optimizer_to_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's tensors as "PARAMETER.NAME", and everything else as values that JSON can hold."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values[f"{index}.{name}"] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def optimizer_from_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], rest: dict[str, Any]
) -> None:
    """Put back what `optimizer_to_tensors` took. Raises ConfigurationError if it is another optimizer's state."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["values"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = [
        {name: tuple(value) if isinstance(value, list) and name != "params" else value for name, value in group.items()}
        for group in rest["param_groups"]
    ]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, ValueError) as error:
        raise ConfigurationError(f"the checkpoint's optimizer state does not fit this optimizer: {error}") from error
    _restore_types(optimizer, state)


def _restore_types(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """`load_state_dict` casts state to the parameter's type, also what the optimizer keeps in another on purpose."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.items():
        loaded = optimizer.state[parameters[index]]
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)

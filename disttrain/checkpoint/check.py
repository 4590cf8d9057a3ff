"""What `state.json` may hold, checked key by key before anything uses it: it may come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disttrain.errors import ConfigurationError, brief

_LARGEST_SIDE = 2**14
_RENAMED = {"rests_on": "environment_fingerprint"}  # keys of older checkpoints


def with_current_names(state: dict[str, Any]) -> dict[str, Any]:
    """The state with each key of an older version under its name of today."""
    return {_RENAMED.get(key, key): value for key, value in state.items()}


def check_state(state: dict[str, Any], file: Path | str) -> None:
    """Check the keys that are there; `step` and `recipe` must be. Raises ConfigurationError that names file and key."""
    for key, (is_right, expected) in _KEYS.items():
        if key in state and not is_right(state[key]):
            raise ConfigurationError(f"{file}: {key!r} should be {expected}, not {brief(repr(state[key]), 80)}.")
    _require(state, ("step", "recipe"), file)


def check_complete(state: dict[str, Any], file: Path | str) -> None:
    """Check that a checked state has every key that a training job needs to resume. Raises ConfigurationError."""
    _require(state, tuple(_KEYS), file)


def check_describes_model(state: dict[str, Any], file: Path | str) -> None:
    """Check that a checked state says what its model was trained on. Raises ConfigurationError."""
    _require(state, ("data",), file)


def _require(state: dict[str, Any], keys: tuple[str, ...], file: Path | str) -> None:
    missing = [key for key in keys if key not in state and key not in _OPTIONAL]
    if missing:
        raise ConfigurationError(f"{file} lacks {', '.join(map(repr, missing))}: it is not the state of a checkpoint.")


def is_number(value: Any) -> bool:
    """A number that a float can hold; NaN and the infinities count."""
    return isinstance(value, float) or (_is_whole(value) and abs(value) < 2**63)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < 2**63


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | str) or is_number(value)


def _list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _table_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _table_of(_is_plain)(value.get("values"))
        and _list_of(_is_group)(value.get("param_groups"))
        and ("names" not in value or _list_of(_is_text)(value["names"]))
    )


def _is_group(value: Any) -> bool:
    """A parameter group: the numbers of its parameters, and options that are plain or lists of plain values."""
    if not isinstance(value, dict) or not _list_of(_is_count)(value.get("params")):
        return False
    return all(_is_plain(option) or _list_of(_is_plain)(option) for option in value.values())


def _is_data(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if "facts" in value:  # samples of any kind
        return (
            _is_count(value.get("num_train"))
            and _is_table(value["facts"])
            and all(value.get(digest) is None or _is_text(value[digest]) for digest in ("labels", "contents"))
        )
    shape, mean, std = (value.get(key) for key in ("sample_shape", "mean", "std"))
    return (
        _is_count(value.get("num_train"))
        and _list_of(_is_text)(value.get("classes"))
        and len(value["classes"]) > 0
        and isinstance(shape, list)
        and len(shape) == 3
        and all(_is_whole(side) and 0 < side <= _LARGEST_SIDE for side in shape)
        and value.get("dtype", "uint8") in ("uint8", "float32")
        and (_are_statistics(mean, std, shape[0]) or (value.get("dtype") == "float32" and mean is None and std is None))
        and all(value.get(digest) is None or _is_text(value[digest]) for digest in ("labels", "contents"))
    )


def _are_statistics(mean: Any, std: Any, num_channels: int) -> bool:
    return (
        _list_of(_is_finite)(mean)
        and _list_of(_is_finite)(std)
        and len(mean) == len(std) == num_channels
        and all(deviation > 0 for deviation in std)
    )


def _is_non_finite(value: Any) -> bool:
    return _table_of(_is_count)(value) and value.keys() == {"in_a_row", "total"}


def _is_best(value: Any) -> bool:
    return _table_of(_is_text)(value) and value.keys() == {"metric", "mode"} and value["mode"] in ("min", "max")


def _is_best_evaluation(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"value", "step", "since"}
        and (value["value"] is None or _is_finite(value["value"]))
        and _is_count(value["step"])
        and _is_count(value["since"])
    )


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_expectation(value: Any) -> bool:
    return value is None or _list_of(is_number)(value) or _table_of(is_number)(value)


_COUNT = (_is_count, "a whole number")
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": _COUNT,
    "epoch": _COUNT,
    "step_in_epoch": _COUNT,
    "total_steps": _COUNT,
    "world_size": _COUNT,
    "finished": (lambda value: isinstance(value, bool), "true or false"),
    "metrics": (_table_of(is_number), "a table of numbers"),
    "best": (_is_best, "a table of metric and mode"),
    "optimizer": (_is_optimizer, "a table of 'values' and 'param_groups'"),
    "scaler": (_table_of(is_number), "a table of numbers"),
    "non_finite": (_is_non_finite, "a table of the whole numbers in_a_row and total"),
    "recent_losses": (_list_of(is_number), "a list of numbers"),
    "expected_magnitudes": (_is_expectation, "null or a table of numbers"),
    "workers": (_list_of(_is_table), "a list of tables"),
    "recipe": (_is_table, "a table"),
    "task": (_is_table, "a table"),
    "data": (_is_data, "a table of num_train, classes, sample_shape, mean and std that fit together"),
    "given": (_list_of(_is_text), "a list of names"),
    "init": (_table_of(_is_text), "a table of texts"),
    "best_evaluation": (_is_best_evaluation, "a table of value, step and since"),
    "hooks": (_is_table, "a table"),
    "shared": (_table_of(_is_text), "a table of names"),
    "environment_fingerprint": (_table_of(_is_plain), "a table of plain values"),
}
# Older checkpoints lack these.
_OPTIONAL = {
    "best", "best_evaluation", "expected_magnitudes", "given", "hooks", "init", "non_finite", "recent_losses",
    "shared", "task", "workers",
}  # fmt: skip

"""What a model has to know of the table it is trained on: the facts that its features and targets are made by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from disttrain.data.sources.columns import (
    Category,
    Number,
    columns_from_json,
    columns_to_json,
    fit_columns,
    mean_and_std,
    parse_numbers,
    sorted_words,
    word,
)
from disttrain.data.sources.table_file import Table
from disttrain.errors import ConfigurationError, brief
from disttrain.recipe.table import TableOptions


def facts_of(train: Table, options: TableOptions) -> dict[str, Any]:
    """The facts of training rows, as JSON can hold them.

    `kind`, `target`, `columns` (see `disttrain.data.sources.columns`), `num_features`, `num_outputs`, `format` (how the
    file is read), and `classes`, or `target_mean` and `target_std`. Raises ConfigurationError for what cannot be
    learned, with the row.
    """
    columns = fit_columns(train, _chosen(train, options), options.categorical)
    kind = _kind(train, options)
    return {
        "kind": kind,
        "target": options.target,
        "columns": columns_to_json(columns),
        "num_features": sum(column.num_features for column in columns),
        "format": {"delimiter": options.delimiter, "encoding": options.encoding},
        **(_classes(train, options.target) if kind == "classification" else _unit(train, options.target)),
    }


def describe_a_table(facts: Mapping[str, Any]) -> bool:
    """Whether these are such facts: those of a checkpoint may come from anywhere."""
    try:
        columns = columns_from_json(facts["columns"])
        classes: Any = facts.get("classes")
        numbers: list[Any] = [
            one for column in columns if isinstance(column, Number) for one in (column.mean, column.std)
        ]
        if facts["kind"] == "regression":
            fits = facts["num_outputs"] == 1 and classes is None
            numbers += [facts["target_mean"], facts["target_std"]]
        else:
            fits = facts["kind"] == "classification" and facts["num_outputs"] == len(classes) >= 2
            fits &= all(isinstance(one, str) for one in classes)
        return bool(
            fits
            and isinstance(facts["target"], str)
            and all(isinstance(one, float) and math.isfinite(one) for one in numbers)
            and all(_is_column(column) for column in columns)
            and facts["format"].keys() <= {"delimiter", "encoding"}
            and TableOptions.model_validate({"file": "", "target": "", **facts["format"]})
            and 0 < facts["num_features"] == sum(column.num_features for column in columns)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _is_column(column: Number | Category) -> bool:
    if isinstance(column, Category):
        fits = all(isinstance(category, str) for category in column.categories)
    else:
        fits = isinstance(column.indicator, bool)
    return fits and isinstance(column.name, str)


def targets_of(table: Table, facts: Mapping[str, Any]) -> torch.Tensor:
    """The targets of the rows: (N,) float32, standardised, or (N,) int64 numbers of classes.

    Raises ConfigurationError, which names the row, for one that is missing, not a number, or not one of the classes.
    """
    if facts["kind"] == "regression":
        numbers = (_numbers(table, facts["target"]) - facts["target_mean"]) / facts["target_std"]
        return torch.from_numpy(numbers.astype(np.float32))
    number_of = {one: number for number, one in enumerate(facts["classes"])}
    words = _words(table, facts["target"])
    for row, one in enumerate(words):
        if one not in number_of:
            raise ConfigurationError(
                f"{table.at(row)}: {brief(repr(one), 40)} is not among the {len(number_of)} classes of the training "
                "rows."
            )
    return torch.tensor([number_of[one] for one in words])


def _chosen(train: Table, options: TableOptions) -> list[str]:
    """The names of the columns that features are made of."""
    train.column(options.target, "data.options.target")
    for key in ("features", "exclude", "categorical"):
        for name in getattr(options, key) or ():
            train.column(name, f"data.options.{key}")
    wanted = list(train.columns) if options.features is None else options.features
    if options.features is not None and options.target in options.features:
        raise ConfigurationError(f"data.options.features: {options.target!r} is the target; leave it out.")
    chosen = [name for name in wanted if name != options.target and name not in options.exclude]
    if not chosen:
        raise ConfigurationError(f"{train.name}: there is no column besides {options.target!r} to predict it from.")
    return chosen


def _kind(train: Table, options: TableOptions) -> str:
    if options.kind != "auto":
        return options.kind
    numbers, strange = parse_numbers(train.column(options.target))
    is_class = len(strange) * 2 > len(numbers) or (not strange and set(numbers.tolist()) <= {0.0, 1.0})
    return "classification" if is_class else "regression"


def _unit(train: Table, target: str) -> dict[str, Any]:
    mean, std = mean_and_std(_numbers(train, target), f"{train.name}: the target {target!r}")
    if not std:
        raise ConfigurationError(
            f"{train.name}: the target {target!r} is {mean:g} in every training row; there is nothing to learn."
        )
    return {"num_outputs": 1, "target_mean": mean, "target_std": std}


def _classes(train: Table, target: str) -> dict[str, Any]:
    classes = sorted_words(set(_words(train, target)))
    if len(classes) < 2:
        raise ConfigurationError(
            f"{train.name}: the target {target!r} is {classes[0]!r} in every training row; there is nothing to tell "
            "apart."
        )
    if len(classes) * 2 > len(train) and len(classes) > 2:
        raise ConfigurationError(
            f"{train.name}: the target {target!r} has {len(classes):,} classes in {len(train):,} training rows. For a "
            'quantity set data.options.kind = "regression".'
        )
    return {"num_outputs": len(classes), "classes": list(classes)}


def _numbers(table: Table, target: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    cells = table.column(target)
    numbers, _ = parse_numbers(cells)
    for row in np.flatnonzero(np.isnan(numbers)).tolist():
        raise ConfigurationError(
            f"{table.at(row)}: the target {target!r} is {brief(repr(str(cells[row])), 40)}, not a finite number. "
            'Correct or remove the row; for classes set data.options.kind = "classification".'
        )
    return numbers


def _words(table: Table, target: str) -> list[str]:
    words = [word(cell) for cell in table.column(target)]
    for row, one in enumerate(words):
        if one in ("", "nan"):
            raise ConfigurationError(f"{table.at(row)}: the target {target!r} is empty; fill in or remove the row.")
    return words

"""What the columns of a table become: numbers that a model can take, by statistics of the training rows alone.

Means and deviations are made of exactly rounded sums, so that they have the same bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from disttrain.data.sources.table_file import Cell, Table
from disttrain.errors import ConfigurationError, brief

_MISSING = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "?"})
_MOST_CATEGORIES = 100


@dataclass(frozen=True)
class Number:
    """A column of numbers: standardised, 0 where none is given.

    Its deviation is 0 where all training rows have one value, which carries no information: the feature is then 0
    everywhere. `indicator`: a second feature is 1 where the number is missing, since it is missing in training rows
    too.
    """

    name: str
    mean: float
    std: float
    indicator: bool

    @property
    def num_features(self) -> int:
        """How many features the column becomes."""
        return 1 + self.indicator


@dataclass(frozen=True)
class Category:
    """A column of text or codes: one feature for each category of the training rows; any other is 0 in all of them."""

    name: str
    categories: tuple[str, ...]

    @property
    def num_features(self) -> int:
        """How many features the column becomes."""
        return len(self.categories)


Column: TypeAlias = Number | Category


def fit_columns(table: Table, names: Iterable[str], categorical: Collection[str]) -> list[Column]:
    """What the columns `names` of the training rows become; those in `categorical` hold codes, whatever they look like.

    Raises ConfigurationError for a column that is neither numbers nor categories, with the row.
    """
    return [_fit(table, name, is_code=name in categorical) for name in names]


def _fit(table: Table, name: str, *, is_code: bool) -> Column:
    cells = table.column(name)
    if is_code:
        return Category(name, _categories(cells))
    numbers, strange = parse_numbers(cells)
    num_missing = int(np.isnan(numbers).sum()) - len(strange)
    num_numbers = len(cells) - len(strange) - num_missing
    if num_numbers == len(strange) == 0:
        raise ConfigurationError(
            f"{table.name}: column {name!r} is empty in all training rows; leave it out (data.options.exclude)."
        )
    if not strange:
        mean, std = mean_and_std(numbers[~np.isnan(numbers)], f"{table.name}: column {name!r}")
        return Number(name, mean, std, indicator=num_missing > 0)
    if num_numbers > len(strange):
        raise _not_a_number(
            table, name, strange[0],
            f" like most of the column. Correct it, or put {name!r} into data.options.categorical, where each value "
            "is a category.",
        )  # fmt: skip
    categories = _categories(cells)
    if len(categories) > _MOST_CATEGORIES:
        raise ConfigurationError(
            f"{table.name}: column {name!r} holds {len(categories):,} different texts, such as "
            f"{brief(repr(str(cells[strange[0]])), 40)}. Leave it out (data.options.exclude), make "
            "columns of numbers of it first (a date's year and month), or put it into data.options.categorical to make "
            "each text a feature."
        )
    return Category(name, categories)


def _categories(cells: Sequence[Cell]) -> tuple[str, ...]:
    return sorted_words({word(cell) for cell in cells})


def sorted_words(words: Collection[str]) -> tuple[str, ...]:
    """Words in their order: that of numbers where all are numbers."""
    try:
        values = {one: float(one) for one in words}
    except ValueError:
        return tuple(sorted(words))
    # NaN is neither smaller nor larger than any number: it would leave the order to chance.
    return tuple(sorted(words, key=lambda one: (math.isnan(values[one]), values[one], one)))


def word(cell: Cell) -> str:
    """A cell as text: 3.0 and 3 are the same."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def parse_numbers(cells: Sequence[Cell]) -> tuple[np.ndarray[Any, np.dtype[np.float64]], list[int]]:
    """The cells as (N,) float64, NaN where one is missing, and which ones hold something other than a finite number."""
    numbers = np.full(len(cells), np.nan)
    strange = []
    for row, cell in enumerate(cells):
        try:
            if isinstance(cell, str) and "_" in cell:
                raise ValueError  # 1_000 is a number in Python alone
            number = float(cell)
        except ValueError:
            if str(cell).lower() not in _MISSING:
                strange.append(row)
        except OverflowError:  # a whole number of hundreds of digits
            strange.append(row)
        else:
            numbers[row] = number
            if math.isinf(number):
                numbers[row] = math.nan
                strange.append(row)
    return numbers, strange


def mean_and_std(numbers: np.ndarray[Any, Any], what: str) -> tuple[float, float]:
    """Mean and population standard deviation, 0.0 exactly for equal numbers. Raises ConfigurationError of `what`."""
    if numbers.min() == numbers.max():
        return float(numbers[0]), 0.0
    try:
        mean = math.fsum(numbers.tolist()) / len(numbers)
        with np.errstate(over="raise", invalid="raise"):
            std = math.sqrt(math.fsum(((numbers - mean) ** 2).tolist()) / len(numbers))
    except (OverflowError, FloatingPointError) as error:
        raise ConfigurationError(f"{what} holds numbers as large as {np.abs(numbers).max():.3g}; scale it.") from error
    return mean, std


def encode(table: Table, columns: Sequence[Column]) -> torch.Tensor:
    """The features of the rows, (N, F) float32. Raises ConfigurationError for missing columns or a wrong cell."""
    missing = [column.name for column in columns if column.name not in table.columns]
    if len(missing) > 1:  # of one, the table says which name is near
        raise ConfigurationError(f"{table.name} has no columns {brief(', '.join(map(repr, missing)))}.")
    features = np.zeros((len(table), sum(column.num_features for column in columns)), dtype=np.float32)
    first = 0
    for column in columns:
        _encode(table, column, features[:, first : first + column.num_features])
        first += column.num_features
    return torch.from_numpy(features)


def _encode(table: Table, column: Column, into: np.ndarray[Any, Any]) -> None:
    cells = table.column(column.name)
    if isinstance(column, Category):
        numbers_of = {category: number for number, category in enumerate(column.categories)}
        for row, cell in enumerate(cells):
            known = numbers_of.get(word(cell))
            if known is not None:
                into[row, known] = 1.0
        return
    numbers, strange = parse_numbers(cells)
    if strange:
        raise _not_a_number(table, column.name, strange[0], ", which the training rows of the column hold.")
    missing = np.isnan(numbers)
    if column.std:
        into[:, 0] = np.where(missing, 0.0, (numbers - column.mean) / column.std)
    if column.indicator:
        into[:, 1] = missing


def unseen(table: Table, columns: Iterable[Column]) -> str:
    """Which categories of the rows no training row had, in words; empty if there are none."""
    found = []
    for column in columns:
        if isinstance(column, Category):
            known = set(column.categories)
            strange = [name for cell in table.column(column.name) if (name := word(cell)) not in known]
            if strange:
                examples = brief(", ".join(map(repr, dict.fromkeys(strange))), 60)
                found.append(f"{len(strange):,} of {len(table):,} rows in column {column.name!r} ({examples})")
    return "; ".join(found)


def _not_a_number(table: Table, name: str, row: int, rest: str) -> ConfigurationError:
    shown = brief(repr(str(table.columns[name][row])), 40)
    return ConfigurationError(f"{table.at(row)}, column {name!r}: {shown} is not a finite number{rest}")


def columns_to_json(columns: Iterable[Column]) -> list[dict[str, Any]]:
    """The columns as JSON can hold them."""
    return [
        asdict(column) if isinstance(column, Number) else {"name": column.name, "categories": list(column.categories)}
        for column in columns
    ]


def columns_from_json(columns: Iterable[Mapping[str, Any]]) -> list[Column]:
    """What `columns_to_json` wrote."""
    return [
        Category(one["name"], tuple(one["categories"])) if "categories" in one else Number(**one) for one in columns
    ]

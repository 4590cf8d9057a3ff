"""Tables: quantities or classes to be predicted from columns of numbers and categories."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch

from disttrain import rng
from disttrain.data.dataset import SampleSet, SampleSets
from disttrain.data.digest import Digest
from disttrain.data.sources.columns import columns_from_json, encode, unseen
from disttrain.data.sources.table_facts import describe_a_table, facts_of, targets_of
from disttrain.data.sources.table_file import Table, cells_of, read_table
from disttrain.errors import ConfigurationError, brief, printable
from disttrain.recipe import DataRecipe
from disttrain.recipe.address import expanded
from disttrain.recipe.table import TableOptions, table_options

_log = logging.getLogger(__name__)
_SKLEARN = "sklearn:"
_TABLES = ("breast_cancer", "diabetes", "iris", "wine")


@dataclass(frozen=True, eq=False)
class Rows:
    """A map-style data set of (features (F,) float32, target): () float32, or int64 for the number of a class."""

    features: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features[index], self.targets[index]

    def training_digest(self) -> Digest:
        """See `disttrain.data.digest`."""
        return Digest(_sha256(self.targets), f"table:{_sha256(self.features)}")


def load_table(data: DataRecipe, facts: Mapping[str, Any] | None = None) -> SampleSets:
    """The table that `data.options` describe, see `disttrain.recipe.table`, its features standardised.

    The facts of its sets are all that `rows_to_predict` and the task need. They are those of the training rows, or, for
    an evaluation, the `facts` of what was trained on. Raises ConfigurationError for whatever is wrong with the options
    or a file, by file, line and column.
    """
    try:
        options = table_options(data.options)
    except ValueError as error:
        raise ConfigurationError(f"data.{error}.") from error
    if facts and "columns" in facts and not describe_a_table(facts):
        raise ConfigurationError("the facts of the table that was trained on are damaged.")
    root = expanded(data.root)
    if options.file is not None:
        table = _read(options.file, "file", root, options)
        train, test = _split(table, options)
    else:
        assert options.train_file is not None
        assert options.test_file is not None
        train = _read(options.train_file, "train_file", root, options)
        test = _read(options.test_file, "test_file", root, options)
    return _sets(train, test, facts if facts and "columns" in facts else facts_of(train, options))


def table_sets(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    kind: str = "auto",
    categorical: Collection[str] = (),
) -> SampleSets:
    """Arrays as the data set of the task `tabular`: `train` and `test` are each (features, targets).

    Features are an array or tensor (N, F), whose columns are called x0, x1, …, or a DataFrame; targets are (N,). An
    array holds numbers or text.
    `kind` and `categorical` are as in `disttrain.recipe.table`. Raises ConfigurationError for what does not fit.
    """
    try:
        options = table_options({"file": "", "target": _TARGET, "kind": kind, "categorical": list(categorical)})
    except ValueError as error:
        raise ConfigurationError(f"{str(error).removeprefix('options.')}.") from error
    train_table, test_table = _of_arrays(train, "the training set"), _of_arrays(test, "the test set")
    widths = [len(table.columns) - 1 for table in (train_table, test_table)]
    if widths[0] != widths[1] and not any(hasattr(features, "columns") for features, _ in (train, test)):
        raise ConfigurationError(  # a DataFrame's columns are found by their names, and may be more
            f"the features of the training set have {widths[0]} columns and those of the test set {widths[1]}; give "
            "both the same columns."
        )
    return _sets(train_table, test_table, facts_of(train_table, options))


def rows_to_predict(path: Path, facts: Mapping[str, Any]) -> torch.Tensor:
    """The features of each row of a file, (N, F) float32, by the `facts` of the set that was trained on.

    It needs the columns of the features and no others, in any order. Warns of categories that training never saw.
    Raises ConfigurationError for a wrong file.
    """
    table, columns = read_table(path, **facts["format"]), columns_from_json(facts["columns"])
    features = encode(table, columns)
    if strange := unseen(table, columns):
        place = printable(str(path))
        _log.warning("%s: categories that training never saw count as none of those that it saw: %s.", place, strange)
    return features


_TARGET = "target"


def _of_arrays(pair: Any, name: str) -> Table:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        given = f"{len(pair)} values" if isinstance(pair, tuple | list) else f"a {type(pair).__name__}"
        raise ConfigurationError(f"{name}: give (features, targets), not {given}.")
    features, targets = pair
    if hasattr(features, "columns"):  # a DataFrame of pandas or polars
        columns = {str(key): cells_of(features[key].to_list()) for key in features.columns}
    else:
        array = _array(features, f"{name}: features")
        if array.ndim != 2:
            raise ConfigurationError(f"{name}: features are {array.shape}; give (rows, columns).")
        columns = {f"x{number}": cells_of(array[:, number].tolist()) for number in range(array.shape[1])}
    values = _array(targets, f"{name}: targets")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    num_rows = len(next(iter(columns.values()), ()))
    if values.shape != (num_rows,) or num_rows == 0:
        raise ConfigurationError(f"{name}: {num_rows} rows of features and targets {values.shape}; give one per row.")
    if _TARGET in columns:
        raise ConfigurationError(f"{name}: a column of the features is called {_TARGET!r}; rename it.")
    return Table({**columns, _TARGET: cells_of(values.tolist())}, name, range(num_rows))


def _array(values: Any, what: str) -> np.ndarray:
    """An array of numbers or text. Raises ConfigurationError for one of anything else, which `what` names."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.double()  # the same numbers, also of a bfloat16, which NumPy does not have
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{what} cannot be made an array: {brief(error)}.") from error
    strange = [one for one in array.flat if not _is_cell(one)] if array.dtype == object else []
    if strange or array.dtype.kind not in "biufUTO":
        held = f"a {type(strange[0]).__name__}" if strange else str(array.dtype)
        raise ConfigurationError(f"{what} hold {held}; an array has to hold numbers or text.")
    return array


def _is_cell(value: object) -> bool:
    return isinstance(value, str | Real | Decimal | NoneType) or type(value).__name__ == "NAType"  # pandas.NA


def _read(file: str, key: str, root: Path, options: TableOptions) -> Table:
    if file.startswith(_SKLEARN):
        return _of_sklearn(file.removeprefix(_SKLEARN), options.target)
    path = root / expanded(file)
    if not path.is_file():
        here = f' There is ./{file}: set data.root = ".".' if Path(file).is_file() else ""
        raise ConfigurationError(f"data.options.{key}: there is no file {path.absolute()}.{here}")
    return read_table(path, delimiter=options.delimiter, encoding=options.encoding)


def _of_sklearn(name: str, target: str) -> Table:
    if name not in _TABLES:
        raise ConfigurationError(
            f"data.options.file: scikit-learn ships no table {name!r}; it has {', '.join(_TABLES)}."
        )
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"data.options.file: {_SKLEARN}{name} comes with scikit-learn; pip install scikit-learn."
        ) from error
    options = {"scaled": False} if name == "diabetes" else {}
    loaded = getattr(datasets, f"load_{name}")(**options)
    names = getattr(loaded, "target_names", None)
    targets = loaded.target.tolist()
    columns = {str(key): loaded.data[:, number].tolist() for number, key in enumerate(loaded.feature_names)}
    columns[target] = targets if names is None else [str(names[value]) for value in targets]
    return Table(columns, f"{_SKLEARN}{name}", range(1, len(targets) + 1))


def _split(table: Table, options: TableOptions) -> tuple[Table, Table]:
    num_test = max(1, round(len(table) * options.test_fraction))
    if num_test >= len(table):
        raise ConfigurationError(
            f"{table.name}: {len(table)} rows cannot be split into training and test rows "
            f"(data.options.test_fraction = {options.test_fraction})."
        )
    order = rng.permutation(options.seed, 0, len(table)).tolist()
    return table.rows(sorted(order[num_test:])), table.rows(sorted(order[:num_test]))


def _sets(train: Table, test: Table, facts: Mapping[str, Any]) -> SampleSets:
    columns = columns_from_json(facts["columns"])
    _log.info(
        "%s: %s rows to train on and %s to test on; %s of %r from %d columns, %d features.",
        train.name, f"{len(train):,}", f"{len(test):,}", facts["kind"], facts["target"], len(columns),
        facts["num_features"],
    )  # fmt: skip
    train_set, test_set = (
        SampleSet(Rows(encode(table, columns), targets_of(table, facts)), table.name, facts, in_memory=True)
        for table in (train, test)
    )
    return SampleSets(train_set, test_set)


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]

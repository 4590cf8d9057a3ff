"""Tables as text cells: CSV by the standard library, Parquet by pyarrow."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from disttrain.errors import ConfigurationError, brief
from disttrain.files import open_to_read
from disttrain.recipe.names import did_you_mean

Cell: TypeAlias = str | int | float
"""What stands in a table: text out of a CSV file, "" where nothing does; NaN is a missing number."""
_MOST_CHARACTERS = 2**24  # of one cell
_NUMBER = re.compile(r"[-+]?[\d.]+([eE][-+]?\d+)?")


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equally many cells, by name.

    `name` is what messages call the table. `places` says for each row where it stands, counted in `unit` ("line" of a
    text file, "row" of anything else).
    """

    columns: Mapping[str, Sequence[Cell]]
    name: str
    places: Sequence[int]
    unit: str = "row"

    def __len__(self) -> int:
        return len(self.places)

    def at(self, row: int) -> str:
        """Where a row stands, in words."""
        return f"{self.name}, {self.unit} {self.places[row]}"

    def rows(self, chosen: Sequence[int], name: str | None = None) -> Table:
        """The table of some of the rows, which keep their places."""
        columns = {key: [cells[row] for row in chosen] for key, cells in self.columns.items()}
        return Table(columns, name or self.name, [self.places[row] for row in chosen], self.unit)

    def column(self, name: str, key: str = "") -> Sequence[Cell]:
        """The cells of a column. Raises ConfigurationError if there is none; `key` names what asks for it."""
        if name not in self.columns:
            of_key = f"{key}: " if key else ""
            hint = did_you_mean(name, self.columns) or f"; it has {brief(', '.join(self.columns))}."
            raise ConfigurationError(f"{of_key}{self.name} has no column {name!r}{hint}")
        return self.columns[name]


def read_table(path: Path, *, delimiter: str | None = None, encoding: str = "utf-8") -> Table:
    """The table in a file: Parquet if its name ends in .parquet or .pq, else CSV whose first line names the columns.

    `delimiter` is by default a tab in a file .tsv, else a comma. Raises ConfigurationError for whatever is wrong with
    the file, with the line.
    """
    try:
        with open_to_read(path, follow=True) as file:
            raw = file.read()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if path.suffix.lower() in (".parquet", ".pq"):
        table = _parquet(raw, path)
    else:
        delimiter = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
        table = _csv(_text(raw, path, encoding), path, delimiter)
    if not len(table):
        raise ConfigurationError(f"{path}: the table has no rows.")
    return table


def _text(raw: bytes, path: Path, encoding: str) -> str:
    try:
        text = raw.decode(encoding)
    except LookupError as error:
        raise ConfigurationError(
            f"data.options.encoding: {encoding!r} is not an encoding that Python supports."
        ) from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(
            f"{path}, line {line}: not {encoding} ({error.reason}). Save the file as UTF-8, or name its "
            'encoding in data.options.encoding, such as "latin-1" or "utf-16".'
        ) from error
    except ValueError as error:  # some of Python's encodings are not for text
        raise ConfigurationError(f"data.options.encoding: {encoding!r} cannot read {path}: {error}.") from error
    return text.removeprefix("\ufeff")  # the byte order mark that spreadsheets put first


def _csv(text: str, path: Path, delimiter: str) -> Table:
    before = csv.field_size_limit(_MOST_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    names: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        for cells in reader:
            begins, start = start, reader.line_num + 1  # a quoted cell may go over several lines
            if not cells:
                continue
            if not names:
                names = _checked_names([cell.strip() for cell in cells], path)
                continue
            if len(cells) != len(names):
                hint = " Is the delimiter right (data.options.delimiter)?" if len(names) == 1 else ""
                raise ConfigurationError(
                    f"{path}, line {begins}: {len(cells)} values, and the first line names {len(names)} columns.{hint}"
                )
            rows.append(cells)
            lines.append(begins)
    except csv.Error as error:
        raise ConfigurationError(f"{path}, line {start}: not valid CSV: {error}.") from error
    finally:
        csv.field_size_limit(before)
    if not names:
        raise ConfigurationError(f"{path}: the file is empty; its first line should name the columns.")
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return Table(
        {name: [cell.strip() for cell in cells] for name, cells in zip(names, columns, strict=True)},
        str(path), lines, "line",
    )  # fmt: skip


def _parquet(raw: bytes, path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{path}: Parquet is read by pyarrow, which is not installed; pip install pyarrow."
        ) from error
    try:
        read = parquet.read_table(pyarrow.BufferReader(raw))
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigurationError(f"{path}: not a valid Parquet file: {brief(error)}.") from error
    names = _checked_names([str(name) for name in read.column_names], path)
    columns: dict[str, list[Cell]] = {}
    for name, column in zip(names, read.columns, strict=True):
        if pyarrow.types.is_nested(column.type):
            raise ConfigurationError(
                f"{path}: column {name!r} holds {column.type}, and a table's cells are numbers or text; leave it out "
                "of the file."
            )
        columns[name] = cells_of(column.to_pylist())
    return Table(columns, str(path), range(1, read.num_rows + 1))


def cells_of(values: Sequence[Any]) -> list[Cell]:
    """Values of Python as cells: numbers and text as they are, "" for None, everything else in words."""
    return [
        "" if value is None else value if type(value) in (int, float, str) else str(value)
        for value in values
    ]  # fmt: skip


def _checked_names(names: list[str], path: Path) -> list[str]:
    """The names of the columns. Raises ConfigurationError for one that is missing or there twice."""
    if len(names) > 1 and all(_NUMBER.fullmatch(name) for name in names):
        raise ConfigurationError(
            f"{path}: the first line holds numbers ({brief(', '.join(names), 60)}); it should name the columns."
        )
    for number, name in enumerate(names, start=1):
        if not name:
            raise ConfigurationError(
                f"{path}: column {number} has no name in the first line; name it, or leave it out "
                "(pandas: to_csv(..., index=False))."
            )
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConfigurationError(f"{path}: {count} columns are named {name!r}; give each a different name.")
    return names

"""The `data.options` of the data set `table`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from disttrain.recipe.names import did_you_mean
from disttrain.recipe.section import Section, WholeNumber


class TableOptions(Section):
    """Which files hold the table, and what each of its columns is."""

    target: str
    """The column to predict."""
    file: str | None = None
    """One file that is split at random, below `data.root`; or "sklearn:NAME", one of the tables scikit-learn ships."""
    train_file: str | None = None
    test_file: str | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: WholeNumber = 0
    """Of the split of `file`."""
    kind: Literal["auto", "regression", "classification"] = "auto"
    """auto: a target of words, or of the numbers 0 and 1 alone, is a class; any other number is a quantity."""
    features: list[str] | None = None
    """The columns to predict from; left out: all but the target and those in `exclude`."""
    exclude: list[str] = Field(default=[])
    categorical: list[str] = Field(default=[])
    """Columns of numbers that are codes, such as postcodes: each value is a category."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Of a text file; left out: a tab in .tsv, else a comma."""
    encoding: str = "utf-8"

    @model_validator(mode="after")
    def _files_are_named(self) -> Self:
        if (self.train_file is None) != (self.test_file is None):
            raise ValueError("train_file and test_file belong together; give both, or `file` alone")
        if (self.file is None) == (self.train_file is None):
            raise ValueError("give either file, which is split, or train_file and test_file")
        return self


def table_options(options: Mapping[str, Any]) -> TableOptions:
    """The options, checked. Raises ValueError, whose one line names the first wrong one."""
    try:
        return TableOptions(**options)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in details["loc"])
        if details["type"] == "extra_forbidden":
            known = TableOptions.model_fields
            hint = did_you_mean(key, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"options.{key}: a table has no such option{hint}") from error
        if details["type"] == "missing":
            raise ValueError(f"options.{key} is missing: name the column to predict") from error
        if details["type"] == "value_error":
            raise ValueError(f"options: {details['ctx']['error']}") from error
        raise ValueError(f"options.{key}: {details['msg']}, not {details['input']!r}") from error

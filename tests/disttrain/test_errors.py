"""What messages are made of."""

from __future__ import annotations

import math

import pytest

from disttrain.errors import in_digits


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (180_843.2, "180,843"), (-180_843.2, "-180,843"), (9_999_999.4, "9,999,999"), (1.5e8, "1.5e+08"),
        (999.96, "1,000"), (999.4, "999.4"), (12.345, "12.35"), (0.000123, "0.000123"), (1.23e-7, "1.23e-07"),
        (0, "0"), (math.nan, "nan"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_do(value: float, words: str) -> None:
    assert in_digits(value) == words


def test_more_digits() -> None:
    assert [in_digits(value, 6) for value in (151.2345, 99_999.96, 12_345_678.9)] == [
        "151.234",
        "100,000",
        "12,345,679",
    ]

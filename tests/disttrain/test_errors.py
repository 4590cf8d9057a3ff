"""What messages are made of."""

from __future__ import annotations

import json
import math

import pytest

from disttrain.errors import TaskError, failures_named, in_digits, is_in_user_code


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


def test_the_place_of_a_failure_is_in_the_users_code_and_not_in_pythons_library() -> None:
    def mistake() -> None:
        json.loads("{")

    with (
        pytest.raises(TaskError, match=r"^Mine\.loss: JSONDecodeError: .* \(.*test_errors\.py:\d+\)$"),
        failures_named("Mine.loss"),
    ):
        mistake()
    with pytest.raises(ValueError, match="Expecting") as caught:
        mistake()
    assert not is_in_user_code(caught.value.with_traceback(caught.tb.tb_next.tb_next)), "json's own frames"

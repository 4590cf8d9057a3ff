"""Hypothesis's `@given` in tests that run in workers."""

from __future__ import annotations

import pytest

from tests.disttrain.testing.test_plugin import run

pytest_plugins = ["pytester"]

HEAD = """
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st
"""


def test_every_rank_draws_the_same_examples(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        HEAD
        + """
def compare(drawn):
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, drawn)
    assert everybodys == [drawn] * dist.get_world_size()

@pytest.mark.distributed
@given(numbers=st.lists(st.integers()), text=st.text())
def test_drawn(rank, numbers, text):
    assume(len(numbers) != 1)
    compare((numbers, text))

class TestInAClass:
    @settings(max_examples=10)
    @given(data=st.data())
    @pytest.mark.parametrize("largest", [1, 1000])
    @pytest.mark.distributed(world_size=[1, 2])
    def test_method(self, rank, world_size, largest, data):
        compare(data.draw(st.integers(0, largest)))
""",
    )
    result.assert_outcomes(passed=5)


def test_a_seed_draws_other_examples(pytester: pytest.Pytester) -> None:
    body = """
@pytest.mark.distributed(world_size=1)
@given(numbers=st.lists(st.integers(0, 10**9), min_size=9, max_size=9))
def test_drawn(numbers):
    assert sum(numbers) < 1000
"""
    shown = []
    for options in ((), (), ("--hypothesis-seed=1",)):
        lines = run(pytester, HEAD + body, *options).stdout.lines
        # In the failure itself: where CI is set, pytest repeats all of it in its short summary.
        shown.append([line for line in lines if line.startswith("E ") and "Failing example" in line])
    assert len(shown[0]) == 1
    assert shown[0] == shown[1], "the same from run to run"
    assert shown[2] != shown[0]


def test_an_example_that_fails_in_one_rank_is_shown_as_drawn(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        HEAD
        + """
@pytest.mark.distributed
@given(number=st.integers(0, 1000))
def test_one(rank, number):
    dist.barrier()
    if rank == 1:
        assert number < 400
    dist.barrier()

@pytest.mark.distributed
@example(number=7)
@given(number=st.integers(0, 1000))
def test_all(number):
    if number == 7:
        raise ValueError("seven")
""",
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "rank 1 of 2",
            ">           assert number < 400",
            "E * assert * < 400",
            "E * Failing example, as it was drawn: test_one(rank=1, number=*)",
            "rank 0 was in barrier() for *: dist.barrier()*",
            "_* test_all _*",
            "E * ValueError: seven",
            "E * Failing example, as it was drawn: test_all(number=7)",
            "rank ? of 2",
            "E * Failing example, as it was drawn: test_all(number=7)",
        ]
    )
    result.stdout.no_fnmatch_line("*Flaky*")
    result.stdout.no_fnmatch_line("*[/\\]hypothesis[/\\]*")


def test_fixtures_that_are_not_made_anew_for_each_example_are_still_refused(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        HEAD
        + """
@pytest.mark.distributed
@given(number=st.integers())
def test_refused(rank, tmp_path, number):
    pass

@pytest.mark.distributed
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers())
def test_allowed(rank, tmp_path, number):
    pass
""",
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*FailedHealthCheck: *test_refused' uses a function-scoped fixture *"])

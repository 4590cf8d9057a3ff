"""The `subtests` fixture of pytest 9 (and of pytest-subtests) in tests that run in workers."""

from __future__ import annotations

import importlib.util

import pytest

from tests.disttrain.testing.test_plugin import run

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.skipif(
    not hasattr(pytest, "Subtests") and importlib.util.find_spec("pytest_subtests") is None,
    reason="no fixture 'subtests': pytest 9 brings it, before that the plugin pytest-subtests",
)


def test_a_failing_subtest_fails_its_test_and_says_its_rank(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_numbers(rank, subtests):
    for number in range(3):
        with subtests.test("a number", number=number):
            assert (number, rank) != (1, 1)
    dist.barrier()

@pytest.mark.distributed
def test_fine(subtests):
    with subtests.test("fine"):
        dist.barrier()
""",
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "_* test_numbers [[]a number[]] (number=*1*, rank=1) _*",
            "rank 1 of 2",
            ">               assert (number, rank) != (1, 1)",
            "_* test_numbers _*",
            "contains 1 failed subtest",
            "FAILED *::test_numbers*",
            "*2 failed, 1 passed*",
        ]
    )
    result.stdout.no_fnmatch_line("*Captured stdout call*")  # what pytest prints for a subtest is no output of the test


def test_a_subtest_that_makes_the_other_ranks_hang_is_shown(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed(timeout_s=2)
def test_cause(rank, subtests):
    with subtests.test():
        assert rank == 0, "the cause"
        dist.barrier()
    time.sleep(60)
""",
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["E * AssertionError: the cause", "2 workers, *", "rank 0 was in barrier()*"])


def test_expected_failures_of_subtests_are_no_failures(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_skips(subtests):
    with subtests.test():
        pytest.skip("not here")

@pytest.mark.distributed
def test_xfails(subtests):
    with subtests.test():
        pytest.xfail("known")
""",
    )
    assert result.ret == pytest.ExitCode.OK

"""The integer sum: the same bits in any order and grouping, close to the true sum, never of what is not finite."""

from __future__ import annotations

import math
from datetime import timedelta
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.distributed import exact_sum, runs
from disttrain.distributed.exact_sum import exact_sum_
from disttrain.distributed.fixed_point import (
    ABSENT,
    FixedPointSum,
    expected_magnitudes,
    magnitudes,
    measured,
    surprises,
)
from disttrain.distributed.shared_sums import shared_sums
from disttrain.testing import run_workers

DENORMALS = [2.0**-149, -(2.0**-149), 2.0**-130, -(2.0**-127)]
SIZES = st.floats(1e-30, 1e30)
NUMBERS = st.one_of(SIZES, SIZES.map(lambda size: -size), st.floats(-1, 1), st.sampled_from([0.0, -0.0, *DENORMALS]))


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def summed(groups: list[list[list[torch.Tensor]]], num_summands: int) -> list[torch.Tensor]:
    """The sum of all lists, each group added up by itself as a worker does, and then the groups' integers."""
    everything = [summand for group in groups for summand in group]
    largest = [max(column) for column in zip(*map(magnitudes, everything), strict=True)]
    like = [torch.empty_like(tensor) for tensor in everything[0]]
    totals = []
    for group in groups:
        total = FixedPointSum(like, largest, num_summands)
        for summand in group:
            total.add(summand)
        totals.append(total)
    for other in totals[1:]:
        totals[0].integers().add_(other.integers())
    totals[0].write(like)
    return like


@given(
    st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_permutation_and_any_partition_give_the_same_bits(
    numbers: list[list[float]], random: object, dtype: torch.dtype
) -> None:
    summands = [[torch.tensor(row, dtype=dtype), torch.tensor(row[0], dtype=dtype)] for row in numbers]
    expected = summed([summands], len(summands))
    shuffled = summands.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    num_groups = random.randint(1, len(shuffled))  # type: ignore[attr-defined]
    cuts = sorted(random.randint(0, len(shuffled)) for _ in range(num_groups - 1))  # type: ignore[attr-defined]
    groups = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(shuffled)], strict=True)]
    assert bits(summed(groups, len(summands))) == bits(expected)


def test_how_many_are_worked_on_at_once_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes, types = (
        [(3,), (2, 5), (), (7,), (1,)],
        [torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float32],
    )
    summands = [[torch.randn(shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True)] for _ in range(4)]
    at_once = summed([summands], 4)
    monkeypatch.setattr("disttrain.distributed.fixed_point._ENOUGH_ELEMENTS", 4)
    assert bits(summed([summands[:1], summands[1:]], 4)) == bits(at_once)


@given(st.lists(NUMBERS, min_size=1, max_size=12))
def test_the_error_is_within_the_bound_that_the_documentation_gives(numbers: list[float]) -> None:
    (total,) = summed([[[torch.tensor([number], dtype=torch.float64)] for number in numbers]], len(numbers))
    true = sum(map(Fraction, numbers), Fraction(0))
    largest = max(map(abs, numbers))
    headroom = math.ceil(math.log2(len(numbers)))
    bound = len(numbers) * Fraction(largest) * Fraction(2) ** (headroom - 61)
    rounding = abs(true) * Fraction(2) ** -52
    assert abs(Fraction(total.item()) - true) <= bound + rounding


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_it_is_as_close_as_a_float64_sum_once_it_is_float32(numbers: list[float]) -> None:
    """Numbers of like size, as the gradients of one tensor's element are: to float32 it is the true sum, rounded."""
    near = [math.copysign(1 + abs(number), number) for number in numbers]
    summands = [torch.tensor([number], dtype=torch.float32) for number in near]
    (total,) = summed([[[summand] for summand in summands]], len(summands))
    true = sum((Fraction(summand.item()) for summand in summands), Fraction(0))
    assert total.item() == torch.tensor(float(true), dtype=torch.float32).item()


def test_the_largest_numbers_there_are_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    (total,) = summed([[[torch.tensor([largest])], [torch.tensor([largest])], [torch.tensor([-largest])]]], 3)
    assert total.item() == largest
    largest = torch.finfo(torch.float64).max
    (total,) = summed([[[torch.tensor([number], dtype=torch.float64)] for number in (largest, -largest)]], 2)
    assert total.item() == 0.0


def test_complex_numbers_and_strides_of_all_kinds() -> None:
    matrix = torch.arange(6.0).view(2, 3).t()
    (total,) = summed([[[matrix], [matrix]]], 2)
    assert torch.equal(total, 2 * matrix)
    phase = torch.tensor([1 + 2j, -3 - 4j])
    (total,) = summed([[[phase], [phase], [phase]]], 3)
    assert torch.equal(total, 3 * phase)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_reported(bad: float) -> None:
    tensors = [torch.ones(3), torch.tensor([1.0, bad, 2.0]), None, torch.empty(0)]
    assert magnitudes(tensors) == [1.0, math.inf, ABSENT, ABSENT]


def test_a_magnitude_has_no_sign() -> None:
    zeros = [torch.zeros(3), torch.full((3,), -0.0), torch.zeros(3, dtype=torch.float64), torch.zeros(300_000)]
    assert str(magnitudes(zeros)) == str([magnitudes([one])[0] for one in zeros]) == "[0.0, 0.0, 0.0, 0.0]"


def _collectively(rank: int) -> tuple[list[float], list[torch.Tensor]]:
    mine = [torch.full((2,), 0.1 * (rank + 1)), None, None, torch.tensor([1.0])]
    if rank == 1:
        mine[2], mine[3] = torch.tensor([5.0]), torch.tensor([math.nan])
    into = [torch.full((2,), 7.0), torch.full((2,), 7.0), torch.full((1,), 7.0), torch.full((1,), 7.0)]
    return exact_sum_(into, [mine] if rank != 2 else [], 3), into


def test_all_ranks_get_the_sum_and_learn_what_was_left_alone() -> None:
    """Tensors that nobody has, that one rank has, and one that is not finite on one rank; rank 2 has nothing at all."""

    def body() -> tuple[list[float], list[torch.Tensor]]:
        return _collectively(torch.distributed.get_rank())

    answers = run_workers(body, 3)
    for largest, into in answers:
        assert largest == answers[0][0]
        assert largest[1:] == [ABSENT, 5.0, math.inf]
        torch.testing.assert_close(into[0], torch.full((2,), 0.3))
        assert into[1].tolist() == [7.0, 7.0]
        assert into[2].tolist() == [5.0]
        assert into[3].tolist() == [7.0]
    assert len({str(bits(into)) for _, into in answers}) == 1


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.floats(1e-30, 1e30), st.integers(-12, 12))
def test_the_error_is_within_its_bound_where_an_expectation_holds(
    numbers: list[float], before: float, shift: int
) -> None:
    summands = [torch.tensor([math.ldexp(number * before, shift)], dtype=torch.float64) for number in numbers]
    expected = expected_magnitudes([torch.tensor([before], dtype=torch.float64)], [before])()
    assert expected is not None
    exceeding, faint = surprises(measured([[summand] for summand in summands]), expected, len(numbers)).tolist()
    largest = max(abs(summand.item()) for summand in summands)
    assert bool(exceeding) == (largest > expected[0])
    if exceeding or faint == len(numbers):
        return
    total = FixedPointSum(summands[:1], expected, len(numbers))
    for summand in summands:
        total.add([summand])
    into = [torch.empty(1, dtype=torch.float64)]
    total.write(into)
    true = sum((Fraction(summand.item()) for summand in summands), Fraction(0))
    headroom = math.ceil(math.log2(len(numbers)))
    bound = len(numbers) * Fraction(largest) * Fraction(2) ** (2 * headroom - 55)
    assert abs(Fraction(into[0].item()) - true) <= bound + abs(true) * Fraction(2) ** -52


def test_nothing_is_expected_after_infinities_and_what_was_absent_or_zero_stays_so() -> None:
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    assert expected_magnitudes([one, zero], [1.0, ABSENT])() == [16.0, ABSENT]
    assert expected_magnitudes([one, zero], [1.0, 1.0])() == [16.0, 0.0]
    assert expected_magnitudes([torch.tensor([math.inf])], [math.inf])() is None
    # What was not finite anywhere has not been summed: what is in the tensor is this rank's own, and may be finite.
    assert expected_magnitudes([one, one], [1.0, math.inf])() is None
    twice = expected_magnitudes([one, zero], [1.0, 1.0])  # asked for before a step that may be undone, and in it
    assert twice() is twice()


EXPECTED = [1.0, ABSENT]
LISTS = {
    "as expected": [[0.3, None], [-0.7, None], [0.001, None], [0.1, None]],
    "larger than expected": [[0.3, None], [1.5, None], [0.1, None], [0.1, None]],
    "all smaller than expected": [[1e-3, None], [2e-3, None], [1e-4, None], [1e-3, None]],
    "one where none was expected": [[0.3, None], [0.3, 0.2], [0.3, None], [0.3, None]],
    "none where one was expected": [[None, None]] * 4,
    "not finite": [[0.3, None], [math.nan, None], [0.3, None], [0.3, None]],
}


NUMBERS_OF_EACH = torch.tensor([[1.0, 0.5], [-0.25, 0.75], [0.125, -0.5]]).t()  # which is not contiguous


@pytest.mark.parametrize("case", LISTS)
def test_expected_or_not_every_number_of_ranks_gets_the_same_bits(case: str) -> None:
    """A sum that was not as expected is the one that is made without an expectation.

    In runs that cut tensors, some of them together, through collectives and in shared memory.
    """
    lists = [[None if number is None else number * NUMBERS_OF_EACH for number in row] for row in LISTS[case]]

    def summed_with(expected: list[float] | None) -> tuple[list[float], list[torch.Tensor]]:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        answers = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "_MOST_NUMBERS", {"cpu": 4})
            patch.setattr(exact_sum, "_MOST_TOGETHER", 6)
            for shared in (None, shared_sums(rank, timedelta(minutes=4))):
                into = [torch.full_like(NUMBERS_OF_EACH, 7.0), torch.full_like(NUMBERS_OF_EACH, 7.0)]
                bounds = exact_sum_(into, lists[rank::size], 4, shared=shared, expected=expected)
                answers.append((bounds, into))
        assert answers[0][0] == answers[1][0]
        assert bits(answers[0][1]) == bits(answers[1][1])
        return answers[0]

    answers = [answer for size in (1, 2, 3) for answer in run_workers(summed_with, size, args=(EXPECTED,))]
    (bounds, sums), *others = answers
    assert all(other_bounds == bounds and bits(other) == bits(sums) for other_bounds, other in others)
    (without_bounds, without), *_ = run_workers(summed_with, 2, args=(None,))
    assert (bounds == EXPECTED) == (case == "as expected")
    if case == "as expected":
        torch.testing.assert_close(sums[0], -0.299 * NUMBERS_OF_EACH)
    else:
        assert bounds == without_bounds
        assert bits(sums) == bits(without)


def test_more_tensors_than_shared_memory_counts_at_once_are_summed() -> None:
    def summed_in_shared_memory() -> list[float]:
        into, ones = torch.zeros(66_000), torch.ones(66_000)
        shared = shared_sums(torch.distributed.get_rank(), timedelta(minutes=4))
        exact_sum_(into.split(1), [ones.split(1)], 2, shared=shared, expected=[8.0] * 66_000)
        return into.unique().tolist()

    assert run_workers(summed_in_shared_memory, 2) == [[2.0], [2.0]]

"""Random numbers are a function of what they are for, and of nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain import rng


def test_an_epochs_order_is_a_permutation_that_follows_from_seed_and_epoch() -> None:
    order = rng.permutation(7, 3, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    torch.manual_seed(123)
    torch.rand(5)
    assert torch.equal(order, rng.permutation(7, 3, 1000))
    assert not torch.equal(order, rng.permutation(7, 4, 1000))
    assert not torch.equal(order, rng.permutation(8, 3, 1000))


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.integers(1, 6))
def test_a_samples_numbers_do_not_depend_on_its_batch(samples: list[int], num: int) -> None:
    together = rng.uniform(1, 2, torch.tensor(samples), num)
    alone = torch.cat([rng.uniform(1, 2, torch.tensor([sample]), num) for sample in samples])
    assert torch.equal(together, alone)
    assert torch.equal(together, rng.uniform_there(1, 2, torch.tensor(samples), num)), "as a GPU computes them"


def test_the_numbers_are_uniform_and_the_columns_independent() -> None:
    numbers = rng.uniform(0, 0, torch.arange(100_000), 3).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert torch.allclose(numbers.mean(0), torch.full((3,), 0.5, dtype=torch.float64), atol=0.005)
    assert torch.allclose(numbers.std(0), torch.full((3,), 12**-0.5, dtype=torch.float64), atol=0.005)
    off_diagonal = torch.corrcoef(numbers.T) - torch.eye(3, dtype=torch.float64)
    assert off_diagonal.abs().max() < 0.015
    bins = torch.histc(numbers[:, 0], bins=64, min=0, max=1)
    assert ((bins - 100_000 / 64) ** 2 / (100_000 / 64)).sum() < 120  # chi-squared, 63 degrees of freedom


def test_derived_seeds_differ_in_every_part_and_in_order() -> None:
    seeds = [rng.derive(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0)]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


DRAWS: dict[str, Callable[[], torch.Tensor]] = {
    "torch": lambda: torch.nn.functional.dropout(torch.ones(64)),
    "python": lambda: torch.tensor([random.random() for _ in range(8)]),
    "numpy": lambda: torch.from_numpy(np.random.rand(8)),
}


@pytest.mark.parametrize("source", DRAWS)
def test_what_a_layer_draws_follows_from_seed_step_and_slice(source: str) -> None:
    cpu = torch.device("cpu")

    def mask(step: int, slice_index: int) -> torch.Tensor:
        rng.seed_layers(cpu, 5, step, slice_index)
        return DRAWS[source]()

    assert torch.equal(mask(1, 0), mask(1, 0))
    assert not torch.equal(mask(1, 0), mask(2, 0))
    assert not torch.equal(mask(1, 0), mask(1, 1))

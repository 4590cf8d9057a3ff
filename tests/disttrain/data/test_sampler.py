"""Who gets which sample when."""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from disttrain import rng
from disttrain.data import StepSampler

lengths, batch_sizes, worlds = st.integers(1, 200), st.integers(1, 64), st.integers(1, 9)


def samplers(length: int, batch_size: int, size: int, seed: int = 0) -> list[StepSampler]:
    return [StepSampler(length, num_replicas=size, rank=rank, seed=seed, batch_size=batch_size) for rank in range(size)]


@given(lengths, batch_sizes, worlds, st.integers(0, 5), st.integers(0, 2**40))
def test_all_workers_together_take_the_epochs_order_in_slices_of_the_global_batch(
    length: int, batch_size: int, size: int, epoch: int, seed: int
) -> None:
    workers = samplers(length, batch_size, size, seed)
    order = rng.permutation(seed, epoch, length)
    for step in range(workers[0].steps_per_epoch):
        shares = [worker.indices(epoch, step) for worker in workers]
        assert torch.equal(torch.cat(shares), order[step * batch_size : (step + 1) * batch_size])
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) == workers[0].global_size(step)


@given(lengths, batch_sizes, worlds, st.integers(1, 12))
def test_the_parts_of_a_step_are_the_step(length: int, batch_size: int, size: int, parts: int) -> None:
    sampler = samplers(length, batch_size, size)[-1]
    last = sampler.steps_per_epoch - 1
    cut = [sampler.indices(0, last, part, parts) for part in range(parts)]
    assert torch.equal(torch.cat(cut), sampler.order(0)[last * batch_size :])


@given(lengths, batch_sizes, worlds, st.data())
def test_iteration_from_any_step_is_the_rest_of_the_epoch(
    length: int, batch_size: int, size: int, data: st.DataObject
) -> None:
    workers = samplers(length, batch_size, size)
    step = data.draw(st.integers(0, workers[0].steps_per_epoch))
    rest: list[int] = []
    for worker in workers:
        worker.set_epoch(3)
        whole = list(worker)
        assert len(worker) == len(whole)
        worker.set_position(3, step)
        mine = list(worker)
        assert len(worker) == len(mine)
        assert mine == whole[len(whole) - len(mine) :]
        rest += mine
    assert sorted(rest) == sorted(workers[0].order(3)[step * batch_size :].tolist())


def test_it_is_torchs_sampler_to_a_dataloader() -> None:
    sampler = StepSampler(torch.arange(10), num_replicas=2, rank=1, batch_size=4)
    assert isinstance(sampler, DistributedSampler)
    loader = torch.utils.data.DataLoader(torch.arange(10), batch_size=2, sampler=sampler)
    sampler.set_epoch(1)
    assert torch.cat(list(loader)).tolist() == list(sampler)


def test_another_epoch_or_seed_is_another_order() -> None:
    sampler = StepSampler(1000, batch_size=10)
    assert not torch.equal(sampler.order(0), sampler.order(1))
    assert not torch.equal(sampler.order(0), StepSampler(1000, seed=1, batch_size=10).order(0))


def test_a_late_step_costs_what_an_early_one_does() -> None:
    sampler = StepSampler(3_000_000, num_replicas=2, rank=1, batch_size=10)
    with mock.patch("disttrain.rng.permutation", wraps=rng.permutation) as permutation:
        sampler.set_position(0, 0)
        first = next(iter(sampler))
        costs = []
        for _ in range(5):
            sampler.set_position(0, 299_999)
            start = time.perf_counter()
            last = next(iter(sampler))
            costs.append(time.perf_counter() - start)
        assert min(costs) < 0.1  # going there one by one takes ten times as long
    permutation.assert_called_once()
    assert first == sampler.order(0)[5]
    assert last == sampler.order(0)[-5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": 0, "batch_size": 1}, "empty"),
        ({"dataset": 5, "batch_size": 0}, "batch_size must be 1 or more"),
        ({"dataset": 5, "batch_size": 1, "rank": 1}, "rank"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepSampler(**arguments)


def test_a_step_or_part_outside_is_refused() -> None:
    sampler = StepSampler(10, batch_size=4)
    with pytest.raises(ValueError, match="step 3 is outside the epoch's 3 steps"):
        sampler.indices(0, 3)
    with pytest.raises(ValueError, match="step 4 is outside"):
        sampler.set_position(0, 4)
    with pytest.raises(ValueError, match="part 2 is outside the 2 parts"):
        sampler.indices(0, 0, 2, 2)

"""Tests that use other plugins, of pytest as they know it: tests/test_wheel.py runs them where those are installed."""

import asyncio
import os
import random
from pathlib import Path

import measured
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from disttrain.testing import run_workers


@pytest.mark.distributed
@pytest.mark.timeout(100)
def test_mock_and_randomly(rank, mocker, worker_id, json_metadata):
    mocker.patch("os.getcwd", return_value="here")
    assert os.getcwd() == "here"
    values = [None, None]
    dist.all_gather_object(values, random.random())
    assert values[0] == values[1]


@pytest.mark.distributed
def test_covered(rank):
    assert measured.up_to_five(rank) == rank


@pytest.mark.distributed
@pytest.mark.no_cover
def test_not_covered():
    assert measured.up_to_five(6) == 5


def test_covered_outside_of_pytest():
    assert run_workers(measured.twice, 2, args=(3,)) == [6, 6]


@pytest.mark.distributed
@pytest.mark.flaky(reruns=1)
def test_flaky(rank):
    tries = Path(__file__).with_name(f"tries-of-rank-{rank}")
    with tries.open("a") as file:
        file.write("x")
    assert tries.stat().st_size % 2 == 0


@pytest.mark.distributed
@pytest.mark.asyncio
async def test_asyncio(rank):
    await asyncio.sleep(0)
    dist.barrier()
    assert rank in (0, 1)


@pytest.mark.distributed
@given(number=st.integers(0, 3))
def test_hypothesis(rank, number):
    assert 0 <= number <= 3

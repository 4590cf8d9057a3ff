"""How the cost of readiness is told from everything else that makes one epoch take longer than another."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("ready")


def test_only_readiness_shows_not_the_machines_speed_nor_a_slower_worker(ready: Any) -> None:
    draw, is_on = random.Random(1), ready.is_on
    costs = [0.01, 0.09, 0.02, 0.04]  # rank 1 keeps a copy
    blocks = []
    for block in range(16):
        speed = draw.uniform(0.5, 2.0)
        blocks.append(
            [
                ready.Spent(speed * (1 + 0.3 * (rank == 2)) * (1 + cost * is_on(block, rank)), 0.0, 0)
                for rank, cost in enumerate(costs)
            ]
        )
    assert sum(is_on(block, 1) for block in range(16)) == 8
    assert all(sum(is_on(block, rank) for rank in range(4)) == 2 for block in range(16))
    # Of the halves' costs, 5 % and some 2.9 %, the mean.
    found = ready.ratios(blocks)
    assert found == [pytest.approx(1.0393, abs=2e-4)] * 4

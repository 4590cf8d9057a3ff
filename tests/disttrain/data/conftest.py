"""What the data tests share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.data import Datasets, load_datasets
from disttrain.distributed.world import World
from disttrain.recipe import DataRecipe

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"), host="here")


@pytest.fixture(autouse=True)
def _caches_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def load() -> Callable[..., Datasets]:
    """Load what a data section says, as the only worker."""

    def load_one(**keys: Any) -> Datasets:
        return load_datasets(DataRecipe(**keys), ALONE, nullcontext)

    return load_one

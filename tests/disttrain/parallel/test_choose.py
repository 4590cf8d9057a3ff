"""Which strategy a recipe, the workers and the GPUs come to."""

from __future__ import annotations

import pytest

from disttrain.errors import ConfigurationError
from disttrain.parallel.alone import Alone
from disttrain.parallel.choose import choose_strategy, parallelize
from disttrain.parallel.data_parallel import DataParallel
from disttrain.parallel.ddp import Ddp
from disttrain.parallel.exact.strategy import Exact
from disttrain.parallel.strategy import Strategy
from disttrain.recipe import ParallelRecipe
from tests.disttrain.parallel.gradients import ALONE, network


@pytest.mark.parametrize(
    ("wanted", "num_workers", "num_gpus", "chosen"),
    [
        ("auto", 1, 0, "none"),
        ("auto", 1, 1, "none"),
        ("auto", 1, 4, "dp"),
        ("auto", 4, 4, "ddp"),
        ("ddp", 1, 0, "ddp"),
        ("fsdp", 3, 0, "fsdp"),
        ("fsdp", 1, 0, "none"),
        ("dp", 1, 2, "dp"),
        ("none", 1, 4, "none"),
    ],
)
def test_the_strategy_follows_from_workers_and_gpus(wanted: str, num_workers: int, num_gpus: int, chosen: str) -> None:
    name, reason = choose_strategy(wanted, num_workers, num_gpus)
    assert name == chosen
    assert ("-n gpu" in reason) == (chosen == "dp")


@pytest.mark.parametrize("wanted", ["dp", "none"])
def test_a_strategy_for_one_process_is_refused_for_several(wanted: str) -> None:
    with pytest.raises(ConfigurationError, match=f"parallel.strategy = '{wanted}' is for one process"):
        choose_strategy(wanted, 2, 0)


@pytest.mark.distributed(world_size=1)
def test_each_strategy_goes_by_the_name_that_the_recipe_has_for_it() -> None:
    kinds: dict[str, type[Strategy]] = {"none": Alone, "dp": DataParallel, "ddp": Ddp}
    for name, kind in kinds.items():
        strategy = parallelize(network(), ALONE, ParallelRecipe(strategy=name))  # type: ignore[arg-type]
        assert (type(strategy), strategy.name) == (kind, name)
        assert strategy.bits_depend_on_world_size
        assert strategy.state() == {}
    exact = parallelize(network(), ALONE, ParallelRecipe(exact=True, slices=3))
    assert (type(exact), exact.name) == (Exact, "exact")
    assert not exact.bits_depend_on_world_size
    assert (exact.slices, exact.num_slices) == (range(3), 3)

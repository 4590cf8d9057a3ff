"""Keys that a recipe sets in vain are named, and not refused: a run of FSDP is resumed with DDP by the same recipe."""

from __future__ import annotations

import pytest

from disttrain.recipe import load_recipe
from disttrain.recipe.partners import keys_without_effect


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], []),
        (["parallel.shard_size=2", "parallel.prefetch=1", "parallel.cpu_offload=true"],
         ["shard_size", "prefetch", "cpu_offload"]),
        (["parallel.shard_modules=Block", "parallel.reshard_after_forward=false"],
         ["shard_modules", "reshard_after_forward"]),
        (["parallel.shard_modules=Block", "parallel.shard_size=2", "parallel.strategy=fsdp"], []),
        (["parallel.outer_momentum=0.5", "parallel.outer_learning_rate=0.7"], ["outer_momentum"]),
        (["parallel.outer_momentum=0.5", "parallel.sync_fragments=2", "parallel.sync_every=5"], []),
        (["parallel.sync_fragments=2"], ["sync_fragments"]),
        (["data.crop_fill=reflect"], []),
        (["parallel.slices=8"], ["slices"]),
        (["parallel.slices=8", "parallel.exact=true"], []),
        (["data.crop_fill=reflect", "data.crop_padding=0"], ["data.crop_fill"]),
        (["task.name=tabular", "data.flip=alternate", "train.eval_views=mirror"], ["data.flip", "train.eval_views"]),
    ],
)  # fmt: skip
def test_a_key_without_the_one_that_it_belongs_to_is_named(overrides: list[str], named: list[str]) -> None:
    said = keys_without_effect(load_recipe("digits", overrides))
    assert [line.partition(" has no effect without ")[0] for line in said] == [
        key if "." in key else f"parallel.{key}" for key in named
    ]

"""Where one of several machines leads, so that the others continue without what is lost."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.recipe import parse_recipe
from disttrain.recipe.continuing import is_led

EXACT = {"parallel": {"exact": True}}
ASKED = {"parallel": {"exact": True, "on_lost_worker": "continue"}}


@pytest.mark.parametrize(
    ("recipe", "on_gpus", "led"),
    [
        (EXACT, False, True),
        ({}, False, False),
        ({"parallel": {"exact": True, "strategy": "fsdp"}}, False, False),
        ({"parallel": {"exact": True, "on_lost_worker": "restart"}}, False, False),
        (EXACT | {"train": {"spike_factor": 3.0}}, False, False),
        (EXACT | {"train": {"device": "cuda"}}, False, False),
        (EXACT, True, False),
        (ASKED, True, True),
        (ASKED | {"train": {"spike_factor": 3.0}}, False, True),
        ({"parallel": {"on_lost_worker": "continue"}}, False, False),
    ],
)
def test_by_default_only_where_it_is_proven(recipe: dict[str, Any], on_gpus: bool, led: bool) -> None:
    assert is_led(parse_recipe(recipe), on_gpus=on_gpus) == led

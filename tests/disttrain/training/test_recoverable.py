"""What a run says at its start of what a lost worker would mean."""

from __future__ import annotations

import pytest

from disttrain.layout import LAUNCHED_BY
from disttrain.recipe import parse_recipe
from disttrain.training.recoverable import asks_to_continue, why_losses_do_not_end_it


@pytest.mark.parametrize(
    ("launcher", "on_lost_worker", "is_said"),
    [("disttrain node", "stop", False), ("torchrun", "stop", True), ("torchrun", "continue", False)],
)
def test_a_launcher_that_restarts_all_the_same_is_named(
    launcher: str, on_lost_worker: str, is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHED_BY, launcher)
    recipe = parse_recipe({"parallel": {"on_lost_worker": on_lost_worker}})
    assert (why_losses_do_not_end_it(recipe) is not None) == is_said


@pytest.mark.parametrize(
    ("launcher", "parallel", "continues"),
    [
        ("disttrain", {"exact": True}, True),
        ("disttrain", {"exact": True, "on_lost_worker": "restart"}, False),
        ("disttrain", {"exact": True, "on_lost_worker": "stop"}, False),
        ("disttrain", {"exact": True, "strategy": "fsdp"}, False),
        ("disttrain", {}, False),
        ("disttrain node", {"exact": True}, False),
        ("disttrain node", {"exact": True, "on_lost_worker": "continue"}, True),
        ("torchrun", {"exact": True}, False),
    ],
)
def test_what_is_the_default(
    launcher: str, parallel: dict[str, object], continues: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHED_BY, launcher)
    assert asks_to_continue(parse_recipe({"parallel": parallel})) == continues

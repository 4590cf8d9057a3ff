"""What a run says at its start of what a lost worker would mean."""

from __future__ import annotations

import pytest

from disttrain.layout import LAUNCHED_BY, VERDICTS
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
    ("gives_verdicts", "parallel", "continues"),
    [
        (True, {"exact": True}, True),
        (True, {"exact": True, "on_lost_worker": "restart"}, False),
        (True, {"exact": True, "on_lost_worker": "stop"}, False),
        (True, {"exact": True, "strategy": "fsdp"}, False),
        (True, {}, False),
        (False, {"exact": True}, False),
        (False, {"exact": True, "on_lost_worker": "continue"}, True),
    ],
)
def test_what_is_the_default(
    gives_verdicts: bool, parallel: dict[str, object], continues: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VERDICTS, raising=False)
    if gives_verdicts:
        monkeypatch.setenv(VERDICTS, "5")
    assert asks_to_continue(parse_recipe({"parallel": parallel})) == continues

"""Whether workers compute the same is seen from what they have loaded, not from what the recipe calls it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from disttrain.recipe import parse_recipe
from disttrain.training.sources import sources_of, why_unlike


def test_an_edited_module_and_an_edited_recipe_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a_model_of_mine.py"
    path.write_text("WIDTH = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("a_model_of_mine")
    recipe = {"optim": {"lr": 0.1}, "data": {"root": "/here"}}
    before = sources_of(parse_recipe(recipe))
    path.write_text("WIDTH = 2\n")
    edited = sources_of(parse_recipe(recipe))
    assert why_unlike([before, before]) is None
    assert why_unlike([before, before, edited]) == "a_model_of_mine of rank 2 differs from that of rank 0"
    del sys.modules["a_model_of_mine"]
    assert why_unlike([before, sources_of(parse_recipe(recipe))]) is None, "what only one has loaded is not compared"

    moved = sources_of(parse_recipe(recipe | {"data": {"root": "/there"}}))
    other = sources_of(parse_recipe(recipe | {"optim": {"lr": 0.2}}))
    assert why_unlike([before, moved]) is None
    assert why_unlike([before, other]) == "the recipe of rank 1 differs from that of rank 0"
    assert before["torch"] == torch.__version__
    assert not any(name.startswith("torch.") for name in before)

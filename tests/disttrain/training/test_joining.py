"""A worker that comes to a run under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe
from disttrain.runs.rundir import refuse_edited_recipe, store_recipe
from disttrain.training.given import Given
from disttrain.training.joining import open_joining


def test_a_recipe_that_was_edited_since_the_run_began_is_refused(tmp_path: Path) -> None:
    """With another learning rate its weights would be others than those of the rest, and nothing would say so."""
    run = load_recipe("digits", ["parallel.exact=true"])
    store_recipe(tmp_path, run)
    edited = load_recipe("digits", ["parallel.exact=true", "optim.lr=0.5", "train.epochs=16"])
    unused: Any = None
    with (
        pytest.raises(ConfigurationError, match=r"optim.lr was 0\.05, now 0\.5; train.epochs was 15, now 16\."),
        open_joining(edited, unused, tmp_path, Given(), unused),
    ):
        pass
    of_another_machine = load_recipe("digits", ["parallel.exact=true", "data.root=/elsewhere", "tracking.uri=none"])
    refuse_edited_recipe(run.model_dump(mode="json"), of_another_machine)

"""What a run does with an error that may come from the loss of a worker; the losses themselves: tests/launch/local."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

from disttrain.recipe import as_recipe
from disttrain.training.recovery import Recovery


class Failure(RuntimeError):
    pass


def test_an_error_that_ends_the_run_is_not_held_by_its_own_frames() -> None:
    """As long as it is held, so are the job and its process group, for whose end the other ranks wait."""
    job: Any = SimpleNamespace(recipe=as_recipe({"name": "mine"}), world=SimpleNamespace(group=None))
    others: Any = SimpleNamespace(saver=SimpleNamespace())
    recovery = Recovery(job, others, others, None)

    def fit() -> None:
        try:
            raise Failure
        except RuntimeError as error:
            recovery.survive(error)

    gc.disable()
    try:
        fit()
    except Failure as error:
        held = weakref.ref(error)
    finally:
        gc.enable()
    assert held() is None

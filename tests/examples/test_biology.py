"""examples/biology: cell nuclei, and the expression of genes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from disttrain.errors import ConfigurationError
from tests.examples.running import QUIET, few_steps, final_metrics, same_bits

Enter = Callable[[str], Path]
Promised = Callable[[str, str], tuple[str, dict[str, float]]]
needs_scanpy = pytest.mark.skipif(find_spec("scanpy") is None, reason="the cells come with scanpy")


def test_nuclei(enter: Enter) -> None:
    enter("biology")
    losses, metrics = few_steps("nuclei.toml", 15)
    assert losses[-1] < 0.8 * losses[0]
    assert metrics["auc"] > 0.9

    from nuclei import Diagnosis

    sums = {"loss": torch.tensor(2.0), "logits": [3.0, 1.0, -1.0, -2.0], "malignant": [1.0, 0.0, 1.0, 0.0]}
    assert Diagnosis().metrics(sums, 4) == {"loss": 0.5, "auc": 0.75, "sensitivity": 0.5, "specificity": 0.5}


def test_cell_types_count_alike(enter: Enter) -> None:
    enter("biology")
    from cells import CellType

    score = CellType().score(
        torch.nn.Identity(), {"genes": torch.eye(3)[[0, 0, 0, 1]], "type": torch.tensor([0, 0, 0, 2])}
    )
    assert (score["right"].tolist(), score["cells"].tolist()) == ([3, 0, 0], [3, 0, 1])
    metrics = CellType().metrics(score, 4)
    assert (metrics["accuracy"], metrics["balanced_accuracy"]) == (0.75, 0.5)


def test_without_scanpy_cells_say_what_to_install(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    enter("biology")
    monkeypatch.setitem(sys.modules, "scanpy", None)
    from disttrain import train

    with pytest.raises(ConfigurationError, match="pip install scanpy"):
        train("cells.toml", overrides=QUIET, run_dir=Path("runs/cells"))


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["nuclei.toml", pytest.param("cells.toml", marks=needs_scanpy)])
def test_what_the_readme_promises(recipe: str, enter: Enter, promised: Promised) -> None:
    enter("biology")
    command, expected = promised("biology", recipe)
    assert final_metrics(command) == pytest.approx(expected, abs=0.04)
    assert same_bits(recipe)

"""The programs in the documentation run as they stand there."""

from __future__ import annotations

import ast
import math
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

import disttrain
from disttrain.recipe import parse_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The page's programs in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_program_of_the_python_page_trains(tmp_path: Path) -> None:
    program = blocks((DOCS / "python.md").read_text(encoding="utf-8"), "python")[0]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    assert "digits: Sequential (650 parameters) on 1,400 training and 397 test samples" in done.stdout
    accuracy, run_dir = done.stdout.splitlines()[-1].split()
    assert (float(accuracy) > 0.5, run_dir) == (True, str(tmp_path / "runs/mine"))


def test_the_task_of_the_readme_trains_as_a_program_and_from_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "my_task.py").write_text(blocks(readme, "python")[0])
    (tmp_path / "progression.toml").write_text(blocks(readme, "toml")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runpy.run_path("my_task.py", run_name="__main__")
    metrics = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert (metrics.keys(), metrics["mae"] < 0.7) == ({"loss", "mae"}, True), metrics
    overrides = ["train.max_steps=3", "train.threads=1", "tracking.system_metrics=false"]
    result = disttrain.train("progression.toml", overrides=overrides, run_dir=tmp_path / "run")
    assert (result.step, result.metrics.keys()) == (3, {"loss", "mae"})


def test_the_network_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = blocks(readme, "python")[1]
    (name,) = re.findall(r"disttrain train digits -n 2 -o (model\.name=\S+)", readme)
    (tmp_path / "my_net.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [name, "train.max_steps=3", "train.threads=1", "tracking.uri=none", "tracking.system_metrics=false"]
    assert disttrain.train("digits", overrides=overrides, run_dir=tmp_path / "run").step == 3
    assert len([line for line in program.splitlines() if line]) <= 15


def an_example_of(kind: str) -> tuple[nn.Module, list[Any]]:
    """A model and 24 samples that the task of the page on tasks is for."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 6, (24,), generator=draw).tolist()
    if kind == "Regression":
        return nn.Linear(3, 1), [(torch.rand(3, generator=draw), torch.rand((), generator=draw)) for _ in sizes]
    if kind == "NextToken":
        return nn.Embedding(7, 7), [torch.randint(7, (size,), generator=draw) for size in sizes]
    if kind == "Detection":
        centres = [torch.randint(8, (size - 2, 2), generator=draw) for size in sizes]  # of some images none
        return nn.Conv2d(3, 1, 3, padding=1), [(torch.rand(3, 8, 8, generator=draw), its) for its in centres]
    assert kind == "Speech"
    letters = [torch.randint(1, 5, (size,), generator=draw) for size in sizes]
    return nn.Linear(4, 5), [(torch.rand(3 * len(its), 4, generator=draw), its) for its in letters]


@pytest.mark.parametrize("title", ["Regression", "Language modeling", "Detection", "Speech, with CTC"])
def test_the_tasks_of_the_page_on_tasks_train(title: str, tmp_path: Path) -> None:
    """In exact mode, with padding, images without objects and a last batch that is smaller."""
    page = (DOCS / "tasks.md").read_text(encoding="utf-8")
    (program,) = blocks(page.partition(f"\n### {title}\n")[2].partition("\n#")[0], "python")
    assert len([line for line in program.splitlines() if line]) <= 16, "15 lines and the class's own"
    names: dict[str, Any] = {"disttrain": disttrain, "torch": torch, "F": functional, "pad_sequence": pad_sequence}
    exec(program, names)
    kind = re.findall(r"class (\w+)", program)[0]
    model, samples = an_example_of(kind)
    recipe = {
        "data": {"batch_size": 10, "workers": 0},
        "train": {"epochs": 3, "threads": 1},
        "parallel": {"exact": True, "slices": 2},
        "tracking": {"uri": "none", "system_metrics": False},
    }
    sets = {"train_set": samples[:18], "test_set": samples[18:]}
    result = disttrain.train(recipe, run_dir=tmp_path / "run", task=names[kind](), model=model, **sets)
    assert (result.step, math.isfinite(result.metrics["loss"])) == (6, True)


def test_the_task_of_the_page_on_tasks_reads_and_predicts(tmp_path: Path) -> None:
    page = (DOCS / "tasks.md").read_text(encoding="utf-8")
    section = page.partition("\n## `predict`, `read` and `export`\n")[2].partition("\n## ")[0]
    names: dict[str, Any] = {"disttrain": disttrain, "F": functional}
    exec(blocks(section, "python")[0], names)
    (tmp_path / "new.csv").write_text("1,2\n3,4\n")
    task, model = names["Prices"](), nn.Linear(2, 1)
    batch = task.collate(task.read(str(tmp_path / "new.csv")))
    expected = model(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).squeeze(1)
    assert task.predict(model, batch) == expected.tolist()
    assert task.loss(model, {**batch, "price": torch.zeros(2)}).item() == pytest.approx(expected.square().sum().item())


def test_the_recipes_of_the_pages_are_valid() -> None:
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    recipes = [block for page in pages for block in blocks(page.read_text(encoding="utf-8"), "toml")]
    assert len(recipes) > 5
    for recipe in recipes:
        parse_recipe(tomllib.loads(recipe))


def test_what_the_readme_points_to_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    places = re.findall(r"\]\(([^):]+)\)", readme)
    assert len(places) > 10
    assert [place for place in places if not (ROOT / place).is_file()] == []

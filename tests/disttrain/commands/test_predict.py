"""What `disttrain predict` says of mistakes in a task's `read` and `predict`, and of files that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import disttrain
from disttrain.commands import predict
from disttrain.errors import ConfigurationError, TaskError
from tests.disttrain.task.users import Regression, case


class Answering(Regression):
    """A regression that reads its features from JSON, and can be told to make a mistake."""

    mistake = ""

    def model_arguments(self, train_set: Any) -> dict[str, Any]:
        return {"num_features": 10, "num_outputs": 1}

    def read(self, path: str) -> Any:
        if self.mistake == "read":
            raise KeyError("features")
        rows = [torch.tensor(row) for row in json.loads(Path(path).read_text())]
        return tuple(rows) if self.mistake == "tuple" else rows

    def predict(self, model: nn.Module, batch: torch.Tensor) -> list[float]:
        answers: list[float] = model(batch).squeeze(1).tolist()
        return {"too few": answers[1:], "too many": [*answers, 0.0]}.get(self.mistake, answers)

    def in_words(self, prediction: float) -> str:
        return str({"in_words": {}}.get(self.mistake, {0: "a number"})[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "answers"
    overrides = {
        "task": {"name": f"{__name__}:Answering"},
        "model": {"name": "mlp"},
        "train": {"max_steps": 2},
        "tracking": {"uri": "none"},
    }
    one = case("regression")
    disttrain.train(
        disttrain.Recipe.model_validate(overrides), train_set=one.train_set, test_set=one.test_set, run_dir=folder
    )
    return folder


def test_what_a_task_answers_and_what_it_does_wrong(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*files: Path) -> None:
        predict.command.main([str(run), *map(str, files), "--trust"], standalone_mode=False)

    two = tmp_path / "two.json"
    two.write_text(json.dumps([[0.5] * 10, [1.0] * 10]))
    capsys.readouterr()
    answer(two)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == [f"{two}, row 1", f"{two}, row 2"]
    with pytest.raises(
        ConfigurationError, match=r"^/.*nothing\.json: No such file or directory; give a file that can be read\.$"
    ):
        answer(two, tmp_path / "nothing.json")
    for mistake, error, words in (
        ("read", TaskError, r"^Answering\.read: KeyError: 'features' \(.*test_predict\.py:\d+\)$"),
        ("tuple", ConfigurationError, r"^Answering\.read returned a tuple: it has to return a list"),
        ("in_words", TaskError, r"^Answering\.in_words: KeyError: 0 \(.*test_predict\.py:\d+\)$"),
        ("too many", ConfigurationError, r"^Answering\.predict returned 3 answers for 2 samples"),
        ("too few", ConfigurationError, r"^Answering\.predict returned 1 answers for 2 samples"),
    ):
        monkeypatch.setattr(Answering, "mistake", mistake)
        with pytest.raises(error, match=words):
            answer(two)
    monkeypatch.undo()
    monkeypatch.delattr(Answering, "read")
    with pytest.raises(
        ConfigurationError, match=r"Answering does not define read\(path\), which `disttrain predict` needs"
    ):
        answer(two)

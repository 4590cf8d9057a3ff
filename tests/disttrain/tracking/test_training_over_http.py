"""A real training, tracked by a real MLflow server over HTTP: everything arrives, and its model predicts as ours."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import disttrain
from disttrain.commands.locate import find_checkpoint, recipe_of, restore_model, task_of, training_set_of
from disttrain.data import load_datasets, normalise
from disttrain.distributed.world import join_world
from disttrain.recipe import load_recipe
from disttrain.testing import run_workers
from disttrain.tracking import read_journal
from tests.disttrain.tracking.conftest import MlflowServer


def test_everything_arrives_and_the_stored_model_predicts_as_ours(
    server: MlflowServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"tracking.uri={server.uri}", "tracking.experiment=over-http", "train.epochs=3"]
    options += ["schedule.name=constant"]  # a falling one could not be made longer
    first = load_recipe("digits", [*options, "train.max_steps=30"])
    run_workers(lambda: disttrain.train(first, run_dir=run_dir), 1, process_group=False)
    command = [sys.executable, "-m", "disttrain_launch", "train", "digits", "-n", "2", "--run-dir", str(run_dir)]
    command += [word for option in options for word in ("-o", option)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=480)  # the same job: the same MLflow run
    assert second.returncode == 0, second.stderr

    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("over-http")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    page = f"{server.uri}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
    assert f"MLflow      {page}?workflowType=machine_learning\n" in second.stdout
    assert run.data.params["optim.name"] == "sgd"
    assert run.data.params["data.batch_size"] == "64"
    assert run.data.tags["world_size"] == "2"
    assert run.data.tags["launcher"] == "disttrain"
    assert len(run.data.tags["git_commit"]) >= 40
    expected: dict[str, dict[int, float]] = {}
    for record in read_journal(run_dir / "journal.jsonl"):
        for name, value in record.get("metrics", {}).items():
            expected.setdefault(name, {})[record["step"]] = value
    assert {"train/loss", "train/images_per_second", "train/epoch_seconds", "eval/loss", "eval/accuracy"} <= set(
        expected
    )
    assert "system/node-0/cpu_percent" in expected
    for name, values in expected.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert {row.step: row.value for row in history} == pytest.approx(values)
        assert len(history) == len(values)
    artifacts = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    artifacts |= {entry.path for entry in client.list_artifacts(run.info.run_id, "charts")}
    assert {"recipe.toml", "evaluation.json"} <= artifacts
    charts = {"charts/learning_curves.png", "charts/confusion_matrix.png", "charts/per_class.png"}
    assert charts <= artifacts

    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/digits")
    assert model.metadata.signature is not None
    assert model.input_example is not None
    checkpoint = find_checkpoint(run_dir)
    recipe = recipe_of(checkpoint)
    with join_world("cpu") as world:
        test = load_datasets(recipe.data, world, nullcontext).test
    images = test.images[:50]  # type: ignore[union-attr]
    with torch.no_grad():
        trained_on = training_set_of(checkpoint)
        network = restore_model(checkpoint, recipe, task_of(checkpoint, recipe, trained_on), trained_on).eval()
        ours = network(normalise(images, test.mean, test.std)).softmax(1)
    theirs = np.asarray(model.predict(images.float().numpy()))
    np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-6)
    assert (theirs.argmax(1) == ours.numpy().argmax(1)).all()
    assert json.loads((run_dir / "mlflow.json").read_text())["run_id"] == run.info.run_id

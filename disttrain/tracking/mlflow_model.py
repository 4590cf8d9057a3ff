"""An exported model as an MLflow model that `mlflow.pyfunc.load_model` loads. Runs in the sender's own process."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import mlflow.pytorch
import numpy as np
import torch
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from disttrain.tracking.model import DESCRIPTION_FILE, EXPORT_FILE, example_images

_NAME = "model"
_DIGEST_TAG = "disttrain.sha256"


def log_exported_model(client: MlflowClient, run_id: str, folder: Path, digest: str, step: int) -> None:
    """Store the model that `export_model` wrote into `folder` as the model of a run, once.

    It has a signature and an input example, and is stored as a graph (`pt2`), not as a pickle. `digest` tells models
    of the same run apart. Raises MlflowException.
    """
    experiment_id = client.get_run(run_id).info.experiment_id
    for known in client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"):
        if known.tags.get(_DIGEST_TAG) == digest:
            if known.status == LoggedModelStatus.READY:
                return  # stored by a sender that was killed before it could note it
            client.delete_logged_model(known.model_id)
    description = json.loads((folder / DESCRIPTION_FILE).read_text())
    classes = [str(name) for name in description["classes"]]
    logged = client.create_logged_model(experiment_id, _NAME, run_id, {_DIGEST_TAG: digest}, model_type="classifier")
    model = Model(
        artifact_path=logged.artifact_location,
        run_id=run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        metadata={"classes": classes},
    )
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / _NAME
        save_exported_model(folder, target, model)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
        client.log_model_artifacts(logged.model_id, str(target))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)


def save_exported_model(folder: Path, target: Path, model: Model) -> None:
    """Write the exported model in `folder` as an MLflow model into the new folder `target`."""
    description = json.loads((folder / DESCRIPTION_FILE).read_text())
    shape = tuple(int(length) for length in description["sample_shape"])
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(description["classes"])))]),
    )
    version = torch.__version__.partition("+")[0]
    mlflow.pytorch.save_model(
        torch.export.load(folder / EXPORT_FILE).module(),
        str(target),
        mlflow_model=model,
        signature=signature,
        input_example=example_images(2, shape).numpy(),
        # Given here, because MLflow would else load the model in yet another process to see what it imports.
        pip_requirements=[f"mlflow=={mlflow.__version__}", f"torch=={version}", f"numpy=={np.__version__}"],
        serialization_format="pt2",
    )
    # An exported graph stays on the device it was made on. Without this, MLflow asks for the GPU where there is one,
    # and then refuses to load a graph of the CPU.
    model.flavors["python_function"]["config"]["device"] = "cpu"
    model.save(str(target / MLMODEL_FILE_NAME))

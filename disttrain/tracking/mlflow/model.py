"""An exported model as an MLflow model that `mlflow.pyfunc.load_model` loads. Runs in the sender's own process.

The exported file is stored as it is. It came from a run directory, and loading it could run code: `torch.export.load`
unpickles freely what it finds in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import yaml
from mlflow import pyfunc
from mlflow.entities import Dataset, DatasetInput, LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from disttrain.files import parse_json
from disttrain.tracking.export import EXPORT_FILE

_NAME = "model"
_NOT_IN_NAMES = re.compile(r"[/:.%\"']")
_DIGEST_TAG = "disttrain.sha256"
_VERSION = re.compile(r"\d+\.\d+[\w.+]*")
_MOST_NUMBERS = 2**26
_DTYPES = ("float32", "float64", "int64", "int32", "uint8", "bool")
# Where MLflow's flavour for PyTorch looks for an exported graph, in the folder of a model.
_DATA = "data"
_CONDA, _PYTHON, _PIP = "conda.yaml", "python_env.yaml", "requirements.txt"
_EXAMPLE, _SERVING_EXAMPLE = "input_example.json", "serving_input_example.json"


def log_exported_model(
    client: MlflowClient, run_id: str, exported: Path, description: dict[str, Any], digest: str, step: int
) -> None:
    """Store the file that `export_model` wrote, and that `description` describes, as the model of a run, once.

    It has a signature and an input example, and is stored as a graph (`pt2`), not as a pickle. `digest` distinguishes
    models of the same run. Raises MlflowException.
    """
    run = client.get_run(run_id)
    experiment_id = run.info.experiment_id
    for known in client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"):
        if known.tags.get(_DIGEST_TAG) == digest:
            if known.status == LoggedModelStatus.READY:
                return  # stored by a sender that was killed before it could note it
            client.delete_logged_model(known.model_id)
    name = model_name(run.data.params.get("name", ""))
    kind = "classifier" if description["classes"] else None
    logged = client.create_logged_model(experiment_id, name, run_id, {_DIGEST_TAG: digest}, model_type=kind)
    model = Model(
        artifact_path=logged.artifact_location,
        run_id=run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        metadata={"classes": description["classes"]} if description["classes"] else None,
    )
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / _NAME
        save_exported_model(exported, description, target, model)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
        client.log_model_artifacts(logged.model_id, str(target))
    _attach_evaluation(client, run, logged.model_id)
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)


def model_name(recipe: str) -> str:
    """What MLflow calls the model of a recipe of this name."""
    return _NOT_IN_NAMES.sub("_", recipe) or _NAME


def _attach_evaluation(client: MlflowClient, run: Run, model_id: str) -> None:
    """Attach the run's evaluation to the model, with the data set it was made on."""
    settings = {key: value for key, value in sorted(run.data.params.items()) if key.startswith("data.")}
    source = json.dumps(settings)
    # Of the settings, not of the samples: the same set, prepared in the same way.
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    data = Dataset(settings.get("data.dataset", "unknown")[:500], digest, "recipe", source)
    client.log_inputs(run.info.run_id, [DatasetInput(data)])
    rows = [
        max(client.get_metric_history(run.info.run_id, key), key=lambda row: (row.step, row.timestamp))
        for key in run.data.metrics
        if key.startswith("eval/")
    ]
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(row.key, row.value, row.timestamp, row.step, model_id, data.name, data.digest) for row in rows],
    )


def save_exported_model(exported: Path, description: dict[str, Any], target: Path, model: Model) -> None:
    """Make the new folder `target` the MLflow model of the file `exported`, which is moved there."""
    inputs, outputs = description["input"], description["output"]
    model.signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(inputs["dtype"]), tuple(inputs["shape"]))]),
        outputs=Schema([TensorSpec(np.dtype(outputs["dtype"]), tuple(outputs["shape"]))]),
    )
    model.saved_input_example_info = {
        "artifact_path": _EXAMPLE,
        "type": "ndarray",
        "serving_input_path": _SERVING_EXAMPLE,
    }
    model.add_flavor("pytorch", model_data=_DATA, pytorch_version=description["torch"], code=None)
    # An exported graph stays on the device it was made on. Without a device, MLflow asks for the GPU where there is
    # one, and then refuses to load a graph of the CPU.
    pyfunc.add_to_model(
        model,
        loader_module="mlflow.pytorch",
        data=_DATA,
        pickle_module_name="mlflow.pytorch.pickle_module",
        conda_env=_CONDA,
        python_env=_PYTHON,
        model_config={"device": "cpu"},
    )
    (target / _DATA).mkdir(parents=True)
    shutil.move(exported, target / _DATA / EXPORT_FILE)
    requirements = [f"mlflow=={mlflow.__version__}", f"torch=={description['torch'].partition('+')[0]}"]
    requirements.append(f"numpy=={np.__version__}")
    python = platform.python_version()
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
    }
    virtualenv = {
        "python": python,
        "build_dependencies": ["pip", "setuptools", "wheel"],
        "dependencies": [f"-r {_PIP}"],
    }
    example = description["example"]
    contents = {
        _CONDA: yaml.safe_dump(conda, sort_keys=False),
        _PYTHON: yaml.safe_dump(virtualenv, sort_keys=False),
        _PIP: "\n".join(requirements),
        _EXAMPLE: json.dumps(example),
        _SERVING_EXAMPLE: json.dumps({"inputs": example}),
    }
    for name, text in contents.items():
        (target / name).write_text(text, encoding="utf-8")
    model.model_size_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    model.save(str(target / MLMODEL_FILE_NAME))


def read_description(file: Path) -> dict[str, Any]:
    """What `export_model` wrote of a model, checked: it may come from anywhere. Raises ValueError."""
    found = parse_json(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} does not describe a model")
    classes, version = found.get("classes", []), found.get("torch")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{file.name} does not describe a model")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise ValueError(f"{file.name} does not describe a model")
    described = {"classes": classes, "torch": version}
    shape = found.get("sample_shape")
    if isinstance(shape, list) and _is_shape(shape) and len(shape) == 3:  # images
        inputs, outputs = ({"shape": [-1, *rest], "dtype": "float32"} for rest in (shape, [len(classes)]))
        images = _example_images(shape, are_pixels=found.get("mean", ()) is not None)
        return described | {"input": inputs, "output": outputs, "example": images}
    kinds = [found.get("inputs"), found.get("outputs")]
    if not all(isinstance(kind, list) and len(kind) == 1 and _is_kind(kind[0]) for kind in kinds):
        raise ValueError(f"{file.name} does not describe a model of one input and one output")
    inputs, outputs = kinds[0][0], kinds[1][0]  # type: ignore[index]
    zeros = np.zeros((2, *inputs["shape"][1:]), inputs["dtype"]).tolist()
    return described | {"input": inputs, "output": outputs, "example": zeros}


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(type(length) is int and length > 0 for length in value)
        and math.prod(value) <= _MOST_NUMBERS
    )


def _is_kind(value: Any) -> bool:
    """Shape and type of a batch, as `export_model` writes them."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("shape"), list)
        and value["shape"][:1] == [-1]
        and _is_shape(value["shape"][1:])
        and value.get("dtype") in _DTYPES
    )


def _example_images(shape: list[int], *, are_pixels: bool) -> list[Any]:
    """Two images of a smooth ramp of grey, one the negative of the other, as `disttrain.tracking.export` has them."""
    ramp = np.linspace(0, 255, math.prod(shape), dtype=np.float32).round().reshape(shape)
    images = np.stack([ramp, 255 - ramp])
    examples: list[Any] = (images if are_pixels else images / 127.5 - 1).tolist()
    return examples

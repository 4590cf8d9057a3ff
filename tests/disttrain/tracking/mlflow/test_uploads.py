"""A run directory may come from anywhere: nothing in it is loaded, and no file from elsewhere is sent."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.tracking.mlflow.uploads import upload
from tests.disttrain.tracking.exported import export_images


class Mlflow:
    """In place of MLflow's client: keeps what it is sent, by place."""

    def __init__(self) -> None:
        self.received: dict[str, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        """Whatever else is told or asked: there is nothing yet."""
        return lambda *_, **__: []

    def get_run(self, run_id: str) -> Any:
        info = SimpleNamespace(experiment_id="1", run_id=run_id)
        return SimpleNamespace(info=info, data=SimpleNamespace(params={}, metrics={}, tags={}))

    def create_logged_model(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(model_id="m-1", artifact_location="mlflow-artifacts:/1")

    def log_model_artifacts(self, model_id: str, folder: str) -> None:
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        self.received |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        self.received[f"{folder or ''}/{Path(path).name}".lstrip("/")] = Path(path).read_bytes()


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.place),)


def sent(run_dir: Path, kind: str, path: str) -> tuple[Mlflow, list[str]]:
    """What MLflow gets for a record of the journal, and what the user sees."""
    client, said = Mlflow(), []
    upload(client, run_dir, "r-1", {"kind": kind, "path": path}, {}, said.append)  # type: ignore[arg-type]
    return client, said


def test_a_model_is_sent_as_it_is_and_never_loaded(tmp_path: Path) -> None:
    """`torch.export.load` unpickles the sample inputs in the file, and with them whatever is in their place."""
    run_dir, proof = tmp_path / "run", tmp_path / "code has run"
    run_dir.mkdir()
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert export_images(run_dir / "model", network, None, None, ["a", "b"], (3, 2, 2)) is None
    exported, hostile = run_dir / "model" / "model.pt2", io.BytesIO()
    with zipfile.ZipFile(exported) as good, zipfile.ZipFile(hostile, "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("data/sample_inputs/model.pt"):
                torch.save(Payload(proof), replacement := io.BytesIO())
                content = replacement.getvalue()
            bad.writestr(name, content)
    exported.write_bytes(hostile.getvalue())
    client, said = sent(run_dir, "model", "model")
    assert not proof.exists()
    assert client.received["data/model.pt2"] == hostile.getvalue()
    assert {"MLmodel", "conda.yaml", "requirements.txt", "input_example.json"} <= client.received.keys()
    assert said == []
    proof.mkdir()
    with pytest.raises(FileExistsError):  # so the code would have run
        torch.export.load(exported)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"classes": 1}', '{"classes": [], "sample_shape": [9, 9], "torch": ""}']
)
def test_a_model_without_a_description_is_told_of_once(tmp_path: Path, content: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.pt2").write_bytes(b"graph")
    (tmp_path / "model" / "model.json").write_text(content)
    client, said = sent(tmp_path, "model", "model")
    assert client.received == {}
    assert len(said) == 1
    assert "model/model.pt2" in said[0]


def a_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def a_linked_folder(path: Path, secret: Path) -> None:
    path.parent.rmdir()
    path.parent.symlink_to(secret.parent)
    shutil.copy(secret, secret.parent / path.name)


def a_pipe(path: Path, secret: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("hide", [a_link, a_linked_folder, a_pipe])
@pytest.mark.parametrize(
    ("kind", "record", "file"),
    [
        ("model", "model", "model/model.safetensors"),
        ("model", "model", "model/model.pt2"),
        ("artifact", "sub/notes.txt", "sub/notes.txt"),
    ],
)
def test_no_file_from_elsewhere_is_sent(
    tmp_path: Path, hide: Callable[[Path, Path], None], kind: str, record: str, file: str
) -> None:
    secret = tmp_path / "elsewhere" / "secret"
    secret.parent.mkdir()
    secret.write_text("secret")
    hidden = tmp_path / "run" / file
    hidden.parent.mkdir(parents=True)
    hide(hidden, secret)
    (hidden.parent / "model.json").write_text("{}")
    client, said = sent(tmp_path / "run", kind, record)
    assert client.received == {}
    assert len(said) == 1
    assert file.partition("/")[0] in said[0]
    assert "was not sent to MLflow" in said[0]


def test_a_run_directory_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("notes")
    (tmp_path / "latest").symlink_to("run")
    client, said = sent(tmp_path / "latest", "artifact", "notes.txt")
    assert (client.received, said) == ({"notes.txt": b"notes"}, [])

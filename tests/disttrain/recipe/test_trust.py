"""A run may be a stranger's: what it names is imported, and what it names is sent to, only if its user says so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import disttrain
from disttrain.checkpoint import CheckpointStore
from disttrain.commands import evaluate, predict, sync
from disttrain.commands.locate import find_checkpoint, recipe_of
from disttrain.errors import ConfigurationError
from disttrain.recipe import RecipeError, ask_before_sending, is_own_recipe, load_recipe, parse_recipe, to_toml
from disttrain.runs.rundir import resume_command
from disttrain.tracking import Backlog, deliver, resolve_uri
from disttrain.tracking.mlflow.delivery_state import DeliveryState

OVERRIDES = ("tracking.uri=none", "train.device=cpu", "train.max_steps=1", "model.name=nets_of_a_stranger:Net")


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that can be imported; importing it makes the file that is returned."""
    proof = tmp_path / "code has run"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "nets_of_a_stranger.py").write_text(
        f"from pathlib import Path\nfrom disttrain.models.net import Net\nPath({str(proof)!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield proof
    sys.modules.pop("nets_of_a_stranger", None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose own recipe names code."""
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    recipe = load_recipe("digits", OVERRIDES)
    (folder / "recipe.toml").write_text(to_toml(recipe))
    (folder / "journal.jsonl").write_text('{"kind": "status", "status": "KILLED", "time": 1}\n')
    data = {"num_train": 9, "classes": ["a", "b"], "sample_shape": [1, 8, 8], "mean": [0.5], "std": [0.5]}
    state = {"step": 1, "recipe": recipe.model_dump(mode="json"), "metrics": {}, "data": data}
    CheckpointStore(folder / "checkpoints").save({"weight": torch.zeros(2)}, {}, state)
    return folder


def test_commands_ask_before_they_import_what_a_run_names(run: Path, code: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    for command, arguments in ((evaluate.command, []), (predict.command, [str(tmp_path / "picture.png")])):
        result = CliRunner().invoke(command, [str(run), *arguments])
        assert isinstance(result.exception, ConfigurationError)
        assert "model.name = 'nets_of_a_stranger:Net'" in str(result.exception)
        assert "--trust" in str(result.exception)
        assert not code.exists()
        trusted = CliRunner().invoke(command, [str(run), *arguments, "--trust"])
        assert "--trust" not in str(trusted.exception)  # the next thing is wrong: its set, its picture


def test_what_the_user_names_is_not_asked_about(run: Path) -> None:
    checkpoint = find_checkpoint(run)
    assert recipe_of(checkpoint, ("model.name = mine:Net",)).model.name == "mine:Net"
    assert recipe_of(checkpoint, ("model.name=net",)).model.name == "net"
    with pytest.raises(ConfigurationError, match=r"state.json names code .* model.name"):
        recipe_of(checkpoint, ("data.dataset=mine:sets",))


def test_resuming_by_the_runs_own_recipe_asks(run: Path, code: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"names code that would be imported and run.*Add --trust"):
        disttrain.train(str(run / "recipe.toml"), run_dir=run)
    assert not code.exists()
    assert resume_command(run) == f"disttrain train --run-dir {run} --trust"


def test_the_users_own_recipe_and_a_word_of_trust_are_enough(run: Path, code: Path, tmp_path: Path) -> None:
    """Both get as far as to build the model, whose checkpoint is not a real one."""
    (tmp_path / "mine.toml").write_text((run / "recipe.toml").read_text())
    for recipe, trust in ((tmp_path / "mine.toml", False), (run / "recipe.toml", True)):
        sys.modules.pop("nets_of_a_stranger", None)
        with pytest.raises(ConfigurationError, match=r"state\.json"):
            disttrain.train(str(recipe), run_dir=run, trust=trust)
        assert code.exists()
        code.unlink()


@pytest.mark.parametrize("name", ["net", "torchvision:resnet18"])
def test_what_is_shipped_needs_no_trust(run: Path, name: str) -> None:
    recipe_of(find_checkpoint(run), (f"model.name={name}",))
    (run / "recipe.toml").write_text(to_toml(load_recipe("digits", [f"model.name={name}"])))
    assert resume_command(run) == f"disttrain train --run-dir {run}"


def test_whose_recipe_it_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    (run.parent / "latest").symlink_to("run")
    assert is_own_recipe("run/recipe.toml", run)
    assert is_own_recipe("latest/../run/recipe.toml", "latest")
    assert is_own_recipe("s3://bucket/run/recipe.toml", "s3://bucket/run/")
    assert not is_own_recipe("mine.toml", "run")
    assert not is_own_recipe("digits", "run")
    assert not is_own_recipe("run/recipe.toml", "other")
    assert not is_own_recipe("run/recipe.toml", None)


SERVER = "http://tracking.example.org:5000"
Syncer = Callable[..., "str | None"]


@pytest.fixture
def synced(run: Path, monkeypatch: pytest.MonkeyPatch) -> Syncer:
    """Tries `disttrain sync` of a run that names a server: where it would go, or None if it is refused."""

    def try_it(uri: str, *arguments: str) -> str | None:
        DeliveryState(uri=uri, experiment="e").save(run)
        went: list[str] = []

        def deliver(folder: Path, target: str, *_: object) -> Backlog:
            went.append(target)
            return Backlog()

        monkeypatch.setattr("disttrain.tracking.deliver", deliver)
        result = CliRunner().invoke(sync.command, [str(run), *arguments])
        assert bool(went) != isinstance(result.exception, ConfigurationError), result.exc_info
        if not went:
            assert f"--uri {uri}" in str(result.exception)
        return went[0] if went else None

    return try_it


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"])
def test_credentials_go_only_where_the_user_says(synced: Syncer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    here = "http://127.0.0.1:5000"
    assert synced(here) == here
    monkeypatch.setenv(name, "secret")
    assert synced(here) is None
    assert synced(SERVER) is None
    assert synced(SERVER, "--uri", SERVER) == SERVER
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{SERVER.replace('//', '//me:secret@')}/")
    assert synced(SERVER) == SERVER
    assert synced("http://elsewhere.example.org:5000") is None


def test_python_is_no_way_around(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DeliveryState(uri=SERVER, experiment="e").save(run)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    with pytest.raises(ConfigurationError, match="pass it as `uri`"):
        deliver(run)


def test_so_do_those_that_mlflow_keeps(synced: Syncer, tmp_path: Path) -> None:
    (tmp_path / "home" / ".mlflow").mkdir(parents=True)
    (tmp_path / "home" / ".mlflow" / "credentials").touch()
    assert synced(SERVER) is None


def test_a_server_that_the_run_alone_names_is_asked_about(synced: Syncer, run: Path) -> None:
    # It tells MLflow's client where to write files, and may answer file:///home/me with a run that has a .bashrc.
    assert synced(SERVER) is None
    assert synced(SERVER, "--uri", SERVER) == SERVER
    (run / "recipe.toml").write_text(to_toml(load_recipe("digits", [f"tracking.uri={SERVER}"])))
    assert resume_command(run) == f"disttrain train --run-dir {run} --trust"


def test_a_database_elsewhere_is_asked_about(synced: Syncer, run: Path, tmp_path: Path) -> None:
    beside = f"sqlite:///{run.parent}/mlflow.db"
    assert synced(beside) == beside
    assert synced(f"sqlite:///{tmp_path}/precious.db") is None


@pytest.mark.parametrize("name", ["a%20b", "a?b", "a#b"])
def test_a_database_beside_the_run_is_its_own_whatever_the_folder_is_called(tmp_path: Path, name: str) -> None:
    uri = resolve_uri(None, tmp_path / name / "run")
    assert uri is not None
    ask_before_sending(uri, tmp_path / name / "run", "")
    with pytest.raises(ConfigurationError, match=f"names the MLflow server sqlite:///{tmp_path}/precious.db, which"):
        ask_before_sending(f"sqlite:///{tmp_path}/precious.db", tmp_path / name / "run", "")


def test_resuming_asks_about_the_server_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    (run / "recipe.toml").write_text(to_toml(load_recipe("digits", [f"tracking.uri={SERVER}"])))
    with pytest.raises(ConfigurationError, match=rf"{SERVER}, which would get your MLflow credentials .*TOKEN"):
        disttrain.train(str(run / "recipe.toml"), run_dir=run)


@pytest.mark.parametrize(
    "uri",
    [
        "http://TOKEN@host:5000", "HTTPS://token@host", "https://user:pass@host", "postgresql://me:secret@host/runs",
        "http://user:p@ss@host", "postgresql://host/runs?user=me&password=secret", "https://host/?access_token=abc",
    ],
)  # fmt: skip
def test_no_secret_gets_into_a_recipe(uri: str) -> None:
    with pytest.raises(RecipeError, match="holds a password or a token") as refused:
        parse_recipe({"tracking": {"uri": uri}})
    assert not any(secret in str(refused.value) for secret in ("TOKEN", "secret", "ss@", "abc"))


@pytest.mark.parametrize("uri", ["http://host:5000", "postgresql://me@host/runs", "sqlite:////a@b/c.db", "databricks"])
def test_an_address_without_one_does(uri: str) -> None:
    assert parse_recipe({"tracking": {"uri": uri}}).tracking.uri == uri

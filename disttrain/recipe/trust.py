"""What a run names and its user did not: code that would be imported, a server that would be sent to.

A run directory or a checkpoint may be a stranger's, and its recipe with it. A recipe that is given on the command line
is the user's own; that of a run is not, and anything unusual that it asks for needs the user's trust.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

from disttrain.errors import ConfigurationError
from disttrain.layout import DATABASE, RECIPE
from disttrain.recipe.address import is_text, is_url, working_folder
from disttrain.recipe.model import Recipe
from disttrain.recipe.names import TORCHVISION, is_reference

_OF_MLFLOW = (
    "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
)  # fmt: skip
KEYS_OF_CODE = ("task.name", "model.name", "data.dataset")
"""The keys that may name code to import, in training and in evaluation."""
HOOKS = "train.hooks"
"""As those, in training alone."""
_FILE_OF_MLFLOW = "~/.mlflow/credentials"


def names_code(recipe: Recipe) -> dict[str, str]:
    """What the recipe has imported that does not come with disttrain: `package.module:callable` by key."""
    named = {"task.name": recipe.task.name, "model.name": recipe.model.name, "data.dataset": recipe.data.dataset}
    code = {key: name for key, name in named.items() if is_reference(name) and not name.startswith(TORCHVISION)}
    return code | ({HOOKS: ", ".join(recipe.train.hooks)} if recipe.train.hooks else {})


def ask_before_importing(
    recipe: Recipe, source: str, overrides: Sequence[str] = (), keys: Sequence[str] = KEYS_OF_CODE
) -> None:
    """Raise ConfigurationError if the recipe, which a run or checkpoint holds, names code at one of `keys`.

    `source` names its place in the message; a key that is among the user's own `overrides` is not questioned.
    """
    own = {override.partition("=")[0].strip() for override in overrides}
    named = {key: name for key, name in names_code(recipe).items() if key in keys}
    if named and recipe.code is not None:
        named["code"] = recipe.code  # what the user names instead would be looked for there, too
    code = [f"{key} = {name!r}" for key, name in named.items() if key not in own]
    if code:
        raise ConfigurationError(
            f"{source} names code that would be imported and run: {', '.join(code)}. Add --trust if you know where it "
            "comes from."
        )


def ask_before_sending(uri: str, address: str | Path, remedy: str) -> None:
    """Raise ConfigurationError before what is not the run's own goes to an MLflow server that the run alone names.

    Which is the credentials of this user, if there are any; for a database, tables in a file that may lie anywhere; and
    for a server all files, since it decides where MLflow's client writes them, which may be any folder here. Exempt
    are the server of MLFLOW_TRACKING_URI, the database beside the run at `address` and, without credentials, a
    server of this machine. The message ends with `remedy`.
    """
    if is_named_by_user(uri) or is_beside(uri, address):
        return
    if uri.startswith(("http://", "https://")):
        found = _credentials(os.environ)
        if not found and _is_of_this_machine(uri):
            return
        decides = "would decide where its files are written, on this machine, too"
        what = f"would get your MLflow credentials ({found})" if found else decides
    else:
        what = "would be written to"
    raise ConfigurationError(
        f"{address}: the run names the MLflow server {_without_userinfo(uri)}, which {what}. If you trust it, {remedy}."
    )


def ask_before_resuming(recipe: Recipe, run_dir: str | Path, overrides: Sequence[str] = ()) -> None:
    """Raise ConfigurationError if the recipe in `run_dir`, where the run is resumed with that, needs more trust."""
    ask_before_importing(recipe, f"{run_dir}: the run's recipe", overrides, (*KEYS_OF_CODE, HOOKS))
    own = {override.partition("=")[0].strip() for override in overrides}
    if recipe.tracking.uri not in (None, "none") and "tracking.uri" not in own:
        ask_before_sending(str(recipe.tracking.uri), run_dir, "add --trust, or set MLFLOW_TRACKING_URI")


def is_own_recipe(recipe: str, run_dir: str | Path | None) -> bool:
    """Whether the recipe at this path or URL is the one that is kept in the run directory."""
    if run_dir is None:
        return False
    kept = f"{str(run_dir).rstrip('/')}/{RECIPE}"
    if is_url(recipe) or is_url(str(run_dir)):
        return recipe == kept
    return os.path.realpath(recipe) == os.path.realpath(kept)


def is_named_by_user(uri: str) -> bool:
    """Whether it is the MLflow server or database of MLFLOW_TRACKING_URI."""
    return _without_userinfo(uri) == _without_userinfo(os.environ.get("MLFLOW_TRACKING_URI", ""))


def is_beside(uri: str, address: str | Path) -> bool:
    """Whether this is the database that a run gets by default, in the folder that holds it."""
    folder = working_folder(str(address)) if is_url(str(address)) else Path(os.path.abspath(address))
    default = folder.parent / DATABASE
    file = uri.removeprefix("sqlite:///")
    if is_text(str(default)) and file == quote(str(default), safe=" +/"):
        return True  # as SQLAlchemy writes a path with % or ? in it
    try:
        return file != uri and os.path.realpath(file) in (
            os.path.realpath(default),
            os.path.realpath(folder.resolve().parent / DATABASE),
        )
    except ValueError:  # a name that no file can have
        return False


def _credentials(environment: Mapping[str, str]) -> str:
    """Where MLflow would find a user's credentials; empty if nowhere."""
    found = [name for name in _OF_MLFLOW if environment.get(name)]
    if os.path.exists(os.path.expanduser(_FILE_OF_MLFLOW)):
        found.append(_FILE_OF_MLFLOW)
    return ", ".join(found)


def _without_userinfo(uri: str) -> str:
    if not uri.startswith(("http://", "https://")):
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def _is_of_this_machine(uri: str) -> bool:
    try:
        return urlsplit(uri).hostname in ("127.0.0.1", "localhost", "::1")
    except ValueError:
        return False

"""The run directory: everything of one job, across all its restarts and all world sizes."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from disttrain.distributed.launched import NODE_LAUNCHER, launched_by, launcher_options
from disttrain.errors import ConfigurationError, RecipeError
from disttrain.files import make_folder, open_to_append, refuse_irregular, replace_file
from disttrain.layout import (
    CHARTS,
    CHECKPOINTS,
    DELIVERED,
    EVALUATION,
    EXPORTED,
    JOURNAL,
    LOGS,
    OF_A_KILLED_START,
    RECIPE,
    SPIKES,
    STEP,
    STOP,
    log_file,
)
from disttrain.recipe import Recipe, ask_before_resuming, damage, load_recipe, recipe_of_checkpoints, to_toml
from disttrain.recipe.address import is_url, working_folder
from disttrain.runs.lock import PATIENCE_S, owned
from disttrain.runs.log import LogFile

# What a run writes, besides hidden files: nothing of it may be a link, which would lead the run elsewhere.
_FILES = (RECIPE, JOURNAL, EVALUATION, SPIKES, STOP, DELIVERED)
_FOLDERS = (CHECKPOINTS, LOGS, CHARTS, EXPORTED, f".{EXPORTED}.tmp")

# What may change when a run resumes: where things are, how long, how many, how it is watched; never what is learned.
_MAY_CHANGE = {
    "code",
    "data.root", "data.verify", "data.download", "data.layout", "data.workers",
    "train.epochs", "train.max_steps", "train.device", "train.threads", "train.log_every_steps",
    "train.eval_every_epochs", "train.eval_batch_size", "train.hang_timeout_s", "train.compile",
    "train.deterministic", "train.compile_mode", "train.compile_any_shape",
    "train.patience", "train.min_delta",
    "train.non_finite", "train.non_finite_limit",  # or a run that ended because of them could never be resumed
    "parallel.strategy", "parallel.find_unused_parameters", "parallel.on_lost_worker", "parallel.audit_every_steps",
    "parallel.shared_memory",
    "parallel.shard_modules", "parallel.shard_size", "parallel.prefetch", "parallel.cpu_offload",
    "parallel.reshard_after_forward", "train.checkpoint_activations",
}  # fmt: skip
_SECTIONS_THAT_MAY_CHANGE = ("checkpoint.", "tracking.")
# What each machine may have for itself, while all else is the same on all workers.
_OF_A_MACHINE = {
    "name", "code", "data.root", "data.verify", "data.download", "data.layout", "data.workers", "train.device",
}  # fmt: skip
_EDITED = "{} was {}, now {}"


def new_run_dir(recipe: Recipe) -> Path:
    """Make a folder for a new run under ./runs, named after the recipe and the time, and numbered if that is taken.

    It is this run's alone, however many begin in the same second. Raises ConfigurationError if it cannot be made.
    """
    stem = f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in count(1):
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        with _usable(path), suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
    raise AssertionError("count() never ends")


@contextmanager
def owned_run_dir(
    path: Path,
    *,
    whatever_is_there: bool = False,
    patience_s: float = PATIENCE_S,
    say: Callable[[str], object] = lambda words: None,
) -> Iterator[None]:
    """Make the folder `path`, or check that it is a run's; own it while the block runs.

    Raises ConfigurationError if something else is there (unless that may be: in the working folder of a run behind a
    URL), if another process owns it for longer than `patience_s`, or if it cannot be written. `say`: as for `owned`.
    """
    stored = path / RECIPE
    with ExitStack() as until_the_end:
        with _usable(path):
            path.mkdir(parents=True, exist_ok=True)
            refuse_links(path)
            is_run = whatever_is_there or stored.exists() or recipe_of_checkpoints(path) is not None
            if not is_run and any(entry.name not in OF_A_KILLED_START for entry in path.iterdir()):
                raise ConfigurationError(
                    f"{path} is not empty and not a run directory (it has no {RECIPE}): choose another --run-dir."
                )
            until_the_end.enter_context(owned(path, patience_s, say))
        yield


def is_run(path: Path) -> bool:
    """Whether a run lives in this folder."""
    return os.path.isfile(path / RECIPE) or os.path.isdir(path / CHECKPOINTS)  # False also for impossible names


def refuse_links(run_dir: Path) -> None:
    """Raise ConfigurationError if anything that a run writes is not a plain file or folder in `run_dir`.

    The folder itself may be a link. Looks and changes nothing. Raises OSError.
    """
    if not run_dir.is_dir():
        return
    for name in _FILES:
        refuse_entry(run_dir / name)
    for name in _FOLDERS:
        refuse_entry(run_dir / name, is_folder=True)
    written = (run_dir.glob(".*"), (run_dir / CHECKPOINTS).glob(f"*{STEP}*"), (run_dir / LOGS).glob("*"))
    for entry in chain.from_iterable(written):
        refuse_entry(entry, is_folder=entry.is_dir())


def refuse_entry(path: Path, *, is_folder: bool = False) -> None:
    """Raise ConfigurationError if something else than a regular file, or a folder, is at `path`."""
    try:
        refuse_irregular(path, is_folder=is_folder)
    except OSError as error:
        raise ConfigurationError(
            f"{path}: {error.strerror or error}; a run writes only to plain files and folders of its own. Remove it, "
            "or choose another run directory."
        ) from error


def store_recipe(path: Path, recipe: Recipe) -> None:
    """Make the owned folder `path` the run directory of `recipe`: from here on no other can take it.

    To be called when everything that the recipe names has been built, so that a refused one can be corrected. Raises
    ConfigurationError if it cannot be written.
    """
    with _usable(path):
        replace_file(path / RECIPE, to_toml(recipe))


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"the run directory {path} cannot be used: {error.filename or path}: {error.strerror or error}. "
            "Choose another --run-dir."
        ) from error


def refuse_another_job(path: Path, recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Raise ConfigurationError if the run in `path`, where there is one, cannot be resumed with `recipe`.

    What counts is the recipe in its newest checkpoint, which a manifest vouches for; before there is one, recipe.toml.
    `warn` is called for a recipe.toml that is lost or damaged: `store_recipe` recreates it.
    """
    stored, found = path / RECIPE, recipe_of_checkpoints(path)
    if found is None:
        if stored.exists():
            refuse_other_recipe(
                path, load_recipe(str(stored), of_run=True), recipe, "give the same recipe to resume it"
            )
        return
    checkpoint, trained_with = found
    remedy = (
        f"leave out RECIPE and -o to resume with those of {checkpoint}; if {stored} was edited or damaged, remove it, "
        "and it is restored"
    )
    refuse_other_recipe(path, trained_with, recipe, remedy)
    wrong = damage(path)
    if wrong is not None:
        warn(f"{stored} {wrong}; it is restored from {checkpoint.relative_to(path)}.")


def refuse_other_recipe(path: Path | str, stored: Recipe, recipe: Recipe, remedy: str) -> None:
    """Raise ConfigurationError if a run that was trained with `stored` cannot be resumed with `recipe`."""
    differences = [
        words
        for key, words in _differences(stored.model_dump(mode="json"), recipe.model_dump(mode="json"))
        if key != "name" and key not in _MAY_CHANGE and not key.startswith(_SECTIONS_THAT_MAY_CHANGE)
    ]
    if differences:
        raise ConfigurationError(
            f"{path} holds a run of another recipe: {'; '.join(differences)}. Choose a new --run-dir, or {remedy}."
        )


def refuse_edited_recipe(of_run: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise ConfigurationError if the `recipe` of a worker that comes to a run under way is not `of_run`, as in JSON.

    The worker has read it later than the others, and with another learning rate, say, its weights would be others.
    """
    if differences := edits(of_run, recipe.model_dump(mode="json")):
        raise ConfigurationError(
            f"the recipe has changed since the run began: {'; '.join(differences)}. A worker that joins needs it as it "
            "was."
        )


def edits(before: Mapping[str, Any], now: Mapping[str, Any], words: str = _EDITED) -> list[str]:
    """In what a recipe, as in JSON, differs from another that all workers have to have, but for what machines may have
    for themselves: in `words`, a key each, with both values.
    """
    return [said for key, said in _differences(before, now, words) if not is_of_a_machine(key)]


def is_of_a_machine(key: str) -> bool:
    """Whether machines may have another value of this key of a recipe each, without another result."""
    return key in _OF_A_MACHINE or key.startswith("tracking.")


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], words: str = _EDITED
) -> Iterator[tuple[str, str]]:
    """The keys whose values differ, each with words that show it."""
    was, now = flatten(before), flatten(after)
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            yield key, words.format(key, _shown(was.get(key)), _shown(now.get(key)))


def _shown(value: object) -> str:
    return "unset" if value is None else repr(value)


def resume_command(run_dir: Path | str, environment: Mapping[str, str] = os.environ) -> str:
    """The command that resumes a run, as a shell takes it; in words where only the user who started it can know it.

    `environment`: a worker's.
    """
    launcher = launched_by(environment)
    if launcher == NODE_LAUNCHER:
        return "the same command on each machine"
    if launcher == "torchrun":
        return f"the same torchrun command, with --run-dir {shlex.quote(str(run_dir))}"
    folder = working_folder(str(run_dir)) if is_url(str(run_dir)) else Path(run_dir)
    command = " ".join(["disttrain train", *launcher_options(environment), f"--run-dir {shlex.quote(str(run_dir))}"])
    try:
        ask_before_resuming(load_recipe(str(folder / RECIPE), of_run=True), run_dir)
    except RecipeError:
        return command
    except ConfigurationError:
        return f"{command} --trust"
    return command


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_evaluation(run_dir: Path, evaluation: Mapping[str, Any]) -> None:
    """Keep the newest evaluation as evaluation.json. Raises OSError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(run_dir / EVALUATION, json.dumps(evaluation, indent=1) + "\n")


def log_to_file(run_dir: Path, rank: int) -> logging.Handler:
    """Send what this worker logs to its file in the run directory; `stop_logging` undoes it."""
    path = log_file(run_dir, rank)
    with _usable(run_dir):
        make_folder(path.parent)
        handler = LogFile(open_to_append(path), path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("disttrain")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    return handler


def stop_logging(handler: logging.Handler) -> None:
    """Undo `log_to_file`."""
    logging.getLogger("disttrain").removeHandler(handler)
    handler.close()

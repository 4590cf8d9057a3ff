"""`disttrain runs`: what runs there are, how they stand, and whether their checkpoints are whole."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import click

from disttrain.commands.arguments import RUN
from disttrain.commands.options import json_option, raw_option
from disttrain.errors import brief, in_digits, printable
from disttrain.layout import LOGS, RECIPE
from disttrain.worker import leave, worker

_MOST_RANKS = 10  # of lost workers, to be named


@click.group(name="disttrain runs")
def command() -> None:
    """Inspect runs and their checkpoints."""


@command.command(name="list")
@click.argument("folder", metavar="[DIR|URL]", required=False)
@click.option("--runs-dir", default="runs", hidden=True)  # its name before there was an argument
@json_option
def list_runs(folder: str | None, runs_dir: str, as_json: bool) -> None:
    """List the runs in a folder or behind a URL (by default in ./runs), newest last."""
    runs_dir = folder if folder is not None else runs_dir
    summaries = [_summary_or_reason(run) for run in _runs_in(os.path.expanduser(runs_dir))]
    if as_json:
        print(json.dumps({"runs": summaries}))
        return
    if not summaries:
        print(f"no runs in {runs_dir}")
    width = max((len(summary["name"]) for summary in summaries), default=0)
    for summary in summaries:
        words = summary.get("error") or _words(summary)
        print(printable(f"{summary['name']:<{width}}  {summary['state']:<10} {words}"))


def _runs_in(runs_dir: str) -> list[str]:
    """The runs in a folder, newest last, or behind a URL, by name."""
    from disttrain.errors import UsageError
    from disttrain.recipe.address import is_url
    from disttrain.runs.rundir import is_run

    if is_url(runs_dir):
        from disttrain.remote import runs_behind

        return runs_behind(runs_dir)
    folder = Path(runs_dir)
    if not os.path.isdir(folder):  # False also for names that no folder can have
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise UsageError(f"{folder} {what}; give the folder that holds the runs.")
    if os.path.isfile(folder / RECIPE):
        return [str(folder)]  # it is a run itself
    try:
        runs = [path for path in folder.iterdir() if is_run(path) or _has_not_begun(path) or not _is_readable(path)]
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}.") from None
    return [str(path) for path in sorted(runs, key=_last_change)]


def _has_not_begun(path: Path) -> bool:
    """True for a folder in which workers were started, and ended before there was a run."""
    from disttrain.runs.rundir import is_run

    return os.path.isdir(path / LOGS) and not is_run(path)


def _is_readable(path: Path) -> bool:
    """False for a folder that may hold a run, but cannot be read."""
    return not os.path.isdir(path) or os.access(path, os.R_OK | os.X_OK)


def _last_change(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has just been removed
        return 0.0


def _summary_or_reason(run: str) -> dict[str, Any]:
    """The state of a run, or why it is unknown: one that is damaged or forbidden must not hide the others."""
    try:
        if not _is_readable(Path(run)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if _has_not_begun(Path(run)):
            words = f"it is starting, or was refused or killed before its first step: see {Path(run) / LOGS}"
            return {"name": Path(run).name, "state": "not begun", "error": words}
        return _summary(run)
    except Exception as error:  # whatever a damaged file brings about
        reason = (error.strerror if isinstance(error, OSError) else None) or brief(error) or type(error).__name__
        return {"name": Path(run).name, "state": "unreadable", "error": reason}


def _summary(run: str) -> dict[str, Any]:
    from disttrain.recipe.address import is_url
    from disttrain.runs.summary import summarise

    if not is_url(run):
        return summarise(_existing_run(Path(run)))
    from disttrain.remote import local_copy  # which imports torch

    with local_copy(run, checkpoints="states") as path:
        summary = summarise(_existing_run(path))
        for checkpoint in summary["checkpoints"]:
            checkpoint["path"] = checkpoint["path"].replace(str(path), run.rstrip("/"))
    return summary


@command.command()
@click.argument("run", type=RUN)
@json_option
def show(run: str, as_json: bool) -> None:
    """Show how far RUN has come and what it has saved."""
    summary = _summary(run)
    if as_json:
        print(json.dumps(summary))
        return
    print(printable(f"{summary['name']}: {summary['state']}, {_words(summary)}"))
    print(printable(f"workers      {summary['world_size'] or 'unknown'}"))
    if lost := summary["lost_workers"]["ranks"]:
        ranks = ", ".join(f"{rank}" for rank in lost[-_MOST_RANKS:])
        of = f"the last were ranks {ranks}" if len(lost) > _MOST_RANKS else f"rank{'s' * (len(lost) > 1)} {ranks}"
        print(printable(f"lost         {len(lost)}: {of}; {summary['lost_workers']['seconds']:.1f} s in all"))
    print(printable(f"MLflow run   {summary['mlflow_run_id'] or 'none'}"))
    best = summary["best"]
    for checkpoint in summary["checkpoints"]:
        words = _value(best["metric"], checkpoint["metrics"])
        is_best = checkpoint["step"] == best["step"] and len(summary["checkpoints"]) > 1
        print(printable(f"checkpoint   {checkpoint['path']}{f'  {words}' if words else ''}{' (best)' * is_best}"))


@command.command()
@click.argument("run", metavar="RUN|CHECKPOINT", type=RUN)
@json_option
def verify(run: str, as_json: bool) -> None:
    """Check each file of the checkpoints of RUN against its manifest; exit 78 if one is damaged.

    Also lists quarantined checkpoints, and unfinished ones: still being written, or left behind by a killed job.
    """
    from disttrain.errors import ConfigurationError
    from disttrain.recipe.address import is_url
    from disttrain.remote import verify_behind

    checked, quarantined, unfinished = verify_behind(run) if is_url(run) else _verified(Path(run))
    if as_json:
        print(json.dumps({"checkpoints": checked, "set_aside": quarantined, "unfinished": unfinished}))
    else:
        for entry in checked:
            print(printable(f"{entry['path']}: {'good' if entry['good'] else 'DAMAGED: ' + entry['detail']}"))
        for path in quarantined:
            print(printable(f"{path}: quarantined, damaged"))
        for path in unfinished:
            print(printable(f"{path}: unfinished; it is being written, or the next start clears it up"))
        if not checked:
            print(f"{run} has no checkpoint yet")
    damaged = [entry["path"] for entry in checked if not entry["good"]]
    if damaged:
        raise ConfigurationError(f"{len(damaged)} of {len(checked)} checkpoints damaged: {', '.join(damaged)}")


def _verified(run: Path) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Path, good and detail of each checkpoint; what was quarantined; what is unfinished."""
    from disttrain.checkpoint import CheckpointStore, verify_checkpoint
    from disttrain.errors import ConfigurationError
    from disttrain.layout import CHECKPOINTS, is_checkpoint

    store = None if is_checkpoint(run) else CheckpointStore(_existing_run(run) / CHECKPOINTS)
    checked: list[dict[str, Any]] = []
    for path in [run] if store is None else store.paths():
        try:
            verify_checkpoint(path)
        except ConfigurationError as error:
            checked.append({"path": str(path), "good": False, "detail": str(error)})
        else:
            checked.append({"path": str(path), "good": True, "detail": ""})
    if store is None:
        return checked, [], []
    return checked, [str(path) for path in store.quarantined()], [str(path) for path in store.unfinished()]


@command.command(name="hash")
@click.argument("run", metavar="RUN|CHECKPOINT", type=RUN)
def hash_weights(run: str) -> None:
    """Print one SHA-256 over the weights of RUN's newest checkpoint, or of a checkpoint."""
    from disttrain.checkpoint import weights_sha256
    from disttrain.commands.locate import find_checkpoint

    print(weights_sha256(find_checkpoint(run).model))


@command.command()
@click.argument("run", metavar="RUN|CHECKPOINT", type=RUN)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--max-size", metavar="SIZE", help="Divide the weights among files of at most this size, as in 5GB.")
@raw_option
@json_option
def export(run: str, folder: Path, max_size: str | None, raw: bool, as_json: bool) -> None:
    """Write the weights of RUN's newest checkpoint, or of a checkpoint, to a new folder DIR for other programs.

    DIR gets model.safetensors, or with --max-size the layout of Hugging Face: several files and
    model.safetensors.index.json. The weights are their averages, if the run keeps any.
    """
    from disttrain.checkpoint.export import export_weights, size_in_bytes
    from disttrain.commands.locate import find_checkpoint
    from disttrain.recipe.address import expanded

    try:
        max_bytes = size_in_bytes(max_size) if max_size is not None else float("inf")
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--max-size") from None
    checkpoint = find_checkpoint(run, raw=raw)
    folder = expanded(str(folder))
    files = export_weights(checkpoint, folder, max_bytes)
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint.path), "folder": str(folder), "files": files}))
        return
    words = files[0] if len(files) == 1 else f"{len(files) - 1} files and their index"
    print(printable(f"{folder}: {words}, the weights of {checkpoint.path}"))


def _existing_run(path: Path) -> Path:
    from disttrain.errors import UsageError
    from disttrain.runs.rundir import is_run

    if not is_run(path):
        raise UsageError(f"{path} is not a run directory: see `disttrain runs list`.")
    return path


def _words(summary: dict[str, Any]) -> str:
    step, total = summary["step"], summary["total_steps"]
    words = f"step {step}" + (f" of {total}" if total else "") + f", epoch {summary['epoch']}"
    value = _value(summary["best"]["metric"], summary["metrics"])
    lost = len(summary["lost_workers"]["ranks"])
    found = [words, value, f"{lost} worker{'s' * (lost > 1)} lost" if lost else ""]
    return ", ".join(filter(None, found))


def _value(name: str, metrics: dict[str, float]) -> str:
    """A metric in words, if it was measured."""
    if name not in metrics:
        return ""
    return f"{name} {metrics[name]:.2%}" if name == "accuracy" else f"{name} {in_digits(metrics[name])}"


if __name__ == "__main__":
    leave(worker(command))

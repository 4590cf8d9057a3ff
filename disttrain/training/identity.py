"""Whether a checkpoint is of the run that is to resume: data, objects and schedule, each compared by name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from disttrain.data import Digest, SampleSet, Split, SplitOutline, digest_of
from disttrain.distributed.collectives import broadcast_from_main
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError, brief
from disttrain.recipe import Recipe
from disttrain.task import Task, named
from disttrain.training.optim import Schedule
from disttrain.training.recoverable import asks_to_continue

_PARAMETERS = {"task": "task.name", "model": "model.name", "train_set": "data.dataset", "test_set": "data.dataset"}


def digest_for_savers(train: Split | SampleSet, recipe: Recipe, world: World) -> Digest:
    """The digest of the training set on rank 0, and on whoever may take its place. Every rank must call it."""
    if asks_to_continue(recipe):
        return broadcast_from_main(world, lambda: digest_of(train))
    return digest_of(train) if world.is_main else Digest()


def describe_data(train: Split | SampleSet, digest: Digest) -> dict[str, Any]:
    """What a checkpoint holds about the training set: of one without images its facts, as far as JSON holds them."""
    if isinstance(train, SampleSet):
        facts = {key: value for key, value in train.facts.items() if _is_json(value)}
        return {"num_train": len(train), "facts": json.loads(json.dumps(facts)), **asdict(digest)}
    return {
        "num_train": len(train),
        "classes": list(train.classes),
        "sample_shape": list(train.sample_shape),
        **_preparation(train),
        **asdict(digest),
    }


def describe_task(task: Task) -> dict[str, Any]:
    """What a checkpoint says of the task. Raises ConfigurationError if JSON cannot hold it."""
    with named(task, "describe"):
        described = task.describe()
    if not isinstance(described, dict) or not _is_json(described):
        raise ConfigurationError(
            f"{type(task).__name__}.describe returned {brief(repr(described), 80)}: it has to be a dict that JSON can "
            "hold."
        )
    plain: dict[str, Any] = json.loads(json.dumps(described))
    return plain


def refuse_other_task(
    state: Mapping[str, Any], where: object, now: Mapping[str, Any], given: Collection[str] = ()
) -> None:
    """Raise ConfigurationError if the checkpoint is of another task than `now` describes.

    Checkpoints from before there were tasks are of image classification. `given` are the objects that took the place
    of what the recipe names.
    """
    was = state.get("task", _FIRST_TASK)
    for key in ("name", *sorted(was.keys() | now.keys())):
        if was.get(key) != now.get(key):
            if "task" in state.get("given", ()) and "task" not in given:  # the recipe's own is another one, of course
                refuse_missing_objects(state, where, given)
            raise ConfigurationError(
                f"{where}: trained for a task with {key} = {brief(repr(was.get(key)), 80)}, and task.name and "
                f"task.options now make one with {brief(repr(now.get(key)), 80)}: give the same, or start a new "
                "--run-dir."
            )


_FIRST_TASK = {"name": "image-classification"}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _preparation(split: Split | SplitOutline) -> dict[str, Any]:
    """What the samples are, and what is done to them."""
    return {
        "dtype": str(split.dtype).removeprefix("torch."),
        "mean": None if split.mean is None else list(split.mean),
        "std": None if split.std is None else list(split.std),
    }


def refuse_other_preparation(data: Mapping[str, Any], split: Split | SampleSet, where: object) -> None:
    """Raise ConfigurationError if the samples of `split` are not of the kind that `data`, of a checkpoint, describes.

    An older checkpoint does not describe it well enough.
    """
    if isinstance(split, SampleSet):
        return
    for key, now in _preparation(split).items() if "dtype" in data else ():
        if data[key] != now:
            raise ConfigurationError(
                f"{where}: trained on samples with {key} = {data[key]}, and those of the data set now have {now}: "
                "prepare them as they were."
            )


def refuse_other_data(state: Mapping[str, Any], where: object, now: Mapping[str, Any], given: Collection[str]) -> None:
    """Raise ConfigurationError if the training set, `now` described, is not the one that the checkpoint describes.

    `given` are the objects that took the place of what the recipe names. What an older checkpoint lacks is not
    compared.
    """
    was = state["data"]
    if was["num_train"] != now["num_train"]:
        raise ConfigurationError(
            f"{where}: trained on {was['num_train']} samples, and {_source(given)} now holds {now['num_train']}"
            f"{_objects_missing(state, given)}: {_SAME_DATA}"
        )
    for key, before in was.get("facts", {}).items():
        if before != now.get("facts", {}).get(key):
            raise ConfigurationError(
                f"{where}: '{key}' of the training set was {brief(repr(before), 80)}, now "
                f"{brief(repr(now.get('facts', {}).get(key)), 80)}{_objects_missing(state, given)}: {_SAME_DATA}"
            )
    classes_before, classes_now = was.get("classes", []), now.get("classes", [])
    for number, (before, name) in enumerate(zip(classes_before, classes_now, strict=False)):
        if before != name:
            raise ConfigurationError(
                f"{where}: class {number} of the training set was {brief(repr(before), 80)}, now "
                f"{brief(repr(name), 80)}{_objects_missing(state, given)}: {_SAME_DATA}"
            )
    if len(classes_before) != len(classes_now):
        raise ConfigurationError(
            f"{where}: trained on {len(classes_before)} classes, and {_source(given)} now has {len(classes_now)}"
            f"{_objects_missing(state, given)}: {_SAME_DATA}"
        )
    for key, what in (("labels", "labels"), ("contents", "samples")):
        if _differ(was.get(key), now[key]):
            raise ConfigurationError(
                f"{where}: the {what} of the training set are not those that the run was trained on, or their order "
                f"differs{_objects_missing(state, given)}: {_SAME_DATA}"
            )
    refuse_missing_objects(state, where, [*given, *(("train_set", "test_set") if _is_known(was, now) else ())])


def refuse_missing_objects(state: Mapping[str, Any], where: object, given: Collection[str]) -> None:
    """Raise ConfigurationError if the run was trained on objects, and these are not among what is `given` now."""
    missing = [name for name in state.get("given", ()) if name in _PARAMETERS and name not in given]
    if missing:
        keys = list(dict.fromkeys(_PARAMETERS[name] for name in missing))
        raise ConfigurationError(
            f"{where}: trained with {' and '.join(f'{name}=…' for name in missing)} given in Python, which "
            f"{' and '.join(keys)} of the recipe do{'es' if len(keys) == 1 else ''} not name: resume it in Python, "
            "with the same given to disttrain.train(…) (docs/python.md), or start a new --run-dir."
        )


def refuse_other_schedule(state: Mapping[str, Any], where: object, schedule: Schedule) -> None:
    """Raise ConfigurationError if the steps made so far would have had other learning rates with the schedule now."""
    step, total = state["step"], state["total_steps"]
    if step == 0 or total == schedule.total_steps:
        return
    before = Schedule(schedule.recipe, schedule.base_lr, schedule.steps_per_epoch, total)
    if before.learning_rate(step - 1) != schedule.learning_rate(step - 1):
        raise ConfigurationError(
            f"{where}: the {schedule.recipe.name} schedule of the {step} steps made so far was to end at step {total}, "
            f"and train.epochs and train.max_steps now make it {schedule.total_steps}: the result would be that of "
            "neither schedule. Leave both as they were, or start a new --run-dir."
        )


_SAME_DATA = "point data.root to the same data, or start a new --run-dir."


def _differ(was: Any, now: str | None) -> bool:
    """Whether two digests that are known, and of one kind, differ."""
    if not isinstance(was, str) or now is None or was.rpartition(":")[0] != now.rpartition(":")[0]:
        return False
    return was != now


def _is_known(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the labels of both are known: then the same data may come as objects or not."""
    return was.get("labels") is not None and now["labels"] is not None


def _source(given: Collection[str]) -> str:
    return "the train_set given" if "train_set" in given else "data.root"


def _objects_missing(state: Mapping[str, Any], given: Collection[str]) -> str:
    if "train_set" in state.get("given", ()) and "train_set" not in given:
        return " (the run was trained on a train_set given in Python: give it again)"
    return ""

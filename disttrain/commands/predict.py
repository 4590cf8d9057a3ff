"""`disttrain predict`: what a checkpoint makes of files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from disttrain.commands.arguments import RUN
from disttrain.commands.options import json_option, raw_option, trust_option
from disttrain.errors import printable
from disttrain.worker import leave, worker


@contextmanager
def _warnings_of_data() -> Iterator[None]:
    """Show on standard error what is remarkable about the files that are read."""
    relay = logging.StreamHandler()
    relay.setLevel(logging.WARNING)
    relay.setFormatter(logging.Formatter("warning: %(message)s"))
    logging.getLogger("disttrain.data").addHandler(relay)
    try:
        yield
    finally:
        logging.getLogger("disttrain.data").removeHandler(relay)


@click.command(name="disttrain predict")
@click.argument("address", metavar="RUN|CHECKPOINT", type=RUN)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--top", type=click.IntRange(min=1), help="How many classes to show for an image (default: 3).")
@click.option(
    "-o", "--option", "options", multiple=True, metavar="NAME=VALUE", help="An option for the task's predict method."
)
@json_option
@raw_option
@trust_option
def command(
    address: str,
    files: tuple[str, ...],
    top: int | None,
    options: tuple[str, ...],
    as_json: bool,
    raw: bool,
    trust: bool,
) -> None:
    """Predict what each FILE holds: an image's most probable classes, or whatever the run's task predicts.

    Pictures are decoded as by the data set `folder`, which works for runs trained on uint8 images.
    """
    import torch

    from disttrain.commands.locate import (
        find_checkpoint,
        recipe_of,
        refuse_objects,
        restore_model,
        task_of,
        training_set_of,
        warn_of_unknown_preparation,
    )
    from disttrain.commands.predict_options import predict_options
    from disttrain.errors import ConfigurationError, brief
    from disttrain.task import ImageClassification, named

    checkpoint = find_checkpoint(address, raw=raw)
    refuse_objects(checkpoint, ("task.name", "model.name"))
    recipe = recipe_of(checkpoint, trust=trust, imports=("task.name", "model.name"))
    train_set = training_set_of(checkpoint)
    task = task_of(checkpoint, recipe, train_set)
    arguments = predict_options(task, [*options, *([f"top={top}"] if top is not None else [])])
    warn_of_unknown_preparation(checkpoint, recipe)
    model = restore_model(checkpoint, recipe, task, train_set).eval()
    try:
        with _warnings_of_data(), named(task, "read", NotImplementedError, OSError):
            read: list[tuple[str, Any]] = [(file, task.read(file)) for file in files]
        for _, of_file in read:
            if not isinstance(of_file, list):
                raise ConfigurationError(
                    f"{type(task).__name__}.read returned a {type(of_file).__name__}: it has to return a list, even "
                    "for one sample."
                )
        samples = [sample for _, of_file in read for sample in of_file]
        with named(task, "collate"):
            batch = task.collate(samples)
        with torch.no_grad():
            with named(task, "prepare"):
                prepared = task.prepare(batch, lambda num: torch.zeros(len(samples), num), training=False)
            with named(task, "predict", NotImplementedError):
                predictions = list(task.predict(model, prepared, **arguments))
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        raise ConfigurationError(f"{place}{error.strerror or brief(error)}; give a file that can be read.") from error
    except NotImplementedError as error:
        raise ConfigurationError(f"{checkpoint.path}: {error}, which `disttrain predict` needs.") from error
    if len(predictions) != len(samples):
        raise ConfigurationError(
            f"{type(task).__name__}.predict returned {len(predictions)} answers for {len(samples)} samples: return one "
            "for each."
        )
    # The number of a sample, from 1, in a file that holds several: of a table's row.
    places = [
        (file, number if len(of_file) > 1 else None) for file, of_file in read for number in range(1, len(of_file) + 1)
    ]
    answers = list(zip(places, predictions, strict=True))
    if as_json:
        if isinstance(task, ImageClassification):
            listed: list[dict[str, Any]] = [{"image": file, **prediction} for (file, _), prediction in answers]
        else:
            listed = [
                {"file": file, **({"row": number} if number else {}), "prediction": prediction}
                for (file, number), prediction in answers
            ]
        print(json.dumps({"checkpoint": str(checkpoint.path), "predictions": listed}))
        return
    for (file, number), prediction in answers:
        with named(task, "in_words"):
            words = task.in_words(prediction)
        # What is no file, a prompt for instance, is quoted: it may be several words, and end anywhere.
        place = file if os.path.isfile(os.path.expanduser(file)) else repr(file)
        print(printable(f"{place}{f', row {number}' if number else ''}: {words}"))


if __name__ == "__main__":
    leave(worker(command))

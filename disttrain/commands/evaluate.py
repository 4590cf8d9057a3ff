"""`disttrain evaluate`: the metrics of a checkpoint on the test set, the same number at every world size."""

from __future__ import annotations

import json
import sys

import click

from disttrain.commands.arguments import RUN
from disttrain.commands.options import json_option, num_workers_option, overrides_option, raw_option, trust_option
from disttrain.errors import printable
from disttrain.worker import leave, worker


@click.command(name="disttrain evaluate")
@click.argument("address", metavar="RUN|CHECKPOINT", type=RUN)
@num_workers_option
@overrides_option
@json_option
@raw_option
@trust_option
def command(address: str, num_workers: int, overrides: tuple[str, ...], as_json: bool, raw: bool, trust: bool) -> None:
    """Evaluate a run's newest checkpoint, or the one given, on the test set, by the metrics of its task.

    The numbers are the same with any number of workers.
    """
    from dataclasses import replace

    from disttrain.checkpoint.handout import hand_out, read_by_main
    from disttrain.commands.locate import (
        data_of,
        find_checkpoint,
        recipe_of,
        refuse_objects,
        restore_model,
        task_of,
        training_set_of,
    )
    from disttrain.data import SampleSet, SplitOutline
    from disttrain.distributed.world import join_world, on_device
    from disttrain.errors import ConfigurationError
    from disttrain.parallel.conditions import exact_conditions
    from disttrain.recipe import KEYS_OF_CODE
    from disttrain.task import named
    from disttrain.training.evaluate import evaluate
    from disttrain.training.given import Given
    from disttrain.training.identity import refuse_other_preparation
    from disttrain.training.job import AUTOCAST
    from disttrain.training.sets import eval_loader, load_sets

    with join_world("cpu") as world:  # what is summed is on the CPU
        checkpoint = read_by_main(world, lambda: find_checkpoint(address, raw=raw))
        refuse_objects(checkpoint, KEYS_OF_CODE, overrides)
        recipe = recipe_of(checkpoint, overrides, trust=trust)
        world = on_device(world, recipe.train.device)
        data, _ = load_sets(recipe, world, Given(), facts=data_of(checkpoint).get("facts"))
        train_set = data.train if isinstance(data.train, SampleSet) else training_set_of(checkpoint)
        if isinstance(train_set, SplitOutline) and not isinstance(data.train, SampleSet):
            # As the set has it now: an override may ask for that, and an older checkpoint does not know.
            prepared = data.train
            train_set = replace(train_set, dtype=prepared.dtype, mean=prepared.mean, std=prepared.std)
        task = task_of(checkpoint, recipe, train_set)
        classes = getattr(data.test, "facts", {}).get("classes", getattr(data.test, "classes", None))
        if classes is not None and list(classes) != data_of(checkpoint).get("classes", list(classes)):
            raise ConfigurationError(f"{checkpoint.path} was trained on other classes than {recipe.data.root} holds.")
        if not any(override.startswith(("data.mean=", "data.std=")) for override in overrides):
            refuse_other_preparation(data_of(checkpoint), data.test, checkpoint.path)
        checkpoint = replace(checkpoint, model=hand_out(world, checkpoint.model))
        model = restore_model(checkpoint, recipe, task, train_set).to(world.device)
        loader = eval_loader(data.test, task, recipe, world)
        with exact_conditions(recipe):
            result = evaluate(model, task, loader, autocast=AUTOCAST[recipe.train.precision])
        if not world.is_main:
            return
        if world.remark:
            print(world.remark, file=sys.stderr)
        if as_json:
            print(json.dumps(result.to_json()))
            return
        print(printable(f"{checkpoint.path}, {world.size} worker{'s' if world.size > 1 else ''}"))
        with named(task, "report"):
            lines = task.report(result.metrics, result.details)
        if not isinstance(lines, list | tuple):
            raise ConfigurationError(
                f"{type(task).__name__}.report returned a {type(lines).__name__}: it has to be a list of lines."
            )
        for line in lines:
            print(printable(line))


if __name__ == "__main__":
    leave(worker(command))

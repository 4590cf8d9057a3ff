"""`disttrain evaluate`: the accuracy of a checkpoint on the test set, the same number at every world size."""

from __future__ import annotations

import json
import sys

import click

from disttrain.errors import printable
from disttrain.worker import leave, worker


@click.command(name="disttrain evaluate")
@click.argument("address")
@click.option("-o", "--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--raw", is_flag=True, help="Use the weights themselves, not their averages.")
@click.option("--trust", is_flag=True, help="Import the code that the run names.")
def command(address: str, overrides: tuple[str, ...], as_json: bool, raw: bool, trust: bool) -> None:
    """Evaluate the run or checkpoint at ADDRESS, a path or URL, as one worker."""
    from dataclasses import replace

    from disttrain.checkpoint.handout import hand_out, read_by_main
    from disttrain.commands.locate import data_of, find_checkpoint, recipe_of, refuse_objects, restore_model
    from disttrain.data import EvalLoader, load_datasets
    from disttrain.distributed.collectives import one_per_machine_first
    from disttrain.distributed.world import join_world, on_device
    from disttrain.errors import ConfigurationError
    from disttrain.parallel.conditions import exact_conditions
    from disttrain.training.evaluate import evaluate
    from disttrain.training.identity import refuse_other_preparation
    from disttrain.training.job import AUTOCAST

    with join_world("cpu") as world:  # what is summed is on the CPU
        checkpoint = read_by_main(world, lambda: find_checkpoint(address, raw=raw))
        refuse_objects(checkpoint, ("model.name", "data.dataset"), overrides)
        recipe = recipe_of(checkpoint, overrides, trust=trust)
        world = on_device(world, recipe.train.device)
        data = load_datasets(recipe.data, world, lambda: one_per_machine_first(world))
        if list(data.test.classes) != data_of(checkpoint)["classes"]:
            raise ConfigurationError(f"{checkpoint.path} was trained on other classes than {recipe.data.root} holds.")
        if not any(override.startswith(("data.mean=", "data.std=")) for override in overrides):
            refuse_other_preparation(data_of(checkpoint), data.test, checkpoint.path)
        checkpoint = replace(checkpoint, model=hand_out(world, checkpoint.model))
        model = restore_model(checkpoint, recipe).to(world.device)
        loader = EvalLoader(
            data.test,
            recipe.data,
            batch_size=recipe.train.eval_batch_size,
            rank=world.rank,
            size=world.size,
            device=world.device,
        )
        with exact_conditions(recipe):
            result = evaluate(model, loader, data.test.classes, autocast=AUTOCAST[recipe.train.precision])
        if not world.is_main:
            return
        if world.remark:
            print(world.remark, file=sys.stderr)
        if as_json:
            print(json.dumps(result.to_json()))
            return
        print(printable(f"{checkpoint.path}, {world.size} worker{'s' if world.size > 1 else ''}"))
        print(f"accuracy {result.accuracy:.2%} ({result.correct} of {result.total}), loss {result.loss:.6f}")
        width = max(len(name) for name in result.classes)
        for name, accuracy in result.per_class.items():
            print(printable(f"  {name:<{width}}  {'no samples' if accuracy is None else f'{accuracy:7.2%}'}"))


if __name__ == "__main__":
    leave(worker(command))

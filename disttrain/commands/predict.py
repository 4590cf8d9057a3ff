"""`disttrain predict`: what a checkpoint sees in pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from disttrain.errors import printable
from disttrain.worker import leave, worker


@click.command(name="disttrain predict")
@click.argument("address")
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="How many classes to name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--raw", is_flag=True, help="Use the weights themselves, not their averages.")
@click.option("--trust", is_flag=True, help="Import the code that the run names.")
def command(address: str, images: tuple[Path, ...], top: int, as_json: bool, raw: bool, trust: bool) -> None:
    """Name what is in each of IMAGES with the run or checkpoint at ADDRESS, a path or URL.

    Pictures are read as the data set `folder` reads them, which serves runs that were trained on bytes.
    """
    import torch

    from disttrain.commands.locate import (
        data_of,
        find_checkpoint,
        recipe_of,
        refuse_objects,
        refuse_other_than_pictures,
        restore_model,
    )
    from disttrain.data import normalise, read_picture

    checkpoint = find_checkpoint(address, raw=raw)
    refuse_objects(checkpoint, ("model.name",))
    data, recipe = data_of(checkpoint), recipe_of(checkpoint, trust=trust, imports=("task.name", "model.name"))
    refuse_other_than_pictures(checkpoint, recipe)
    model = restore_model(checkpoint, recipe).eval()
    channels, height, width = data["sample_shape"]
    pixels = torch.stack([read_picture(image, (height, width), channels) for image in images])
    with torch.no_grad():
        probabilities = model(normalise(pixels, data["mean"], data["std"])).softmax(1)
    answers: list[dict[str, Any]] = [
        {
            "image": str(image),
            "classes": [
                {"class": data["classes"][index], "probability": row[index].item()}
                for index in row.argsort(descending=True)[:top].tolist()
            ],
        }
        for image, row in zip(images, probabilities, strict=True)
    ]
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint.path), "predictions": answers}))
        return
    for answer in answers:
        guesses = ", ".join(f"{guess['class']} {guess['probability']:.1%}" for guess in answer["classes"])
        print(printable(f"{answer['image']}: {guesses}"))


if __name__ == "__main__":
    leave(worker(command))

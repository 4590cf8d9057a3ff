"""The data set, the task and the model of a job: each is built with regard to the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from disttrain.data import (
    Datasets,
    EvalLoader,
    Loader,
    MemorySplit,
    SampleSet,
    SampleSets,
    Split,
    StepSampler,
    StreamSplit,
    as_datasets,
    as_sample_sets,
    as_samples,
    load_datasets,
    table_sets,
)
from disttrain.distributed.collectives import one_per_machine_first
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError, NotImagesError, brief
from disttrain.models import build_model, given_model, made_ready
from disttrain.recipe import Recipe, TaskRecipe
from disttrain.task import Task, build_task, has_own, named, takes_images, task_maker
from disttrain.task.tabular import Tabular
from disttrain.training.given import Given


def load_sets(
    recipe: Recipe, world: World, given: Given, *, facts: Mapping[str, Any] | None = None
) -> tuple[Datasets | SampleSets, Task]:
    """What the recipe names or what was given: images with labels for a task of images, else samples of any kind.

    `facts` are those of the set that was trained on, for an evaluation: a table is prepared by them, whatever it holds.
    Every rank must call it. Raises ConfigurationError for what does not exist or does not fit together.
    """
    maker = task_maker(recipe, given.task)
    images = takes_images(maker)
    given = _with_tables(given) if isinstance(maker, type) and issubclass(maker, Tabular) else given
    try:
        data = _load(recipe, world, given, images=images, facts=facts)
    except NotImagesError as error:
        if given.task is not None or recipe.task.name != TaskRecipe().name:
            raise
        raise NotImagesError(
            f"{error} The task is '{recipe.task.name}', the default: for other samples give task=…, or set task.name."
        ) from error
    if isinstance(data, SampleSets) and images:
        source = "the sets given" if given.train_set is not None else f"data.dataset = '{recipe.data.dataset}'"
        raise ConfigurationError(
            f"{source}: these are samples of another kind, not images with labels, which the task "
            f"'{recipe.task.name}' takes: give the task that is meant as task=…, or set task.name."
        )
    if isinstance(data, Datasets) and not images:
        data = SampleSets(as_samples(data.train, "the training set"), as_samples(data.test, "the test set"))
    return data, build_task(maker, recipe, data.train, is_given=given.task is not None)


def _with_tables(given: Given) -> Given:
    """With tables in place of the two pairs (features, targets), if that is what was given."""
    pairs = (given.train_set, given.test_set)
    if not all(isinstance(pair, tuple | list) for pair in pairs):
        return given
    sets = table_sets(*pairs)
    return replace(given, train_set=sets.train, test_set=sets.test)


def _load(
    recipe: Recipe, world: World, given: Given, *, images: bool, facts: Mapping[str, Any] | None
) -> Datasets | SampleSets:
    train_set, test_set = given.train_set, given.test_set
    if train_set is None and test_set is None:
        return load_datasets(recipe.data, world, lambda: one_per_machine_first(world), images=images, facts=facts)
    if train_set is None or test_set is None:
        raise ConfigurationError("train_set and test_set belong together: give both, or neither.")
    if images and not isinstance(train_set, SampleSet):
        return as_datasets(train_set, test_set, recipe.data)
    return as_sample_sets(train_set, test_set)


def served(split: Split | SampleSet, task: Task) -> Split | SampleSet:
    """The split as the loaders take it: images go by whole tensors, unless the task makes its batches itself."""
    if isinstance(split, MemorySplit | StreamSplit) and has_own(task, "collate", "weight"):
        return as_samples(split, "the data set")
    return split


def eval_loader(test: Split | SampleSet, task: Task, recipe: Recipe, world: World) -> EvalLoader:
    """This worker's part of the test set, in batches."""
    return EvalLoader(
        served(test, task),
        recipe.data,
        task,
        batch_size=recipe.train.eval_batch_size,
        rank=world.rank,
        size=world.size,
        device=world.device,
    )


def model_arguments(task: Task, train: Any) -> dict[str, Any]:
    """What the task has for a model's constructor. Raises UserCodeError for what it raises, ConfigurationError."""
    with named(task, "model_arguments"):
        arguments: Any = task.model_arguments(train)
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ConfigurationError(
            f"{type(task).__name__}.model_arguments returned {brief(repr(arguments), 80)}: it has to be a dict of "
            "arguments by name; {} for none."
        )
    return arguments


def model_for(recipe: Recipe, given: Given, train: Split | SampleSet, task: Task) -> nn.Module:
    """The model that was given or that the recipe names, on the CPU, made for the task's data."""
    arguments = model_arguments(task, train)
    if given.model is None:  # not "or": a module with a length may be empty
        name, model = f"model.name: {recipe.model.name}", build_model(recipe.model, **arguments)
    else:
        name, model = "the model given", given_model(given.model, **arguments)

    def try_out(model: nn.Module) -> None:
        sampler = StepSampler(len(train), batch_size=2)
        samples = torch.arange(min(2, len(train)))
        task.loss(model, Loader(served(train, task), sampler, recipe.data, task).samples(0, samples))

    shape = arguments.get("sample_shape")
    return made_ready(model, name, shape) if shape is not None else made_ready(model, name, try_out=try_out)

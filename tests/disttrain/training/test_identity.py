"""A run resumes with what it was trained on, or not at all: data, objects, schedule and optimizer by name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import disttrain
from disttrain.checkpoint import optimizer_from_tensors, optimizer_to_tensors
from disttrain.commands import evaluate, predict
from disttrain.data import Digest, MemorySplit, SampleSet, StreamSplit, digest_of, load_datasets
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe, ScheduleRecipe, load_recipe
from disttrain.training.identity import (
    describe_data,
    refuse_missing_objects,
    refuse_other_data,
    refuse_other_schedule,
    refuse_other_task,
)
from disttrain.training.optim import Schedule
from tests.disttrain.training.test_train import QUIET, network, samples

ONE_STEP = [*QUIET, "data.batch_size=16", "schedule.name=constant"]


def split(images: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...] = ("a", "b", "c")) -> MemorySplit:
    return MemorySplit(images, labels, classes, (0.5,), (0.5,))


def test_other_data_is_refused_by_what_is_other(tmp_path: Path) -> None:
    """As when classes are renamed or pictures moved between them: their number alone says nothing."""
    images, labels = samples(70)
    test = samples(31, 1)

    def train(max_steps: int, images: torch.Tensor, labels: torch.Tensor, *classes: str) -> Any:
        own = [MemorySplit(*one, classes, (0.5,), (0.5,)) for one in ((images, labels), test)]
        recipe = load_recipe("digits", [*ONE_STEP, f"train.max_steps={max_steps}"])
        return disttrain.train(recipe, run_dir=tmp_path, model=network(), train_set=own[0], test_set=own[1])

    train(1, images, labels, "cat", "dog", "eel")
    swapped, repainted = labels.clone(), images.clone()
    swapped[[0, 1]] = (labels[[0, 1]] + 1) % 3
    repainted[69, 0, 7, 7] += 1
    for changed, message in (
        ((images, labels, "dog", "cat", "eel"), "class 0 of the training set was 'cat', now 'dog'"),
        ((images, swapped, "cat", "dog", "eel"), "the labels of the training set are not those"),
        ((repainted, labels, "cat", "dog", "eel"), "the samples of the training set are not those"),
        ((images, labels, "cat", "dog", "eel", "fox"), "trained on 3 classes, and the train_set given now has 4"),
        ((images[1:], labels[1:], "cat", "dog", "eel"), "trained on 70 samples, and the train_set given now holds 69"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            train(2, *changed)
    assert train(2, images, labels, "cat", "dog", "eel").step == 2
    with pytest.raises(ConfigurationError, match="trained on a train_set given in Python: give it again"):
        disttrain.train(load_recipe("digits", [*ONE_STEP, "train.max_steps=3"]), run_dir=tmp_path)

    # Nor are they what the recipe names: a run that was trained on objects has digits' test set for no reason.
    for command, overrides, message in (
        (
            evaluate.command,
            (),
            "trained with model=… and test_set=… given in Python, and model.name and data.dataset of its recipe name "
            "something else: .*-o model.name=package.module:callable -o data.dataset=package.module:callable --trust$",
        ),
        (evaluate.command, ("-o", "model.name=net"), "trained with test_set=… given in Python, and data.dataset"),
        (predict.command, (__file__,), "trained with model=… given in Python, .*: use it in Python [^,]*$"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            command.main([str(tmp_path), *overrides], standalone_mode=False)


def pictures(root: Path) -> DataRecipe:
    dice = random.Random(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(3):
                image = Image.new("RGB", (8, 8))
                image.putdata([(dice.randrange(256),) * 3 for _ in range(64 if name == "cat" else 30)])
                image.save(folder / f"{number}.png")
    return DataRecipe(dataset="folder", root=str(root))


@pytest.mark.parametrize("layout", ["memory", "stream"])
def test_pictures_that_are_moved_or_renamed_make_another_set(tmp_path: Path, layout: str) -> None:
    recipe = pictures(tmp_path / "a").model_copy(update={"layout": layout})

    def digest(root: Path) -> Digest:
        with join_world("cpu") as world:
            from contextlib import nullcontext

            return digest_of(load_datasets(recipe.model_copy(update={"root": str(root)}), world, nullcontext).train)

    before = digest(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert digest(tmp_path / "b") == before, "the same pictures in another place"
    train = tmp_path / "b" / "train"
    (train / "cat").rename(train / "was-cat")
    (train / "dog").rename(train / "cat")
    (train / "was-cat").rename(train / "dog")
    assert digest(tmp_path / "b").contents != before.contents, "classes swapped, with the same names of files"
    (train / "dog" / "2.png").rename(train / "cat" / "3.png")
    assert digest(tmp_path / "b").labels != before.labels, "a picture moved"


class Own(Dataset[Any]):
    """A data set of a user's own, whose pictures are drawn anew each time."""

    classes = ("a", "b", "c")

    def __init__(self, labels: list[int], *, with_targets: bool = False) -> None:
        self.labels_of = labels
        if with_targets:
            self.targets = labels

    def __len__(self) -> int:
        return len(self.labels_of)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randint(256, (1, 8, 8), generator=torch.Generator().manual_seed(id(self))).byte(), self.labels_of[
            index
        ]


@pytest.mark.parametrize("with_targets", [True, False])
def test_a_users_own_set_is_known_by_its_labels(with_targets: bool) -> None:
    def digest(labels: list[int]) -> Digest:
        return digest_of(StreamSplit(Own(labels, with_targets=with_targets), Own.classes, (0.5,), (0.5,)))

    labels = [number % 3 for number in range(50)]
    assert digest(labels) == digest(labels)
    assert digest(labels) != digest([(label + 1) % 3 for label in labels])
    assert (digest(labels).labels is not None) is with_targets


def test_what_a_checkpoint_does_not_know_is_not_compared() -> None:
    """Those of before these digests, and those of data that was held in another way."""
    images, labels = samples(9)
    now = describe_data(split(images, labels), digest_of(split(images, labels)))
    old = {"data": {key: now[key] for key in ("num_train", "classes", "sample_shape", "mean", "std")}}
    refuse_other_data(old, "step-1", now, ())
    streamed = {"data": {**now, "contents": "files:0123456789abcdef"}, "given": []}
    refuse_other_data(streamed, "step-1", now, ())


def test_the_same_data_may_come_as_an_object_or_not_but_a_model_may_not() -> None:
    images, labels = samples(9)
    now = describe_data(split(images, labels), digest_of(split(images, labels)))
    refuse_other_data({"data": now, "given": ["test_set", "train_set"]}, "step-1", now, ())
    with pytest.raises(ConfigurationError, match=r"trained with model=… given in Python, which model\.name"):
        refuse_missing_objects({"given": ["model"]}, "step-1", ("train_set",))
    refuse_missing_objects({"given": ["model"]}, "step-1", ("model",))
    refuse_missing_objects({}, "step-1", ())


def test_a_run_of_a_task_given_in_python_is_resumed_there() -> None:
    """Not by task.name, which never named it; a task of another name is still another where one is given."""
    state, default = {"task": {"name": "Named"}, "given": ["model", "task"]}, {"name": "image-classification"}
    in_python = (
        r"trained with model=… and task=… given in Python, which model\.name and task\.name .* do not name: resume"
    )
    with pytest.raises(ConfigurationError, match=in_python):
        refuse_other_task(state, "step-1", default)
    for given in ("task",), ("model", "task"):
        with pytest.raises(ConfigurationError, match="trained for a task with name = 'Named', and"):
            refuse_other_task(state, "step-1", {"name": "Other"}, given)
    with pytest.raises(ConfigurationError, match="trained for a task with name = 'Named', and"):
        refuse_other_task({**state, "given": ["model"]}, "step-1", default)


def test_a_cosine_schedule_cannot_end_elsewhere_once_it_falls() -> None:
    def schedule(name: str, total: int) -> Schedule:
        recipe = ScheduleRecipe.model_validate({"name": name, "warmup_steps": 5})
        return Schedule(recipe, 0.1, 10, total)

    state = {"step": 20, "total_steps": 100}
    with pytest.raises(ConfigurationError, match=r"cosine schedule of the 20 steps .* end at step 100, .* make it 200"):
        refuse_other_schedule(state, "step-20", schedule("cosine", 200))
    refuse_other_schedule(state, "step-20", schedule("cosine", 100))
    refuse_other_schedule(state, "step-20", schedule("constant", 200))
    refuse_other_schedule(state, "step-20", schedule("step", 200))
    refuse_other_schedule(
        {"step": 5, "total_steps": 100}, "step-5", schedule("cosine", 200)
    )  # warming up: all the same


class Attention(nn.Module):
    """Two layers of one shape, built in one order or the other."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        for name in (first, second):
            self.add_module(name, nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_momentum_goes_to_the_parameter_of_its_name(name: str) -> None:
    """A constructor that builds k before q, where it was q before k."""

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        options = {"momentum": 0.9} if name == "SGD" else {}
        made: torch.optim.Optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, **options)
        return made

    before, after = Attention("q", "k"), Attention("k", "q")
    optimizer, resumed = optimizer_of(before), optimizer_of(after)
    for number, parameter in enumerate(before.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    tensors, rest = optimizer_to_tensors(optimizer, before)
    optimizer_from_tensors(resumed, tensors, rest, after)
    moment = "momentum_buffer" if name == "SGD" else "exp_avg"
    theirs = dict(before.named_parameters())
    for key, parameter in after.named_parameters():
        assert torch.equal(resumed.state[parameter][moment], optimizer.state[theirs[key]][moment])
    old = {key: value for key, value in rest.items() if key != "names"}  # as checkpoints had it: by position
    optimizer_from_tensors(optimizer_of(before), tensors, old, before)
    other = Attention("q", "v")
    with pytest.raises(ConfigurationError, match=r"only one of the two has 'k\.bias'"):
        optimizer_from_tensors(optimizer_of(other), tensors, rest, other)


def test_expected_magnitudes_are_kept_by_name(tmp_path: Path) -> None:
    """Bounds take part in exact mode's bits; a list, as older checkpoints have, is read by position."""

    def train(model: nn.Module, steps: int) -> nn.Module:
        recipe = load_recipe("digits", [*ONE_STEP, "parallel.exact=true", f"train.max_steps={steps}"])
        disttrain.train(recipe, run_dir=tmp_path, model=model, train_set=samples(70), test_set=samples(31, 1))
        return model

    from disttrain.checkpoint import CheckpointStore, read_checkpoint

    model = train(network(), 1)
    state = read_checkpoint(CheckpointStore(tmp_path / "checkpoints").paths()[-1]).state
    assert set(state["expected_magnitudes"]) >= {name for name, _ in model.named_parameters()}
    assert state["optimizer"]["names"] == [name for name, _ in model.named_parameters()]
    assert state["given"] == ["model", "test_set", "train_set"]
    train(network(), 2)


class Reversing:
    """A user's set of sequences, each turned round with probability one half."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> list[int]:
        return [index, -index][:: random.choice((1, -1))]


def test_a_set_that_draws_is_the_same_whenever_it_is_looked_at() -> None:
    """Else chance might take it for one that does not, and a resume for another."""
    found = {digest_of(SampleSet(Reversing())).contents for _ in range(8)}
    assert len(found) == 1
    assert found != {None}

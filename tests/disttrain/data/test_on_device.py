"""Batches that are made on the device: the bits of the CPU's way, and nothing sent there in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from disttrain.data import Loader, MemorySplit, StepSampler, bunches, crop, mirror, normalise, on_device
from disttrain.distributed import later
from disttrain.recipe import DataRecipe, Recipe
from disttrain.task import ImageClassification
from tests.disttrain.data.loaders import eval_loader, image_task, train_loader

NUM, BATCH, NUM_STEPS = 30, 8, 4
EVERYTHING = DataRecipe(batch_size=BATCH, crop_padding=2, flip=True, cutout=3)
FLIPPED = DataRecipe(batch_size=BATCH, flip=True)
ALTERNATING = DataRecipe(batch_size=BATCH, crop_padding=2, crop_fill="reflect", flip="alternate")


class Divisors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is divided by: a GPU takes a plain number for its inverse to multiply by."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator._schema.name.startswith("aten::div"):
            self.places.add(args[1].device.type if isinstance(args[1], torch.Tensor) else "a number")
        return operator(*args, **(kwargs or {}))


class Sendings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what goes from the CPU to another device; "meta" has no numbers, so a look at one raises."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = operator(*args, **(kwargs or {}))
        places = {one.device.type for one in args if isinstance(one, torch.Tensor)}
        if isinstance(answer, torch.Tensor):
            self.num += "cpu" in places and answer.device.type == "meta"
        return answer


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and those whose outcome has `large` numbers or more; on a GPU all but views are kernels."""

    def __init__(self, large: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = self.num_large = 0
        self._large = large

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = operator(*args, **(kwargs or {}))
        if not operator.is_view and operator._schema.name != "aten::_unsafe_view":
            self.num += 1
            self.num_large += isinstance(answer, torch.Tensor) and answer.numel() >= self._large
        return answer


def split(height: int = 9, width: int = 7) -> MemorySplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM, 3, height, width), dtype=torch.uint8, generator=generator)
    return MemorySplit(images, torch.arange(NUM) % 3, ("a", "b", "c"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1))


@pytest.mark.parametrize("recipe", [EVERYTHING, ALTERNATING, FLIPPED, DataRecipe(batch_size=BATCH)])
def test_what_a_gpu_would_compute_has_the_same_bits(recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for is_asynchronous in (False, True):
        monkeypatch.setattr(later, "is_asynchronous", lambda device, it_is=is_asynchronous: it_is)
        loader = train_loader(split(), StepSampler(NUM, batch_size=BATCH, num_replicas=2, rank=1), recipe, accumulate=2)
        parts = [part for epoch in range(2) for step in loader.epoch(epoch) for part in step.parts]
        found.append([(part.data[0], part.data[1], part.samples) for part in parts])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("recipe", [EVERYTHING, ALTERNATING])
def test_in_a_step_nothing_is_sent_to_the_device(recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "is_asynchronous", lambda device: device.type == "meta")
    device = torch.device("meta")
    loader = train_loader(split(), StepSampler(NUM, batch_size=BATCH), recipe, accumulate=2, device=device)
    by_step = []
    for epoch in range(2):
        steps = loader.epoch(epoch)
        for _ in range(NUM_STEPS):
            with Sendings() as sent:
                batch = next(steps)
            by_step.append(sent.num)
            assert {part.data[0].device for part in batch.parts} == {device}
    assert by_step[1:NUM_STEPS] == by_step[NUM_STEPS + 1 :] == [0] * (NUM_STEPS - 1)
    assert by_step[NUM_STEPS] == 1, "an epoch's order, once"


def test_an_evaluation_sends_nothing_after_its_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "is_asynchronous", lambda device: device.type == "meta")
    batches = iter(eval_loader(split(), EVERYTHING, batch_size=BATCH, device=torch.device("meta")))
    next(batches)
    with Sendings() as sent:
        assert len(list(batches)) == NUM_STEPS - 1
    assert sent.num == 0


def test_bytes_are_normalised_by_true_divisions() -> None:
    with Divisors() as divisors:
        normalise(split().images.to("meta"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1))
    assert divisors.places == {"meta"}


@pytest.mark.parametrize("recipe", [EVERYTHING, ALTERNATING])
@pytest.mark.parametrize(("size", "accumulate", "side"), [(1, 1, 16), (2, 2, 16), (1, 1, 9)])
def test_several_batches_are_prepared_at_once_to_the_same_bits(
    recipe: DataRecipe, size: int, accumulate: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from the second step on, as a resumed run has them, and with less than half of the kernels.

    Each begins where memory of its own does: kernels are chosen by it.
    """
    found, num_operators = [], []
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    for most_bytes in (0, bunches._MOST_BYTES):
        monkeypatch.setattr(bunches, "_MOST_BYTES", most_bytes)
        sampler = StepSampler(NUM, batch_size=BATCH, num_replicas=size, rank=size - 1)
        loader = train_loader(split(side, 16), sampler, recipe, accumulate=accumulate)
        with Operators() as ran:
            steps = [step for epoch, start in ((0, 0), (1, 1)) for step in loader.epoch(epoch, start)]
        found.append([(*part.data, part.samples, torch.tensor(part.weight)) for step in steps for part in step.parts])
        num_operators.append(ran.num)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert other[0].is_contiguous()
        assert all(tensor.storage_offset() * tensor.element_size() % 512 == 0 for tensor in other[:2])
    assert num_operators[1] < num_operators[0] / (2 * accumulate)


@pytest.mark.parametrize(
    ("recipe", "most", "most_large"),
    [(EVERYTHING, 57, 5), (ALTERNATING, 59, 4), (DataRecipe(batch_size=BATCH), 8, 3)],
)
def test_an_epoch_takes_few_kernels_of_which_few_go_over_the_images(
    recipe: DataRecipe, most: int, most_large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched, gathered for crop and flip, looked up by two, cut out: all batches at once.

    Of them a dozen make the order's samples and their places, and some twenty their uniform numbers; three copy labels.
    """
    monkeypatch.setattr(later, "is_asynchronous", lambda device: device.type == "meta")
    loader = train_loader(split(16, 16), StepSampler(NUM, batch_size=BATCH), recipe, device=torch.device("meta"))
    list(loader.epoch(0))
    with Operators(NUM * 3 * 16 * 16) as ran:
        assert len(list(loader.epoch(0))) == NUM_STEPS
    assert ran.num <= most
    assert ran.num_large <= most_large


def test_no_more_are_prepared_at_once_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each batch by itself where it is mixed from its images."""
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    image = 3 * 16 * 16 * 4
    mixed = ImageClassification(split(16, 16), Recipe(data=EVERYTHING), mixup=1.0)
    for (height, width), task, most_bytes, expected in (
        ((16, 16), None, 23 * image, [16, 14]),
        ((16, 16), None, 3 * image, [8, 8, 8, 6]),
        ((9, 7), None, 2**20, [30]),
        ((16, 16), mixed, 2**20, [8, 8, 8, 6]),
    ):
        monkeypatch.setattr(bunches, "_MOST_BYTES", most_bytes)
        images = split(height, width)
        task = task or image_task(images, EVERYTHING)
        sizes: list[int] = []
        prepare = type(task).prepare

        def counted(self: Any, batch: Any, *rest: Any, prepare: Any = prepare, sizes: Any = sizes, **kw: Any) -> Any:
            sizes.append(len(batch[0]))
            return prepare(self, batch, *rest, **kw)

        counted.__module__ = prepare.__module__
        with monkeypatch.context() as patch:
            patch.setattr(ImageClassification, "prepare", counted)
            list(Loader(images, StepSampler(NUM, batch_size=BATCH), EVERYTHING, task).epoch(0))
        assert sizes == expected


@pytest.mark.parametrize(("height", "width", "padding"), [(1, 1, 1), (1, 5, 0), (5, 1, 3), (2, 9, 1), (8, 8, 2)])
@pytest.mark.parametrize("num", [0, 1, 5])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_shape_and_layout_is_shown_as_the_cpu_shows_it(
    height: int, width: int, padding: int, num: int, channels: int
) -> None:
    """At the ends of the range of places, too; of pictures, (H, W, C), and of what is cut out of larger images."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (num, height + 2, width + 2, channels), dtype=torch.uint8, generator=generator)
    by_rows = pictures.permute(0, 3, 1, 2)[:, :, 1:-1, 1:-1].contiguous(memory_format=torch.channels_last)
    u, mean, std = torch.rand(num, 2, generator=generator), (0.5, 0.4, 0.3, 0.2)[:channels], (0.1,) * channels
    u[:1], u[1:2] = 0, 1 - 2**-24
    which = torch.arange(num) % 2 == 0
    for images in (by_rows.contiguous(), by_rows, pictures.permute(0, 3, 1, 2)[:, :, 1:-1, 1:-1]):
        for reflect in (False, *([True] if padding < min(height, width) else [])):
            for mirrored in (None, which):
                moved = crop(images, padding, u, reflect=reflect) if padding else images
                expected = normalise(moved if mirrored is None else mirror(moved, mirrored), mean, std)
                shown = on_device.shown(
                    images, mean, std, padding=padding, reflect=reflect, u=u, mirrored=mirrored
                )  # fmt: skip
                assert torch.equal(shown, expected)
                assert shown.is_contiguous()

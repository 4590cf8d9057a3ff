"""digits, synthetic, and data sets of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from disttrain.data import Datasets, MemorySplit, StreamSplit, as_datasets, as_split
from disttrain.errors import ConfigurationError, UserCodeError
from disttrain.recipe import DataRecipe
from tests.disttrain.data.loaders import eval_loader

Load = Callable[..., Datasets]
BYTES, FLOATS = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.zeros(6, 1, 4, 4, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_digits_are_scikit_learns(load: Load) -> None:
    from sklearn.datasets import load_digits

    data = load(dataset="digits")
    assert isinstance(data.train, MemorySplit)
    assert isinstance(data.test, MemorySplit)
    assert (len(data.train), len(data.test), data.train.sample_shape) == (1437, 360, (3, 32, 32))
    images = torch.cat([data.train.images, data.test.images])[:, 0, ::4, ::4].float() * 16 / 255
    labels = torch.cat([data.train.labels, data.test.labels])
    ours = sorted(zip(images.round().int().flatten(1).tolist(), labels.tolist(), strict=True))
    digits = load_digits()
    assert ours == sorted(zip(digits.data.astype(int).tolist(), digits.target.tolist(), strict=True))
    again = load(dataset="digits")
    assert isinstance(again.test, MemorySplit)
    assert torch.equal(again.test.images, data.test.images)
    pixels = data.train.images[:, 0].float() / 255
    assert data.train.mean == pytest.approx((float(pixels.mean()),) * 3, abs=1e-4)
    assert data.train.std == pytest.approx((float(pixels.std()),) * 3, abs=1e-4)


def test_digits_without_scikit_learn(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigurationError, match="'digits' comes with scikit-learn; pip install scikit-learn"):
        load(dataset="digits")


def test_synthetic_is_fixed_of_the_size_asked_for_and_learnable(load: Load) -> None:
    options = {"num_train": 200, "num_test": 100, "num_classes": 2, "image_size": 16, "channels": 1, "seed": 3}
    one, other = (load(dataset="synthetic", options=options) for _ in range(2))
    assert isinstance(one.train, MemorySplit)
    assert isinstance(other.train, MemorySplit)
    assert isinstance(one.test, MemorySplit)
    assert torch.equal(one.train.images, other.train.images)
    assert (len(one.train), len(one.test), len(one.train.classes), one.train.sample_shape) == (200, 100, 2, (1, 16, 16))
    means = torch.stack([one.train.images[one.train.labels == k].float().mean(0).flatten() for k in range(2)])
    nearest = torch.cdist(one.test.images.float().flatten(1), means).argmin(1)
    assert (nearest == one.test.labels).float().mean() > 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 3}, "data.options.size: 'synthetic' has no such option; it has num_train, num_test"),
        ({"num_train": 0}, "data.options.num_train: 0 is not a whole number of 1 or more"),
        ({"channels": 1.5}, "data.options.channels: 1.5 is not a whole number"),
    ],
)
def test_synthetic_with_wrong_options(load: Load, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(dataset="synthetic", options=options)


def test_image_size_is_for_folders(load: Load) -> None:
    with pytest.raises(ConfigurationError, match=r"data.image_size: only for dataset 'folder', and this is 'digits'"):
        load(dataset="digits", image_size=8)


def test_any_set_can_be_streamed(load: Load) -> None:
    data = load(dataset="synthetic", layout="stream")
    assert isinstance(data.train, StreamSplit)
    assert data.train.dataset[5][0].shape == data.train.sample_shape == (3, 32, 32)


class Pairs:
    """A map-style data set of whatever it is given."""

    def __init__(self, *images: Any, classes: list[str] | None = None) -> None:
        self.images = images
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], index


@pytest.mark.parametrize(
    ("samples", "dtype"),
    [
        ((BYTES, LABELS), torch.uint8),
        ((BYTES.numpy(), LABELS.numpy().astype(np.int32)), torch.uint8),
        ((FLOATS, LABELS), torch.float32),
        (TensorDataset(BYTES, LABELS), torch.uint8),
    ],
)
def test_tensors_are_held_in_memory(samples: Any, dtype: torch.dtype) -> None:
    split = as_split(samples, DataRecipe())
    assert isinstance(split, MemorySplit)
    assert split.images.dtype == dtype
    assert split.classes == ("0", "1", "2")
    assert split.mean == split.std == ((0.5,) if dtype == torch.uint8 else None)
    assert as_split(split, DataRecipe()) is split


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 28, 28, 1), (1, 28, 28)),
        ((5, 6, 8, 3), (3, 6, 8)),
        ((5, 4, 4, 3), (3, 4, 4)),
        ((5, 12, 12, 6), (6, 12, 12)),
        ((5, 3, 6, 8), (3, 6, 8)),
        ((5, 1, 4, 4), (1, 4, 4)),
        ((5, 6, 12, 12), (6, 12, 12)),
    ],
)
def test_arrays_are_taken_as_their_shape_says(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    right = images if shape[1:] == expected else images.transpose(0, 3, 1, 2)
    held = as_split((images, np.arange(5)), DataRecipe())
    read = as_split(Pairs(*images, classes=list("abcde")), DataRecipe())
    assert isinstance(held, MemorySplit)
    assert isinstance(read, StreamSplit)
    assert held.sample_shape == read.sample_shape == expected
    assert np.array_equal(held.images.numpy(), right)
    assert np.array_equal(read.dataset[3][0].numpy(), right[3])
    turned = as_split(Pairs(*images[..., ::-1], classes=list("abcde")), DataRecipe())  # strides that torch refuses
    assert turned.sample_shape == expected


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((6, 3, 8, 3), np.uint8), r"an array \(3, 8, 3\) may be \(height, width, channels\) or \(channels"),
        (np.zeros((6, 64, 4, 4), np.uint8), r"an array \(64, 4, 4\) may be"),
        (torch.zeros(6, 28, 28, 1), r"a tensor \(28, 28, 1\) looks like \(height, width, channels\).*use permute"),
        (torch.zeros(6, 6, 8, 3), r"a tensor \(6, 8, 3\) looks like"),
        (np.zeros((6, 1, 4, 4), object), "can't convert np.ndarray of type numpy.object_"),
    ],
)
def test_images_that_may_be_either_way_round_are_refused(images: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        as_split((images, LABELS), DataRecipe())
    with pytest.raises(ConfigurationError, match=f"sample 0 of the data set is not a pair .*{message}"):
        as_split(Pairs(*images, classes=list("abcdef")), DataRecipe())


def test_floats_are_used_as_they_are_and_one_set_has_one_type(caplog: pytest.LogCaptureFixture) -> None:
    data = as_datasets((FLOATS, LABELS), (FLOATS, LABELS), DataRecipe(mean=[0.1], std=[0.2]))
    assert data.train.mean is data.test.std is None
    assert "data.mean and data.std are for bytes: the training set gives floats" in caplog.text
    streamed = as_split(Pairs(FLOATS[0], BYTES[0], classes=["a", "b"]), DataRecipe(workers=0))
    with pytest.raises(ConfigurationError, match=r"sample 1 is torch\.uint8 and the first sample torch\.float32"):
        list(eval_loader(streamed, DataRecipe(workers=0), batch_size=2))
    with pytest.raises(ConfigurationError, match=r"training images are torch\.float32 and test .*torch\.uint8"):
        as_datasets((FLOATS, LABELS), (BYTES, LABELS), DataRecipe())
    one, other = (MemorySplit(BYTES, LABELS, ("a", "b", "c"), (mean,), (0.5,)) for mean in (0.5, 0.4))
    with pytest.raises(ConfigurationError, match=r"normalised by mean \(0.5,\) .* and test images by \(0.4,\)"):
        Datasets(one, other)
    with pytest.raises(ConfigurationError, match="images of bytes need a mean and a std"):
        MemorySplit(BYTES, LABELS, ("a", "b", "c"))
    with pytest.raises(ConfigurationError, match=r"the images must be uint8 or float32, not torch\.int32"):
        StreamSplit([(BYTES[0].int(), 0)], ("a", "b"))


def test_map_style_sets_are_streamed_as_tensors() -> None:
    grey = np.zeros((5, 6), dtype=np.uint8)
    for image, channels in ((Image.fromarray(grey), 1), (grey, 1), (np.zeros((5, 6, 3), dtype=np.uint8), 3)):
        split = as_split(Pairs(image, image, classes=["a", "b"]), DataRecipe())
        assert isinstance(split, StreamSplit)
        assert split.sample_shape == (channels, 5, 6)
        assert split.dataset[1][0].dtype == torch.uint8
        assert split.classes == ("a", "b")
    assert as_split(Pairs(FLOATS[0], classes=["a"]), DataRecipe()).dataset[0][0].dtype == torch.float32


def test_classes_are_those_of_the_set_within_or_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "disttrain")
    named, others = Pairs(*BYTES, classes=list("abcdef")), Pairs(*BYTES, classes=list("uvwxyz"))
    for samples in (Subset(named, [1, 2]), Subset(Subset(named, [1, 2]), [0]), ConcatDataset([named, named])):
        assert as_split(samples, DataRecipe()).classes == tuple("abcdef")
    assert not caplog.records
    counted = as_split(ConcatDataset([named, others]), DataRecipe(), name="the training set")
    assert counted.classes == tuple("012345")
    assert "the training set does not name its classes: each of its 12 samples is read" in caplog.text
    assert "6 classes, counted from the labels 0 to 5 of the training set." in caplog.text
    pairs = as_split([(torch.rand(1, 4, 4), 3), (torch.rand(1, 4, 4), 1)], DataRecipe(), name="the list")
    assert pairs.classes == tuple("0123")
    assert "4 classes, counted from the labels 1 to 3 of the list; only 2 of them occur." in caplog.text
    as_split((BYTES, LABELS * 2), DataRecipe(), name="the tensors")
    assert "5 classes, counted from the labels 0 to 4 of the tensors; only 3 of them occur." in caplog.text


@pytest.mark.parametrize("classes", [6, "abcdef"])
def test_names_of_classes_that_are_none_are_refused(classes: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"the set: its attribute 'classes' is {classes!r}, not a list of"):
        as_split(Pairs(*BYTES, classes=classes), DataRecipe(), name="the set")


def test_a_test_set_takes_its_names_from_the_training_set() -> None:
    data = as_datasets((BYTES, LABELS), (BYTES[:2], LABELS[:2]), DataRecipe(mean=[0.1], std=[0.2]))
    assert data.test.classes == ("0", "1", "2")
    assert data.test.mean == (0.1,)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (3, "a int is not a data set; give"),
        (BYTES, "a Tensor is not a data set"),
        ((BYTES, LABELS[:2]), r"labels must be \(6,\) int64, one per image, or \(6, 2\) float32, .* not \(2,\)"),
        ((BYTES[0], LABELS), r"images must be \(N, C, H, W\) uint8 or float32, not \(1, 4, 4\) torch.uint8"),
        ((BYTES, LABELS - 1), "label -1 is outside 0..1, the 2 classes"),
        ((BYTES, LABELS.float()), "labels must be"),
        ((BYTES[:0], LABELS[:0]), "the data set is empty"),
        ("a folder", "a str is not a data set"),
        ({"images": BYTES}, "a dict is not a data set"),
        (
            DataLoader([(BYTES[0], 0)]),
            "a DataLoader makes batches, but disttrain makes its own, of data.batch_size samples",
        ),
        (list, "list makes a data set, but is not one; call it"),
        ([(BYTES[0], 0.5)], "sample 0 of the data set is not a pair .*the label 0.5 is not a whole number"),
        ([(BYTES[0], "0")], "sample 0 of the data set is not a pair .*the label '0' is not a whole number"),
        ([(BYTES[0], torch.eye(2))], "sample 0 of the data set is not a pair"),
        ([(BYTES[0], 2**40)], "label 1099511627776 is not a valid class number"),
        (Pairs(classes=["a"]), "the data set is empty"),
        (Pairs("x", classes=["a"]), r"sample 0 of the data set is not a pair \(image, label\): the image is a str"),
        (Pairs(BYTES[0].int(), classes=["a"]), "the image is torch.int32, neither uint8 nor floating point"),
    ],
)
def test_what_is_no_data_set_is_refused(samples: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        as_split(samples, DataRecipe())


def test_the_two_splits_must_match() -> None:
    with pytest.raises(ConfigurationError, match=r"training images are \(1, 4, 4\) .* and test images \(1, 4, 3\)"):
        as_datasets((BYTES, LABELS), (BYTES[:, :, :, :3], LABELS), DataRecipe())
    with pytest.raises(ConfigurationError, match="the training set has 3 classes and the test set 1"):
        Datasets(as_split((BYTES, LABELS), DataRecipe()), as_split((BYTES, LABELS * 0), DataRecipe()))


MODULE = """
import torch
from disttrain.data.sources.synthetic import synthetic_images

def tensors(num=6):
    return (torch.zeros(num, 1, 4, 4), torch.arange(num) % 2), (torch.zeros(2, 1, 4, 4), torch.arange(2))

def datasets():
    return synthetic_images(num_train=7)

def nonsense():
    return 3

def bad_test_set():
    return (torch.zeros(6, 1, 4, 4), torch.arange(6) % 2), (torch.zeros(2, 1, 4, 4), torch.arange(3))

def other_shapes():
    return (torch.zeros(6, 1, 4, 4), torch.arange(6) % 2), (torch.zeros(2, 1, 4, 5), torch.arange(2))

class Broken:
    classes = ["a", "b"]
    def __init__(self, bad):
        self.bad = bad
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return (torch.zeros(1, 4, 4), 0) if index != self.bad else None

def broken_train_set():
    return Broken(0), Broken(None)

def broken_later():
    return Broken(None), Broken(2)

def type_error():
    return None + 1

def missing_file():
    return open("labels.csv")
"""


@pytest.fixture
def my_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, in the folder where the command is started."""
    (tmp_path / "my_sets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_sets", raising=False)


@pytest.mark.usefixtures("my_sets")
def test_a_callable_makes_the_set(load: Load) -> None:
    assert len(load(dataset="my_sets:tensors", options={"num": 4}).train) == 4
    assert len(load(dataset="my_sets:datasets").train) == 7


@pytest.mark.usefixtures("my_sets")
@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("my_sets:tensor", {}, "data.dataset: module 'my_sets' has no 'tensor'; did you mean 'tensors'?"),
        ("my_set:tensors", {}, "data.dataset: there is no module 'my_set'; start in the folder that holds it"),
        ("my_sets:nonsense", {}, r"my_sets:nonsense returned a int; it should return \(train_set, test_set\)"),
        ("my_sets:tensors", {"n": 4}, r"data.options: my_sets:tensors does not take n; it takes num"),
        ("my_sets:bad_test_set", {}, r"^the test set of data.dataset = 'my_sets:bad_test_set': labels must be \(2,\)"),
        ("my_sets:other_shapes", {}, r"^data.dataset = 'my_sets:other_shapes': training images are \(1, 4, 4\)"),
        ("my_sets:broken_train_set", {}, r"^sample 0 of the training set of data.dataset = 'my_sets:broken_train_set'"),
    ],
)
def test_a_callable_that_does_not_fit(load: Load, reference: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(dataset=reference, options=options)


@pytest.mark.usefixtures("my_sets")
def test_a_sample_that_is_read_later_is_named_with_its_set(load: Load) -> None:
    test = load(dataset="my_sets:broken_later").test
    with pytest.raises(ConfigurationError, match=r"^sample 2 of the test set of data.dataset = 'my_sets:broken_later'"):
        test.dataset[2]  # type: ignore[union-attr]


@pytest.mark.usefixtures("my_sets")
def test_a_mistake_inside_the_callable_is_not_laid_to_its_options(load: Load, tmp_path: Path) -> None:
    with pytest.raises(
        UserCodeError, match=r"^data.dataset = 'my_sets:type_error': TypeError: unsupported operand"
    ) as one:
        load(dataset="my_sets:type_error")
    line = MODULE.splitlines().index("    return None + 1") + 1
    assert f"({tmp_path / 'my_sets.py'}:{line})" in str(one.value)
    assert "in type_error" in str(one.value.trace)
    with pytest.raises(UserCodeError, match=r"FileNotFoundError.*labels.csv") as other:  # no fault of data.root
        load(dataset="my_sets:missing_file")
    assert "data.root" not in str(other.value)

"""Pictures from files, of every kind that there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from disttrain.data import as_split, read_picture
from disttrain.data.sources.picture import in_eight_bits
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe

COLOURS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def read(path: Path, **options: Any) -> np.ndarray[Any, Any]:
    pixels: np.ndarray[Any, Any] = read_picture(path, **options).permute(1, 2, 0).numpy()
    return pixels


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.webp"])
def test_ordinary_pictures_are_as_pillow_converts_them(name: str, tmp_path: Path) -> None:
    for mode in ("RGB", "L", "P", "CMYK", "1"):
        picture = Image.fromarray(COLOURS).convert(mode)
        try:
            picture.save(tmp_path / name)
        except OSError:
            continue  # not in this format
        with Image.open(tmp_path / name) as opened:
            assert np.array_equal(read(tmp_path / name), np.asarray(opened.convert("RGB")))
        with Image.open(tmp_path / name) as opened:
            assert np.array_equal(read(tmp_path / name, channels=1)[..., 0], np.asarray(opened.convert("L")))


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_stands_as_its_camera_was_held(orientation: int, tmp_path: Path) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("x.jpg", "x.png", "x.webp", "x.tif"):
        Image.fromarray(COLOURS).save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        assert np.array_equal(read(tmp_path / name), expected)
        assert expected.shape[:2] == ((7, 9) if 5 <= orientation <= 8 else (9, 7))


def test_damaged_exif_data_harm_nobody(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "x.png", exif=b"Exif\0\0nonsense")
    assert np.array_equal(read(tmp_path / "x.png"), COLOURS)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_become_eight_in_proportion(name: str, tmp_path: Path) -> None:
    wide = np.array([[0, 128, 129, 256], [257, 32768, 65534, 65535]], dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / name)
    expected = np.round(wide / 257).astype(np.uint8)
    assert expected.tolist() == [[0, 0, 1, 1], [1, 128, 255, 255]]
    assert np.array_equal(read(tmp_path / name, channels=1)[..., 0], expected)
    assert np.array_equal(read(tmp_path / name), np.repeat(expected[..., None], 3, axis=2))
    sample = as_split(Own(Image.fromarray(wide)), DataRecipe()).dataset[0][0]
    assert np.array_equal(sample[0].numpy(), expected)


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "integers"), (np.float32, "floats")])
def test_pixels_of_unknown_range_are_refused_by_name(dtype: Any, kind: str, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=dtype)).save(tmp_path / "x.tif")
    with pytest.raises(
        ConfigurationError, match=f"x.tif: cannot be read as a picture .its pixels are 32-bit {kind} of"
    ):
        read_picture(tmp_path / "x.tif")
    with pytest.raises(ConfigurationError, match=f"sample 0 of .* is not a pair .*its pixels are 32-bit {kind}"):
        as_split(Own(Image.fromarray(np.zeros((4, 4), dtype=dtype))), DataRecipe())


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    alpha = np.full((9, 7), 255, dtype=np.uint8)
    alpha[:3] = 0
    clear = Image.fromarray(np.dstack([COLOURS, alpha]))
    expected = COLOURS.copy()
    expected[:3] = 255
    clear.save(tmp_path / "x.png")
    assert np.array_equal(read(tmp_path / "x.png"), expected)
    assert np.array_equal(as_split(Own(clear), DataRecipe()).dataset[0][0].permute(1, 2, 0).numpy(), expected)
    for mode in ("LA", "PA", "RGBa"):
        assert (
            np.asarray(in_eight_bits(clear.convert("RGBA").convert(mode) if mode != "PA" else pa(), "RGB"))[0].min()
            > 250
        )
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "x.gif", transparency=0)
    assert read(tmp_path / "x.gif").min() == 255
    palette.save(tmp_path / "y.gif")
    assert read(tmp_path / "y.gif")[0, 0].tolist() == [10, 20, 30]
    opaque = Image.fromarray(np.dstack([COLOURS, np.full((9, 7), 255, dtype=np.uint8)]))
    assert np.array_equal(np.asarray(in_eight_bits(opaque, "RGB")), COLOURS)


def pa() -> Image.Image:
    picture = Image.new("PA", (4, 4))
    picture.putpalette([10, 20, 30])
    return picture


class Own:
    """A data set of one picture."""

    classes = ("a", "b")

    def __init__(self, picture: Image.Image) -> None:
        self.picture = picture

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.picture, 0

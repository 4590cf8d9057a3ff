"""Pictures from files.

What is done to one, in training and in `predict` alike: it is turned as its EXIF orientation says, as every viewer
does; what is transparent becomes white; 16 bits a channel become 8, in proportion. 32-bit integers and floats are
refused, because their white is unknown.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from disttrain.errors import ConfigurationError
from disttrain.files import open_to_read

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture is set upright again, by its EXIF orientation."""


def read_picture(path: Path, size: tuple[int, int] | None = None, channels: int = 3) -> torch.Tensor:
    """The picture at `path` as (C, H, W) uint8, in colour, or in grey for one channel.

    With `size` (H, W), the shorter side is resized to fit (bilinear, antialiased) and the middle cropped. Raises
    ConfigurationError, which names the file, if it cannot be read.
    """
    try:
        with open_to_read(path, follow=True) as file, Image.open(file) as opened:
            picture = _upright(in_eight_bits(opened, "L" if channels == 1 else "RGB"), opened)
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        reason = "it is in no known format" if isinstance(error, UnidentifiedImageError) else error
        reason = getattr(error, "strerror", None) or reason
        raise ConfigurationError(f"{path}: cannot be read as a picture ({reason}); replace or remove it.") from error
    if size is not None and size != (picture.height, picture.width):
        picture = _fitted(picture, *size)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def in_eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """`picture` in mode "RGB" or "L", on white where it is transparent. Raises ValueError for 32-bit pixels."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        # Pillow's own conversion clips at 255. In these formats its "I" holds 16 bits.
        wide = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert(mode)
    if picture.mode in ("I", "F"):
        kind = "integers" if picture.mode == "I" else "floats"
        raise ValueError(f"its pixels are 32-bit {kind} of unknown range; convert it to 8 or 16 bits")
    if picture.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info:
        colours = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return picture.convert(mode)


def _upright(picture: Image.Image, opened: Image.Image) -> Image.Image:
    try:
        orientation = opened.getexif().get(_ORIENTATION)
    except Exception:  # a picture with damaged EXIF data is still usable
        return picture
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / picture.height, width / picture.width)
    scaled = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    if scaled != picture.size:
        picture = picture.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return picture.crop((left, top, left + width, top + height))

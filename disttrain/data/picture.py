"""Pictures from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from disttrain.errors import ConfigurationError
from disttrain.files import open_to_read


def read_picture(path: Path, size: tuple[int, int] | None = None, channels: int = 3) -> torch.Tensor:
    """The picture at `path` as (C, H, W) uint8, in colour, or in grey for one channel.

    With `size` (H, W), the shorter side is resized to fit (bilinear, antialiased) and the middle cropped. Raises
    ConfigurationError, which names the file, if it cannot be read.
    """
    try:
        with open_to_read(path, follow=True) as file, Image.open(file) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        reason = "it is in no known format" if isinstance(error, UnidentifiedImageError) else error
        reason = getattr(error, "strerror", None) or reason
        raise ConfigurationError(f"{path}: cannot be read as a picture ({reason}); replace or remove it.") from error
    if size is not None and size != (picture.height, picture.width):
        picture = _fitted(picture, *size)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / picture.height, width / picture.width)
    scaled = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    if scaled != picture.size:
        picture = picture.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return picture.crop((left, top, left + width, top + height))

"""Images of the user's own, arrays, pictures and tensors, as tensors whose channels come first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from disttrain.data.sources.picture import in_eight_bits
from disttrain.errors import ConfigurationError

_USUAL_CHANNELS = (1, 3, 4)


def channels_first(images: Any) -> torch.Tensor:
    """Images (N, C, H, W) as they are, an array (N, H, W, C) with its channels moved.

    Raises ConfigurationError for an array that may be either, and for a tensor that looks like (N, H, W, C).
    """
    try:
        if images.ndim != 4:
            return torch.as_tensor(images)
        if isinstance(images, torch.Tensor):
            _refuse_channels_last(images.shape[1:])
            return images
        return _tensor_of(np.moveaxis(images, 3, 1) if _is_channels_last(images.shape[1:], False) else images)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"images: {error}") from error


def as_tensor(image: Any) -> torch.Tensor:
    """A picture or an array, (H, W, C), (C, H, W) or (H, W), as (C, H, W); tensors as they are; float64 as float32.

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(image, Image.Image):
        image = np.array(image if image.mode in ("L", "RGB") else in_eight_bits(image, "RGB"))
        image = _tensor_of(image[None] if image.ndim == 2 else np.moveaxis(image, 2, 0))
    elif isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = image[None]
        elif image.ndim == 3 and _is_channels_last(image.shape, True):
            image = np.moveaxis(image, 2, 0)
        image = _tensor_of(image)
    if not isinstance(image, torch.Tensor) or image.ndim != 3:
        raise TypeError(f"the image is a {type(image).__name__}, not a picture or a tensor (channels, height, width)")
    _refuse_channels_last(image.shape)
    if image.is_floating_point():
        return image.float()
    if image.dtype != torch.uint8:
        raise TypeError(f"the image is {image.dtype}, neither uint8 nor floating point")
    return image


def _is_channels_last(shape: Sequence[int], usually: bool) -> bool:
    """Whether an array of this shape is (H, W, C), not (C, H, W); as `usually` where nothing speaks for either.

    Raises ValueError where as much speaks for one as for the other.
    """
    first, last = _likelihoods(shape)
    if first == last == 0:
        return usually
    if first == last:
        raise ValueError(
            f"an array {tuple(shape)} may be (height, width, channels) or (channels, height, width); give tensors, "
            "whose channels come first"
        )
    return last > first


def _refuse_channels_last(shape: Sequence[int]) -> None:
    """Raise ValueError for a tensor that is surely (H, W, C)."""
    first, last = _likelihoods(shape)
    if first == 0 and (last == 2 or (last == 1 and shape[2] == 3)):
        raise ValueError(
            f"a tensor {tuple(shape)} looks like (height, width, channels), and the channels of a tensor come first: "
            "use permute"
        )


def _likelihoods(shape: Sequence[int]) -> tuple[int, int]:
    """How much speaks for (C, H, W) and for (H, W, C): a usual number of channels, and a square image."""
    one, two, three = shape
    return (one in _USUAL_CHANNELS) + (two == three), (three in _USUAL_CHANNELS) + (one == two)


def _tensor_of(array: Any) -> torch.Tensor:
    if min(array.strides, default=0) < 0:  # turned by array[::-1], which torch does not take
        array = array.copy()
    return torch.from_numpy(np.ascontiguousarray(array))

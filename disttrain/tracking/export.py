"""The trained model as a file that predicts without our code: a graph and its weights, made by `torch.export`.

The exported model takes images as the data set holds them and does the rest itself:

    images: (N, C, H, W) float32, any N  ->  probabilities: (N, num_classes) float32

The images are pixels from 0 to 255, or, of a data set that gives floats, those floats; `model.json` says which.

Plain PyTorch runs it: `torch.export.load("model/model.pt2").module()(images)`. Nothing in it is a pickle of code.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from disttrain.layout import MODEL

if TYPE_CHECKING:
    from torch import Tensor, nn

EXPORT_FILE = "model.pt2"
DESCRIPTION_FILE = "model.json"


def export_model(
    folder: Path,
    module: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    classes: Sequence[str],
    sample_shape: tuple[int, ...],
) -> str | None:
    """Write `module` with its normalisation into `folder`, which is replaced.

    Args:
        folder: gets `model.pt2` and `model.json`.
        module: maps normalised images (N, C, H, W) to logits (N, num_classes). Left as it is: a copy on the CPU in
            evaluation mode is exported.
        mean, std: per channel, of images scaled to 0..1; None for a data set whose images are floats already, which
            are then neither scaled nor normalised.
        classes: names, in the order of the logits.
        sample_shape: (C, H, W).

    Returns:
        None, or the reason why the module cannot be exported; `model.safetensors` then holds its weights instead.

    Raises OSError.
    """
    import torch

    are_pixels = mean is not None and std is not None
    # An example of one image would fix the batch size to 1 (torch.export specialises sizes 0 and 1).
    example = example_images(2, sample_shape, are_pixels=are_pixels)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    reason = None
    try:
        with _quiet():
            served = _served(module, mean, std)
            program = torch.export.export(served, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
            _check(program.module(), served, example_images(3, sample_shape, are_pixels=are_pixels))
            with (temporary / EXPORT_FILE).open("wb") as file:  # a path that is not UTF-8 would abort the process
                torch.export.save(program, file)
    except OSError:
        raise
    except Exception as error:  # a user's module may do anything in its forward
        from safetensors.torch import save

        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        (temporary / EXPORT_FILE).unlink(missing_ok=True)
        state = module.state_dict().items()
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in state if torch.is_tensor(value)}
        (temporary / MODEL).write_bytes(save(weights))
    description = {
        "classes": list(classes),
        "sample_shape": list(sample_shape),
        "images": "pixels from 0 to 255" if are_pixels else "floats, as the data set gives them",
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "torch": torch.__version__,
    }
    (temporary / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return reason


def example_images(num: int, sample_shape: tuple[int, ...], *, are_pixels: bool = True) -> Tensor:
    """`num` images of a smooth ramp of grey, (num, C, H, W) float32: whole numbers 0 to 255, or floats of -1 to 1."""
    import torch

    size = 1
    for length in sample_shape:
        size *= length
    ramp = torch.linspace(0, 255, size).round().reshape(1, *sample_shape)
    images = torch.cat([ramp if i % 2 == 0 else 255 - ramp for i in range(num)])
    return images if are_pixels else images / 127.5 - 1


def _served(module: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """A copy of `module`, on the CPU and in evaluation mode, from raw pixels to probabilities."""
    import torch
    from torch import nn

    class Served(nn.Module):
        mean: Tensor
        std: Tensor

        def __init__(self) -> None:
            super().__init__()
            plain = getattr(module, "_orig_mod", module)  # what torch.compile wrapped
            self.model = copy.deepcopy(plain).to(device="cpu", dtype=torch.float32)
            self.normalised = mean is not None and std is not None
            if self.normalised:
                self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
                self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

        def forward(self, images: Tensor) -> Tensor:
            if self.normalised:
                images = ((images / 255) - self.mean) / self.std
            return torch.softmax(self.model(images), dim=1)

    served = Served().eval()
    for parameter in served.parameters():
        parameter.requires_grad_(False)
    return served


def _check(exported: nn.Module, served: nn.Module, images: Tensor) -> None:
    """Raise ValueError unless both give the same probabilities on `images`, a batch of a size that was not traced."""
    import torch

    with torch.no_grad():
        if not torch.allclose(exported(images), served(images), rtol=1e-4, atol=1e-5):
            raise ValueError("the exported model predicts differently; its forward may use random numbers")


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns and logs about its own inner workings, which are of no use to a user."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch._dynamo", "torch.fx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

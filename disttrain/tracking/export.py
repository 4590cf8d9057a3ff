"""The trained model as a file that predicts without our code: a graph and its weights, made by `torch.export`.

What the graph takes and gives is the task's business (`Task.export`): of images

    images: (N, C, H, W) float32, any N  ->  probabilities: (N, num_classes) float32

The images are pixels from 0 to 255, or, of a data set that gives floats, those floats; `model.json` says which.

Plain PyTorch runs it: `torch.export.load("model/model.pt2").module()(images)`. Nothing in it is a pickle of code.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttrain.layout import MODEL

if TYPE_CHECKING:
    from torch import nn

EXPORT_FILE = "model.pt2"
DESCRIPTION_FILE = "model.json"


def export_model(
    folder: Path,
    model: nn.Module,
    export: Callable[[nn.Module], tuple[nn.Module, tuple[Any, ...]] | None],
    notes: Callable[[], Mapping[str, Any]],
) -> str | None:
    """Write what `export` makes of the model into `folder`, which is replaced.

    Args:
        folder: gets `model.pt2` and `model.json`.
        model: left as it is: `export` gets a copy on the CPU in evaluation mode, without gradients.
        export: makes the module that is exported, with an example of its arguments: see `Task.export`.
        notes: gives what `model.json` says besides the shapes, as JSON can hold it.

    Returns:
        None, or the reason why the module cannot be exported; `model.safetensors` then holds its weights instead.

    Raises OSError.
    """
    import torch

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    reason, description = None, dict[str, Any]()
    try:
        with _quiet():
            description = json.loads(json.dumps(dict(notes())))
            made = export(_copied(model))
            assert made is not None
            served, example = made
            # Of a batch of one the size would be fixed to 1 (torch.export specialises sizes 0 and 1).
            any_size = tuple({0: torch.export.Dim.AUTO} if _is_batch(one) else None for one in example)
            program = torch.export.export(served, example, dynamic_shapes=any_size)
            outputs = _check(program.module(), served, example)
            description |= {"inputs": _kinds(example), "outputs": _kinds(outputs)}
            with (temporary / EXPORT_FILE).open("wb") as file:  # a path that is not UTF-8 would abort the process
                torch.export.save(program, file)
    except OSError:
        raise
    except Exception as error:  # a user's module may do anything in its forward
        from safetensors.torch import save

        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        (temporary / EXPORT_FILE).unlink(missing_ok=True)
        state = model.state_dict().items()
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in state if torch.is_tensor(value)}
        (temporary / MODEL).write_bytes(save(weights))
    description["torch"] = torch.__version__
    (temporary / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return reason


def warm_up() -> None:
    """Export a module of one line, to nothing: a process's first export imports a second's worth of modules."""
    import torch

    class Line(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with _quiet():
        any_size = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(Line(), (torch.zeros(2),), dynamic_shapes=any_size)
        program.module()(torch.zeros(3))
        torch.export.save(program, io.BytesIO())


def _copied(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32 and evaluation mode, without gradients."""
    import torch

    plain = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    copied: nn.Module = copy.deepcopy(plain).to(device="cpu", dtype=torch.float32).eval()
    return copied.requires_grad_(False)


def _is_batch(argument: Any) -> bool:
    import torch

    return isinstance(argument, torch.Tensor) and argument.ndim > 0


def _kinds(tensors: Any) -> list[dict[str, Any]]:
    """Shape and type of tensors, the first dimension any number: [{"shape": [-1, 3], "dtype": "float32"}]."""
    listed = tensors if isinstance(tensors, list | tuple) else [tensors]
    return [
        {"shape": [-1, *one.shape[1:]], "dtype": str(one.dtype).removeprefix("torch.")}
        for one in listed
        if _is_batch(one)
    ]


def _check(exported: nn.Module, served: nn.Module, example: tuple[Any, ...]) -> Any:
    """What the module gives for a batch of a size that was not traced. Raises ValueError unless both give the same."""
    import torch

    longer = tuple(torch.cat([one, one[:1]]) if _is_batch(one) else one for one in example)
    with torch.no_grad():
        found, expected = exported(*longer), served(*longer)
        try:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        except AssertionError as error:
            raise ValueError("the exported model predicts differently; its forward may use random numbers") from error
    return expected


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

"""Where a step first went wrong: this worker's part of it, computed once more under observation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from disttrain import rng
from disttrain.data import Batch, StepBatch
from disttrain.recipe import TrainRecipe

_log = logging.getLogger("disttrain")
_TUNE = "lower optim.lr, set train.clip_norm, or add schedule.warmup_steps"
_MOST_NAMED = 8


@dataclass(frozen=True)
class Finding:
    """The first thing that is not finite in a micro-batch, the `part`-th of a slice.

    `samples` are those to blame, as far as that can be told, else all of the micro-batch: places in the training set.
    """

    slice_index: int
    part: int
    samples: tuple[int, ...]
    what: str
    comparison: str
    advice: str = _TUNE


class Rerun:
    """Computes steps again as `train_step` does, without the other workers and without changing weights."""

    def __init__(
        self, model: nn.Module, recipe: TrainRecipe, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        self._model, self._recipe, self._device, self._autocast = model, recipe, device, autocast

    def find_first(
        self, batch: StepBatch, step: int, scale: float, restore_buffers: Callable[[], None]
    ) -> Finding | None:
        """The first of this worker's micro-batches with something that is not finite; None if there is none any more.

        `step` counts the steps done before, `scale` is what the loss is multiplied by. Every rank must call it: a model
        may have collectives of its own.
        """
        first: Finding | None = None
        try:
            number = 0
            for part in batch.parts:
                number = 0 if part.opens_slice else number + 1
                if part.opens_slice:
                    restore_buffers()
                    rng.seed_layers(self._device, self._recipe.seed, step, part.slice_index)
                found = self._look_at(part, number, scale)
                first = first or found
        except Exception:  # what was found without it is still to be told
            _log.exception("the step could not be computed again")
        finally:
            restore_buffers()
        return first

    def _look_at(self, part: Batch, number: int, scale: float) -> Finding | None:
        def finding(rows: torch.Tensor, *words: str) -> Finding:
            bad = part.samples[~rows.cpu()] if not rows.all() else part.samples
            return Finding(part.slice_index, number, tuple(bad.tolist()), *words)

        images_of = _finite_rows(part.images)
        with (
            _watched(self._model) as seen,
            torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None),
            torch.compiler.set_stance("force_eager") if self._recipe.compile else nullcontext(),
        ):
            scores = self._model(part.images)
            losses = functional.cross_entropy(
                scores, part.labels, reduction="none", label_smoothing=self._recipe.label_smoothing
            )
        parameters = {name: one for name, one in self._model.named_parameters() if one.requires_grad}
        gradients = torch.autograd.grad(losses.sum() * scale, list(parameters.values()), allow_unused=True)
        if not part.weight:
            return None
        rows = _finite_rows(losses.detach())
        if not images_of.all():
            return finding(images_of, "an image", "", "mend these samples, or take them out of the training set")
        if seen:
            return finding(rows, *seen[0])
        if not rows.all():
            return finding(rows, "the loss", "though the model's scores are")
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and not _is_finite(gradient):
                return finding(rows, f"the gradient of '{name}'", "though the loss is")
        return None


def listed(samples: tuple[int, ...]) -> str:
    """Samples for a message: the first ones by number."""
    shown = ", ".join(map(str, sorted(samples)[:_MOST_NAMED]))
    rest = len(samples) - _MOST_NAMED
    return f"sample{'s' if len(samples) != 1 else ''} {shown}{f' and {rest} more' if rest > 0 else ''}"


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[str, ...]]]:
    """Note the modules whose output is not finite, in the order in which they are done."""
    seen: list[tuple[str, ...]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if seen or all(_is_finite(tensor) for tensor in _tensors(output)):
                return
            what = f"'{name}' ({type(module).__name__})" if name else "the model"
            if not all(_is_finite(tensor) for tensor in module.parameters(recurse=False)):
                seen.append((f"a parameter of {what}", "before this step"))
            elif all(_is_finite(tensor) for tensor in _tensors(arguments)):
                seen.append((f"the output of {what}", "though its input is"))
            else:
                seen.append((f"the input of {what}", "though every module's output before it is"))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _is_finite(tensor: torch.Tensor) -> bool:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(values.isfinite().all())


def _finite_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(len(tensor), -1).isfinite().all(dim=1)

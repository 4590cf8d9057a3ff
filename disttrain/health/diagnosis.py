"""Where a step first went wrong: this worker's part of it, recomputed under observation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from disttrain import rng
from disttrain.data import Batch, StepBatch, tensors_in
from disttrain.errors import brief, where
from disttrain.recipe import TrainRecipe
from disttrain.task import ImageClassification, Task

_log = logging.getLogger("disttrain")
TUNE = "lower optim.lr, set train.clip_norm, or add schedule.warmup_steps"
_MEND = "fix these samples, or take them out of the training set"
_MOST_NAMED = 8


@dataclass(frozen=True)
class Finding:
    """The first thing that is not finite in a micro-batch, the `part`-th of a slice.

    `samples` are those to blame, as far as that is known, else all of the micro-batch: places in the training set.
    """

    slice_index: int
    part: int
    samples: tuple[int, ...]
    what: str
    comparison: str
    advice: str = TUNE


@dataclass(frozen=True)
class NotComputed:
    """That a worker could not compute its part again, so that nothing is known of it."""

    reason: str


class Rerun:
    """Computes steps again as `train_step` does, without the other workers and without changing weights."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: TrainRecipe,
        device: torch.device,
        autocast: torch.dtype | None,
        read: Callable[[int, torch.Tensor], Any],
    ) -> None:
        """`read(step, samples)` gives samples of the training set as the step had them, in one batch."""
        self._model, self._task, self._recipe, self._read = model, task, recipe, read
        self._device, self._autocast = device, autocast
        self._input = "an image" if isinstance(task, ImageClassification) else "an input"

    def find_first(
        self, batch: StepBatch, step: int, scale: float, restore_buffers: Callable[[], None]
    ) -> Finding | NotComputed | None:
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
                if found is not None and first is None:
                    restore_buffers()
                    first = self._narrowed(found, step)
        except Exception as error:  # what was found without it is still to be reported
            _log.exception("the step could not be computed again")
            return first or NotComputed(f"{type(error).__name__}: {brief(error)} ({where(error)})")
        finally:
            restore_buffers()
        return first

    def _look_at(self, part: Batch, number: int, scale: float) -> Finding | None:
        def finding(rows: torch.Tensor | None, *words: str) -> Finding:
            bad = part.samples if rows is None or rows.all() else part.samples[~rows.cpu()]
            return Finding(part.slice_index, number, tuple(bad.tolist()), *words)

        with (
            _watched(self._model) as seen,
            torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None),
            torch.compiler.set_stance("force_eager") if self._recipe.compile else nullcontext(),
        ):
            losses = self._losses(part)
            loss = self._task.loss(self._model, part.data) if losses is None else losses.sum()
        parameters = {name: one for name, one in self._model.named_parameters() if one.requires_grad}
        gradients = torch.autograd.grad(loss * scale, list(parameters.values()), allow_unused=True)
        if part.is_filler:
            return None
        rows = None if losses is None else _finite_rows(losses.detach())
        inputs = None if losses is None else _finite_inputs(part)
        if inputs is not None and not inputs.all():
            return finding(inputs, self._input, "", _MEND)
        if seen:
            return finding(rows, *seen[0])
        if not bool(loss.isfinite()):
            return finding(rows, "the loss", "though what the model returned is")
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and not _is_finite(gradient):
                return finding(rows, f"the gradient of '{name}'", "though the loss is")
        return None

    def _losses(self, part: Batch) -> torch.Tensor | None:
        """Each sample's part of the loss, as far as the task gives it: a fault there must not hide what is looked for.

        Without it, the generators are as they were: `loss` then draws what the step drew.
        """
        on_cuda = self._device.type == "cuda"
        drawn = torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_cuda else None
        try:
            losses: Any = self._task.losses(self._model, part.data)
            if losses is None or (losses.shape == (len(part.samples),) and losses.requires_grad):
                return losses  # type: ignore[no-any-return]
            _log.error("%s.losses: no %d losses with a gradient", type(self._task).__name__, len(part.samples))
        except Exception:  # a user's task may raise anything, the more so for what is not finite
            _log.exception("%s.losses fails", type(self._task).__name__)
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1], self._device)
        return None

    @torch.no_grad()
    def _narrowed(self, found: Finding, step: int) -> Finding:
        """The finding with the samples to blame alone, each looked at by itself; all of them if none stands out.

        In evaluation mode, where layers over a batch take a single sample, and ask no other worker.
        """
        if len(found.samples) <= 1 and found.what == self._input:
            return found
        bad, has_nan = [], False
        self._model.eval()
        try:
            for sample in found.samples:
                data = self._read(step, torch.tensor([sample]))
                nan = any(bool(one.isnan().any()) for one in tensors_in(data) if one.is_floating_point())
                with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
                    finite = bool(self._task.loss(self._model, data).isfinite())
                if nan or not finite:
                    bad.append(sample)
                has_nan = has_nan or nan
        except Exception:  # at least it is known for several samples together
            _log.exception("the samples could not be looked at one by one")
            return found
        finally:
            self._model.train()
        if has_nan and found.what != self._input:
            found = replace(found, what="an input", comparison="", advice=_MEND)
        return replace(found, samples=tuple(bad)) if bad else found


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
            if seen or all(_is_finite(tensor) for tensor in tensors_in(output)):
                return
            what = f"'{name}' ({type(module).__name__})" if name else "the model"
            if not all(_is_finite(tensor) for tensor in module.parameters(recurse=False)):
                seen.append((f"a parameter of {what}", "before this step"))
            elif all(_is_finite(tensor) for tensor in tensors_in(arguments)):
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


def _is_finite(tensor: torch.Tensor) -> bool:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(values.isfinite().all())


def _finite_inputs(part: Batch) -> torch.Tensor | None:
    """Which of a batch of images, or of rows, are finite, (B,)."""
    first = next(tensors_in(part.data), None)
    return _finite_rows(first) if first is not None and first.shape[:1] == (len(part.samples),) else None


def _finite_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(len(tensor), -1).isfinite().all(dim=1)

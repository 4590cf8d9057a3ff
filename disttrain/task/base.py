"""The contract of a task: how samples become a batch, a loss, metrics and predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.data import default_collate

from disttrain.errors import in_digits

Batch: TypeAlias = Any
"""Any pytree: tensors in tuples, lists and dicts, as deep as you like. The trainer moves its tensors to the device."""


class Task:
    """What is learned. Subclass it: `loss` is all it takes, everything else has a default.

    Each method may use its arguments and torch's global generator, which is seeded for every slice and batch, and
    nothing else: the same bits at every number of workers, and after a resume, depend on that. State belongs in the
    model's buffers; what `__init__` sets is configuration and must not change afterwards.
    """

    best = ("loss", "min")
    """The metric that decides which checkpoints are kept as best, and whether a small ("min") or large one is."""
    items = "samples"
    """What `weight` counts, in the plural: "tokens" has the console and MLflow say tokens per second."""

    def collate(self, samples: list[Any]) -> Batch:
        """A batch of samples, on the CPU; padding belongs here. By default torch's `default_collate`.

        The samples are those of one slice or micro-batch, never of one worker: shapes do not depend on the world size.
        """
        return default_collate(samples)

    def weight(self, batch: Batch) -> int | None:
        """Over how many items the loss of a collated batch is a sum; None: over its samples. Called on the CPU.

        The gradient of a step is the sum over its global batch, divided by the global batch's weight.
        """
        return None

    def prepare(self, batch: Batch, draw: Callable[[int], torch.Tensor], *, training: bool) -> Batch:
        """What is done to a batch on the device: augmentation and normalisation.

        `draw(num)` gives (B, num) float32 numbers in [0, 1), a function of (seed, epoch, sample) alone.
        """
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The SUM of the losses of the batch's items, () floating-point; the trainer divides it. Required."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(model, batch)")

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """What `loss` sums, as one number for each sample, (B,): it finds a sample that makes the loss NaN.

        None (the default): each sample is then looked at by itself.
        """
        return None

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, torch.Tensor | list[Any]]:
        """What a batch adds to an evaluation: tensors are added up, lists are joined in the order of the set."""
        return {"loss": self.loss(model, batch)}

    def metrics(self, sums: Mapping[str, Any], weight: int) -> dict[str, float]:
        """The metrics that the sums over the evaluation set come to. By default each tensor, divided by `weight`."""
        scalars = {name: one for name, one in sums.items() if isinstance(one, torch.Tensor) and one.ndim == 0}
        return {name: one.item() / max(1, weight) for name, one in scalars.items()}

    def details(self, sums: Mapping[str, Any], weight: int) -> dict[str, Any]:
        """What `evaluation.json` and `evaluate --json` hold besides the metrics, as JSON can hold it."""
        return {}

    def headline(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> str:
        """An evaluation in a few words, for the console. `metrics` is what `metrics` returned, `details` likewise.

        The line at the end of a run has no details.
        """
        return ", ".join(f"{name} {in_digits(value)}" for name, value in metrics.items())

    def report(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
        """An evaluation in full, as `disttrain evaluate` prints it. By default the headline."""
        return [self.headline(metrics, details)]

    def predict(self, model: nn.Module, batch: Batch) -> Sequence[Any]:
        """An answer for each sample of the batch, as JSON can hold it: what `disttrain predict RUN FILE...` prints."""
        raise NotImplementedError(f"{type(self).__name__} does not define predict(model, batch)")

    def in_words(self, prediction: Any) -> str:
        """A prediction in a few words, for a terminal. By default as JSON has it."""
        return prediction if isinstance(prediction, str) else json.dumps(prediction)

    def read(self, path: str) -> list[Any]:
        """The samples in a file that `predict` was given, as the data set gives them but without their targets.

        A picture holds one, a table one per row.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define read(path)")

    def export(self, model: nn.Module) -> tuple[nn.Module, tuple[Any, ...]] | None:
        """What MLflow serves: a module and an example of its arguments; None (the default): nothing is exported.

        `model` is a copy, on the CPU and in evaluation mode. The example holds tensors of two or more samples; the
        exported module takes any number.
        """
        return None

    def export_notes(self) -> dict[str, Any]:
        """What `model.json` says of the exported module besides its shapes, as JSON can hold it."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What a checkpoint holds about the task, as JSON can hold it: enough to refuse the checkpoint of another."""
        return {"name": type(self).__name__}

    def model_arguments(self, train_set: Any) -> dict[str, Any]:
        """What a model's constructor may ask for by name: `num_classes`, `vocab_size`, ... By default nothing."""
        return {}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        """The optimizer's parameter groups, as torch takes them; `lr_scale` in one is relative to `optim.lr`.

        None (the default): one group, or those that the recipe's `optim.groups` describe.
        """
        return None

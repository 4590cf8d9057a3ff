"""An exponential moving average of the weights, which is what evaluations and predictions use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from disttrain.checkpoint import AVERAGE
from disttrain.distributed.sharded import is_sharded, local, part_of
from disttrain.errors import ConfigurationError, brief

_HALVES = (torch.float16, torch.bfloat16)


class WeightAverage:
    """The average of each floating-point parameter over the steps: the newest weighs most.

    Every rank keeps the same one, since all have the same weights after each step; of sharded weights, that of its
    part. Buffers have no average: an evaluation uses those of the model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`decay`, 0 to 1, is what the average keeps of itself in a step."""
        self.decay = decay
        self._parameters = {
            name: parameter for name, parameter in model.named_parameters() if parameter.dtype.is_floating_point
        }
        self._averages: dict[str, torch.Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin from the weights as they are."""
        # Half precision has no room for a thousandth of a difference.
        self._averages = {
            name: parameter.detach().to(torch.float32 if parameter.dtype in _HALVES else parameter.dtype, copy=True)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int, unless: torch.Tensor | None = None) -> None:
        """Let the weights after a step count; `step` counts the steps done before it.

        If `unless`, () on the device, is 1, the averages stay as they are; it is not looked at.
        Early averages keep less of themselves, (1 + step) / (10 + step) at most: the first weights are random ones.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local(average) for average in self._averages.values()]
        weights = [
            local(parameter.detach()).to(average.dtype)
            for parameter, average in zip(self._parameters.values(), averages, strict=True)
        ]
        if unless is None:
            torch._foreach_lerp_(averages, weights, 1 - decay)
            return
        changes = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(changes, (1 - decay) * (1 - unless))
        torch._foreach_add_(averages, changes)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averages for its weights while the block runs; no step may be made in there.

        The weights wait in a copy: between two steps there are no gradients, which take as much memory.
        """
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._give(self._averages)
        try:
            yield
        finally:
            self._give(weights)

    @torch.no_grad()
    def _give(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages under their names in a checkpoint."""
        return {f"{AVERAGE}{name}": average for name, average in self._averages.items()}

    @torch.no_grad()
    def load(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Put back what a checkpoint has, by the parameters' names. Raises ConfigurationError if it has others."""
        for name, average in self._averages.items():
            found = averages.get(name)
            if found is None or found.shape != average.shape:
                what = "not there" if found is None else str(tuple(found.shape))
                raise ConfigurationError(
                    f"the checkpoint's average of {brief(repr(name))} is {what}, and the parameter is "
                    f"{tuple(average.shape)} (train.ema_decay)."
                )
            average.copy_(found if is_sharded(found) else part_of(found, average))

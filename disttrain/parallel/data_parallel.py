"""One process that drives several GPUs, each with a copy of the model for the length of a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from disttrain import rng
from disttrain.errors import ConfigurationError
from disttrain.parallel.strategy import Strategy


class DataParallel(Strategy):
    """torch's DataParallel around the whole loss: each GPU computes the loss of its part of the batch, and they add up.

    A batch is cut along the first dimension of its tensors. One that holds other tensors than one row per sample, such
    as lists of images in several sizes, cannot be cut and is refused. The copies of the model share no parameters with
    it: a loss that looks at `model.parameters()` finds none in them.
    """

    name = "dp"

    def __init__(self, model: nn.Module, reason: str) -> None:
        """Copies go to all GPUs that this process sees; without any, the model itself computes everything.

        Raises ConfigurationError for a compiled model, of which there can be no copies.
        """
        super().__init__(model, reason)
        self._loss = _Loss(model)
        self._parallel = nn.DataParallel(self._loss)
        num_devices = len(self._parallel.device_ids)
        if num_devices > 1 and any(map(_is_compiled, model.modules())):
            raise ConfigurationError(
                f"DataParallel over {num_devices} GPUs cannot copy a compiled model: each copy's call would lead to "
                "the first one's weights. Start a process for each GPU (-n gpu), set parallel.strategy = 'none' to use "
                "one GPU, or train.compile = false."
            )

    def open_slice(self) -> None:
        """Each copy draws numbers of its own, the same ones after a restart."""
        rng.seed_other_gpus(self._parallel.device_ids[1:])

    def loss(
        self,
        compute: Callable[[nn.Module, Any], torch.Tensor],
        batch: Any,
        *,
        num_samples: int,
        is_last: bool = True,
    ) -> torch.Tensor:
        """As `Strategy` has it. Raises ConfigurationError for a batch that cannot be cut."""
        num_devices = len(self._parallel.device_ids)
        if num_devices > 1:
            _refuse_uncuttable(batch, num_samples, num_devices)
        self._loss.compute = _in_same_autocast(compute, next(self.model.parameters()).device.type)
        # A number from each copy; a single one, from a single copy, stays a scalar.
        losses: torch.Tensor = self._parallel(batch)
        return losses.sum() if losses.ndim else losses


class _Loss(nn.Module):
    """A loss as a module, which is what can be copied."""

    compute: Callable[[nn.Module, Any], torch.Tensor]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> torch.Tensor:
        return self.compute(self.model, batch)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")  # the latter by torch.compile(module)


def _in_same_autocast(
    compute: Callable[[nn.Module, Any], torch.Tensor], device_type: str
) -> Callable[[nn.Module, Any], torch.Tensor]:
    """`compute` in the type that this thread computes in: a thread of its own would take bfloat16 for float16."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def same(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast(device_type, dtype=dtype, enabled=enabled):
            return compute(model, batch)

    return same


def _refuse_uncuttable(batch: Any, num_samples: int, num_devices: int) -> None:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    odd = next((tensor for tensor in tensors if tensor.ndim == 0 or len(tensor) != num_samples), None)
    if odd is not None or not tensors:
        holds = "no tensor" if odd is None else f"a tensor of shape {tuple(odd.shape)}"
        raise ConfigurationError(
            f"parallel.strategy = 'dp' cannot divide a batch among {num_devices} GPUs that holds {holds} for "
            f"{num_samples} sample{'s' if num_samples != 1 else ''}: it cuts tensors of one row per sample. Start a "
            "process for each GPU (-n gpu), or set parallel.strategy = 'none' to use one GPU."
        )

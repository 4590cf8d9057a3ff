"""Activation checkpointing: what a block computes is computed again in the backward pass, and not kept until then.

A block's own `forward` is replaced, on the object. Names of parameters and modules stay as they are, and hooks of a
block, those of FSDP2 and of exact mode among them, see one call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from disttrain.errors import ConfigurationError
from disttrain.models.buffers import places_of_buffers
from disttrain.parallel.strategy import Strategy


def checkpoint_activations(strategy: Strategy, *, is_wanted: bool) -> None:
    """Have each of the model's blocks compute its activations again in the backward pass, or no longer.

    The bits are the same as without. Raises ConfigurationError if the model has no blocks, or cannot be copied so.
    """
    for module in strategy.model.modules():  # one that is given as an object may have been trained before
        if isinstance(module.__dict__.get("forward"), Recomputed):
            del module.forward
    if not is_wanted:
        return
    if strategy.name == "dp":
        raise ConfigurationError(
            "train.checkpoint_activations = true cannot be combined with DataParallel, whose copies of the model would "
            "use the first one's weights: start a process for each GPU (-n gpu), or set parallel.strategy = 'none'."
        )
    blocks = strategy.blocks()
    if not blocks:
        raise ConfigurationError(
            "train.checkpoint_activations = true: the model has no blocks, which are what an nn.ModuleList or an "
            "nn.Sequential of it holds, if made of modules: set it to false, or make its layers such blocks."
        )
    for name, block in blocks.items():
        block.forward = Recomputed(name, block)


class Recomputed:
    """The `forward` of a block whose activations are computed again. A copy of the block has a copy of it."""

    def __init__(self, name: str, block: nn.Module) -> None:
        self._name, self._block = name, block
        self._forward: Callable[..., Any] = block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block computes. Raises ConfigurationError if it writes to what it is given."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self._forward(*args, **kwargs)
        from torch.utils.checkpoint import checkpoint  # takes a while to import

        leaves, spec = tree_flatten((args, kwargs))

        def compute(*given: Any) -> Any:
            args, kwargs = tree_unflatten(given, spec)
            return self._forward(*args, **kwargs)

        start = _State(self._block)
        versions = _versions(leaves)
        # As arguments of their own, all tensors are watched: one that is written to later is an error, not other bits.
        outputs = checkpoint(compute, *leaves, use_reentrant=False, context_fn=lambda: (nullcontext(), start.again()))
        if _versions(leaves) != versions:
            raise ConfigurationError(
                f"the model: '{self._name}' writes to what it is given (an in-place operation), and could not compute "
                "the same again: make it inplace=False, or set train.checkpoint_activations = false."
            )
        return outputs


def _versions(leaves: list[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_inference()]


class _State:
    """What a block's results depend on besides its inputs, its parameters and torch's generators, which torch keeps."""

    def __init__(self, block: nn.Module) -> None:
        self._buffers = [(*place, _copy(place[0]._buffers[place[1]])) for place in places_of_buffers(block)]
        self._generators = random.getstate(), np.random.get_state()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Compute from this state once more, on copies: what the block writes to its buffers, it has written before."""
        now = [module._buffers[name] for module, name, _ in self._buffers]
        generators = random.getstate(), np.random.get_state()
        _set_generators(*self._generators)
        for module, name, buffer in self._buffers:
            module._buffers[name] = _copy(buffer)
        try:
            yield
        finally:
            for (module, name, _), buffer in zip(self._buffers, now, strict=True):
                module._buffers[name] = buffer
            _set_generators(*generators)


def _copy(buffer: torch.Tensor | None) -> torch.Tensor | None:
    return buffer if buffer is None or buffer.layout != torch.strided else buffer.detach().clone()


def _set_generators(python: Any, legacy_numpy: Any) -> None:
    random.setstate(python)
    np.random.set_state(legacy_numpy)

"""Modules that cannot be trained by several workers, or not in exact mode."""

from __future__ import annotations

from torch import nn

from disttrain.errors import ConfigurationError


def refuse_renormalising(model: nn.Module, remedy: str) -> None:
    """Raise ConfigurationError, with a `remedy`, if a module of the model scales its own weight as it looks it up.

    Each of several workers would scale the rows that its samples ask for, and no gradient reaches the others.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ConfigurationError(
                f"the model: '{path}' is an {type(module).__name__} with max_norm = {module.max_norm}, which writes to "
                f"its weight in each forward pass, where each worker sees other samples: leave it out, {remedy}."
            )


def refuse_summing(model: nn.Module, remedy: str) -> None:
    """Raise ConfigurationError, with a `remedy`, if a module of the model sums over workers by itself, and rounds."""
    for path, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigurationError(
                f"the model: '{path}' is a SyncBatchNorm, whose sums over workers are not exact: use BatchNorm, which "
                f"in exact mode has the statistics of each slice, {remedy}."
            )

"""Parameters that are not trained, by patterns of their names."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from disttrain.errors import ConfigurationError
from disttrain.models.patterns import matches, matching


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Have the parameters that match one of the patterns keep their values.

    Raises ConfigurationError for a pattern that matches nothing, or if nothing is left to train.
    """
    if not patterns:
        return
    named = dict(model.named_parameters())
    for name in matching(patterns, named, "model.freeze"):
        named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigurationError("model.freeze: the patterns match every parameter, so nothing is left to train.")


def hold_statistics(model: nn.Module, patterns: Sequence[str]) -> None:
    """Have a BatchNorm whose own state matches normalise by its running statistics in training, too, and keep them.

    Its statistics would change otherwise with every batch, and with them what the frozen layers give.
    """
    if not patterns:
        return
    own = {
        module: [f"{path}.{name}" if path else name for name in (module._parameters or module._buffers)]
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    for module, names in own.items():
        if all(matches(name, patterns) for name in names):
            # On the object, so that a copy of it (an export, an average) behaves alike.
            module.train = MethodType(_stays_in_evaluation, module)  # type: ignore[method-assign]
            module.eval()


def _stays_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)

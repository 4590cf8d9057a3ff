"""A model's blocks, and modules that cannot be trained by several workers, or not in exact mode."""

from __future__ import annotations

from collections.abc import Sequence

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


def blocks_of(model: nn.Module, class_names: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The blocks of a model, by name: what FSDP2 gathers together, and what computes its activations again.

    They are those of the classes that are named; without any, what a ModuleList or a Sequential holds, if it is made of
    modules itself: the blocks of transformers and ResNets. A block within a block belongs to the outer one, and one
    that shares a weight with another, or has none, is left out.

    Raises ConfigurationError for a name that no module's class has.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or not name:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        is_element = isinstance(parent, nn.ModuleList | nn.Sequential) and any(True for _ in module.children())
        is_wanted = type(module).__name__ in class_names if class_names else is_element
        if is_wanted and not isinstance(module, nn.ModuleList | nn.ModuleDict):  # these are never called
            found[name] = module
    for wanted in class_names:
        if not any(type(module).__name__ == wanted for module in model.modules()):
            raise ConfigurationError(f"parallel.shard_modules: the model has no module of class {wanted!r}.")
    users: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[parameter] = users.get(parameter, 0) + 1
    return {
        name: module
        for name, module in found.items()
        if any(True for _ in module.parameters()) and all(users[one] == 1 for one in module.parameters())
    }

"""FSDP2's mixed precision: what weights are gathered as and gradients are sent as, and norms on CPUs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._pytree import tree_map_only

from disttrain.errors import ConfigurationError
from disttrain.recipe import ParallelRecipe

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def precision_policies(model: nn.Module, recipe: ParallelRecipe) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """That of the blocks, and that of what is in none, whose input is the batch, which stays as it is."""
    param = torch.bfloat16 if recipe.param_dtype == "bf16" else None
    reduce = torch.bfloat16 if recipe.reduce_dtype == "bf16" else torch.float32 if param else None
    if param is not None:
        for path, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine and module.track_running_stats:
                raise ConfigurationError(
                    f"the model: '{path}' is a {type(module).__name__}, whose statistics are float32: take it out, or "
                    "set parallel.param_dtype = 'fp32'."
                )
    return MixedPrecisionPolicy(param, reduce), MixedPrecisionPolicy(param, reduce, cast_forward_inputs=False)


def cast_into_norms(model: nn.Module, blocks: dict[str, nn.Module], dtype: torch.dtype) -> None:
    """Cast what goes into norms outside the blocks, as FSDP2 does for blocks.

    CPUs have no norm of float32 numbers by bfloat16 weights; on GPUs, autocast makes float32 of both.
    """
    in_blocks = {module for block in blocks.values() for module in block.modules()}

    def cast(one: torch.Tensor) -> torch.Tensor:
        return one.to(dtype) if one.is_floating_point() else one

    def cast_all(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return tree_map_only(torch.Tensor, cast, (inputs, named))

    for module in model.modules():
        if isinstance(module, _NORMS) and module not in in_blocks:
            module.register_forward_pre_hook(cast_all, with_kwargs=True)


@contextmanager
def mixed_norms_named() -> Iterator[None]:
    """Raise ConfigurationError for a norm on CPUs that `cast_into_norms` does not see, since it is no module."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("mixed dtype (CPU)"):
            raise
        raise ConfigurationError(
            "the model: a norm outside the blocks that is called as a function got float32 numbers and, with "
            "parallel.param_dtype = 'bf16', bfloat16 weights, which CPUs cannot compute: make it a module "
            "(nn.LayerNorm), whose input is cast, or set parallel.param_dtype = 'fp32'."
        ) from error

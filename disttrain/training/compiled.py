"""Compiling a model, so that what computes a batch follows from its shape and not from the batches before."""

from __future__ import annotations

import os
import shlex
import shutil
import sys

import torch
from torch import nn

from disttrain.errors import ConfigurationError
from disttrain.recipe import TrainRecipe

# Where inductor (C++, for CPUs) and Triton (C, for GPUs) look for a compiler: a variable, else these names.
_COMPILERS = {
    "cpu": ("CXX", ("clang++",) if sys.platform == "darwin" else ("g++",)),
    "cuda": ("CC", ("gcc", "clang")),
}


def compile_model(model: nn.Module, settings: TrainRecipe, device: torch.device) -> None:
    """Have `model` compiled when it is called, in place. Raises ConfigurationError without a compiler.

    Unless the recipe says otherwise there are kernels for each shape. Left to itself torch makes kernels for any size
    at the second size that it meets, such as that of an epoch's last batch, and uses them for all batches from then on:
    they are slower, and a run that resumed after that batch would compute the next ones by others.
    """
    _refuse_without_compiler(device.type)
    model.compile(mode=settings.compile_mode, dynamic=None if settings.compile_any_shape else False)


def _refuse_without_compiler(device_type: str) -> None:
    variable, names = _COMPILERS.get(device_type, ("", ()))
    wanted = shlex.split(os.environ.get(variable, ""))[:1] or names
    if wanted and not any(map(shutil.which, wanted)):
        raise ConfigurationError(
            f"train.compile = true needs a C{'++' if variable == 'CXX' else ''} compiler, and there is no "
            f"{' or '.join(wanted)} here: install one (apt install g++), name one in {variable}, or set "
            "train.compile = false."
        )

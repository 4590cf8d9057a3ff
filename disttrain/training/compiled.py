"""Compiling a model, so that what computes a batch follows from its shape and not from the batches before."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from disttrain.distributed import later
from disttrain.distributed.foreach import copy_all_
from disttrain.errors import ConfigurationError, where
from disttrain.recipe import Recipe, TrainRecipe

# Where inductor (C++, for CPUs) and Triton (C, for GPUs) look for a compiler: a variable, else these names.
_COMPILERS = {
    "cpu": ("CXX", ("clang++",) if sys.platform == "darwin" else ("g++",)),
    "cuda": ("CC", ("gcc", "clang")),
}

GRAPH_PASSES = {"reduce-overhead": 3, "max-autotune": 3}
"""The modes whose kernels are replayed as CUDA graphs, and in which pass that is so: after two that are not."""
_MOST_KERNELS = 64
"""In exact mode: how often a function may be compiled. Slices and their parts come in six sizes at most."""


def compile_model(model: nn.Module, settings: TrainRecipe, device: torch.device) -> None:
    """Have `model` compiled when it is called, in place. Raises ConfigurationError without a compiler.

    So do calls of a model that does not stay `compiled_for_each_shape`.

    Unless the recipe says otherwise there are kernels for each shape. Left to itself torch makes kernels for any size
    at the second size that it meets, such as that of an epoch's last batch, and uses them for all batches from then on:
    they are slower, and a run that resumed after that batch would compute the next ones by others.
    """
    _refuse_without_compiler(device.type)
    model.compile(mode=settings.compile_mode, dynamic=None if settings.compile_any_shape else False)
    compiled = model._compiled_call_impl
    if replays_graphs(settings, device) and compiled is not None:
        compiled = _answering_from_memory_of_its_own(compiled)
    if compiled is not None:
        model._compiled_call_impl = _naming_too_many_kernels(compiled)


@contextmanager
def compiled_for_each_shape(recipe: Recipe) -> Iterator[None]:
    """In exact mode, have a compiled model stay compiled while the block runs, whatever a worker has met before.

    torch gives a function up that it has compiled eight times, and computes the next shape by other kernels; here it
    takes more, and raises in place of that; ConfigurationError, for what a task or a model compiles itself, too. That,
    like the model, has kernels for each shape, not those for any size that torch makes at the second size it meets.
    """
    if not (recipe.parallel.exact and recipe.train.compile):
        yield
        return
    import torch._dynamo  # hundreds of modules, which nothing else needs yet

    for_each_shape = {"automatic_dynamic_shapes": False, "assume_static_by_default": True}
    limits = {"recompile_limit": _MOST_KERNELS, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch({**for_each_shape, **limits}):
        try:
            yield
        except ConfigurationError:  # the compiled model's own, which names the key
            raise
        except Exception as error:
            hit = error if _is_limit_hit(error) else error.__cause__
            if hit is None or not _is_limit_hit(hit):
                raise
            raise ConfigurationError(
                f"a function that the task or the model compiles itself ({where(hit)}) was compiled {_MOST_KERNELS} "
                "times and would be again, as one that takes numbers or tensors of many sizes. In exact mode it has to "
                "stay compiled: leave it as it is (without torch.compile), or set parallel.exact = false."
            ) from error


def times_compiled() -> int:
    """How many graphs this process has had kernels made of; not those that are computed operator by operator.

    So torch computes `torch.cond` and `flex_attention` where nobody compiles them: by its compiler, without kernels.
    """
    compiler = sys.modules.get("torch._dynamo.utils")  # not there where nothing was
    return 0 if compiler is None else int(compiler.counters["aot_autograd"]["total"])


def facts_of_compiler(settings: TrainRecipe, device: torch.device) -> dict[str, str]:
    """What the bits of a compiled model depend on besides its shapes, as JSON can hold it."""
    if not settings.compile:
        return {"compiled": "no"}
    return {"compiled": f"{settings.compile_mode}, by {_compiler_of(device.type)}"}


def _compiler_of(device_type: str) -> str:
    """What makes the kernels, and its version."""
    if device_type == "cuda":
        try:
            return f"Triton {version('triton')}"
        except PackageNotFoundError:
            return "Triton"
    command = shlex.split(os.environ.get("CXX", "")) or ["clang++" if sys.platform == "darwin" else "g++"]
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):  # no kernels can be made, or by means of the user's own
        return command[0]
    return said.partition("\n")[0].strip() or command[0]


def replays_graphs(settings: TrainRecipe, device: torch.device) -> bool:
    """Whether what is compiled is replayed as CUDA graphs, each of which writes its results to the same memory again.

    torch keeps a result that is still wanted only while a backward pass is due. What is kept longer raises "accessing
    tensor output of CUDAGraphs that has been overwritten", or, as a gradient that another is added to, is wrong without
    a word (pytorch/pytorch#169545): so it has to be copied.
    """
    return settings.compile and settings.compile_mode in GRAPH_PASSES and later.is_asynchronous(device)


@torch.no_grad()
def own_gradients(model: nn.Module) -> None:
    """Copy the gradients to memory of their own, for more to be added to them."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    copies = [torch.empty_like(gradient) for gradient in gradients]
    copy_all_(copies, gradients)
    for parameter, copy in zip(parameters, copies, strict=True):
        parameter.grad = copy


def _answering_from_memory_of_its_own(call: Callable[..., Any]) -> Callable[..., Any]:
    """As `call`, with copies of what it returns where no backward pass keeps it: of the next view of an image, say."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        found = call(*args, **kwargs)
        return found if torch.is_grad_enabled() else _pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, found)

    return answer


def _naming_too_many_kernels(call: Callable[..., Any]) -> Callable[..., Any]:
    """As `call`, which raises ConfigurationError for what torch says where `compiled_for_each_shape` ends."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not _is_limit_hit(error):
                raise
            raise ConfigurationError(
                f"train.compile = true: the model was compiled {_MOST_KERNELS} times and would be again, as one that "
                "computes with a counter or takes samples of many shapes. In exact mode it has to stay compiled: set "
                "train.compile = false, or parallel.exact = false."
            ) from error

    return answer


def _is_limit_hit(error: BaseException) -> bool:
    return type(error).__name__ == "FailOnRecompileLimitHit"  # of a module that may not be imported


def _refuse_without_compiler(device_type: str) -> None:
    variable, names = _COMPILERS.get(device_type, ("", ()))
    wanted = shlex.split(os.environ.get(variable, ""))[:1] or names
    if wanted and not any(map(shutil.which, wanted)):
        raise ConfigurationError(
            f"train.compile = true needs a C{'++' if variable == 'CXX' else ''} compiler, and there is no "
            f"{' or '.join(wanted)} here: install one (apt install g++), name one in {variable}, or set "
            "train.compile = false."
        )

"""FSDP2: weights, gradients and the optimizer's state in shards, a part on each worker.

What is sharded is a module around the whole loss: its weights, which are those of the model outside the blocks, are
gathered for the length of a loss, which may then call any method of the bare model. A block's are gathered for the
length of the block's own `forward`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from disttrain.distributed.allocator import keep_freed_memory, return_freed_memory
from disttrain.distributed.collectives import broadcast_, gather_objects, max_
from disttrain.distributed.sharded import is_sharded
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.parallel.gathered import affordable_bytes
from disttrain.parallel.lean import hold_less
from disttrain.parallel.mesh import mesh_of
from disttrain.parallel.modules import blocks_of, refuse_renormalising
from disttrain.parallel.precision import cast_into_norms, mixed_norms_named, precision_policies
from disttrain.parallel.strategy import Strategy
from disttrain.recipe import ParallelRecipe

# Where freed memory is kept, the holes that gathered blocks leave in it take about so many times the model.
_GROWTH = 4


class Fsdp(Strategy):
    """Each parameter is cut among the workers along its first dimension: all of them, or those of each replica.

    Every rank must call each method alike.
    """

    name = "fsdp"
    is_sharded = True

    def __init__(self, model: nn.Module, world: World, recipe: ParallelRecipe) -> None:
        """All start from rank 0's weights and buffers. Raises ConfigurationError for a model that cannot be sharded."""
        self._mesh = mesh = mesh_of(world, recipe.shard_size)
        _refuse(model, world)
        blocks = blocks_of(model, recipe.shard_modules)
        super().__init__(model, f"FSDP2: {mesh.words()} ({_words(blocks)})")
        self._world = world
        self.slices, self.num_slices = range(world.rank, world.rank + 1), world.size
        return_freed_memory()
        self._called = 0  # a checksum of which blocks this step has called, in their order
        self._blocks = blocks
        of_blocks, of_rest = precision_policies(model, recipe)
        if of_rest.param_dtype is not None and world.device.type == "cpu":
            cast_into_norms(model, blocks, of_rest.param_dtype)
        offload = self._offload_policy(recipe.cpu_offload)
        self._is_freed_between = freed = recipe.reshard_after_forward
        for number, block in enumerate(blocks.values()):  # one after the other: none has another whole block then
            _start_from_rank_0(block, world)
            block.register_forward_pre_hook(partial(self._note, number))
            fully_shard(
                block, mesh=mesh.devices, reshard_after_forward=freed, mp_policy=of_blocks, offload_policy=offload
            )
        _start_from_rank_0(model, world)
        self._call = _Call(model)
        self._root: Any = fully_shard(self._call, mesh=mesh.devices, mp_policy=of_rest, offload_policy=offload)
        self._modules: list[Any] = [module for module in self._call.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            # A loss is divided by the size of the global batch already, and gloo cannot scale while it sums.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self._affordable = affordable_bytes(world)
        num_bytes = sum(one.numel() * one.element_size() for one in model.parameters())  # whole: the same on all ranks
        self._saves_memory = _GROWTH * num_bytes > self._affordable
        if world.device.type == "cpu":
            hold_less(self._root, trims=self._saves_memory)
        self._depth = recipe.prefetch
        self._prefetch(self._depth)
        self._parameters = dict(model.named_parameters())
        self._trainable = self._trainable_now()
        if self._saves_memory:
            return_freed_memory()
        else:
            keep_freed_memory()

    def blocks(self) -> dict[str, nn.Module]:
        """As `Strategy` has it: those that are gathered as one."""
        return self._blocks

    def check_modules(self) -> None:
        """As `Strategy` has it."""
        refuse_renormalising(self.model, "or start one worker (-n 1)")

    def follow_unfreezing(self) -> bool:
        """As `Strategy` has it. Raises ConfigurationError: what is frozen was cut as such."""
        if self._trainable_now() == self._trainable:
            return False
        raise ConfigurationError(
            "parallel.strategy = 'fsdp': a parameter was frozen or unfrozen after the start, which sharded parameters "
            "cannot follow: use model.freeze, or parallel.strategy = 'ddp'."
        )

    def alone(self) -> None:
        """As `Strategy` has it: each worker has but a part of the model."""

    def open_slice(self) -> None:
        """As `Strategy` has it: the step starts from rank 0's buffers."""
        self._called = 0
        self.share_buffers_()

    def loss(
        self,
        compute: Callable[[nn.Module, Any], torch.Tensor],
        batch: Any,
        *,
        num_samples: int,
        is_last: bool = True,
    ) -> torch.Tensor:
        """As `Strategy` has it. Until the last micro-batch, gradients stay on this worker, whole."""
        self._root.set_requires_gradient_sync(is_last)
        loss: torch.Tensor = self._call(compute, batch)
        return loss

    def abandon_step(self) -> None:
        """As `Strategy` has it."""
        self._free_all()

    def finish_step(self, global_size: int, step: int) -> None:
        """As `Strategy` has it. Raises ConfigurationError, on every rank, if the ranks computed different blocks.

        Shards are gathered and summed by position: a block would have had the weights or gradients of another.
        """
        trained = bytes(parameter.grad is not None for parameter in self._parameters.values())
        if self._differs(zlib.crc32(trained, self._called)):
            raise ConfigurationError(
                f"the model: in step {step + 1} not all workers called the same blocks and gave gradients to the same "
                "parameters, as parallel.strategy = 'fsdp' needs: do not choose them by sample or by chance, or set "
                "parallel.strategy = 'ddp' and parallel.find_unused_parameters = true."
            )

    @staticmethod
    def _differs(number: int) -> bool:
        """Whether the ranks have different numbers. Every rank must call it."""
        most, least = max_(torch.tensor([number, -number], dtype=torch.float64)).tolist()
        return bool(most != -least)

    @torch.no_grad()
    def score(self, compute: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """As `Strategy` has it."""
        # FSDP2 would keep the weights of a block that is gathered ahead and not called here for a later step's.
        self._prefetch(0)
        try:
            return self._call(compute, batch)
        finally:
            for module in self._modules:
                module.reshard()  # what a backward pass does otherwise
            self._prefetch(self._depth)

    @torch.no_grad()
    def share_buffers_(self) -> None:
        """As `Strategy` has it."""
        for buffer in self.model.buffers():
            broadcast_(buffer)

    @contextmanager
    def made_whole(self) -> Iterator[None]:
        """As `Strategy` has it."""
        for module in self._modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        self._root.set_reshard_after_backward(False)
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_reshard_after_backward(True)
            self._free_all()

    def _free_all(self) -> None:
        """Leave each worker its part of the model alone, whatever has been gathered and wherever a pass has ended."""
        for module in self._modules:
            module.set_reshard_after_forward(True, recurse=False)  # else one whose forward has failed stays gathered
            module.reshard()
            module.set_reshard_after_forward(self._is_freed_between and module is not self._root, recurse=False)

    def _offload_policy(self, is_wanted: bool) -> OffloadPolicy:
        if is_wanted and self._world.device.type == "cpu":
            self.reason += "; parallel.cpu_offload has no effect on CPUs"
            return OffloadPolicy()
        return CPUOffloadPolicy() if is_wanted else OffloadPolicy()

    def _prefetch(self, depth: int) -> None:
        """Have each block gather so many of those that are called next, in the order that the model has them."""
        blocks: list[Any] = list(self._blocks.values()) if self._depth else []
        for number, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + depth])
            block.set_modules_to_backward_prefetch(blocks[max(0, number - depth) : number][::-1])

    def _note(self, block: int, *_: Any) -> None:
        self._called = zlib.crc32(block.to_bytes(4, "little"), self._called)

    def _trainable_now(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters.values()]


class _Call(nn.Module):
    """A computation with the model as a module, which is what can be sharded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        with mixed_norms_named():
            return compute(self.model, batch)


@torch.no_grad()
def _start_from_rank_0(module: nn.Module, world: World) -> None:
    """Give what is whole of a module the numbers that rank 0 has, where it is; `fully_shard` moves it to the device."""
    for tensor in (*module.parameters(), *module.buffers()):
        if is_sharded(tensor):
            continue
        here = tensor.detach()
        there = here.to(world.device)
        broadcast_(there)
        if there is not here:
            here.copy_(there)


def _words(blocks: dict[str, nn.Module]) -> str:
    kinds = sorted({type(block).__name__ for block in blocks.values()})
    return f"{len(blocks)} blocks: {', '.join(kinds)}" if blocks else "gathered as one: it has no blocks"


def _refuse(model: nn.Module, world: World) -> None:
    if world.device.type == "mps":
        raise ConfigurationError("parallel.strategy = 'fsdp': an Apple GPU serves one worker only.")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigurationError(
            "parallel.strategy = 'fsdp': the model given is sharded already: give a function that makes it, anew "
            "for each start."
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ConfigurationError(
                f"the model: '{name}' is sparse, which parallel.strategy = 'fsdp' cannot shard or send: make it dense, "
                "or use parallel.strategy = 'ddp'."
            )
    kinds = {one.dtype: name for name, one in model.named_parameters()}
    if len(kinds) > 1 or any(kind.is_complex for kind in kinds):
        listed = ", ".join(f"'{name}' {dtype}" for dtype, name in kinds.items())
        raise ConfigurationError(
            f"the model: parallel.strategy = 'fsdp' shards parameters of one real type, and it has {listed}: make "
            "them one, or use parallel.strategy = 'ddp'."
        )
    scalar = next((name for name, one in model.named_parameters() if one.ndim == 0), None)
    if scalar is not None:
        raise ConfigurationError(
            f"the model: the parameter '{scalar}' is a scalar, which parallel.strategy = 'fsdp' cannot cut: give it "
            "the shape (1,), or use parallel.strategy = 'ddp'."
        )
    turned = next((name for name, one in model.named_parameters() if not one.is_contiguous()), None)
    if turned is not None:
        raise ConfigurationError(
            f"the model: the parameter '{turned}' is not contiguous in memory (torch.channels_last, a transpose), "
            "which parallel.strategy = 'fsdp' cannot cut: call its contiguous(), or use parallel.strategy = 'ddp'."
        )
    by_rank = gather_objects(mine := [(name, tuple(one.shape)) for name, one in tensors.items()])
    if any(theirs != mine for theirs in by_rank):
        raise ConfigurationError("the model: its parameters or buffers are not the same on all workers.")

"""FSDP2 in exact mode: the same bits as one worker, with each worker holding its part of the model.

FSDP2 gathers the parameters and frees them. Gradients are left to us: it is set to exchange none, and those of a block
are taken when the backward pass has come out of it, before they would pile up.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from disttrain.distributed.allocator import trim_after
from disttrain.distributed.sharded import local
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.parallel.exact.block import Block
from disttrain.parallel.exact.norm import norm_of_whole
from disttrain.parallel.exact.sharded import ShardedSlices
from disttrain.parallel.exact.slices import slices_of
from disttrain.parallel.exact.strategy import SlicesSummed
from disttrain.parallel.fsdp import Fsdp
from disttrain.parallel.gathered import KeptGathered, take_hooks_of_fsdp_off
from disttrain.recipe import ParallelRecipe


class ExactFsdp(SlicesSummed, Fsdp):
    """Slices computed one by one with gathered blocks; each worker sums its parts of all slices' gradients."""

    name = "exact-fsdp"
    _sums: ShardedSlices

    def __init__(self, model: nn.Module, world: World, recipe: ParallelRecipe) -> None:
        """All start from rank 0's weights and buffers. Raises as `ExactSlices` and `Fsdp` do."""
        num_slices = recipe.slices
        sums = ShardedSlices(model, world, num_slices)  # while the parameters are whole
        Fsdp.__init__(self, model, world, recipe)
        self.reason = f"exact mode, {num_slices} slices, the same bits with 1 to {num_slices} workers; {self.reason}"
        self._sums, self.slices, self.num_slices = sums, sums.slices, num_slices
        self.passes_of = [slices_of(rank, world.size, num_slices) for rank in range(world.size)]
        self._root.set_requires_gradient_sync(False)
        several = any(len(passes) > 1 for passes in self.passes_of)
        blocks = self._blocks.values()
        self._kept = (
            KeptGathered(self._root, blocks, self._affordable, frees_after_forward=recipe.reshard_after_forward)
            if several
            else None
        )
        self._is_dealing = self._is_filler = False
        self._frees_blocks = False
        self._take: Callable[[Block], None] = self._deal
        modules = [*self._blocks.values(), self._call]
        self._dealt = sums.attach(self._blocks, self._mesh, self._affordable if several else 0)
        for module, block in zip(modules, self._dealt, strict=True):
            # FSDP2 has put its own hook before: here the block's parameters are gathered.
            module.register_forward_pre_hook(partial(self._enter, block), with_kwargs=True)

    def loss(
        self,
        compute: Callable[[nn.Module, Any], torch.Tensor],
        batch: Any,
        *,
        num_samples: int,
        is_last: bool = True,
    ) -> torch.Tensor:
        """As `Strategy` has it. Until the last micro-batch of a slice, gradients stay on this worker, whole."""
        self._is_dealing = is_last and not self._sums.holds_gradients
        if self._is_dealing:
            self._sums.begin_dealing()
        loss: torch.Tensor = self._call(compute, batch)
        return loss

    def open_slice(self) -> None:
        """As `Strategy` has it."""
        self._begin_pass()

    def keep_pace(self, compute: Callable[[nn.Module, Any], torch.Tensor], batch: Any, *, is_last: bool) -> None:
        """As `Strategy` has it. Such passes come before those of a slice, and leave no gradients to them."""
        self._begin_pass()
        self._is_filler = True
        self.loss(compute, batch, num_samples=0, is_last=is_last).backward()  # type: ignore[no-untyped-call]
        if is_last:
            self._finish_dealing()
        else:
            self._sums.drop()
        self._is_filler = False

    def close_slice(self, slice_index: int) -> None:
        """As `Strategy` has it."""
        self._finish_dealing()
        super().close_slice(slice_index)

    def needs_second_pass(self) -> bool:
        """As `Strategy` has it: whether the grids of the sums were not right."""
        return self._sums.needs_second_pass()

    def abandon_step(self) -> None:
        """As `Strategy` has it."""
        if self._kept is not None:
            self._kept.end()
        super().abandon_step()
        self._sums.abandon()
        self._is_dealing = self._is_filler = False

    def finish_step(self, global_size: int, step: int) -> None:
        """As `Strategy` has it. Raises ConfigurationError, on every rank, if the ranks computed different blocks."""
        if self._kept is not None:
            self._kept.end()
        called, self._called = self._called, 0
        if self._differs(called):
            raise ConfigurationError(
                f"the model: in step {step + 1} not all workers called the same blocks, as parallel.strategy = 'fsdp' "
                "needs: do not choose them by sample or by chance, or set parallel.strategy = 'ddp'."
            )
        if self._sums.passes_disagree():
            raise ConfigurationError(
                f"the loss: step {step + 1} was computed twice, as exact mode with parallel.strategy = 'fsdp' must at "
                "times, and had other gradients the second time: have the model and the task leave their batch as it "
                "is, and draw random numbers from torch's generators alone; or set parallel.strategy = 'ddp'."
            )
        super().finish_step(global_size, step)

    def rehearse(self, loss: torch.Tensor) -> None:
        """As `Strategy` has it. Nothing is exchanged; what got a gradient has one of zeros."""
        self._is_dealing = False
        loss.backward()  # type: ignore[no-untyped-call]
        self._sums.mark_gradients()
        self._called = 0

    def trial(
        self, compute: Callable[[nn.Module, Any], torch.Tensor], batch: Any, check: Callable[[str, torch.Tensor], None]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As `Strategy` has it. Of each gradient there is a SHA-256; it is whole while its block's backward pass is."""
        found: dict[str, torch.Tensor] = {}

        def take(block: Block) -> None:
            block.is_waiting = False
            for name, gradient in zip(block.names, block.take(), strict=True):
                if gradient is not None:
                    check(name, gradient)
                    found[name] = _digest(gradient)

        for block in self._dealt:
            block.num_calls = block.num_left = 0
            block.is_waiting, block.versions = bool(block.names), []
        self._is_dealing, self._take = True, take
        try:
            loss: torch.Tensor = self._call(compute, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            for block in self._dealt:
                if block.is_waiting and block.num_calls:
                    take(block)
        finally:
            self._is_dealing, self._take, self._called = False, self._deal, 0
        self.refuse_writing()
        return loss.detach(), found

    def refuse_writing(self) -> None:
        """As `Strategy` has it."""
        self._sums.refuse_writing()

    @contextmanager
    def without_borders(self) -> Iterator[None]:
        """As `Strategy` has it. FSDP2 has a node before each block, which adds up what the block has of a gradient.

        Without its hooks, blocks are gathered and freed by ours, which leave the order alone.
        """
        put_back = take_hooks_of_fsdp_off(self._blocks.values())
        handles = []
        for block in self._blocks.values():
            handles.append(block.register_forward_pre_hook(_gather, prepend=True))
            handles.append(block.register_forward_hook(_free_until_backward))
        self._frees_blocks = True
        try:
            yield
        finally:
            self._frees_blocks = False
            for handle in handles:
                handle.remove()
            put_back()
            for block in self._blocks.values():
                cast("Any", block).reshard()

    def gradient_norm(self) -> torch.Tensor:
        """As `Strategy` has it."""
        gradients = [one.grad for one in self._parameters.values() if one.grad is not None]
        return norm_of_whole(gradients, self._mesh)

    def clip_(self, max_norm: float) -> torch.Tensor:
        """As `Strategy` has it."""
        norm = self.gradient_norm()
        parts = [local(one.grad) for one in self._parameters.values() if one.grad is not None]
        holders = [part.detach() for part in parts]  # torch scales what is the gradient of something
        for holder, part in zip(holders, parts, strict=True):
            holder.grad = part
        nn.utils.clip_grads_with_norm_(holders, max_norm, norm)
        return norm

    def _enter(self, block: Block, module: nn.Module, args: Any, kwargs: Any) -> None:
        block.enter()
        if not self._is_dealing:
            return
        block.num_calls += 1
        inputs = [
            leaf
            for leaf in (tree_leaves((args, kwargs)) if torch.is_grad_enabled() else ())
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        ]
        if inputs:
            register_multi_grad_hook(inputs, partial(self._leave, block, module))

    def _leave(self, block: Block, module: Any, _: Any) -> None:
        """The gradients of a call's inputs are there, so those of its parameters are: all of them after the last."""
        block.num_left += 1
        if self._is_dealing and block.is_waiting and block.num_left == block.num_calls:
            self._take(block)
            if self._frees_blocks:
                module.reshard()

    def _deal(self, block: Block) -> None:
        if self._world.device.type == "cpu" and self._saves_memory:
            trim_after(sum(whole.nbytes for whole in block.whole))  # the block's activations are freed by now
        self._sums.take(block, counts=not self._is_filler)

    def _begin_pass(self) -> None:
        if self._kept is not None:
            self._kept.begin()
        self._sums.open()

    def _finish_dealing(self) -> None:
        self._sums.take_rest(counts=not self._is_filler)
        self._is_dealing = False


def _gather(module: Any, _: Any) -> None:
    module.unshard()


def _free_until_backward(module: Any, _: Any, outputs: Any) -> None:
    if torch._C._current_graph_task_id() != -1:
        return  # computed again in the backward pass, for which it is gathered (torch.utils.checkpoint)
    leaves = tree_leaves(outputs)
    if any(dataclasses.is_dataclass(leaf) for leaf in leaves):
        return  # it stays whole: a pytree shows none of the tensors in it
    module.reshard()
    differentiable = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if differentiable:
        register_multi_grad_hook(differentiable, lambda _: module.unshard(), mode="any")


def _digest(gradient: torch.Tensor) -> torch.Tensor:
    """A SHA-256, (32,) uint8, of all its numbers; NaN is one number, and so is zero."""
    numbers = (gradient.nan_to_num() + 0.0).cpu().contiguous().reshape(-1).view(torch.uint8)
    return torch.frombuffer(bytearray(hashlib.sha256(numbers.numpy().data).digest()), dtype=torch.uint8)

"""DistributedDataParallel, with what it leaves undone: named faults, odd buffers, parameters unfrozen.

Its reducer works by hooks on the parameters, and its `forward` only prepares the reducer before and after the model's.
Here both are done around the whole loss, which may then call any method of the bare model, any number of times. Through
DistributedDataParallel's own `forward` it could call nothing else, and once only: the reducer would miss the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.distributed import later
from disttrain.distributed.collectives import broadcast_, gather_objects, sum_
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.parallel.compress import DTYPES, Smaller, send_smaller
from disttrain.parallel.in_memory import InMemory, begin_in_memory
from disttrain.parallel.modules import refuse_renormalising
from disttrain.parallel.strategy import Strategy

# What DistributedDataParallel can send; the other types are sent by us, as bytes.
_SENDABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
_MOST_NAMED = 4


class Ddp(Strategy):
    """Gradients are summed over all workers in the backward pass. Every rank must call each method at the same step."""

    name = "ddp"

    def __init__(
        self, model: nn.Module, reason: str, world: World, *, find_unused: bool, compress: str = "none"
    ) -> None:
        """All start from rank 0's weights and buffers; `compress` is what the recipe says of gradients under way.

        Raises ConfigurationError for a sparse buffer that differs.
        """
        # Alone, nothing travels, and rounding would be for nothing.
        self._smaller = Smaller(DTYPES[compress], world.size) if compress != "none" and world.size > 1 else None
        super().__init__(model, f"{reason}, gradients sent as {compress}" if self._smaller is not None else reason)
        self._world, self._find_unused = world, find_unused
        if self._smaller is not None and self._smaller.dtype == torch.float16:
            self.against_overflow = "set parallel.compress = 'bf16', which has float32's range, or lower optim.lr"
        # DDP divides the summed gradients by the number of workers; our losses are shares of the global mean already.
        self.loss_scale = float(world.size)
        self.slices, self.num_slices = range(world.rank, world.rank + 1), world.size
        self._parameters = dict(model.named_parameters())
        everything = {**self._parameters, **dict(model.named_buffers())}
        sparse = {name: tensor for name, tensor in everything.items() if tensor.layout != torch.strided}
        _refuse_unlike(sparse)
        self._odd = [
            (*_place(model, name), name)
            for name, tensor in everything.items()
            if name not in sparse and tensor.dtype not in _SENDABLE
        ]
        ignored = [*sparse, *(name for _, _, name in self._odd)]
        if ignored:
            ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(model, ignored)
        self._wrap()
        self._share_odd_()

    def check_modules(self) -> None:
        """As `Strategy` has it."""
        if self._world.size > 1:
            refuse_renormalising(self.model, "or start one worker (-n 1)")

    def open_slice(self) -> None:
        """As `Strategy` has it. The other buffers are shared by the first `loss` of the step."""
        self._share_odd_()

    def loss(
        self,
        compute: Callable[[nn.Module, Any], torch.Tensor],
        batch: Any,
        *,
        num_samples: int,
        is_last: bool = True,
    ) -> torch.Tensor:
        """As `Strategy` has it. The first call of a step gives every worker rank 0's buffers before."""
        ddp: Any = self.module
        with (
            nullcontext() if is_last else ddp.no_sync(),
            ddp._inside_ddp_forward(),  # torch.compile cuts its graphs where buckets end
        ):
            ddp._pre_forward()
            # Parameters that are not used are those that this very loss does not depend on.
            loss: torch.Tensor = ddp._post_forward(compute(self.model, batch))
        return loss

    def finish_step(self, global_size: int, step: int) -> None:
        """As `Strategy` has it: each parameter has the sum over all workers now."""
        self._finish_backward(f"in step {step + 1}")

    def rehearse(self, loss: torch.Tensor) -> None:
        """As `Strategy` has it: the reducer arranges its sums anew after its first step."""
        loss.backward()  # type: ignore[no-untyped-call]
        self._finish_backward("when it is tried before training")

    @torch.no_grad()
    def share_buffers_(self) -> None:
        """As `Strategy` has it."""
        for buffer in self.model.buffers():
            if buffer.layout == torch.strided:  # sparse ones are constant, see _refuse_unlike
                broadcast_(buffer)

    @torch.no_grad()
    def _share_odd_(self) -> None:
        """Replace the tensors that DistributedDataParallel cannot send by rank 0's."""
        for module, name, _ in self._odd:
            broadcast_(getattr(module, name).detach())

    def alone(self) -> Strategy:
        """As `Strategy` has it: the reducer, which would send gradients, goes with its memory."""
        if "module" in vars(self):
            self.module._remove_autograd_hooks()  # type: ignore[no-untyped-call]  # whoever still holds it
            del self.module
        return Strategy(self.model, self.reason)

    def follow_unfreezing(self) -> bool:
        """As `Strategy` has it: the model is wrapped anew.

        Raises ConfigurationError, on every rank, if all have changed and not alike. A rank that alone has changed waits
        for the others, and the watchdog names it: to ask all at each step would cost a collective.
        """
        if self._trainable_now() == self._trainable:
            return False
        self._agree()
        del self.module  # before the next, or there would be two with their memory
        self._wrap()
        return True

    @torch.no_grad()
    def _finish_backward(self, when: str) -> None:
        """Raise ConfigurationError, on this rank only, if the model left some parameters without a gradient.

        The other ranks wait for them then. One that became trainable in the step itself is summed here. `when` is for
        the message.
        """
        try:
            self.module._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ConfigurationError(self._what_is_missing(when)) from error
        if self._world.sums is not None:
            self._world.sums.finish()
        if self._trainable_now() == self._trainable:
            return
        self._agree()
        known = dict(zip(self._parameters, self._trainable, strict=True))
        mine = [name for name, one in self._parameters.items() if not known[name] and one.grad is not None]
        for name in sorted({name for names in gather_objects(mine) for name in names}):
            parameter = self._parameters[name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = sum_(gradient).div_(self._world.size)  # the mean, as DistributedDataParallel's

    def _wrap(self) -> None:
        self._trainable = self._trainable_now()
        self.module = DistributedDataParallel(
            self.model,  # without device_ids: batches are on the device already
            gradient_as_bucket_view=True,
            find_unused_parameters=self._find_unused,
        )
        if later.is_asynchronous(self._world.device) and _has_statistics_alone(self.model):
            # Of what no training step reads, rank 0's are needed in evaluations and checkpoints alone. Set afterwards:
            # all are to start from the same.
            self.module.broadcast_buffers = False
        if self._world.sums is not None:
            dtype = None if self._smaller is None else self._smaller.dtype
            self.module.register_comm_hook(InMemory(self._world.sums, self._world.size, dtype), begin_in_memory)
        elif self._smaller is not None:
            self.module.register_comm_hook(self._smaller, send_smaller)

    def _trainable_now(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters.values()]

    def _agree(self) -> None:
        by_rank = gather_objects([name for name, one in self._parameters.items() if one.requires_grad])
        other = next((rank for rank, names in enumerate(by_rank) if names != by_rank[0]), None)
        if other is not None:
            names = sorted({*by_rank[0]} ^ {*by_rank[other]})
            raise ConfigurationError(
                f"the model: {_listed(names)} can be trained on rank {0 if names[0] in by_rank[0] else other} and not "
                f"on rank {other if names[0] in by_rank[0] else 0}: freeze and unfreeze the same on all."
            )

    def _what_is_missing(self, when: str) -> str:
        waited_for = zip(self._parameters.items(), self._trainable, strict=True)
        names = [name for (name, parameter), trainable in waited_for if trainable and parameter.grad is None]
        return (
            f"the model gives no gradient to {_listed(names) if names else 'some of its parameters'} {when}, and "
            "several workers wait for each: remove what is not used, freeze it when the model is built "
            "(requires_grad = False), or set parallel.find_unused_parameters = true, which costs a little in each step."
        )


def _has_statistics_alone(model: nn.Module) -> bool:
    """Whether each buffer is one of BatchNorm's, which are written to in training, and read in evaluations.

    A class of a user's that is made of it may read them in training, as batch renormalisation does.
    """
    modules = [module for module in model.modules() if any(one is not None for one in module._buffers.values())]
    return all(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).__module__.startswith("torch.nn.")
        for module in modules
    )


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(f"'{name}'" for name in names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _place(model: nn.Module, full_name: str) -> tuple[nn.Module, str]:
    path, _, name = full_name.rpartition(".")
    return dict(model.named_modules(remove_duplicate=False))[path], name


def _digest(tensor: torch.Tensor) -> str:
    """Of a sparse tensor, without making it dense."""
    if tensor.layout == torch.sparse_coo:
        pieces = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        pieces = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        pieces = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        pieces = [tensor.to_dense()]
    digest = hashlib.sha256(f"{tensor.layout} {tuple(tensor.shape)}".encode())
    for piece in pieces:
        digest.update(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_unlike(sparse: dict[str, torch.Tensor]) -> None:
    """Sparse tensors are not sent: each worker keeps the one that the constructor has made."""
    if not sparse:
        return
    by_rank = gather_objects(mine := {name: _digest(tensor) for name, tensor in sparse.items()})
    for rank, theirs in enumerate(by_rank):
        for name in mine:
            if theirs.get(name) != by_rank[0].get(name):
                raise ConfigurationError(
                    f"the model: the sparse buffer '{name}' differs between rank {rank} and rank 0, and sparse "
                    "ones cannot be sent: build the same everywhere, or make it dense."
                )

"""A model in DistributedDataParallel, with what that leaves undone: named faults, odd buffers, parameters unfrozen."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.distributed.collectives import broadcast_, gather_objects, sum_
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError

# What DistributedDataParallel can send; the other types are sent by us, as bytes.
_SENDABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
_MOST_NAMED = 4


class WrappedModel:
    """Calls the model, and has its gradients summed over all workers in the backward pass.

    Every rank must call each method at the same step.
    """

    def __init__(self, model: nn.Module, world: World, *, find_unused: bool) -> None:
        """All start from rank 0's weights and buffers. Raises ConfigurationError for a sparse buffer that differs."""
        self._model, self._world, self._find_unused = model, world, find_unused
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
        self.share_odd_()

    def __call__(self, *arguments: Any) -> Any:
        """What the model returns. The first call of a step gives every worker rank 0's buffers before."""
        return self.module(*arguments)

    def no_sync(self) -> AbstractContextManager[None]:
        """The context for a backward pass whose gradients wait for the next one."""
        context: AbstractContextManager[None] = self.module.no_sync()
        return context

    @torch.no_grad()
    def share_odd_(self) -> None:
        """Replace the tensors that DistributedDataParallel cannot send by rank 0's."""
        for module, name, _ in self._odd:
            broadcast_(getattr(module, name).detach())

    def follow_unfreezing(self) -> bool:
        """Wrap the model anew if other parameters are trainable now than were when it was wrapped; whether it was.

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
    def finish_backward(self, when: str) -> None:
        """To be called after a step's last backward pass: each parameter has the sum over all workers now.

        One that became trainable in the step itself is summed here. Raises ConfigurationError, on this rank only, if
        the model left some without a gradient: the other ranks wait for them. `when` is for the message.
        """
        try:
            self.module._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ConfigurationError(self._what_is_missing(when)) from error
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
            self._model,
            device_ids=[self._world.device.index] if self._world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=self._find_unused,
        )

    def _trainable_now(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters.values()]

    def _agree(self) -> None:
        by_rank = gather_objects([name for name, one in self._parameters.items() if one.requires_grad])
        other = next((rank for rank, names in enumerate(by_rank) if names != by_rank[0]), None)
        if other is not None:
            names = sorted({*by_rank[0]} ^ {*by_rank[other]})
            raise ConfigurationError(
                f"the model: {_listed(names)} can be trained on rank {0 if names[0] in by_rank[0] else other} and not "
                f"on rank {other if names[0] in by_rank[0] else 0}: freeze and unfreeze on all alike."
            )

    def _what_is_missing(self, when: str) -> str:
        waited_for = zip(self._parameters.items(), self._trainable, strict=True)
        names = [name for (name, parameter), trainable in waited_for if trainable and parameter.grad is None]
        return (
            f"the model gives no gradient to {_listed(names) if names else 'some of its parameters'} {when}, and "
            "several workers wait for each: remove what is not used, freeze it when the model is built "
            "(requires_grad = False), or set parallel.find_unused_parameters = true, which costs a little in each step."
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
                    f"the model: the sparse buffer '{name}' is another one on rank {rank} than on rank 0, and sparse "
                    "ones cannot be sent: build the same everywhere, or make it dense."
                )

"""What the training loop needs of a way to train with several workers, and the answers of a single worker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from disttrain.distributed.sharded import whole
from disttrain.parallel.modules import blocks_of


class Strategy:
    """How a step's gradients come about. The answers here are those of one worker; the others override them.

    Each step's global batch is cut into `num_slices` slices, of which this worker serves `slices`: one of as many as
    there are workers, or in exact mode several of as many as the recipe says. A slice comes in one or more
    micro-batches. In each step every rank calls, in this order: `follow_unfreezing`; for each of its slices
    `open_slice`, then for each micro-batch `loss` and `backward` of what it returns times `loss_scale`, and
    `close_slice`; `needs_second_pass`, and if so all slices again; `finish_step`. Then the parameters' gradients are
    those of the global batch, on every rank.
    """

    name: ClassVar[str]
    """Its name in the recipe and in MLflow."""
    loss_scale: float = 1.0
    """What a loss that has been divided by the size of the global batch must be multiplied by before `backward`."""
    slices: range = range(1)
    num_slices: int = 1
    fills_empty: bool = True
    """Whether a slice without samples has a backward pass all the same, because the other workers wait for it."""
    passes_of: Sequence[range] = ()
    """Every worker's slices, by rank, if all must compute equally many micro-batches in a step: see `keep_pace`."""
    bits_depend_on_world_size: bool = True
    """Whether another number of workers gives other bits."""
    trains_apart: bool = False
    """Whether each worker makes steps by its own gradients, and has weights of its own between two meetings."""
    is_sharded: bool = False
    """Whether a worker holds only a part of the parameters, their gradients and the optimizer's state."""
    sums_are_finite: bool = False
    """Whether the gradients of the step that was finished last are known to be finite without a look at them."""
    looks_at_sums: ClassVar[bool] = False
    """Whether `finish_step` looks at the sums itself, so that the host waits for each step in any case."""
    non_finite: Collection[str] = ()
    """The parameters and buffers that are known not to have had finite summands in the step that was finished last:
    the same on every rank. What is not known here shows in the gradients."""

    def __init__(self, model: nn.Module, reason: str) -> None:
        """`model` is on its device; `reason` says in a line why this strategy was chosen."""
        self.model = model
        """The bare model: its names are those of the checkpoint."""
        self.reason = reason

    def blocks(self) -> dict[str, nn.Module]:
        """The model's blocks, by name: see `blocks_of`."""
        return blocks_of(self.model)

    def check_modules(self) -> None:
        """Raise ConfigurationError if a module of the model can never be trained in this way."""

    def follow_unfreezing(self) -> bool:
        """Detect parameters that were frozen or unfrozen since the last step.

        Returns whether a step must be rehearsed before the next one. Every rank must call it.
        """
        return False

    def open_slice(self) -> None:
        """To be called before the first micro-batch of a slice."""

    def loss(
        self,
        compute: Callable[[nn.Module, Any], torch.Tensor],
        batch: Any,
        *,
        num_samples: int,
        is_last: bool = True,
    ) -> torch.Tensor:
        """`compute(model, batch)`, a sum over the batch's `num_samples` samples, in such a way that gradients meet.

        `compute` may call any method of the model, any number of times. Gradients are exchanged in the backward pass of
        the last micro-batch of a slice (`is_last`). Every rank must call it equally often.
        """
        return compute(self.model, batch)

    def score(self, compute: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """`compute(model, batch)` where no gradient is asked for. Every rank must call it equally often."""
        return compute(self.model, batch)

    def made_whole(self) -> AbstractContextManager[None]:
        """A context in which this worker may compute with the bare model alone, gradients too, and has all of it.

        Every rank must call it. In it no step can be made.
        """
        return nullcontext()

    def trial(
        self, compute: Callable[[nn.Module, Any], torch.Tensor], batch: Any, check: Callable[[str, torch.Tensor], None]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch that every worker has, (), and by name what its gradients are to be compared by.

        Each gradient is shown to `check`, and none stays. Every rank must call it.
        """
        loss = compute(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        found = {}
        for name, parameter in self.model.named_parameters():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                check(name, gradient)
                found[name] = gradient
        return loss.detach(), found

    def without_borders(self) -> AbstractContextManager[None]:
        """A context for `trial` in which gradients are added in the order that they are without shards."""
        return nullcontext()

    def refuse_writing(self) -> None:
        """Raise ConfigurationError if the model has written to what was gathered of it in a trial or a score."""

    def begin_sum(self) -> None:
        """To be called before the backward pass of a worker's last micro-batch in a step, for sums to begin within it.

        Only if all ranks go from there to `finish_step` without meeting.
        """

    def close_slice(self, slice_index: int) -> None:
        """To be called after the backward pass of a slice's last micro-batch."""

    def keep_pace(self, compute: Callable[[nn.Module, Any], torch.Tensor], batch: Any, *, is_last: bool) -> None:
        """Compute a loss and its gradients to no effect, while the others compute a micro-batch that is one's last.

        Called between slices, in place of `loss` and `backward`, where `passes_of` asks for it.
        """

    def needs_second_pass(self) -> bool:
        """Whether all slices must be computed once more before `finish_step`. Every rank must call it, once a step."""
        return False

    def abandon_step(self) -> None:
        """To be called if a slice of a step has failed: the model is as between steps, for whoever still uses it."""

    def finish_step(self, global_size: int, step: int) -> None:
        """To be called after the last slice of a step: now the gradients are the global batch's, of `global_size`.

        `step` counts the steps done before. Every rank must call it. Raises ConfigurationError, on this rank only, if
        the model left parameters without a gradient that the other workers wait for.
        """

    def meets_after(self, step: int) -> bool:
        """Whether the workers meet after this step; `step` counts the steps done before it."""
        return False

    def meet_(self, step: int) -> None:
        """Have all workers set out from the same weights again, after a step of the optimizer. Every rank must call it.

        Raises DivergedError, on every rank, if a number of the model is not finite on any.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the model is the run's, if each worker has its own. Every rank must enter it."""
        return nullcontext()

    def settle_(self) -> None:
        """Give each worker the run's model for good: no step may follow. Every rank must call it."""

    def rehearse(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a step that is not made, and do whatever the bits of the steps after it depend on.

        Every rank must call it. Raises as `finish_step` does.
        """
        loss.backward()  # type: ignore[no-untyped-call]

    def gradient_norm(self) -> torch.Tensor:
        """The 2-norm, (), of the step's gradient: the same on every rank, and every rank must call it."""
        gradients = [one.grad for one in self.model.parameters() if one.grad is not None]
        return whole(nn.utils.get_total_norm(gradients))

    def clip_(self, max_norm: float) -> torch.Tensor:
        """Scale the step's gradient to this 2-norm at most; returns what it was, (). Every rank must call it."""
        return whole(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))

    def sum_finite_parts(self, scale: float) -> None:
        """Put the sum of their finite summands in the place of the gradients that `non_finite` names.

        `scale` is what the loss was multiplied by: the sums are divided by it. Every rank must call it.
        """

    def alone(self) -> Strategy | None:
        """The way in which this worker computes a step's losses and gradients without the others; None if it cannot.

        For a worker whose step has failed, before each that it tries in its place: no other may follow.
        """
        return self

    def share_buffers_(self) -> None:
        """Replace every worker's buffers (BatchNorm's statistics) by rank 0's. Every rank must call it."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, by the key in state.json; it takes part in the bits of the steps to come."""
        return {}

    def load_state(self, state: Mapping[str, Any], where: str) -> None:
        """Put back what `state` gave; `state` is all that a checkpoint's state.json holds, `where` its path.

        Raises ConfigurationError if it does not fit the model.
        """

    @property
    def cut_by(self) -> str:
        """What decides into how many slices a step is cut, in words."""
        return f"{self.num_slices} worker{'s' if self.num_slices > 1 else ''}"

    against_overflow: str = "lower optim.lr"
    """What helps when the sum over all workers is not finite, though each worker's own gradients are, in words."""
    slice_word: ClassVar[str] = "share"
    """What a slice is called in messages."""

    def larger_slices(self) -> list[str]:
        """What makes slices larger, in words."""
        return ["fewer workers"] if self.num_slices > 1 else []

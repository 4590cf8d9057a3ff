"""Local training (DiLoCo): each worker makes steps of its own, and after every so many of them all meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from disttrain.distributed.collectives import broadcast_, gather_objects
from disttrain.distributed.world import World
from disttrain.errors import DivergedError
from disttrain.parallel.compress import DTYPES, INT8
from disttrain.parallel.fragments import Fragments
from disttrain.parallel.outer import MeanChanges, OuterOptimizer, mean_changes
from disttrain.parallel.strategy import Strategy
from disttrain.recipe import ParallelRecipe

_START, _MOMENTUM = "start.", "momentum."


class Local(Strategy):
    """Every worker has weights, buffers and an optimizer of its own, and no gradient travels.

    After each `sync_every` steps, counted over the run, all workers' weights become those that they set out from last,
    moved by an outer step along the mean of their changes. Floating-point buffers (BatchNorm's statistics) become the
    mean of the workers', the others rank 0's. With `sync_fragments` each fragment of the model does so at steps of its
    own. In between, the model of the run is the mean of the workers' models.
    """

    name = "local"
    trains_apart = True

    def __init__(self, model: nn.Module, world: World, recipe: ParallelRecipe) -> None:
        """All start from rank 0's weights and buffers. Every rank must call it.

        Raises ConfigurationError, on every rank, for more fragments than the model has layers.
        """
        alone = world.size == 1
        sent_as = {**DTYPES, INT8: torch.int8}
        self._sent_as = sent_as[recipe.compress] if recipe.compress != "none" and not alone else None
        steps = f"{recipe.sync_every} steps" if recipe.sync_every > 1 else "step"
        sent = "" if self._sent_as is None else f", changes sent as {recipe.compress}"
        who = "1 worker makes" if alone else f"{world.size} workers train apart and make"
        every, num = recipe.sync_every, recipe.sync_fragments
        self.fragments = Fragments({name: one.numel() for name, one in model.named_parameters()}, num, every)
        share = f"{self.fragments.largest_share:.0%}"
        cut = "" if num == 1 else f", in {num} fragments, one at a time (the largest {share} of the model)"
        super().__init__(model, f"{who} an outer step every {steps}{cut}{sent}")
        # A worker's loss is its share of the global mean: so much for each sample, however unevenly they are shared.
        self.loss_scale = float(world.size)
        self.slices, self.num_slices = range(world.rank, world.rank + 1), world.size
        self._world = world
        self._outer = OuterOptimizer(recipe.outer_learning_rate, recipe.outer_momentum)
        self._parameters = dict(model.named_parameters())
        for tensor in self._everything().values():
            broadcast_(tensor.detach())
        self._start: dict[str, torch.Tensor] = {}
        self._is_apart = False  # whether steps have been made since the workers met for all of the model
        self._keeps_buffers = False  # whether those that the next step may change are in `_start`
        self._mean: dict[str, torch.Tensor] | None = None  # of the weights as they are now, once it was asked for

    @torch.no_grad()
    def follow_unfreezing(self) -> bool:
        """As `Strategy` has it: what a worker is about to change is kept as it is where the workers set out."""
        if not self._keeps_buffers:
            for name, one in self._buffers().items():
                if _has_mean(one) and name not in self._start:
                    self._start[name] = one.clone()
            self._keeps_buffers = True
        self._keep_unfrozen()
        self._is_apart, self._mean = True, None
        return False

    def finish_step(self, global_size: int, step: int) -> None:
        """As `Strategy` has it, but for the gradients, which are those of this worker's samples."""
        self._keep_unfrozen()  # in the forward pass

    def _keep_unfrozen(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and name not in self._start:
                self._start[name] = parameter.detach().clone()

    def meets_after(self, step: int) -> bool:
        """As `Strategy` has it."""
        return self.fragments.due_after(step) is not None

    @torch.no_grad()
    def meet_(self, step: int) -> None:
        """As `Strategy` has it."""
        due = self.fragments.due_after(step)
        everything = {name: one for name, one in self._everything().items() if self.fragments.of(name) == due}
        mean = self._mean_changes(everything, self._sent_as)
        if mean.not_finite:
            by_rank = gather_objects([name for name in mean.not_finite if not everything[name].isfinite().all()])
            rank = next((rank for rank, names in enumerate(by_rank) if names), 0)
            raise DivergedError(
                f"'{(by_rank[rank] or mean.not_finite)[0]}' of the model is not finite on rank {rank} after step "
                f"{step + 1}, where the workers meet. To continue, lower optim.lr or parallel.outer_learning_rate, or "
                "set train.clip_norm."
            )
        for name, change in mean.by_name.items():
            tensor = everything[name].detach()
            # It may be that only other workers train it.
            tensor.copy_(self._start.get(name, tensor))
            if name in self._parameters:
                self._outer.step_(name, tensor, change)
            else:
                tensor.add_(change)
        for tensor in everything.values():
            if not _has_mean(tensor):
                broadcast_(tensor.detach())
        still = self._everything().keys() - everything.keys()
        self._start = {name: one for name, one in self._start.items() if name in still}
        self._is_apart, self._keeps_buffers, self._mean = bool(self._start), False, None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """As `Strategy` has it."""
        if not self._is_apart or self._world.size == 1:
            yield
            return
        everything, average = self._everything(), self._average()
        own = {name: everything[name].detach().clone() for name in average}
        self._give(average)
        try:
            yield
        finally:
            self._give(own)

    def settle_(self) -> None:
        """As `Strategy` has it."""
        if self._is_apart and self._world.size > 1:
            self._give(self._average())
        self._is_apart = False

    def share_buffers_(self) -> None:
        """As `Strategy` has it: an evaluation has those of `averaged`."""

    def outer_tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds besides the model and what each worker has: the same on every rank."""
        start = {f"{_START}{name}": one for name, one in self._start.items()} if self._is_apart else {}
        return {**start, **{f"{_MOMENTUM}{name}": one for name, one in self._outer.momentum.items()}}

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """This worker's weights and buffers, if they are not those of the run's model."""
        if not self._is_apart or self._world.size == 1:
            return {}
        kept = self._start.keys() | self._buffers().keys()
        return {name: tensor.detach() for name, tensor in self._everything().items() if name in kept}

    @torch.no_grad()
    def load(self, outer: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
        """Put back what `outer_tensors` and `own_tensors` gave, after the model. Without `own` it is the run's model.

        Raises KeyError or RuntimeError for what does not fit the model.
        """
        everything = self._everything()
        self._start, self._outer.momentum = {}, {}
        for prefix, into in ((_START, self._start), (_MOMENTUM, self._outer.momentum)):
            for name in (key.removeprefix(prefix) for key in outer if key.startswith(prefix)):
                into[name] = torch.empty_like(everything[name]).copy_(outer[f"{prefix}{name}"])
        self._is_apart, self._keeps_buffers = bool(self._start), False
        self._give(own)

    @torch.no_grad()
    def _give(self, tensors: Mapping[str, torch.Tensor]) -> None:
        everything = self._everything()
        for name, tensor in tensors.items():
            everything[name].copy_(tensor)

    @torch.no_grad()
    def _average(self) -> dict[str, torch.Tensor]:
        """The mean of all workers' weights and buffers, as far as they differ. Every rank must call it."""
        if self._mean is None:
            everything = self._everything()
            changes = self._mean_changes(everything)
            self._mean = {
                name: self._start.get(name, everything[name].detach()) + change
                for name, change in changes.by_name.items()
            }
            self._mean |= {name: torch.full_like(everything[name], torch.nan) for name in changes.not_finite}
            self._mean |= {name: broadcast_(one.clone()) for name, one in self._buffers().items() if not _has_mean(one)}
        return self._mean

    def _mean_changes(self, of: Mapping[str, torch.Tensor], sent_as: torch.dtype | None = None) -> MeanChanges:
        floating = {name: one for name, one in of.items() if _has_mean(one)}
        changes = {
            name: _change(self._start[name], one.detach()) if name in self._start else None
            for name, one in floating.items()
        }
        return mean_changes(changes, floating, self._world.size, sent_as, buffers=self._buffers().keys())

    def _everything(self) -> dict[str, torch.Tensor]:
        return {**self._parameters, **self._buffers()}

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Dense ones: sparse ones are constant."""
        return {name: one for name, one in self.model.named_buffers() if one.layout == torch.strided}


def _has_mean(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """What has been added; None for nothing. Infinite numbers and NaN may stay as they are."""
    if torch.equal(before, after):
        return None
    stays = (before == after) | (before.isnan() & after.isnan())
    return None if stays.all() else torch.where(stays, 0.0, after - before)

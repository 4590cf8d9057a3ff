"""What the machines and their GPUs come to: each number one worker's own, and zero on the others."""

from __future__ import annotations

import torch

from disttrain.distributed.collectives import sum_
from disttrain.distributed.world import World
from disttrain.recipe import Recipe
from disttrain.tracking import SYSTEM_METRICS, SystemSampler, node_metrics

_GIB = 2.0**30


class MachineReport:
    """The numbers of all machines, and of all ranks' GPUs, in one vector of float64."""

    def __init__(self, world: World, recipe: Recipe, sampler: SystemSampler | None) -> None:
        """The one worker of a machine that samples it has a `sampler`."""
        self._world, self._sampler = world, sampler
        self._is_logged = recipe.tracking.system_metrics
        self._bits_matter = recipe.parallel.exact or recipe.train.deterministic
        self._names = SYSTEM_METRICS if self._is_logged else ()
        # Machines that come and go keep their slots: the vector is the same on all, whoever is there.
        self._slot, self._num_slots = world.node, world.num_nodes
        if world.slot is not None:
            self._slot, self._num_slots = world.slot, world.num_slots
        self._num_gpus = world.size if has_gpu(world) else 0
        self._shortages = gpu_memory(world)[1] if self._num_gpus else 0

    @property
    def samples(self) -> bool:
        """Whether this worker samples its machine."""
        return self._sampler is not None

    def summed(self) -> list[float]:
        """What all workers know, for `metrics` and `short_of_memory` on rank 0. Every rank must call it."""
        mine = self.mine()
        if self._num_slots > 1 or self._num_gpus:  # else rank 0 knows all there is
            sum_(mine)
        return mine.tolist()

    def mine(self) -> torch.Tensor:
        """What this worker knows, to be summed over all."""
        names, world = self._names, self._world
        machines = torch.zeros(self._num_slots, len(names), dtype=torch.float64)
        if self._sampler is not None:
            machines[self._slot] = torch.tensor(self._sampler.latest(), dtype=torch.float64)
        gpus = torch.zeros(self._num_gpus, 2, dtype=torch.float64)
        if self._num_gpus:
            peak, shortages = gpu_memory(world)
            gpus[world.rank] = torch.tensor([peak, shortages - self._shortages], dtype=torch.float64)
            self._shortages = shortages
        return torch.cat([machines.view(-1), gpus.view(-1)])

    def metrics(self, summed: list[float]) -> dict[str, float]:
        """The sum of what all workers know, under the names that it has in the journal."""
        found: dict[str, float] = {}
        if self._is_logged:
            for node in range(self._num_slots):
                of_node = summed[node * len(self._names) : (node + 1) * len(self._names)]
                if any(of_node) or self._num_slots == 1:  # else it is not there
                    found.update(node_metrics(node, of_node))
            for rank, peak in enumerate(self._of_gpus(summed)[::2]):
                found[f"system/rank-{rank}/gpu_memory_peak_gib"] = peak
        return found

    def short_of_memory(self, summed: list[float]) -> list[int]:
        """The ranks whose GPU had no memory for some kernel since the report before, where bits matter."""
        if not self._bits_matter:
            return []
        return [rank for rank, shortages in enumerate(self._of_gpus(summed)[1::2]) if shortages]

    def _of_gpus(self, summed: list[float]) -> list[float]:
        return summed[self._num_slots * len(self._names) :]


def shortage_words(ranks: list[int]) -> str:
    """What to tell of what `short_of_memory` found."""
    return (
        f"rank {', '.join(map(str, ranks))}: the GPU had no memory for some kernels, and others were used: the bits "
        "may differ from other runs'. Leave more of it free; a new run with a larger train.accumulate takes less."
    )


def has_gpu(world: World) -> bool:
    """Whether this worker, and so each, computes on a GPU that counts its memory."""
    return world.device.type == "cuda"


def gpu_memory(world: World) -> tuple[float, int]:
    """The most that tensors have taken of the GPU so far, in GiB, and how often there was no memory for one.

    Where nothing failed for that, cuDNN has caught it: it takes another plan then, which may round differently.
    """
    stats = torch.cuda.memory_stats(world.device)
    return stats.get("allocated_bytes.all.peak", 0) / _GIB, stats.get("num_ooms", 0)

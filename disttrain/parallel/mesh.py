"""Which workers hold which part of a sharded model: all together one copy, or several copies of it.

Ranks that follow each other hold one copy together, a *replica*: those of one machine, where parts travel fastest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from disttrain.distributed.world import World, new_group

_REPLICATE, _SHARD = "replicate", "shard"


@dataclass(frozen=True)
class ShardMesh:
    """`num_replicas` copies of a model, each cut among `shard_size` workers."""

    devices: DeviceMesh
    """(shard_size,), or with several replicas (num_replicas, shard_size)."""
    num_replicas: int
    shard_size: int
    replica: int
    """Which copy this rank holds a part of."""
    part: int
    """Which part of it: its rank in `shard_group`."""

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks that hold one copy of the model together with this one."""
        return self.devices.get_group(self.devices.ndim - 1)

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part as this one, each of another copy; None if there is but one copy."""
        return self.devices.get_group(0) if self.num_replicas > 1 else None

    def words(self) -> str:
        """Who holds what."""
        if self.num_replicas == 1:
            return f"{self.shard_size} workers, each with its part of the model"
        return f"{self.num_replicas} copies of the model, each in parts on {self.shard_size} workers"


def mesh_of(world: World, shard_size: int) -> ShardMesh:
    """The mesh of all workers, `shard_size` of them (0: all) for each copy of the model. Every rank must call it.

    The number of workers must be a multiple of it.
    """
    size = shard_size or world.size
    if size == world.size:
        devices = init_device_mesh(world.device.type, (size,))
    else:
        ranks = torch.arange(world.size).view(-1, size)
        groups = [new_group(world, table.tolist()) for table in (ranks.t(), ranks)]
        devices = DeviceMesh.from_group(groups, world.device.type, ranks, mesh_dim_names=(_REPLICATE, _SHARD))
    return ShardMesh(devices, world.size // size, size, *divmod(world.rank, size))

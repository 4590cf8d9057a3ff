"""The environment of a worker: what any launcher of torch sets."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disttrain.testing.hosts import Cluster


def environment(
    rank: int, size: int, local_size: int, address: str, port: int, cluster: Cluster | None, extra: Mapping[str, str]
) -> dict[str, str]:
    """This process's environment, as a launcher would hand it to that rank, with `extra` on top."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    defaults = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    if cluster is not None:
        inherited["GLOO_SOCKET_IFNAME"] = cluster[rank // local_size].interface
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local_size),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    return defaults | inherited | place | dict(extra)

"""Several ranks on one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from disttrain.distributed import world
from tests.gpu.registry import DEVICE


def share_one_device() -> None:
    """Have every rank of this process take the first GPU (or the CPU), and gloo, which takes CUDA tensors, too."""
    device = torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")
    join = dist.init_process_group

    def by_gloo(backend: str, **options: Any) -> None:
        options.pop("device_id", None)
        join("gloo", **options)

    setattr(world, "choose_device", lambda *_: device)  # noqa: B010
    setattr(dist, "init_process_group", by_gloo)  # noqa: B010

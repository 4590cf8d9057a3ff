"""Many tensors travel together, and arrive as they were."""

from __future__ import annotations

import pytest
import torch

from disttrain.distributed import packed
from disttrain.distributed.packed import broadcast_many

TYPES = (torch.float32, torch.bfloat16, torch.complex64, torch.int16, torch.bool)


def tensors() -> list[torch.Tensor]:
    """One of each type, shapes that are easily forgotten, and an order that is not that of the indices."""
    many = [torch.arange(6).reshape(2, 3).to(kind) for kind in TYPES]
    last = torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last)
    return [*many, torch.tensor(7.5), torch.zeros(0, 3), torch.arange(90.0), torch.tensor([1.0, torch.nan]), last]


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.distributed(world_size=3)
def test_tensors_travel_in_few_messages(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_MOST_BYTES", 200)  # two are larger
    sizes: list[int] = []
    broadcast = packed.broadcast_
    monkeypatch.setattr(packed, "broadcast_", lambda one, source: (sizes.append(one.nbytes), broadcast(one, source)))
    expected = tensors()
    mine = expected if rank == 1 else [torch.empty_like(one, device="meta") for one in expected]
    received = broadcast_many(mine, 1, keeps=rank != 2)
    assert sizes == [106, 360, 200]
    if rank:
        assert received == [], "neither who sends nor who has it already keeps a copy"
        return
    assert [(one.dtype, one.shape, one.stride()) for one in received] == [
        (one.dtype, one.shape, one.stride()) for one in expected
    ]
    assert [raw(one) for one in received] == [raw(one) for one in expected]

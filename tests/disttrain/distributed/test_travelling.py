"""Objects that travel between workers."""

from __future__ import annotations

import pytest
import torch

from disttrain.distributed.collectives import broadcast_object, gather_objects, num_issued

LENGTHS = (
    0,
    1,
    4070,
    4071,
    4072,
    4073,
    4074,
    4088,
    100_000,
)  # some just fit into what is sent first


@pytest.mark.distributed(world_size=3)
def test_an_object_of_any_size_arrives_and_a_small_one_takes_one_collective(rank: int) -> None:
    for length in LENGTHS:
        everybodys = [{"rank": of, "text": "x" * (length if of == 1 else of)} for of in range(3)]
        assert gather_objects(everybodys[rank]) == everybodys
        for source in range(3):
            assert broadcast_object(everybodys[rank] if rank == source else None, source) == everybodys[source]
    begun = num_issued(torch.device("cpu"))
    gather_objects(rank)
    assert num_issued(torch.device("cpu")) == begun + 1
    broadcast_object(rank)
    assert num_issued(torch.device("cpu")) == begun + 2

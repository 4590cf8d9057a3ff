"""A checkpoint that rank 0 has read reaches the others tensor by tensor, into the memory that is there."""

from __future__ import annotations

import pytest
import torch

from disttrain.checkpoint import Checkpoint
from disttrain.checkpoint.handout import hand_out, read_by_main
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError

two_workers = pytest.mark.distributed(world_size=2, process_group=False)
TYPES = (
    torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int16, torch.uint16, torch.uint32,
    torch.bool,
)  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    """One of each type, and shapes that are easily forgotten."""
    many = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in TYPES}
    return {**many, "scalar": torch.tensor(7.5), "empty": torch.zeros(0, 3), "nan": torch.tensor([1.0, torch.nan])}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


@two_workers
def test_only_a_description_travels_as_an_object_and_the_tensors_go_where_they_belong(rank: int) -> None:
    with join_world("cpu", threads=1) as world:
        read = read_by_main(world, lambda: Checkpoint("here", tensors(), {"0.step": torch.ones(2)}, {"step": 3}))
        assert read.state == {"step": 3}
        if rank > 0:
            assert {tensor.device.type for tensor in (*read.model.values(), *read.optimizer.values())} == {"meta"}
        assert {name: (t.shape, t.dtype) for name, t in read.model.items()} == {
            name: (t.shape, t.dtype) for name, t in tensors().items()
        }
        into = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
        into["nan"] = torch.zeros(4)[::2]  # not in one piece
        into["scalar"] = torch.tensor(0, dtype=torch.int64)  # of another type
        received = hand_out(world, read.model, into)
        for name, tensor in tensors().items():
            assert same_bits(received[name], tensor), name
            assert rank == 0 or (received[name].data_ptr() == into[name].data_ptr()) == (name not in ("nan", "scalar"))
        assert same_bits(hand_out(world, read.optimizer)["0.step"], torch.ones(2))


@two_workers
def test_no_checkpoint_and_a_failure_are_everybodys() -> None:
    def fail() -> Checkpoint:
        raise ConfigurationError("it is damaged")

    with join_world("cpu", threads=1) as world:
        assert read_by_main(world, lambda: None) is None
        with pytest.raises(ConfigurationError, match="it is damaged"):
            read_by_main(world, fail)

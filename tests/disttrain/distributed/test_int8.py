"""Means that travel in 8 bits: the same on every rank, whoever had what, and near the true ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from disttrain.distributed.collectives import gather_objects
from disttrain.distributed.int8 import int8_mean_


@pytest.mark.distributed(world_size=3)
def test_means_in_8_bits_are_near_and_do_not_depend_on_the_order_of_the_ranks(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    long, short = torch.randn(3, 700, generator=generator), torch.randn(3, 2, 1, generator=generator)
    long[:, :512] *= 1e-4  # a block of its own: its scale is not that of the large numbers
    tiny, waves = torch.full((3, 5), 1e-42), torch.randn(3, 4, dtype=torch.complex64, generator=generator)

    def mean(number: int) -> list[torch.Tensor]:
        mine = [one[number].clone() for one in (long, short, tiny, waves)]
        int8_mean_(mine, 3)
        return mine

    sent: list[int] = []
    for name, place in (("all_to_all_single", 1), ("all_gather", 1), ("all_reduce", 0)):
        real = getattr(dist, name)

        def watched(*args: torch.Tensor, _real=real, _place=place, **options: object) -> object:  # type: ignore[no-untyped-def]
            sent.append(args[_place].numel() * args[_place].element_size())
            return _real(*args, **options)

        monkeypatch.setattr(dist, name, watched)
    found = mean(rank)
    numbers = 700 + 2 + 5 + 8
    assert sent == [4 * 5, numbers + 2, (numbers + 2) // 3], "scales of five blocks, all numbers, the means of a third"
    monkeypatch.undo()
    assert all(torch.equal(one, other) for one, other in zip(found, mean((rank + 1) % 3), strict=True))
    first, *others = gather_objects([one.tolist() for one in found])
    assert others == [first, first]
    for mean_of_it, all_of_it in zip(found, (long, short, tiny, waves), strict=True):
        true_mean = all_of_it.mean(0)
        assert (mean_of_it.dtype, mean_of_it.shape) == (true_mean.dtype, true_mean.shape)
        of_all, one, exact = (_real(tensor) for tensor in (all_of_it, mean_of_it, true_mean))
        for start in range(0, len(exact), 512):
            part = slice(start, start + 512)
            allowed = float(of_all[:, part].abs().max()) / 127 + 1e-41
            assert (one[part] - exact[part]).abs().max() <= allowed  # importing torch.testing takes half a second


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor

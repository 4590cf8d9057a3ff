"""Operations on many tensors at once."""

from __future__ import annotations

import pytest
import torch

from disttrain.distributed import later
from disttrain.distributed.foreach import differ

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_single_bit_or_form_makes_lists_differ(is_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any type and stride; NaN is the same as itself; None is the same as None alone."""
    monkeypatch.setattr(later, "is_asynchronous", lambda device: is_gpu)
    ones = [torch.full((2, 3), float("nan"), dtype=dtype).t() for dtype in TYPES]
    others = [one.clone(memory_format=torch.contiguous_format) for one in ones]
    assert not differ([], [])
    assert not differ([None, *ones, torch.empty(0)], [None, *others, torch.empty(0)])
    for place, other in enumerate(others):
        bits = other.view(-1).view(torch.uint8)
        bits[-1] ^= 1
        assert differ(ones, others), TYPES[place]
        bits[-1] ^= 1
        for unlike in (None, other.view(-1), torch.zeros_like(other, dtype=torch.int8)):
            assert differ(ones, [*others[:place], unlike, *others[place + 1 :]])
            assert differ([*others[:place], unlike, *others[place + 1 :]], ones)
    assert not differ(ones, others)

"""A model whose large tensors lie in files is the one that lies in memory, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain.models.gpt import GPT
from disttrain.models.spill import LargeTensorsInFiles


class Odd(nn.Module):
    """Its constructor looks at what it has drawn, makes weights of other tensors, and ties two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(520, 520) for _ in range(3))
        self.rates = torch.linspace(0, 1, 3).tolist()
        nn.init.trunc_normal_(self.layers[0].weight, std=0.6)  # draws until all are within bounds
        nn.init.orthogonal_(self.layers[1].weight)
        self.weight = nn.Parameter(torch.randn(600, 600) / 3)
        self.scale = float(self.weight.detach().norm())
        self.layers[2].weight = self.layers[1].weight
        self.register_buffer("mask", torch.ones(600, 600).tril())


def gpt() -> nn.Module:
    return GPT(vocab_size=300, num_layers=1, num_heads=2, dim=256)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="files without a name are opened through /proc")
@pytest.mark.parametrize(("make", "num_large"), [(Odd, 5), (gpt, 2)])
def test_the_start_is_the_same_to_the_last_bit(make: Callable[[], nn.Module], num_large: int, tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole, drawn = make(), torch.get_rng_state()
    torch.manual_seed(3)
    with LargeTensorsInFiles(tmp_path, most_in_memory=0):
        in_files = make()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert vars(in_files).get("scale") == vars(whole).get("scale")
    state = in_files.state_dict()
    assert list(state) == list(whole.state_dict())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(state[name], tensor), name
    large = [one for one in state.values() if one.untyped_storage().nbytes() >= 1 << 20]
    assert len(large) == num_large
    assert all("/proc/self/fd" in str(one.untyped_storage().filename) for one in large), "in a file"  # type: ignore[attr-defined]
    assert not any(tmp_path.iterdir()), "without a name"


def test_what_fits_into_memory_and_what_no_file_has_room_for_stays_there(tmp_path: Path) -> None:
    for folder, most in ((tmp_path, 1 << 40), (tmp_path / "not there", 0)):
        with LargeTensorsInFiles(folder, most) as mode:
            assert float(torch.ones(600, 600).sum()) == 360_000
        assert mode.num_files == 0

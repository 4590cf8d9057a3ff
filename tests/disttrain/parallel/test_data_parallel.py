"""One process and several GPUs: torch's own machinery of copies, here over two CPUs that pass for devices.

What stands in for CUDA is what moves numbers (Broadcast, Scatter, Gather), and the streams of its threads. How torch
cuts a batch, copies a model's modules and runs the copies in threads is its own code. What this cannot show: that the
copies lie on other GPUs, and what that costs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import scatter_gather

from disttrain import rng
from disttrain.errors import ConfigurationError
from disttrain.parallel.choose import parallelize
from disttrain.parallel.strategy import Strategy
from disttrain.recipe import ParallelRecipe
from tests.disttrain.parallel.gradients import ALONE


def broadcast(tensors: Sequence[torch.Tensor], devices: Sequence[int], detach: bool = False) -> list[Any]:
    """The first device has the tensors themselves, the others copies; what is not detached passes gradients on."""
    rows = [[tensor.view_as(tensor) if number == 0 else tensor.clone() for tensor in tensors] for number in devices]
    return [[tensor.detach() for tensor in row] for row in rows] if detach else rows


def in_threads(modules: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
    """As torch's `parallel_apply`: a thread for each copy, with whether autocast is on but not with its type."""
    enabled, all_run = torch.is_autocast_enabled("cpu"), threading.Barrier(len(modules), timeout=60.0)

    def apply(module: nn.Module, arguments: Any) -> Any:
        all_run.wait()
        with torch.amp.autocast("cpu", enabled=enabled):
            return module(*arguments)

    with ThreadPoolExecutor(len(modules)) as pool:
        return list(pool.map(apply, modules, inputs))


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch's DataParallel find two devices, numbered, on which to copy."""

    class Scattered:
        @staticmethod
        def apply(devices: Sequence[int], _: Any, dim: int, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tensor.chunk(len(devices), dim)

    class Gathered:
        @staticmethod
        def apply(_: int, dim: int, *tensors: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor.reshape(1) if tensor.ndim == 0 else tensor for tensor in tensors], dim)

    def made(parallel: Any, module: nn.Module) -> None:
        nn.Module.__init__(parallel)
        parallel.module, parallel.dim, parallel.device_ids, parallel.output_device = module, 0, [0, 1], 0
        parallel.src_device_obj = torch.device("cpu")

    copying = sys.modules["torch.nn.parallel.replicate"]  # as an attribute of torch.nn.parallel it is a function
    monkeypatch.setattr(nn.DataParallel, "__init__", made)
    monkeypatch.setattr(nn.DataParallel, "parallel_apply", staticmethod(in_threads))
    monkeypatch.setattr(copying, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(copying, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(scatter_gather, "Scatter", Scattered)
    monkeypatch.setattr(scatter_gather, "Gather", Gathered)


class Network(nn.Module):
    """Notes who computes what: (thread, shape of the images, type of the outcome)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seen: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self.norm = nn.BatchNorm1d(6, momentum=1.0)
        self.linear = nn.Linear(6, 4)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        codes: torch.Tensor = self.linear(images)
        self.seen.append((threading.get_ident(), tuple(images.shape), codes.dtype))
        return codes


def squares(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    assert isinstance(model, Network)
    image, scale = batch["views"]
    return (model.encode(image) * scale.unsqueeze(1)).square().sum() + batch["factor"] * model.linear(image).sum()


def build(model: nn.Module, name: str) -> Strategy:
    return parallelize(model, ALONE, ParallelRecipe(strategy=name))  # type: ignore[arg-type]


def batch_of(num: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(num, 6, dtype=torch.float64, generator=generator)
    return {"views": (image, torch.rand(num, dtype=torch.float64, generator=generator)), "factor": 3.0}


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize(("num", "parts"), [(8, [4, 4]), (7, [4, 3]), (1, [1])])
def test_each_copy_computes_the_loss_of_its_part_and_the_gradients_add_up(num: int, parts: list[int]) -> None:
    losses, gradients, networks = [], [], [Network().double(), Network().double()]
    for network, name in zip(networks, ("none", "dp"), strict=True):
        loss = build(network, name).loss(squares, batch_of(num), num_samples=num)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in network.linear.parameters()])
    assert losses[1].ndim == 0
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0.0)
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    alone, divided = (network.seen for network in networks)
    assert [shape for _, shape, _ in alone] == [(num, 6)]
    assert sorted((shape for _, shape, _ in divided), reverse=True) == [(part, 6) for part in parts]
    assert len({thread for thread, _, _ in divided}) == len(parts)


@pytest.mark.usefixtures("two_devices")
def test_copies_compute_in_the_type_of_the_loop_and_the_first_ones_buffers_stay() -> None:
    network = Network()

    def normalised(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        assert isinstance(model, Network)
        return model.encode(model.norm(images)).float().sum()

    images = torch.arange(8.0).unsqueeze(1).expand(8, 6)
    with torch.autocast("cpu", dtype=torch.float16):  # not the CPU's own default, bfloat16
        build(network, "dp").loss(normalised, images, num_samples=8).backward()  # type: ignore[no-untyped-call]
    assert [dtype for _, _, dtype in network.seen] == [torch.float16] * 2
    assert network.norm.running_mean is not None
    assert network.norm.running_mean.tolist() == [1.5] * 6, "the mean of 0, 1, 2 and 3"


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize(
    ("batch", "holds"),
    [
        ([torch.zeros(3, 8), torch.zeros(3, 9)], r"a tensor of shape \(3, 8\)"),
        ({"tokens": torch.zeros(2), "offsets": torch.zeros(3)}, r"a tensor of shape \(3,\)"),
        ({"images": torch.zeros(2, 3), "temperature": torch.tensor(1.0)}, r"a tensor of shape \(\)"),
        (["text", "another"], "no tensor"),
    ],
    ids=["images-in-several-sizes", "packed", "a-number", "no-tensor"],
)
def test_a_batch_that_cannot_be_cut_by_sample_is_refused(batch: Any, holds: str) -> None:
    strategy = build(Network(), "dp")
    with pytest.raises(
        ConfigurationError, match=f"cannot divide a batch among 2 GPUs that holds {holds} for 2 samples"
    ):
        strategy.loss(squares, batch, num_samples=2)


@pytest.mark.usefixtures("two_devices")
def test_each_gpus_layers_draw_numbers_of_their_own_that_follow_from_seed_and_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generators = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    strategy = build(Network(), "dp")

    def drawn(step: int) -> tuple[list[float], list[float]]:
        rng.seed_layers(torch.device("cpu"), 7, step, 0)
        generators[0].manual_seed(torch.initial_seed())  # as `torch.cuda.manual_seed` does it for the first
        strategy.open_slice()
        first, second = (torch.rand(3, generator=generator).tolist() for generator in generators)
        return first, second

    first, second = drawn(3)
    assert first != second
    assert drawn(4) != (first, second)
    assert drawn(3) == (first, second)
    assert drawn(4)[1] != second


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("way", ["in place", "wrapped"])
def test_a_compiled_model_is_refused_for_several_gpus(way: str) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    if way == "in place":
        network[0].compile(backend="eager")
    else:
        network[0] = torch.compile(network[0], backend="eager")  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match=r"^DataParallel over 2 GPUs cannot copy a compiled model: .*-n gpu"):
        build(network, "dp")


def test_without_gpus_the_model_itself_computes_everything() -> None:
    network = Network().double()
    build(network, "dp").loss(squares, batch_of(8), num_samples=8).backward()  # type: ignore[no-untyped-call]
    assert [shape for _, shape, _ in network.seen] == [(8, 6)]
    assert network.linear.weight.grad is not None

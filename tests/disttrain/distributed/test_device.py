"""The device that a worker chooses. There is no GPU in tests: what torch says of them is put on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disttrain.distributed.device import choose_device, refuse_a_mixture, why_not_gpus
from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe
from disttrain.testing import run_workers
from tests.disttrain.training.test_train import QUIET, network, samples

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """Have torch see so many GPUs, and none of Apple's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_gpus_that_a_variable_hides_are_not_blamed_on_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=r"sees no driver that fits, or CUDA_VISIBLE_DEVICES='' hides them\)"):
        choose_device("cuda", 0, 1, 1, {"CUDA_VISIBLE_DEVICES": ""})


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpus=0)
    assert choose_device("auto", 0, 1, 1) == CPU
    assert why_not_gpus("auto", CPU, 1) == ""
    with pytest.raises(ConfigurationError, match="sees no GPU"):
        choose_device("cuda", 0, 1, 1)
    with pytest.raises(ConfigurationError, match="no Apple GPU"):
        choose_device("mps", 0, 1, 1)


def test_each_worker_has_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpus=2)
    assert choose_device("auto", 1, 2, 4) == torch.device("cuda", 1)
    assert choose_device("auto", 0, 1, 1) == torch.device("cuda", 0)
    with pytest.raises(ConfigurationError, match="worker 2 of this machine has no GPU of its own"):
        choose_device("cuda", 2, 3, 3)


def test_where_gpus_were_asked_for_none_trains_on_a_cpu_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`-n gpu` and `--gpus` have launchers say so; what the recipe itself says comes first."""
    wanted = {"DISTTRAIN_DEVICE": "cuda"}
    pretend(monkeypatch, gpus=0)
    with pytest.raises(
        ConfigurationError, match=r"^DISTTRAIN_DEVICE=cuda, as -n gpu .*: PyTorch sees no GPU here"
    ) as no:
        choose_device("auto", 0, 1, 1, wanted)
    assert no.value.exit_code == 78
    assert choose_device("cpu", 0, 1, 1, wanted) == CPU
    pretend(monkeypatch, gpus=1)
    with pytest.raises(ConfigurationError, match="worker 1 of this machine has no GPU of its own"):
        choose_device("auto", 1, 2, 2, wanted)
    with pytest.raises(ConfigurationError, match="DISTTRAIN_DEVICE='tpu' is not a valid device"):
        choose_device("auto", 0, 1, 1, {"DISTTRAIN_DEVICE": "tpu"})


@pytest.mark.parametrize(("gpus", "workers"), [(1, 2), (2, 3)])
def test_gpus_are_for_machines_that_have_one_for_each_worker(
    monkeypatch: pytest.MonkeyPatch, gpus: int, workers: int
) -> None:
    pretend(monkeypatch, gpus)
    assert {choose_device("auto", rank, workers, workers) for rank in range(workers)} == {CPU}
    told = why_not_gpus("auto", CPU, workers)
    assert told.startswith(f"{workers} workers on a machine with {gpus} GPU")
    assert told.count("\n") == 0
    assert why_not_gpus("cpu", CPU, workers) == "", "it was asked for"


def test_a_mixture_is_refused() -> None:
    refuse_a_mixture(["cuda on a", "cuda on b"])
    with pytest.raises(ConfigurationError, match="rank 0 would use cuda on a, and rank 2 cpu on b"):
        refuse_a_mixture(["cuda on a", "cuda on a", "cpu on b"])


def test_two_workers_on_a_machine_with_one_gpu_train_on_its_cpu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        from disttrain import train

        torch.cuda.is_available = lambda: True  # in a worker, which is thrown away
        torch.cuda.device_count = lambda: 1
        recipe = load_recipe("digits", [*QUIET, "train.max_steps=1", "data.batch_size=64"])
        return train(
            recipe, run_dir=tmp_path / "run", model=network(), train_set=samples(70), test_set=samples(31, 1)
        ).step

    assert run_workers(body, 2, process_group=False) == [1, 1]
    told = capfd.readouterr().out.splitlines()
    assert told.count("2 workers on a machine with 1 GPU: all use the CPU; -n 1 would use 1 GPU") == 1
    assert any(line.startswith("2 workers on cpu; ") for line in told)

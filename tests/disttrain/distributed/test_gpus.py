"""Counting GPUs without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.distributed.gpus import count_gpus


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi lists three GPUs, one of them with a MIG device."""
    program = tmp_path / "nvidia-smi"
    listing = "GPU 0: H100 (UUID: GPU-aa)\\n  MIG 1g.10gb Device 0: (UUID: MIG-bb)\\n"
    listing += "GPU 1: H100 (UUID: GPU-abc)\\nGPU 2: H100\\n"
    program.write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 3),
        ("0", 1),
        ("0,2", 2),
        ("2, 1", 2),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("0,7,1", 1),
        ("1gpu,2", 2),
        ("none", 0),
        ("\u00b2", 0),
        ("1, 1", 0),
        ("GPU-aa", 1),
        ("GPU-ab,GPU-aa", 2),
        ("GPU-a", 0),
        ("GPU-aa,GPU-zz,GPU-ab", 1),
        ("GPU-aa,GPU-aa", 0),
        ("GPU-aa,MIG-bb", 1),
        ("MIG-bb", 1),
        ("MIG-bb,MIG-cc", 1),
    ],
)
def test_visible_gpus(visible: str | None, count: int) -> None:
    """As many as CUDA shows a process: for more, a worker would start without a GPU."""
    assert count_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_gpus({}) == count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0


def test_a_driver_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: ghost'; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert count_gpus({}) == 0

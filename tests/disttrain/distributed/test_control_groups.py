"""How much memory a process may take: what a container or a batch system allows, wherever it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.distributed import allocator
from disttrain.distributed.allocator import available_memory
from disttrain.distributed.control_groups import memory_limit


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {"memory.max": "4096\n"}, 4096),  # a container with a control group name space of its own
        ("0::/slurm/job/step\n", {"slurm/job/memory.max": "8192\n", "slurm/job/step/memory.max": "max\n"}, 8192),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "512\n"}, 512),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_the_limit_of_a_control_group(
    tmp_path: Path, membership: str, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert memory_limit(tmp_path, tmp_path / "membership") == expected


def test_available_is_no_more_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "memory_limit", lambda: 1000)
    assert available_memory() == 1000
    monkeypatch.setattr(allocator, "memory_limit", lambda: None)
    assert available_memory() > 1000

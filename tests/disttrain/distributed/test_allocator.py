"""Memory that is freed stays with the process, or goes back to the system."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from disttrain.distributed.allocator import _glibc, is_set_by_user

needs_glibc = pytest.mark.skipif(_glibc() is None, reason="musl, macOS: their allocators have no thresholds")

# How many MiB of 80, filled in blocks of 16 and freed, the process still has: before, in and after the block.
_PROGRAM = """
import json
from disttrain.distributed.allocator import freed_memory_kept

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE / 2**20

def fill_and_free():
    blocks = [b"x" * (16 << 20) for _ in range(5)]
    del blocks
    return resident()

fill_and_free()
nothing = resident()
before = fill_and_free()
with freed_memory_kept():
    within = fill_and_free()
print(json.dumps([before - nothing, within - nothing, resident() - nothing, fill_and_free() - nothing]))
""".replace("PAGE", str(os.sysconf("SC_PAGE_SIZE")))


def _kept(**environment: str) -> list[float]:
    """MiB kept before the block, in it, right after it, and after another round."""
    clean = {name: value for name, value in os.environ.items() if not is_set_by_user({name: value})}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=clean | environment, capture_output=True, check=True)
    kept: list[float] = json.loads(done.stdout)
    return kept


@needs_glibc
def test_freed_memory_is_kept_while_the_block_runs() -> None:
    before, within, after, later = _kept()
    assert within > 70
    assert max(before, after, later) < 20, "outside the block a user's process gets rid of its memory, as ever"


@needs_glibc
@pytest.mark.parametrize(
    "setting",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
    ids=["variable", "tunable"],
)
def test_thresholds_of_the_users_own_stay(setting: dict[str, str]) -> None:
    assert max(_kept(**setting)) < 20


def test_other_settings_of_malloc_are_not_thresholds() -> None:
    assert not is_set_by_user({"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})

"""What the tests of sharded models share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts of several lengths in `texts`."""
    (tmp_path / "texts").mkdir()
    for number in range(1, 21):
        text = "The cat sat on the mat. It was a small, black cat, and an old mat."[: number * 3]
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    return tmp_path

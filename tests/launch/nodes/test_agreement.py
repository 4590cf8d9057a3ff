"""What machines compare when they meet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from disttrain.recipe import load_recipe
from disttrain_launch.nodes import agreement


def test_code_that_cannot_be_read_does_not_keep_a_machine_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editor has a link to nowhere beside a file that it has open."""
    monkeypatch.setattr(
        agreement, "disttrain", SimpleNamespace(__file__=str(tmp_path / "__init__.py"), __version__="1")
    )
    (tmp_path / "__init__.py").write_text("")
    recipe = load_recipe("digits")
    before = agreement.terms_of(recipe)
    (tmp_path / ".#loop.py").symlink_to("user@host.1234")
    assert agreement.why_not_together(before, agreement.terms_of(recipe)) is None
    (tmp_path / "loop.py").write_text("")
    assert agreement.why_not_together(before, agreement.terms_of(recipe)) is not None

"""Users without a home folder: a number without a name, as in some containers, or a bare environment, as in cron."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from disttrain.errors import ConfigurationError
from disttrain.recipe.address import expanded, settled, working_folder
from disttrain.recipe.home import home_folder


@pytest.fixture(autouse=True)
def _nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "DISTTRAIN_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_there_is_a_folder_for_caches_that_is_the_users_own(tmp_path: Path) -> None:
    folder = home_folder()
    assert folder == tmp_path / f"disttrain-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert home_folder() == folder
    assert working_folder("s3://bucket/run").is_relative_to(folder)


def test_what_somebody_else_may_have_put_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"disttrain-{os.getuid()}").symlink_to("elsewhere")
    with pytest.raises(ConfigurationError, match="belongs to another user: set HOME"):
        home_folder()


def test_a_tilde_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("~/data", "~nobody-of-that-name/data"):
        with pytest.raises(ConfigurationError, match=r"^~.*/data: that home folder is unknown"):
            expanded(path)
    with pytest.raises(ConfigurationError):
        settled("~/run")
    assert expanded("./~/data") == Path("./~/data")
    monkeypatch.setenv("HOME", "/home/me")
    assert settled("~/run") == "/home/me/run"

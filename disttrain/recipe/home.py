"""A folder for what libraries keep, also for users who have no home folder."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from disttrain.errors import ConfigurationError


def home_folder() -> Path:
    """The home folder of this user; below the folder for temporary files for one who has none, as some containers do.

    Raises ConfigurationError if that belongs to another user.
    """
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user without a name
        pass
    folder = Path(tempfile.gettempdir(), f"disttrain-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigurationError(f"{folder} belongs to another user: set HOME to a folder of your own.")
    return folder

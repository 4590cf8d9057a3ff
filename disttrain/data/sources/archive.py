"""Unpacking a tar archive that may be hostile."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from disttrain.errors import ConfigurationError


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the files and folders of a tar archive into `folder`, with the user's own permissions and owner.

    A name that leads out of the folder, a link or a device refuses the whole archive, on every version of Python:
    `tarfile` follows them all where it knows no filters (before 3.11.4), and by default before 3.14. Raises
    ConfigurationError, which names the archive, and OSError.
    """
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            for member in members:
                place = PurePosixPath(member.name)
                if place.is_absolute() or ".." in place.parts or not (member.isfile() or member.isdir()):
                    raise ConfigurationError(
                        f"{archive}: refused: its entry {member.name!r} is a link, a device or leads out of the "
                        "folder. Nothing was unpacked; do not trust this file."
                    )
            for member in members:
                target = folder / member.name
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None, member.name
                with content, target.open("xb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        raise ConfigurationError(f"{archive}: not a whole archive ({error}); replace it by a whole one.") from error

"""Unpacking a tar archive that may be hostile."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

from disttrain.errors import ConfigurationError


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the files and folders of a tar archive into `folder`, with the user's own permissions and owner.

    A name that leads out of the folder, a link or a device refuses the whole archive. Raises ConfigurationError, which
    names the archive, and OSError.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                _plain(member, str(folder))  # all of them before the first is written
            tar.extractall(folder, filter=_plain)
    except tarfile.FilterError as error:
        raise ConfigurationError(
            f"{archive}: refused: its entry {error.tarinfo.name!r} is a link, a device or leads out of the folder. "
            "Nothing was unpacked; do not trust this file."
        ) from error
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        raise ConfigurationError(f"{archive}: not a complete archive ({error}); replace it.") from error


def _plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Python's filter for data, without what it lets pass: links within, and an absolute name as a relative one."""
    if member.name.startswith("/"):
        raise tarfile.AbsolutePathError(member)
    if not (member.isfile() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    safe = tarfile.data_filter(member, folder)
    return safe.replace(mode=None, deep=False)  # type: ignore[arg-type]  # None: what the user's umask leaves

"""The text of a recipe as editors save it."""

from __future__ import annotations

import codecs


def decoded(content: bytes) -> str:
    """The text of a file: those of editors on Windows have a byte order mark, and some are in UTF-16."""
    return content.decode("utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")

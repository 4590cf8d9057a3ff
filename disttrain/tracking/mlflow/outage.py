"""What it means, in plain words, when MLflow does not answer. Needs no MLflow."""

from __future__ import annotations

import re

from disttrain.runs.redact import redact

_NETWORK_CAUSE = re.compile(
    r"(?:Max retries exceeded|Connection aborted|timeout exception).*?"
    r"(Connection refused|Connection reset by peer|Failed to resolve '[^']*'|(?:Read|Connection) timed out|"
    r"No route to host|Network is unreachable|Remote end closed connection|too many \d+ error responses)",
    re.IGNORECASE,
)
_MAX_REASON = 240


class OutageError(Exception):
    """MLflow cannot be reached or does not work now; it may later. The message holds no credentials."""


def brief(error: BaseException) -> str:
    """What went wrong, in a line without credentials."""
    text = redact(str(error)).strip().partition("\n")[0] or type(error).__name__
    # The network library reports all of its retries; the last cause is the one a user can do something about.
    cause = _NETWORK_CAUSE.search(text)
    if cause is not None:
        return cause.group(1)
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "…"

"""Whether a machine leads where this one would have met the others: then the two were given different things."""

from __future__ import annotations

import json
import socket
from contextlib import suppress

from disttrain import __version__
from disttrain.files import parse_json

_PATIENCE_S = 5.0
_MOST_BYTES = 65536


def refusal_at(host: str, port: int, job_id: str) -> str | None:
    """With what a machine that leads there refuses one whose workers restart after a loss; None if none leads."""
    hello = {"job": job_id, "host": socket.gethostname(), "version": __version__, "restarts": True}
    with suppress(OSError, ValueError), socket.create_connection((host, port), _PATIENCE_S) as probe:
        probe.sendall(json.dumps(hello).encode() + b"\n")
        with probe.makefile("rb") as lines:
            answer = parse_json(lines.readline(_MOST_BYTES))
        if isinstance(answer, dict) and "end" in answer:
            return str(answer.get("message"))
    return None

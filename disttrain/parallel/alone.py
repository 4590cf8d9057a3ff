"""One worker alone."""

from __future__ import annotations

from disttrain.parallel.strategy import Strategy


class Alone(Strategy):
    """One worker computes the whole step."""

    name = "none"

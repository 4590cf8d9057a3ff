"""Names that all of this package shares; `--help` needs no more of it."""

from __future__ import annotations

from typing import Literal

Kind = Literal["job", "jobset", "trainjob", "pytorchjob"]
KINDS: tuple[Kind, ...] = ("job", "jobset", "trainjob", "pytorchjob")
PORT = 29400
# Where a pod may write; the root file system is read-only.
RUNS, HOME = "/runs", "/home/disttrain"
RECIPES = "/etc/disttrain"

"""What pytest's plugins find in `config.workerinput`, by which they know a worker of xdist.

There they do not report, and leave alone what the session at home writes; which is right in our workers, too.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from disttrain.testing.preload import can_be_sent

_KNOWN = pytest.StashKey[dict[str, Any]]()


def workerinput(config: pytest.Config) -> dict[str, Any]:
    """What the plugins of this session give xdist for its workers; in a worker of xdist, what that one was given."""
    known = config.stash.get(_KNOWN, None)
    if known is None:
        given = getattr(config, "workerinput", None)
        if given is None:
            given = {"workerid": "master", "workercount": 1, "testrunuid": "disttrain", "mainargv": []}
            _have_plugins_fill(given, config)
        known = {name: value for name, value in given.items() if can_be_sent(value)} | {"disttrain": True}
        config.stash[_KNOWN] = known
    return known


def _have_plugins_fill(given: dict[str, Any], config: pytest.Config) -> None:
    """Ask each plugin as xdist does before it starts a worker. One that needs more than we have is skipped."""
    hook: Any = getattr(config.hook, "pytest_configure_node", None)
    plugins = [implementation.plugin for implementation in hook.get_hookimpls()] if hook is not None else []
    node = SimpleNamespace(config=config, workerinput=given, gateway=SimpleNamespace(id=given["workerid"]))
    for plugin in plugins:
        others = [other for other in plugins if other is not plugin]
        with contextlib.suppress(Exception):
            config.pluginmanager.subset_hook_caller("pytest_configure_node", others)(node=node)

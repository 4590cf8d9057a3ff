"""What the workers should find imported: the file whose test is running, as its pytest session collected it."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from disttrain.testing.spec import Preload, PytestPreload

if TYPE_CHECKING:
    import pytest

# Options that make a session what the one at home is: what it selects, shows, writes and stops at.
_NOT_IN_WORKERS: dict[str, Any] = {
    "basetemp": None,
    "capture": "no",
    "collectonly": False,
    "cov_source": [],  # the workers' coverage is ours to collect: see measuring
    "deselect": None,
    "dist": "no",
    "failedfirst": False,
    "force_sugar": False,
    "keyword": "",
    "lf": False,
    "looponfail": False,
    "markexpr": "",
    "maxfail": 0,
    "newfirst": False,
    "numprocesses": None,
    "setuponly": False,
    "setupplan": False,
    "setupshow": False,
    "stepwise": False,
    "trace": False,
    "tx": [],
    "usepdb": False,
    "xmlpath": None,
}
_PLUGINS_NOT_IN_WORKERS = ("no:terminal",)


class Providers:
    """The sessions with a running test, innermost last: pytester runs one session inside another."""

    def __init__(self) -> None:
        self._stack: list[Callable[[], Preload | None]] = []

    def push(self, provider: Callable[[], Preload | None]) -> None:
        """A test begins."""
        self._stack.append(provider)

    def remove(self, provider: Callable[[], Preload | None]) -> None:
        """A test is over."""
        self._stack.remove(provider)

    def current(self) -> Preload | None:
        """The file of the test that is running; None outside pytest."""
        return self._stack[-1]() if self._stack else None


PROVIDERS = Providers()


def pytest_preload(item: pytest.Item) -> PytestPreload:
    """Have workers collect the file of this test, with the options of its session."""
    from disttrain.testing.workerinput import workerinput

    config = item.config
    options = {name: value for name, value in vars(config.option).items() if can_be_sent(value)}
    options |= {name: value for name, value in _NOT_IN_WORKERS.items() if name in options}
    options["plugins"] = list(_PLUGINS_NOT_IN_WORKERS)
    options["rootdir"] = str(config.rootpath)
    options["inifilename"] = str(config.inipath) if config.inipath else None
    return PytestPreload(
        session=id(config),
        path=str(item.path),
        rootdir=str(config.rootpath),
        inifile=options["inifilename"],
        cwd=str(config.invocation_params.dir),
        plugins=tuple(config.option.plugins or ()),
        options=options,
        sys_path=tuple(sys.path),
        env=dict(os.environ),
        # What plugins give a worker is mostly an option; without xdist they are never asked, and find this.
        workerinput=options | workerinput(config),
    )


def can_be_sent(value: object) -> bool:
    """Whether another process can have it."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True

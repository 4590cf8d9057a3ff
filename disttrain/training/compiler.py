"""PyTorch's compiler, imported by the first that needs it.

An optimizer, its steps and DistributedDataParallel import `torch._dynamo`, and with it hundreds of modules: a good part
of a second of processor time in every worker, only to ask a compiler that is not at work to leave them alone.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


@contextmanager
def compiler_when_used() -> Iterator[None]:
    """Keep `torch._dynamo` from being imported while the block runs, until more is asked of it than to keep away.

    Whatever else is asked of it, by whichever thread, and every module of it that is imported, brings the real one.
    """
    if _NAME in sys.modules:
        yield
        return
    stand_in = _StandIn()
    torch._dynamo = sys.modules[_NAME] = stand_in
    sys.meta_path.insert(0, stand_in.finder)
    try:
        yield
    finally:
        stand_in.leave()


class _StandIn(ModuleType):
    """What the users of the compiler get that ask nothing else."""

    def __init__(self) -> None:
        super().__init__(_NAME)
        self.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
        self.__spec__ = PathFinder.find_spec(_NAME, torch.__path__)  # for `importlib.util.find_spec`
        self.finder, self.utils, self.trace_rules = _Finder(self), _Utils(self), _TraceRules(self)
        self._left_alone: list[Any] = []
        self._lock = threading.Lock()

    def graph_break(self, msg: str = "") -> None:
        """Nothing, outside of code that is compiled."""

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """`fn` as it is, if torch asks for a function of its own: it keeps the answer until this module leaves."""
        if fn is None or options != {"wrapping": False}:
            return self.real().disable(fn, recursive, **options)
        self._left_alone.append(fn)
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions about a module
            raise AttributeError(name)
        return getattr(self.real(), name)

    def real(self) -> Any:
        """The compiler, imported now if it is not there yet."""
        self.leave()
        return importlib.import_module(_NAME)

    def leave(self) -> None:
        """Make room for the real module."""
        with self._lock, suppress(ValueError):
            if sys.modules.get(_NAME) is self:
                del sys.modules[_NAME]
            if vars(torch).get("_dynamo") is self:
                del torch._dynamo
            while self._left_alone:  # each is asked for again, now of the real module
                vars(self._left_alone.pop()).pop("__dynamo_disable", None)
            sys.meta_path.remove(self.finder)


class _Utils:
    def __init__(self, stand_in: _StandIn) -> None:
        self._stand_in = stand_in

    def get_optimize_ddp_mode(self) -> str:
        """What it is unless somebody who has imported the compiler sets it; DistributedDataParallel asks."""
        return "ddp_optimizer"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stand_in.real().utils, name)


class _TraceRules:
    def __init__(self, stand_in: _StandIn) -> None:
        self._stand_in = stand_in

    def clear_lru_cache(self) -> None:
        """Nothing, as none of the rules was looked at yet; forming a group asks for it, after a loss for one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stand_in.real().trace_rules, name)


class _Finder(MetaPathFinder):
    """Has `import torch._dynamo.config` and its like import the package first, which brings most of them along."""

    def __init__(self, stand_in: _StandIn) -> None:
        self._stand_in = stand_in

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where to find what is there now; None for what is still to be looked for as ever."""
        if not fullname.startswith(f"{_NAME}."):
            return None
        self._stand_in.real()
        module = sys.modules.get(fullname)
        return None if module is None else ModuleSpec(fullname, _AsItIs(module))


class _AsItIs(Loader):
    """Takes a module that is there for what an import has to load."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing, but that it keeps what it was found by."""
        module.__spec__ = self._spec

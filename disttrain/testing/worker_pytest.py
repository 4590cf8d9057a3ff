"""pytest inside a worker: collect the test file as the session at home did, then run one test, phase by phase.

The test's function, its fixtures and pytest's assertion rewriting are therefore those of any other pytest run.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from _pytest.config import Config
from _pytest.runner import call_and_report
from _pytest.warnings import catch_warnings_for_item

from disttrain.testing import examples, subtests
from disttrain.testing.errors import HarnessError
from disttrain.testing.spec import PytestPreload, WorkerSpec
from disttrain.testing.worker import failure


def collect(preload: PytestPreload) -> pytest.Session:
    """A session that has collected the one file. Raises what pytest raises when it cannot be collected."""
    plugins = [part for plugin in preload.plugins for part in ("-p", plugin)]
    config = Config.fromdictargs(preload.options, [*plugins, preload.path])
    config.workerinput = preload.workerinput  # type: ignore[attr-defined]  # as plugins know a worker of xdist
    config._do_configure()
    session = pytest.Session.from_config(config)
    config.hook.pytest_sessionstart(session=session)
    session.perform_collect([preload.path])
    if session.testsfailed:
        raise HarnessError(f"{preload.path} cannot be collected in a worker: see the errors of collecting it")
    return session


class ItemRunner:
    """Runs the setup, call and teardown of one test, each upon command, and answers with its report."""

    def __init__(self, session: pytest.Session, spec: WorkerSpec) -> None:
        self._session = session
        self._spec = spec
        self._item: pytest.Function | None = None
        self._scratch: Path | None = None  # of this test, shared by its ranks and the session at home
        self._warnings: list[tuple[str, str, str, int]] = []
        self._catching: AbstractContextManager[None] | None = None
        session.config.pluginmanager.register(self)

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str) -> None:
        """pytest's hook: keep the warning for the session at home."""
        if when != "runtest":
            return
        category = warning_message.category
        where = (warning_message.filename, warning_message.lineno)
        self._warnings.append((str(warning_message.message), f"{category.__module__}:{category.__qualname__}", *where))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """pytest's hook. The reports of the phases are answers and not logged, so this is one of a subtest."""
        assert self._scratch is not None
        subtests.keep(self._session.config, report, self._scratch, self._spec.rank)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_pyfunc_call(self) -> Generator[None, object, object]:
        """pytest's hook around the test's function."""
        __tracebackhide__ = True
        with examples.shown():
            return (yield)

    def run(self, phase: str, argument: Any) -> dict[str, Any]:
        """One phase. Returns the report as the session at home can read it."""
        try:
            return self._run(phase, argument)
        except pytest.exit.Exception as error:
            return {"kind": "report", "outcome": "exit", "message": error.msg, "warnings": []}
        except HarnessError as error:
            return {"kind": "report", "outcome": "unusable", "message": str(error), "warnings": []}
        except BaseException as error:
            return failure(error)

    def _run(self, phase: str, argument: Any) -> dict[str, Any]:
        if phase == "setup":
            self._item = self._find(argument["nodeid"])
            self._furnish(self._item, argument)
            examples.agree(self._item)
            self._catching = catch_warnings_for_item(
                config=self._session.config, ihook=self._item.ihook, when="runtest", item=self._item
            )
            self._catching.__enter__()
        assert self._item is not None
        assert self._catching is not None
        options: dict[str, Any] = {"nextitem": None} if phase == "teardown" else {}
        report = call_and_report(self._item, phase, log=False, **options)  # type: ignore[arg-type]
        if phase == "teardown":
            self._catching.__exit__(None, None, None)
        config = self._session.config
        return {
            "kind": "report",
            "outcome": report.outcome,
            "report": config.hook.pytest_report_to_serializable(config=config, report=report),
            "warnings": self._warnings,
        }

    def _find(self, nodeid: str) -> pytest.Function:
        ungrouped = nodeid.rpartition("@")[0]  # xdist's loadgroup appends the group
        for item in self._session.items:
            if item.nodeid in (nodeid, ungrouped) and isinstance(item, pytest.Function):
                return item
        raise HarnessError(
            f"{nodeid} does not exist when a worker collects its file: parameters and their ids must not depend on "
            "anything that changes from one process to the next"
        )

    def _furnish(self, item: pytest.Function, argument: dict[str, Any]) -> None:
        """Put in place what was made at home: values of wide fixtures, tmp_path, the simulated machines."""
        import cloudpickle  # type: ignore[import-untyped]

        config: Any = self._session.config
        config._disttrain_cluster = pickle.loads(argument["cluster"])
        self._scratch = Path(argument["scratch"])
        config._tmp_path_factory._given_basetemp = self._scratch / f"rank-{self._spec.rank}"
        config._tmp_path_factory._basetemp = None
        for name, pickled in argument["fixtures"].items():
            definition: Any = item._fixtureinfo.name2fixturedefs[name][-1]
            try:
                value = cloudpickle.loads(pickled)
            except Exception as error:
                raise HarnessError(
                    f"the fixture '{name}' has {definition.scope} scope, so it is made once and its value is sent to "
                    f"the workers, but there it cannot be unpickled ({type(error).__name__}: {error}). Give it "
                    "function scope, and every worker makes its own; or have it return a path or plain values."
                ) from error
            definition.cached_result = (value, None, None)
            item._request._fixture_defs[name] = definition

"""pytest inside a worker: collect the test file as the session at home did, then run one test, phase by phase.

The test's function, its fixtures and pytest's assertion rewriting are therefore those of any other pytest run.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from _pytest.config import Config
from _pytest.runner import call_and_report
from _pytest.terminal import TerminalReporter

from disttrain.testing import examples, subtests
from disttrain.testing.errors import HarnessError
from disttrain.testing.spec import PytestPreload, WorkerSpec
from disttrain.testing.worker import Orders, failure


def collect(preload: PytestPreload) -> pytest.Session:
    """A session that has collected the one file. Raises what pytest raises when it cannot be collected."""
    plugins = [part for plugin in preload.plugins for part in ("-p", plugin)]
    with _nothing_to_say_of_the_configuration():
        config = Config.fromdictargs(preload.options, [*plugins, preload.path])
        config.workerinput = preload.workerinput  # type: ignore[attr-defined]  # as plugins know a worker of xdist
        config.workeroutput = {}  # type: ignore[attr-defined]
        # pytest 8 asks it for colours as it explains an assertion, and so may plugins. What it writes is never read.
        config.pluginmanager.register(TerminalReporter(config, io.StringIO()), "terminalreporter")
        config._do_configure()
    session = pytest.Session.from_config(config)
    config.hook.pytest_sessionstart(session=session)
    session.perform_collect([preload.path])
    if session.testsfailed:
        raise HarnessError(f"{preload.path} cannot be collected in a worker: see the errors of collecting it")
    return session


@contextmanager
def _nothing_to_say_of_the_configuration() -> Iterator[None]:
    """The session at home has warned of what is wrong with it; here, pytest also finds modules imported before it."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # or `python -W error` makes errors of them
        patch.setattr(Config, "issue_config_time_warning", lambda *_, **__: None)
        yield


class ItemRunner:
    """Runs one test: its setup, call and teardown each upon command, and answered with the report."""

    def __init__(self, session: pytest.Session, spec: WorkerSpec, orders: Orders) -> None:
        self._session = session
        self._spec = spec
        self._orders = orders
        self._answer: dict[str, Any] = {}
        self._scratch: Path | None = None  # of this test, shared by its ranks and the session at home
        self._warnings: list[tuple[str, str, str, int]] = []

    def run(self, argument: Any) -> dict[str, Any]:
        """The whole test, once setup is commanded. Returns the answer to the last command."""
        try:
            item = self._find(argument["nodeid"])
            self._furnish(item, argument)
            examples.agree(item)
            self._session.config.pluginmanager.register(self)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        except EOFError:
            raise
        except HarnessError as error:
            return {"kind": "report", "outcome": "unusable", "message": str(error), "warnings": []}
        except BaseException as error:
            return failure(error)
        return self._answer

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        """pytest's hook: what other plugins wrap around a test is wrapped around it here as well."""
        phase = "setup"
        while True:
            self._answer = self._run(item, phase)
            if phase == "teardown":
                return True
            self._orders.answer(self._answer)
            phase, _ = self._orders.receive()

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

    def _run(self, item: pytest.Item, phase: str) -> dict[str, Any]:
        """One phase. Returns the report as the session at home can read it."""
        options: dict[str, Any] = {"nextitem": None} if phase == "teardown" else {}
        try:
            report = call_and_report(item, phase, log=False, **options)  # type: ignore[arg-type]
            config = self._session.config
            return {
                "kind": "report",
                "outcome": report.outcome,
                "report": config.hook.pytest_report_to_serializable(config=config, report=report),
                "warnings": self._warnings,
            }
        except pytest.exit.Exception as error:
            return {"kind": "report", "outcome": "exit", "message": error.msg, "warnings": []}
        except BaseException as error:
            return failure(error)

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
        for (name, level), pickled in argument["fixtures"].items():
            definitions: Any = item._request._arg2fixturedefs
            definition = definitions[name][level]
            try:
                value = cloudpickle.loads(pickled)
            except Exception as error:
                raise HarnessError(
                    f"the fixture '{name}' has {definition.scope} scope, so it is made once and its value is sent to "
                    f"the workers, but there it cannot be unpickled ({type(error).__name__}: {error}). Give it "
                    "function scope, and every worker makes its own; or have it return a path or plain values."
                ) from error
            if level == -1:
                definition.cached_result = (value, None, None)
                item._request._fixture_defs[name] = definition
            else:
                params = item.callspec.params if hasattr(item, "callspec") else {}
                made = copy(definition)
                made.argnames, made.cached_result = (), (value, params.get(name), None)
                definitions[name] = [made if known is definition else known for known in definitions[name]]

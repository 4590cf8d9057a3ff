"""A test marked `distributed`, as the pytest session that reports sees it: every worker carries out each phase."""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

import pytest
from _pytest._code.code import ExceptionChainRepr, ExceptionInfo, TerminalRepr
from _pytest.unittest import TestCaseFunction

from disttrain.testing import examples, narrative, subtests
from disttrain.testing.crew import Reply
from disttrain.testing.errors import CollectivesDiffer, HarnessError
from disttrain.testing.fixtures import make_and_pickle
from disttrain.testing.group import Group, start_group
from disttrain.testing.options import Options, of_marker
from disttrain.testing.preload import pytest_preload
from disttrain.testing.reports import RanksFailed, merged, of_rank, text_only


def distributed(item: pytest.Item) -> pytest.Item:
    """The same test, to be run in workers. What is not a function stays what it is, and fails when it is set up.

    A function that another plugin runs in its way, such as pytest-asyncio a coroutine, is run in that way there.
    """
    if not isinstance(item, pytest.Function) or isinstance(item, TestCaseFunction):
        return item
    return DistributedFunction.from_parent(
        item.parent,
        name=item.name,
        callspec=getattr(item, "callspec", None),
        fixtureinfo=item._fixtureinfo,
        originalname=item.originalname,
        keywords={item.callspec.id: True} if hasattr(item, "callspec") else None,
    )


class DistributedFunction(pytest.Function):
    """Sets up, calls and tears down in all workers at once; the workers live as long as the test."""

    _stack: ExitStack | None = None
    _group: Group | None = None
    _outputs: Sequence[tuple[IO[bytes], IO[bytes]]] = ()
    _scratch: Path | None = None
    _failed_subtests = 0

    def setup(self) -> None:
        """Make what is made once, start the workers, and run the fixtures there."""
        options = self._options()
        examples.leave_to_workers(self)
        self._stack, self._outputs = ExitStack(), ()
        fixtures = make_and_pickle(self)
        cluster = self._enter_cluster(options.hosts)
        if self.config.getoption("capture") != "no":
            self._outputs = [
                (self._stack.enter_context(_file()), self._stack.enter_context(_file()))
                for _ in range(options.world_size)
            ]
        self._group = start_group(
            self._stack,
            options,
            cluster,
            [(out.fileno(), err.fileno()) for out, err in self._outputs] or [(1, 2)] * options.world_size,
            pytest_preload(self),
        )
        factory: Any = self.config._tmp_path_factory  # type: ignore[attr-defined]
        scratches = factory.getbasetemp() / "workers"
        scratches.mkdir(exist_ok=True)
        self._scratch, self._failed_subtests = Path(tempfile.mkdtemp(dir=scratches)), 0
        argument = {
            "nodeid": self.nodeid,
            "fixtures": fixtures,
            "scratch": str(self._scratch),
            "cluster": pickle.dumps(cluster),
        }
        self._command("setup", argument)

    def runtest(self) -> None:
        """Run the test's body in all workers."""
        self._command("call", None)
        assert self._group is not None
        if self._group.check_collectives and not self._group.crew.spent:
            histories = self._group.crew.histories()
            differ = narrative.difference(histories)
            if differ:
                raise CollectivesDiffer(f"all {self._group.world_size} ranks passed, but:\n{differ}", 0)

    def teardown(self) -> None:
        """Tear the fixtures down in all workers, if they still can, and end them."""
        try:
            if self._group is not None and not self._group.crew.spent:
                self._command("teardown", None)
        finally:
            self._group = None
            if self._stack is not None:
                self._stack.close()
                self._stack = None
            super().teardown()

    def _repr_failure_py(self, excinfo: ExceptionInfo[BaseException], style: Any = None) -> TerminalRepr:
        """Every failing rank's own report, and what the others were doing."""
        if isinstance(excinfo.value, RanksFailed):
            return excinfo.value.representation
        if isinstance(excinfo.value, (CollectivesDiffer, HarnessError)):
            return text_only(str(excinfo.value), self.location)
        return super()._repr_failure_py(excinfo, style)

    def _command(self, phase: str, argument: Any) -> None:
        __tracebackhide__ = True
        assert self._group is not None
        size = self._group.world_size
        starts = [(_size(out), _size(err)) for out, err in self._outputs]
        try:
            replies, reason = self._group.crew.command(
                phase, [argument] * size, self._group.timeout_s, patient=bool(self._group.faults)
            )
        finally:
            self._add_outputs(phase, starts)
            self._log_subtests()
        replies = [reply for reply in replies if not self._group.was_meant(reply)]
        if phase == "setup" and any(reply.kind == "error" for reply in replies):
            self._group.crew.spent = True  # it has not come to the fixtures: there is nothing to tear down
        self._pass_on(phase, replies)
        failed = [reply for reply in replies if reply.failed and not _is_strict_xpass(reply)]
        if failed:
            raise RanksFailed(self._merge(replies, failed, reason))
        skipped = [reply for reply in replies if reply.content["outcome"] == "skipped"]
        if skipped:
            _skip(skipped, size)
        if self._failed_subtests and phase == "call":
            text = f"contains {self._failed_subtests} failed subtest{'s' if self._failed_subtests > 1 else ''}"
            raise RanksFailed(text_only(text, self.location))

    def _log_subtests(self) -> None:
        """Have pytest show what subtests reported in the workers, each with its rank."""
        assert self._group is not None
        assert self._scratch is not None
        size = self._group.world_size
        for rank in range(size):
            for report in subtests.take(self.config, self._scratch, rank):
                report.nodeid = self.nodeid
                if isinstance(report.longrepr, ExceptionChainRepr):
                    report.longrepr.chain = of_rank(report.longrepr.chain, rank, size)
                self._failed_subtests += report.failed
                subtests.log(self, report)

    def _merge(self, replies: Sequence[Reply], failed: Sequence[Reply], reason: str | None) -> ExceptionChainRepr:
        assert self._group is not None
        histories = self._group.crew.histories()
        return merged(self.config, replies, failed, histories, self._group.world_size, reason, self.location)

    def _pass_on(self, phase: str, replies: Sequence[Reply]) -> None:
        """Warnings, logs and properties of the workers, to where pytest looks for those of this test."""
        assert self._group is not None
        seen = set()
        for reply in replies:
            if reply.kind != "report":
                continue
            if reply.content["outcome"] == "exit":
                pytest.exit(f"rank {reply.rank}: {reply.content['message']}")
            if reply.content["outcome"] == "unusable":
                self._group.crew.spent = True
                raise HarnessError(reply.content["message"])
            for name, content in reply.content["report"].get("sections", ()):
                if name == f"Captured log {phase}":
                    self.add_report_section(phase, f"log of rank {reply.rank}", content)
            for recorded in reply.content["warnings"]:
                seen.add(tuple(recorded))
            if reply.rank == 0:
                self.user_properties = [tuple(pair) for pair in reply.content["report"].get("user_properties", ())]
        if phase == "teardown":
            for text, category, path, line in sorted(seen):
                warnings.warn_explicit(text, _warning_class(category), path, line)

    def _add_outputs(self, phase: str, starts: Sequence[tuple[int, int]]) -> None:
        for rank, (files, before) in enumerate(zip(self._outputs, starts, strict=True)):
            for key, file, start in zip(("stdout", "stderr"), files, before, strict=True):
                text = os.pread(file.fileno(), _size(file) - start, start).decode(errors="replace")
                if text:
                    self.add_report_section(phase, f"{key} of rank {rank}", text)

    def _options(self) -> Options:
        mark = self.get_closest_marker("distributed")
        assert mark is not None
        problem = ""
        try:
            return of_marker(mark.args, mark.kwargs, self.callspec.params if hasattr(self, "callspec") else {})
        except (TypeError, ValueError) as error:
            problem = str(error)
        pytest.fail(problem, pytrace=False)

    def _enter_cluster(self, hosts: Any) -> Any:
        if hosts is None:
            return None
        from disttrain.testing.hosts import cluster, why_not

        reason = why_not()
        if reason is not None:
            pytest.skip(reason)
        assert self._stack is not None
        return self._stack.enter_context(cluster(hosts))


def _file() -> IO[bytes]:
    return tempfile.TemporaryFile(buffering=0)


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _is_strict_xpass(reply: Reply) -> bool:
    """The session at home evaluates the mark too, and reports it itself."""
    longrepr = reply.content["report"].get("longrepr") if reply.kind == "report" else None
    return isinstance(longrepr, str) and longrepr.startswith("[XPASS(strict)]")


def _skip(skipped: Sequence[Reply], world_size: int) -> None:
    report = skipped[0].content["report"]
    who = "" if len(skipped) == world_size else f"rank {skipped[0].rank}: "
    if "wasxfail" in report:
        pytest.xfail(who + report["wasxfail"].removeprefix("reason: "))
    reason = str(report["longrepr"][2]).removeprefix("Skipped: ")
    raise pytest.skip.Exception(who + reason, _use_item_location=True)


def _warning_class(name: str) -> type[Warning]:
    module, _, qualified = name.partition(":")
    try:
        found = attrgetter(qualified)(import_module(module))
    except (ImportError, AttributeError):
        return UserWarning
    return found if isinstance(found, type) and issubclass(found, Warning) else UserWarning

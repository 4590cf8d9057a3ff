"""The harness next to other plugins and strict settings: what they expect of pytest is so in the workers, too.

With the real plugins it is tried in an environment that has them: see tests/test_wheel.py.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from disttrain.testing import run_workers
from tests.disttrain.testing.test_plugin import run

pytest_plugins = ["pytester"]


def test_warnings_that_are_errors_are_those_of_the_tests(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nfilterwarnings = error\naddopts = --strict-markers --strict-config\n")
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_silent(rank):
    dist.barrier()

@pytest.mark.distributed
def test_warns():
    warnings.warn("mind the gap")
""",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*UserWarning: mind the gap"])


def test_a_warning_of_a_nested_class_keeps_its_class(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
class Outer:
    class Gap(DeprecationWarning):
        pass

class TestOuter:
    class TestInner:
        @pytest.mark.distributed
        @pytest.mark.parametrize("number", [1, 2])
        def test_warns(self, rank, number):
            warnings.warn("mind it", Outer.Gap)
""",
    )
    result.assert_outcomes(passed=2, warnings=2)
    result.stdout.fnmatch_lines(["*: Gap: mind it"])


def test_plugins_find_what_they_gave_xdist_for_its_workers(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
def pytest_addoption(parser):
    parser.addoption("--own-seed", default=7)

def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.given = config.workerinput["given"], config.workerinput["own_seed"]
    else:
        for plugin in (NeedsMore(), Gives(), NeedsMore()):
            config.pluginmanager.register(plugin)

class Gives:
    def pytest_configure_node(self, node):
        node.workerinput["given"] = f"to {node.gateway.id}"

class NeedsMore:
    def pytest_configure_node(self, node):
        node.channel.send("there is none")
"""
    )
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_given(pytestconfig):
    assert pytestconfig.given == ("to master", 7)
""",
    )
    result.assert_outcomes(passed=1)


def test_what_is_wrapped_around_a_test_is_so_in_the_workers(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.phases = []
    result = yield
    if hasattr(item.config, "workerinput"):
        (item.config.rootpath / item.name).write_text(" ".join(item.phases))
    return result

def pytest_runtest_makereport(item, call):
    item.phases.append(call.when)
"""
    )
    result = run(
        pytester,
        """
@pytest.mark.distributed(world_size=1)
def test_passes(request):
    assert request.node.phases == ["setup"]

@pytest.mark.distributed(world_size=1)
def test_is_explained(rank):
    assert [1, 2, 3] == [1, 2, rank]
""",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*At index 2 diff: 3 != 0"])
    assert [(pytester.path / name).read_text() for name in ("test_passes", "test_is_explained")] == [
        "setup call teardown"
    ] * 2


def test_a_fixture_that_overrides_one_of_its_name_gets_the_value_that_was_made_once(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
import os, pytest

@pytest.fixture(scope="session")
def inner():
    return os.getpid()

@pytest.fixture(scope="session")
def made(inner):
    return [inner]
"""
    )
    result = run(
        pytester,
        f"""
HOME = {os.getpid()}

@pytest.fixture
def made(made, rank):
    return [*made, rank]

@pytest.fixture
def tmp_path(tmp_path):
    (tmp_path / "below").mkdir(exist_ok=True)
    return tmp_path / "below"

class TestInAClass:
    @pytest.fixture
    def made(self, through):
        return [*through, "class"]

    @pytest.fixture
    def through(self, made):
        return made

    @pytest.mark.distributed
    def test_method(self, made, rank):
        assert made == [HOME, rank, "class"]

@pytest.mark.distributed
def test_function(made, tmp_path, rank):
    assert made == [HOME, rank]
    (tmp_path / str(rank)).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 2
""",
    )
    result.assert_outcomes(passed=2)


def test_coverage_of_what_workers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coverage = pytest.importorskip("coverage")
    source = tmp_path / "measured_there.py"
    source.write_text(
        "def run(rank):\n    if rank == 0:\n        return 'first'\n    return 'other'\n\n\n"  # lines 1 to 6
        "def never():\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import measured_there  # type: ignore[import-not-found]

    measuring = coverage.Coverage(data_file=None, source=[str(tmp_path)])
    with measuring.collect():
        assert run_workers(lambda: measured_there.run(int(os.environ["RANK"])), 2) == ["first", "other"]
    assert set(measuring.get_data().lines(str(source))) == {1, 2, 3, 4, 7}
    with measuring.collect():  # what is not measured at home is not there either
        pass
    run_workers(measured_there.never, 1)
    assert 8 not in measuring.get_data().lines(str(source))


def test_what_a_session_in_this_process_leaves_may_import_when_it_is_freed() -> None:
    from _pytest.pytester import SysModulesSnapshot

    class Late:
        def __del__(self) -> None:
            import tokenize  # noqa: F401

    snapshot = SysModulesSnapshot()
    sys.modules["late"] = ModuleType("late")
    sys.modules["late"].made = Late()  # type: ignore[attr-defined]
    snapshot.restore()
    assert "late" not in sys.modules
    with pytest.raises(io.UnsupportedOperation):
        io.BytesIO().fileno()

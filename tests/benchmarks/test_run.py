"""The page that `make bench` writes, with programs that measure nothing."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OLD = "Old\n\n## Fails\n\nmeasured before\n\n## Meets\n\nmeasured before\n\n## Removed\n\nno longer measured\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    run = importlib.import_module("run")
    programs = {
        "fails": "print('half'); raise RuntimeError",
        "meets": "print('1.00')",
        "misses": "import bounds; print('1.03'); bounds.end(False)",
        "other": "print('not measured: needs root')",
        "images": "print('never')",
    }
    for name, code in programs.items():
        (tmp_path / f"{name}.py").write_text(f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); {code}\n")
    monkeypatch.setattr(run, "HERE", tmp_path)
    comparisons = {name: run.Comparison(name.title(), (f"{name}.py",), ("--short",)) for name in programs}
    comparisons["images"] = run.Comparison("Images", ("images.py",), needs_cifar10=True)
    monkeypatch.setattr(run, "COMPARISONS", comparisons)
    return run


def test_a_comparison_that_fails_keeps_its_section_and_the_next_one_runs(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(OLD)
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--into", str(page)])
    with pytest.raises(SystemExit) as ended:
        run.main()
    sections = run.sections_of(page)
    assert list(sections) == ["Fails", "Meets", "Misses"]
    assert sections["Fails"] == "Fails\n\nmeasured before\n"
    assert "```\n1.00\n```" in sections["Meets"]
    assert "bound" not in sections["Meets"]
    assert "1.03" in sections["Misses"]
    assert "A bound was missed." in sections["Misses"]
    assert "`python benchmarks/misses.py --short`" in sections["Misses"]
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "fails: failed (exit code 1)",
        "misses: missed a bound",
        "other: cannot be measured here",
        "images: left out, since --root was not given",
    ]
    assert ended.value.code


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_section_names_the_commit_and_whether_the_source_differs(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.commit() == ""
    root = tmp_path / "checkout"
    (root / "benchmarks").mkdir(parents=True)
    monkeypatch.setattr(run, "HERE", root / "benchmarks")
    git = ["git", "-C", str(root), "-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (root / "page.md").touch()
    assert run.commit().startswith(", commit ")
    assert not run.commit().endswith(" with changes")
    (root / "benchmarks" / "new.py").touch()
    assert run.commit().endswith(" with changes")


@pytest.mark.parametrize(("waits", "wrong"), [(True, ""), (False, "failed (not done after 60 min)")])
def test_only_a_program_that_runs_at_its_limit_is_late(
    run: Any, monkeypatch: pytest.MonkeyPatch, waits: bool, wrong: str
) -> None:
    """At the limit it either has ended, with its output still to be read, or has just started."""

    class Timer(threading.Timer):
        def start(self) -> None:
            if waits:
                os.waitid(os.P_PID, self.args[0].pid, os.WEXITED | os.WNOWAIT)
            self.function(*self.args)

    monkeypatch.setattr(threading, "Timer", Timer)
    assert run.section("meets", None)[1] == wrong


def test_ended_it_ends_what_it_runs(tmp_path: Path) -> None:
    waits = tmp_path / "waits.py"
    waits.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    code = f"import run; run.end_with_this_process(); run.printed_by([{sys.executable!r}, {str(waits)!r}], 600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True) as outer:
        assert outer.stdout is not None
        inner = int(outer.stdout.readline())
        outer.send_signal(signal.SIGTERM)
        assert outer.wait(timeout=120) == 143
    assert not Path(f"/proc/{inner}").exists()

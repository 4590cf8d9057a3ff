"""What a person sees of a run under way: on terminals of any width, and where there is none."""

from __future__ import annotations

import errno
import io
import sys
import threading

import pytest

from disttrain.terminal.bar import line
from disttrain.terminal.console import Console

WORDS = ("loss 0.1234", "1,152 images/s", "0:12:34 left")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("width", "shown"), [(20, 0), (30, 0), (40, 1), (60, 2), (80, 3), (200, 3)], ids=lambda value: str(value)
)
def test_on_a_narrow_terminal_words_go_before_the_bar_does(width: int, shown: int) -> None:
    text = line("epoch 3/15", 60, 345, WORDS, width=width).plain
    assert text.count("━") == min(40, width - len(text.replace("━", "")))
    assert text.count("━") >= 10
    assert [word in text for word in WORDS] == [number < shown for number in range(3)]
    assert "60/345" in text


def test_where_there_is_room_for_nothing_it_still_fits() -> None:
    text = line("epoch 3/15", 60, 345, WORDS, width=6, ascii_only=True)
    assert text.plain == "- 60/345"
    assert text.no_wrap


@pytest.mark.parametrize("columns", [40, 100])
def test_the_bar_begins_without_a_loss_and_ends_full(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with Console(speaks=True) as console:
        console.start_progress(0, 345)
        console.progress(1, 1, 15)
        first = terminal.getvalue()
        console.measured(0.5, "1,152 images/s")
        console.line("epoch 1/15: accuracy 27.50%")
        console.progress(345, 15, 15)
    assert "nan" not in terminal.getvalue()
    assert "loss" not in first
    last = [text for text in terminal.getvalue().splitlines() if "345/345" in text][-1]
    assert "epoch 15/15" in last
    assert last.count("━") == (20 if columns == 40 else 40)
    assert ("loss 0.5000" in last) == (columns > 40)
    assert "epoch 1/15: accuracy 27.50%" in terminal.getvalue()


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the standard streams are a user's own, as in a program that calls `disttrain.training.loop`."""

    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setenv("TERM", "xterm")
    with Console(speaks=True) as console:
        console.line("before the bar")
        console.start_progress(0, 345)
        console.progress(1, 1, 15)
        console.line("beside the bar")
        console.warn("beside the bar, too")
        console.end_progress()
        console.warn("after it")


def test_without_a_terminal_a_line_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(speaks=True, every_s=0) as console:
        console.progress(1, 1, 15)  # nothing is under way
        console.start_progress(0, 345)
        console.progress(1, 1, 15)
        console.measured(0.5, "1,152 images/s")
        console.progress(2, 1, 15)
        console.busy("step 2 of 345: evaluating")
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/15: step 1 of 345",
        "epoch 1/15: step 2 of 345, loss 0.5000, 1,152 images/s",
        "step 2 of 345: evaluating",
    ]


def test_without_a_terminal_it_speaks_seldom_and_from_rank_0_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for console in (Console(speaks=True), Console(speaks=False, every_s=0)):
        console.start_progress(0, 345)
        for step in range(1, 100):
            console.progress(step, 1, 15)
            console.busy("evaluating")
    assert capsys.readouterr().out == ""


def test_what_takes_long_is_named_and_what_does_not_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    console, said = Console(speaks=True), threading.Event()
    with console.saying_if_slow("reading the news", after_s=600):
        pass
    assert capsys.readouterr().out == ""
    console.line = lambda text="": said.set()  # type: ignore[method-assign]
    with console.saying_if_slow("reading the news", after_s=0):
        assert said.wait(240)

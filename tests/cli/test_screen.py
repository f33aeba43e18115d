"""Watching: figures are drawn in place on a terminal, appended elsewhere, and replaced by an error in an outage."""

from __future__ import annotations

import io
import json
import os
import time
from contextlib import redirect_stdout
from typing import Any

import pytest

from ktrdr_budget.cli.errors import Unreachable
from ktrdr_budget.cli.screen import Screen, draw_unknown, show

Capture = pytest.CaptureFixture[str]
FIGURES = ({"remaining": "4.85"}, "Remaining: $4.85")
OUTAGE = Unreachable("no reply")


class TerminalStream(io.StringIO):
    """A terminal's standard output."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def take(self) -> str:
        """Return the text since the last call."""
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> TerminalStream:
    """A terminal of 20 columns and 4 rows."""
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((20, 4)))
    monkeypatch.setenv("TERM", "xterm-256color")
    return TerminalStream()


def asked(*replies: Any) -> Any:
    """The given replies of the service, then Ctrl-C."""
    waiting = iter(replies)

    def ask() -> Any:
        reply = next(waiting, KeyboardInterrupt())
        if isinstance(reply, BaseException):
            raise reply
        return reply

    return ask


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces sleep; returns the list of the intervals that a watch would have slept."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def test_the_result_is_shown_once_if_no_interval_is_given(capsys: Capture) -> None:
    show(asked(FIGURES), as_json=False)
    assert capsys.readouterr().out == "Remaining: $4.85\n"
    show(asked(FIGURES), as_json=True)
    assert json.loads(capsys.readouterr().out) == FIGURES[0]


def test_a_watch_appends_each_result_if_the_output_is_not_a_terminal(capsys: Capture, no_waiting: list[float]) -> None:
    show(asked(FIGURES, FIGURES), as_json=False, interval_s=2.0)
    assert capsys.readouterr().out == "Remaining: $4.85\n\nRemaining: $4.85\n"
    assert no_waiting == [2.0, 2.0]


def test_a_watch_in_json_prints_one_line_for_each_result(capsys: Capture, no_waiting: list[float]) -> None:
    show(asked(FIGURES, FIGURES), as_json=True, interval_s=2.0)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [FIGURES[0]] * 2


def test_a_watch_fails_if_the_service_has_never_replied(no_waiting: list[float]) -> None:
    with pytest.raises(Unreachable):
        show(asked(OUTAGE), as_json=False, interval_s=2.0)


def test_an_outage_after_the_first_reply_is_reported_and_the_watch_continues(
    capsys: Capture, no_waiting: list[float]
) -> None:
    show(asked(FIGURES, OUTAGE, FIGURES), as_json=False, interval_s=2.0)
    output = capsys.readouterr()
    assert output.out.count("Remaining") == 2
    assert output.err == "ktrdr: no reply\n"


def test_a_new_text_replaces_the_previous_text_on_a_terminal(display: TerminalStream) -> None:
    with redirect_stdout(display):
        made = Screen()
        made.draw("one\ntwo", "note")
        assert display.take() == "one\x1b[K\ntwo\x1b[K\nnote\x1b[K\x1b[J\n"
        made.draw("three")
        assert display.take() == "\x1b[3A\rthree\x1b[K\x1b[J\n", "back to the first of three lines"


@pytest.mark.parametrize("text", ["1\n2\n3\n4", "x" * 21])
def test_the_screen_is_cleared_if_the_previous_text_did_not_fit_on_the_screen(
    display: TerminalStream, text: str
) -> None:
    with redirect_stdout(display):
        made = Screen()
        made.draw(text)
        display.take()
        made.draw("next")
        assert display.take() == "\x1b[2J\x1b[Hnext\x1b[K\x1b[J\n"


def test_an_outage_replaces_the_figures_on_a_terminal(display: TerminalStream, capsys: Capture) -> None:
    with redirect_stdout(display):
        draw_unknown(Screen(), OUTAGE, "12:00:00", as_json=False)
        assert display.take().startswith("Unknown since 12:00:00: no reply")
        draw_unknown(Screen(), OUTAGE, "12:00:00", as_json=True)
    assert (display.take(), capsys.readouterr().err) == ("", "ktrdr: no reply\n"), "the output stays JSON"

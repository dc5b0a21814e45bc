"""`TerminalProgress`: what it shows, and what is left of it."""

from __future__ import annotations

import inspect
import itertools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from llmengine.terminal_progress import TerminalProgress
from tests.terminal import on_terminal


def test_steps_are_counted_and_nothing_is_left() -> None:
    with on_terminal() as terminal, TerminalProgress("working", 2) as progress:
        progress.advance()
        assert not terminal.shows_cursor
    assert "working" in terminal.getvalue()
    assert "1/2" in terminal.getvalue()
    assert terminal.shows_cursor


def test_nothing_is_shown_if_not_enabled() -> None:
    with on_terminal() as terminal, TerminalProgress("working", 2, enabled=False) as progress:
        progress.advance()
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("part", ["start", "stop"])
def test_the_cursor_comes_back_wherever_ctrl_c_comes(part: str) -> None:
    """Interrupted at the beginning of each of the first calls of functions of `rich`, and of some of the later ones."""
    calls, num_interrupted = 0, 0

    def interrupt(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        code = frame.f_code
        if event == "call" and "rich" in Path(code.co_filename).parts and not code.co_flags & inspect.CO_GENERATOR:
            calls -= 1
            if calls < 0:
                raise KeyboardInterrupt

    with on_terminal() as terminal:
        for count in itertools.chain(range(40), range(40, 10_000, 97)):
            progress = TerminalProgress("working", 2)
            if part == "stop":
                progress.__enter__()
            calls = count
            sys.setprofile(interrupt)
            try:
                progress.__enter__() if part == "start" else progress.__exit__(None, None, None)
                break
            except KeyboardInterrupt:
                num_interrupted += 1
            finally:
                sys.setprofile(None)
            assert terminal.shows_cursor, count
            progress.__exit__(None, None, None)
    assert num_interrupted > 40

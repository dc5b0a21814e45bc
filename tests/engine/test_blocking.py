"""Waits of the main thread: Ctrl-C ends each of them, whichever thread the kernel gives the signal to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from llmengine import LLM, SchedulerConfig
from llmengine.engine.blocking import LONGEST_WAIT_S, result_of, wait_in_pieces
from llmengine.testing import FakeBackend
from tests.engine.helpers import (
    WAIT_S,
    StepGate,
    assert_idle,
    heeding_ctrl_c,
    interrupt_main_in,
    make_llm,
    start,
    tokens,
)


@contextmanager
def interrupted_in(function: str, afterwards: Callable[[], None] | None = None) -> Iterator[None]:
    """The body is ended by a Ctrl-C that another thread gets once the main thread is in `function`.

    `afterwards` is called later, when the Ctrl-C should have ended the wait.
    """
    with heeding_ctrl_c():
        sent = start(lambda: interrupt_main_in(function, on_main=False))
        if afterwards is not None:
            sent.add_done_callback(lambda _: later(afterwards))
        with pytest.raises(KeyboardInterrupt):
            yield
        sent.result(WAIT_S)


def later(function: Callable[[], None]) -> None:
    """Call a function when a wait has had more than one piece."""
    threading.Timer(2 * LONGEST_WAIT_S, function).start()


def test_loading() -> None:
    loaded = threading.Event()

    def load() -> FakeBackend:
        assert loaded.wait(WAIT_S)
        return FakeBackend()

    before = threading.active_count()
    with interrupted_in("result_of", loaded.set):
        LLM.from_backend(load)
    until = time.monotonic() + WAIT_S
    while threading.active_count() > before:
        assert time.monotonic() < until, "the engine goes on"
        time.sleep(0.001)


def test_one_result_and_one_stream() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        for read in (lambda handle: handle.result(), lambda handle: list(handle.stream())):
            handle = llm.generate_async([1], tokens(3), streaming=True)
            with interrupted_in("wait_in_pieces"):
                read(handle)
            handle.abort()
            del handle
        gate.open()
        assert_idle(llm)


def test_a_wait_for_room_in_the_queue() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=SchedulerConfig(max_queued_requests=1)) as llm:
        first = llm.generate_async([1], tokens(3))
        with interrupted_in("acquire_blocking"):
            llm.generate([[1], [2], [3]], tokens(3))
        gate.open()
        assert len(first.result(WAIT_S).token_ids) == 3
        assert_idle(llm)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, 0.01, 2.5 * LONGEST_WAIT_S])
def test_a_wait_ends_in_time(timeout_s: float) -> None:
    began = time.monotonic()
    assert not wait_in_pieces(threading.Event().wait, timeout_s)
    assert time.monotonic() - began >= timeout_s
    done = threading.Event()
    done.set()
    assert wait_in_pieces(done.wait, timeout_s)


@pytest.mark.parametrize("error", [ValueError("wrong"), TimeoutError("its own")])
def test_a_future_gives_its_error(error: Exception) -> None:
    future: Future[Any] = Future()
    later(lambda: future.set_exception(error))
    with pytest.raises(type(error), match=str(error)):
        result_of(future)

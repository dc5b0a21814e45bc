"""A backend that can prepare itself does so while the engine is idle, and never beside a step."""

from __future__ import annotations

import queue
import threading
from functools import partial
from typing import Any

import pytest

from llmengine.batch import Batch, StepResult
from llmengine.errors import EngineDeadError
from llmengine.testing import FakeBackend
from tests.engine.helpers import WAIT_S, assert_idle, bounded, make_llm, oracle, tokens


class Preparing(FakeBackend):
    """A backend with `num_pieces` to prepare; `calls` records when it was asked and whether a piece was left.

    If `failure` is given, the first piece raises it once the gate is open.
    """

    def __init__(
        self,
        *,
        num_pieces: int,
        calls: queue.Queue[bool],
        gate: threading.Event,
        failure: Exception | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._num_pieces = num_pieces
        self._failure = failure
        self._calls = calls
        self._gate = gate
        self._num_in_flight = 0

    def launch(self, batch: Batch) -> None:
        super().launch(batch)
        self._num_in_flight += 1

    def collect(self) -> StepResult:
        self._num_in_flight -= 1
        return super().collect()

    def prepare(self) -> bool:
        has_piece = self._num_pieces > 0
        self._num_pieces -= has_piece
        assert self._num_in_flight == 0
        self._calls.put(has_piece)
        assert self._gate.wait(WAIT_S)
        if self._failure is not None:
            raise self._failure
        return has_piece


@pytest.fixture
def calls() -> queue.Queue[bool]:
    return queue.Queue()


@pytest.fixture
def gate() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def asked(calls: queue.Queue[bool], num_calls: int) -> list[bool]:
    return [calls.get(timeout=WAIT_S) for _ in range(num_calls)]


def test_quiet_engine_prepares_until_nothing_is_left(calls: queue.Queue[bool], gate: threading.Event) -> None:
    with make_llm(backend=Preparing, num_pieces=2, calls=calls, gate=gate, max_steps_in_flight=2) as llm:
        assert asked(calls, 3) == [True, True, False]
        # New kinds of steps may have been seen: it is asked once more, and not in between.
        assert llm.generate([[1, 2]], tokens(20))[0].token_ids == oracle([1, 2], 20)
        assert asked(calls, 1) == [False]
        assert_idle(llm)
    assert calls.qsize() <= 1  # after that request, if closing took long


def test_request_is_served_after_the_piece_at_hand(calls: queue.Queue[bool], gate: threading.Event) -> None:
    gate.clear()
    with make_llm(backend=Preparing, num_pieces=3, calls=calls, gate=gate) as llm:
        assert asked(calls, 1) == [True]
        handle = llm.generate_async([3], tokens(5))
        gate.set()
        assert bounded(partial(handle.result, WAIT_S)).token_ids == oracle([3], 5)
        assert asked(calls, 3) == [True, True, False]


def test_closing_does_not_wait_for_all_pieces(calls: queue.Queue[bool], gate: threading.Event) -> None:
    llm = make_llm(backend=Preparing, num_pieces=10**9, calls=calls, gate=gate)
    assert asked(calls, 2) == [True, True]
    bounded(llm.close)


def test_fault_while_preparing_ends_the_engine(calls: queue.Queue[bool], gate: threading.Event) -> None:
    gate.clear()
    failure = MemoryError("out of device memory")
    llm = make_llm(backend=Preparing, num_pieces=1, calls=calls, gate=gate, failure=failure)
    assert asked(calls, 1) == [True]
    handle = llm.generate_async([3], tokens(5))
    gate.set()
    with pytest.raises(EngineDeadError) as caught:
        bounded(partial(handle.result, WAIT_S))
    assert caught.value.__cause__ is failure
    llm.close()

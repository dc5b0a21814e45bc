"""Observers: what they are told, when, and that they can harm nobody."""

from __future__ import annotations

import contextvars
import gc
import logging
import weakref
from collections import Counter
from typing import Any

import pytest

from llmengine import LLM, EngineDeadError, EngineObserver, RequestEnd, SamplingParams, StepRecord, SubmittedRequest
from llmengine.batch import Batch
from llmengine.config import SchedulerConfig
from llmengine.engine.observers import Observers
from llmengine.engine.step_plan import LaunchedStep
from tests.engine.helpers import WAIT_S, StepGate, make_llm, tokens


class Recorder(EngineObserver):
    """Keeps everything that it is told, in order."""

    def __init__(self) -> None:
        self.submitted: list[SubmittedRequest] = []
        self.ends: list[RequestEnd] = []
        self.steps: list[StepRecord] = []
        self.ended: list[BaseException | None] = []
        self.num_closed = 0
        self.last_token_at: list[float] = []

    def request_submitted(self, request: SubmittedRequest) -> object:
        self.submitted.append(request)
        return f"note {request.number}"

    def request_ended(self, end: RequestEnd) -> None:
        self.ends.append(end)
        if self.steps:
            self.last_token_at.append(self.steps[-1].ended)

    def step_ended(self, step: StepRecord) -> None:
        self.steps.append(step)

    def engine_ended(self, failure: BaseException | None) -> None:
        self.ended.append(failure)

    def engine_closed(self) -> None:
        self.num_closed += 1

    @property
    def num_gaps(self) -> int:
        return sum(count for step in self.steps for _, count in step.token_gaps)

    @property
    def total_gap_s(self) -> float:
        return sum(gap * count for step in self.steps for gap, count in step.token_gaps)

    @property
    def total_generation_s(self) -> float:
        """Seconds from first to last token, summed over all requests; each must have run to its length."""
        return sum(self.last_token_at) - sum(step.ended * len(step.first_tokens) for step in self.steps)


def observed(**options: Any) -> tuple[LLM, Recorder]:
    llm, recorder = make_llm(**options), Recorder()
    llm.add_observer(recorder)
    return llm, recorder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 17, "max_model_len": 64},
        {"max_steps_in_flight": 3},
        {"num_blocks": 17, "max_model_len": 64, "max_steps_in_flight": 2},
        {"scheduler": SchedulerConfig(max_batch_size=3, max_tokens_per_step=16)},
    ],
    ids=["plain", "preempted", "in-flight", "preempted-in-flight", "narrow"],
)
def test_gaps_and_first_tokens_account_for_every_token(options: dict[str, Any]) -> None:
    """However requests come, go and are preempted, their gaps add up to the time from first to last token."""
    llm, recorder = observed(**options)
    lengths = [1 + 7 * index % 23 for index in range(16)]
    with llm:
        outputs = llm.generate([[index] * (1 + index % 9) for index in range(16)], [tokens(count) for count in lengths])
        num_preemptions = llm.stats().counters.num_preemptions
    assert (num_preemptions > 0) == ("num_blocks" in options)
    firsts = [first for step in recorder.steps for first in step.first_tokens]
    assert len(firsts) == len(outputs)
    assert {first.queued for first in firsts} == {output.timeline.queued for output in outputs}
    assert recorder.num_gaps == sum(lengths) - len(lengths)
    assert recorder.total_gap_s == pytest.approx(recorder.total_generation_s)


def test_gap_of_a_paused_request_spans_its_pause() -> None:
    gate = StepGate()
    llm, recorder = observed(on_step=gate, scheduler=SchedulerConfig(max_unread_tokens=2))
    with llm:
        other = llm.generate_async([9], tokens(6))
        paused = llm.generate_async([1], tokens(4), streaming=True, slow_consumer="pause")
        for _ in range(4):
            gate.wait()
            gate.let_go()
        gate.wait()
        assert llm.stats().num_paused == 1
        reader = paused.stream()
        next(reader)
        gate.open()
        list(reader)
        assert other.result(WAIT_S).num_tokens == 6
    assert recorder.num_gaps == 5 + 3
    assert recorder.total_gap_s == pytest.approx(recorder.total_generation_s)


def test_steps_tell_their_sizes() -> None:
    llm, recorder = observed()
    with llm:
        llm.generate_async([1, 2, 3, 4, 5], tokens(3)).result(WAIT_S)
    assert [step.number for step in recorder.steps] == [1, 2, 3]
    assert [step.num_tokens for step in recorder.steps] == [5, 1, 1]
    assert [step.num_requests for step in recorder.steps] == [1, 1, 1]
    assert all(step.duration_s > 0 for step in recorder.steps)
    ends = [step.ended for step in recorder.steps]
    assert [step.duration_s for step in recorder.steps[1:]] == pytest.approx([ends[1] - ends[0], ends[2] - ends[1]])


def test_time_of_a_step_is_counted_from_the_previous_one_or_from_waking_up() -> None:
    observers, recorder = Observers(), Recorder()
    observers.add(recorder)
    step = LaunchedStep(Batch(1, ()), [], [], 0, 0, 0.0)

    def end_step(began: float, ended: float) -> None:
        observers.step_ended(step, [], began=began, ended=ended, forward_s=0.0)

    end_step(began=10.0, ended=11.0)
    end_step(began=11.5, ended=12.0)
    observers.sleeps(has_requests=True)
    end_step(began=20.0, ended=20.25)
    observers.sleeps(has_requests=False)
    end_step(began=30.0, ended=30.5)
    assert [step.duration_s for step in recorder.steps] == [1.0, 1.0, 0.25, 0.5]


def test_requests_are_told_from_submission_to_end() -> None:
    llm, recorder = observed()
    with llm:
        llm.generate("abc", tokens(2), request_id="mine", metadata={"a": 1})
        handle = llm.generate_async([1, 2], tokens(3, n=2, temperature=1.0))
        handle.result(WAIT_S)
    text = recorder.submitted[0]
    assert (text.options.request_id, text.options.metadata, text.is_chat, text.is_streaming) == (
        "mine",
        {"a": 1},
        False,
        False,
    )
    assert len({request.number for request in recorder.submitted}) == 2
    assert Counter(end.request.number for end in recorder.ends) == {
        request.number: request.params.num_outputs for request in recorder.submitted
    }
    for end in recorder.ends:
        assert end.note == f"note {end.request.number}"
        assert end.output.finish_reason in ("length", "abort")
        assert end.error is None
        assert end.ended == end.output.timeline.finished
    assert sorted(end.output.index for end in recorder.ends if end.request.params.n == 2) == [0, 1]


def test_a_chat_is_told_from_a_prompt() -> None:
    from llmengine.testing import ChatByteTokenizer

    llm, recorder = observed(tokenizer=ChatByteTokenizer())
    with llm:
        conversation = [{"role": "user", "content": "hi"}]
        llm.chat(conversation, tokens(2))
        llm.chat([conversation, conversation], tokens(2))
        llm.chat_async(conversation, tokens(2), streaming=True).result(WAIT_S)
        llm.generate("hi", tokens(2))
    assert [request.is_chat for request in recorder.submitted] == [True] * 4 + [False]
    assert [request.is_streaming for request in recorder.submitted] == [False] * 3 + [True, False]


def test_submission_runs_in_the_callers_context() -> None:
    variable = contextvars.ContextVar("variable", default="outside")

    seen: list[str] = []

    class Reader(EngineObserver):
        def request_submitted(self, request: SubmittedRequest) -> object:
            seen.append(variable.get())
            return None

    with make_llm() as llm:
        llm.add_observer(Reader())
        variable.set("inside")
        llm.generate(["text", "more"], tokens(1))
        llm.generate_async([1], tokens(1)).result(WAIT_S)
    assert seen == ["inside"] * 3


def test_observers_know_no_less_than_readers() -> None:
    """When a reader has the final output, the observer has been told of the end and of the step before it."""
    llm, recorder = observed()
    with llm:
        for count in range(1, 20):
            llm.generate_async([1], tokens(1)).result(WAIT_S)
            assert len(recorder.ends) == len(recorder.steps) == count


def test_every_submission_ends_when_the_engine_dies() -> None:
    gate = StepGate()

    def fail(batch: Any) -> None:
        gate(batch)
        raise OSError("the device is gone")

    llm, recorder = observed(on_step=fail)
    handles = [llm.generate_async([1, 2], tokens(4)), llm.generate_async("text", tokens(4))]
    gate.open()
    for handle in handles:
        with pytest.raises(EngineDeadError):
            handle.result(WAIT_S)
    llm.close()
    assert len(recorder.ends) == 2
    for end in recorder.ends:
        assert isinstance(end.error, EngineDeadError)
        assert end.output.finish_reason is None
        assert end.ended >= end.output.timeline.queued
    assert [str(failure) for failure in recorder.ended] == ["the device is gone"]
    assert recorder.num_closed == 1


def test_close_is_told_once() -> None:
    llm, recorder = observed()
    llm.close()
    llm.close()
    assert recorder.ended == [None]
    assert recorder.num_closed == 1


def test_observer_that_was_removed_is_told_nothing() -> None:
    gate = StepGate()
    llm, recorder = observed(on_step=gate)
    with llm:
        llm.add_observer(recorder)  # again, which changes nothing
        handle = llm.generate_async([1], tokens(3))
        gate.wait()
        llm.remove_observer(recorder)
        llm.remove_observer(recorder)
        gate.open()
        handle.result(WAIT_S)
    assert len(recorder.submitted) == 1
    assert not recorder.ends
    assert not recorder.steps
    assert not recorder.num_closed


@pytest.mark.parametrize(
    "method", ["request_submitted", "request_ended", "step_ended", "engine_ended", "engine_closed"]
)
def test_observer_that_raises_is_removed_and_harms_nobody(method: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(self: EngineObserver, *_: Any) -> None:
        raise ZeroDivisionError("a bug in an observer")

    broken = type("Broken", (EngineObserver,), {method: fail})()
    llm, recorder = observed()
    with caplog.at_level(logging.ERROR), llm:
        llm.add_observer(broken)
        later = Recorder()
        llm.add_observer(later)
        outputs = [llm.generate_async([1], tokens(3)).result(WAIT_S) for _ in range(2)]
    assert [output.finish_reason for output in outputs] == ["length", "length"]
    for healthy in (recorder, later):
        assert (len(healthy.ends), len(healthy.steps), healthy.num_closed) == (2, 6, 1)
    (record,) = caplog.records
    assert "was removed" in record.getMessage()
    assert record.exc_info is not None


def test_nothing_of_a_request_outlives_it_in_an_idle_engine() -> None:
    class Metadata:
        pass

    with make_llm() as llm:
        llm.add_observer(EngineObserver())
        metadata = Metadata()
        alive = weakref.ref(metadata)
        finished = llm.generate_async([1], tokens(3), metadata=metadata)
        finished.result(WAIT_S)
        aborted = llm.generate_async([1], SamplingParams(max_new_tokens=200, ignore_eos=True), metadata=metadata)
        aborted.abort()
        aborted.result(WAIT_S)
        del finished, aborted, metadata
        llm.generate_async([1], tokens(1)).result(WAIT_S)  # what came before is over on the engine thread
        gc.collect()
        assert alive() is None


def test_observer_that_comes_late_takes_no_later_token_for_a_first_one() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        handle = llm.generate_async([1], tokens(5))
        gate.wait()
        gate.step()  # the first token is out
        recorder = Recorder()
        llm.add_observer(recorder)
        gate.open()
        handle.result(WAIT_S)
    assert len(recorder.steps) == 4
    assert not any(step.first_tokens for step in recorder.steps)
    assert recorder.num_gaps == 3, "when the latest token before the first step came is not known"
    assert not recorder.ends, "the request was submitted before"

"""Reading without waiting: `RequestHandle.poll`, and `OutputCollector`, which reads many requests on one thread."""

from __future__ import annotations

import pytest

from llmengine.engine.collector import OutputCollector
from llmengine.errors import EngineDeadError, LLMEngineError, PromptTooLongError
from llmengine.outputs import GenerationOutput
from tests.engine.helpers import WAIT_S, StepGate, make_llm, oracle, tokens


def test_poll_gives_what_is_there_and_never_waits() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        handle = llm.generate_async([1, 2], tokens(3), streaming=True)
        gate.wait()
        assert handle.poll() is None
        gate.step()
        first = handle.poll()
        assert first is not None
        assert first.token_ids_delta == oracle([1, 2], 1)
        assert handle.poll() is None
        assert not handle.exhausted
        gate.open()
        assert handle.result(WAIT_S).num_tokens == 3
        last = handle.poll()
        assert last is not None
        assert last.token_ids_delta == oracle([1, 2], 3)[1:]
        assert last.finished
        assert handle.exhausted
        assert handle.poll() is None


def test_poll_raises_what_reading_raises() -> None:
    with make_llm() as llm:
        handle = llm.generate_async("x" * 999, tokens(3))
        with pytest.raises(PromptTooLongError):
            handle.result(WAIT_S)
        with pytest.raises(PromptTooLongError):
            handle.poll()
        assert handle.exhausted


def collect(collector: OutputCollector) -> dict[int, list[GenerationOutput | LLMEngineError]]:
    """Everything that requests put out until all have ended."""
    found: dict[int, list[GenerationOutput | LLMEngineError]] = {}
    while len(collector):
        assert collector.wait(WAIT_S)
        for key, output in collector.take():
            found.setdefault(key, []).append(output)
    return found


def test_one_thread_reads_requests_of_every_kind() -> None:
    with make_llm() as llm:
        collector = OutputCollector()
        for key in range(20):
            collector.add(key, llm.generate_async([key + 1], tokens(9), streaming=True))
        collector.add(20, llm.generate_async([3], tokens(5, n=2, temperature=1.0), streaming=True))
        collector.add(21, llm.generate_async("x" * 999, tokens(5), streaming=True))
        found = collect(collector)
    for key in range(20):
        outputs = [output for output in found[key] if isinstance(output, GenerationOutput)]
        assert [id_ for output in outputs for id_ in output.token_ids_delta] == oracle([key + 1], 9)
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {output.index for output in found[20] if isinstance(output, GenerationOutput) and output.finished} == {0, 1}
    assert isinstance(found[21][-1], PromptTooLongError)


def test_it_wakes_once_for_a_step_however_many_requests_there_are() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        collector = OutputCollector()
        for key in range(16):
            collector.add(key, llm.generate_async([key + 1], tokens(4), streaming=True))
        gate.open()
        num_takes = 0
        while len(collector):
            assert collector.wait(WAIT_S)
            num_takes += bool(list(collector.take()))
        assert num_takes <= len(gate.batches)


def test_held_requests_wait_and_the_end_of_the_engine_ends_all() -> None:
    gate = StepGate()
    llm = make_llm(on_step=gate)
    collector = OutputCollector()
    collector.add(0, llm.generate_async([1], tokens(200), streaming=True))
    collector.hold(0, True)
    gate.wait()
    gate.step()
    assert list(collector.take()) == []
    collector.hold(0, False)
    assert collector.wait(WAIT_S)
    assert [output.num_tokens for _, output in collector.take() if isinstance(output, GenerationOutput)] == [1]
    collector.hold(0, True)
    gate.open()
    llm.close()
    (final,) = [output for _, output in collector.take() if isinstance(output, GenerationOutput) and output.finished]
    assert final.finish_reason == "abort"
    assert len(collector) == 0


def test_errors_of_a_dead_engine_are_collected() -> None:
    def fail(batch: object) -> None:
        raise RuntimeError("broken")

    with make_llm(on_step=fail) as llm:
        collector = OutputCollector()
        collector.add(7, llm.generate_async([1], tokens(2), streaming=True))
        ((error,),) = collect(collector).values()
        assert isinstance(error, EngineDeadError)

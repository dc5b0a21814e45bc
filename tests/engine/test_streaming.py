"""How output reaches consumers: deltas, merging, wake-ups, and ways to wait."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable
from contextvars import Context
from typing import Any

import pytest

from llmengine.batch import Batch
from llmengine.errors import RequestFailedError
from llmengine.outputs import GenerationOutput
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.engine.helpers import (
    WAIT_S,
    Panic,
    StepGate,
    assert_concatenates,
    assert_idle,
    bounded,
    counting_model,
    in_loop,
    make_llm,
    oracle,
    start,
    timeout,
    tokens,
)

IN_FLIGHT = pytest.mark.parametrize("in_flight", [1, 2, 3])


class CountingLoop(asyncio.SelectorEventLoop):
    """A loop that counts how often another thread wakes it."""

    num_wake_ups = 0

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        self.num_wake_ups += 1
        return super().call_soon_threadsafe(callback, *args, context=context)


@IN_FLIGHT
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("num_others", [0, 9])
async def test_tokens_are_the_oracles_alone_and_in_a_crowd(in_flight: int, streaming: bool, num_others: int) -> None:
    prompt = list(b"The quick brown fox")
    with make_llm(max_steps_in_flight=in_flight) as llm:
        async with timeout():
            others = [llm.generate_async([*prompt[: 3 * index], index], tokens(20)) for index in range(num_others)]
            outputs = [output async for output in llm.generate_async(prompt, tokens(25), streaming=streaming)]
            ends = await asyncio.gather(*others)
        assert_concatenates(outputs)
        assert streaming or len(outputs) == 1
        assert outputs[-1].token_ids == oracle(prompt, 25)
        assert outputs[-1].text == ByteTokenizer().decode(oracle(prompt, 25))
        for index, end in enumerate(ends):
            assert end.token_ids == oracle([*prompt[: 3 * index], index], 20)


@IN_FLIGHT
async def test_crowd_under_pressure_is_the_oracles(in_flight: int) -> None:
    """The pool holds about two requests: there are preemptions, chunks and prefix hits; every fourth is aborted."""
    with make_llm(max_steps_in_flight=in_flight, num_blocks=17, max_model_len=48) as llm:
        async with timeout():
            prompts = [[7] * (index % 11) + [index] for index in range(24)]
            handles = [llm.generate_async(p, tokens(5 + i % 20), streaming=i % 2 == 0) for i, p in enumerate(prompts)]
            for handle in handles[::4]:
                handle.abort()
            outputs = [[output async for output in handle] for handle in handles]
        for index, stream in enumerate(outputs):
            assert_concatenates(stream)
            final = stream[-1]
            assert final.token_ids == oracle(prompts[index], final.num_tokens)
            if index % 4:
                assert (final.finish_reason, final.num_tokens) == ("length", 5 + index % 20)
        assert llm.stats().counters.num_preemptions > 0
        assert_idle(llm)


async def test_each_step_gives_one_output_to_a_fast_consumer() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, next_token=counting_model) as llm:
        handle = llm.generate_async("a", tokens(3), streaming=True)
        deltas = []
        async with timeout():
            for _ in range(3):
                gate.wait()
                task = asyncio.ensure_future(anext(handle))
                gate.let_go()
                output = await task
                deltas.append((output.text_delta, output.text, output.finished))
        assert deltas == [("b", "b", False), ("c", "bc", False), ("d", "bcd", True)]
        gate.open()


async def test_consumer_that_reads_late_gets_one_merged_output() -> None:
    with make_llm(next_token=counting_model) as llm:
        async with timeout():
            handle = llm.generate_async("a", tokens(50), streaming=True)
            await handle
            outputs = [output async for output in handle]
        assert len(outputs) == 1
        assert outputs[0].text_delta == outputs[0].text
        assert outputs[0].token_ids_delta == outputs[0].token_ids == oracle(b"a", 50, counting_model)


async def test_slow_consumer_gets_merged_deltas() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        async with timeout():
            handle = llm.generate_async([1], tokens(12), streaming=True)
            gate.wait()
            outputs = []
            for num_steps in (1, 4, 2):
                for _ in range(num_steps):
                    gate.step()  # the next step has begun, so this one's tokens are out
                outputs.append(await anext(handle))
            gate.open()
            outputs += [output async for output in handle]
        assert [len(output.token_ids_delta) for output in outputs[:3]] == [1, 4, 2]
        assert_concatenates(outputs)
        assert outputs[-1].token_ids == oracle([1], 12)


async def test_consumer_slower_than_the_engine_lets_its_loop_turn() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        async with timeout():
            handle = llm.generate_async([1], tokens(200), streaming=True)
            gate.wait()
            gate.step()
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)
            was_cancelled = False
            try:
                for _ in range(10):
                    await anext(handle)
                    gate.step()  # the next output is there before it is asked for
            except asyncio.CancelledError:
                was_cancelled = True
                task.uncancel()
            assert was_cancelled
            gate.open()
            assert (await handle).finish_reason == "abort"
        assert_idle(llm)


async def test_unread_stream_makes_no_object_for_each_token() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, next_token=lambda ids: 97, caching=False, block_size=256, num_blocks=3) as llm:
        handle = llm.generate_async([1], tokens(200), streaming=True)
        gate.wait()
        counts = []
        for num_steps in (20, 150):
            for _ in range(num_steps):
                gate.step()
            gate.batches.clear()
            gc.collect()
            counts.append(len(gc.get_objects()))
        gate.open()
        async with timeout():
            assert [output.num_tokens async for output in handle][-1] == 200
    assert counts[1] - counts[0] < 50


@pytest.mark.parametrize("num_streams", [1, 8])
def test_one_wake_up_per_loop_and_step(num_streams: int) -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:

        async def main() -> None:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, CountingLoop)
            blocker = llm.generate_async([1], tokens(40))
            gate.wait()
            handles = [llm.generate_async([2, index], tokens(30), streaming=True) for index in range(num_streams)]
            num_outputs = [0] * num_streams

            async def consume(index: int) -> None:
                async for _ in handles[index]:
                    num_outputs[index] += 1

            tasks = [asyncio.ensure_future(consume(index)) for index in range(num_streams)]
            await asyncio.sleep(0)
            gate.step()  # this step has only the blocker; the next one has all others
            before = loop.num_wake_ups
            for num_steps in range(1, 21):
                gate.step()
                for _ in range(5):
                    await asyncio.sleep(0)
                assert num_outputs == [num_steps] * num_streams
                assert loop.num_wake_ups - before == num_steps
            gate.open()
            await asyncio.gather(*tasks)
            await blocker

        in_loop(main, CountingLoop)


def test_waiting_for_the_end_is_woken_once() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:

        async def main() -> int:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, CountingLoop)
            task = asyncio.ensure_future(llm.generate_async([1], tokens(30)))
            await asyncio.sleep(0)
            gate.open()
            await task
            return loop.num_wake_ups

        assert in_loop(main, CountingLoop) == 1


def test_blocked_loop_is_woken_once_for_all_that_it_missed() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:

        async def main() -> None:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, CountingLoop)
            handle = llm.generate_async([1], tokens(30), streaming=True)
            task = asyncio.ensure_future(anext(handle))
            await asyncio.sleep(0)
            gate.wait()
            for _ in range(10):
                gate.step()
            assert loop.num_wake_ups == 1
            assert (await task).num_tokens == 10
            gate.open()
            outputs = [output async for output in handle]
            assert outputs[-1].token_ids == oracle([1], 30)

        in_loop(main, CountingLoop)


def test_consumer_that_stops_the_loop_takes_no_wake_up_from_others() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm, contextlib.closing(asyncio.new_event_loop()) as loop:
        handles = [llm.generate_async([index], tokens(1)) for index in range(4)]

        async def read(index: int) -> int:
            output = await handles[index]
            if index == 1:
                raise SystemExit
            return output.num_tokens

        tasks = [loop.create_task(read(index)) for index in range(4)]
        loop.run_until_complete(asyncio.sleep(0))
        gate.open()
        loop.call_later(WAIT_S, loop.stop)
        with pytest.raises(SystemExit):
            loop.run_forever()
        others = [tasks[index] for index in (0, 2, 3)]
        assert loop.run_until_complete(asyncio.wait_for(asyncio.gather(*others), WAIT_S)) == [1, 1, 1]


async def test_fields_of_the_final_output() -> None:
    with make_llm(next_token=counting_model, block_size=4) as llm:
        async with timeout():
            outputs = [o async for o in llm.generate_async("xyza", tokens(4, logprobs=2), streaming=True)]
            final = outputs[-1]
            again = await llm.generate_async("xyzab", tokens(4))
        assert final.prompt == "xyza"
        assert final.prompt_token_ids == list(b"xyza")
        assert final.num_prompt_tokens == 4
        assert final.text == "bcde"
        assert final.num_tokens == 4
        assert final.finish_reason == "length"
        assert final.finished
        assert final.matched_stop is None
        assert final.error is None
        assert final.logprobs is not None
        assert [item.top_ids for item in final.logprobs] == [(i,) for i in b"bcde"]
        assert again.logprobs is None
        assert (final.num_cached_tokens, again.num_cached_tokens) == (0, 4)
        assert again.request_id > final.request_id
        times = final.timeline
        assert times.first_scheduled is not None
        assert times.first_token is not None
        assert times.finished is not None
        assert times.queued <= times.first_scheduled <= times.first_token <= times.finished
        assert times.duration_s is not None
        assert times.time_to_first_token_s is not None
        assert 0 <= times.time_to_first_token_s <= times.duration_s
        assert times.num_preemptions == 0


def test_token_id_prompt_has_no_text() -> None:
    with make_llm() as llm:
        output = bounded(lambda: llm.generate([1, 2], tokens(1)))[0]
        assert output.prompt is None
        assert output.prompt_token_ids == [1, 2]


def test_without_a_tokenizer_there_is_no_text() -> None:
    with make_llm(tokenizer=None) as llm:
        output = bounded(lambda: llm.generate([1, 2], tokens(5)))[0]
        assert output.text == ""
        assert output.token_ids == oracle([1, 2], 5)


def test_repr_tells_what_matters() -> None:
    with make_llm(next_token=counting_model) as llm:
        output = bounded(lambda: llm.generate("a", tokens(80, stop=("lm",))))[0]
        long = bounded(lambda: llm.generate("a", tokens(80)))[0]
    for part in ("text='bcdefghijk'", "finish_reason='stop'", "matched_stop='lm'", "num_tokens=12", "ttft="):
        assert part in repr(output)
    assert "..." in repr(long)
    assert len(repr(long)) < 250


@pytest.mark.parametrize("stop", ["e", "ef", "defgh", "zzz"])
async def test_stop_string_across_tokens_cuts_the_text(stop: str) -> None:
    with make_llm(next_token=counting_model) as llm:
        async with timeout():
            outputs = [o async for o in llm.generate_async("a", tokens(12, stop=(stop,)), streaming=True)]
        assert_concatenates(outputs)
        whole = "bcdefghijklm"
        final = outputs[-1]
        assert final.text == whole.split(stop)[0]
        assert (final.finish_reason, final.matched_stop) == (("stop", stop) if stop in whole else ("length", None))
        if stop in whole:
            assert final.num_tokens == whole.index(stop) + len(stop)


async def test_part_of_a_character_waits_for_the_rest() -> None:
    text = "é😀ü".encode()

    def model(token_ids: Any) -> int:
        return text[len(token_ids) - 1]

    with make_llm(next_token=model) as llm:
        async with timeout():
            outputs = [o async for o in llm.generate_async([1], tokens(len(text)), streaming=True)]
    assert_concatenates(outputs)
    assert outputs[-1].text == "é😀ü"
    assert all("\ufffd" not in output.text_delta for output in outputs)


@pytest.mark.parametrize("is_late", [False, True])
async def test_pieces_and_logprobs_of_the_deltas_make_up_the_whole(is_late: bool) -> None:
    gate = StepGate()
    gate.open()
    with make_llm(next_token=counting_model, on_step=gate) as llm:
        async with timeout():
            handle = llm.generate_async("a", tokens(9, stop="fgx", logprobs=1), streaming=True)
            if is_late:
                await handle.subscribe(streaming=False)
            outputs = [output async for output in handle]
    final = outputs[-1]
    assert "".join(piece for output in outputs for piece in output.text_pieces_delta) == final.text == "bcdefghij"
    for output in outputs:
        assert "".join(output.text_pieces_delta) == output.text_delta
        assert len(output.decoded_logprobs_delta or ()) == len(output.token_ids_delta)
    assert [entry for output in outputs for entry in output.decoded_logprobs_delta or ()] == final.decoded_logprobs
    pieces = [piece for output in outputs for piece in output.text_pieces_delta]
    assert pieces[:9] == ["b", "c", "d", "e", "", "", "fgh", "i", "j"], "one for each token, also while text is held"


def test_eos_ends_unless_ignored_and_stop_ids_still_apply() -> None:
    with make_llm(next_token=counting_model, eos_token_ids=[ord("d")]) as llm:
        plain, ignoring, own = bounded(
            lambda: llm.generate(
                ["a", "a", "a"],
                [tokens(6), tokens(6, ignore_eos=True), tokens(9, ignore_eos=True, stop_token_ids=(ord("f"),))],
            )
        )
    assert (plain.text, plain.finish_reason, plain.matched_stop) == ("bc", "stop", ord("d"))
    assert plain.token_ids == list(b"bcd")
    assert (ignoring.text, ignoring.finish_reason) == ("bcdefg", "length")
    assert (own.text, own.matched_stop) == ("bcde", ord("f"))


async def test_every_way_to_wait_gives_the_same() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        async with timeout():
            handle = llm.generate_async([5], tokens(9), streaming=True)
            in_thread = start(lambda: handle.result(WAIT_S))

            async def iterate() -> list[GenerationOutput]:
                return [output async for output in handle]

            async def wait() -> GenerationOutput:
                return await handle

            tasks = asyncio.gather(iterate(), wait(), wait())
            gate.wait()
            await asyncio.sleep(0)
            gate.open()
            outputs, first, second = await tasks
            third = await asyncio.wrap_future(in_thread)
            assert handle.done
            fourth = handle.result(0)
        assert_concatenates(outputs)
        for final in (first, second, third, fourth, outputs[-1]):
            assert final.token_ids == oracle([5], 9)
            assert final.finish_reason == "length"


async def test_two_tasks_that_iterate_one_handle_share_its_outputs() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        async with timeout():
            handle = llm.generate_async([5], tokens(9), streaming=True)

            async def iterate() -> list[GenerationOutput]:
                return [output async for output in handle]

            tasks = [asyncio.ensure_future(iterate()) for _ in range(3)]
            gate.wait()
            for _ in range(4):
                gate.step()
                for _ in range(5):
                    await asyncio.sleep(0)  # all three are woken; one gets the output, two wait on
            gate.open()
            outputs = [output for part in await asyncio.gather(*tasks) for output in part]
        outputs.sort(key=lambda output: (output.num_tokens, output.finished))
        assert_concatenates(outputs)


async def test_exhausted_handle_stops() -> None:
    with make_llm() as llm:
        async with timeout():
            handle = llm.generate_async([5], tokens(3))
            assert len([output async for output in handle]) == 1
            assert [output async for output in handle] == []
            with pytest.raises(StopAsyncIteration):
                await handle.asend(None)
            assert (await handle).num_tokens == 3


def test_result_times_out_and_the_request_goes_on() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        handle = llm.generate_async([5], tokens(3))
        with pytest.raises(TimeoutError, match="did not finish within 0"):
            handle.result(0)
        gate.open()
        assert handle.result(WAIT_S).token_ids == oracle([5], 3)


@pytest.mark.parametrize("read", [lambda handle: handle.result(WAIT_S), lambda handle: bounded(handle.result)])
def test_failure_of_tokenization_is_raised_by_each_read(read: Callable[[Any], Any]) -> None:
    class Broken(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            raise KeyError(text)

    with make_llm(tokenizer=Broken()) as llm:
        handle = llm.generate_async("a", tokens(3))
        for _ in range(2):
            with pytest.raises(RequestFailedError, match="failed to encode the prompt") as caught:
                read(handle)
            assert isinstance(caught.value.__cause__, KeyError)
        assert handle.done


@pytest.mark.parametrize("waits", [True, False])
def test_panic_of_tokenization_is_raised_by_each_read(waits: bool) -> None:
    class Broken(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            raise Panic(text)

    with make_llm(tokenizer=Broken()) as llm:
        handle = llm.generate_async("a", tokens(3), wait_for_admission=waits)
        for _ in range(2):
            with pytest.raises(RequestFailedError, match="could not be prepared") as caught:
                handle.result(WAIT_S)
            assert isinstance(caught.value.__cause__, Panic)
        assert_idle(llm)


def test_steps_are_counted_and_stats_add_up() -> None:
    seen: list[Batch] = []
    with make_llm(on_step=seen.append, num_blocks=20) as llm:
        bounded(lambda: llm.generate([[1, 2, 3], [4]], tokens(4)))
        stats = llm.stats()
        assert stats.counters.num_steps == len(seen)
        assert stats.counters.num_generated_tokens == 8
        assert stats.counters.num_finished_requests == 2
        assert stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks == 19
        assert stats.mean_batch_size == sum(len(batch.rows) for batch in seen) / len(seen)
        assert 0.0 <= stats.overhead <= 1.0
        assert stats.cache_hit_rate == 0.0
        assert llm.health().ok
        assert llm.health().idle_s >= 0

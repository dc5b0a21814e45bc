"""While a prompt is tokenized, a template rendered or a grammar compiled, requests end on time and delay no others."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from llmengine.config import SchedulerConfig
from llmengine.engine.handle import RequestHandle
from llmengine.engine.worker_threads import WorkerThreads
from llmengine.errors import EngineClosedError, PromptTooLongError, QueueFullError
from llmengine.llm import LLM
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.engine.helpers import (
    WAIT_S,
    GatedTokenizer,
    StepGate,
    assert_idle,
    bounded,
    make_llm,
    oracle,
    timeout,
    tokens,
)

Submit = Callable[..., RequestHandle]


class StuckTokenizer(GatedTokenizer):
    """A tokenizer that gets stuck in texts that say so, and in a template for them."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text) if "stuck" in text else ByteTokenizer.encode(self, text)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_variables: Any) -> str:
        text = str(messages[0]["content"])
        self.encode(text)
        return text


def submit_text(llm: LLM, **options: Any) -> RequestHandle:
    return llm.generate_async("stuck", tokens(3), **options)


def submit_chat(llm: LLM, **options: Any) -> RequestHandle:
    return llm.chat_async([{"role": "user", "content": "stuck"}], tokens(3), **options)


def submit_family(llm: LLM, **options: Any) -> RequestHandle:
    return llm.generate_async("stuck", tokens(3, n=3, temperature=1.0), **options)


def submit_bad_words(llm: LLM, **options: Any) -> RequestHandle:
    return llm.generate_async("ab", tokens(3, bad_words=["stuck"]), **options)


def submit_waiting(llm: LLM, **options: Any) -> RequestHandle:
    return llm.generate_async("stuck", tokens(3), wait_for_admission=True, **options)


SUBMIT = pytest.mark.parametrize(
    "submit", [submit_text, submit_chat, submit_family, submit_bad_words, submit_waiting], ids=lambda one: one.__name__
)


@SUBMIT
@pytest.mark.parametrize("name", ["deadline_s", "first_token_deadline_s"])
async def test_a_deadline_passes_meanwhile(submit: Submit, name: str) -> None:
    tokenizer = StuckTokenizer()
    with make_llm(tokenizer=tokenizer, scheduler=SchedulerConfig(max_queued_requests=1)) as llm:
        async with timeout():
            # On a busy machine perhaps before a thread has begun, which is as well.
            output = await submit(llm, **{name: 0.05})
            assert (output.finish_reason, output.num_tokens) == ("timeout", 0)
            # Its place is free, though the thread goes on.
            assert (await llm.generate_async("ab", tokens(3))).token_ids == oracle(b"ab", 3)
            tokenizer.gate.set()
        assert_idle(llm)
        assert output.finish_reason == "timeout"


@SUBMIT
@pytest.mark.parametrize("way", ["abort", "cancel", "aclose", "drop"])
async def test_a_request_is_left_meanwhile(submit: Submit, way: str) -> None:
    tokenizer = StuckTokenizer()
    with make_llm(tokenizer=tokenizer, scheduler=SchedulerConfig(max_queued_requests=1)) as llm:
        async with timeout():
            handle = submit(llm)
            await asyncio.to_thread(tokenizer.wait_begun)
            if way == "abort":
                handle.abort()
                assert (await handle).finish_reason == "abort"
            elif way == "cancel":
                task = asyncio.ensure_future(handle)
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert (await handle).finish_reason == "abort"
            elif way == "aclose":
                await handle.aclose()
                assert (await handle).finish_reason == "abort"
            del handle
            # Waits for the only place, which is free as soon as the engine has heard of it.
            other = llm.generate_async("ab", tokens(3), wait_for_admission=True)
            assert (await other).token_ids == oracle(b"ab", 3)
            tokenizer.gate.set()
        assert_idle(llm)


@SUBMIT
@pytest.mark.parametrize("drain", [0.0, 0.05])
async def test_the_engine_closes_meanwhile(submit: Submit, drain: float) -> None:
    tokenizer = StuckTokenizer()
    llm = make_llm(tokenizer=tokenizer)
    async with timeout():
        handle = submit(llm)
        await asyncio.to_thread(tokenizer.wait_begun)
        await llm.aclose(drain)
        with pytest.raises(EngineClosedError):
            await handle
        tokenizer.gate.set()


async def test_a_drain_does_not_wait_for_what_was_left() -> None:
    tokenizer = StuckTokenizer()
    llm = make_llm(tokenizer=tokenizer)
    async with timeout():
        handle = submit_text(llm)
        await asyncio.to_thread(tokenizer.wait_begun)
        handle.abort()
        await llm.aclose(drain=10 * WAIT_S)
        assert (await handle).finish_reason == "abort"
        tokenizer.gate.set()


async def test_others_are_served_beside_threads_that_are_stuck() -> None:
    """Four threads are stuck, which is the usual number of threads."""
    tokenizer = StuckTokenizer()
    with make_llm(tokenizer=tokenizer) as llm:
        async with timeout():
            stuck = [submit_text(llm) for _ in range(8)]
            for _ in stuck:
                await asyncio.to_thread(tokenizer.wait_begun)
            outputs = await asyncio.gather(*(llm.generate_async(text, tokens(3)) for text in ("ab", "cd", "ef")))
            assert [output.token_ids for output in outputs] == [oracle(text, 3) for text in (b"ab", b"cd", b"ef")]
            tokenizer.gate.set()
            for handle in stuck:
                assert (await handle).finish_reason == "length"


async def test_long_texts_have_threads_of_their_own() -> None:
    tokenizer = StuckTokenizer()
    with make_llm(tokenizer=tokenizer) as llm:
        async with timeout():
            long = [llm.generate_async("stuck" + " " * 20_000, tokens(3)) for _ in range(30)]
            messages = [{"role": "user", "content": [{"type": "text", "text": "stuck" + " " * 20_000}]}]
            long += [llm.chat_async(messages, tokens(3)) for _ in range(3)]
            tokenizer.wait_begun()
            assert (await llm.generate_async("ab", tokens(3))).token_ids == oracle(b"ab", 3)
            assert not any(handle.done for handle in long)
            tokenizer.gate.set()
            for handle in long:
                with pytest.raises(PromptTooLongError):
                    await handle


async def test_tiny_deadlines_pile_up_nothing() -> None:
    """A request that is abandoned before its turn keeps neither its prompt nor a place, and is never tokenized."""

    class Text(str):
        __slots__ = ("__weakref__",)

    tokenizer = StuckTokenizer()
    with make_llm(tokenizer=tokenizer, scheduler=SchedulerConfig(max_queued_requests=40)) as llm:
        async with timeout():
            stuck = [submit_text(llm) for _ in range(12)]
            for _ in stuck:
                await asyncio.to_thread(tokenizer.wait_begun)
            texts = []
            for _ in range(20):
                text = Text("stuck too")
                texts.append(weakref.ref(text))
                handle = llm.generate_async(text, tokens(3), deadline_s=1e-9)
                del text
                assert (await handle).finish_reason == "timeout"
                del handle
            gc.collect()
            assert [reference() for reference in texts] == [None] * 20
            assert llm.stats().num_queued == 12
            tokenizer.gate.set()
            for one in stuck:
                await one
        assert not tokenizer.begun.acquire(blocking=False)


async def test_places_count_what_is_being_tokenized() -> None:
    tokenizer = StuckTokenizer()
    with make_llm(tokenizer=tokenizer, scheduler=SchedulerConfig(max_queued_requests=2)) as llm:
        async with timeout():
            handles = [submit_text(llm) for _ in range(2)]
            with pytest.raises(QueueFullError):
                llm.generate_async("ab", tokens(1))
            tokenizer.gate.set()
            for handle in handles:
                assert (await handle).finish_reason == "length"


def test_millions_of_token_ids_are_refused_unread() -> None:
    class Ids(Sequence[int]):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: Any) -> Any:
            assert index == 0, "was read"
            return 1

    with make_llm() as llm:
        for submit in (llm.generate_async, llm.generate):
            with pytest.raises(PromptTooLongError, match="1000000000 tokens"):
                submit(Ids(), tokens(1))  # type: ignore[operator]
        assert_idle(llm)


SCRIPT = """
import threading, time
from llmengine import LLM, SamplingParams
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer

begun = threading.Event()

class Stuck(ByteTokenizer):
    def encode(self, text):
        begun.set()
        time.sleep(1000)

llm = LLM.from_backend(FakeBackend, tokenizer=Stuck())
handle = llm.generate_async("abc")
begun.wait()
"""


@pytest.mark.parametrize("ending", ["", "llm.close()", "del llm, handle", "import sys; sys.exit(0)"])
def test_the_interpreter_does_not_wait_for_a_tokenizer(ending: str) -> None:
    command = [sys.executable, "-W", "error", "-c", SCRIPT + ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_interpreter_does_not_wait_for_a_long_text() -> None:
    script = """
import sys, threading
from tokenizers import Tokenizer, models, pre_tokenizers
from llmengine import LLM
from llmengine.testing import FakeBackend

backend = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
llm = LLM.from_backend(FakeBackend, tokenizer=backend)
handles = [llm.generate_async("a " * 4_000_000) for _ in range(3)]
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_llm_is_collected_on_a_thread_of_its_own() -> None:
    """It is collected while a lock is held that the engine takes at its end: the finalizer must not wait for that."""
    tokenizer = GatedTokenizer()

    def use() -> tuple[Any, weakref.ref[LLM]]:
        llm = make_llm(tokenizer=tokenizer)
        cycle: list[Any] = [llm, llm.generate_async("a", tokens(1))]
        cycle.append(cycle)
        return llm._engine, weakref.ref(llm)

    class Collecting(GatedTokenizer):
        def encode(self, text: str) -> list[int]:
            super().encode(text)
            gc.collect()
            return [1]

    tokenizer = Collecting()
    gc.collect()
    gc.disable()
    try:
        engine, llm = use()
        tokenizer.wait_begun()
        tokenizer.gate.set()
        assert engine.join(WAIT_S / 2)
        assert llm() is None
    finally:
        gc.enable()


def test_workers_do_jobs_in_order() -> None:
    threads = WorkerThreads("test", 1)
    done: list[int] = []
    over = threading.Event()
    for index in range(100):
        threads.submit(lambda index=index: done.append(index))  # type: ignore[misc]
    threads.submit(over.set)
    assert over.wait(WAIT_S)
    assert done == list(range(100))
    threads.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        threads.submit(over.set)


def test_workers_and_helpers_are_bounded() -> None:
    threads = WorkerThreads("test-bounded", 2, 3)
    gate, begun = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        begun.release()
        assert gate.wait(WAIT_S)

    jobs = [threads.submit(work) for _ in range(20)]
    for _ in range(5):
        assert begun.acquire(timeout=WAIT_S)
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("test-bounded")]) == 5
    assert not begun.acquire(blocking=False)
    for job in jobs[10:]:
        job.cancel()
    gate.set()
    for _ in range(5):
        assert begun.acquire(timeout=WAIT_S)
    threads.stop()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("test-bounded")]:
        bounded(thread.join)
    assert not begun.acquire(blocking=False)


def test_a_refused_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_llm() as llm:

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                llm.generate_async("ab", tokens(1))
        assert llm.generate("ab", tokens(2))[0].token_ids == oracle(b"ab", 2)
        assert bounded(lambda: llm.generate_async("ab", tokens(2)).result()).token_ids == oracle(b"ab", 2)
        assert_idle(llm)


async def test_the_engine_steps_while_a_thread_is_stuck() -> None:
    """An abort reaches it between two steps."""
    tokenizer, gate = StuckTokenizer(), StepGate()
    with make_llm(tokenizer=tokenizer, on_step=gate) as llm:
        async with timeout():
            running = llm.generate_async([1], tokens(50))
            gate.wait()
            handle = submit_text(llm)
            handle.abort()
            gate.step()
            assert (await handle).finish_reason == "abort"
            gate.open()
            assert (await running).token_ids == oracle([1], 50)
            tokenizer.gate.set()
        assert_idle(llm)

"""Callers that never read, read too late, fork or leave in odd ways, and backends that hang or fail."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tests.robustness.soak as soak
from llmengine.config import KvCacheConfig, ModelConfig, SchedulerConfig
from llmengine.engine.stream import FamilyStream, OutputStream, publish, wait_blocking, wake
from llmengine.errors import EngineDeadError, InvalidRequestError, RequestError
from llmengine.llm import LLM
from llmengine.outputs import GenerationOutput, OutputLog
from llmengine.request_options import SlowConsumer
from llmengine.sampling_params import SamplingParams
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.backends.helpers import save_tiny
from tests.engine.helpers import (
    WAIT_S,
    EngineHarness,
    StepGate,
    Steps,
    assert_concatenates,
    assert_idle,
    bounded,
    make_llm,
    oracle,
    start,
    timeout,
    tokens,
)
from tests.robustness.faults import CAUSES, FaultKind, Faults, FaultyBackend

MAX_UNREAD = 5
LONG = 60
TIMEOUT_S = 0.05


def impatient(**changes: Any) -> SchedulerConfig:
    """Return limits with a low one for unread tokens."""
    return SchedulerConfig(max_unread_tokens=MAX_UNREAD, **changes)


def pass_steps(llm: LLM) -> None:
    """Wait until every request has had more steps than it may have unread tokens."""
    bounded(lambda: llm.generate([99], tokens(4 * MAX_UNREAD)))


async def read_all(handle: Any) -> list[GenerationOutput]:
    """Return all outputs of a handle."""
    async with timeout():
        return [output async for output in handle]


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("policy", ["coalesce", "pause", "abort"])
async def test_consumer_that_never_reads_costs_no_more_than_its_policy_allows(
    policy: SlowConsumer, in_flight: int
) -> None:
    most = LONG if policy == "coalesce" else MAX_UNREAD + in_flight
    with make_llm(scheduler=impatient(), max_steps_in_flight=in_flight) as llm:
        handles = [llm.generate_async([n], tokens(LONG), streaming=True, slow_consumer=policy) for n in range(4)]
        pass_steps(llm)
        if policy == "coalesce":
            pass_steps(llm)
            pass_steps(llm)
        stats = llm.stats()
        assert (stats.num_running, stats.num_paused) == (0, 4 if policy == "pause" else 0)
        num_steps = stats.counters.num_steps
        firsts = []
        for handle in handles:
            async with timeout():
                firsts.append(await anext(handle))
        assert all(MAX_UNREAD <= first.num_tokens <= most for first in firsts)
        assert num_steps >= MAX_UNREAD
        for n, (first, handle) in enumerate(zip(firsts, handles, strict=True)):
            outputs = [first, *([] if first.finished else await read_all(handle))]
            assert_concatenates(outputs)
            final = outputs[-1]
            assert final.token_ids == oracle([n], final.num_tokens)
            if policy == "abort":
                assert final.finish_reason == "abort"
                assert isinstance(final.error, RequestError)
                assert f"max_unread_tokens={MAX_UNREAD}" in str(final.error)
            else:
                assert (final.finish_reason, final.num_tokens) == ("length", LONG)
        assert_idle(llm)


@pytest.mark.parametrize("in_flight", [1, 2])
async def test_paused_requests_give_way_to_others_and_lose_nothing(in_flight: int) -> None:
    """Two slots, and blocks for two requests: without evictions the paused ones would hold up all others for ever."""
    scheduler = impatient(max_batch_size=2)
    with make_llm(scheduler=scheduler, max_steps_in_flight=in_flight, num_blocks=9, max_model_len=32) as llm:
        stuck = [llm.generate_async([n], tokens(24), streaming=True, slow_consumer="pause") for n in range(5)]
        others = [llm.generate_async([n] * 8, tokens(22)) for n in range(10, 14)]
        for n, other in enumerate(others, 10):
            assert bounded(lambda other=other: other.result(WAIT_S)).token_ids == oracle([n] * 8, 22)
        assert llm.stats().num_paused == 5
        assert llm.stats().counters.num_preemptions > 0
        for n, handle in enumerate(stuck):
            outputs = await read_all(handle)
            assert_concatenates(outputs)
            assert outputs[-1].token_ids == oracle([n], 24)
        assert_idle(llm)


def test_eviction_of_a_paused_request_does_not_change_who_is_next() -> None:
    """It once charged the tenant between finding and taking the next request: another one was taken, and lost."""
    steps = Steps(num_blocks=4, max_model_len=12)
    paused = steps.submit([1, 2, 3], 9, tenant="a")
    for _ in range(8):
        steps.step()
    steps.scheduler.pause(paused)
    following = steps.submit([4], tenant="a")
    steps.submit([5], tenant="b")
    steps.step()
    assert following.request_id in steps.running_ids()
    steps.scheduler.check_integrity()
    steps.scheduler.resume(paused)
    steps.drain()
    steps.check_tokens()


def test_engine_sleeps_while_all_are_paused_and_ends_the_oldest_of_too_many() -> None:
    gate = StepGate()
    harness = EngineHarness(impatient(max_queued_requests=2), on_step=gate)
    handles = [harness.submit([1], tokens(LONG), slow_consumer="pause")]
    gate.wait()
    handles += [harness.submit([n], tokens(LONG), slow_consumer="pause") for n in (2, 3)]
    for _ in range(MAX_UNREAD):
        gate.step()
    gate.let_go()
    harness.engine.check_integrity()
    stats = harness.engine.stats()
    assert (stats.num_running, stats.num_paused, stats.num_queued) == (0, 2, 0)
    assert len(gate.batches) == MAX_UNREAD + 1
    oldest = handles[0].result(WAIT_S)
    assert (oldest.finish_reason, oldest.num_tokens) == ("abort", MAX_UNREAD)
    assert "max_queued_requests=2" in str(oldest.error)
    handles.clear()
    harness.engine.check_integrity()
    stats = harness.engine.stats()
    assert (stats.num_paused, stats.num_used_blocks) == (0, 0)
    harness.close()


async def test_paused_first_output_of_several_does_not_hold_up_the_others() -> None:
    with make_llm(scheduler=SchedulerConfig(max_unread_tokens=1)) as llm:
        outputs = await read_all(
            llm.generate_async([1] * 9, tokens(LONG, n=3, temperature=1.0), streaming=True, slow_consumer="pause")
        )
        finals = [output for output in outputs if output.finished]
        assert [final.token_ids for final in finals] == [oracle([1] * 9, LONG)] * 3
        assert_idle(llm)


@pytest.mark.parametrize("policy", ["pause", "abort"])
async def test_who_waits_for_the_end_is_not_slow(policy: SlowConsumer) -> None:
    with make_llm(scheduler=impatient()) as llm:
        async with timeout():
            awaited = llm.generate_async([1], tokens(LONG), slow_consumer=policy)
            assert (await awaited).token_ids == oracle([1], LONG)
            iterated = llm.generate_async([2], tokens(LONG), slow_consumer=policy)
            assert [output.token_ids async for output in iterated] == [oracle([2], LONG)]
        blocking = llm.generate_async([3], tokens(LONG), slow_consumer=policy)
        assert blocking.result(WAIT_S).token_ids == oracle([3], LONG)


def test_a_thread_that_waits_for_several_outputs_is_slow_for_none() -> None:
    """It once waited for one output after another, and meanwhile the others' text counted as unread."""
    logs = [OutputLog(request_id=1, queued=0.0, index=index) for index in range(3)]
    streams = [OutputStream(log, "abort", 1) for log in logs]
    family = FamilyStream(streams)
    for log in logs:
        log.token_ids.append(5)
    assert not publish(streams)
    assert all(stream.is_behind for stream in streams)
    assert not wait_blocking(family, 0.0)
    for log in logs:
        log.token_ids.append(6)
    publish(streams)
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(wait_blocking(family, WAIT_S)))
    thread.start()
    deadline = time.monotonic() + WAIT_S
    while any(stream.is_behind for stream in streams):
        assert time.monotonic() < deadline
    for log in reversed(logs):
        log.finish_reason = "length"
        wake(publish([streams[log.index]]))
    bounded(thread.join)
    assert ended == [True]


async def test_waiting_for_the_end_lets_a_paused_request_go_on() -> None:
    with make_llm(scheduler=impatient()) as llm:
        handles = [llm.generate_async([n], tokens(LONG), streaming=True, slow_consumer="pause") for n in range(2)]
        pass_steps(llm)
        assert llm.stats().num_paused == 2
        async with timeout():
            assert (await handles[0]).token_ids == oracle([0], LONG)
        assert bounded(lambda: handles[1].result(WAIT_S)).token_ids == oracle([1], LONG)


def test_unknown_policy_is_refused() -> None:
    with make_llm() as llm, pytest.raises(InvalidRequestError, match=r"slow_consumer must be one of .*, not 'drop'"):
        llm.generate_async([1], slow_consumer="drop")  # type: ignore[arg-type]


EXTREMES: list[dict[str, Any]] = [
    {"min_new_tokens": 2**30, "max_new_tokens": None, "stop_token_ids": [5]},
    {"max_new_tokens": 10**400},
    {"temperature": 1.0, "top_k": 2**70},
    {"temperature": 1e-6},
    {"temperature": 1e-6, "top_p": 5e-324, "min_p": 1.0},
    {"temperature": 100.0, "top_p": 5e-324},
    {"temperature": 1e-6, "repetition_penalty": 100, "frequency_penalty": 2, "presence_penalty": -2},
    {"temperature": 1e-6, "repetition_penalty": 0.01, "logit_bias": {3: 100, 4: -100}},
    {"temperature": 1.0, "seed": 2**63 - 1, "logprobs": 20, "n": 128},
    {"stop": "x" * 16384, "bad_words": [[token_id] for token_id in range(300)]},
]


def test_parameters_at_their_limits_end_no_engine(tmp_path: Path) -> None:
    """A value beyond 32 bits once ended the engine for everybody; another chose tokens that do not exist."""
    save_tiny(tmp_path)
    small = KvCacheConfig(max_bytes=8 << 20)
    with LLM(ModelConfig(tmp_path, device="cpu", kv_cache_config=small), tokenizer=ByteTokenizer()) as llm:
        for changes in EXTREMES:
            params = SamplingParams(**{"max_new_tokens": 4, **changes})
            for output in llm.generate([1, 2, 3], params)[0].outputs:
                assert output.finish_reason in ("length", "stop"), changes
                assert all(0 <= token_id < llm.info.vocab_size for token_id in output.token_ids), changes
        for options in ({"priority": -(10**6)}, {"deadline_s": 1e308}, {"first_token_deadline_s": float("inf")}):
            assert llm.generate_async([1], SamplingParams(max_new_tokens=2), **options).result(WAIT_S).num_tokens == 2


@pytest.mark.parametrize("ending", ["abort", "dropped", "deadline", "close", "drain", "death"])
def test_paused_request_ends_in_every_way(ending: str) -> None:
    faults = Faults()
    llm = make_llm(scheduler=impatient(), backend=lambda **options: FaultyBackend(faults, **options))
    deadline_s = 0.2 if ending == "deadline" else None
    handle = llm.generate_async([1], tokens(LONG), streaming=True, slow_consumer="pause", deadline_s=deadline_s)
    pass_steps(llm)
    if ending == "abort":
        handle.abort()
    elif ending == "dropped":
        del handle
        assert_idle(llm)
    elif ending == "close":
        bounded(llm.close)
    elif ending == "drain":
        bounded(lambda: asyncio.run(llm.aclose(drain=0.05)))
    elif ending == "death":
        faults.inject("collect raises")
        with pytest.raises(EngineDeadError):
            llm.generate_async([2], tokens(1)).result(WAIT_S)
        with pytest.raises(EngineDeadError):
            handle.result(WAIT_S)
    else:
        deadline_passes = threading.Event()
        deadline_passes.wait(0.3)  # waiting for the handle would let the request go on
    if ending in ("abort", "close", "drain", "deadline"):
        output = handle.result(WAIT_S)
        assert output.finish_reason == ("timeout" if ending == "deadline" else "abort")
        assert output.token_ids == oracle([1], output.num_tokens)
        assert output.num_tokens < 4 * MAX_UNREAD
    if ending in ("abort", "deadline"):
        assert_idle(llm)
    bounded(llm.close)


@pytest.mark.parametrize("kind", CAUSES)
async def test_dead_backend_fails_every_stream_with_its_cause(kind: FaultKind) -> None:
    faults, submitted = Faults(), threading.Event()
    before = set(threading.enumerate())
    llm = make_llm(
        scheduler=SchedulerConfig(max_batch_size=2, step_timeout_s=WAIT_S if kind != "hang" else TIMEOUT_S),
        max_steps_in_flight=2,
        backend=lambda **options: FaultyBackend(faults, **options),
    )
    # Between two steps, which the watchdog does not mind, the engine waits for all requests and for their fault.
    waiting = start(lambda: llm._engine.call(lambda backend: submitted.wait(WAIT_S)))
    handles = [llm.generate_async([n], tokens(LONG), streaming=n % 2 == 0) for n in range(3)]
    handles.append(llm.generate_async("text", tokens(LONG)))
    faults.inject(kind)
    submitted.set()
    assert waiting.result(WAIT_S)
    for handle in handles:
        with pytest.raises(EngineDeadError) as caught:
            await read_all(handle)
        assert isinstance(caught.value.__cause__, CAUSES[kind])
    with pytest.raises(EngineDeadError) as refused:
        llm.generate_async([1])
    assert isinstance(refused.value.__cause__, CAUSES[kind])
    health = llm.health()
    assert health.state == "dead"
    assert health.failure is not None
    assert CAUSES[kind].__name__ in health.failure
    bounded(llm.close)
    assert llm.stats().num_queued == 0
    faults.let_go.set()
    for thread in set(threading.enumerate()) - before:
        bounded(thread.join)


def test_hang_while_closing_holds_up_nobody_for_ever() -> None:
    let_go = threading.Event()

    class HangsInClose(FakeBackend):
        def close(self) -> None:
            let_go.wait()

    # No step is made, in which the watchdog might find the machine too slow.
    llm = make_llm(backend=HangsInClose, scheduler=SchedulerConfig(step_timeout_s=TIMEOUT_S))
    bounded(llm.close)
    assert llm.health().state == "dead"
    let_go.set()


def test_backend_that_also_fails_to_close_does_not_hide_the_first_fault() -> None:
    closing = threading.Event()

    class FailsTwice(FakeBackend):
        def close(self) -> None:
            assert closing.wait(WAIT_S)
            raise KeyError("close")

    def fail(batch: Any) -> None:
        raise ValueError("step")

    llm = make_llm(backend=FailsTwice, on_step=fail)
    with pytest.raises(EngineDeadError) as caught:
        llm.generate_async([1]).result(WAIT_S)  # raised before the backend has closed
    assert isinstance(caught.value.__cause__, ValueError)
    closing.set()
    bounded(llm.close)
    assert "ValueError" in str(llm.health().failure)


def test_watchdog_minds_neither_idleness_nor_many_steps() -> None:
    """A machine on which a thread stands still for longer in one of the steps gets a second chance, and a third."""
    for timeout_s in (0.25, 1.0, 4.0):
        try:
            with make_llm(scheduler=SchedulerConfig(step_timeout_s=timeout_s)) as llm:
                for _ in range(2):
                    assert len(llm.generate([1], tokens(LONG))[0].token_ids) == LONG
                    threading.Event().wait(1.5 * timeout_s)
                assert llm.health().ok
        except EngineDeadError:
            continue
        assert llm.health().state == "closed"
        return
    pytest.fail("the watchdog ended an engine that does not hang")


STOPPED_IN_A_STEP = """
import sys
from llmengine import SamplingParams, SchedulerConfig
from tests.engine.helpers import make_llm

def step(batch):
    print("stepping", flush=True)
    sys.stdin.readline()

with make_llm(on_step=step, scheduler=SchedulerConfig(step_timeout_s=float(sys.argv[1]))) as llm:
    llm.generate([1], SamplingParams(max_new_tokens=1))
"""


def test_watchdog_does_not_mind_that_its_process_is_stopped() -> None:
    """As by a frozen container. A machine on which a thread stands still as well gets a second chance, and a third."""
    for timeout_s in (0.5, 1.0, 4.0):
        command = [sys.executable, "-c", STOPPED_IN_A_STEP, str(timeout_s)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"stepping\n"
            process.send_signal(signal.SIGSTOP)
            time.sleep(2 * timeout_s)
            process.send_signal(signal.SIGCONT)
            _, errors = process.communicate(b"\n", timeout=WAIT_S)
        if process.returncode == 0:
            return
        assert b"step_timeout_s" in errors, errors.decode()
    pytest.fail("the watchdog ended an engine that does not hang")


def test_soak_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--minutes", "0.03", "--seed", "3"]) == 0, capsys.readouterr().out
    assert "NaN logits" in capsys.readouterr().out


SCRIPT = """
import asyncio, os, sys, threading
from llmengine import LLM, EngineClosedError, SamplingParams, SchedulerConfig
from llmengine.testing import FakeBackend

def stand(batch):
    if batch.step == 30:
        threading.Event().wait()

hangs = len(sys.argv) > 1
llm = LLM.from_backend(
    lambda: FakeBackend(num_blocks=2000, max_model_len=7000, on_step=stand if hangs else None),
    scheduler_config=SchedulerConfig(max_unread_tokens=5, step_timeout_s=0.1 if hangs else None),
)
long = SamplingParams(max_new_tokens=6000)
"""

FORK = """
handle = llm.generate_async([1], long, streaming=True)
done = llm.generate_async([1], SamplingParams(max_new_tokens=3))
done.result(60)
child = os.fork()
if child == 0:
    def refused(function):
        try:
            function()
        except EngineClosedError as error:
            assert "forked" in str(error), error
            return
        raise AssertionError(function)

    async def read():
        while True:
            await anext(handle)

    async def wait():
        await handle

    assert len(done.result(60).token_ids) == 3
    refused(lambda: llm.generate_async([1]))
    refused(lambda: llm.generate_async("text"))
    refused(lambda: llm.generate([1]))
    refused(lambda: handle.result())
    refused(lambda: asyncio.run(read()))
    refused(lambda: asyncio.run(wait()))
    assert llm.health().state == "dead" and "forked" in llm.health().failure
    handle.abort()
    llm.close()
    del handle
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert llm.health().ok
assert len(llm.generate([1], SamplingParams(max_new_tokens=3))[0].token_ids) == 3
handle.abort()
assert handle.result(60).finish_reason == "abort"
"""

EXITS = {
    "paused": "handle = llm.generate_async([1], long, streaming=True, slow_consumer='pause'); "
    "llm.generate([1], SamplingParams(max_new_tokens=20))",
    "hanging": """
try:
    llm.generate_async([1], long).result()
except Exception as error:
    assert isinstance(error.__cause__, TimeoutError)
""",
    "fork": FORK,
}


@pytest.mark.parametrize("ending", EXITS)
def test_process_ends_and_a_fork_says_what_is_wrong(ending: str) -> None:
    arguments = ["hangs"] if ending == "hanging" else []
    # Python 3.12 warns of every fork of a process that has threads.
    quiet = ["-W", "ignore:This process:DeprecationWarning"]
    command = [sys.executable, "-X", "faulthandler", *quiet, "-c", SCRIPT + EXITS[ending], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    errors = "" if ending == "hanging" else done.stderr  # there the fault is logged
    assert (done.returncode, done.stdout, errors) == (0, "", "")

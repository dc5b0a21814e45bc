"""Hostile callers in any order, with faults of the backend: every caller learns what happened, and nothing leaks.

One machine drives the scheduler step by step; the other drives an engine on its own thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmengine.config import SchedulerConfig
from llmengine.engine.handle import RequestHandle
from llmengine.engine.request import Request, RequestStatus
from llmengine.errors import EngineDeadError, RequestError, RequestFailedError
from llmengine.request_options import SlowConsumer
from tests.engine.helpers import WAIT_S, EngineHarness, bounded, close_loop_under, in_loop, oracle, tokens
from tests.engine.test_scheduler_properties import SchedulerMachine
from tests.robustness.faults import CAUSES, FaultKind, Faults, FaultyBackend

MAX_UNREAD = 3


class PausingMachine(SchedulerMachine):
    """The scheduler's machine, with requests that pause and go on."""

    @precondition(lambda self: self.steps.scheduler.running)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        self.steps.scheduler.pause(data.draw(st.sampled_from(self.steps.scheduler.running)))

    @precondition(lambda self: self.steps.scheduler.num_paused)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        self.steps.scheduler.resume(data.draw(st.sampled_from(self.paused())))

    def teardown(self) -> None:
        if hasattr(self, "steps"):
            for request in self.paused():
                self.steps.scheduler.resume(request)
        super().teardown()

    def paused(self) -> list[Request]:
        """Return the paused requests."""
        return [request for request in self.steps.requests if request.status is RequestStatus.PAUSED]


@dataclass(slots=True)
class Client:
    """One caller and its request."""

    prompt: list[int]
    num_tokens: int
    policy: SlowConsumer
    handle: RequestHandle
    has_left: bool = False


class EngineMachine(RuleBasedStateMachine):
    """Requests run while the rules are drawn, so the threads decide their order relative to the steps."""

    @initialize(
        in_flight=st.integers(1, 3),
        num_blocks=st.integers(8, 20),
        max_batch_size=st.integers(1, 4),
    )
    def build(self, in_flight: int, num_blocks: int, max_batch_size: int) -> None:
        self.options = {"num_blocks": num_blocks, "max_steps_in_flight": in_flight, "max_model_len": 28}
        self.scheduler = SchedulerConfig(
            max_batch_size=max_batch_size, max_unread_tokens=MAX_UNREAD, step_timeout_s=WAIT_S
        )
        self.clients: list[Client] = []
        self.threads = set(threading.enumerate())
        self.start()

    def start(self, **changes: Any) -> None:
        """Start an engine with a sound backend."""
        self.faults = Faults()
        self.num_nan = 0
        self.harness = EngineHarness(
            self.scheduler, backend=lambda **options: FaultyBackend(self.faults, **options), **self.options
        )

    @rule(
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=9),
        num_tokens=st.integers(1, 16),
        policy=st.sampled_from(["coalesce", "pause", "pause", "abort"]),
        streaming=st.booleans(),
    )
    def submit(self, prompt: list[int], num_tokens: int, policy: SlowConsumer, streaming: bool) -> None:
        handle = self.harness.submit(prompt, tokens(num_tokens), streaming=streaming, slow_consumer=policy)
        self.clients.append(Client(prompt, num_tokens, policy, handle))

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), num_outputs=st.integers(1, 3))
    def read(self, data: st.DataObject, num_outputs: int) -> None:
        client = self.pick(data)

        async def main() -> None:
            for _ in range(num_outputs):
                await anext(client.handle, None)

        in_loop(main)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        client = self.pick(data)
        client.handle.result(WAIT_S)
        self.check_end(client)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def look_for_a_moment(self, data: st.DataObject) -> None:
        client = self.pick(data)
        try:
            client.handle.result(0.0)
        except TimeoutError:
            return
        self.check_end(client)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), way=st.sampled_from(["abort", "aclose", "athrow", "cancel", "close loop", "drop"]))
    def leave(self, data: st.DataObject, way: str) -> None:
        client = self.pick(data)
        client.has_left = True
        handle = client.handle
        if way == "abort":
            handle.abort(keep_prefix=False)
        elif way == "drop":
            self.clients.remove(client)
            del client, handle
            gc.collect()  # tracebacks of what was thrown in hold the handle in cycles
        elif way == "close loop":
            close_loop_under(handle)
        else:
            in_loop(lambda: leave_in_loop(handle, way))

    @rule()
    def rows_fail_alone(self) -> None:
        self.num_nan += 1
        self.faults.inject("NaN logits")

    @rule(kind=st.sampled_from(sorted(CAUSES)), num_tokens=st.integers(1, 9))
    def die(self, kind: FaultKind, num_tokens: int) -> None:
        if kind == "hang":
            self.close()
            self.scheduler.step_timeout_s = 0.02
            self.start()
            self.scheduler.step_timeout_s = WAIT_S
        handles = []
        # The earlier requests may have triggered the fault already, and a slow machine is taken for a hang.
        with contextlib.suppress(EngineDeadError):
            for _ in range(3):
                handles.append(self.harness.submit([5], tokens(num_tokens)))  # noqa: PERF401  # some may be submitted
            self.faults.inject(kind)
            handles.append(self.harness.submit([6], tokens(num_tokens)))
        for handle in (*handles, *(client.handle for client in self.clients)):
            cause = cause_of_death(handle)
            assert cause is None or isinstance(cause, CAUSES[kind])
        health = self.harness.engine.health()
        assert health.state == "dead"
        assert CAUSES[kind].__name__ in str(health.failure)
        self.close()
        self.start()

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "harness"):
            self.harness.engine.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            for client in self.clients:
                client.handle.result(WAIT_S)
                self.check_end(client)
            self.is_sound()
            assert self.harness.engine.stats().num_paused == 0
            self.close()
            assert self.harness.engine.stats().num_used_blocks == 0
            assert self.harness.engine.stats().num_queued == 0

    def close(self) -> None:
        """End the engine and its threads."""
        self.harness.engine.stop()
        self.harness.engine.join(WAIT_S)
        self.faults.let_go.set()
        self.clients.clear()
        for thread in set(threading.enumerate()) - self.threads:
            bounded(thread.join)

    def pick(self, data: st.DataObject) -> Client:
        """Return one of the clients."""
        return data.draw(st.sampled_from(self.clients))

    def check_end(self, client: Client) -> None:
        """Assert that the request ended in a way that its caller, its policy or a fault explains."""
        output = client.handle.result(WAIT_S)
        assert output.token_ids == oracle(client.prompt, output.num_tokens)
        match output.finish_reason:
            case "length":
                assert output.num_tokens == min(client.num_tokens, 28 - len(client.prompt))
            case "abort":
                assert client.has_left or isinstance(output.error, RequestError)
            case "error":
                assert self.num_nan
                assert isinstance(output.error, RequestFailedError)
            case _:
                raise AssertionError(output)


def cause_of_death(handle: RequestHandle) -> BaseException | None:
    """Wait for the end and return what the engine died of, if that came first."""
    try:
        handle.result(WAIT_S)
    except EngineDeadError as error:
        return error.__cause__
    return None


async def leave_in_loop(handle: RequestHandle, way: str) -> None:
    """Leave the handle in the way that a task does."""
    if way == "aclose":
        await handle.aclose()
    elif way == "athrow":
        try:
            await handle.athrow(KeyError)
        except KeyError:
            return
        raise AssertionError("what was thrown in did not come out")
    else:
        task = asyncio.ensure_future(anext(handle, None))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])


TestPausingMachine = PausingMachine.TestCase
TestPausingMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)

TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True)

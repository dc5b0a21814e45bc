"""After any order of submit, launch, collect, abort and time-out the scheduler is sound and the tokens are right."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmengine.engine.request import Request, RequestStatus
from tests.engine.helpers import Steps, oracle

SHARED = [[5] * 9, [5] * 5 + [6] * 6, list(range(40, 53))]


class SchedulerMachine(RuleBasedStateMachine):
    """Steps are launched and collected out of lockstep, up to the backend's limit."""

    @initialize(
        in_flight=st.integers(1, 3),
        max_samples=st.integers(1, 4),
        num_blocks=st.integers(8, 20),
        caching=st.booleans(),
        max_batch_size=st.integers(1, 5),
        max_tokens=st.integers(5, 24),
        max_preemptions=st.integers(1, 3),
        latency_ms=st.sampled_from([None, 5.0]),
        weights=st.sampled_from([{}, {"a": 3.0, "b": 0.5}]),
    )
    def build(
        self,
        in_flight: int,
        max_samples: int,
        num_blocks: int,
        caching: bool,
        max_batch_size: int,
        max_tokens: int,
        max_preemptions: int,
        latency_ms: float | None,
        weights: dict[str, float],
    ) -> None:
        self.steps = Steps(
            num_blocks=num_blocks,
            max_model_len=28,
            max_steps_in_flight=in_flight,
            max_samples=max_samples,
            caching=caching,
            max_batch_size=max_batch_size,
            max_tokens_per_step=max_tokens,
            max_tokens_per_mixed_step=max(max_batch_size, max_tokens // 2),
            max_preemptions=max_preemptions,
            max_decode_latency_ms=latency_ms,
            tenant_weights=weights,
            priority_ageing_s=10.0,
        )
        self.in_flight = in_flight

    @rule(
        prefix=st.sampled_from([[], *SHARED]),
        tail=st.lists(st.integers(0, 3), min_size=1, max_size=6),
        num_tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from([None, None, "a", "b"]),
        salt=st.sampled_from([None, None, "a"]),
        stop_ids=st.sampled_from([(), (), tuple(range(0, 258, 9))]),
        num_outputs=st.sampled_from([1, 1, 2, 4]),
    )
    def submit(
        self,
        prefix: list[int],
        tail: list[int],
        num_tokens: int,
        priority: int,
        tenant: str | None,
        salt: str | None,
        stop_ids: tuple[int],
        num_outputs: int,
    ) -> None:
        self.steps.submit(
            prefix + tail,
            num_tokens,
            num_outputs=num_outputs,
            priority=priority,
            tenant=tenant,
            salt=salt,
            stop_token_ids=stop_ids,
        )

    @rule(seconds=st.floats(0.001, 30.0))
    def pass_time(self, seconds: float) -> None:
        self.steps.now += seconds

    @precondition(lambda self: self.steps.scheduler.num_steps_in_flight < self.in_flight)
    @rule()
    def launch(self) -> None:
        waiting = [request for request in self.steps.requests if request.status is RequestStatus.WAITING]
        self.steps.launch()
        for passed in waiting:
            if passed.status is RequestStatus.WAITING:
                assert not any(self._overtook(request, passed) for request in waiting)

    @precondition(lambda self: self.steps.scheduler.num_steps_in_flight)
    @rule()
    def collect(self) -> None:
        changed = self.steps.collect()
        assert len(set(map(id, changed))) == len(changed)

    @rule(num_steps=st.integers(1, 6))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.steps.scheduler.num_steps_in_flight < self.in_flight:
                self.steps.launch()
            if self.steps.scheduler.num_steps_in_flight:
                self.steps.collect()

    @precondition(lambda self: self.steps.scheduler.has_requests)
    @rule(data=st.data(), reason=st.sampled_from(["abort", "timeout"]), keep_prefix=st.booleans())
    def end_early(self, data: st.DataObject, reason: str, keep_prefix: bool) -> None:
        unfinished = sorted(self.steps.scheduler.requests(), key=lambda request: request.request_id)
        request = data.draw(st.sampled_from(unfinished))
        self.steps.scheduler.finish(request, "abort" if reason == "abort" else "timeout", keep_prefix=keep_prefix)

    @invariant()
    def is_sound(self) -> None:
        steps = self.steps
        steps.scheduler.check_integrity()
        for request in steps.requests:
            self._check(request)
        unfinished = [request for request in steps.requests if request.status is not RequestStatus.FINISHED]
        assert sorted(map(id, unfinished)) == sorted(map(id, steps.scheduler.requests()))

    def teardown(self) -> None:
        if not hasattr(self, "steps"):
            return
        steps = self.steps
        steps.drain(max_steps=60 * (len(steps.requests) + 1))
        steps.check_tokens()
        assert steps.kv_cache.num_used_blocks == 0
        assert steps.kv_cache.num_available_blocks == steps.kv_cache.num_usable_blocks
        assert steps.scheduler.num_waiting == 0
        assert all(request.slot is None and request.num_in_flight == 0 for request in self._collected())

    def _overtook(self, request: Request, passed: Request) -> bool:
        """Return whether a request was admitted before one of its tenant that should have come first."""
        ahead = passed.priority * 10.0 - passed.stream.log.queued > request.priority * 10.0 - request.stream.log.queued
        return request.status is not RequestStatus.WAITING and request.tenant == passed.tenant and ahead

    def _collected(self) -> list[Request]:
        return [request for request in self.steps.requests if request.stream.log.finish_reason == "length"]

    def _check(self, request: Request) -> None:
        log = request.stream.log
        assert log.token_ids == oracle(request.prompt_token_ids, len(log.token_ids))
        assert request.num_tokens <= request.max_total_tokens + self.in_flight
        if log.finish_reason == "stop":
            assert log.token_ids[-1] in request.stop_token_ids
            assert not set(log.token_ids[:-1]) & request.stop_token_ids


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)

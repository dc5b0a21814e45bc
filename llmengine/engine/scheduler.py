"""The in-flight batching scheduler: which requests compute which tokens in the next step.

There are no prefill and decode phases. Each request has tokens it wants computed and tokens that are computed; a step
lets running requests catch up first and admits waiting ones with what is left of the token budget, so a step mixes
chunks of prompts with decodes. Steps may be scheduled ahead of their predecessors' results (see `llmengine.batch`).
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llmengine.batch import Batch, BatchRow, SlotInit, StepResult
from llmengine.config import SchedulerConfig
from llmengine.engine.kv_cache import KVCacheManager
from llmengine.engine.request import Request, RequestStatus
from llmengine.engine.stats import EngineCounters
from llmengine.errors import RequestFailedError
from llmengine.outputs import FinishReason


@dataclass(slots=True)
class _StepPlan:
    """A step while it is put together."""

    budget: int
    rows: list[BatchRow] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    slot_inits: list[SlotInit] = field(default_factory=list)
    preempted: bool = False


@dataclass(slots=True)
class _LaunchedStep:
    """`requests[i]` has row i of `batch`, and had been preempted `num_preemptions[i]` times."""

    batch: Batch
    requests: list[Request]
    num_preemptions: list[int]


class Scheduler:
    """Owns the waiting queue, the running set, the slots and the KV blocks. Used by the engine thread alone.

    Waiting requests are admitted by priority, then arrival. An admitted request gets blocks for all tokens it has; a
    running one gets one more block when it needs one. When none is left, the request with the lowest priority that
    arrived last is preempted: its blocks are freed (and stay findable in the prefix cache) and it waits again, in
    front of later arrivals. Nothing is admitted in a step that preempts, and a request preempted
    `max_preemptions` times is spared while another can be chosen, so two requests cannot evict each other for ever.
    """

    def __init__(self, config: SchedulerConfig, kv_cache: KVCacheManager, counters: EngineCounters) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self.counters = counters
        self.running: list[Request] = []
        """In the order of `_preemption_rank`: the last one is the first to be preempted."""
        # (-priority, arrival, request); entries of requests that are no longer waiting are skipped when they surface.
        self._waiting: list[tuple[int, int, Request]] = []
        self._num_waiting = 0
        self._free_slots = list(range(config.max_batch_size))
        self._in_flight: deque[_LaunchedStep] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, new and preempted."""
        return self._num_waiting

    @property
    def num_steps_in_flight(self) -> int:
        """Steps scheduled and not yet updated."""
        return len(self._in_flight)

    @property
    def has_requests(self) -> bool:
        """True while any request is unfinished."""
        return bool(self.running) or self._num_waiting > 0

    def add(self, request: Request) -> None:
        """Queue a new request."""
        request.status = RequestStatus.WAITING
        self._num_waiting += 1
        heapq.heappush(self._waiting, (-request.priority, request.request_id, request))

    def schedule(self) -> Batch | None:
        """Return the next step, or None when there is nothing to compute now."""
        budget = self._token_budget()
        plan = _StepPlan(budget)
        self._schedule_running(plan)
        if not plan.preempted:
            self._admit_waiting(plan)
        if not plan.rows:
            return None
        self.counters.num_steps += 1
        self.counters.num_rows += len(plan.rows)
        self.counters.num_computed_tokens += budget - plan.budget
        batch = Batch(self.counters.num_steps, plan.rows, plan.slot_inits)
        preemptions = [request.num_preemptions for request in plan.requests]
        self._in_flight.append(_LaunchedStep(batch, plan.requests, preemptions))
        return batch

    def update(self, result: StepResult) -> list[Request]:
        """Apply the oldest launched step's result; return the requests whose output changed, finished ones included.

        Tokens for requests that ended meanwhile are discarded.
        """
        step = self._in_flight.popleft()
        assert result.step == step.batch.step, f"result of step {result.step} for step {step.batch.step}"
        token_ids, logprobs, errors = result.token_ids, result.logprobs, result.errors
        block_size = self.kv_cache.block_size
        finished = RequestStatus.FINISHED
        changed: list[Request] = []
        num_sampled = 0
        for row, request, num_preemptions in zip(step.batch.rows, step.requests, step.num_preemptions, strict=True):
            if request.status is finished:
                continue
            slot, end = row.slot, row.start + row.num_tokens
            reason: FinishReason | None = None
            if errors and slot in errors:
                self.finish(request, "error", RequestFailedError(errors[slot]))
                changed.append(request)
                continue
            if row.sample:
                num_sampled += 1
                changed.append(request)
                reason = request.append(token_ids[slot], logprobs.get(slot) if logprobs else None)
            # A decode fills a block only with its last token.
            if (row.num_tokens > 1 or end % block_size == 0) and request.num_preemptions == num_preemptions:
                self.kv_cache.register(request.blocks, request.token_ids, end)
            if reason is not None:
                self.finish(request, reason)
        self.counters.num_generated_tokens += num_sampled
        return changed

    def finish(self, request: Request, reason: FinishReason, error: RequestFailedError | None = None) -> None:
        """End a request in whatever state it is and give back its slot and blocks.

        A launched step may still compute a row of it: its writes come before those of any later owner of the blocks.
        """
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release(request)
        elif request.status is RequestStatus.WAITING:
            self._num_waiting -= 1
        request.finish(reason, error)
        self.counters.num_finished_requests += 1
        if len(self._waiting) > 2 * self._num_waiting + 64:
            self._waiting = [entry for entry in self._waiting if entry[2].status is RequestStatus.WAITING]
            heapq.heapify(self._waiting)

    def requests(self) -> Iterator[Request]:
        """Yield every unfinished request."""
        yield from self.running
        for _, _, request in self._waiting:
            if request.status is RequestStatus.WAITING:
                yield request

    def check_integrity(self) -> None:
        """Assert that slots, queue and blocks are consistent; cheap enough for tests only."""
        assert self._num_waiting == sum(r.status is RequestStatus.WAITING for _, _, r in self._waiting)
        slots = [request.slot for request in self.running]
        assert sorted([*self._free_slots, *(s for s in slots if s is not None)]) == list(
            range(self.config.max_batch_size)
        ), "slots leaked or shared"
        assert self.running == sorted(self.running, key=self._preemption_rank), "the running requests are out of order"
        for request in self.running:
            assert request.status is RequestStatus.RUNNING
            assert len(request.blocks.block_ids) >= self.kv_cache.blocks_for(request.num_computed_tokens)
        self.kv_cache.check_integrity(request.blocks for request in self.requests())
        if not self.has_requests:
            assert self.kv_cache.num_used_blocks == 0, "an idle engine holds blocks"

    def _token_budget(self) -> int:
        for request in self.running:
            if request.num_computed_tokens >= len(request.prompt_token_ids):
                return self.config.max_tokens_per_mixed_step
        return self.config.max_tokens_per_step

    def _schedule_running(self, plan: _StepPlan) -> None:
        """Give decodes their token first, then prompts in progress what is left."""
        # Only decodes can lack a block (a prompt has all of its own since admission). Going from the last to be
        # preempted to the first, a request that lacks one never finds the right victim already planned.
        rows, requests = plan.rows, plan.requests
        block_size = self.kv_cache.block_size
        chunks: list[Request] = []
        for request in tuple(self.running):  # a preemption takes requests out
            start, end = request.num_computed_tokens, request.num_tokens
            if end >= request.max_total_tokens:
                continue  # its last possible token is on its way
            if end - start > 1:
                chunks.append(request)
                continue
            new_block_ids: Sequence[int] = ()
            if start % block_size == 0:
                if request.slot is None or (grown := self._grow(request, end, plan)) is None:
                    continue  # preempted
                new_block_ids = grown
            # As in `_add_row`, for what nearly all rows of nearly all steps are.
            known = request.token_ids
            slot = request.slot
            assert slot is not None
            rows.append(BatchRow(slot, start, 1, known[start:], new_block_ids, True))
            requests.append(request)
            request.num_computed_tokens = end
            request.num_tokens = end + 1
        plan.budget -= len(rows)
        for request in chunks:
            if plan.budget > 0 and request.slot is not None:
                self._add_row(plan, request, min(request.num_uncomputed_tokens, plan.budget), ())

    def _grow(self, request: Request, num_tokens: int, plan: _StepPlan) -> list[int] | None:
        """Return newly allocated blocks, preempting others while that is needed; None when the request gave way."""
        num_blocks = len(request.blocks.block_ids)
        while not self.kv_cache.allocate(request.blocks, num_tokens):
            victim = self._choose_victim(plan)
            self._preempt(victim)
            plan.preempted = True
            if victim is request:
                return None
        return request.blocks.block_ids[num_blocks:]

    def _choose_victim(self, plan: _StepPlan) -> Request:
        """Return the running request to preempt; one that already has a row in this step is not eligible."""
        planned = set(map(id, plan.requests))
        return next(request for request in reversed(self.running) if id(request) not in planned)

    def _preemption_rank(self, request: Request) -> tuple[bool, int, int]:
        """Sort key of the running requests; the greatest is the first to be preempted."""
        return request.num_preemptions < self.config.max_preemptions, -request.priority, request.request_id

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_preemptions += 1
        request.stream.log.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.add(request)

    def _release(self, request: Request) -> None:
        assert request.slot is not None
        self._free_slots.append(request.slot)
        request.slot = None
        self.kv_cache.free(request.blocks)
        request.num_computed_tokens = 0

    def _admit_waiting(self, plan: _StepPlan) -> None:
        while self._free_slots and plan.budget > 0 and (request := self._next_waiting()) is not None:
            if request.num_in_flight or not self._admit(request):
                break
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            num_tokens = min(request.num_uncomputed_tokens, plan.budget)
            plan.slot_inits.append(self._take_slot(request))
            self._add_row(plan, request, num_tokens, list(request.blocks.block_ids))

    def _next_waiting(self) -> Request | None:
        while self._waiting and self._waiting[0][2].status is not RequestStatus.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][2] if self._waiting else None

    def _admit(self, request: Request) -> bool:
        """Take blocks for all tokens of the request, leaving one for each running request to grow into."""
        reserve = len(self.running)
        if self.kv_cache.num_available_blocks <= reserve:
            return False  # without looking for its prefix in each step: its last token needs a block of its own
        num_cached_tokens = self.kv_cache.match_prefix(request.blocks, request.token_ids)
        missing = self.kv_cache.blocks_for(len(request.token_ids)) - len(request.blocks.block_ids)
        if self.kv_cache.num_available_blocks < missing + reserve or not self.kv_cache.allocate(
            request.blocks, len(request.token_ids)
        ):
            self.kv_cache.free(request.blocks)
            return False
        request.num_computed_tokens = num_cached_tokens
        log = request.stream.log
        if log.first_scheduled is None:
            log.first_scheduled = time.monotonic()
            log.num_cached_tokens = num_cached_tokens
            self.kv_cache.count_lookup(len(request.token_ids), num_cached_tokens)
            self.counters.num_prompt_tokens += len(request.token_ids)
            if request.ticket is not None:
                request.ticket.release()
        return True

    def _take_slot(self, request: Request) -> SlotInit:
        request.slot = self._free_slots.pop()
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=self._preemption_rank)
        return SlotInit(
            slot=request.slot,
            token_ids=tuple(request.token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling_params=request.params,
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
        )

    def _add_row(self, plan: _StepPlan, request: Request, num_tokens: int, new_block_ids: Sequence[int]) -> None:
        assert request.slot is not None
        start = request.num_computed_tokens
        end = start + num_tokens
        sample = end == request.num_tokens
        # The last id is not in token_ids yet when it is sampled by a step in flight.
        row = BatchRow(request.slot, start, num_tokens, request.token_ids[start:end], new_block_ids, sample)
        plan.rows.append(row)
        plan.requests.append(request)
        plan.budget -= num_tokens
        request.num_computed_tokens = end
        if sample:
            request.num_tokens += 1

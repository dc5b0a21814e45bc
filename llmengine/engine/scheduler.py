"""The in-flight batching scheduler: which requests compute which tokens in the next step.

There are no prefill and decode phases. Each request has tokens that it wants computed and tokens that are computed. A
step lets running requests catch up first and admits waiting ones with what is left of the token budget, so it mixes
chunks of prompts with decodes. Steps may be scheduled ahead of their predecessors' results (see `llmengine.batch`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter

from llmengine.batch import Batch, BatchRow, StepResult
from llmengine.config import SchedulerConfig
from llmengine.engine.block_allocation import BlockAllocator
from llmengine.engine.fair_queue import FairQueue
from llmengine.engine.grammar_steps import GrammarSteps
from llmengine.engine.held_families import HeldFamilies
from llmengine.engine.kv_cache import BlockTable, KVCacheManager
from llmengine.engine.pace import PromptPace
from llmengine.engine.paused_requests import PausedRequests
from llmengine.engine.preemption import choose_victim
from llmengine.engine.request import Request, RequestStatus
from llmengine.engine.residency import Residency
from llmengine.engine.stats import EngineCounters
from llmengine.engine.step_plan import LaunchedStep, StepPlan, slot_init
from llmengine.errors import RequestFailedError
from llmengine.outputs import FinishReason


def _nothing() -> None:
    """The default of `Scheduler.notify`."""


class Scheduler:
    """Owns the waiting queue, the running set, the slots and the KV blocks. Used by the engine thread alone.

    **Order.** Decodes come first. The rest of the step's budget goes to prompts, in progress or waiting. The tenant
    that was served the least for its weight is next, and among its requests the one with the lowest rank. A rank is the
    time of arrival, put earlier by `priority_ageing_s` for each level of priority. Ranks never change, so waiting costs
    nothing. A tenant is charged for each token that is computed for it the first time.

    **Blocks.** An admitted request gets blocks for all tokens that it has, and one more block whenever it needs one.
    When too few are left, requests are preempted (`choose_victim`) before the step is planned. Their blocks are freed,
    but stay findable in the prefix cache, and they wait again at their old rank. So that requests do not evict each
    other forever, a step that preempts admits nothing, a preempted request comes back only when there is more room, and
    a request that was preempted `max_preemptions` times is spared while another can be chosen.

    **Awaited tokens.** A request with a grammar is scheduled only when its latest token is known and its grammar has
    accepted it; other requests run ahead. If steps sample several tokens of a request, it is scheduled when they are
    known, and it gets blocks for more than one of them only if no other request can lack them.

    **Paused requests** take part in none of this. They keep slot and blocks until others need them, and then lose them
    before any running request does, as if preempted.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_cache: KVCacheManager,
        counters: EngineCounters,
        clock: Callable[[], float] = time.monotonic,
        notify: Callable[[], None] = _nothing,
        max_samples: int = 1,
    ) -> None:
        """Take the parts to work on.

        Args:
            notify: called, on other threads, when `take_grammars` has something to do.
            max_samples: `BackendInfo.max_samples`.
        """
        self.config = config
        self.kv_cache = kv_cache
        self.counters = counters
        self.running: list[Request] = []
        """In the order of admission."""
        self._families = HeldFamilies(self._enqueue_again)
        self._paused = PausedRequests()
        self._allocator = BlockAllocator(kv_cache, max_samples)
        self._clock = clock
        self._waiting: FairQueue[Request] = FairQueue(config.tenant_weights, _is_waiting)
        self._residency = Residency(config, kv_cache, self._allocator, self._paused, counters)
        self._in_flight: deque[LaunchedStep] = deque()
        self._pace = None if config.max_decode_latency_ms is None else PromptPace(config)
        self._updated_at = 0.0
        self._grammars = GrammarSteps(notify)
        self._max_samples = max_samples

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, new and preempted."""
        return len(self._waiting)

    @property
    def num_paused(self) -> int:
        """Requests that wait for `resume()`."""
        return len(self._paused)

    @property
    def longest_paused(self) -> Request:
        """The request that has been paused the longest."""
        return self._paused.longest

    @property
    def num_steps_in_flight(self) -> int:
        """Steps scheduled and not yet updated."""
        return len(self._in_flight)

    @property
    def oldest_step(self) -> LaunchedStep:
        """The step in flight that is updated next."""
        return self._in_flight[0]

    @property
    def has_requests(self) -> bool:
        """True while any request is unfinished."""
        return bool(self.running or self._waiting or self._paused)

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished and not paused."""
        return bool(self.running or self._waiting)

    @property
    def awaits_grammars(self) -> bool:
        """True while there will be something for `take_grammars`."""
        return self._grammars.num_pending > 0

    def add(self, request: Request) -> None:
        """Queue a new request, and its relatives once its prompt is computed."""
        for relative in request.relatives:
            relative.rank = request.stream.log.queued - request.priority * self.config.priority_ageing_s
            relative.share = self._waiting.share(request.tenant)
        self._families.hold(request)
        self._enqueue(request)

    def schedule(self) -> Batch | None:
        """The next step; None when there is nothing to compute now."""
        self._families.release_ready()
        preempted = self._make_room()
        plan = StepPlan()
        chunks = self._schedule_decodes(plan)
        num_decodes = len(plan.rows)
        budget = plan.budget = self._prompt_budget(num_decodes)
        self._schedule_prompts(plan, chunks, may_admit=not preempted)
        if not plan.rows:
            return None
        num_prompt_tokens = budget - plan.budget
        self.counters.num_steps += 1
        self.counters.num_rows += len(plan.rows)
        num_tokens = num_decodes + num_prompt_tokens
        self.counters.num_computed_tokens += num_tokens
        batch = Batch(self.counters.num_steps, plan.rows, plan.slot_inits, plan.masks)
        preemptions = [request.num_preemptions for request in plan.requests]
        scheduled = 0.0 if self._pace is None else self._clock()
        self._in_flight.append(
            LaunchedStep(batch, plan.requests, preemptions, num_prompt_tokens, num_tokens, scheduled)
        )
        return batch

    def update(self, result: StepResult) -> list[Request]:
        """Take in the oldest launched step's result; return the requests whose output has changed or ended.

        Tokens of requests that have ended meanwhile are discarded.
        """
        step = self._in_flight.popleft()
        assert result.step == step.batch.step, f"result of step {result.step} for step {step.batch.step}"
        if self._pace is not None:
            # The step's part of its decodes' latency. It began when it was scheduled, or after the previous one.
            began, self._updated_at = max(step.scheduled, self._updated_at), self._clock()
            self._pace.observe(step.num_prompt_tokens, self._updated_at - began)
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
            if result.prompt_logprobs and slot in result.prompt_logprobs:
                request.add_prompt_logprobs(row.start + 1, result.prompt_logprobs[slot])
            if errors and slot in errors:
                self.finish(request, "error", RequestFailedError(errors[slot]))
                changed.append(request)
                continue
            if row.sample:
                changed.append(request)
                sampled = token_ids[slot]
                if row.sample == 1 and request.grammar is None:  # nearly all rows of nearly all steps
                    token_id = sampled if isinstance(sampled, int) else sampled[0]
                    reason = request.append(token_id, logprobs[slot][0] if logprobs and slot in logprobs else None)
                    num_sampled += 1
                else:
                    reason = self._grammars.append(request, sampled, logprobs.get(slot) if logprobs else None)
                    num_kept = len(request.token_ids) - end
                    num_sampled += num_kept
                    if num_kept > 1 and request.num_preemptions == num_preemptions:
                        end += num_kept - 1
                        request.num_computed_tokens = end
            # A decode fills a block only with its last token.
            if (end - row.start > 1 or end % block_size == 0) and request.num_preemptions == num_preemptions:
                self.kv_cache.register(request.blocks, request.token_ids, end)
            if reason is not None:
                self.finish(request, reason)
        self.counters.num_generated_tokens += num_sampled
        return changed

    def take_grammars(self) -> list[Request]:
        """Make requests schedulable whose grammars have advanced; return those that end: complete, cut off, or failed.

        Waits for quick grammars, for a millisecond at most.
        """
        if not self._grammars.num_pending:
            return []
        ended = []
        for request in self._grammars.take():
            reason, error = self._grammars.outcome(request)
            if reason is not None:
                self.finish(request, reason, error)
                ended.append(request)
        return ended

    def close(self) -> None:
        """Start nothing more on other threads."""
        self._grammars.close()

    def pause(self, request: Request) -> None:
        """Leave a running request out of steps until `resume()`. Tokens from steps in flight are still appended."""
        request.charge_tenant()  # so that its eviction charges nobody while the next in the fair order is admitted
        self.running.remove(request)
        request.status = RequestStatus.PAUSED
        self._paused.add(request)
        self._families.release(request)

    def resume(self, request: Request) -> None:
        """Let a paused request go on. If it has lost its blocks, it waits again at its old rank."""
        if self._paused.remove(request):
            request.status = RequestStatus.RUNNING
            self.running.append(request)
        else:
            self._enqueue_again(request)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        error: RequestFailedError | None = None,
        *,
        keep_prefix: bool = True,
    ) -> None:
        """End a request, whatever its state, and take back its slot and blocks.

        A launched step may still compute a row of it; the row's writes come before those of any later owner of the
        blocks. The request's full blocks stay findable for later prompts unless `keep_prefix` is False. Blocks that
        other requests computed before, or use now, stay findable in any case.
        """
        if not keep_prefix:
            self._allocator.forget_prefix(request)
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._residency.release(request)
        elif request.status is RequestStatus.WAITING:
            request.status = RequestStatus.FINISHED
            self._waiting.left(request.share)
        elif request.status is RequestStatus.PAUSED:
            if self._paused.remove(request):
                self._residency.release(request)
        else:
            self._families.drop(request)
        request.finish(reason, error)
        self._families.release(request)
        request.family = None  # which refers to its members: only a garbage collection would free them
        self.counters.num_finished_requests += 1
        if not self.has_requests:
            self._waiting.forget()

    def requests(self) -> Iterator[Request]:
        """Yield every unfinished request."""
        for request in (*self.running, *self._waiting, *self._paused):
            yield request
            if request.family is not None and request is request.relatives[0]:
                yield from request.family.held

    def borrowed(self, num_tokens: int) -> AbstractContextManager[tuple[int, BlockTable]]:
        """A slot and blocks for `num_tokens` tokens, which are given back, without a trace in the prefix cache.

        Raises `QueueFullError` if no slot is free, or too few blocks.
        """
        return self._residency.borrowed(num_tokens)

    def check_integrity(self) -> None:
        """Assert that slots, queue and blocks are consistent. Too slow for anything but tests."""
        self._residency.check_integrity(self.running, self.requests())
        assert all(request.status is RequestStatus.RUNNING for request in self.running)
        running = [request.share for request in (*self.running, *self._paused.residents)]
        self._waiting.check_integrity(running, [request.share for request in self._waiting])
        if not self.has_requests:
            assert self.kv_cache.num_used_blocks == 0, "an idle engine holds blocks"
            assert self._waiting.num_tenants == 0, "an idle engine remembers tenants"

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        share = request.share
        if share.num_waiting == 0 and self._waiting.num_tenants > 1:
            # The tenant has no claim to what the others got while it had nothing waiting.
            self._charge_running()
            self._waiting.raise_floor(running.share for running in self.running if running.share is not share)
        self._waiting.push(share, request.rank, request.request_id, request)

    def _enqueue_again(self, request: Request) -> None:
        request.share = self._waiting.share(request.tenant)  # the share that it had may have been forgotten
        self._enqueue(request)

    def _charge_running(self) -> None:
        for request in self.running:
            request.charge_tenant()

    def _prompt_budget(self, num_decodes: int) -> int:
        """Tokens that the step may have beside its decodes."""
        for request in self.running:
            if request.num_computed_tokens >= len(request.prompt_token_ids):
                budget = self.config.max_tokens_per_mixed_step - num_decodes
                return budget if self._pace is None else min(budget, self._pace.max_prompt_tokens())
        return self.config.max_tokens_per_step - num_decodes

    def _schedule_decodes(self, plan: StepPlan) -> list[Request]:
        """Give each decode its token; return the requests with more than one token to compute."""
        rows, requests = plan.rows, plan.requests
        block_size = self.kv_cache.block_size
        chunks: list[Request] = []
        for request in self.running:
            start, end = request.num_computed_tokens, request.num_tokens
            if end >= request.max_total_tokens:
                continue  # its final token is being computed
            if end - start > 1:
                chunks.append(request)
                continue
            if request.is_awaited:
                continue
            new_block_ids = self._allocator.grow(request, end) if start % block_size == 0 else ()
            if self._max_samples > 1:
                self._add_row(plan, request, 1, new_block_ids)
                continue
            # The same as `_add_row`, inlined for nearly all rows of nearly all steps.
            if request.grammar is not None:
                plan.mask(request, request.grammar)
            slot = request.slot
            assert slot is not None
            rows.append(BatchRow(slot, start, 1, request.token_ids[start:], new_block_ids, 1))
            requests.append(request)
            request.num_computed_tokens = end
            request.num_tokens = end + 1
        return chunks

    def _make_room(self) -> bool:
        """Preempt until each decode can have the block that it needs now; return whether anything was preempted."""
        # Only decodes can lack a block, and each needs at most one: prompts got all of theirs when they were admitted.
        if self.kv_cache.num_available_blocks >= len(self.running):
            return False
        block_size = self.kv_cache.block_size
        needing = {
            request
            for request in self.running
            if request.num_computed_tokens == len(request.blocks.block_ids) * block_size
            and request.num_tokens < request.max_total_tokens
        }
        preempted = False
        while len(needing) > self.kv_cache.num_available_blocks:
            if self._residency.evict_paused():
                continue
            if self._waiting.num_tenants > 1:
                self._charge_running()
            victim = choose_victim(self.running, self.kv_cache, self.config)
            self._preempt(victim)
            needing.discard(victim)
            preempted = True
        return preempted

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._residency.evict(request)
        self._enqueue(request)

    def _schedule_prompts(self, plan: StepPlan, chunks: list[Request], *, may_admit: bool) -> None:
        """Divide the budget among prompts in progress and waiting requests, in the fair order."""
        may_admit = may_admit and bool(self._waiting) and self._residency.has_slot
        if not chunks and not may_admit:
            return
        if self._waiting.num_tenants > 1:
            self._charge_running()
        chunks.sort(key=attrgetter("place"), reverse=True)
        while plan.budget > 0:
            waiting = self._waiting.peek() if may_admit else None
            if waiting is not None and (not chunks or waiting.place < chunks[-1].place):
                may_admit = self._admit(plan, waiting) and self._residency.has_slot
            elif chunks:
                request = chunks.pop()
                self._add_row(plan, request, min(request.num_uncomputed_tokens, plan.budget), ())
            else:
                return

    def _admit(self, plan: StepPlan, request: Request) -> bool:
        """Admit the first waiting request; False if it must go on waiting, and all others with it."""
        if request.num_in_flight or request.is_awaited:
            return False
        num_cached_tokens = self._residency.take_blocks(plan, request, len(self.running))
        if num_cached_tokens is None:
            return False
        popped = self._waiting.pop()
        assert popped is request, "taking its blocks has changed the fair order"
        self._residency.take_slot(request)
        request.num_computed_tokens = num_cached_tokens
        if request.stream.log.first_scheduled is None:
            self._note_first_admission(request)
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self._families.watch(request)
        plan.slot_inits.append(slot_init(request))
        num_tokens = min(request.num_uncomputed_tokens, plan.budget)
        self._add_row(plan, request, num_tokens, list(request.blocks.block_ids))
        return True

    def _note_first_admission(self, request: Request) -> None:
        log = request.stream.log
        log.first_scheduled = self._clock()
        log.num_cached_tokens = request.num_charged_tokens = request.num_computed_tokens
        if request is request.relatives[0]:
            self.kv_cache.count_lookup(len(request.token_ids), request.num_computed_tokens)
            self.counters.num_prompt_tokens += len(request.token_ids)
        if request.ticket is not None:
            request.ticket.release()

    def _add_row(self, plan: StepPlan, request: Request, num_tokens: int, new_block_ids: Sequence[int]) -> None:
        assert request.slot is not None
        start = request.num_computed_tokens
        end = start + num_tokens
        max_samples = 0
        if end == request.num_tokens:
            max_samples = 1
            if self._max_samples > 1:
                more_block_ids, max_samples = self._allocator.grow_for_samples(request, end, len(self.running))
                new_block_ids = [*new_block_ids, *more_block_ids]
            request.num_tokens += 1
            if request.grammar is not None:
                plan.mask(request, request.grammar)
            elif max_samples > 1:
                request.is_awaited = True
        # The final id is not in token_ids yet if a step in flight samples it.
        row = BatchRow(request.slot, start, num_tokens, request.token_ids[start:end], new_block_ids, max_samples)
        plan.rows.append(row)
        plan.requests.append(request)
        plan.budget -= num_tokens
        request.num_computed_tokens = end
        request.charge_tenant()


def _is_waiting(request: Request) -> bool:
    return request.status is RequestStatus.WAITING

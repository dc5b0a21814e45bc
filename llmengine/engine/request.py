"""Request: the scheduler's state of one request. Touched by the engine thread only."""

from __future__ import annotations

import enum
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from llmengine.batch import TokenLogprobs
from llmengine.engine.admission import AdmissionTicket
from llmengine.engine.fair_queue import TenantShare
from llmengine.engine.kv_cache import BlockTable
from llmengine.engine.stream import OutputStream
from llmengine.errors import RequestFailedError
from llmengine.outputs import FinishReason
from llmengine.sampling_params import SamplingParams
from llmengine.structured.grammar import Grammar
from llmengine.tokenizer.detokenizer import IncrementalDetokenizer


class RequestStatus(enum.Enum):
    """Where a request is: held until its family's prompt is computed, queued (new or preempted), in the running batch,
    paused because its consumer does not read, or ended."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Family:
    """Requests that generate several outputs from one prompt, whose full blocks they share.

    Attributes:
        members: all of the requests. The first, the leader, computes the prompt.
        held: the requests that the scheduler queues only when the prompt is computed.
    """

    members: Sequence[Request]
    held: list[Request] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Request:
    """One request from submission to its end.

    There is no prefill or decode state. A request wants `num_tokens` tokens computed and has `num_computed_tokens`,
    including those that launched steps will compute. The step that computes its final token samples the next one.

    Attributes:
        stream: receives its output; `stream.log.token_ids` are the generated ids.
        prompt_token_ids: the prompt, never empty.
        params: resolved sampling parameters.
        seed: seed of its random numbers.
        stop_token_ids: EOS ids, unless ignored, and the caller's stop ids.
        max_total_tokens: the request ends with "length" when prompt and output together have this many tokens.
        priority: higher is scheduled first, among the requests of its tenant.
        tenant: shares the engine fairly with other tenants; None for the tenant of all requests that name none.
        deadline: `time.monotonic()` at which the request ends with "timeout".
        first_token_deadline: the same, unless it has a token by then.
        cache_salt: the request shares prefix blocks only with requests of an equal salt.
        detokenizer: None if there is no tokenizer.
        grammar: restricts the output; None if nothing does.
        ticket: its place among the requests that wait for their first step.
        token_ids: prompt and output ids that the host knows.
        num_tokens: number of `token_ids` once the launched steps are collected, or a lower bound of it.
        slot: its row in the backend while it runs.
        rank: its place among its tenant's requests, lowest first; set by the scheduler and never changed.
        share: its tenant's share, set by the scheduler.
        family: the requests of the same prompt; None for a single request and for one that has ended. Only the first
            of them is passed to `Scheduler.add`.
        is_awaited: the request cannot be scheduled, because a step is under way that may sample several tokens of it,
            or because its grammar has not accepted its latest token yet.
        num_charged_tokens: leading tokens for which its tenant was charged, or which others had computed before.
    """

    stream: OutputStream
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    max_total_tokens: int
    priority: int = 0
    tenant: str | None = None
    deadline: float | None = None
    first_token_deadline: float | None = None
    cache_salt: Hashable = None
    detokenizer: IncrementalDetokenizer | None = None
    grammar: Grammar | None = None
    ticket: AdmissionTicket | None = None
    family: Family | None = None
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(init=False)
    num_tokens: int = field(init=False)
    blocks: BlockTable = field(init=False)
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    slot: int | None = None
    rank: float = field(init=False)
    share: TenantShare[Request] = field(init=False)
    num_charged_tokens: int = 0
    is_awaited: bool = False

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.num_tokens = len(self.token_ids)
        self.blocks = BlockTable(self.cache_salt)

    @property
    def relatives(self) -> Sequence[Request]:
        """All requests of the same prompt, this one included."""
        return (self,) if self.family is None else self.family.members

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """True while prompt log-probabilities are wanted that no collected step has given."""
        known = self.stream.log.prompt_logprobs
        return self.params.prompt_logprobs is not None and known is not None and len(known) < len(self.prompt_token_ids)

    @property
    def request_id(self) -> int:
        """Number in the order of arrival; unique within an engine."""
        return self.stream.log.request_id

    @property
    def num_in_flight(self) -> int:
        """Launched steps each of which will append at least one token."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that the next steps have to compute; 0 if its final token is being computed."""
        if self.num_tokens >= self.max_total_tokens:
            return 0
        return self.num_tokens - self.num_computed_tokens

    @property
    def place(self) -> tuple[float, float, int]:
        """Sort key of prompts in the fair order, the lowest first."""
        return self.share.service, self.rank, self.request_id

    def charge_tenant(self) -> None:
        """Charge its tenant for the tokens that were computed or planned since the previous charge."""
        if self.num_computed_tokens > self.num_charged_tokens:
            self.share.charge(self.num_computed_tokens - self.num_charged_tokens)
            self.num_charged_tokens = self.num_computed_tokens

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> FinishReason | None:
        """Add a step's tokens to the output, up to the one that ends the request; return the reason if one does.

        `num_tokens` includes one of them already.
        """
        for index, token_id in enumerate(token_ids):
            if index:
                self.num_tokens += 1
            reason = self.append(token_id, logprobs[index] if logprobs is not None else None)
            if reason is not None:
                return reason
        return None

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> FinishReason | None:
        """Add a sampled token to the output and detokenize it; return the reason if it ends the request."""
        log = self.stream.log
        output_ids = log.token_ids
        if not output_ids:
            log.first_token = time.monotonic()
        self.token_ids.append(token_id)
        output_ids.append(token_id)
        if logprobs is not None and log.logprobs is not None:
            log.logprobs.append(logprobs)
        if token_id in self.stop_token_ids and len(output_ids) >= self.params.min_new_tokens:
            log.matched_stop = token_id
            return "stop" if self.detokenizer is None else self._detokenize(self.detokenizer, token_id, ends=True)
        if self.detokenizer is not None and (reason := self._detokenize(self.detokenizer, token_id)) is not None:
            return reason
        return "length" if len(self.token_ids) >= self.max_total_tokens else None

    def add_prompt_logprobs(self, position: int, values: Sequence[TokenLogprobs]) -> None:
        """Add those of prompt tokens from `position` on that were not known before a preemption."""
        if (known := self.stream.log.prompt_logprobs) is not None:
            known += values[len(known) - position :]

    def _detokenize(
        self, detokenizer: IncrementalDetokenizer, token_id: int, ends: bool = False
    ) -> FinishReason | None:
        log = self.stream.log
        may_stop = len(log.token_ids) >= self.params.min_new_tokens
        try:
            log.pieces.append(detokenizer.end(token_id) if ends else detokenizer.push(token_id, check_stop=may_stop))
        except BaseException as fault:  # the caller's tokenizer may panic in Rust, which is not an `Exception`
            self._fail_decoding(fault)
            return "error"
        if detokenizer.stopped is None:
            return "stop" if ends else None
        log.matched_stop = detokenizer.stopped
        return "stop"

    def finish(self, reason: FinishReason, error: RequestFailedError | None = None) -> None:
        """Set the final state of the output. Held-back text is released unless a stop string cuts it off."""
        log = self.stream.log
        self.status = RequestStatus.FINISHED
        if error is not None:
            log.error = error
        if self.detokenizer is not None and self.detokenizer.stopped is None and log.error is None:
            try:
                log.pieces.append(self.detokenizer.finish())
                if reason == "length" and self.detokenizer.stopped is not None:
                    reason, log.matched_stop = "stop", self.detokenizer.stopped
            except BaseException as fault:  # the same as above
                self._fail_decoding(fault)
        if self.ticket is not None:
            self.ticket.release()
        log.finish_reason = reason if log.error is None else "error"
        log.finished = time.monotonic()

    def _fail_decoding(self, fault: BaseException) -> None:
        self.stream.log.error = RequestFailedError(f"the tokenizer failed to decode: {fault!r}")
        self.stream.log.error.__cause__ = fault

"""RemoteRequest: a request that a replica runs, and its output here, which mirrors the one there."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from llmengine.chat.answers.answer_log import AnswerLog
from llmengine.cluster.router import PrefixKeys
from llmengine.cluster.wire import Delta, End, Head, Submit
from llmengine.engine.stream import FamilyStream, OutputStream, Stream
from llmengine.errors import ReplicaDeadError
from llmengine.outputs import FinishReason, OutputLog
from llmengine.request_options import RequestOptions
from llmengine.sampling_params import SamplingParams


class TokenTexts:
    """The texts of tokens that replicas told, as `OutputLog.read_token`."""

    def __init__(self) -> None:
        self._texts: dict[tuple[int, int], str] = {}

    def add(self, texts: Mapping[tuple[int, int], str]) -> None:
        """Remember (position, token id) -> text."""
        self._texts.update(texts)

    def __call__(self, position: int, token_id: int) -> str:
        return self._texts.get((position, token_id), "")


_CUT: Collection[FinishReason] = ("abort", "timeout", "error")
"""Why an output may end before it has all its tokens, and so before those that it had when it was run again."""


@dataclass(slots=True)
class _Rerun:
    """What an output that is run again must bring once more: the tokens and the text that it had."""

    num_tokens: int
    num_chars: int
    tokens_seen: int = 0
    text: str = ""


@dataclass(eq=False, slots=True)
class RemoteRequest:
    """One request of a cluster. Its loop's thread only, except for the stream.

    Attributes:
        key: its number in the cluster, also its id for callers that give none.
        stream: its output, which handles read.
        packed: what a replica is told to run.
        options: how it is run, of which the deadlines count here.
        keys: its prompt for the router.
        replica: number of the replica that runs it; None while there is none.
        num_reruns: how often it was begun again because a replica died.
        refused_by: replicas whose queues were full.
    """

    key: int
    stream: Stream
    packed: bytes
    options: RequestOptions
    keys: PrefixKeys
    replica: int | None = None
    num_reruns: int = 0
    refused_by: set[int] = field(default_factory=set)
    _texts: TokenTexts = field(default_factory=TokenTexts)
    _reruns: dict[int, _Rerun] = field(default_factory=dict)

    def command(self) -> Submit:
        """What tells a replica to run the request, with the time that is left of its deadlines."""
        limits_s = {name: max(remaining_s, 1e-3) for name, remaining_s in self._remaining_s().items()}
        return Submit(self.key, self.packed, limits_s)

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the earliest deadline, negative once it has passed; None if there is none."""
        return min(self._remaining_s().values(), default=None)

    @property
    def running(self) -> list[OutputStream]:
        """The outputs that have not ended."""
        return [member for member in self.stream.members if not member.ended]

    @property
    def has_output(self) -> bool:
        """True once a token has come."""
        return any(member.log.token_ids for member in self.stream.members)

    def restart(self) -> None:
        """Expect everything from the beginning: what the outputs have already must come once more."""
        self.replica = None
        self.num_reruns += 1
        self.refused_by.clear()
        for member in self.running:
            log = member.log
            member.resume = None  # it is another replica's turn to hold the request back
            self._reruns[log.index] = _Rerun(len(log.token_ids), sum(map(len, log.pieces)))

    def _remaining_s(self) -> dict[str, float]:
        """Seconds until each deadline that still counts, by the option's name."""
        limits_s = {"deadline_s": self.options.deadline_s}
        if not self.has_output:
            limits_s["first_token_deadline_s"] = self.options.first_token_deadline_s
        elapsed_s = time.monotonic() - self.stream.log.queued
        return {name: limit_s - elapsed_s for name, limit_s in limits_s.items() if limit_s is not None}

    def apply(self, delta: Delta) -> OutputStream | None:
        """Add what a replica has told to the output; return it if it has anything new to publish.

        Raises `ReplicaDeadError` if a request that is run again gives something other than before.
        """
        member = self.stream.members[delta.member]
        if member.ended:
            return None
        log = member.log
        if delta.head is not None:
            _apply_head(log, delta.head)
        if delta.token_texts is not None:
            log.read_token = self._texts
            self._texts.add(delta.token_texts)
        if delta.member in self._reruns:
            delta = self._without_known(delta, log)
        if delta.token_ids and log.first_token is None:
            log.first_token = time.monotonic()
        log.token_ids += delta.token_ids
        if delta.token_ids or delta.text:
            # Readers cut at the ends of deltas only, so the first token may have the text of all.
            log.pieces += [delta.text, *[""] * (len(delta.token_ids) - 1)]
        if log.logprobs is not None and delta.logprobs is not None:
            log.logprobs += delta.logprobs
        if delta.end is not None:
            _apply_end(log, delta.end)
        return member if delta.token_ids or delta.end is not None else None

    def _without_known(self, delta: Delta, log: OutputLog) -> Delta:
        """The part of a delta that the output does not have yet."""
        rerun = self._reruns[delta.member]
        begin = rerun.tokens_seen
        known = log.token_ids[begin : rerun.num_tokens]
        again = delta.token_ids[: len(known)]
        rerun.tokens_seen += len(delta.token_ids)
        rerun.text += delta.text
        known_text = "".join(log.pieces)[: rerun.num_chars]
        is_over = delta.end is not None
        is_cut = delta.end is not None and delta.end.finish_reason in _CUT
        is_same = again == known[: len(again)] and (
            rerun.text.startswith(known_text) or ((not is_over or is_cut) and known_text.startswith(rerun.text))
        )
        if not is_same or (is_over and not is_cut and rerun.tokens_seen < rerun.num_tokens):
            raise ReplicaDeadError(
                f"the replica that ran the request died after {rerun.num_tokens} tokens, and run again elsewhere the "
                f"request gave other tokens from the {begin + 1}th on"
            )
        if rerun.tokens_seen <= rerun.num_tokens and not is_over:
            return delta._replace(token_ids=[], text="", logprobs=None)
        text = rerun.text[rerun.num_chars :]
        del self._reruns[delta.member]
        num_known = len(again)
        logprobs = None if delta.logprobs is None else delta.logprobs[num_known:]
        return delta._replace(token_ids=delta.token_ids[num_known:], text=text, logprobs=logprobs)


def new_stream(
    key: int, params: SamplingParams, options: RequestOptions, max_unread_tokens: int
) -> OutputStream | FamilyStream:
    """Empty outputs for a request with these parameters."""
    queued = time.monotonic()
    members = []
    for index in range(params.num_outputs):
        log = OutputLog(
            request_id=key,
            queued=queued,
            given_id=options.request_id,
            metadata=options.metadata,
            tenant=options.tenant,
            priority=options.priority,
            index=index,
            family_id=key if params.num_outputs > 1 else None,
        )
        if params.logprobs is not None or params.num_outputs > params.n:
            log.logprobs = []
        members.append(OutputStream(log, options.slow_consumer, max_unread_tokens))
    return members[0] if params.num_outputs == 1 else FamilyStream(members, params.n)


def _apply_head(log: OutputLog, head: Head) -> None:
    log.prompt = head.prompt
    log.prompt_token_ids = head.prompt_token_ids
    log.num_cached_tokens = head.num_cached_tokens
    if head.new_answer_parser is not None and log.answer is None:
        log.answer = AnswerLog(head.new_answer_parser)
    log.prompt_logprobs = None if head.prompt_logprobs is None else list(head.prompt_logprobs)
    if head.queued_s is not None and log.first_scheduled is None:
        log.first_scheduled = min(log.queued + head.queued_s, time.monotonic())


def _apply_end(log: OutputLog, end: End) -> None:
    log.matched_stop = end.matched_stop
    log.num_preemptions = end.num_preemptions
    log.error = None if end.error is None else end.error.restore()
    log.finished = time.monotonic()
    log.finish_reason = end.finish_reason

"""`GenerationOutput`, which callers receive: a cheap immutable view of a request's append-only `OutputLog`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmengine.batch import TokenLogprobs
from llmengine.chat.answers.answer_log import AnswerLog, PieceParser
from llmengine.chat.answers.events import Answer, AnswerEvent, TextDelta, ToolCall
from llmengine.errors import LLMEngineError

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
"""Why a request ended: at EOS or a stop, at a length limit, by the caller's abort, at its deadline, by a failure."""


@dataclass(frozen=True, slots=True)
class RequestTimeline:
    """Moments of a request, in seconds of `time.monotonic()`; None if the moment has not come.

    Attributes:
        queued: the request was submitted.
        first_scheduled: its first tokens became part of a step.
        first_token: the host received its first token.
        finished: it ended, for whatever reason.
        num_preemptions: times that its KV blocks were taken away, to be computed again later.
    """

    queued: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_preemptions: int = 0

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from queueing to the first token."""
        return None if self.first_token is None else self.first_token - self.queued

    @property
    def duration_s(self) -> float | None:
        """Seconds from queueing to the end."""
        return None if self.finished is None else self.finished - self.queued


@dataclass(frozen=True, slots=True)
class Logprob:
    """One of the tokens that were possible at a position.

    Attributes:
        logprob: its log-probability in the model's distribution there.
        rank: 1 for the likeliest token; None beyond the requested alternatives.
        decoded_token: the text that it adds, or would add, at its position, so that those of the chosen tokens make up
            the text. U+FFFD for a part of a character; None without a tokenizer.
    """

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(slots=True, eq=False)
class OutputLog:
    """Everything that one request has put out so far. The engine thread appends; nothing is changed or removed.

    Attributes:
        request_id: the engine's number of the request.
        queued, first_scheduled, first_token, finished, num_preemptions: see `RequestTimeline`.
        given_id, metadata, tenant, priority: the caller's options.
        prompt: text of the prompt; None if the caller gave token ids.
        pieces: the text that each token released ("" while text is held back), and at the end one more for what was
            held back. Their concatenation is the text. Only a token that ends the request may have no piece.
        logprobs: None unless the caller asked for them.
        prompt_logprobs: begins with None for the first token, and is complete when there is a generated token. The
            outputs of one prompt share it.
        index: number of the output among those of its prompt.
        family_id: `request_id` of the prompt's first output; None for a single output.
        read_token: (position counted from the prompt's first token, token id) -> text of the token there.
        num_cached_tokens: prompt tokens whose KV blocks were in the prefix cache.
        matched_stop: the stop string or token id that ended the request.
        answer: divides the text of an answer to a conversation; None for other prompts.
    """

    request_id: int
    queued: float
    given_id: str | None = None
    metadata: Any = None
    tenant: str | None = None
    priority: int = 0
    prompt: str | None = None
    prompt_token_ids: Sequence[int] = ()
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    index: int = 0
    family_id: int | None = None
    read_token: Callable[[int, int], str] | None = None
    num_cached_tokens: int = 0
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None
    error: LLMEngineError | None = None
    answer: AnswerLog | None = None

    @property
    def public_id(self) -> int | str:
        """The id that callers see: their own, else the engine's number. The same for all outputs of one prompt."""
        if self.given_id is not None:
            return self.given_id
        return self.request_id if self.family_id is None else self.family_id


@dataclass(frozen=True, slots=True)
class _KnownTexts:
    """The texts of all tokens at all positions that a pickled output may be asked for."""

    texts: Mapping[tuple[int, int], str]

    def __call__(self, position: int, token_id: int) -> str:
        return self.texts[position, token_id]


class GenerationOutput:
    """One output of a request, up to some moment; `*_delta` is what came since the previous output.

    The concatenated deltas of a stream are the final `text` and `token_ids`. Slices are made when they are asked for,
    so a stream of n tokens does not cost n copies of the text.
    """

    __slots__ = ("_begin", "_end", "_log", "_num_preemptions", "_outputs", "finish_reason")

    def __init__(
        self,
        log: OutputLog,
        begin: int,
        end: int,
        finish_reason: FinishReason | None = None,
        outputs: Sequence[GenerationOutput] = (),
    ) -> None:
        """A view whose delta is the tokens [begin, end)."""
        self._outputs = outputs
        self._log = log
        self._begin = begin
        self._end = end
        self._num_preemptions = log.num_preemptions
        self.finish_reason: FinishReason | None = finish_reason
        """Why the request ended; None while it runs."""

    @property
    def timeline(self) -> RequestTimeline:
        """Moments of the request up to this output."""
        log = self._log
        return RequestTimeline(
            log.queued,
            log.first_scheduled,
            log.first_token,
            log.finished if self.finished else None,
            self._num_preemptions,
        )

    @property
    def request_id(self) -> int | str:
        """The caller's `request_id`, else a number that increases and is unique within the `LLM`.

        It is the same for all outputs of one prompt.
        """
        return self._log.public_id

    @property
    def metadata(self) -> Any:
        """The caller's `metadata`."""
        return self._log.metadata

    @property
    def index(self) -> int:
        """Number of this output among the prompt's `SamplingParams.num_outputs` outputs, from 0."""
        return self._log.index

    @property
    def outputs(self) -> list[GenerationOutput]:
        """All `SamplingParams.n` outputs of the prompt, by index, or best first if `best_of` chose them.

        The other fields of this output are those of the first. A streamed or single output holds itself alone.
        """
        return list(self._outputs) or [self]

    @property
    def prompt(self) -> str | None:
        """Text of the prompt; None if the caller gave token ids."""
        return self._log.prompt

    @property
    def prompt_token_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return list(self._log.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of the prompt's tokens."""
        return len(self._log.prompt_token_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV blocks were in the prefix cache."""
        return self._log.num_cached_tokens

    @property
    def text(self) -> str:
        """Generated text so far, without the prompt; "" without a tokenizer."""
        return "".join(self._log.pieces[: self._end_piece])

    @property
    def text_delta(self) -> str:
        """Text since the previous output. It may be "" while a character is incomplete or text is held back."""
        return "".join(self._log.pieces[self._begin : self._end_piece])

    @property
    def text_pieces_delta(self) -> list[str]:
        """`text_delta`, divided by the tokens that released it.

        There is one piece for each of `token_ids_delta`, "" while text is held back. The final output may lack the
        piece of the token that ended the request, or have one more, of what was held back until then.
        """
        return self._log.pieces[self._begin : self._end_piece]

    @property
    def token_ids(self) -> list[int]:
        """Generated token ids so far, including one that ended the request."""
        return self._log.token_ids[: self._end]

    @property
    def token_ids_delta(self) -> list[int]:
        """Token ids since the previous output."""
        return self._log.token_ids[self._begin : self._end]

    @property
    def num_tokens(self) -> int:
        """Number of tokens generated so far."""
        return self._end

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Log-probabilities of each generated token so far; None unless they were asked for."""
        return None if self._log.logprobs is None else self._log.logprobs[: self._end]

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the generated tokens' log-probabilities so far; None without `logprobs`."""
        logprobs = self.logprobs
        return None if logprobs is None else sum(entry.logprob for entry in logprobs)

    @property
    def decoded_logprobs(self) -> list[dict[int, Logprob]] | None:
        """`logprobs` as one dictionary by token id for each token: the chosen token first, then the alternatives."""
        logprobs = self.logprobs
        if logprobs is None:
            return None
        positions = itertools.count(self.num_prompt_tokens)
        return [self._decoded(*item) for item in zip(positions, self.token_ids, logprobs, strict=False)]

    @property
    def decoded_logprobs_delta(self) -> list[dict[int, Logprob]] | None:
        """The part of `decoded_logprobs` for the tokens since the previous output."""
        logprobs = self._log.logprobs
        if logprobs is None:
            return None
        positions = itertools.count(self.num_prompt_tokens + self._begin)
        entries = logprobs[self._begin : self._end]
        return [self._decoded(*item) for item in zip(positions, self.token_ids_delta, entries, strict=False)]

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Log-probabilities of the prompt's tokens, with None for the first; None unless they were asked for."""
        return None if self._log.prompt_logprobs is None else list(self._log.prompt_logprobs)

    @property
    def decoded_prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """`prompt_logprobs` in the form of `decoded_logprobs`."""
        logprobs = self.prompt_logprobs
        if logprobs is None:
            return None
        items = zip(itertools.count(), self._log.prompt_token_ids, logprobs, strict=False)
        return [None if entry is None else self._decoded(at, token_id, entry) for at, token_id, entry in items]

    @property
    def finished(self) -> bool:
        """True for the final output of a request."""
        return self.finish_reason is not None

    @property
    def matched_stop(self) -> str | int | None:
        """The stop string or token id that ended the request, if `finish_reason` is "stop"; else None."""
        return self._log.matched_stop if self.finished else None

    @property
    def error(self) -> LLMEngineError | None:
        """The cause if `finish_reason` is "error", or "abort" because the consumer did not read; else None."""
        if not self.finished or self._log.error is None:
            return None
        self._log.error.request_id = self.request_id
        return self._log.error

    @property
    def answer(self) -> Answer:
        """The text so far, divided into reasoning, content and tool calls by the form of the chat template.

        Without a conversation, all of it is content.
        """
        return Answer.of(self._events(0))

    @property
    def answer_delta(self) -> list[AnswerEvent]:
        """What came to `answer` since the previous output, as events; see `llmengine.chat.answers`.

        Those of a stream add up to the final `answer`. The list is empty while text may still turn out to be a marker.
        """
        return self._events(self._begin)

    @property
    def new_answer_parser(self) -> Callable[[], PieceParser] | None:
        """Makes a parser that divides the text as `answer` does; None unless the prompt is a conversation."""
        return None if self._log.answer is None else self._log.answer.new_parser

    @property
    def reasoning(self) -> str | None:
        """The reasoning in `answer`; None if there is none."""
        return self.answer.reasoning

    @property
    def content(self) -> str | None:
        """The text for the user in `answer`; None if there is none."""
        return self.answer.content

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls of tools in `answer`."""
        return self.answer.tool_calls

    def _events(self, begin: int) -> list[AnswerEvent]:
        log = self._log
        if log.answer is not None:
            return log.answer.events(log.pieces, begin, self._end_piece, self._end)
        text = "".join(log.pieces[begin : self._end_piece])
        return [TextDelta(text, range(begin, self._end))] if text else []

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle (and copy) the output as it is, without the tokenizer and without later tokens."""
        log = self._log
        kept = dataclasses.replace(
            log,
            token_ids=self.token_ids,
            pieces=log.pieces[: self._end_piece],
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            read_token=self._known_texts(),
            finished=log.finished if self.finished else None,
            num_preemptions=self._num_preemptions,
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
            error=self.error,
            answer=None if log.answer is None else log.answer.copy(log.pieces, self._end_piece, self._end),
        )
        return type(self), (kept, self._begin, self._end, self.finish_reason, self._outputs)

    def _known_texts(self) -> _KnownTexts | None:
        """The texts that replace the tokenizer in a pickle."""
        if self._log.read_token is None:
            return None
        begin = self.num_prompt_tokens
        described = [*enumerate(self.decoded_prompt_logprobs or ()), *enumerate(self.decoded_logprobs or (), begin)]
        return _KnownTexts(
            {(at, id_): one.decoded_token or "" for at, ids in described if ids for id_, one in ids.items()}
        )

    def _decoded(self, position: int, token_id: int, entry: TokenLogprobs) -> dict[int, Logprob]:
        read = self._log.read_token

        def describe(token_id: int, logprob: float, rank: int | None) -> Logprob:
            return Logprob(logprob, rank, None if read is None else read(position, token_id))

        result = {token_id: describe(token_id, entry.logprob, None)}
        for rank, (other, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1):
            result[other] = describe(other, logprob, rank)
        return result

    @property
    def _end_piece(self) -> int | None:
        """End of this output's pieces; None for the final output, which has all of them."""
        return None if self.finished else self._end

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        parts = [f"request_id={self.request_id!r}"]
        if self._log.family_id is not None:
            parts.append(f"index={self.index}")
        parts += [f"text={text!r}", f"num_tokens={self.num_tokens}"]
        parts.append(f"num_prompt_tokens={self.num_prompt_tokens}")
        if self.num_cached_tokens:
            parts.append(f"num_cached_tokens={self.num_cached_tokens}")
        if self.finished:
            parts.append(f"finish_reason={self.finish_reason!r}")
        if self.matched_stop is not None:
            parts.append(f"matched_stop={self.matched_stop!r}")
        if self.error is not None:
            parts.append(f"error={self.error!r}")
        if (ttft := self.timeline.time_to_first_token_s) is not None:
            parts.append(f"ttft={ttft * 1e3:.0f}ms")
        return f"GenerationOutput({', '.join(parts)})"

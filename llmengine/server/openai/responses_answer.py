"""The answer to a chat, written as a response: piece by piece for a stream, and to its end for a body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmengine.chat.answers.events import TextDelta
from llmengine.outputs import GenerationOutput, Logprob
from llmengine.server.errors import as_http_error
from llmengine.server.openai.logprobs import chat_logprobs
from llmengine.server.openai.responses_events import Event, ResponseEvents, new_id
from llmengine.server.openai.responses_input import Item
from llmengine.server.openai.responses_store import StoredResponse
from llmengine.server.parts import as_json, encode, num_reasoning_tokens
from llmengine.server.service import AnswerPiece, ChatAnswer


class ResponseInProgress:
    """A response while its answer comes.

    Attributes:
        answer: the answer.
        events: the response so far.
    """

    def __init__(self, answer: ChatAnswer, events: ResponseEvents, items: Sequence[Item]) -> None:
        self.answer = answer
        self.events = events
        self._items = items
        self._num_reasoning_tokens = 0
        self._logprobs: list[Mapping[int, Logprob]] = []

    async def finish(self) -> None:
        """Read the answer to its end. Raises what reading raises."""
        async for piece in self.answer:
            self.add(piece)

    def add(self, piece: AnswerPiece) -> list[Event]:
        """The events for a piece of the answer."""
        self._num_reasoning_tokens += num_reasoning_tokens(piece.events)
        self._logprobs += piece.output.decoded_logprobs_delta or ()
        events: list[Event] = []
        for part in piece.events:
            if isinstance(part, TextDelta) and self.answer.call.params.logprobs is not None:
                events += self.events.text(part.text, self._text_logprobs(part.tokens))
            else:
                events += encode(self.events, part)
        if piece.output.finished:
            reason = "max_output_tokens" if piece.output.finish_reason == "length" else None
            events += self.events.end(self._usage(piece.output), reason)
        return events

    def fail(self, error: Exception) -> list[Event]:
        """The events that say that the answer failed."""
        fault = as_http_error(error)
        code = "rate_limit_exceeded" if fault.status == 429 else "server_error"
        return self.events.fail("invalid_prompt" if fault.status == 400 else code, fault.message)

    def stored(self) -> StoredResponse:
        """The response with its conversation, to be kept."""
        response = self.events.response
        items = [{**item, "id": item.get("id") or new_id("item")} for item in self._items]
        return StoredResponse(as_json(response), [*map(as_json, items)], [*map(as_json, response["output"])])

    def _text_logprobs(self, tokens: range) -> list[dict[str, Any]]:
        num_top = self.answer.call.params.logprobs or 0
        entries = chat_logprobs(self._logprobs[tokens.start : tokens.stop], num_top)["content"]
        return [{**entry, "bytes": entry["bytes"] or []} for entry in entries]

    def _usage(self, output: GenerationOutput) -> dict[str, Any]:
        return {
            "input_tokens": output.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": output.num_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": output.num_prompt_tokens + output.num_tokens,
        }

"""Chunks of OpenAI's streams, written as text around what changes: most of a chunk is the same for a whole answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

from llmengine.outputs import GenerationOutput
from llmengine.server.errors import HttpError, openai_error
from llmengine.server.sse import event

DONE = b"data: [DONE]\n\n"
"""The event after the last chunk."""

json_string = encode_basestring_ascii
"""A string as JSON text."""


class Chunks:
    """Encodes the chunks of one stream."""

    def __init__(self, answer_id: str, kind: str, created: int, model: str, *, include_usage: bool) -> None:
        head = json.dumps({"id": answer_id, "object": kind, "created": created, "model": model})
        self._begin = f'{head[:-1]}, "choices": ['
        self._end = '], "usage": null}' if include_usage else "]}"
        self._include_usage = include_usage

    def chunk(self, choice: str) -> bytes:
        """A chunk with one choice, which is JSON text."""
        return event(f"{self._begin}{choice}{self._end}")

    def last(self, usage: Mapping[str, Any]) -> bytes:
        """What follows the last choice: the usage, if it was asked for, and the end of the stream."""
        if not self._include_usage:
            return DONE
        return event(f'{self._begin}], "usage": {json.dumps(usage)}}}') + DONE


def encode_error(fault: HttpError) -> bytes:
    """The event of an error in a stream, which ends it."""
    return event(json.dumps(openai_error(fault))) + DONE


class UsageCount:
    """Tokens of an answer: its prompts once each, and all outputs. `add` takes the final output of each."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._num_tokens = 0

    def add(self, output: GenerationOutput, prompt: int = 0, *, prompt_only: bool = False) -> None:
        """Count a finished output of a prompt, which is given by its number."""
        self._prompts.setdefault(prompt, (output.num_prompt_tokens, output.num_cached_tokens))
        self._num_tokens += 0 if prompt_only else output.num_tokens

    def as_dict(self) -> dict[str, Any]:
        """The usage as OpenAI's API shows it."""
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": prompt_tokens + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }

"""`truncation: "auto"`: the oldest turns of a conversation are left out until the rest fits the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmengine.server.service import ChatCall, Service

_INSTRUCTIONS = ("system", "developer")


async def without_oldest_turns(service: Service, call: ChatCall, room: int) -> ChatCall:
    """The chat without as many of its oldest turns as it takes to fit the context, with room for `room` new tokens.

    Instructions at its beginning stay, and so does the last turn, even if that alone does not fit.
    """
    limit = service.max_total_tokens - room
    choices = [replace(call, messages=messages) for messages in _shortened(call.messages)]
    low, high = 0, len(choices) - 1
    while low < high:  # the first choice that fits, or the last one
        middle = low if low == 0 and high == len(choices) - 1 else (low + high) // 2
        if await service.count_tokens(choices[middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    return choices[low]


def _shortened(messages: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """The conversation, and what is left of it without its first turn, its first two turns, and so on."""
    head = next((index for index, message in enumerate(messages) if message["role"] not in _INSTRUCTIONS), 0)
    turns = [index for index, message in enumerate(messages) if message["role"] == "user" and index > head]
    return [messages, *([*messages[:head], *messages[begin:]] for begin in turns)]

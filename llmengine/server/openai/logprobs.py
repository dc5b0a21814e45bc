"""Log-probabilities in the two forms of OpenAI's API: that of chats, and that of completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmengine.outputs import Logprob

_LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot hold."""

Entry = Mapping[int, Logprob]
"""The tokens of one position by id: the chosen one, then the likeliest ones."""


def chat_logprobs(entries: Iterable[Entry], num_top: int) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = []
    for entry in entries:
        chosen = next(iter(entry.values()))
        top = [_token(one) for one in _likeliest(entry, num_top)]
        content.append({**_token(chosen), "top_logprobs": top})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Collects `logprobs` of a completion's choice, whose text offsets go on from chunk to chunk."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._offset = 0
        self._fields = self._empty()

    def add_unknown(self, text: str) -> None:
        """A prompt's first token, which has no log-probability."""
        self._append(text, None, None)

    def add(self, entries: Iterable[Entry]) -> None:
        """The next tokens."""
        for entry in entries:
            chosen = next(iter(entry.values()))
            text = chosen.decoded_token or ""
            top = {one.decoded_token or "": _finite(one.logprob) for one in _likeliest(entry, self._num_top)}
            self._append(text, _finite(chosen.logprob), top if self._num_top else None)

    def take(self) -> dict[str, Any]:
        """The field for all tokens since the previous call."""
        fields, self._fields = self._fields, self._empty()
        return fields

    def _append(self, text: str, logprob: float | None, top: dict[str, float] | None) -> None:
        values = (text, logprob, top, self._offset)
        for name, value in zip(self._fields, values, strict=True):
            self._fields[name].append(value)
        self._offset += len(text)

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}


def _likeliest(entry: Entry, num_top: int) -> list[Logprob]:
    ranked = [one for one in entry.values() if one.rank is not None and one.rank <= num_top]
    return sorted(ranked, key=lambda one: one.rank or 0)


def _token(one: Logprob) -> dict[str, Any]:
    text = one.decoded_token or ""
    # A part of a character has bytes, but its text does not show them.
    known = None if "\ufffd" in text else list(text.encode(errors="replace"))
    return {"token": text, "logprob": _finite(one.logprob), "bytes": known}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)

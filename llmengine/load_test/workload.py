"""Prompts of a load: made up of common words, with a length in tokens, or read from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmengine.errors import ConfigError
from llmengine.load_test.records import LoadRequest, Target

# Each is one token of the usual vocabularies, with the space before it.
_WORD_LIST = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face level office door health person art war history party result change morning reason research "
    "girl guy moment air teacher force education good new first last long great little own other old big high small "
    "large next early young important few public bad same able make know take see come think look want give use find "
    "tell ask seem feel try leave call"
)
_WORDS = tuple(_WORD_LIST.split())

_PROBE_WORDS = (16, 144)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A number of tokens, drawn evenly from [low, high]."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class WordScale:
    """How a target counts: a prompt of n words has `tokens` + n * `tokens_per_word` tokens."""

    tokens: float
    tokens_per_word: float

    def num_words(self, num_tokens: int) -> int:
        """Words of a prompt that has about so many tokens; at least 1."""
        return max(1, round((num_tokens - self.tokens) / self.tokens_per_word))


async def measure_scale(target: Target, chat: bool) -> WordScale:
    """The scale of a target, from its counts of two prompts: so no tokenizer is needed here."""
    rng = random.Random(0)
    counts = [
        await target.count_prompt_tokens(_as_request(_text(rng, words), chat, output_tokens=1))
        for words in _PROBE_WORDS
    ]
    per_word = (counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
    if per_word <= 0:
        raise ConfigError(f"prompts of {_PROBE_WORDS} words have {counts} tokens by the endpoint's own count")
    return WordScale(counts[0] - per_word * _PROBE_WORDS[0], per_word)


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Random prompts; no two are alike, apart from their prefixes.

    Attributes:
        shared_prefix_tokens: tokens at the start of each prompt that it has in common with others; they count towards
            `prompt_tokens`.
        num_prefixes: so many different prefixes take turns.
    """

    prompt_tokens: Lengths
    output_tokens: Lengths
    shared_prefix_tokens: int = 0
    num_prefixes: int = 1

    def __post_init__(self) -> None:
        if self.shared_prefix_tokens >= self.prompt_tokens.low and self.shared_prefix_tokens:
            raise ConfigError(
                f"shared_prefix_tokens={self.shared_prefix_tokens} leaves nothing of prompt_tokens={self.prompt_tokens}"
            )

    def requests(self, scale: WordScale, *, chat: bool, seed: int) -> Iterator[LoadRequest]:
        """Requests without end, the same for the same arguments."""
        rng = random.Random(f"prefixes {seed}")
        prefix_words = round(self.shared_prefix_tokens / scale.tokens_per_word)
        prefixes = [_text(rng, prefix_words) for _ in range(self.num_prefixes)]
        rng = random.Random(f"prompts {seed}")
        index = 0
        while True:
            own_words = max(1, scale.num_words(self.prompt_tokens.draw(rng)) - prefix_words)
            text = " ".join(part for part in (prefixes[index % self.num_prefixes], _text(rng, own_words)) if part)
            yield _as_request(text, chat, self.output_tokens.draw(rng))
            index += 1

    def __str__(self) -> str:
        text = f"{self.prompt_tokens} -> {self.output_tokens} tokens"
        if not self.shared_prefix_tokens:
            return text
        return f"{text}, {self.shared_prefix_tokens} of them shared ({self.num_prefixes} different)"


def read_prompts(path: Path, output_tokens: Lengths, *, chat: bool, seed: int) -> list[LoadRequest]:
    """The prompts of a file with one JSON object a line: "prompt" or "messages", and perhaps "output_tokens".

    Raises `ConfigError` for a file that cannot be read, or a line that is anything else.
    """
    rng = random.Random(f"prompts {seed}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    found = [
        _read_line(f"{path}:{number}", line, output_tokens.draw(rng), chat)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise ConfigError(f"{path}: no prompts")
    return found


def _read_line(place: str, line: str, output_tokens: int, chat: bool) -> LoadRequest:
    try:
        item: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(item, dict) or not item.keys() <= {"prompt", "messages", "output_tokens"}:
        raise ConfigError(f"{place}: must be an object with 'prompt' or 'messages', and 'output_tokens' if it likes")
    limit = item.get("output_tokens", output_tokens)
    if type(limit) is not int or limit < 1:
        raise ConfigError(f"{place}: output_tokens must be an integer of at least 1, not {limit!r}")
    prompt, messages = item.get("prompt"), item.get("messages")
    if isinstance(prompt, str) and messages is None:
        return _as_request(prompt, chat, limit)
    if prompt is None and isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages):
        if not chat:
            raise ConfigError(f"{place}: messages need the chat API")
        return LoadRequest(None, messages, limit)
    raise ConfigError(f"{place}: must have either 'prompt', a string, or 'messages', a list of objects")


def _as_request(text: str, chat: bool, output_tokens: int) -> LoadRequest:
    if chat:
        return LoadRequest(None, [{"role": "user", "content": text}], output_tokens)
    return LoadRequest(text, None, output_tokens)


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_words))


def cycle_requests(requests: Sequence[LoadRequest]) -> Iterator[LoadRequest]:
    """The requests again and again."""
    while True:
        yield from requests

"""A lower bound of the number of tokens in a text, so that a text that cannot fit is refused without tokenizing it.

A token stands for at most as many characters of the text as it has itself, with two exceptions: something shortens the
text (a normalizer, a pre-tokenizer that drops characters, a token that swallows the spaces beside it), or one token
stands for many characters that are not in the vocabulary. If either is possible there is no bound, so no prompt that
fits is ever refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

_BYTE_TOKENS = frozenset(f"<0x{value:02X}>" for value in range(256))

_UTF8_BYTES = sorted({*range(0xF5)} - {0xC0, 0xC1})

_MANY_CHARS = 2**20
"""Characters that are encoded as UTF-8 within a millisecond."""

_NUM_COMPOSED = 4
"""Most characters that one character of NFC or NFKC is composed of (UAX #15: UTF-32 expands 4 times at most)."""

_KEEPING_PRE_TOKENIZERS = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"})
_SPLITTING_PRE_TOKENIZERS = frozenset({"Split", "Punctuation"})
"""Pre-tokenizers that keep every character, unless `behavior` says that they remove what they split at."""

_GROWING_NORMALIZERS = frozenset({"NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel"})


class TextBound:
    """A lower bound of the number of tokens, for one `tokenizers.Tokenizer`. Any thread.

    Args:
        backend: the tokenizer.
        tokens: its vocabulary, added tokens included.
    """

    def __init__(self, backend: Any, tokens: Iterable[str]) -> None:
        self._backend = backend
        vocabulary = frozenset(tokens)
        added = list(backend.get_added_tokens_decoder().values())
        self._swallowing = tuple(token.content for token in added if token.lstrip or token.rstrip)
        """Tokens that swallow any number of spaces beside them."""
        self._dropped = _dropped_bytes(backend, vocabulary)
        self._max_chars = _max_chars_per_token(backend, vocabulary, [token.content for token in added])

    def min_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens in `text`; 0 if none is known."""
        if self._max_chars is None or self._dropped is None or self._backend.truncation is not None:
            return 0
        if any(token in text for token in self._swallowing) or _has_any_byte(text, self._dropped):
            return 0
        return math.ceil(len(text) / self._max_chars)


def _has_any_byte(text: str, values: Iterable[int]) -> bool:
    """True if the UTF-8 form of `text` contains any of these bytes."""
    values = [value for value in values if value < 0x80 or not text.isascii()]
    for begin in range(0, len(text) if values else 0, _MANY_CHARS):  # lets other threads run in between
        data = text[begin : begin + _MANY_CHARS].encode(errors="surrogatepass")
        if any(value in data for value in values):
            return True
    return False


def _max_chars_per_token(backend: Any, tokens: frozenset[str], added: Iterable[str]) -> float | None:
    """Most characters of a text that one token can stand for; None if there is no bound."""
    normalizer, pre_tokenizer = _pipeline_parts(backend.normalizer), _pipeline_parts(backend.pre_tokenizer)
    if normalizer is None or pre_tokenizer is None:
        return None
    factor = 1.0
    for part in normalizer:
        shrinking = _max_shrink_factor(part)
        if shrinking is None:
            return None
        factor *= shrinking
    if not all(_keeps_text(part) for part in pre_tokenizer):
        return None
    # Added tokens are looked for in the normalized text as well, in their normalized form.
    normalized = () if backend.normalizer is None else map(backend.normalizer.normalize_str, added)
    return factor * max((len(token) for token in (*tokens, *normalized)), default=1)


def _pipeline_parts(component: Any) -> list[Mapping[str, Any]] | None:
    """The JSON objects that a normalizer or pre-tokenizer consists of; None if it has no such form."""
    if component is None:
        return []
    try:
        description = json.loads(component.__getstate__())
    except Exception:  # a component written in Python
        return None
    return list(_flat_parts(description))


def _flat_parts(description: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if description.get("type") != "Sequence":
        yield description
        return
    for name in ("normalizers", "pretokenizers"):
        for part in description.get(name, ()):
            yield from _flat_parts(part)


def _max_shrink_factor(normalizer: Mapping[str, Any]) -> float | None:
    """Most characters that the normalizer may turn into one; None if there is no limit."""
    kind = normalizer.get("type")
    if kind in _GROWING_NORMALIZERS:
        return 1.0
    if kind in ("NFC", "NFKC"):
        return _NUM_COMPOSED
    if kind == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return max(1.0, len(pattern) / len(content)) if pattern and content else None
    return None


def _keeps_text(pre_tokenizer: Mapping[str, Any]) -> bool:
    kind = pre_tokenizer.get("type")
    if kind in _SPLITTING_PRE_TOKENIZERS:
        return pre_tokenizer.get("behavior") in ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
    return kind in _KEEPING_PRE_TOKENIZERS


def _dropped_bytes(backend: Any, tokens: frozenset[str]) -> list[int] | None:
    """Bytes of UTF-8 that may have no token of their own; None if any text may lack tokens."""
    model = backend.model
    kind = type(model).__name__
    if kind not in ("BPE", "Unigram"):
        return None
    if getattr(model, "byte_fallback", False) and tokens >= _BYTE_TOKENS:
        return []
    if kind == "BPE" and model.unk_token is not None and not model.fuse_unk:
        return []
    parts = (*(_pipeline_parts(backend.normalizer) or ()), *(_pipeline_parts(backend.pre_tokenizer) or ()))
    if not any(part.get("type") == "ByteLevel" for part in parts):
        return None
    return [value for value in _UTF8_BYTES if _byte_level_char(value) not in tokens]


def _byte_level_char(value: int) -> str:
    """The character that stands for a byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    unprintable = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    return chr(0x100 + unprintable.index(value)) if value in unprintable else chr(value)

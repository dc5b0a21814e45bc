"""Repeated keys of JSON objects, which a grammar cannot rule out, since it would have to remember earlier keys.

A parser keeps the last of two equal keys, so an object with a repeated key has fewer properties than it shows and could
violate `minProperties`. Keys are compared as they are written, so each key must have only one spelling: the grammar
allows no escapes of the form `\\u0061`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_OPEN_OBJECT, _OPEN_ARRAY, _CLOSE_OBJECT, _CLOSE_ARRAY, _COMMA, _COLON = b"{[}],:"
_NO_KEYS: frozenset[bytes] = frozenset()


class QuoteTokens:
    """The few tokens of a vocabulary that can end a key: those with a quotation mark in their text.

    Attributes:
        text_of: returns the bytes of a token.
        with_two: bytes and id of the tokens with more than one quotation mark, which may contain whole keys.
    """

    __slots__ = ("_ids", "_texts", "text_of", "with_two")

    def __init__(self, text_of: Callable[[int], bytes], vocab_size: int) -> None:
        self.text_of = text_of
        texts = ((text_of(token_id), token_id) for token_id in range(vocab_size))
        found = sorted((text, token_id) for text, token_id in texts if b'"' in text)
        self._texts = [text for text, _ in found]
        self._ids = [token_id for _, token_id in found]
        self.with_two = [(text, token_id) for text, token_id in found if text.count(b'"') > 1]

    def beginning_with(self, text: bytes) -> Sequence[int]:
        """Ids of the tokens that begin with `text`, which contains a quotation mark."""
        first = bisect_left(self._texts, text)
        last = bisect_left(self._texts, text[:-1] + bytes([text[-1] + 1]), first)
        return self._ids[first:last]


class KeyTracker:
    """A position in a JSON text, with the keys of the objects that are open there. Immutable: see `after`.

    Attributes:
        repeats: True if the latest piece of text ended a key that its object already had.
    """

    __slots__ = ("_escaped", "_expects_key", "_frames", "_key", "_quoted", "repeats")

    def __init__(self) -> None:
        """Begin at the start of a text."""
        # For each enclosing object its keys so far; for each enclosing array None.
        self._frames: tuple[frozenset[bytes] | None, ...] = ()
        self._expects_key = False
        self._quoted = False
        self._escaped = False
        self._key: bytes | None = None  # the part of the current key that is written so far
        self.repeats = False

    def after(self, text: bytes) -> KeyTracker:
        """The position after more text."""
        other = KeyTracker()
        other._frames, other._expects_key = self._frames, self._expects_key
        other._quoted, other._escaped, other._key = self._quoted, self._escaped, self._key
        for byte in text:
            if other._quoted:
                other._read_in_string(byte)
            else:
                other._read_structure(byte)
        return other

    def repeating_tokens(self, tokens: QuoteTokens) -> list[int]:
        """Ids of the tokens that would end a key that the object already has."""
        found: list[int] = []
        if self._key is not None and self._frames[-1]:
            for key in self._frames[-1]:
                if key.startswith(self._key):
                    found += tokens.beginning_with(key[len(self._key) :] + b'"')
        found += [token_id for text, token_id in tokens.with_two if self.after(text).repeats]
        return found

    def _read_in_string(self, byte: int) -> None:
        if self._escaped:
            self._escaped = False
        elif byte == _BACKSLASH:
            self._escaped = True
        elif byte == _QUOTE:
            self._quoted = False
            if self._key is not None:
                self._add(self._key)
            return
        if self._key is not None:
            self._key += bytes((byte,))

    def _read_structure(self, byte: int) -> None:
        if byte == _QUOTE:
            self._quoted = True
            self._key = b"" if self._expects_key else None
        elif byte in (_OPEN_OBJECT, _OPEN_ARRAY):
            self._frames = (*self._frames, _NO_KEYS if byte == _OPEN_OBJECT else None)
            self._expects_key = byte == _OPEN_OBJECT
        elif byte in (_CLOSE_OBJECT, _CLOSE_ARRAY):
            self._frames = self._frames[:-1]
            self._expects_key = False
        elif byte == _COMMA:
            self._expects_key = bool(self._frames) and self._frames[-1] is not None
        elif byte == _COLON:
            self._expects_key = False

    def _add(self, key: bytes) -> None:
        self._key = None
        keys = self._frames[-1] if self._frames else None
        if keys is not None:
            self.repeats = self.repeats or key in keys
            self._frames = (*self._frames[:-1], keys | {key})


@dataclass(frozen=True, slots=True)
class UniqueKeys:
    """A position in generated text, and the vocabulary of the text.

    Attributes:
        must_differ: True if a repeated key could violate the schema; the grammar then fails where only such a key can
            come next.
    """

    tokens: QuoteTokens
    place: KeyTracker
    must_differ: bool

    def after(self, token_id: int) -> UniqueKeys:
        """The position after a token."""
        return replace(self, place=self.place.after(self.tokens.text_of(token_id)))

    def repeating_tokens(self) -> list[int]:
        """Ids of the tokens that would end a key that the object already has."""
        return self.place.repeating_tokens(self.tokens)

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Number of the tokens, in order, that repeat no key."""
        keys = self
        for index, token_id in enumerate(token_ids):
            keys = keys.after(token_id)
            if keys.place.repeats:
                return index
        return len(token_ids)

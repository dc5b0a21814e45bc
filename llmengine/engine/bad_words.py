"""Bad words that are given as text: the token ids that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

from llmengine.errors import InvalidRequestError
from llmengine.tokenizer.protocol import ChatTokenizer, Tokenizer, check_text

WordIds = tuple[int, ...]


def bad_word_ids(tokenizer: Tokenizer | None, words: Sequence[str | Sequence[int]]) -> tuple[WordIds, ...]:
    """Token ids of `words`: each string as it is tokenized at the start of a text and after a space.

    Many vocabularies have a separate token for a word after a space. Where the ids after a space end with those at the
    start of a text, as with bytes, the latter suffice. Raises `InvalidRequestError` for a string that has no tokens, or
    if there is no tokenizer.
    """
    found: list[WordIds] = []
    for word in words:
        if not isinstance(word, str):
            found.append(tuple(word))
        elif tokenizer is None:
            raise InvalidRequestError(f"bad_words holds {word!r:.200}, which needs a tokenizer; use token ids")
        else:
            found += _variants(tokenizer, word)
    return tuple(dict.fromkeys(found))


def _variants(tokenizer: Tokenizer, word: str) -> list[WordIds]:
    text = word.lstrip(" ") or word
    try:
        check_text(text)
    except InvalidRequestError as fault:
        raise InvalidRequestError(f"bad_words holds {word!r:.200}, which cannot be tokenized: {fault}") from None
    plain, spaced = _encode(tokenizer, text), _encode(tokenizer, " " + text)
    if not plain:
        raise InvalidRequestError(f"bad_words holds {word!r}, which has no tokens")
    return [plain] if spaced[-len(plain) :] == plain else [plain, spaced]


def _encode(tokenizer: Tokenizer, text: str) -> WordIds:
    """Ids of `text` without special tokens around it."""
    if isinstance(tokenizer, ChatTokenizer):
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    special: frozenset[int] = frozenset(getattr(tokenizer, "special_ids", ()))
    ids = list(tokenizer.encode(text))
    while ids and ids[0] in special:
        ids.pop(0)
    while ids and ids[-1] in special:
        ids.pop()
    return tuple(ids)

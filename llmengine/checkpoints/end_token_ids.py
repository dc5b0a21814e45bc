"""Ids of the tokens that end an answer, as a checkpoint's files name them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import chain

from llmengine.checkpoints.metadata_fields import Fields
from llmengine.errors import CorruptFileError
from llmengine.tokenizer.end_tokens import gguf_known_end_ids

logger = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
_GGUF_KEYS = (
    *(f"{_PREFIX}{name}_token_id" for name in ("eos", "eot", "eom", "eog", "fim_pad", "fim_rep", "fim_sep")),
    *(f"{_PREFIX}{name}_token_ids" for name in ("eos", "eog")),
)


def ids_in_vocabulary(fields: Fields, key: str, vocab_size: int) -> tuple[int, ...]:
    """Ids under `key` that the model can generate, each of them in [0, vocab_size).

    Ids outside the vocabulary are dropped with a warning as long as others are inside: some fine-tunes name an
    end-of-turn token for which their embedding has no row. Raises `CorruptFileError` naming file, key and id if all of
    them are outside, since no answer would ever end.
    """
    ids = fields.token_ids(key)
    known = tuple(token_id for token_id in ids if token_id < vocab_size)
    if len(known) < len(ids):
        outside = next(token_id for token_id in ids if token_id >= vocab_size)
        message = f"{fields.where}: {key} contains {outside}, which is outside the model's vocabulary [0, {vocab_size})"
        if not known:
            raise CorruptFileError(message)
        logger.warning("%s; this token can never be generated", message)
    return known


def hf_end_ids(config: Fields, generation: Fields, vocab_size: int) -> tuple[int, ...]:
    """EOS ids in generation_config.json and in config.json, including its nested object `text_config`.

    Raises `CorruptFileError` as `ids_in_vocabulary` does.
    """
    places = [generation, config, *([config.fields("text_config")] if config.has("text_config") else [])]
    return unique_ids(chain.from_iterable(ids_in_vocabulary(place, "eos_token_id", vocab_size) for place in places))


def gguf_end_ids(metadata: Fields, vocab_size: int) -> tuple[int, ...]:
    """Ids that GGUF metadata names as ends of text, turn or message, then ids of tokens that are known to be ends.

    Raises `CorruptFileError` as `ids_in_vocabulary` does.
    """
    tokens, types = (metadata.values.get(_PREFIX + name) for name in ("tokens", "token_type"))
    known: Iterable[int] = ()
    if isinstance(tokens, list):  # the tokenizer's reader reports malformed ones
        fits = isinstance(types, list) and len(types) == len(tokens)
        known = sorted(item for item in gguf_known_end_ids(tokens, types if fits else None) if item < vocab_size)
    return unique_ids((*gguf_named_end_ids(metadata, vocab_size), *known))


def gguf_named_end_ids(metadata: Fields, vocab_size: int) -> tuple[int, ...]:
    """The first part of `gguf_end_ids`: ids that the metadata names."""
    return unique_ids(chain.from_iterable(ids_in_vocabulary(metadata, key, vocab_size) for key in _GGUF_KEYS))


def unique_ids(ids: Iterable[int]) -> tuple[int, ...]:
    """The ids without repetitions, in first-seen order."""
    return tuple(dict.fromkeys(ids))

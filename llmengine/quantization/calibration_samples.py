"""The texts whose activations calibration looks at, as token ids: the package's, or a caller's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any, Protocol

from llmengine.errors import ConfigError, LLMEngineError
from llmengine.quant_config import QuantConfig

SAMPLE_TOKENS = 512
"""Most tokens of a sample."""

_LEAST_TOKENS = 32
"""A long text's rest of fewer tokens than this is left out."""


class PromptTokenizer(Protocol):
    """What calibrating needs of a model's tokenizer.

    Chats need a method `apply_chat_template` as well, see `ChatTokenizer`.
    """

    def encode(self, text: str) -> Sequence[int]:
        """The ids of `text`, with the special tokens that the model expects around a prompt."""


def calibration_samples(
    config: QuantConfig, vocab_size: int, context: int, get_tokenizer: Callable[[], PromptTokenizer | None]
) -> list[list[int]]:
    """Token ids of `config.num_calibration_samples` samples, each of up to `SAMPLE_TOKENS` tokens.

    Longer prompts are cut into several. The seed chooses among all samples, so the result depends on nothing else.

    Args:
        context: most tokens that the model can take.
        get_tokenizer: called unless the prompts are token ids.

    Raises `ConfigError` for fewer samples than wanted, for texts without a tokenizer, and for token ids that are not
    in the vocabulary.
    """
    limit = min(SAMPLE_TOKENS, context)
    prompts: Any = config.calibration_prompts
    if prompts is not None and isinstance(prompts[0][0], int):
        found = [piece for ids in prompts for piece in _pieces(list(ids), limit)]
    else:
        tokenizer = get_tokenizer()
        if tokenizer is None:
            raise ConfigError(
                f"quant_config.method={config.method!r} calibrates on texts, which needs a tokenizer; pass "
                "calibration_prompts=[token ids, ...], or set method='rtn', which needs none"
            )
        if prompts is None:
            found = list(_built_in(tokenizer, limit))
        else:
            encode = partial(_encoded_prompt, tokenizer)
            found = [piece for ids in map(encode, prompts) for piece in _pieces(ids, limit)]
    wanted = config.num_calibration_samples
    if len(found) < wanted:
        source = "the package's texts have" if prompts is None else "calibration_prompts have"
        raise ConfigError(
            f"quant_config.num_calibration_samples={wanted} exceeds the {len(found)} samples of up to {limit} tokens "
            f"that {source}; set num_calibration_samples={len(found)} or give more prompts"
        )
    for ids in found:
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
            raise ConfigError(
                f"quant_config.calibration_prompts hold token id {wrong}, outside the vocabulary [0, {vocab_size})"
            )
    random.Random(config.calibration_seed).shuffle(found)
    return found[:wanted]


def _pieces(ids: list[int], limit: int) -> Iterator[list[int]]:
    """Yield consecutive pieces of up to `limit` tokens; a short rest is left out."""
    for begin in range(0, len(ids), limit):
        if begin == 0 or len(ids) - begin >= min(_LEAST_TOKENS, limit):
            yield ids[begin : begin + limit]


def _built_in(tokenizer: PromptTokenizer, limit: int) -> Iterator[list[int]]:
    """Yield samples of `limit` tokens: of the package's text, each beginning as a prompt does, then of its chats."""
    special, text = list(tokenizer.encode("")), list(tokenizer.encode(_read("calibration.txt")))
    if not special or len(special) >= limit or text[: len(special)] != special:
        special = []
    size = limit - len(special)
    for begin in range(len(special), len(text) - size + 1, size):
        yield special + text[begin : begin + size]
    chats = [token_id for chat in _chats(tokenizer) for token_id in chat]
    for begin in range(0, len(chats) - limit + 1, limit):
        yield chats[begin : begin + limit]


def _chats(tokenizer: PromptTokenizer) -> Iterator[list[int]]:
    """Yield the package's chats, as the model's template renders them; none if it has no template for them."""
    if not hasattr(tokenizer, "apply_chat_template"):
        return
    for line in _read("calibration_chats.jsonl").splitlines():
        try:
            yield _encoded_chat(tokenizer, json.loads(line))
        except LLMEngineError:  # no template, or one that takes other messages; the texts remain
            return


def _encoded_prompt(tokenizer: PromptTokenizer, prompt: Any) -> list[int]:
    """The ids of a caller's text or chat."""
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ConfigError("quant_config.calibration_prompts hold chats, but the tokenizer has no chat template")
    return _encoded_chat(tokenizer, prompt)


def _encoded_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a chat; the template writes the special tokens."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _read(name: str) -> str:
    return resources.files("llmengine.quantization").joinpath(f"texts/{name}").read_text(encoding="utf-8")

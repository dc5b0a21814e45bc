"""The texts whose activations calibration looks at, as token ids: the package's, or a caller's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any, Protocol

from llmengine.errors import ConfigError
from llmengine.quant_config import QuantConfig

SAMPLE_TOKENS = 512
"""Most tokens of a sample."""

_LEAST_TOKENS = 32
"""A long text's rest of fewer tokens than this is left out."""


class PromptTokenizer(Protocol):
    """What calibrating needs of a model's tokenizer.

    The package's chats are used where there is a method `apply_chat_template` as well (see `ChatTokenizer`).
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
        get_tokenizer: called only if there are texts among the prompts.

    Raises `ConfigError` for fewer samples than wanted, for texts without a tokenizer, and for token ids that are not
    in the vocabulary.
    """
    limit = min(SAMPLE_TOKENS, context)
    prompts = config.calibration_prompts
    if prompts is not None and not isinstance(prompts[0], str):
        found = [piece for prompt in prompts for piece in _pieces([int(token) for token in prompt], limit)]
    else:
        tokenizer = get_tokenizer()
        if tokenizer is None:
            raise ConfigError(
                f"quant_config.method={config.method!r} calibrates on texts, which needs a tokenizer; pass "
                "calibration_prompts=[token ids, ...], or set method='rtn', which needs none"
            )
        texts = _built_in(tokenizer, limit) if prompts is None else (list(tokenizer.encode(str(x))) for x in prompts)
        found = [piece for ids in texts for piece in _pieces(ids, limit)]
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
    """Yield the package's texts in parts of about `limit` tokens, each encoded as a prompt, and its chats."""
    text = _read("calibration.txt")
    paragraphs = text.split("\n\n")
    num_chars = limit * len(text) // max(1, len(tokenizer.encode(text)))
    part = ""
    for paragraph in paragraphs:
        part += paragraph + "\n\n"
        if len(part) >= num_chars:
            yield list(tokenizer.encode(part))[:limit]
            part = ""
    if part.strip():
        yield list(tokenizer.encode(part))[:limit]
    render: Any = getattr(tokenizer, "apply_chat_template", None)
    if render is None:
        return
    encode: Any = tokenizer.encode
    for line in _read("calibration_chats.jsonl").splitlines():
        try:
            chat = render(json.loads(line), add_generation_prompt=False)
        except Exception:
            return  # A model whose template is missing, or takes other messages than these, is calibrated on texts.
        yield list(encode(chat, add_special_tokens=False))[:limit]


def _read(name: str) -> str:
    return resources.files("llmengine.quantization").joinpath(f"texts/{name}").read_text(encoding="utf-8")

"""PromptEncoder: from prompts to token ids, with checks of both."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmengine.chat.answers.tool_choice import AnswerPlan
from llmengine.engine.chat_prompt import ChatPrompt, ChatRenderer
from llmengine.errors import InvalidRequestError, LLMEngineError, PromptTooLongError, RequestFailedError
from llmengine.tokenizer.protocol import ChatTokenizer, Tokenizer, check_text, without_second_bos

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's token ids; `text` is None where the caller gave token ids, and `plan` where it is no conversation."""

    text: str | None
    token_ids: list[int]
    plan: AnswerPlan | None = None


class PromptEncoder:
    """Tokenizes texts and chats, and checks the token ids that callers pass. Any thread."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.chats = ChatRenderer(tokenizer)
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    def encode(self, prompt: Prompt | ChatPrompt, *, has_limit: bool = True) -> EncodedPrompt:
        """The prompt's token ids, which may be more than fit the context; blocks while text is tokenized.

        With `has_limit`, a prompt that cannot fit may be refused unread. Raises `InvalidRequestError`,
        `PromptTooLongError`, and `RequestFailedError` for a fault of the tokenizer.
        """
        if isinstance(prompt, ChatPrompt):
            return self._encode_chat(prompt, has_limit)
        if not isinstance(prompt, str):
            is_array = hasattr(prompt, "tolist") and getattr(prompt, "ndim", 0) == 1
            if has_limit and (is_array or isinstance(prompt, Sequence)):
                self._check_num_tokens(len(prompt))  # before looking at millions of them
            return EncodedPrompt(None, _as_token_ids(prompt, self._vocab_size))
        if self.tokenizer is None:
            raise InvalidRequestError("the prompt is text, but there is no tokenizer; pass token ids")
        with tokenizer_faults("encode the prompt", prompt):
            token_ids = without_second_bos(self.tokenizer, prompt, self._token_ids(prompt, has_limit))
        return EncodedPrompt(prompt, self._in_vocabulary(token_ids))

    def check_length(self, encoded: EncodedPrompt, max_total_tokens: int | None = None) -> None:
        """Raise unless the prompt has tokens, and leaves room for one more in the context and in `max_total_tokens`.

        Raises `InvalidRequestError` and `PromptTooLongError`.
        """
        num_tokens = len(encoded.token_ids)
        if num_tokens == 0:
            raise InvalidRequestError("the prompt has no tokens")
        self._check_num_tokens(num_tokens)
        if max_total_tokens is not None and num_tokens >= max_total_tokens:
            raise PromptTooLongError(
                f"the prompt has {num_tokens} tokens; with at least one generated token the limit is "
                f"{max_total_tokens} (max_total_tokens of the sampling parameters)"
            )

    def _check_num_tokens(self, num_tokens: int, how_many: str = "") -> None:
        limit = self._max_model_len
        if num_tokens >= limit:
            raise PromptTooLongError(
                f"the prompt has {how_many or num_tokens} tokens; with at least one generated token the limit is "
                f"{limit} (max_model_len, and what kv_cache_config leaves room for)"
            )

    def _encode_chat(self, prompt: ChatPrompt, has_limit: bool) -> EncodedPrompt:
        with tokenizer_faults("apply its chat template"), _template_faults():
            text = self.chats.render(prompt)
        assert isinstance(self.tokenizer, ChatTokenizer), "a chat was rendered without one"
        with tokenizer_faults("encode the chat", text):
            token_ids = self._token_ids(text, has_limit, add_special_tokens=False)
        return EncodedPrompt(text, self._in_vocabulary(token_ids), prompt.plan)

    def _token_ids(self, text: str, has_limit: bool, **options: Any) -> list[int]:
        assert self.tokenizer is not None
        encode = getattr(self.tokenizer, "encode_with_limit", None) if has_limit else None
        if encode is None:
            return self.tokenizer.encode(text, **options)
        token_ids: list[int] | int = encode(text, self._max_model_len, **options)
        if isinstance(token_ids, int):
            self._check_num_tokens(token_ids, f"{len(text)} characters, which are at least {token_ids}")
            raise AssertionError(f"a text of at least {token_ids} tokens was refused although it may fit")
        return token_ids

    def _in_vocabulary(self, token_ids: list[int]) -> list[int]:
        """The tokenizer's ids; raises `RequestFailedError` for one that the model has no embedding for."""
        low, high = min(token_ids, default=0), max(token_ids, default=0)
        if low < 0 or high >= self._vocab_size:
            worst = low if low < 0 else high
            raise RequestFailedError(
                f"the tokenizer gave token id {worst}, outside the model's vocabulary [0, {self._vocab_size}); it may "
                "be the tokenizer of another model"
            )
        return token_ids


def as_prompts(prompts: Any) -> Iterable[Prompt]:
    """An iterable of prompts, made of one prompt or of several. An empty list has none; a 1-D array is token ids.

    Raises `InvalidRequestError` for anything else.
    """
    if isinstance(prompts, str):
        return (prompts,)
    if isinstance(prompts, Sequence):
        one = len(prompts) > 0 and _is_integer_type(type(prompts[0]))
    else:
        one = getattr(prompts, "ndim", None) in (0, 1)
    if not one and (not isinstance(prompts, Iterable) or isinstance(prompts, (Mapping, Set))):
        raise InvalidRequestError(
            f"prompts must be text, token ids, or several of these, not a {type(prompts).__name__}"
        )
    return (prompts,) if one else prompts


def _as_token_ids(prompt: Any, vocab_size: int) -> list[int]:
    """A caller's token ids as ints; raises `InvalidRequestError` for anything else."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(values, Sequence) or isinstance(prompt, (bytes, bytearray, memoryview)):
        raise InvalidRequestError(f"a prompt must be text or token ids, not a {type(prompt).__name__}")
    token_ids = list(values)
    kinds = set(map(type, token_ids))
    for kind in kinds:
        if not _is_integer_type(kind):
            raise InvalidRequestError(f"a prompt must be text or integer token ids; this one holds a {kind.__name__}")
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        worst = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequestError(f"the prompt holds token id {worst}, outside the vocabulary [0, {vocab_size})")
    return token_ids if kinds <= {int} else [int(token_id) for token_id in token_ids]


def _is_integer_type(kind: type) -> bool:
    """Whether objects of this type count as token ids. Arrays have `__index__` too, but do not."""
    return kind is not bool and hasattr(kind, "__index__") and not hasattr(kind, "__len__")


@contextmanager
def tokenizer_faults(task: str, text: str = "") -> Iterator[None]:
    """Raise `RequestFailedError` for what a tokenizer raises, unless that is an error of ours already.

    A failing tokenizer is not the request's fault, unless `text` is not Unicode text; then this raises
    `InvalidRequestError`.
    """
    try:
        yield
    except LLMEngineError:
        raise
    except Exception as fault:
        check_text(text)
        raise RequestFailedError(f"the tokenizer failed to {task}: {fault!r:.500}") from fault


@contextmanager
def _template_faults() -> Iterator[None]:
    """Raise `InvalidRequestError` for what a chat template raises, with `raise_exception()` for instance."""
    try:
        yield
    except Exception as fault:
        jinja2 = sys.modules.get("jinja2")  # it is there if a template was rendered with it
        if jinja2 is None or not isinstance(fault, jinja2.TemplateError):
            raise
        raise InvalidRequestError(f"the chat template rejects the messages: {fault}") from fault

"""FakeBackend and ChatByteTokenizer, which need no model: for tests of the engine and of applications built on it.

A `FakeBackend` keeps real "KV": it writes the id of each computed token into the pool through the request's block
table, and the next token is a function of the whole context, read back through that table. So a block that is shared
wrongly, freed too early or forgotten shows up as a wrong token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmengine.batch import Backend, BackendInfo, Batch, BatchRow, SlotInit, StepResult, TokenLogprobs
from llmengine.tokenizer.protocol import ByteTokenizer

NextToken = Callable[[Sequence[int]], int | None]
"""Maps a context's token ids to the next one; None if the row's logits are not finite."""


def mixing_model(vocab_size: int) -> NextToken:
    """A next-token function that depends on every token of the context and on their order."""

    def next_token(token_ids: Sequence[int]) -> int:
        state = 17
        for token_id in token_ids:
            state = (state * 1_000_003 + token_id + 1) % 2_147_483_647
        return state % vocab_size

    return next_token


CHAT_TEMPLATE = """{% for message in messages %}<{{ message.role }}>{{ message.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


class ChatByteTokenizer(ByteTokenizer):
    """A `ByteTokenizer` with a chat template, for tests of chats without a model.

    Raises `ModelLoadError` if `chat_template` is not a Jinja template.
    """

    def __init__(self, chat_template: str = CHAT_TEMPLATE) -> None:
        from llmengine.chat.template import ChatTemplates

        self._templates = ChatTemplates({"default": chat_template}, {}, "ChatByteTokenizer")
        self._templates.choose()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """UTF-8 bytes of `text`; there are no special tokens to add."""
        return super().encode(text)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The template's text of a conversation; see `llmengine.chat.template.ChatTemplate.render`."""
        return self._templates.render(messages, add_generation_prompt, tools, variables)

    def chat_template_variables(self, chat_template: str | None = None, *, has_tools: bool = False) -> frozenset[str]:
        """Names of the variables that the template reads."""
        return self._templates.choose(chat_template, has_tools=has_tools).variables

    def chat_template_source(self, chat_template: str | None = None, *, has_tools: bool = False) -> str:
        """The text of the template."""
        return self._templates.source(chat_template, has_tools=has_tools)


class FakeBackend:
    """Implements `llmengine.batch.Backend` in plain Python.

    Each `collect()` calls `on_step` on the engine thread before it returns the result. A test may block there, count,
    or raise. Steps are computed in order at `launch()`, as a device's stream would compute them. With `max_samples`
    above 1, a step samples from 1 to that many tokens of a row: the same tokens as one at a time.
    """

    def __init__(
        self,
        next_token: NextToken | None = None,
        *,
        vocab_size: int = 258,
        num_blocks: int = 65,
        block_size: int = 4,
        max_model_len: int = 256,
        max_steps_in_flight: int = 1,
        max_samples: int = 1,
        on_step: Callable[[Batch], None] | None = None,
    ) -> None:
        self._info = BackendInfo(
            description="fake",
            vocab_size=vocab_size,
            max_model_len=min(max_model_len, (num_blocks - 1) * block_size),
            num_blocks=num_blocks,
            block_size=block_size,
            kv_bytes_per_block=8 * block_size,
            weight_bytes=0,
            max_steps_in_flight=max_steps_in_flight,
            max_samples=max_samples,
            has_prompt_logprobs=True,
        )
        self._next_token = next_token or mixing_model(vocab_size)
        self._on_step = on_step
        self._pool = [[-1] * block_size for _ in range(num_blocks)]
        self._slots: dict[int, SlotInit] = {}
        self._tables: dict[int, list[int]] = {}
        self._sampled: dict[int, int] = {}
        self._results: deque[tuple[Batch, StepResult]] = deque()
        self.num_steps = 0
        self.closed = False

    @property
    def info(self) -> BackendInfo:
        """Facts given to the constructor."""
        return self._info

    def launch(self, batch: Batch) -> None:
        """Compute the step; its result waits for `collect()`."""
        assert not self.closed
        assert len(self._results) < self._info.max_steps_in_flight
        for init in batch.slot_inits:
            self._slots[init.slot] = init
            self._tables[init.slot] = []
        token_ids: dict[int, list[int]] = {}
        logprobs: dict[int, list[TokenLogprobs]] = {}
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        errors: dict[int, str] = {}
        assert len({row.slot for row in batch.rows}) == len(batch.rows), "a slot has two rows"
        for row in batch.rows:
            self._tables[row.slot].extend(row.new_block_ids)
            ids = list(row.token_ids)
            if len(ids) < row.num_tokens:
                ids.append(self._sampled[row.slot])
            assert len(ids) == row.num_tokens
            self._write(row.slot, row.start, ids)
            if self._slots[row.slot].sampling_params.prompt_logprobs is not None:
                prompt_logprobs[row.slot] = self._score_prompt(row)
            if not row.sample:
                continue
            sampled = self._sample(row, batch.masks.get(row.slot))
            if not sampled:
                errors[row.slot] = "logits are not finite"
                continue
            token_ids[row.slot] = sampled
            self._sampled[row.slot] = sampled[-1]
            if self._slots[row.slot].sampling_params.logprobs is not None:
                logprobs[row.slot] = [TokenLogprobs(0.0, (token_id,), (0.0,)) for token_id in sampled]
        # A device that computes in no time always waits for the next step.
        self._results.append((batch, StepResult(batch.step, token_ids, logprobs, prompt_logprobs, errors, idle_s=1.0)))

    def collect(self) -> StepResult:
        """The oldest step's result, after a call of `on_step`."""
        batch, result = self._results.popleft()
        self.num_steps += 1
        if self._on_step is not None:
            self._on_step(batch)
        return result

    def close(self) -> None:
        """Mark as closed."""
        self.closed = True

    def _sample(self, row: BatchRow, mask: bytes | None) -> list[int]:
        """Tokens that follow the row's, as many as the context says; none if its logits are not finite."""
        end = row.start + row.num_tokens
        context = self._read(row.slot, end)
        count = 1 + sum(context) % row.sample
        sampled: list[int] = []
        while len(sampled) < count:
            token_id = self._next_token([*context, *sampled])
            if token_id is not None and mask is not None and not sampled:
                token_id = _allowed_token(token_id, mask)
            if token_id is None:
                break
            sampled.append(token_id)
        self._write(row.slot, end, sampled[:-1])
        return sampled

    def _write(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        size, table = self._info.block_size, self._tables[slot]
        for position, token_id in enumerate(token_ids, start):
            self._pool[table[position // size]][position % size] = token_id

    def _score_prompt(self, row: BatchRow) -> list[TokenLogprobs]:
        """The row's part of the prompt's log-probabilities: 0 for the token that the model chooses, else -1."""
        init = self._slots[row.slot]
        entries = []
        for position in range(row.start + 1, min(row.start + row.num_tokens + 1, init.num_prompt_tokens)):
            expected = self._next_token(self._read(row.slot, position))
            top_ids = () if expected is None else (expected,)
            entries.append(
                TokenLogprobs(float(init.token_ids[position] == expected) - 1.0, top_ids, (0.0,) * len(top_ids))
            )
        return entries

    def _read(self, slot: int, num_tokens: int) -> list[int]:
        size, table = self._info.block_size, self._tables[slot]
        return [self._pool[table[position // size]][position % size] for position in range(num_tokens)]


def _allowed_token(token_id: int, mask: bytes) -> int | None:
    """The token if the mask allows it, else an allowed one that depends on the token; None if the mask allows none."""
    if mask[token_id // 8] >> token_id % 8 & 1:
        return token_id
    allowed = [8 * index + bit for index, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
    return allowed[token_id % len(allowed)] if allowed else None


def _check_protocol(backend: FakeBackend) -> Backend:
    return backend

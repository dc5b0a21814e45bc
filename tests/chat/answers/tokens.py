"""A byte tokenizer whose special tokens have texts, as in real vocabularies, and a model that says a given text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmengine.batch import Batch
from llmengine.testing import ChatByteTokenizer, FakeBackend

SPECIAL = ("<bos>", "<eos>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|tool_call|>", "<|/tool_call|>", "<extra>")
VOCAB_SIZE = 256 + len(SPECIAL)
EOS = 257


class MarkerTokenizer(ChatByteTokenizer):
    """Bytes, and after them the special tokens."""

    vocab_size = VOCAB_SIZE
    special_ids = frozenset(range(256, VOCAB_SIZE))
    end_token_ids = frozenset({EOS})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, in which the texts of special tokens stand for these."""
        ids: list[int] = []
        while text:
            found = next((index for index, token in enumerate(SPECIAL) if text.startswith(token)), None)
            ids += text[0].encode() if found is None else [256 + found]
            text = text[1 if found is None else len(SPECIAL[found]) :]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens included."""
        return b"".join(self.token_bytes()[token_id] for token_id in token_ids).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id."""
        return [*(bytes((value,)) for value in range(256)), *(token.encode() for token in SPECIAL)]


def saying(
    text: str,
    tokenizer: MarkerTokenizer,
    prompt_end: str = "<assistant>",
    on_step: Callable[[Batch], None] | None = None,
) -> FakeBackend:
    """A backend that answers every prompt that ends with `prompt_end` with `text`."""
    answer = [*tokenizer.encode(text), EOS]
    end = tokenizer.encode(prompt_end)

    def next_token(context: Sequence[int]) -> int:
        ids = list(context)
        begin = next(at for at in range(len(ids), 0, -1) if ids[at - len(end) : at] == end)
        return answer[min(len(ids) - begin, len(answer) - 1)]

    return FakeBackend(next_token, vocab_size=VOCAB_SIZE, num_blocks=500, max_model_len=1900, on_step=on_step)


def babbling(seed: int) -> FakeBackend:
    """A backend whose tokens look random, so that only a grammar gives them form."""

    def next_token(context: Sequence[int]) -> int:
        state = seed
        for token_id in context:
            state = (state * 1_103_515_245 + token_id + 12_345) % 2_147_483_648
        return state // 7 % VOCAB_SIZE

    return FakeBackend(next_token, vocab_size=VOCAB_SIZE, num_blocks=1500, max_model_len=5900)

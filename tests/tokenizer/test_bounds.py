"""The lower bound of a text's tokens never exceeds their number, so no text that fits is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llmengine.errors import PromptTooLongError
from llmengine.tokenizer.bounds import TextBound
from llmengine.tokenizer.loading import LoadedTokenizer
from llmengine.tokenizer.protocol import adapt_tokenizer
from tests.engine.helpers import make_llm, timeout, tokens

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [
    ("a", "a"),
    ("aa", "aa"),
    ("aaaa", "aaaa"),
    ("\u0120", "\u0120"),
    ("\u0120\u0120", "\u0120\u0120"),
    ("b", "c"),
]
SPM = [f"<0x{value:02X}>" for value in range(256)] + ["\u2581", "a", "b", "\u2581\u2581", "aa", "aaaa", "\u2581a"]


def bpe(
    vocab: list[str], merges: list[tuple[str, str]], pre: Any = None, normalizer: Any = None, **options: Any
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocab)}, merges, **options))
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level(normalizer: Any = None, pre: Any = None, without: str = "") -> Tokenizer:
    vocab = [char for char in BYTES if char not in without] + [a + b for a, b in MERGES]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre is None)
    return bpe(vocab, MERGES, level if pre is None else pre_tokenizers.Sequence([pre, level]), normalizer)


def sentencepiece(normalizer: Any = None, vocab: list[str] = SPM, **options: Any) -> Tokenizer:
    merges = [("\u2581", "\u2581"), ("a", "a"), ("aa", "aa"), ("\u2581", "a")]
    escapes = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return bpe(vocab, merges, None, normalizer or escapes, **options)


def with_tokens(tokenizer: Tokenizer, *added: AddedToken) -> Tokenizer:
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def truncating() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    return tokenizer


def split(behavior: str) -> Any:
    return pre_tokenizers.Split(Regex(r"\s+|\d"), behavior)


UNK = [*SPM, "<unk>"]
BOUNDED = {
    "bytes": byte_level(),
    "bytes, NFC": byte_level(normalizers.NFC()),
    "bytes, NFKC": byte_level(normalizers.NFKC()),
    "bytes, lower case": byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])),
    "bytes, split": byte_level(pre=pre_tokenizers.Sequence([split("isolated"), pre_tokenizers.Digits(True)])),
    "bytes, a replaced string": byte_level(normalizers.Replace("aaa", "b")),
    "bytes, some missing": byte_level(without="x\u0104\u00f0\u00c3"),
    "bytes, a long token": with_tokens(byte_level(), AddedToken("b" * 30, special=True)),
    "bytes, a token that swallows": with_tokens(byte_level(), AddedToken("<s>", rstrip=True, lstrip=True)),
    "bytes, a normalized token": with_tokens(byte_level(normalizers.NFKC()), AddedToken("\ufdfa", normalized=True)),
    "sentencepiece": sentencepiece(byte_fallback=True),
    "sentencepiece, unknown apart": sentencepiece(vocab=UNK, unk_token="<unk>"),
}
UNBOUNDED = {
    "strip": byte_level(normalizers.Strip()),
    "accents": byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "a replaced pattern": byte_level(normalizers.Replace(Regex("a+"), "a")),
    "a removed string": byte_level(normalizers.Replace("aa", "")),
    "removed spaces": byte_level(pre=split("removed")),
    "words": byte_level(pre=pre_tokenizers.WhitespaceSplit()),
    "unknown together": sentencepiece(vocab=UNK, unk_token="<unk>", fuse_unk=True),
    "unknown dropped": sentencepiece(vocab=SPM[256:]),
    "word pieces": Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "whole words": Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "truncation": truncating(),
}
ALPHABET = [
    "a",
    "a" * 9,
    " ",
    " " * 9,
    "b",
    "bc",
    "x",
    "\x04",
    "7",
    "\n",
    "<s>",
    "b" * 30,
    "\u00e9",
    "e\u0301",
    "\u1f82",
]
ALPHABET += [
    "\u0e01\u0e33",
    "\ufdfa",
    "\U0001f600",
    "\u2581",
    "\u1100\u1161\u11a8",
    "\u03b1\u0313\u0300\u0345",
    "\ufb01",
    "A",
]
TEXT = st.lists(st.sampled_from(ALPHABET), max_size=60).map("".join) | st.text(max_size=60)


def bound_of(tokenizer: Tokenizer) -> TextBound:
    return TextBound(tokenizer, tokenizer.get_vocab())


@pytest.mark.parametrize("name", [*BOUNDED, *UNBOUNDED])
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_no_text_has_fewer_tokens(name: str, text: str) -> None:
    tokenizer = {**BOUNDED, **UNBOUNDED}[name]
    text = text.encode(errors="ignore").decode()
    assert bound_of(tokenizer).min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_known_has_a_bound(name: str) -> None:
    assert bound_of(BOUNDED[name]).min_tokens("b7 " * 10_000) > 100


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_may_shrink_has_none(name: str) -> None:
    assert bound_of(UNBOUNDED[name]).min_tokens("b7 " * 10_000) == 0


@pytest.mark.parametrize("text", ["<s>" + " " * 1000, " " * 1000 + "<s>b"])
def test_a_token_that_swallows_spaces_stands_for_many(text: str) -> None:
    tokenizer = BOUNDED["bytes, a token that swallows"]
    assert len(tokenizer.encode(text).ids) <= 2
    assert bound_of(tokenizer).min_tokens(text) == 0


def test_bytes_without_tokens_are_dropped() -> None:
    tokenizer = BOUNDED["bytes, some missing"]
    for text in ("x" * 1000, "\x04" * 1000, "\U0001f600" * 1000, "\u00e9" * 1000):
        assert bound_of(tokenizer).min_tokens(text) <= len(tokenizer.encode(text).ids)


class Spy:
    """A `tokenizers.Tokenizer` that records its use."""

    def __init__(self, wrapped: Tokenizer) -> None:
        self._wrapped = wrapped
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.num_calls += 1
        return self._wrapped.encode(text, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.num_calls += 1
        return self._wrapped.encode_batch_fast(texts, **options)


@pytest.mark.parametrize("adapt", [LoadedTokenizer, adapt_tokenizer])
async def test_what_cannot_fit_is_refused_unread(adapt: Any) -> None:
    spy = Spy(BOUNDED["bytes"])
    with make_llm(tokenizer=adapt(spy), vocab_size=300, max_model_len=64) as llm:
        async with timeout():
            for options in ({}, {"wait_for_admission": True}):
                handle = llm.generate_async("ab" * 5000, tokens(1), **options)
                with pytest.raises(PromptTooLongError, match=r"10000 characters.* at least 1250 tokens.* limit is 64"):
                    await handle
            with pytest.raises(PromptTooLongError, match="at least 1250 tokens"):
                llm.generate("ab" * 5000, tokens(1))
            assert spy.num_calls == 0
            assert (await llm.generate_async("a" * 480, tokens(1))).prompt_token_ids == [len(BYTES) + 2] * 60
            with pytest.raises(PromptTooLongError, match="70 characters, which are at least 70 tokens"):
                await llm.generate_async("ab" * 35, tokens(1))


def test_random_texts_fit_their_bound() -> None:
    """These texts are longer than those that hypothesis makes."""
    rng = random.Random(0)
    for tokenizer in BOUNDED.values():
        bound = bound_of(tokenizer)
        for _ in range(20):
            text = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 3000)))
            assert bound.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)

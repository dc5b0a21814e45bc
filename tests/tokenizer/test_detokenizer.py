"""IncrementalDetokenizer against oracles that see the entire text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmengine.tokenizer.protocol import ByteTokenizer, IncrementalDetokenizer, adapt_tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "emoji \U0001f600\U0001f468‍\U0001f469‍\U0001f467 flags \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd end",
    "漢字かな交じり文、한국어 텍스트 你好世界",
    "مرحبا بالعالم שלום עולם",
    "e\u0301a\u0308 n\u0303 Z\u0335\u0321 \ufffd real replacement \ufffd!",
    "  two  spaces\n\n\ttabs\r\n   ",
    "def f(x):\n    return x ** 2  # 12345\n",
)
BYTES = ByteTokenizer()


def _train(byte_level: bool) -> Tokenizer:
    """A BPE small enough that characters are split across tokens and words are joined."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
        tokenizer.train_from_iterator(TEXTS * 3, trainer)
        return tokenizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["The quick brown fox", "over the lazy dog", "  two  spaces", "a b c d e"]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special)
    tokenizer.train_from_iterator([word.replace(" ", "▁") for word in words * 5], trainer)
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_without_added_bytes(state))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def _without_added_bytes(state: str) -> str:
    import json

    data = json.loads(state)
    data["added_tokens"] = []
    return json.dumps(data)


BPE = _train(byte_level=True)
SPM = _train(byte_level=False)
BPE_IDS = adapt_tokenizer(BPE)
SPM_IDS = adapt_tokenizer(SPM)


def _run(detokenizer: IncrementalDetokenizer, ids: Sequence[int]) -> list[str]:
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped is not None:
            break
    return [*pieces, detokenizer.finish()]


@given(st.lists(st.integers(0, 419), max_size=40), st.lists(st.integers(0, 419), max_size=12))
def test_byte_level_text_is_that_of_the_ids(ids: list[int], prompt: list[int]) -> None:
    ids = [token_id for token_id in ids if BPE.id_to_token(token_id)]
    assert "".join(_run(IncrementalDetokenizer(BPE_IDS, prompt), ids)) == BPE_IDS.decode(ids)


@given(st.lists(st.sampled_from([0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xC3, 65, 300]), max_size=80))
def test_invalid_bytes(ids: list[int]) -> None:
    assert "".join(_run(IncrementalDetokenizer(BYTES, []), ids)) == BYTES.decode(ids)


@settings(max_examples=50)
@given(st.text(max_size=60), st.randoms(use_true_random=False))
def test_any_tokenization_of_any_text(text: str, rng: random.Random) -> None:
    text = text.encode(errors="replace").decode()
    ids: list[int] = []
    rest = text
    while rest:  # tokenize piecewise: cuts that the tokenizer itself would not make
        cut = rng.randint(1, len(rest))
        ids += BPE_IDS.encode(rest[:cut])
        rest = rest[cut:]
    assert "".join(_run(IncrementalDetokenizer(BPE_IDS, BPE_IDS.encode("a prompt ")), ids)) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTES, BPE_IDS, SPM_IDS], ids=["bytes", "byte-level", "sentencepiece"])
def test_real_texts_come_out_whole(tokenizer: ByteTokenizer, text: str) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    assert "".join(_run(detokenizer, tokenizer.encode(text))) == text


def test_sentencepiece_keeps_the_space_after_the_prompt() -> None:
    ids = SPM_IDS.encode("brown fox")
    assert "".join(_run(IncrementalDetokenizer(SPM_IDS, SPM_IDS.encode("The quick")), ids)) == " brown fox"
    assert SPM_IDS.decode(ids) == "brown fox"


def test_sentencepiece_starts_anew_after_a_special_token() -> None:
    end = SPM.token_to_id("</s>")
    prompt = [*SPM_IDS.encode("The quick"), end]
    detokenizer = IncrementalDetokenizer(SPM_IDS, prompt, frozenset({end}))
    assert "".join(_run(detokenizer, SPM_IDS.encode("brown fox"))) == "brown fox"


def test_sentencepiece_byte_tokens() -> None:
    good = [SPM.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    bad = SPM.token_to_id("<0xFF>")
    ids = [*good, bad, *SPM_IDS.encode("a b")]
    pieces = _run(IncrementalDetokenizer(SPM_IDS, []), ids)
    assert pieces[:3] == ["", "", "你"]
    assert "".join(pieces) == "你\ufffd a b"


@given(st.lists(st.integers(0, 339), max_size=40))
def test_sentencepiece_gives_nothing_out_twice(ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(SPM_IDS, [])
    text = "".join(_run(detokenizer, ids))
    kept = [char for char in SPM_IDS.decode(ids) if char != "\ufffd"]
    assert len(text) <= len(SPM_IDS.decode(ids)) + 3
    iterator = iter(text)
    assert all(char in iterator for char in kept)


def test_special_ids_are_left_out_even_inside_a_character() -> None:
    first, *rest = "é".encode()
    detokenizer = IncrementalDetokenizer(BYTES, [], BYTES.special_ids)
    assert "".join(_run(detokenizer, [257, first, 256, *rest, 257])) == "é"


def test_an_unfinished_prompt_character_is_not_generated_text() -> None:
    first, *rest = "é".encode()
    detokenizer = IncrementalDetokenizer(BYTES, [65, first])
    assert "".join(_run(detokenizer, [*rest, 66])) == "\ufffdB"


def test_text_comes_as_soon_as_it_is_final() -> None:
    assert _run(IncrementalDetokenizer(BYTES, []), "aé😀b".encode()) == [
        "a", "", "é", "", "", "", "😀", "b", "",
    ]  # fmt: skip


@pytest.mark.parametrize("ids", [[0x80] * 300, [0xE4] * 300, [0xF0, 0x9F] * 150, [0x80, 300, 300, 300] * 80])
def test_invalid_bytes_are_delayed_by_a_bounded_number_of_ids(ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(BYTES, [])
    shown = ""
    for count, token_id in enumerate(ids, 1):
        shown += detokenizer.push(token_id)
        assert len(BYTES.decode(ids[:count])) - len(shown) <= 3
    assert shown + detokenizer.finish() == BYTES.decode(ids)


class _Recording(ByteTokenizer):
    def __init__(self) -> None:
        self.longest = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(token_ids))
        return super().decode(token_ids)


@pytest.mark.parametrize("ids", [[0x80] * 500, [65] * 500, [300] * 500, [0xE4, *[300] * 500], [0xE4, 0xBD] * 250])
def test_the_window_is_bounded(ids: list[int]) -> None:
    tokenizer = _Recording()
    text = "".join(_run(IncrementalDetokenizer(tokenizer, [65] * 500), ids))
    assert tokenizer.longest <= 26
    assert text == BYTES.decode(ids)


def _oracle(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Read character by character: the first one that completes a stop ends the text, and the longest stop wins."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


_small = st.text(alphabet="abc", max_size=30)
_stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


@given(_small, _stops)
def test_stops_agree_with_the_oracle_and_hold_back_the_least(text: str, stops: list[str]) -> None:
    expected, stop = _oracle(text, stops)
    detokenizer = IncrementalDetokenizer(BYTES, list(stops[0].encode()), stop=stops)
    shown = ""
    for count, char in enumerate(text, 1):
        shown += detokenizer.push(ord(char))
        if detokenizer.stopped is not None:
            break
        seen = text[:count]
        held = max(
            (size for stop in stops for size in range(1, len(stop)) if seen.endswith(stop[:size])), default=0
        )  # fmt: skip
        assert shown == seen[: len(seen) - held]
    shown += detokenizer.finish()
    assert (shown, detokenizer.stopped) == (expected, stop)


@given(st.text(max_size=40), st.integers(0, 40), st.integers(1, 6), st.randoms(use_true_random=False))
def test_stops_do_not_depend_on_token_borders(text: str, start: int, size: int, rng: random.Random) -> None:
    text = text.encode(errors="replace").decode()
    stops = [stop for stop in (text[start : start + size], text[start + 1 : start + 2], "absent") if stop]
    ids: list[int] = []
    rest = text
    while rest:
        cut = rng.randint(1, len(rest))
        ids += BPE_IDS.encode(rest[:cut])
        rest = rest[cut:]
    detokenizer = IncrementalDetokenizer(BPE_IDS, [], stop=stops)
    assert ("".join(_run(detokenizer, ids)), detokenizer.stopped) == _oracle(text, stops)


@given(_small, _stops, st.integers(0, 30))
def test_stops_that_complete_unchecked_are_text(text: str, stops: list[str], min_chars: int) -> None:
    ends = [
        (end, -len(stop), stop)
        for end in range(min_chars + 1, len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    ]
    expected, matched = text, None
    if ends:
        end, negative_size, matched = min(ends)
        expected = text[: end + negative_size]
    detokenizer = IncrementalDetokenizer(BYTES, [], stop=stops)
    shown = ""
    for count, char in enumerate(text, 1):
        shown += detokenizer.push(ord(char), check_stop=count > min_chars)
        if detokenizer.stopped is not None:
            break
    shown += detokenizer.finish()
    assert (shown, detokenizer.stopped) == (expected, matched)


def test_a_stop_inside_a_token_cuts_before_it() -> None:
    ids = BPE_IDS.encode("The quick brown fox")
    detokenizer = IncrementalDetokenizer(BPE_IDS, [], stop=["ick br"])
    assert "".join(_run(detokenizer, ids)) == "The qu"
    assert detokenizer.stopped == "ick br"


def test_the_prompt_is_no_part_of_a_stop() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, list(b"a STO"), stop=["STOP"])
    assert "".join(_run(detokenizer, b"P on")) == "P on"


def test_the_first_stop_to_be_complete_wins() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, [], stop=["abcd", "c"])
    assert _run(detokenizer, b"xabcd") == ["x", "", "", "ab", ""]
    assert detokenizer.stopped == "c"


def test_a_stop_may_hold_characters_of_several_tokens() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, [], stop=["é😀"])
    assert "".join(_run(detokenizer, "aé😀b".encode())) == "a"


def test_pushing_after_a_stop_is_an_error() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, [], stop=["a"])
    assert detokenizer.push(97) == ""
    with pytest.raises(AssertionError, match="after a stop"):
        detokenizer.push(98)
    assert detokenizer.finish() == ""


def test_finish_twice_gives_nothing_more() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, [], stop=["abc"])
    assert detokenizer.push(97) == ""
    assert detokenizer.push(0xE4) == ""
    assert detokenizer.finish() == "a\ufffd"
    assert detokenizer.finish() == ""

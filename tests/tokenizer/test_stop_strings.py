"""Stop strings among hidden tokens: against an oracle that sees the entire text, and through the engine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import GenerationOutput, RequestHandle, SamplingParams, StructuredOutput
from llmengine.tokenizer.protocol import IncrementalDetokenizer
from llmengine.tokenizer.stop_strings import StopMatcher
from tests.engine.helpers import in_loop, make_llm

Item = tuple[str, bool]
"""A character or a hidden token, and whether it is hidden."""


def candidates(items: Sequence[Item], text: str) -> int | None:
    """Return how many characters are shown of the whole items whose texts end with `text`; None if no items do."""
    shown = 0
    rest = text
    for content, hidden in reversed(items):
        if not rest:
            return shown
        if not rest.endswith(content):
            return None
        rest = rest[: len(rest) - len(content)]
        shown += 0 if hidden else len(content)
    return None if rest else shown


def oracle(items: Sequence[Item], stops: Sequence[str]) -> tuple[str, str | None]:
    """Read item by item: the first complete stop ends the text; of several, the one that cuts off the most."""
    for end in range(1, len(items) + 1):
        read = items[:end]
        visible = [item for item in read if not item[1]]
        found = []
        for stop in stops:
            # A hidden token by itself adds nothing to the shown text.
            views = [read] if read[-1][1] else [read, visible]
            cuts = [cut for view in views if (cut := candidates(view, stop)) is not None]
            found += [(cut, len(stop), stop) for cut in cuts]
        if found:
            cut, _, stop = max(found)
            return "".join(content for content, _ in visible[: len(visible) - cut]), stop
    return "".join(content for content, hidden in items if not hidden), None


def num_held(items: Sequence[Item], stops: Sequence[str]) -> int:
    """Return how many of the shown characters may still be part of a stop."""
    visible = [item for item in items if not item[1]]
    begins = {stop[:size] for stop in stops for size in range(1, len(stop))}
    found = [candidates(view, begin) for view in (items, visible) for begin in begins]
    return max((cut for cut in found if cut is not None), default=0)


_chars = st.sampled_from("ab<>").map(lambda char: (char, False))
_hidden = st.sampled_from(["<a>", "<b>", "<", "ab", "<aba>"]).map(lambda text: (text, True))
_items = st.lists(st.one_of(_chars, _chars, _hidden), max_size=24)
_parts = st.sampled_from(["a", "b", "<", ">", "<a>", "<b>", "ab", "<aba>"])
_stops = st.lists(st.lists(_parts, min_size=1, max_size=4).map("".join), min_size=1, max_size=4)


@settings(max_examples=400)
@given(_items, _stops)
def test_hidden_tokens_agree_with_the_oracle_and_hold_back_the_least(items: list[Item], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = "", None
    for count, (content, hidden) in enumerate(items, 1):
        piece, stopped = (matcher.feed_hidden if hidden else matcher.feed)(content, True)
        shown += piece
        if stopped is not None:
            break
        text = "".join(content for content, hidden in items[:count] if not hidden)
        assert shown == text[: len(text) - num_held(items[:count], stops)]
    if stopped is None:
        shown += matcher.flush()
    assert (shown, stopped) == oracle(items, stops)


@given(_items, _stops, st.integers(0, 24))
def test_stops_that_do_not_count_yet_are_text(items: list[Item], stops: list[str], num_free: int) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = "", None
    for count, (content, hidden) in enumerate(items):
        piece, stopped = (matcher.feed_hidden if hidden else matcher.feed)(content, count >= num_free)
        shown += piece
        if stopped is not None:
            break
    if stopped is None:
        assert shown + matcher.flush() == "".join(content for content, hidden in items if not hidden)
    else:
        assert stopped in stops


class Tags:
    """Byte tokens, followed by special tokens whose text is in angle brackets."""

    texts = ("<eos>", "<start>", "<end>", "<tool>")
    special_ids = frozenset(range(256, 260))
    end_token_ids = frozenset({256})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        parts = (bytes((item,)) if item < 256 else self.texts[item - 256].encode() for item in token_ids if item < 260)
        return b"".join(parts).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [*(bytes((value,)) for value in range(256)), *(text.encode() for text in self.texts)]


EOS, START, END, TOOL = range(256, 260)
TAGS = Tags()


def ids(*parts: str | int) -> list[int]:
    return [token_id for part in parts for token_id in ([part] if isinstance(part, int) else part.encode())]


CASES: list[tuple[list[int], str | list[str], str, str | None]] = [
    (ids("ab", START, "cd"), "<start>", "ab", "<start>"),
    (ids(START, "cd"), "<start>", "", "<start>"),
    (ids("ab", START, "cd"), ["###", "<start>"], "ab", "<start>"),
    (ids("ab", START, "cd"), "b<start>", "a", "b<start>"),
    (ids("ab", START, "cd"), "<start>c", "ab", "<start>c"),
    (ids("ab", START, "cd"), "b<start>c", "a", "b<start>c"),
    (ids("a", END, START, "b"), "<end><start>", "a", "<end><start>"),
    (ids("a\n", END, "\n", START, "b"), "\n<end>\n<start>", "a", "\n<end>\n<start>"),
    (ids("a<start>b", START), "<start>", "a", "<start>"),  # spelled out in ordinary tokens
    (ids("a<end>", START, "b"), "<end><start>", "a", "<end><start>"),
    (ids("a", END, "<start>b"), "<end><start>", "a", "<end><start>"),
    (ids("x", START, "yz"), "xy", "", "xy"),  # shown as "xyz"
    (ids("ab", START, "cd"), "<", "abcd", None),
    (ids("ab", START, "cd"), ["start", "<st", "rt>", "b<", ">c"], "abcd", None),
    (ids("ab<st", START, "art>cd"), "<start>", "ab<st", "<start>"),  # the hidden one comes first
    (ids("ab", START, "c", TOOL, "d"), "c<tool>", "ab", "c<tool>"),
    (ids("ab", START), "<start>x", "ab", None),
    (ids("é"[:0], 0xC3, START, 0xA9, "b"), "<start>", "", "<start>"),
    (ids("ab", START, "c"), ["b<start>", "<start>"], "a", "b<start>"),
    (ids("ab", EOS), "<eos>", "ab", "<eos>"),
    (ids("ab\n", EOS), "\n<eos>", "ab", "\n<eos>"),
    (ids("ab", START, EOS), "<start><eos>", "ab", "<start><eos>"),
]


@pytest.mark.parametrize(("generated", "stop", "text", "matched"), CASES)
def test_stops_with_special_tokens(generated: list[int], stop: str | list[str], text: str, matched: str | None) -> None:
    prompt = [1]

    def next_token(context: Sequence[int]) -> int:
        place = len(context) - len(prompt)
        return generated[place] if place < len(generated) else ord(".")

    num_tokens = len(generated)
    with make_llm(tokenizer=TAGS, next_token=next_token, vocab_size=260) as llm:
        params = SamplingParams(max_new_tokens=num_tokens, stop=stop)
        output = llm.generate(prompt, params)[0]
        assert (output.text, output.matched_stop) == (text, matched)
        assert output.finish_reason == ("length" if matched is None else "stop")
        shown = llm.generate(prompt, params.replace(n=2, temperature=1.0))[0].outputs
        assert [(one.text, one.matched_stop) for one in shown] == [(text, matched)] * 2
        streamed = llm.generate_async(prompt, params, streaming=True)
        deltas = _read(streamed)
        assert "".join(delta.text_delta for delta in deltas) == text == deltas[-1].text


def _read(handle: RequestHandle) -> list[GenerationOutput]:
    async def read() -> list[GenerationOutput]:
        return [output async for output in handle]

    outputs: list[GenerationOutput] = in_loop(read)
    return outputs


def test_an_end_that_no_stop_mentions_is_reported_by_its_id() -> None:
    with make_llm(tokenizer=TAGS, next_token=lambda context: [ord("a"), EOS][len(context) - 1], vocab_size=260) as llm:
        output = llm.generate([1], SamplingParams(stop=["b<eos>", "x"]))[0]
        assert (output.text, output.matched_stop, output.finish_reason) == ("a", EOS, "stop")


def test_special_tokens_that_are_shown_are_ordinary_text_to_a_stop() -> None:
    with make_llm(tokenizer=TAGS, next_token=lambda context: [97, START, 98][len(context) - 1], vocab_size=260) as llm:
        params = SamplingParams(max_new_tokens=3, skip_special_tokens=False)
        for stop, text in (("<start>", "a"), ("art>", "a<st"), ("<start>b", "a"), ("ab", "a<start>b")):
            assert llm.generate([1], params.replace(stop=stop))[0].text == text


def test_min_new_tokens_counts_hidden_tokens() -> None:
    with make_llm(tokenizer=TAGS, next_token=lambda context: START, vocab_size=260) as llm:
        output = llm.generate([1], SamplingParams(max_new_tokens=9, min_new_tokens=4, stop="<start>"))[0]
        assert (output.num_tokens, output.matched_stop, output.text) == (4, "<start>", "")


def test_structured_output_with_a_stop_that_ends_with_eos() -> None:
    with make_llm(tokenizer=TAGS, next_token=lambda context: [97, 98, EOS][len(context) - 1], vocab_size=260) as llm:
        params = SamplingParams(structured=StructuredOutput(regex="[ab]+"), stop="b<eos>")
        output = llm.generate([1], params)[0]
        assert (output.text, output.matched_stop) == ("a", "b<eos>")


@given(_stops)
def test_what_is_shown_never_holds_a_stop(stops: list[str]) -> None:
    detokenizer = IncrementalDetokenizer(TAGS, [], TAGS.special_ids, stops)
    text = ""
    for token_id in ids("a<", START, "a>b", END, "b<a>ab", START, START, "<b"):
        text += detokenizer.push(token_id)
        if detokenizer.stopped is not None:
            break
    text += detokenizer.finish()
    assert not any(stop in text for stop in stops)

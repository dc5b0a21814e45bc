"""AnswerParser: the same answer however its text is divided, for every format, also where the text is not a call."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine.chat.answers import (
    TOOL_FORMATS,
    Answer,
    AnswerEvent,
    AnswerFormat,
    AnswerParser,
    ReasoningDelta,
    ReasoningFormat,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
)

THINK = ReasoningFormat("<think>", "</think>")
HERMES = AnswerFormat(TOOL_FORMATS["hermes"], THINK)
LLAMA = AnswerFormat(TOOL_FORMATS["llama_json"])
QWEN_XML = AnswerFormat(TOOL_FORMATS["qwen_xml"], THINK)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": "object"}},
            },
        },
    },
    {"name": "now"},
]
PARIS = '{"city": "Paris", "days": 3}'


def events_of(form: AnswerFormat, pieces: Iterable[str], prompt: str = "") -> list[AnswerEvent]:
    ids = itertools.count()
    parser = AnswerParser(form, prompt, TOOLS, new_id=lambda: f"id{next(ids)}")
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish()


def answer_of(form: AnswerFormat, text: str, prompt: str = "") -> Answer:
    """The answer, which must not depend on how the text is divided."""
    answers = {
        Answer.of(events_of(form, [text[at : at + size] for at in range(0, len(text), size)], prompt))
        for size in (1, 2, 3, 5, 8, 13, max(1, len(text)))
    }
    assert len(answers) == 1
    return answers.pop()


def calls_of(answer: Answer) -> list[tuple[str, str]]:
    assert all(call.complete for call in answer.tool_calls)
    return [(call.name, call.arguments) for call in answer.tool_calls]


# Format, text, and the content beside a call of weather(PARIS) and, if there are two, one of now({}).
ANSWERS = {
    "hermes": (
        HERMES,
        f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "hermes, other order": (
        HERMES,
        f'Let me see.<tool_call>{{"arguments": {PARIS}, "name": "weather"}}</tool_call><tool_call>{{"name": "now"}}',
    ),
    "hermes, both in one": (
        HERMES,
        f'Let me see. <tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n{{"name": "now"}}\n</tool_call>\n',
    ),
    "hermes, OpenAI's wrapper": (
        HERMES,
        f'Let me see. <tool_call>{{"type": "function", "function": {{"name": "weather", "arguments": {PARIS}}}}}'
        '</tool_call><tool_call>{"function": "now", "parameters": null}</tool_call>',
    ),
    "arguments as a string": (
        HERMES,
        f'Let me see. <tool_call>{{"name": "weather", "arguments": {json.dumps(PARIS)}}}</tool_call>'
        '<tool_call>{"name": "now"}</tool_call>',
    ),
    "qwen_xml": (
        QWEN_XML,
        "Let me see.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "qwen_xml without outer tags": (
        QWEN_XML,
        "Let me see. <function=weather><parameter=city>Paris</parameter><parameter=days>3</parameter></function>"
        "<function=now></function>",
    ),
    "mistral": (
        AnswerFormat(TOOL_FORMATS["mistral"]),
        f'Let me see.[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}, "id": "123456789"}}, '
        '{"name": "now", "arguments": {}}]',
    ),
    "mistral_args": (
        AnswerFormat(TOOL_FORMATS["mistral_args"]),
        f"Let me see.[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{{}}",
    ),
    "mistral without [ARGS]": (
        AnswerFormat(TOOL_FORMATS["mistral_args"]),
        f"Let me see.[TOOL_CALLS]weather{PARIS}[TOOL_CALLS]now{{}}",
    ),
    "granite": (
        AnswerFormat(TOOL_FORMATS["granite"]),
        f'Let me see.<|tool_call|>[{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]',
    ),
    "granite, other marker": (
        AnswerFormat(TOOL_FORMATS["granite"]),
        f'Let me see.<tool_call>[{{"arguments": {PARIS}, "name": "weather"}},{{"name": "now"}}]',
    ),
    "phi": (
        AnswerFormat(TOOL_FORMATS["phi"]),
        f'Let me see.<|tool_call|>[{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now"}}]<|/tool_call|>',
    ),
    "llama, behind text": (
        LLAMA,
        f'Let me see. <|python_tag|>{{"name": "weather", "parameters": {PARIS}}}; {{"name": "now"}}',
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_of_every_format(name: str) -> None:
    form, text = ANSWERS[name]
    answer = answer_of(form, text)
    assert answer.content == "Let me see."
    first, second = calls_of(answer)
    assert first[0] == "weather"
    assert json.loads(first[1]) == json.loads(PARIS)
    assert second == ("now", "{}")


def test_every_format_has_a_test() -> None:
    assert {form.tools.name for form, _ in ANSWERS.values() if form.tools} == set(TOOL_FORMATS)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(ANSWERS)),
    st.lists(st.integers(0, 400), max_size=40),
    st.integers(0, 400),
    st.integers(0, 400),
    st.text('<>{}[]"\\:, \nabtool_cal/|TOOL_CALLS', max_size=12),
)
def test_splits_change_nothing(name: str, cuts: Sequence[int], begin: int, end: int, noise: str) -> None:
    """Any text, made from a real answer by replacing a part of it, gives the same events in any pieces."""
    form, text = ANSWERS[name]
    text = text[:begin] + noise + text[max(begin, end) :]
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[first:last] for first, last in itertools.pairwise(places)]
    whole = Answer.of(events_of(form, [text]))
    assert Answer.of(events_of(form, pieces)) == whole
    assert Answer.of(events_of(form, text)) == whole
    for call in whole.tool_calls:
        if call.complete:
            assert isinstance(json.loads(call.arguments), dict)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.booleans(),
    st.sampled_from([1, 2, 7, 10_000]),
)
def test_arguments_are_the_very_text(value: Any, ascii_only: bool, size: int) -> None:
    arguments = json.dumps({"value": value}, ensure_ascii=ascii_only, indent=size % 3 or None)
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    answer = Answer.of(events_of(HERMES, [text[at : at + size] for at in range(0, len(text), size)]))
    assert calls_of(answer) == [("f", arguments)]


def test_id_and_name_come_once_and_arguments_as_they_are_written() -> None:
    text = f'<tool_call>{{"name": "weather", "arguments": {PARIS}}}</tool_call>'
    events = events_of(HERMES, text)
    begins = [event for event in events if isinstance(event, ToolCallBegin)]
    assert [(event.index, event.id, event.name) for event in begins] == [(0, "id0", "weather")]
    deltas = [event.text for event in events if isinstance(event, ToolArgumentsDelta)]
    assert "".join(deltas) == PARIS
    assert len(deltas) >= len(PARIS) - 1, "only a number waits for its end"
    assert events[-1] == ToolCallEnd(0, True, events[-1].tokens)


def test_a_call_in_one_piece_is_complete() -> None:
    kinds = [type(event) for event in events_of(HERMES, ['<tool_call>{"name": "now", "arguments": {}}</tool_call>'])]
    assert kinds == [ToolCallBegin, ToolArgumentsDelta, ToolCallEnd]


def test_text_is_held_back_only_where_a_marker_may_begin() -> None:
    parser = AnswerParser(HERMES)
    held = {piece: [event.text for event in parser.feed(piece)] for piece in ("a < b", " <", "to", "p", " \n", "end")}
    assert held == {"a < b": ["a < b"], " <": [], "to": [], "p": [" <top"], " \n": [], "end": [" \nend"]}
    plain = AnswerParser(AnswerFormat())
    assert [event.text for event in plain.feed(" \n<tool_call>")] == [" \n<tool_call>"]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "What is a <tool_call> for?"),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": 1}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>'),
        (HERMES, r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>'),
        (HERMES, r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\ud800\"}"}</tool_call>'),
        (HERMES, 'a\n <tool_call>\n{"name": "f", "argum'),
        (HERMES, "a </tool_call> b"),
        (HERMES, " \n "),
        (HERMES, "<tool_cal"),
        (LLAMA, '{"name": "Paris", "parameters": {}}'),
        (LLAMA, '{"city": "Paris"}'),
        (LLAMA, "<|python_tag|>print(1)"),
        (LLAMA, '[{"name": "now", "parameters": {}}]'),
        (LLAMA, 'So: {"name": "now", "parameters": {}}'),
        (QWEN_XML, "<tool_call>\n<fun>"),
        (QWEN_XML, "<function=>"),
        (AnswerFormat(TOOL_FORMATS["mistral_args"]), "[TOOL_CALLS]now[ARG]{}"),
        (AnswerFormat(TOOL_FORMATS["mistral"]), "[TOOL_CALLS] []"),
    ],
)
def test_what_is_not_a_call_is_text_with_nothing_lost(form: AnswerFormat, text: str) -> None:
    answer = answer_of(form, text)
    assert answer == Answer(content=text)


def test_arguments_that_break_off_end_the_call_as_not_complete() -> None:
    cut = answer_of(HERMES, '<tool_call>{"name": "f", "arguments": {"a": tru')
    assert [(call.arguments, call.complete) for call in cut.tool_calls] == [('{"a": tru', False)]
    assert cut.content is None
    wrong = answer_of(HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1 "b"}}</tool_call> Sorry.')
    assert [(call.arguments, call.complete) for call in wrong.tool_calls] == [('{"a": 1 ', False)]
    assert wrong.content == '"b"}}</tool_call> Sorry.'


def test_faults_that_models_make_are_mended() -> None:
    raw = '{"a": "x\ny\t", "b": "\\d\\\'", "c": True, "d": None}'
    answer = answer_of(HERMES, f'<tool_call>{{"name": "f", "arguments": {raw}}}</tool_call>')
    assert json.loads(answer.tool_calls[0].arguments) == {"a": "x\ny\t", "b": "\\d\\'", "c": True, "d": None}


def test_deep_arguments_do_not_exhaust_the_stack() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 5000
    assert not answer_of(HERMES, text).tool_calls[0].complete


def test_xml_values_have_the_types_of_the_schema() -> None:
    values = {"city": "12", "days": "[1, 2]", "units": '{"t": "C"}', "other": "7"}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    answer = answer_of(QWEN_XML, f"<tool_call>\n<function=weather>\n{parameters}</function>\n</tool_call>")
    found = json.loads(answer.tool_calls[0].arguments)
    assert found == {"city": "12", "days": [1, 2], "units": {"t": "C"}, "other": "7"}


GRANITE_WORDS = AnswerFormat(reasoning=ReasoningFormat("Here is my thought process:", "Here is my response:"))
RESPONSE = AnswerFormat(reasoning=THINK, ignored=("<response>", "</response>"))
ALWAYS = AnswerFormat(reasoning=ReasoningFormat("<think>", "</think>", always=True))


@pytest.mark.parametrize(
    ("form", "prompt", "text", "expected"),
    [
        (HERMES, "", "<think>\nWell, 1 < 2.\n\nYes.\n</think>\n\nHello.\n", ("Well, 1 < 2.\n\nYes.", "Hello.\n")),
        (HERMES, "<think>\n", "Well.\n</think>\n\nHello.", ("Well.", "Hello.")),
        (HERMES, "<think>\n", "<think>\nWell.</think>Hello.", ("Well.", "Hello.")),
        (HERMES, "<think>\n\n</think>\n\n", "Hello.", (None, "Hello.")),
        (HERMES, "", "<think>\n\n</think>\n\nHello.", (None, "Hello.")),
        (HERMES, "", "Hello, <think> is a tag </think>.", (None, "Hello, <think> is a tag </think>.")),
        (HERMES, "<think>", "Not done", ("Not done", None)),
        (HERMES, "<think>", "Not done </thin", ("Not done </thin", None)),
        (HERMES, "", "  Hello ", (None, "  Hello ")),
        (ALWAYS, "", "Well.\n</think>\nHello.", ("Well.", "Hello.")),
        (ALWAYS, "", "<think>Well.</think>Hello.", ("Well.", "Hello.")),
        (GRANITE_WORDS, "", "Here is my thought process: Hm.\n\nHere is my response: Yes.", ("Hm.", "Yes.")),
        (RESPONSE, "", "<think>Hm.</think><response>Yes.</response>", ("Hm.", "Yes.")),
        (
            AnswerFormat(reasoning=ReasoningFormat("[THINK]", "[/THINK]")),
            "",
            "[THINK]Hm.[/THINK]Yes.",
            ("Hm.", "Yes."),
        ),
    ],
)
def test_reasoning(form: AnswerFormat, prompt: str, text: str, expected: tuple[str | None, str | None]) -> None:
    answer = answer_of(form, text, prompt)
    assert (answer.reasoning, answer.content) == expected
    assert answer.tool_calls == ()


def test_a_call_inside_of_reasoning_is_reasoning() -> None:
    text = '<think><tool_call>{"name": "now"}</tool_call></think><tool_call>{"name": "now"}</tool_call>'
    answer = answer_of(HERMES, text)
    assert answer.reasoning == '<tool_call>{"name": "now"}</tool_call>'
    assert calls_of(answer) == [("now", "{}")]


def test_every_token_belongs_to_at_most_one_event() -> None:
    pieces = [
        "<think>",
        "\n",
        "So",
        ".",
        "\n",
        "</think>",
        "\n\n",
        "Let",
        " me",
        "",
        " see",
        ".\n",
        "<tool_call>",
        "\n",
    ]
    pieces += ['{"name": "', "weather", '", "arguments": ', PARIS[:5], PARIS[5:], "}\n", "</tool_call>", ""]
    events = events_of(HERMES, pieces)
    owned = [token for event in events for token in event.tokens]
    assert owned == sorted(set(owned))
    for event in events:
        if isinstance(event, ReasoningDelta | TextDelta):
            assert event.text.strip() == "".join(pieces[token] for token in event.tokens).strip()
    text = [token for event in events if isinstance(event, TextDelta) for token in event.tokens]
    assert text == [7, 8, 9, 10, 11]


def test_text_without_a_token_has_none() -> None:
    parser = AnswerParser(AnswerFormat())
    assert parser.feed("a") == [TextDelta("a", range(1))]
    assert parser.feed("b", is_token=False) == [TextDelta("b")]
    assert parser.feed("c") == [TextDelta("c", range(1, 2))]


def test_ids_are_unique_and_as_the_template_wants_them() -> None:
    text = '[TOOL_CALLS][{"name": "a"}, {"name": "b"}]'
    calls = Answer.of(AnswerParser(AnswerFormat(TOOL_FORMATS["mistral"])).feed(text)).tool_calls
    assert len({call.id for call in calls}) == 2
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)
    hermes = Answer.of(AnswerParser(HERMES).feed('<tool_call>{"name": "a"}</tool_call>')).tool_calls
    assert hermes[0].id.startswith("call_")

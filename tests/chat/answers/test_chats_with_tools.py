"""Chats whose answers are divided by the library: keywords, streams, special tokens, stops, readers and pickles."""

from __future__ import annotations

import json
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llmengine import LLM, GenerationOutput, InvalidRequestError, SamplingParams
from llmengine.batch import SlotInit
from llmengine.chat.answers import (
    TOOL_FORMATS,
    Answer,
    AnswerEvent,
    AnswerFormat,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
)
from llmengine.testing import CHAT_TEMPLATE, FakeBackend
from llmengine.tokenizer.protocol import TransformersTokenizer
from tests.chat.answers.tokens import MarkerTokenizer, saying
from tests.chat.helpers import reference_tokenizer

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
HERMES = """{% if tools %}<tools>{{ tools | tojson }}</tools> Write <tool_call>{"name": ...}</tool_call>
{% endif %}{% for message in messages %}<{{ message.role }}>{{ message.content }}
{% endfor %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}"""
MISTRAL = HERMES.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "[ARGS]")
ASK = [{"role": "user", "content": "How is the weather in Paris?"}]
PARAMS = SamplingParams(max_new_tokens=500)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@contextmanager
def model_saying(text: str, template: str = HERMES, **options: Any) -> Iterator[LLM]:
    tokenizer = MarkerTokenizer(template)
    with LLM.from_backend(lambda: saying(text, tokenizer, **options), tokenizer=tokenizer) as llm:
        yield llm


async def streamed(handle: AsyncIterator[GenerationOutput]) -> tuple[list[AnswerEvent], GenerationOutput]:
    events, output = [], None
    async for output in handle:
        events += output.answer_delta
    assert output is not None
    return events, output


async def test_streams_add_up_to_the_answer() -> None:
    with model_saying(f"<think>\nHm.\n</think>\n\nLet me look.\n{CALL}") as llm:
        events, output = await streamed(llm.chat_async(ASK, PARAMS, streaming=True, tools=[WEATHER]))
    assert Answer.of(events) == output.answer
    assert (output.reasoning, output.content) == ("Hm.", "Let me look.")
    (call,) = output.tool_calls
    assert (call.name, call.arguments, call.complete) == ("weather", '{"city": "Paris"}', True)
    kinds = list(dict.fromkeys(type(event) for event in events))
    assert kinds == [ReasoningDelta, TextDelta, ToolCallBegin, ToolArgumentsDelta, ToolCallEnd]
    assert output.text.endswith(CALL), "the text is as the model wrote it"


def test_only_chats_are_divided() -> None:
    with model_saying(f"<think>Hm.</think>{CALL}") as llm:
        prompt = "<user>Hi\n<assistant>"
        output = llm.generate(prompt, PARAMS)[0]
        assert output.answer == Answer(content=output.text)
        assert output.answer_delta == [TextDelta(output.text, range(output.num_tokens))]
        without_tools = llm.chat(ASK, PARAMS)
    assert without_tools.reasoning == "Hm."
    assert without_tools.content == CALL, "without tools, there are no calls"


def test_markers_that_are_special_tokens_are_read_and_others_stay_hidden() -> None:
    with model_saying('<extra>Hi.[TOOL_CALLS]weather[ARGS]{"city": "Paris"}', MISTRAL) as llm:
        output = llm.chat(ASK, PARAMS, tools=[WEATHER])
        assert [(call.name, call.arguments) for call in output.tool_calls] == [("weather", '{"city": "Paris"}')]
        assert output.content == "Hi."
        assert llm.chat(ASK, PARAMS).text == 'Hi.weather{"city": "Paris"}'
        kept = llm.generate("<assistant>", PARAMS.replace(keep_special_tokens="[ARGS]"))[0]
    assert kept.text == 'Hi.weather[ARGS]{"city": "Paris"}'


def test_no_thinking_and_the_form_that_the_template_shows() -> None:
    with model_saying("<think> is a tag.", prompt_end="</think>\n\n") as llm:
        output = llm.chat(ASK, PARAMS, enable_thinking=False)
        form = llm.answer_format()
    assert form.tools is not None
    assert form.reasoning is not None
    assert (form.tools.name, form.reasoning.begin) == ("hermes", "<think>")
    assert output.prompt is not None
    assert output.prompt.endswith("</think>\n\n")
    assert output.content == "<think> is a tag."


def test_the_form_is_found_through_a_tokenizer_of_transformers() -> None:
    tokenizer = TransformersTokenizer(reference_tokenizer({"default": "{{ messages }}", "tool_use": HERMES}))
    with LLM.from_backend(FakeBackend, tokenizer=tokenizer) as llm:
        assert llm.answer_format(has_tools=False) == AnswerFormat()
        assert llm.answer_format().tools == TOOL_FORMATS["hermes"]
        assert llm.answer_format("[TOOL_CALLS]{{ messages }}").tools == TOOL_FORMATS["mistral"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("Hm", Answer(reasoning="So. ")),
        ("look", Answer("So. Hm.", "Let me ")),
        ('"city', Answer("So. Hm.", "Let me look.")),
    ],
)
def test_stop_strings_cut_reasoning_text_and_calls_alike(stop: str, expected: Answer) -> None:
    with model_saying(f"<think>So. Hm.</think>Let me look.{CALL}") as llm:
        output = llm.chat(ASK, PARAMS.replace(stop=stop), tools=[WEATHER])
    assert (output.finish_reason, output.matched_stop) == ("stop", stop)
    assert (output.reasoning, output.content) == (expected.reasoning, expected.content)
    assert [(call.arguments, call.complete) for call in output.tool_calls] == (
        [("{", False)] if stop == '"city' else []
    )


async def test_tokens_of_events_are_those_of_the_text() -> None:
    with model_saying(f"<think>Hm.</think>Let me look.{CALL}") as llm:
        params = PARAMS.replace(logprobs=0)
        events, output = await streamed(llm.chat_async(ASK, params, streaming=True, tools=[WEATHER]))
    positions = [position for event in events if isinstance(event, TextDelta) for position in event.tokens]
    decoded = output.decoded_logprobs
    assert decoded is not None
    assert "".join(next(iter(decoded[at].values())).decoded_token or "" for at in positions) == output.content


async def test_every_reader_and_a_copy_see_the_same_calls() -> None:
    with model_saying(f"Yes.{CALL}") as llm:
        handle = llm.chat_async(ASK, PARAMS, streaming=True, tools=[WEATHER])
        late = handle.subscribe()
        outputs = [output async for output in handle]
        events, output = await streamed(late)
    assert Answer.of(events) == outputs[-1].answer == output.answer
    assert pickle.loads(pickle.dumps(output)).answer == output.answer
    middle = outputs[len(outputs) // 2]
    copy = pickle.loads(pickle.dumps(middle))
    assert (copy.answer, copy.answer_delta) == (middle.answer, middle.answer_delta)


def test_choice_none_reads_no_calls_and_rules_the_marker_out() -> None:
    with model_saying(CALL) as llm:
        output = llm.chat(ASK, PARAMS, tools=[WEATHER], tool_choice="none")
    assert output.tool_calls == ()
    assert output.prompt is not None
    assert "<tools>" in output.prompt
    inits: list[SlotInit] = []
    with model_saying("x", MISTRAL, on_step=lambda batch: inits.extend(batch.slot_inits)) as llm:
        llm.chat(ASK, PARAMS, tools=[WEATHER], tool_choice="none")
    assert inits[0].sampling_params.bad_words == ((258,),)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice must be one of 'none', 'auto', 'required', or"),
        ({"tools": [WEATHER], "tool_choice": {"name": "time"}}, "not among the tools: 'weather'"),
        ({"tools": [{"function": {}}], "tool_choice": "required"}, r"tools\[0\] must have a function with a string"),
        ({"tools": [WEATHER], "tool_format": "hermit"}, "tool_format must be one of 'hermes'"),
        ({"tools": [WEATHER], "parallel_tool_calls": "no"}, "parallel_tool_calls must be True or False"),
    ],
)
def test_wrong_choices_are_refused(keywords: dict[str, Any], message: str) -> None:
    with model_saying("Hi") as llm, pytest.raises(InvalidRequestError, match=message):
        llm.chat(ASK, PARAMS, **keywords)


@pytest.mark.parametrize(
    ("message", "field", "reasoning", "content"),
    [
        ({"content": "<think>I thi"}, True, "nk.", "Yes."),
        ({"content": "", "reasoning_content": "I thi"}, "reasoning_content", "nk.", "Yes."),
        ({"content": "I thi"}, "content", None, "nk.</think>Yes."),
    ],
)
def test_a_continued_message_says_whether_it_is_reasoning(
    message: dict[str, Any], field: str | bool, reasoning: str | None, content: str
) -> None:
    template = HERMES.partition("<assistant>")[0].replace(
        "message.content", "(message.reasoning_content or message.content)"
    )
    template = template.replace("\n{% endfor %}", "{% endfor %}{# <think></think> #}")
    history = [*ASK, {"role": "assistant", **message}]
    with model_saying("nk.</think>Yes.", template, prompt_end="I thi") as llm:
        output = llm.chat(history, PARAMS, continue_final_message=field)
    assert (output.reasoning, output.content) == (reasoning, content)


def test_calls_of_an_unknown_form_cannot_be_enforced() -> None:
    template = CHAT_TEMPLATE + "{% if tools %}{{ tools }}{% endif %}"
    with model_saying("Hi", template) as llm, pytest.raises(InvalidRequestError, match="pass tool_format="):
        llm.chat(ASK, PARAMS, tools=[WEATHER], tool_choice="required")


def test_tools_are_described_to_templates_without_tools_if_the_caller_wants_it() -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", **WEATHER, "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "wind"}]},
    ]
    with model_saying(CALL, CHAT_TEMPLATE) as llm:
        with pytest.raises(InvalidRequestError, match=r"does not use tools.*tool_format="):
            llm.chat(ASK, PARAMS, tools=[WEATHER])
        output = llm.chat(history, PARAMS, tools=[WEATHER], tool_format="hermes")
        short = llm.chat(ASK, PARAMS, tools=[WEATHER], tool_format="hermes")
    assert [call.name for call in output.tool_calls] == ["weather"]
    prompt = output.prompt
    assert prompt is not None
    assert prompt.startswith("<system>Be brief.\n\nYou can call functions")
    assert json.dumps(WEATHER["function"]) in prompt
    assert '<assistant><tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n' in prompt
    assert "<user><tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response>\n" in prompt
    assert short.prompt is not None
    assert short.prompt.startswith("<user>You can call functions")


def test_a_template_that_reads_tools_from_the_system_message_gets_them_there() -> None:
    """As Phi-4-mini's does."""
    template = """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}
<|system|>{{ message['content'] }}<|tool|>{{ message['tools'] }}<|/tool|>{% else %}<|{{ message['role'] }}|>
{{ message['content'] }}{% endif %}{% endfor %}<assistant>"""
    text = '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}]<|/tool_call|>'
    with model_saying(text, template) as llm:
        output = llm.chat(ASK, PARAMS, tools=[WEATHER])
    assert output.prompt is not None
    assert f"<|tool|>{json.dumps([WEATHER['function']])}<|/tool|>" in output.prompt
    assert [call.name for call in output.tool_calls] == ["weather"]

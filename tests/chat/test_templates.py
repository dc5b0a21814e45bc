"""Chats as people send them, through templates like many models', compared with transformers where it can render."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pydantic
import pytest

from llmengine.chat.template import ChatTemplate, ChatTemplates
from llmengine.errors import InvalidRequestError
from tests.chat.helpers import DEEPSEEK, SPECIAL_TOKENS, TEMPLATES, reference_tokenizer

USER: dict[str, Any] = {"role": "user", "content": "Hi <there> & \"you\" 'ünï'"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": " Yes? \n"}
SYSTEM: dict[str, Any] = {"role": "system", "content": " Be brief. "}
ARGUMENTS = {"a": 3, "b": {"c": "é"}}
TOOL = {"type": "function", "function": {"name": "f<x>", "parameters": {"type": "object", "properties": {}}}}
WITH_CALLS = ("llama3", "qwen3", "qwen_coder", "deepseek", "mistral", "granite", "dump")
WITH_TOOLS = ("llama3", "qwen3", "mistral", "granite", "dump")
WITH_SYSTEM = tuple(name for name in TEMPLATES if name not in ("mistral", "gemma", "deepseek"))


def render(template: str, messages: Any, **variables: Any) -> str:
    """Render with the template of this name, or with this template."""
    tools, prompt = variables.pop("tools", None), variables.pop("add_generation_prompt", None)
    source = TEMPLATES.get(template, template)
    return ChatTemplate(source, SPECIAL_TOKENS).render(messages, prompt, tools, variables)


def reference(template: str, messages: Any, add_generation_prompt: bool = True, **variables: Any) -> str:
    """Render with transformers."""
    tokenizer = reference_tokenizer(TEMPLATES.get(template, template))
    text = tokenizer.apply_chat_template(
        copy.deepcopy(messages), add_generation_prompt=add_generation_prompt, tokenize=False, **variables
    )
    assert isinstance(text, str)
    return text


def call(arguments: Any, **changes: Any) -> dict[str, Any]:
    """Return an assistant's message with a call and without content."""
    function = {"name": "mul", "arguments": arguments}
    tool_call = {"id": "123456789", "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [tool_call], **changes}


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its content as one part."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_chats_are_as_in_transformers(name: str, add_generation_prompt: bool) -> None:
    messages = [*([SYSTEM] if name in WITH_SYSTEM else []), USER, ANSWER, USER]
    given = list(map(in_parts, messages)) if name in ("parts_only", "first_part") else messages
    rendered = render(name, messages, add_generation_prompt=add_generation_prompt)
    assert rendered == reference(name, given, add_generation_prompt)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "dump"])
def test_text_and_one_part_of_it_are_the_same(name: str) -> None:
    messages = [*([SYSTEM] if name in WITH_SYSTEM else []), USER, ANSWER, USER]
    expected = render(name, messages)
    assert render(name, list(map(in_parts, messages))) == expected
    assert render(name, [*messages[:-1], in_parts(USER)]) == expected
    assert render(name, [*messages[:-1], {**USER, "content": [USER["content"]]}]) == expected
    assert "'type'" not in expected


def test_several_parts_are_the_templates_own_or_lines() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]}
    for name in ("llama_vision", "gemma"):
        assert "ab" in render(name, [message])
    assert "User: a b<end>" in render("parts_only", [message])
    for name in ("chatml", "llama2", "llama3", "qwen3", "qwen_coder", "deepseek", "mistral", "granite", "first_part"):
        assert "a\nb" in render(name, [message]), name


def test_a_template_may_want_parts_of_one_role_and_text_of_another() -> None:
    messages = [in_parts(SYSTEM), {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]
    assert render("llama_vision", messages) == "<s><|sys|>Be brief.<|eot|><|user|>ab<|eot|><|assistant|>"


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video", "file"])
def test_parts_that_are_no_text_are_named(kind: str) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]}
    for name in ("chatml", "llama_vision"):
        with pytest.raises(InvalidRequestError, match=rf'messages\[0\]\["content"\]\[1\].*{kind}.*text only'):
            render(name, [message])


@pytest.mark.parametrize(
    "part", [{"type": ["text"], "text": "a"}, {"type": "text"}, {"type": "text", "text": 5}, 5, None]
)
def test_malformed_parts_are_named(part: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r'messages\[0\]\["content"\]\[0\]'):
        render("chatml", [{"role": "user", "content": [part]}])


@pytest.mark.parametrize("name", WITH_CALLS)
def test_arguments_as_text_or_as_an_object(name: str) -> None:
    as_text = json.dumps(ARGUMENTS, ensure_ascii=False)
    if name == "deepseek":  # transformers leaves the missing content undefined, which is not none
        expected = f"<s><U>{USER['content']}<call>function<sep>mul\n```json\n{as_text}\n```<end>"
    else:
        expected = reference(name, [USER, call(ARGUMENTS)], False)
    for arguments in (ARGUMENTS, as_text, MappingProxyType(ARGUMENTS)):
        for content in ({}, {"content": None}):
            messages = [USER, call(arguments, **content)]
            assert render(name, messages, add_generation_prompt=False) == expected, (arguments, content)
    if name not in ("qwen_coder", "dump"):
        assert as_text in expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ c.arguments }}", '{"a":1}'),
        ("{{ 'x' + c.arguments + 'y' }}", 'x{"a":1}y'),
        ("{{ 'x' ~ c.arguments }}", 'x{"a":1}'),
        ("{{ c.arguments | trim }}", '{"a":1}'),
        ("{{ c.arguments.strip() }}", '{"a":1}'),
        ("{{ '%s' % c.arguments }}", '{"a":1}'),
        ("{{ c.arguments | tojson }}", '{"a": 1}'),
        ("{{ c | tojson }}", '{"name": "f", "arguments": {"a": 1}}'),
        ("{{ [c.arguments] | tojson }}", '[{"a": 1}]'),
        ("{{ c }}", "{'name': 'f', 'arguments': {'a': 1}}"),
        ("{% for k, v in c.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        ("{% for k in c.arguments %}{{ k }}={{ c.arguments[k] }}{% endfor %}", "a=1"),
        ("{% for k, v in c.arguments | dictsort %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        ("{{ c.arguments.a }}", "1"),
        ("{{ c.arguments | tojson if c.arguments is mapping else c.arguments }}", '{"a": 1}'),
        ("{{ c.arguments if c.arguments is string else c.arguments | tojson }}", '{"a": 1}'),
        ("{% if c.arguments is string %}{{ c.arguments }}{% endif %}", '{"a":1}'),
        ("{% if c.arguments is not string %}{{ raise_exception('text!') }}{% endif %}{{ c.arguments }}", '{"a":1}'),
        ("{% set a = c.arguments | default({}) %}{% if a is string %}{{ a }}{% endif %}", '{"a":1}'),
    ],
)
def test_each_template_gets_the_arguments_that_it_reads(source: str, expected: str) -> None:
    template = f"{{% for m in messages %}}{{% set c = m.tool_calls[0].function %}}{source}{{% endfor %}}"
    tool_call = {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [tool_call]}
    assert render(template, [message]) == expected
    tool_call["function"] = {"name": "f", "arguments": {"a": 1}}
    assert render(template, [message]) == expected.replace('{"a":1}', '{"a": 1}')


@pytest.mark.parametrize("given", [{}, "{}", "", None, "  "])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ c.arguments | tojson }}", "{}"),
        ("{{ c.arguments }}", "{}"),
        ("{% if c.arguments %}{{ c.arguments | tojson }}{% else %}none{% endif %}", "none"),
        ("{% for k in c.arguments %}{{ k }}{% else %}none{% endfor %}", "none"),
    ],
)
def test_calls_without_arguments(source: str, expected: str, given: Any) -> None:
    template = f"{{% set c = messages[0].tool_calls[0].function %}}{source}"
    assert render(template, [call(given)]).strip() == expected


@pytest.mark.parametrize("arguments", ['{"a": 1', "a=1", '["a"]', "3", '"{}"', [1], 3, "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    for name in ("qwen3", "deepseek"):
        with pytest.raises(
            InvalidRequestError, match=r'messages\[1\]\["tool_calls"\]\[0\]\["function"\]\["arguments"\]'
        ):
            render(name, [USER, call(arguments)])


def test_calls_without_their_wrapper() -> None:
    for name in WITH_CALLS:
        wrapped = call(ARGUMENTS)["tool_calls"][0]
        flat = {"id": wrapped["id"], **wrapped["function"]}
        rendered = render(name, [USER, {"role": "assistant", "tool_calls": [flat]}])
        assert json.loads(json.dumps(rendered)) == render(name, [USER, {"role": "assistant", "tool_calls": [wrapped]}])
    template = "{% for c in messages[0].tool_calls %}{{ c.name }}{{ c.arguments | tojson }}{% endfor %}"
    assert render(template, [call('{"a": 1}')]) == 'mul{"a": 1}'


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_none(calls: Any) -> None:
    for name in ("llama3", "qwen3", "mistral"):
        assert render(name, [USER, {**ANSWER, "tool_calls": calls}]) == render(name, [USER, ANSWER])


def result(content: Any) -> list[dict[str, Any]]:
    """Return a conversation that ends in a tool's result."""
    return [USER, call(ARGUMENTS), {"role": "tool", "tool_call_id": "123456789", "name": "mul", "content": content}]


@pytest.mark.parametrize("name", [name for name in WITH_CALLS if name != "dump"])
def test_results_of_tools(name: str) -> None:
    text = render(name, result("54"))
    assert "54" in text
    assert render(name, result([{"type": "text", "text": "54"}])) == text
    assert render(name, result(54)) == text
    assert '{"t": 22}' in render(name, result({"t": 22}))
    assert "[1, 2]" in render(name, result([1, 2])).replace('"[1, 2]"', "[1, 2]")
    assert "None" not in render(name, result(None))
    if name == "llama3":
        assert render(name, result({"t": 22})) == reference(name, result({"t": 22}))


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_are_as_in_transformers(name: str) -> None:
    assert render(name, [USER], tools=[TOOL]) == reference(name, [USER], tools=[TOOL])
    assert render(name, [USER], tools=[TOOL["function"]]) == render(name, [USER], tools=(MappingProxyType(TOOL),))
    assert render(name, [USER], tools=[]) == render(name, [USER], tools=None) == render(name, [USER])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in WITH_TOOLS])
def test_tools_that_would_be_lost_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="does not use tools"):
        render(name, [USER], tools=[TOOL])


def test_documents() -> None:
    documents = [{"title": "t", "text": "x"}]
    assert render("granite", [USER], documents=documents) == reference("granite", [USER], documents=documents)
    assert render("granite", [USER], documents=None) == render("granite", [USER], documents=[])
    with pytest.raises(InvalidRequestError, match="does not use documents"):
        render("qwen3", [USER], documents=documents)
    with pytest.raises(InvalidRequestError, match="documents must be a list of dicts"):
        render("granite", [USER], documents=["x"])


def test_variables_that_the_template_reads() -> None:
    for value in (True, False):
        assert render("qwen3", [USER], enable_thinking=value) == reference("qwen3", [USER], enable_thinking=value)
    assert render("qwen3", [USER], enable_thinking=None) == render("qwen3", [USER])
    assert "\nToday: 1 Jan" in render("llama3", [USER], date_string="1 Jan")
    assert '{"length": "long"}' in render("granite", [USER], controls={"length": "long"})
    assert render("chatml{{ bos_token }}", [USER], bos_token="[") == "chatml["


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"enable_thinkin": False}, "'enable_thinkin' is not a variable .* did you mean enable_thinking"),
        ({"add_generation_promt": False}, "did you mean add_generation_prompt"),
        ({"tool": []}, "did you mean tools"),
        ({"quux": 1}, "its variables: .*enable_thinking"),
        ({"message": 1}, "not a variable"),  # a variable of the template's loop
        ({"namespace": 1}, "not a variable"),
        ({"tokenize": False}, "reserved"),
    ],
)
def test_variables_that_it_does_not_read(variables: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        render("qwen3", [USER], **variables)


@pytest.mark.parametrize("text", ["The answer", "  spaced  ", "ends in a space ", "ünï\n"])
@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"parts_only", "first_part", "dump"}))
def test_the_final_message_is_continued_as_in_transformers(name: str, text: str) -> None:
    messages = [USER, {"role": "assistant", "content": text}]
    try:
        expected = reference(name, messages, False, continue_final_message=True)
    except ValueError:
        with pytest.raises(InvalidRequestError, match="continue_final_message"):
            render(name, messages, continue_final_message=True)
        return
    assert render(name, messages, continue_final_message=True) == expected
    assert render(name, messages, continue_final_message="content", add_generation_prompt=False) == expected
    assert render(name, [USER, in_parts(messages[1])], continue_final_message=True) == expected


def test_reasoning_is_continued_and_has_several_names() -> None:
    for field in ("reasoning_content", "reasoning", "thinking"):
        messages = [USER, {"role": "assistant", "content": "", field: "Let me"}]
        assert render("qwen3", messages).endswith("<think>Let me</think>\n<|im_end|>\n<|im_start|>assistant\n")
        expected = reference(
            "qwen3", messages, False, continue_final_message="reasoning_content" if field != "x" else ""
        )
        assert render("qwen3", messages, continue_final_message=field) == expected
    assert expected.endswith("<think>Let me")


def test_what_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        render("chatml", [USER], continue_final_message=True, add_generation_prompt=True)
    for messages in ([USER, call({})], [USER, {"role": "tool", "content": {"a": 1}}], [{**USER, "content": []}]):
        with pytest.raises(InvalidRequestError, match='needs text in "content" of the final message'):
            render("qwen3", messages, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match='chat template changes "content" of the final message'):
        render("qwen3", [USER, {"role": "assistant", "content": "<think>a</think>b"}], continue_final_message=True)
    with pytest.raises(InvalidRequestError, match='needs text in "thought" of the final message'):
        render("qwen3", [USER], continue_final_message="thought")
    with pytest.raises(InvalidRequestError, match="must be True, False or the name of a field, not 1"):
        render("qwen3", [USER], continue_final_message=1)


def test_roles_that_the_template_does_not_write() -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[1\] would be lost.*'critic'"):
        render("qwen3", [USER, {"role": "critic", "content": "x"}])
    assert "<|im_start|>critic" in render("chatml", [USER, {"role": "critic", "content": "x"}])
    with pytest.raises(InvalidRequestError, match=r"messages\[0\] would be lost.*'system'"):
        render("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", [SYSTEM, USER])
    with pytest.raises(InvalidRequestError, match="System role not supported"):
        render("gemma", [SYSTEM, USER])
    developer = {**SYSTEM, "role": "developer"}
    assert render("llama3", [developer, USER]) == render("llama3", [SYSTEM, USER])
    assert render("{{ messages[0].role }}{{ 'developer' }}", [developer]) == "developerdeveloper"


def test_calls_that_the_template_does_not_write() -> None:
    for name in ("chatml", "llama2", "gemma"):
        with pytest.raises(InvalidRequestError, match='does not use "tool_calls"'):
            render(name, [USER, call({})])
    with pytest.raises(InvalidRequestError, match=r'messages\[0\]\["function_call"\].*send "tool_calls"'):
        render("qwen3", [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}])


def test_objects_of_clients() -> None:
    class Function(pydantic.BaseModel):
        name: str
        arguments: str

    class Call(pydantic.BaseModel):
        id: str
        type: str
        function: Function

    class Answer(pydantic.BaseModel):
        role: str
        content: str | None = None
        refusal: str | None = None
        audio: dict[str, Any] | None = None
        function_call: dict[str, Any] | None = None
        tool_calls: list[Call] | None = None

    @dataclass
    class Question:
        role: str
        content: str

    answer = Answer(
        role="assistant",
        tool_calls=[
            Call(id="123456789", type="function", function=Function(name="mul", arguments=json.dumps(ARGUMENTS)))
        ],
    )
    for name in WITH_CALLS:
        expected = render(name, [USER, call(json.dumps(ARGUMENTS))])
        assert render(name, (Question(**USER), answer)) == expected
    assert render("qwen3", [USER, Answer(role="assistant", content="x")]) == render(
        "qwen3", [USER, {"role": "assistant", "content": "x"}]
    )


def test_content_that_is_missing_is_none_and_empty() -> None:
    for source in (
        "{{ m.content }}",
        "{{ '' + m.content }}",
        "{{ m['content'] | trim }}",
        "{{ m.content.split('</think>')[-1] }}",
        "{% if m.content is not none %}{{ raise_exception('content') }}{% endif %}",
        "{% if m.content is defined %}{{ raise_exception('content') }}{% endif %}",
        "{% if 'content' in m and m.content is string %}{{ raise_exception('content') }}{% endif %}",
        "{% if '</think>' in m.content %}{{ raise_exception('content') }}{% endif %}",
    ):
        template = f"{{% for m in messages %}}{source}{{{{ m.tool_calls | length }}}}{{% endfor %}}"
        assert render(template, [call({}, content=None)]) == "1", source
        assert render(template, [call({})]) == "1", source
    for role in ("user", "system"):
        with pytest.raises(InvalidRequestError, match='"content"'):
            render("chatml", [{"role": role, "content": None}])


def test_what_is_given_is_left_as_it_was() -> None:
    messages = [SYSTEM, in_parts(USER), call(json.dumps(ARGUMENTS)), {"role": "tool", "content": {"a": 1}}]
    before = copy.deepcopy(messages)
    render("qwen3", messages, tools=[TOOL])
    render("qwen3", [*messages, ANSWER], continue_final_message=True)
    assert messages == before


def test_templates_cannot_tell_that_they_are_watched() -> None:
    messages = [call({"a": 1}, content="x"), in_parts(USER)]
    for attribute in ("_read", "_text", "_printed", "_forget", "_was_read", "__dict__"):
        for place in ("[0].tool_calls[0].function.arguments", "[1].content", "[1].content[0]"):
            source = f"{{{{ messages[0].tool_calls | length }}}} {{{{ messages{place}.{attribute} is defined }}}}"
            assert render(source, messages) == "1 False"


def test_named_templates() -> None:
    templates = ChatTemplates(
        {"default": "d{{ messages[0].content }}", "tool_use": "t{{ tools | tojson }}", "rag": "r{{ documents[0].x }}"},
        {},
        "tokenizer",
    )
    assert templates.render([USER], None, None, {}).startswith("dHi")
    assert templates.render([USER], None, [TOOL], {}).startswith("t[")
    assert templates.render([USER], None, [], {}).startswith("dHi")
    assert templates.render([USER], None, None, {"chat_template": "rag", "documents": [{"x": "y"}]}) == "ry"
    assert templates.render([USER], None, None, {"chat_template": "x{{ messages[0].role }}"}) == "xuser"
    for given, message in (
        ("rga", r"the text of a template or the name of one \('default', 'tool_use', 'rag'\), not 'rga'"),
        ("{% if %}", "does not compile"),
        (5, "chat_template must be a string, not 5"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            templates.render([USER], None, None, {"chat_template": given})
    several = ChatTemplates({"a": "1", "b": "2"}, {}, "tokenizer")
    with pytest.raises(InvalidRequestError, match=r"none is the default.*'a', 'b'"):
        several.render([USER], None, None, {})
    assert ChatTemplates({"a": "1"}, {}, "tokenizer").render([USER], None, None, {}) == "1"


def test_a_result_of_a_deepseek_call() -> None:
    assert "<out>54</out>" in render(DEEPSEEK, result("54"))

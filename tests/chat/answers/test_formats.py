"""The form of answers is found from the chat template. The templates below have the structure of published ones, which
their comments name, as far as it matters here; their words are ours."""

from __future__ import annotations

import itertools

import pytest

from llmengine.chat.answers import TOOL_FORMATS, Answer, AnswerFormat, AnswerParser, find_answer_format
from llmengine.chat.answers.described_tools import written_calls
from llmengine.chat.template import ChatTemplate

# Qwen/Qwen2.5-7B-Instruct, tokenizer_config.json (NousResearch/Hermes-3 and ibm-granite/granite-4.0 call alike).
QWEN_2_5 = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\nReturn JSON within tags:\\n<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>' }}
{%- endif %}{%- for message in messages %}{%- for tool_call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}{{- tool_call.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}{%- endfor %}"""
# Qwen/Qwen3-8B, tokenizer_config.json: as before, with reasoning.
QWEN_3 = (
    QWEN_2_5
    + """{%- for message in messages %}{%- if '</think>' in message.content %}
{%- set reasoning = message.content.split('</think>')[0].split('<think>')[-1] %}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
)
# Qwen/Qwen3-4B-Thinking-2507, chat_template.jinja: the prompt begins the reasoning.
QWEN_3_THINKING = (
    QWEN_2_5
    + """{%- if '</think>' in messages[-1].content %}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
)
# Qwen/Qwen3-Coder-30B-A3B-Instruct, chat_template.jinja.
QWEN_CODER = """{%- if tools %}{{- '<tools>' }}{%- for tool in tools %}{{- '<function><name>' + tool.function.name }}
{%- endfor %}{{- '</tools>\\n<tool_call>\\n<function=example>\\n<parameter=one>\\n1\\n</parameter>\\n</function>' }}
{{- '\\n</tool_call>' }}{%- endif %}"""
# meta-llama/Llama-3.1-8B-Instruct, tokenizer_config.json; Llama 3.2's lacks the built-in tools and so the marker.
LLAMA_3_1 = """{%- if tools is not none %}{{- "Environment: ipython\\n" }}
{{- 'Respond as {"name": function name, "parameters": dictionary of argument name and its value}.' }}{%- endif %}
{%- for message in messages %}{%- if builtin_tools is defined %}{{- "<|python_tag|>" }}{%- else %}
{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}{%- endif %}{%- endfor %}"""
LLAMA_3_2 = LLAMA_3_1.replace("<|python_tag|>", "")
# mistralai/Mistral-7B-Instruct-v0.3, tokenizer_config.json; ggml-org/llama.cpp has that of Mistral-Small-3.1.
MISTRAL_V3 = """{%- if tools %}{{- "[AVAILABLE_TOOLS] [" }}{{- tools | tojson }}{{- "][/AVAILABLE_TOOLS]" }}{%- endif %}
{%- for message in messages %}{%- if message.tool_calls is defined %}{{- "[TOOL_CALLS] [" }}
{{- message.tool_calls | tojson }}{{- ', "id": "' + message.tool_calls[0].id + '"}]' }}{%- endif %}{%- endfor %}"""
# mistralai/Mistral-Small-3.2-24B-Instruct-2506 and Magistral-Small-2509, chat_template.jinja.
MISTRAL_V11 = """{%- for message in messages %}{%- for tool_call in message.tool_calls or [] %}
{{- "[TOOL_CALLS]" + tool_call.function.name + "[ARGS]" + tool_call.function.arguments | tojson }}{%- endfor %}
{%- endfor %}"""
MAGISTRAL = MISTRAL_V11 + """{{- "[SYSTEM_PROMPT]Think within [THINK] and [/THINK].[/SYSTEM_PROMPT]" }}"""
# ibm-granite/granite-3.3-8b-instruct, tokenizer_config.json.
GRANITE_3_3 = """{%- if tools %}{{- "Answer with <|tool_call|> and a JSON list of calls." }}{%- endif %}
{%- if thinking %}{{- "Think between <think></think>, answer between <response></response>." }}{%- endif %}"""
# ibm-granite/granite-3.2-8b-instruct, tokenizer_config.json: reasoning marked by sentences.
GRANITE_3_2 = """{%- if tools %}{{- "Answer with <|tool_call|> and a JSON list of calls." }}{%- endif %}
{%- if thinking %}{{- "Begin with 'Here is my thought process:', answer after 'Here is my response:'." }}{%- endif %}"""
# ibm-granite/granite-3.0-8b-instruct, tokenizer_config.json: the marker is only in the vocabulary.
GRANITE_3_0 = """{%- if tools %}{{- '<|start_of_role|>available_tools<|end_of_role|>\\n' }}{{- tools | tojson }}
{%- endif %}"""
# HuggingFaceTB/SmolLM3-3B, chat_template.jinja (its Python tools are code to run, which stays text).
SMOLLM3 = """{%- if xml_tools or tools %}{{- "<tools>" }}{{- (xml_tools or tools) | tojson }}
{{- '</tools> <tool_call>{"name": <name>, "arguments": <object>}</tool_call>' }}{%- endif %}
{%- if python_tools %}{{- "between <code> and </code>" }}{%- endif %}{%- for message in messages %}
{%- generation %}{{- '<|im_start|>assistant\\n' + message.content }}{%- endgeneration %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if reasoning_mode == "/no_think" %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}{%- endif %}"""
# microsoft/Phi-4-mini-instruct, tokenizer_config.json; and that of ggml-org/llama.cpp, models/templates.
PHI_4_MINI = """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}
{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}{% endfor %}"""
PHI_4_MINI_LLAMA_CPP = """{%- for tool in tools %}{{- '<|tool|>' + (tool | tojson) + '<|/tool|>' -}}{%- endfor %}
{{- 'Answer as <|tool_call|>{"name": "a", "arguments": {}}<|/tool_call|>' }}"""
# deepseek-ai/DeepSeek-R1-Distill-Llama-8B, tokenizer_config.json as first published: only the end occurs.
R1_DISTILL = """{% for message in messages %}{% set content = message['content'] %}{% if '</think>' in content %}
{% set content = content.split('</think>')[-1] %}{% endif %}{{ content }}{% endfor %}"""
# google/gemma-2-9b-it, gemma-3-4b-it and allenai/OLMo-2-1124-7B-Instruct define neither tools nor reasoning.
PLAIN = "{% for message in messages %}{{ '<start_of_turn>' + message['role'] + message['content'] }}{% endfor %}"

THINK = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        (QWEN_2_5, "hermes", None),
        (QWEN_3, "hermes", THINK),
        (QWEN_3_THINKING, "hermes", THINK),
        (QWEN_CODER, "qwen_xml", None),
        (LLAMA_3_1, "llama_json", None),
        (LLAMA_3_2, "llama_json", None),
        (MISTRAL_V3, "mistral", None),
        (MISTRAL_V11, "mistral_args", None),
        (MAGISTRAL, "mistral_args", ("[THINK]", "[/THINK]")),
        (GRANITE_3_3, "granite", THINK),
        (GRANITE_3_2, "granite", ("Here is my thought process:", "Here is my response:")),
        (GRANITE_3_0, "granite", None),
        (SMOLLM3, "hermes", THINK),
        (PHI_4_MINI, "phi", None),
        (PHI_4_MINI_LLAMA_CPP, "phi", None),
        (R1_DISTILL, None, THINK),
        (PLAIN, None, None),
    ],
)
def test_found_from_the_template(template: str, tools: str | None, reasoning: tuple[str, str] | None) -> None:
    ChatTemplate(template)
    form = find_answer_format(template)
    assert (form.tools and form.tools.name) == tools
    assert (form.reasoning and (form.reasoning.begin, form.reasoning.end)) == reasoning
    assert form.ignored == (("<response>", "</response>") if template is GRANITE_3_3 else ())
    assert form.reasoning is None or form.reasoning.always == (template is R1_DISTILL)


@pytest.mark.parametrize(
    ("template", "enable_thinking", "text", "reasoning"),
    [
        (QWEN_3, None, "<think>\nHm.\n</think>\n\nYes.", "Hm."),
        (QWEN_3, False, "Yes.", None),
        (QWEN_3_THINKING, None, "Hm.\n</think>\n\nYes.", "Hm."),
    ],
)
def test_rendered_prompts_say_whether_reasoning_has_begun(
    template: str, enable_thinking: bool | None, text: str, reasoning: str | None
) -> None:
    variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    prompt = ChatTemplate(template).render([{"role": "user", "content": "Why?"}], variables=variables)
    parser = AnswerParser(find_answer_format(template), prompt)
    answer = Answer.of([*parser.feed(text), *parser.finish()])
    assert (answer.reasoning, answer.content) == (reasoning, "Yes.")


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_written_calls_are_read_again(name: str) -> None:
    form = TOOL_FORMATS[name]
    tools = [{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}, {"name": "now"}]
    calls = [{"function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}, {"name": "now", "arguments": "{}"}]
    parser = AnswerParser(AnswerFormat(form), tools=tools)
    answer = Answer.of([*parser.feed(written_calls(form, calls)), *parser.finish()])
    assert answer.content is None
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("add", '{"a": 1, "b": "x"}'), ("now", "{}")]


def test_no_marker_of_a_format_begins_another() -> None:
    """Otherwise the parser would take the shorter one before the longer one is complete."""
    for form in TOOL_FORMATS.values():
        for one, other in itertools.permutations(form.begins, 2):
            assert not other.startswith(one)

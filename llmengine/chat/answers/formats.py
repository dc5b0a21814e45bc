"""The forms in which models write reasoning and tool calls, as data, and which of them a chat template has.

A template shows its model's form: it writes earlier calls in that form, or tells the model how to call. So the form is
found from strings in the template, never from the model's name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

Body = Literal["json", "named", "xml"]
"""How a call is written: `{"name": ..., "arguments": {...}}`, alone or in a list; `name[ARGS]{...}`, or the same JSON;
`<function=name><parameter=key>value</parameter></function>`."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls of tools.

    Attributes:
        name: the format's name.
        begins: the markers that begin calls; the first one is the model's own.
        end: the marker after calls; "" if there is none.
        body: what is between them.
        bare: an answer that begins with `{` may be a call without a marker; its name must be one of the tools.
        arguments_key: the key that holds a call's arguments. Both "arguments" and "parameters" are understood.
        in_list: calls are written as a JSON list even if there is one.
        short_ids: ids are nine letters and digits, since the template accepts no other.
    """

    name: str
    begins: tuple[str, ...]
    end: str = ""
    body: Body = "json"
    bare: bool = False
    arguments_key: Literal["arguments", "parameters"] = "arguments"
    in_list: bool = False
    short_ids: bool = False


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its reasoning, which comes first in an answer.

    Attributes:
        begin: the marker before it. The prompt may end with it already.
        end: the marker after it.
        always: answers begin with reasoning even without the marker.
    """

    begin: str
    end: str
    always: bool = False


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How a model writes its answers.

    Attributes:
        tools: how it calls tools; None if it does not.
        reasoning: how it marks reasoning; None if it does not.
        ignored: markers in its text that are left out, such as those around the part after the reasoning.
    """

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    ignored: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers. Special tokens among them must stay in the text that is parsed."""
        found = [*self.ignored]
        if self.reasoning is not None:
            found += [self.reasoning.begin, self.reasoning.end]
        if self.tools is not None:
            found += [*self.tools.begins, self.tools.end]
            found += ["[ARGS]", "[CALL_ID]"] if self.tools.body == "named" else []
        return tuple(marker for marker in found if marker)

    def begins_reasoning(self, prompt: str) -> bool:
        """True if the answer to `prompt` begins within reasoning, without a marker."""
        reasoning = self.reasoning
        if reasoning is None or prompt.rstrip().endswith(reasoning.end):
            return False
        return reasoning.always or prompt.rstrip().endswith(reasoning.begin)

    def ends_reasoning(self, prompt: str) -> bool:
        """True if the end of `prompt` says that the answer has no reasoning."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning.end)

    def without_tools(self) -> AnswerFormat:
        """The same without tool calls, which then stay in the text."""
        return replace(self, tools=None)


TEXT_ONLY = AnswerFormat()
"""Answers that are text only."""

HERMES = ToolFormat("hermes", ("<tool_call>",), "</tool_call>")
"""Hermes, Qwen 2.5, Qwen 3, SmolLM3, Granite 4, and models without a format of their own."""
QWEN_XML = ToolFormat("qwen_xml", ("<tool_call>", "<function="), "</tool_call>", "xml")
"""Qwen3-Coder and later Qwen."""
LLAMA_JSON = ToolFormat("llama_json", ("<|python_tag|>",), bare=True, arguments_key="parameters")
"""Llama 3.1, 3.2 and 3.3."""
MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]",), body="named", in_list=True, short_ids=True)
"""Mistral before its tokenizer of version 11: a list of calls."""
MISTRAL_ARGS = ToolFormat("mistral_args", ("[TOOL_CALLS]",), body="named", short_ids=True)
"""Mistral since then: each call with a marker of its own, and `[ARGS]` between name and arguments."""
GRANITE = ToolFormat("granite", ("<|tool_call|>", "<tool_call>"), "", in_list=True)
"""Granite 3."""
PHI = ToolFormat("phi", ("<|tool_call|>",), "<|/tool_call|>", in_list=True)
"""Phi-4-mini."""

TOOL_FORMATS = {form.name: form for form in (HERMES, QWEN_XML, LLAMA_JSON, MISTRAL, MISTRAL_ARGS, GRANITE, PHI)}

# The first row fits that has strings which all occur in the template.
_TOOL_SIGNATURES: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("<function=", "<parameter="), QWEN_XML),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_ARGS),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<|tool_call|>", "<|/tool_call|>"), PHI),
    (("<|tool|>", "<|/tool|>"), PHI),
    (("<|tool_call|>",), GRANITE),
    (("<tool_call>",), HERMES),
    (("available_tools<|end_of_role|>",), GRANITE),
    (("<|python_tag|>",), LLAMA_JSON),
    (('"parameters": dictionary of argument name',), LLAMA_JSON),
)
_THINK = ReasoningFormat("<think>", "</think>")
_REASONING_FORMATS = (
    _THINK,
    ReasoningFormat("[THINK]", "[/THINK]"),
    ReasoningFormat("Here is my thought process:", "Here is my response:"),
)
_RESPONSE = ("<response>", "</response>")


@lru_cache(maxsize=16)
def find_answer_format(template: str) -> AnswerFormat:
    """The format of the answers to conversations that `template`, the source of a chat template, writes."""
    tools = next((form for signs, form in _TOOL_SIGNATURES if all(sign in template for sign in signs)), None)
    reasoning = next((form for form in _REASONING_FORMATS if form.end in template), None)
    if reasoning is not None and reasoning.begin not in template:
        # Only the end is known to the template, which cuts it off: the model begins with reasoning by itself.
        reasoning = replace(reasoning, always=True)
    ignored = _RESPONSE if reasoning == _THINK and "<response>" in template else ()
    return AnswerFormat(tools, reasoning, ignored)

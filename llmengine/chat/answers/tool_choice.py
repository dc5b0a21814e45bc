"""What a caller wants of tool calls, checked: the choice of a tool, and the plan of an answer that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmengine.chat.answers.formats import TEXT_ONLY, AnswerFormat
from llmengine.chat.answers.grammar import answer_grammar
from llmengine.chat.answers.parser import AnswerParser
from llmengine.checks import require_bool
from llmengine.errors import InvalidRequestError
from llmengine.sampling_params import SamplingParams
from llmengine.structured_output import StructuredOutput

ToolChoiceKind = Literal["none", "auto", "required"]
_KINDS = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether an answer calls tools.

    Attributes:
        kind: "none": it calls none; "auto": as the model likes; "required": it consists of one call or several.
        name: with "required", the function that is called; None: any.
    """

    kind: ToolChoiceKind = "auto"
    name: str | None = None


NO_CALLS = ToolChoice("none")


def as_tool_choice(given: Any, tools: Sequence[Mapping[str, Any]]) -> ToolChoice:
    """The choice that a caller gave, in OpenAI's form; raises `InvalidRequestError` if it does not fit the tools."""
    if given is None:
        return ToolChoice("auto" if tools else "none")
    names = [function_of(tool).get("name") for tool in tools]
    if isinstance(given, str) and given in _KINDS:
        if given == "required" and not tools:
            raise InvalidRequestError("tool_choice='required' needs tools")
        return ToolChoice(given if tools else "none")  # type: ignore[arg-type]
    name = given.get("function", given) if isinstance(given, Mapping) else None
    name = name.get("name") if isinstance(name, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequestError(
            "tool_choice must be one of 'none', 'auto', 'required', or "
            f'{{"type": "function", "function": {{"name": ...}}}}, not {given!r:.200}'
        )
    if name not in names:
        listed = ", ".join(map(repr, names)) or "there are no tools"
        raise InvalidRequestError(f"tool_choice names {name!r:.100}, which is not among the tools: {listed}")
    return ToolChoice("required", name)


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool, in OpenAI's form or without its wrapper."""
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How the answer to one conversation is written, and what it may be.

    Raises `InvalidRequestError` if calls are demanded in a form that is not known.

    Attributes:
        form: how the model writes answers.
        tools: the tools that were offered, in OpenAI's form or without its wrapper.
        choice: whether they are called.
        parallel: an answer may call several.
    """

    form: AnswerFormat = TEXT_ONLY
    tools: tuple[Mapping[str, Any], ...] = ()
    choice: ToolChoice = NO_CALLS
    parallel: bool = True

    def __post_init__(self) -> None:
        require_bool("parallel_tool_calls", self.parallel)
        if not self.has_grammar:
            return
        for index, tool in enumerate(self.tools):
            if not isinstance(function_of(tool).get("name"), str):
                raise InvalidRequestError(f'tools[{index}] must have a function with a string "name"')
        if self.form.tools is None:
            raise InvalidRequestError(
                "tool calls can be enforced only in a form that is known, and the chat template shows none; "
                'pass tool_format=, such as "hermes"'
            )

    @property
    def has_grammar(self) -> bool:
        """True if a grammar keeps the answer to the choice."""
        if self.choice.kind == "auto":
            return not self.parallel or any(function_of(tool).get("strict") is True for tool in self.tools)
        return self.choice.kind == "required"

    @property
    def effective_form(self) -> AnswerFormat:
        """The form by which the answer is read: without tool calls if there are to be none."""
        return self.form.without_tools() if self.choice.kind == "none" else self.form

    def parser(self, prompt: str) -> AnswerParser:
        """A parser of the answer to `prompt`."""
        return AnswerParser(self.effective_form, prompt, self.tools)

    def params(self, params: SamplingParams, prompt: str, special_ids: Mapping[str, int]) -> SamplingParams:
        """The caller's parameters with what the plan adds: visible markers, forbidden markers, and a grammar.

        `special_ids` has the ids of special tokens by their texts. Raises `InvalidRequestError` for parameters that
        contradict the choice.
        """
        markers = [marker for marker in self.effective_form.markers if marker in special_ids]
        if markers:
            params = params.replace(keep_special_tokens=(*params.keep_special_tokens, *markers))
        if self.choice.kind == "none" and self.tools and self.form.tools is not None:
            params = params.replace(bad_words=(*params.bad_words, *self.form.tools.begins))
        grammar = self._grammar(params.structured, prompt, special_ids)
        return params if grammar is None else params.replace(structured=StructuredOutput(grammar=grammar))

    def _grammar(self, content: StructuredOutput | None, prompt: str, special_ids: Mapping[str, int]) -> str | None:
        if content is not None and self.choice.kind == "required":
            raise InvalidRequestError("structured and a tool_choice that demands a call exclude each other")
        has_calls = self.has_grammar or (content is not None and self.effective_form.tools is not None)
        if not has_calls and (content is None or not self.form.begins_reasoning(prompt)):
            return None
        return answer_grammar(
            self.effective_form if has_calls else self.form.without_tools(),
            [function_of(tool) for tool in self.tools if self._may_call(tool)],
            prompt=prompt,
            special_ids=special_ids,
            required=self.choice.kind == "required",
            parallel=self.parallel,
            content=content,
        )

    def _may_call(self, tool: Mapping[str, Any]) -> bool:
        return self.choice.name is None or function_of(tool).get("name") == self.choice.name


TEXT_PLAN = AnswerPlan()
"""The plan of an answer that is text only."""

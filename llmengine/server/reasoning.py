"""Switches of a model's reasoning, which are variables of its chat template."""

from __future__ import annotations

from typing import Any

from llmengine.llm import LLM
from llmengine.server.errors import HttpError

_LEVEL = "reasoning_effort"
_SWITCHES = ("enable_thinking", "thinking")


def reasoning_variables(llm: LLM, effort: str | None, param: str) -> dict[str, Any]:
    """The variables that set how much the model reasons; "none": not at all. None leaves that to the template.

    Raises `HttpError` for `param` if the template has no variable for that.
    """
    if effort is None:
        return {}
    known = _template_variables(llm)
    if _LEVEL in known:
        return {_LEVEL: effort}
    switch = next((name for name in _SWITCHES if name in known), None)
    if switch is None:
        message = f"{param}={effort!r} is not supported: the model's chat template has no switch for reasoning"
        raise HttpError(400, message, param=param, code="unsupported_parameter")
    return {switch: effort != "none"}


def has_reasoning_switch(llm: LLM) -> bool:
    """True if the model's reasoning can be set."""
    known = _template_variables(llm)
    return any(name in known for name in (_LEVEL, *_SWITCHES))


def _template_variables(llm: LLM) -> frozenset[str]:
    variables = getattr(llm.tokenizer, "chat_template_variables", None)
    return frozenset() if variables is None else frozenset(variables() or ())

"""How a model's answer is divided into reasoning, text and tool calls: formats, a parser, and grammars that enforce
them. No HTTP in it."""

from llmengine.chat.answers.events import (
    Answer,
    AnswerEvent,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCall,
    ToolCallBegin,
    ToolCallEnd,
)
from llmengine.chat.answers.formats import TOOL_FORMATS, AnswerFormat, ReasoningFormat, ToolFormat, find_answer_format
from llmengine.chat.answers.parser import AnswerParser

__all__ = [
    "TOOL_FORMATS",
    "Answer",
    "AnswerEvent",
    "AnswerFormat",
    "AnswerParser",
    "ReasoningDelta",
    "ReasoningFormat",
    "TextDelta",
    "ToolArgumentsDelta",
    "ToolCall",
    "ToolCallBegin",
    "ToolCallEnd",
    "ToolFormat",
    "find_answer_format",
]

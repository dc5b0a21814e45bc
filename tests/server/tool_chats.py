"""A chat template with tools and reasoning, and models that use them."""

from __future__ import annotations

from llmengine import LLM
from llmengine.testing import ChatByteTokenizer
from tests.server.helpers import fake_llm, scripted

_TEMPLATE = """{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
{% endif %}{% for message in messages %}<{{ message.role }}>REASONING
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}
{% endfor %}{% if add_generation_prompt %}<assistant>SWITCH{% endif %}"""
_REASONING = "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
_SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def tool_llm(answer: str, *, reasons: bool = True) -> LLM:
    """A model that answers any chat with this text. If it `reasons`, its chat template has a switch for that."""
    template = _TEMPLATE.replace("REASONING", _REASONING * reasons).replace("SWITCH", _SWITCH * reasons)
    return fake_llm(scripted(answer), tokenizer=ChatByteTokenizer(template))

"""Chat templates like those of real models, written for these tests, one for each way of doing things."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# The system text goes into the first user message; roles alternate; nothing else is known.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}
{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system + m['content'] if loop.first else m['content']).strip() + ' [/INST]' }}
{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

# Tools in the system header, one call at a time, results as JSON.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|head|>system<|end_head|>\\n\\nToday: ' + date_string + '\\n' + system }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{%- endif %}
{{- '<|eot|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|end_head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls|length != 1 %}{{- raise_exception('only single tool-calls') }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|end_head|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- '}<|eot|>' }}
    {%- elif message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|head|>ipython<|end_head|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|end_head|>\\n\\n' }}{%- endif %}"""

# Parts for the user, text for the system, as in models that see images.
LLAMA_VISION = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}{{- '<|sys|>' + system + '<|eot|>' }}{%- endif %}
{%- for message in messages %}{{- '<|' + message['role'] + '|>' }}
    {%- if message['content'] is string %}{{- message['content'] }}
    {%- else %}{%- for content in message['content'] %}
        {%- if content['type'] == 'image' %}{{- '<|image|>' }}
        {%- elif content['type'] == 'text' %}{{- content['text'] }}{%- endif %}
    {%- endfor %}{%- endif %}{{- '<|eot|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

# Parts only.
PARTS_ONLY = """{% for message in messages %}{{ message['role'].capitalize() }}:
{%- for line in message['content'] %}{% if line['type'] == 'text' %} {{ line['text'] }}
{%- elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}<end>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""

# The first part only.
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m['content'][0]['text'] }}{% endfor %}"

# Calls of several shapes, reasoning that is cut away, content that counts only as a string.
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}
{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == 'user' or message.role == 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.last and reasoning_content %}{{- '<think>' + reasoning_content + '</think>\\n' }}{%- endif %}
        {{- content }}
        {%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}
        {%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}{{- '<tool_response>\\n' + content + '\\n</tool_response>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Arguments by name.
QWEN_CODER = """{% macro json_or_text(x) %}{{ x | tojson if x is mapping else x | string }}{% endmacro %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for call in m.tool_calls or [] %}
<function={{ call.function.name }}>{% for name, value in call.function.arguments | items %}
<parameter={{ name }}>{{ json_or_text(value) }}</parameter>{% endfor %}</function>{% endfor %}<|end|>{% endfor %}"""

# Arguments are text, content may be none.
DEEPSEEK = """{{ bos_token }}{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<U>' + message['content'] }}
{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}
{%- for tool in message['tool_calls'] %}{{ '<call>' + tool['type'] + '<sep>' + tool['function']['name'] + '\n```json\n'
 + tool['function']['arguments'] + '\n```<end>' }}{%- endfor %}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
{%- set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}
{%- endif %}{{ '<A>' + content + eos_token }}{%- endif %}
{%- if message['role'] == 'tool' %}{{ '<out>' + message['content'] + '</out>' }}{%- endif %}{%- endfor -%}
{% if add_generation_prompt %}{{ '<A>' }}{% endif %}"""

# The whole function at once; ids of nine characters.
MISTRAL = """{{- bos_token }}{%- for message in messages %}{%- if message.role == 'user' %}
{%- if loop.last and tools is defined and tools is not none %}{{- '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{%- endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- '[CALLS][' }}
{%- for tool_call in message.tool_calls %}{%- set out = tool_call.function | tojson %}{{- out[:-1] }}
{%- if not tool_call.id is defined or tool_call.id | length != 9 %}
{{- raise_exception('ids of 9 characters!') }}{%- endif %}{{- ', "id": "' + tool_call.id + '"}' }}
{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
{%- elif message.role == 'tool' %}{%- set content = message.content.content if message.content.content is defined else
 message.content %}{{- '[RESULT]{"content": ' + content | string + ', "id": "' + message.tool_call_id + '"}' }}
{%- else %}{{- raise_exception('Only user, assistant and tool roles!') }}{%- endif %}{%- endfor %}"""

# No system role, "model" for the assistant, parts through a macro.
GEMMA = """{{ bos_token }}{%- if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{%- endif %}
{%- macro text(content) %}{% if content is string %}{{ content | trim }}{% elif content is iterable %}
{%- for item in content %}{% if item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}
{%- else %}{{ raise_exception('Invalid content type') }}{% endif %}{% endmacro %}
{%- for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' }}{{ text(message['content']) }}{{ '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Documents, tools and controls by name.
GRANITE = """{%- if documents %}<|docs|>{%- for document in documents %}{{ document['title'] }}: {{ document['text'] }};
{%- endfor %}{%- endif %}{%- if tools %}<|tools|>{{ tools | tojson(indent=2) }}{%- endif %}
{%- for message in messages %}<|role|>{{ message['role'] }}<|/role|>
{%- if message['role'] == 'assistant' and message.tool_calls %}{{ message.tool_calls | tojson }}
{%- else %}{{ message['content'] }}{%- endif %}<|eot|>
{%- endfor %}{%- if add_generation_prompt %}<|role|>assistant{%- if controls %} {{ controls | tojson }}{%- endif %}
<|/role|>{%- endif %}"""

# Everything at once.
DUMP = "{{ messages | tojson }}{% if tools %}{{ tools | tojson }}{% endif %}"

TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "llama_vision": LLAMA_VISION,
    "parts_only": PARTS_ONLY,
    "first_part": FIRST_PART,
    "qwen3": QWEN3,
    "qwen_coder": QWEN_CODER,
    "deepseek": DEEPSEEK,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "granite": GRANITE,
    "dump": DUMP,
}


def reference_tokenizer(template: Any) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of transformers with this template."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, [])), **SPECIAL_TOKENS
    )
    tokenizer.chat_template = template
    return tokenizer

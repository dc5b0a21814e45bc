"""Chats through an `LLM`: keywords, several conversations, and what a caller's own tokenizer must offer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from llmengine import LLM, InvalidRequestError, SamplingParams, StructuredOutput
from llmengine.testing import ChatByteTokenizer, FakeBackend
from llmengine.tokenizer.loading import LoadedTokenizer
from llmengine.tokenizer.protocol import ByteTokenizer, ChatTokenizer
from tests.chat.helpers import QWEN3, reference_tokenizer

ONE = SamplingParams(max_new_tokens=1)
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def make_llm(tokenizer: Any) -> LLM:
    """Return an `LLM` without a model."""
    return LLM.from_backend(lambda: FakeBackend(num_blocks=501, max_model_len=2000), tokenizer=tokenizer)


class OwnTokenizer(ByteTokenizer):
    """A tokenizer that swallows every keyword and knows only `language`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], language: str = "en", **others: Any) -> str:
        return f"{language}:{messages[-1]['content']}"


class CheckingTokenizer(OwnTokenizer):
    """A tokenizer that passes its keywords on to a function that refuses wrong ones."""

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True, **variables: Any) -> str:
        return ChatByteTokenizer(QWEN3).apply_chat_template(messages, add_generation_prompt, **variables)


def test_a_chat_without_a_model() -> None:
    with make_llm(ChatByteTokenizer()) as llm:
        output = llm.chat([{"role": "system", "content": "s"}, *HI], ONE)
        assert output.prompt == "<system>s\n<user>hi\n<assistant>"
        assert output.num_prompt_tokens == len(output.prompt)
        assert isinstance(llm.tokenizer, ChatTokenizer)
        assert llm.tokenizer.apply_chat_template(HI) == "<user>hi\n<assistant>"


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ({"max_tokens": 2}, "max_new_tokens"),
        ({"max_completion_tokens": 2}, "max_new_tokens"),
        ({"temperature": 0.1}, r"SamplingParams\(temperature="),
        ({"n": 2}, r"SamplingParams\(n="),
        ({"stop": ["a"]}, r"SamplingParams\(stop="),
        ({"seed": None}, r"SamplingParams\(seed="),
        ({"stream": True}, "streaming=True"),
        ({"response_format": {"type": "json_object"}}, "structured="),
        ({"timeout": 3}, "deadline_s"),
        ({"tennant": "a"}, "'tenant'"),
        ({"deadlines_s": 3}, "'deadline_s'"),
        ({"add_generation_promt": False}, "'add_generation_prompt'"),
        ({"tool": []}, "'tools'"),
        ({"enable_thinkin": False}, "'enable_thinking'"),
        ({"quux": 1}, "'quux'"),
    ],
)
@pytest.mark.parametrize("method", ["chat", "chat_async"])
def test_keywords_that_nobody_knows(method: str, keyword: dict[str, Any], hint: str) -> None:
    with (
        make_llm(ChatByteTokenizer(QWEN3)) as llm,
        pytest.raises(TypeError, match=rf"LLM\.{method}\(\) got an unexpected keyword argument .*{hint}"),
    ):
        getattr(llm, method)(HI, ONE, **keyword)


@pytest.mark.parametrize("tokenizer", [ChatByteTokenizer(QWEN3), CheckingTokenizer()])
def test_variables_of_the_template(tokenizer: Any) -> None:
    with make_llm(tokenizer) as llm:
        for keywords in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
            assert "<think>" in (llm.chat(HI, ONE, **keywords).prompt or "")
        assert "<think>" not in (llm.chat(HI, ONE, chat_template_kwargs=None, tools=None).prompt or "")
        assert "<tools>" in (llm.chat(HI, ONE, tools=[TOOL]).prompt or "")
        for keywords in ({"chat_template_kwargs": {"thinking": False}}, {"documents": [{"text": "x"}]}):
            with pytest.raises(InvalidRequestError, match="chat template"):
                llm.chat(HI, ONE, **keywords)
        for keywords, message in (
            ({"chat_template_kwargs": ["x"]}, "chat_template_kwargs must be a dict, not a list"),
            ({"chat_template_kwargs": {"tools": [TOOL]}, "tools": [TOOL]}, "'tools' is given twice"),
            ({"continue_final_message": True, "add_generation_prompt": True}, "contradict"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                llm.chat_async(HI, ONE, **keywords)


def test_an_answer_goes_on_with_the_final_message() -> None:
    messages = [*HI, {"role": "assistant", "content": "The"}]
    for tokenizer in (ChatByteTokenizer(), CheckingTokenizer()):
        with make_llm(tokenizer) as llm:
            prompt = llm.chat(messages, ONE, continue_final_message=True).prompt
            assert prompt is not None
            assert prompt.endswith("The")
    with make_llm(ChatByteTokenizer()) as llm:
        assert llm.chat(messages, ONE, add_generation_prompt=False).prompt == "<user>hi\n<assistant>The\n"
        template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        assert llm.chat(HI, ONE, chat_template=template).prompt == "[hi]"


def test_a_tokenizer_that_swallows_keywords() -> None:
    with make_llm(OwnTokenizer()) as llm:
        assert llm.chat(HI, ONE, language="fr").prompt == "fr:hi"
        assert llm.chat(HI, ONE, chat_template_kwargs={"language": "fr"}, tools=[]).prompt == "fr:hi"
        for keywords, name in (
            ({"tennant": "a"}, "tennant"),
            ({"tools": [TOOL]}, "tools"),
            ({"continue_final_message": True}, "continue_final_message"),
            ({"chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
        ):
            lost = f"takes any keyword, so '{name}' may never reach the template"
            with pytest.raises(InvalidRequestError, match=lost):
                llm.chat(HI, ONE, **keywords)
        with pytest.raises(TypeError, match="max_new_tokens"):
            llm.chat(HI, ONE, max_tokens=1)  # type: ignore[call-overload]


def test_a_tokenizer_that_takes_no_keywords() -> None:
    class Strict(OwnTokenizer):
        def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True) -> str:  # type: ignore[override]
            return str(messages[-1]["content"])

    with make_llm(Strict()) as llm:
        assert llm.chat(HI, ONE, add_generation_prompt=False).prompt == "hi"
        for keywords, name in (
            ({"tools": [TOOL]}, "tools"),
            ({"chat_template_kwargs": {"x": 1}}, "x"),
            ({"chat_template_kwargs": {"messages": HI}}, "messages"),
            ({"chat_template_kwargs": {"self": 1}}, "self"),
        ):
            with pytest.raises(InvalidRequestError, match=f"'{name}'"):
                llm.chat_async(HI, ONE, **keywords)
        with pytest.raises(TypeError, match="Did you mean 'tenant'"):
            llm.chat(HI, ONE, tennant="a")  # type: ignore[call-overload]


def test_a_tokenizer_of_transformers() -> None:
    wrapped = reference_tokenizer(QWEN3)
    with make_llm(wrapped) as llm:
        assert isinstance(llm.tokenizer, ChatTokenizer)
        with pytest.raises(TypeError, match="tennant"):
            llm.chat(HI, ONE, tennant="a")  # type: ignore[call-overload]
        parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        assert llm.tokenizer.apply_chat_template(parts) == llm.tokenizer.apply_chat_template(HI)
        wrapped.chat_template = {"default": "d{{ messages[0].content }}", "tool_use": "{{ tools | tojson }}"}
        assert llm.tokenizer.apply_chat_template(HI) == "dhi"
        assert llm.tokenizer.apply_chat_template(HI, tools=[TOOL]) == json.dumps([TOOL])


def test_several_conversations() -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("a", "bb", "ccc")]
    with make_llm(ChatByteTokenizer()) as llm:
        outputs = llm.chat(conversations, ONE)
        assert [output.prompt for output in outputs] == [llm.chat(one, ONE).prompt for one in conversations]
        outputs = llm.chat(tuple(map(tuple, conversations)), [SamplingParams(max_new_tokens=n) for n in (1, 2, 3)])
        assert [len(output.token_ids) for output in outputs] == [1, 2, 3]
        with pytest.raises(InvalidRequestError, match="2 sampling_params"):
            llm.chat(conversations, [ONE, ONE])
        with pytest.raises(InvalidRequestError, match=r'\["role"\] must be a string, not None'):
            llm.chat([HI, [{"content": "x"}]], ONE)
        for wrong in ([], [[]], "hi", None, {"role": "user", "content": "x"}, [HI, "x"]):
            with pytest.raises(InvalidRequestError, match="messages"):
                llm.chat(wrong, ONE)
        assert llm.stats().num_running == 0


def test_messages_are_copied_at_the_call() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    with make_llm(ChatByteTokenizer()) as llm:
        handle = llm.chat_async(messages, ONE)
        messages[0]["content"][0]["text"] = "changed"  # type: ignore[index]
        messages.append({"role": "user", "content": "more"})
        assert handle.result().prompt == "<user>hi\n<assistant>"


def test_objects_of_clients_are_messages() -> None:
    message = SimpleNamespace(model_dump=lambda: {"role": "user", "content": "hi", "refusal": None})
    with make_llm(ChatByteTokenizer()) as llm:
        assert llm.chat([message], ONE).prompt == "<user>hi\n<assistant>"
        assert llm.count_tokens([message]) == len("<user>hi\n<assistant>")


def with_bos() -> LoadedTokenizer:
    """Return a tokenizer that puts BOS before each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken("<s>", normalized=False, special=True)])
    bos = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    return LoadedTokenizer(backend, {"bos_token": "<s>"}, {"default": template})


def test_there_is_one_bos() -> None:
    tokenizer = with_bos()
    rendered = tokenizer.apply_chat_template(HI)
    with make_llm(tokenizer) as llm:
        chatted = llm.chat([HI, HI], ONE)
        assert [output.prompt_token_ids for output in chatted] == 2 * [llm.chat(HI, ONE).prompt_token_ids]
        for text, num_bos in (("hi", 1), ("<s>hi", 1), (rendered, 1), ("<s><s>hi", 3), ("hi<s>", 2)):
            ids = llm.generate(text, ONE)[0].prompt_token_ids
            assert ids.count(tokenizer.bos_token_id or -1) == num_bos, text
            assert llm.count_tokens(text) == len(ids)
        assert llm.generate(rendered, ONE)[0].prompt_token_ids == chatted[0].prompt_token_ids


def test_counting_tokens() -> None:
    with make_llm(ChatByteTokenizer(QWEN3)) as llm:
        for keywords in ({}, {"tools": [TOOL]}, {"enable_thinking": False}, {"add_generation_prompt": False}):
            assert llm.count_tokens(HI, **keywords) == llm.chat(HI, ONE, **keywords).num_prompt_tokens
        assert llm.count_tokens("hé") == 3
        assert llm.tokenize("hé") == list("hé".encode())
        assert llm.tokenize(HI, enable_thinking=False) == llm.chat(HI, ONE, enable_thinking=False).prompt_token_ids
        assert llm.count_tokens([1, 2]) == 2
        assert llm.count_tokens("") == 0
        assert llm.count_tokens("x" * 10_000) == 10_000
        with pytest.raises(TypeError, match="tools"):
            llm.count_tokens("hi", tools=[TOOL])
        with pytest.raises(TypeError, match=r"tokenize\(\).*tools"):
            llm.tokenize("hi", tools=[TOOL])
        with pytest.raises(TypeError, match="tennant"):
            llm.count_tokens(HI, tennant="a")  # type: ignore[call-arg]
        with pytest.raises(InvalidRequestError, match="outside"):
            llm.count_tokens([1000])
    with LLM.from_backend(FakeBackend) as llm, pytest.raises(InvalidRequestError, match="no tokenizer"):
        llm.count_tokens("x")


SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "schema": {"type": "string"}}}


@pytest.mark.parametrize(
    "given",
    [
        {"name": "person", "schema": SCHEMA},
        {"name": "person", "description": "x", "strict": True, "schema": SCHEMA},
        {"schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        {"type": "json_schema", "name": "person", "schema": SCHEMA},
        json.dumps({"name": "person", "schema": SCHEMA}),
        SCHEMA,
    ],
)
def test_the_schema_in_a_response_format(given: Any) -> None:
    assert json.loads(str(StructuredOutput(json_schema=given).json_schema)) == SCHEMA


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"name": {}, "schema": {}}},
        {"type": "object", "schema": {}},
        {"title": "name", "schema": {}, "$defs": {}},
        {"name": "x", "properties": {}},
        {"const": {"name": "x", "schema": {}}},
    ],
)
def test_a_schema_is_not_taken_for_a_response_format(schema: Any) -> None:
    assert json.loads(str(StructuredOutput(json_schema=schema).json_schema)) == schema


def test_response_formats_without_a_schema() -> None:
    assert StructuredOutput(json_schema={"type": "json_object"}).json_schema == '{"type": "object"}'
    with pytest.raises(InvalidRequestError, match=r'json_schema\["schema"\] must be an object or True, not'):
        StructuredOutput(json_schema={"name": "x", "schema": "y"})

"""The options of a request: stated in one place, checked, typed, and shown by each method that takes them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmengine import (
    LLM,
    ChatKeywords,
    InvalidRequestError,
    QueueFullError,
    RequestKeywords,
    RequestOptions,
    SamplingParams,
    SchedulerConfig,
)
from llmengine.testing import FakeBackend
from tests import ROOT
from tests.engine.helpers import WAIT_S, GatedTokenizer, bounded, make_llm, oracle, tokens

METHODS = ["generate", "generate_async", "stream", "chat", "chat_async", "beam_search", "beam_search_async"]
WAITING = {"generate", "stream", "beam_search", "beam_search_async"}
"""Those that wait for room in the queue unless told otherwise."""

PROMPT = [5, 6, 7]


def test_options_and_their_keywords_are_the_same() -> None:
    fields = {field.name: str(field.type) for field in dataclasses.fields(RequestOptions)}
    keywords = {name: reference.__forward_arg__ for name, reference in RequestKeywords.__annotations__.items()}
    assert list(keywords) == list(fields)
    # None is accepted everywhere; Hashable includes it.
    for name, kind in fields.items():
        assert keywords[name] in (kind, f"{kind} | None"), name
        assert RequestOptions(**{name: None}) == RequestOptions()
    assert ChatKeywords.__optional_keys__ > RequestKeywords.__optional_keys__ == set(fields)


@pytest.mark.parametrize("name", METHODS)
def test_signature_and_help_have_each_option(name: str) -> None:
    method = getattr(LLM, name)
    parameters = inspect.signature(method).parameters
    for field in dataclasses.fields(RequestOptions):
        parameter = parameters[field.name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        waits = field.name == "wait_for_admission" and name in WAITING
        assert parameter.default == (True if waits else field.default)
        assert method.__doc__.count(f"\n            {field.name}: ") == 1
    assert "options" not in parameters


def test_none_means_the_default() -> None:
    nulls: dict[str, Any] = dict.fromkeys(RequestKeywords.__annotations__)
    with LLM.from_backend(FakeBackend) as llm:
        handle = llm.generate_async(PROMPT, tokens(3), None, **nulls)  # type: ignore[arg-type]
        assert handle.result(WAIT_S).token_ids == oracle(PROMPT, 3)
        assert llm.generate([PROMPT], tokens(3), **nulls)[0].token_ids == oracle(PROMPT, 3)
        assert llm.beam_search([PROMPT], max_new_tokens=2, **nulls)[0].outputs


@pytest.mark.parametrize("field", dataclasses.fields(SamplingParams), ids=lambda field: field.name)
def test_none_means_the_default_of_sampling_parameters(field: Any) -> None:
    params = SamplingParams(**{field.name: None})
    if field.name == "max_new_tokens":  # its default differs, and for it None has a meaning
        assert params.max_new_tokens is None
    else:
        assert params == SamplingParams()


@pytest.mark.parametrize(
    "wrong",
    [
        {"priority": "high"},
        {"priority": True},
        {"priority": 1.5},
        {"priority": 1_000_001},
        {"tenant": 5},
        {"deadline_s": 0},
        {"deadline_s": math.nan},
        {"deadline_s": "3"},
        {"deadline_s": True},
        {"first_token_deadline_s": -1},
        {"cache_salt": []},
        {"wait_for_admission": "yes"},
        {"wait_for_admission": 1},
        {"slow_consumer": "drop"},
        {"slow_consumer": []},
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with LLM.from_backend(FakeBackend) as llm:
        for submit in (llm.generate_async, llm.generate, llm.beam_search):
            with pytest.raises(InvalidRequestError, match=f"{name} must be .*, not {re.escape(repr(value))}"):
                submit(PROMPT, **wrong)
        assert llm.stats().num_queued == 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("deadlines_s", "Did you mean 'deadline_s'?"),
        ("prioritiy", "Did you mean 'priority'?"),
        ("temperature", "it is a field of sampling_params=SamplingParams(temperature=...)"),
        ("max_tokens", "Did you mean 'sampling_params=SamplingParams(max_new_tokens=...)'?"),
        ("sampling_parameters", "Did you mean 'sampling_params'?"),
        ("quux", "'quux'"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "generate_async"])
def test_unknown_keyword_is_pythons_error(method: str, name: str, hint: str) -> None:
    with (
        LLM.from_backend(FakeBackend) as llm,
        pytest.raises(TypeError, match=rf"LLM\.{method}\(\) got an unexpected keyword argument '{name}'") as caught,
    ):
        getattr(llm, method)(PROMPT, **{name: None})
    assert str(caught.value).endswith(hint)


def test_unknown_keyword_of_beam_search_has_no_sampling_parameters() -> None:
    with LLM.from_backend(FakeBackend) as llm:
        with pytest.raises(TypeError, match=r"Did you mean 'max_new_tokens'\?$"):
            llm.beam_search(PROMPT, max_tokens=1)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'temperature'$"):
            llm.beam_search(PROMPT, temperature=1)  # type: ignore[call-arg]


def test_deadline_of_generate_counts_from_the_call() -> None:
    tokenizer = GatedTokenizer()
    with make_llm(tokenizer=tokenizer, scheduler=SchedulerConfig(max_queued_requests=1)) as llm:
        first = llm.generate_async("a", tokens(2))  # it has the only place in the queue and is being tokenized
        prompts: list[Any]
        for prompts in ([PROMPT, PROMPT], ["b"]):
            outputs = bounded(partial(llm.generate, prompts, tokens(2), deadline_s=0.01))
            assert {output.finish_reason for output in outputs} == {"timeout"}
        beams = bounded(partial(llm.beam_search, [PROMPT], 2, max_new_tokens=2, deadline_s=0.01))
        assert [beam.finish_reason for beam in beams[0].outputs] == ["timeout"]
        with pytest.raises(QueueFullError):
            llm.generate([PROMPT], tokens(2), wait_for_admission=False)
        tokenizer.gate.set()
        assert first.result(WAIT_S).finish_reason == "length"
        assert llm.generate([PROMPT, "b"], tokens(2), deadline_s=1000)[1].finish_reason == "length"


RIGHT = """
    from typing import Unpack, assert_type
    from llmengine import LLM, ChatKeywords, GenerationOutput, RequestHandle, RequestKeywords, SamplingParams
    from llmengine.tokenizer.protocol import ChatTokenizer

    def ask(llm: LLM, text: str, **options: Unpack[RequestKeywords]) -> GenerationOutput:
        options.setdefault("deadline_s", 3)
        return llm.generate([text], SamplingParams(), progress=False, **options)[0]

    def answer(llm: LLM, text: str, **options: Unpack[ChatKeywords]) -> RequestHandle:
        return llm.chat_async([{"role": "user", "content": text}], streaming=True, **options)

    def use(llm: LLM, priority: int | None) -> None:
        assert_type(llm.generate_async("x", priority=priority, tenant=None, slow_consumer=None), RequestHandle)
        llm.chat([], deadline_s=3, chat_template_kwargs={"enable_thinking": False})
        assert_type(llm.chat([{"role": "user", "content": "x"}], tools=[{"name": "f"}]), GenerationOutput)
        assert_type(llm.chat([[{"role": "user", "content": "x"}]], [SamplingParams()]), list[GenerationOutput])
        assert_type(llm.count_tokens([{"role": "user", "content": "x"}], add_generation_prompt=False), int)
        if isinstance(llm.tokenizer, ChatTokenizer):
            assert_type(llm.tokenizer.apply_chat_template([{"role": "user", "content": "x"}]), str)
        llm.beam_search("x", 2, tenant="a")
        ask(llm, "x", cache_salt=("a", 1), wait_for_admission=False)
        answer(llm, "x", priority=1)
"""
WRONG = """
    llm.generate_async("x", slow_consumer="drop")
    llm.generate_async("x", tenant=5)
    llm.generate(["x"], deadlines_s=3)
    llm.generate(["x"], wait_for_admission="yes")
    llm.chat([], deadlines_s=3)
    llm.count_tokens("x", tool=[])
    llm.chat_async([], prioritiy=1)
    llm.beam_search("x", first_token_deadline="1")
"""


def _mypy(directory: Path, **files: str) -> list[str]:
    for name, code in files.items():
        (directory / f"{name}.py").write_text(textwrap.dedent(code))
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-incremental", "."]
    root = str(ROOT)
    done = subprocess.run(
        command, cwd=directory, env={"PYTHONPATH": root}, capture_output=True, text=True, timeout=300, check=False
    )
    return [line for line in done.stdout.splitlines() if ": error: " in line]


@pytest.mark.slow
def test_type_checkers_know_the_options(tmp_path: Path) -> None:
    pytest.importorskip("mypy")  # only the main interpreter is sure to have it
    mistakes = textwrap.dedent(WRONG).strip().splitlines()
    wrong = "from llmengine import LLM\nllm = LLM('x')\n" + "\n".join(mistakes)
    found = _mypy(tmp_path, right=RIGHT, wrong=wrong)
    lines = list(dict.fromkeys(line.split(": error: ")[0] for line in found))  # a call of overloads gives two errors
    assert lines == [f"wrong.py:{number}" for number in range(3, 3 + len(mistakes))], found

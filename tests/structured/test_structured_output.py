"""Structured output: the text has the requested form, whatever the model would rather generate."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.engine.helpers as engine_helpers
from llmengine import (
    LLM,
    GenerationOutput,
    InvalidRequestError,
    RequestFailedError,
    SamplingParams,
    SchedulerConfig,
    StructuredOutput,
)
from llmengine.batch import Batch
from llmengine.engine.grammar_steps import GrammarSteps
from llmengine.structured.grammar import GrammarCompiler
from llmengine.testing import NextToken
from llmengine.tokenizer.loading import LoadedTokenizer, load_tokenizer, tokenizer_from_gguf
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.backends.helpers import BackendDriver, load_tiny, save_tiny
from tests.engine.helpers import VOCAB_SIZE, assert_idle, counting_model, timeout, tokens
from tests.test_smollm2 import model_path

EOS = ByteTokenizer.eos_token_id
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def random_model(seed: int, vocab_size: int = VOCAB_SIZE) -> NextToken:
    """Return a model that wants a random token, always the same one for the same context."""

    def next_token(token_ids: Sequence[int]) -> int:
        return random.Random(hash((seed, *token_ids))).randrange(vocab_size)

    return next_token


def make_llm(
    model: NextToken,
    *,
    max_steps_in_flight: int = 3,
    num_blocks: int = 1025,
    on_step: Callable[[Batch], None] | None = None,
    **scheduler: Any,
) -> LLM:
    """Return an LLM over bytes; `model` proposes tokens and masks decide."""
    return engine_helpers.make_llm(
        eos_token_ids=[EOS],
        next_token=model,
        max_model_len=2048,
        num_blocks=num_blocks,
        max_steps_in_flight=max_steps_in_flight,
        on_step=on_step,
        scheduler=SchedulerConfig(**scheduler),
    )


def structured(num_tokens: int = 600, *, ignore_eos: bool = False, **form: Any) -> SamplingParams:
    """Return parameters for an output of this form."""
    return SamplingParams(max_new_tokens=num_tokens, ignore_eos=ignore_eos, structured=StructuredOutput(**form))


def check_person(text: str) -> None:
    """Assert that the text is JSON that satisfies `PERSON`."""
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert len(person["name"]) <= 12
    assert 0 <= person["age"] <= 150
    assert len(person["tags"]) <= 3
    assert set(person["tags"]) <= {"red", "green"}


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"regex": r"(ab|cd){2,4}-[0-9]{3}"}, r"(ab|cd){2,4}-[0-9]{3}"),
    ({"choice": ["yes", "no", 'a "quoted\\" ü\n']}, 'yes|no|a "quoted\\\\" ü\n'),
    ({"grammar": 'start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/'}, r"<[a-z]{1,3}(,[a-z]{1,3})*>"),
    ({"grammar": 'root ::= "a" digit ("+" digit)*\ndigit ::= [0-9]'}, r"a[0-9](\+[0-9])*"),
]


@pytest.mark.parametrize(("form", "pattern"), FORMS, ids=["regex", "choice", "lark", "gbnf"])
def test_every_kind_of_form_is_kept(form: dict[str, Any], pattern: str) -> None:
    with make_llm(random_model(1)) as llm:
        for output in llm.generate([f"prompt {index}" for index in range(8)], structured(**form)):
            assert output.finish_reason == "stop"
            assert re.fullmatch(pattern, output.text), output.text


def values() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas whose outputs are bounded."""
    leaves = st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -5, "maximum": 20},
            {"type": "string", "maxLength": 5},
            {"enum": ["x", 1, None, "é\n"]},
            {"const": {"a": [1, 2]}},
            {"type": "string", "pattern": "^[A-Z]{2}$"},
        ]
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
            st.dictionaries(st.sampled_from(["a", "b", "ü"]), inner, min_size=1, max_size=3).map(
                lambda found: {
                    "type": "object",
                    "properties": found,
                    "required": sorted(found)[:1],
                    "additionalProperties": False,
                }
            ),
            st.lists(inner, min_size=1, max_size=2).map(lambda found: {"anyOf": found}),
        ),
        max_leaves=5,
    )


def satisfies(value: Any, schema: dict[str, Any]) -> bool:
    """Return whether the schema of `values` allows the value."""
    if "anyOf" in schema:
        return any(satisfies(value, inner) for inner in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return bool(value == schema["const"])
    kind = {"boolean": bool, "null": type(None), "integer": int, "string": str, "array": list, "object": dict}
    if type(value) is not kind[schema["type"]]:
        return False
    if schema["type"] == "object":
        known = schema["properties"]
        return set(schema["required"]) <= set(value) <= set(known) and all(
            satisfies(item, known[key]) for key, item in value.items()
        )
    if schema["type"] == "array":
        return len(value) <= 2 and all(satisfies(item, schema["items"]) for item in value)
    if schema["type"] == "integer":
        return -5 <= value <= 20
    if "pattern" in schema:
        return re.fullmatch("[A-Z]{2}", value) is not None
    return len(value) <= 5 if isinstance(value, str) else True


@settings(max_examples=40, deadline=None)
@given(schema=values(), seed=st.integers(0, 1000))
def test_random_tokens_within_the_masks_satisfy_any_schema(schema: dict[str, Any], seed: int) -> None:
    compiler = GrammarCompiler(ByteTokenizer(), VOCAB_SIZE, [EOS])
    grammar = compiler.compile(StructuredOutput(json_schema=schema), [EOS])
    draw = random.Random(seed)
    text = bytearray()
    for _ in range(2000):
        allowed = [i for i in range(VOCAB_SIZE) if grammar.mask[i // 8] >> i % 8 & 1]
        token_id = draw.choice(allowed)
        if token_id == EOS:
            break
        text.append(token_id)
        grammar.advance([token_id])
        assert grammar.error is None
        if grammar.is_complete:
            break
    assert satisfies(json.loads(text.decode()), schema)


def test_plain_rows_run_ahead_of_structured_ones_beside_them() -> None:
    batches: list[Batch] = []
    forms = [structured(json_schema=PERSON) if index % 2 else tokens(200) for index in range(12)]
    with make_llm(random_model(2), max_steps_in_flight=4, on_step=batches.append) as llm:
        mixed = llm.generate([f"p{index}" for index in range(12)], forms)
        rows = [(batch, row) for batch in batches for row in batch.rows]
        alone = [llm.generate(f"p{index}", form)[0] for index, form in enumerate(forms)]
    for output in mixed[1::2]:
        check_person(output.text)
    assert [output.token_ids for output in mixed] == [output.token_ids for output in alone]
    ahead = [row.slot in batch.masks for batch, row in rows if len(row.token_ids) < row.num_tokens]
    assert ahead, "no row ran ahead"
    assert not any(ahead), "a row with a mask ran ahead of the token that the mask follows from"


async def test_streamed_deltas_concatenate_to_the_text() -> None:
    with make_llm(random_model(3)) as llm:
        async with timeout():
            handle = llm.generate_async("p", structured(json_schema=PERSON), streaming=True)
            outputs = [output async for output in handle]
    assert outputs[-1].finish_reason == "stop"
    assert "".join(output.text_delta for output in outputs) == outputs[-1].text
    check_person(outputs[-1].text)


def test_preempted_requests_keep_their_place_in_the_grammar() -> None:
    prompts = [f"prompt number {index}" for index in range(6)]
    with make_llm(random_model(4)) as llm:
        alone = [llm.generate(prompt, structured(json_schema=PERSON))[0].text for prompt in prompts]
    with make_llm(random_model(4), num_blocks=513 // 8) as llm:
        crowded = llm.generate(prompts, structured(200, json_schema=PERSON))
        assert llm.stats().counters.num_preemptions > 0
    assert [output.text for output in crowded] == alone
    for text in alone:
        check_person(text)


async def test_aborted_requests_leave_nothing_behind() -> None:
    with make_llm(counting_model, max_batch_size=4) as llm:
        async with timeout():
            handles = [llm.generate_async("p", structured(2000, regex="[a-z]*"), streaming=True) for _ in range(12)]
            for handle in handles[:4]:
                await anext(aiter(handle))
            for handle in handles:
                handle.abort()
            assert {(await handle).finish_reason for handle in handles} == {"abort"}
        await asyncio.to_thread(assert_idle, llm)


def test_several_outputs_of_a_prompt_have_grammars_of_their_own() -> None:
    with make_llm(random_model(5)) as llm:
        params = structured(json_schema=PERSON).replace(n=3, temperature=1.0)
        (output,) = llm.generate("p", params)
        for one in output.outputs:
            check_person(one.text)


def test_eos_ends_the_text_only_where_it_may() -> None:
    def wants_to_end(_: Sequence[int]) -> int:
        return EOS

    with make_llm(wants_to_end) as llm:
        (output,) = llm.generate("p", structured(regex="a+"))
        assert (output.text, output.finish_reason) == ("a", "stop")
        (output,) = llm.generate(
            "p", structured(regex="a+").replace(min_new_tokens=0, ignore_eos=True, max_new_tokens=9)
        )
        assert (output.text, output.finish_reason) == ("a" * 9, "length")
        (output,) = llm.generate("p", structured(regex="a{3}", ignore_eos=True))
        assert (output.text, output.finish_reason) == ("aaa", "stop")
        (output,) = llm.generate("p", structured(3, regex="a{3}"))
        assert output.finish_reason == "stop", "whole with the last token that it may have"
        (output,) = llm.generate("p", structured(2, regex="a{3}"))
        assert (output.text, output.finish_reason) == ("aa", "length")


def test_stop_strings_may_cut_the_text_off() -> None:
    with make_llm(counting_model) as llm:
        (output,) = llm.generate("a", structured(regex="[a-z]{26}").replace(stop=("ef",)))
    assert (output.text, output.finish_reason) == ("bcd", "stop")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "exactly one of .*, not none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of .*, not regex and choice"),
        ({"regex": ""}, "regex must be a non-empty string, not ''"),
        ({"choice": []}, r"choice must be a non-empty list of strings, not \[\]"),
        ({"choice": ["a", ""]}, r"choice\[1\] must be a non-empty string, not ''"),
        ({"json_schema": "{"}, "json_schema must be valid JSON, not"),
        ({"json_schema": [1]}, "json_schema must be an object or True, not \\[1\\]"),
        ({"json_schema": {"a": object()}}, "json_schema must be valid JSON, not"),
        ({"regex": "a" * 300_000}, "300000 characters; the limit is 262144"),
    ],
)
def test_malformed_forms_are_refused_where_they_are_written(form: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        StructuredOutput(**form)


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(unclosed"},
        {"regex": "(?=look)ahead"},
        {"regex": "()"},
        {"json_schema": {"type": "nonsense"}},
        {"json_schema": {"type": "array", "uniqueItems": True}},
        {"json_schema": {"$ref": "#/$defs/missing"}},
        {"grammar": "start: missing"},
        {"grammar": 'root ::= "unclosed'},
        {"grammar": "nothing of a grammar"},
    ],
    ids=str,
)
async def test_unusable_forms_fail_their_request_alone(form: dict[str, Any]) -> None:
    with make_llm(counting_model) as llm:
        async with timeout():
            for prompt in ("text", [97, 98]):
                with pytest.raises(InvalidRequestError, match="structured output cannot be used"):
                    await llm.generate_async(prompt, structured(**form))
            assert (await llm.generate_async("a", tokens(3))).text == "bcd"


async def test_a_grammar_without_an_end_is_said_to_be_one() -> None:
    with make_llm(counting_model) as llm:
        async with timeout():
            with pytest.raises(InvalidRequestError, match="no text can come next"):
                await llm.generate_async("x", structured(grammar="start: start"))
            output = await llm.generate_async("x", structured(grammar='start: "a" rest\nrest: rest'))
            assert (output.finish_reason, output.text) == ("error", "a")
            assert "no text can come next" in str(output.error)


def sentencepiece_tokenizer() -> LoadedTokenizer:
    """Return a tokenizer of letters, byte tokens and a few words that begin with a space."""
    words = ["\u2581", *map(chr, range(33, 127)), '{"', '":', '\u2581"', "\u2581[", "na", "me", "\u2581red", '",']
    names = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(names))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return tokenizer_from_gguf(metadata, "x.gguf")


def smollm2_tokenizer() -> LoadedTokenizer:
    """Return a byte-level tokenizer of 49152 ids."""
    return load_tokenizer(model_path(), "gguf")


@pytest.mark.parametrize("build", [sentencepiece_tokenizer, smollm2_tokenizer])
def test_tokens_of_real_tokenizers_make_the_form(build: Callable[[], LoadedTokenizer]) -> None:
    tokenizer = build()
    vocab_size = tokenizer.vocab_size + 37  # padded, as models have it
    with engine_helpers.make_llm(
        tokenizer=tokenizer,
        eos_token_ids=tokenizer.end_token_ids,
        next_token=random_model(6, vocab_size),
        vocab_size=vocab_size,
        max_model_len=2048,
        num_blocks=1025,
    ) as llm:
        for output in llm.generate(["one", "two", "three"], structured(json_schema=PERSON)):
            assert output.finish_reason == "stop"
            check_person(output.text)
        (output,) = llm.generate("one", structured(choice=["naïve 😀"]))
        assert output.text == "naïve 😀"


def test_the_cpu_backend_samples_within_the_masks(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    backend = load_tiny(tmp_path)
    vocab_size = backend.info.vocab_size
    driver = BackendDriver(backend)
    params = SamplingParams(temperature=1.0)
    masked, plain = driver.add(0, [1, 2, 3], params, seed=5), driver.add(1, [1, 2, 3], params, seed=5)
    batch = driver.batch((masked, 3), (plain, 3))
    allowed = {7, vocab_size - 1}
    mask = bytearray(4 * -(-vocab_size // 32))
    for token_id in allowed:
        mask[token_id // 8] |= 1 << token_id % 8
    backend.launch(replace(batch, masks={0: bytes(mask)}))
    found = backend.collect().token_ids
    assert found[0][0] in allowed
    assert found[1][0] not in allowed
    backend.close()


def test_structured_output_needs_a_tokenizer_that_is_known() -> None:
    class Opaque:
        def encode(self, text: str) -> list[int]:
            return ByteTokenizer().encode(text)

        def decode(self, token_ids: Sequence[int]) -> str:
            return ByteTokenizer().decode(token_ids)

    for tokenizer, message in ((None, "needs a tokenizer"), (Opaque(), "Opaque must have tokenizer_json")):
        with (
            engine_helpers.make_llm(tokenizer=tokenizer, eos_token_ids=[EOS]) as llm,
            pytest.raises(InvalidRequestError, match=message),
        ):
            llm.generate_async([1, 2], structured(regex="a"))


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llguidance" else find_spec(name, *rest)
    )
    with make_llm(counting_model) as llm, pytest.raises(InvalidRequestError, match=r"llmengine\[structured\]"):
        llm.generate_async("p", structured(regex="a"))


AMBIGUOUS = {"grammar": 'start: e\ne: e e | e e e | "a" | e "a" e |'}
HOSTILE: list[dict[str, Any]] = [
    AMBIGUOUS,
    {"regex": "((a{1,500}){1,500}){1,500}"},
    {"regex": "[ab]*a[ab]{30}"},
    {"grammar": 'start: ("a"{1,1000}){1,1000}'},
    {"grammar": "start: A\nA: /(.*a.{9}b.*)/ & /(.*c.{8}d.*)/ & ~/(.*e.{7}f.*)/"},
    {"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000},
    {"grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000},
    {"json_schema": '{"items":' * 5_000 + "{}" + "}" * 5_000},
    {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**5, "maxItems": 10**6}},
    {"json_schema": {"properties": {f"p{index}": {"type": "string"} for index in range(3000)}}},
    {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}},
]


async def test_hostile_grammars_end_and_stall_nobody() -> None:
    """A machine on which threads stand still may do what the grammars must not, so there are several tries."""
    for _ in range(3):
        if await slowest_answer_beside_hostile_grammars() < 2.0:
            return
    pytest.fail("hostile grammars stall others each time")


async def slowest_answer_beside_hostile_grammars() -> float:
    """Longest time that 50 tokens took meanwhile, in seconds."""

    def wants_a(token_ids: Sequence[int]) -> int:
        return counting_model(token_ids) if token_ids[0] == ord("p") else ord("a")

    with make_llm(wants_a, max_steps_in_flight=2) as llm:
        async with timeout():
            pending = []
            for form in HOSTILE:
                try:
                    pending.append(llm.generate_async("hostile", structured(60, **form)))
                except InvalidRequestError:
                    continue
            hostile = asyncio.gather(*pending, return_exceptions=True)
            slowest = 0.0
            while not hostile.done():
                began = time.perf_counter()
                assert len((await llm.generate_async("p", tokens(50))).token_ids) == 50
                slowest = max(slowest, time.perf_counter() - began)
                await asyncio.sleep(0.01)
            for result in await hostile:
                assert isinstance(result, (GenerationOutput, InvalidRequestError, RequestFailedError)), result
    return slowest


def test_grammar_does_not_move_twice_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the pool has queued the call."""
    moved: list[int] = []

    class Moving:
        def advance(self, token_ids: list[int]) -> None:
            moved.extend(token_ids)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    class Growing:
        grammar = Moving()
        token_ids: Sequence[int] = ()

        def extend(self, token_ids: Sequence[int], logprobs: object) -> None:
            self.token_ids = token_ids

    steps = GrammarSteps(lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            steps.append(Growing(), 5, None)  # type: ignore[arg-type]

        def exiting(thread: threading.Thread) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

        patch.setattr(threading.Thread, "start", exiting)
        assert steps.append(Growing(), 5, None) is None, "the engine is about to be stopped, and no fault"  # type: ignore[arg-type]
    assert not moved
    steps.close()

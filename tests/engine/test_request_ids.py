"""A caller's own request ids and metadata: in outputs, errors, logs and statistics; pickled and copied outputs."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import pytest

from llmengine import (
    EngineDeadError,
    GenerationOutput,
    InvalidRequestError,
    KvCacheConfig,
    LLMEngineError,
    ModelConfig,
    RequestFailedError,
    RequestKeywords,
    SamplingParams,
    SchedulerConfig,
    StructuredOutput,
)
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.engine.helpers import WAIT_S, GatedTokenizer, StepGate, in_loop, make_llm, oracle, start, tokens

PROMPT = [5, 6, 7]


class Opaque:
    """Metadata that can be neither hashed, compared nor copied."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    def __deepcopy__(self, memo: object) -> None:
        raise AssertionError("copied")


def test_id_and_metadata_come_back_with_outputs_and_statistics() -> None:
    metadata = Opaque()
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        options: RequestKeywords = {"request_id": "job-7", "metadata": metadata, "tenant": "a", "priority": 3}
        handle = llm.generate_async(PROMPT, tokens(4), True, **options)
        gate.wait()
        (stats,) = llm.requests()
        assert (stats.request_id, stats.tenant, stats.priority, stats.state) == ("job-7", "a", 3, "running")
        assert (stats.num_outputs, stats.num_prompt_tokens, stats.num_tokens) == (1, 3, 0)
        assert stats.metadata is metadata is handle.metadata
        gate.open()
        outputs = in_loop(lambda: _collect(handle))
        for output in [*outputs, handle.result(WAIT_S)]:
            assert output.request_id == handle.request_id == "job-7"
            assert output.metadata is metadata
            assert "request_id='job-7'" in repr(output)
        assert llm.requests() == []
        assert (handle.stats().state, handle.stats().num_tokens) == ("finished", 4)
        assert handle.stats().timeline.duration_s is not None


async def _collect(handle: Any) -> list[GenerationOutput]:
    return [output async for output in handle]


def test_ids_are_labels_and_numbers_where_none_is_given() -> None:
    with make_llm() as llm:
        handles = [llm.generate_async([n], tokens(3), request_id="same") for n in range(4)]
        numbered = [llm.generate_async([n], tokens(3)) for n in range(4)]
        assert [handle.result(WAIT_S).token_ids for handle in handles] == [oracle([n], 3) for n in range(4)]
        assert {handle.request_id for handle in handles} == {"same"}
        numbers = [handle.request_id for handle in numbered]
        assert all(isinstance(number, int) for number in numbers)
        assert numbers == sorted(set(numbers))  # type: ignore[type-var]
        outputs = llm.generate([[1], [2]], tokens(2), request_id="batch", metadata=[1])
        assert [(output.request_id, output.metadata) for output in outputs] == [("batch", [1])] * 2


def test_all_outputs_of_a_prompt_have_them() -> None:
    with make_llm() as llm:
        params = SamplingParams(n=3, temperature=1.0, max_new_tokens=3)
        handle = llm.generate_async(PROMPT, params, request_id="family", metadata={"user": 1})
        for output in handle.result(WAIT_S).outputs:
            assert (output.request_id, output.metadata) == ("family", {"user": 1})
        assert handle.stats().num_outputs == 3
        assert handle.stats().num_tokens == 9


def test_beam_search_has_them() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        done = start(lambda: llm.beam_search([PROMPT], 2, max_new_tokens=2, request_id="beams", metadata=7))
        gate.wait()
        assert [(stats.request_id, stats.metadata) for stats in llm.requests()] == [("beams", 7)]
        gate.open()
        (output,) = done.result(WAIT_S)
        assert (output.request_id, output.metadata) == ("beams", 7)
        assert llm.beam_search([PROMPT], 2, max_new_tokens=2)[0].request_id is None


def test_requests_that_are_tokenized_or_wait_for_room_are_listed() -> None:
    tokenizer, gate = GatedTokenizer(), StepGate()
    with make_llm(tokenizer=tokenizer, on_step=gate, scheduler=SchedulerConfig(max_queued_requests=1)) as llm:
        handles = [llm.generate_async("a", tokens(2), request_id=name, wait_for_admission=True) for name in "xyz"]
        tokenizer.wait_begun()
        assert [(stats.request_id, stats.state) for stats in llm.requests()] == [(name, "queued") for name in "xyz"]
        assert {stats.num_prompt_tokens for stats in llm.requests()} == {0}
        tokenizer.gate.set()
        gate.open()
        for handle in handles:
            handle.result(WAIT_S)
        assert llm.requests() == []


def test_paused_request_says_so() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=SchedulerConfig(max_unread_tokens=1)) as llm:
        paused = llm.generate_async(PROMPT, tokens(30), True, slow_consumer="pause", request_id="p")
        other = llm.generate_async([9], tokens(10), request_id="o")
        gate.open()
        other.result(WAIT_S)
        assert [(stats.request_id, stats.state) for stats in llm.requests()] == [("p", "paused")]
        assert paused.result(WAIT_S).num_tokens == 30


@pytest.mark.parametrize("wrong", ["", 5, b"x", "x" * 257, ["a"]])
def test_wrong_id_is_refused(wrong: Any) -> None:
    with (
        make_llm() as llm,
        pytest.raises(
            InvalidRequestError,
            match=r"^request_id (must be a non-empty string, not|'x+'\.\.\. has 257 characters; the limit is 256)",
        ),
    ):
        llm.generate_async(PROMPT, request_id=wrong)


def test_errors_and_logs_name_the_request(caplog: pytest.LogCaptureFixture) -> None:
    held, gate = StepGate(), StepGate()

    def die(batch: Any) -> None:
        gate(batch)
        raise RuntimeError("device lost")

    with make_llm(on_step=held) as llm:
        rejected = llm.generate_async("a" * 10_000, request_id="long")
        with pytest.raises(InvalidRequestError) as refusal:
            rejected.result(WAIT_S)
        assert refusal.value.request_id == "long"
        with pytest.raises(TimeoutError, match="request 'slow'"):
            llm.generate_async(PROMPT, tokens(500), request_id="slow").result(0)
        held.open()
        with pytest.raises(InvalidRequestError) as refusal:
            llm.generate_async([-1], request_id="never submitted")
        assert refusal.value.request_id is None
    with caplog.at_level(logging.ERROR, "llmengine"), make_llm(on_step=die) as llm:
        handles = [llm.generate_async([n], tokens(3), request_id=f"r{n}") for n in range(2)]
        gate.open()
        for n, handle in enumerate(handles):
            with pytest.raises(EngineDeadError) as death:
                handle.result(WAIT_S)
            assert death.value.request_id == f"r{n}"
    assert "'r0'" in caplog.text


def test_error_of_an_output_names_the_request() -> None:
    with make_llm(next_token=lambda _: None) as llm:
        output = llm.generate([PROMPT], request_id="nan")[0]
        assert output.error is not None
        assert (output.finish_reason, output.error.request_id) == ("error", "nan")


# Copies


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_holds_an_engine_cannot_be_copied(duplicate: Callable[[Any], Any]) -> None:
    with make_llm() as llm:
        handles = [
            llm.generate_async([1], tokens(2), request_id="h"),
            llm.generate_async([1], tokens(2, n=2, temperature=1.0), request_id="h"),
        ]
        with pytest.raises(TypeError, match="an LLM cannot be pickled or copied: it owns a thread"):
            duplicate(llm)
        with pytest.raises(TypeError, match="an LLM cannot be pickled"):
            duplicate({"app": [llm]}) if duplicate is not copy.copy else duplicate(llm)
        for handle in handles:
            with pytest.raises(TypeError, match="the handle of request 'h' cannot be pickled or copied"):
                duplicate(handle)
            assert handle.result(WAIT_S).num_tokens == 2


def test_llm_is_not_sent_to_another_process() -> None:
    with make_llm() as llm:
        process = multiprocessing.get_context("spawn").Process(target=print, args=(llm,))
        with pytest.raises(TypeError, match="an LLM cannot be pickled"):
            process.start()


class Unpicklable(ByteTokenizer):
    def __reduce__(self) -> Any:
        raise TypeError("a tokenizer went along")


def _twins(output: GenerationOutput) -> list[GenerationOutput]:
    loaded: GenerationOutput = pickle.loads(pickle.dumps(output))
    again: GenerationOutput = pickle.loads(pickle.dumps(loaded))
    return [loaded, again, copy.copy(output), copy.deepcopy(output)]


def _values(output: GenerationOutput) -> dict[str, Any]:
    names = [name for name, value in vars(GenerationOutput).items() if isinstance(value, property)]
    values = {name: getattr(output, name) for name in names if name not in ("outputs", "error")}
    return {**values, "finish_reason": output.finish_reason, "repr": repr(output)}


@pytest.mark.parametrize(
    "params",
    [
        tokens(4),
        tokens(4, logprobs=2),
        tokens(4, n=2, best_of=3, temperature=1.0),
        tokens(9, stop=["d"]),
    ],
    ids=["plain", "logprobs", "family", "stop"],
)
def test_outputs_can_be_pickled_without_the_tokenizer(params: SamplingParams) -> None:
    with make_llm(tokenizer=Unpicklable()) as llm:
        output = llm.generate("abc", params, request_id="r", metadata={"user": 1})[0]
    for twin in _twins(output):
        assert _values(twin) == _values(output)
        assert [_values(one) for one in twin.outputs] == [_values(one) for one in output.outputs]


async def test_pickled_output_does_not_grow() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        handle = llm.generate_async(PROMPT, tokens(5), True)
        gate.wait()
        gate.let_go()
        first = await anext(handle)
        twin = pickle.loads(pickle.dumps(first))
        gate.open()
        await handle
        assert (twin.token_ids, twin.finished, twin.text) == (oracle(PROMPT, 1), False, first.text)
        assert twin.timeline == first.timeline


def test_failed_output_can_be_pickled() -> None:
    with make_llm(next_token=lambda _: None) as llm:
        output = llm.generate([PROMPT], request_id="nan")[0]
    for twin in _twins(output):
        assert isinstance(twin.error, RequestFailedError)
        assert (twin.error.args, twin.error.request_id) == (output.error and output.error.args, "nan")


@pytest.mark.parametrize(
    "data",
    [
        SchedulerConfig(),
        SchedulerConfig(tenant_weights={"a": 2.0}),
        SchedulerConfig(tenant_weights={"a": 2.0}).resolve(),
        KvCacheConfig().resolve(),
        ModelConfig("somewhere"),
        SamplingParams(stop=["a"], logit_bias={3: 1.0}, structured=StructuredOutput(choice=["a", "b"])),
    ],
    ids=lambda data: type(data).__name__,
)
def test_settings_can_be_pickled_and_copied(data: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(data)), copy.copy(data), copy.deepcopy(data)):
        assert twin == data


def test_copy_of_a_resolved_configuration_is_frozen() -> None:
    resolved = SchedulerConfig(tenant_weights={"a": 2.0}).resolve()
    for twin in (pickle.loads(pickle.dumps(resolved)), copy.deepcopy(resolved)):
        with pytest.raises(LLMEngineError, match="in use by an LLM"):
            twin.max_batch_size = 3
        with pytest.raises(TypeError):
            twin.tenant_weights["a"] = 1
    changed = pickle.loads(pickle.dumps(SchedulerConfig()))
    changed.max_batch_size = 3
    assert changed != SchedulerConfig()


def test_statistics_can_be_pickled() -> None:
    with make_llm() as llm:
        llm.generate([PROMPT], tokens(2))
        handle = llm.generate_async(PROMPT, tokens(2))
        beams = llm.beam_search([PROMPT], 2, max_new_tokens=2, metadata=[1])
        for data in (llm.stats(), llm.health(), llm.info, handle.stats(), beams):
            assert pickle.loads(pickle.dumps(data)) == data


# Errors of a caller's own tokenizer


class Faulty(ByteTokenizer):
    """Raises `fault` in the method that it is told to."""

    def __init__(self, where: str, fault: Exception) -> None:
        self._where, self._fault = where, fault

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self._where == "encode":
            raise self._fault
        return super().encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        if self._where == "decode":
            raise self._fault
        return super().decode(token_ids)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_variables: Any) -> str:
        if self._where == "template":
            raise self._fault
        return str(messages[0]["content"])


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("where", ["encode", "template"])
@pytest.mark.parametrize("fault", [KeyError("x"), ValueError("x"), RuntimeError("x"), TypeError("x"), OSError("x")])
def test_bug_of_a_tokenizer_is_not_the_requests_fault(where: str, fault: Exception) -> None:
    with make_llm(tokenizer=Faulty(where, fault)) as llm:
        calls: list[Callable[[], Any]] = [lambda: llm.chat(MESSAGES)]
        if where == "encode":
            calls += [
                lambda: llm.generate("hi"),
                lambda: llm.generate_async("hi").result(WAIT_S),
                lambda: llm.generate_async("hi", wait_for_admission=True).result(WAIT_S),
                lambda: llm.beam_search("hi"),
                lambda: llm.generate([[1]], tokens(1, bad_words=["x"])),
                lambda: llm.generate_async([1], tokens(1, bad_words=["x"])).result(WAIT_S),
            ]
        for call in calls:
            with pytest.raises(RequestFailedError, match="the tokenizer failed to") as caught:
                call()
            assert caught.value.status == 500
            assert caught.value.__cause__ is fault
        assert llm.generate([[1]], tokens(2))[0].num_tokens == 2


@pytest.mark.parametrize("where", ["encode", "template"])
def test_error_that_a_tokenizer_raises_on_purpose_stays(where: str) -> None:
    with make_llm(tokenizer=Faulty(where, InvalidRequestError("no emojis"))) as llm:
        with pytest.raises(InvalidRequestError, match=r"^no emojis$") as caught:
            llm.chat(MESSAGES)
        assert caught.value.status == 400


def test_what_a_template_raises_is_the_requests_fault() -> None:
    def reject() -> Exception:
        try:
            jinja2.Environment(autoescape=False).from_string("{{ reject('no system role') }}").render(reject=_raise)
        except jinja2.TemplateError as error:
            return error
        raise AssertionError

    with (
        make_llm(tokenizer=Faulty("template", reject())) as llm,
        pytest.raises(InvalidRequestError, match="rejects the messages: no system role"),
    ):
        llm.chat(MESSAGES)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def test_text_that_is_none_is_the_requests_fault_whatever_the_tokenizer_says() -> None:
    class Strict(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    with make_llm(tokenizer=Strict()) as llm, pytest.raises(InvalidRequestError, match="lone surrogate"):
        llm.generate("\ud800")


def test_bug_in_decode_is_not_the_requests_fault() -> None:
    with make_llm(tokenizer=Faulty("decode", KeyError("x"))) as llm:
        for call in (lambda: llm.beam_search([[1]], 2, max_new_tokens=2), lambda: llm.generate([[1]], tokens(2))):
            with pytest.raises(RequestFailedError, match="the tokenizer failed to decode"):
                call()

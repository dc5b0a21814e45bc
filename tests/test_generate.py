"""`generate()` and `generate_async()`: accepted inputs, refused inputs, and the order of outputs."""

from __future__ import annotations

import array
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from llmengine.config import SchedulerConfig
from llmengine.errors import ConfigError, InvalidRequestError
from llmengine.sampling_params import SamplingParams
from tests.engine.helpers import (
    WAIT_S,
    StepGate,
    assert_idle,
    bounded,
    counting_model,
    heeding_ctrl_c,
    interrupt_main_in,
    make_llm,
    oracle,
    start,
    timeout,
    tokens,
)
from tests.terminal import on_terminal


class FewIds(list[int]):
    """A sequence of a caller's own type."""


def generator() -> Iterator[Any]:
    """Yield prompts of both kinds."""
    yield "ab"
    yield [1, 2]


A, B = list(b"ab"), [1, 2]
FORMS: dict[str, tuple[Callable[[], Any], list[list[int]]]] = {
    "text": (lambda: "ab", [A]),
    "ids": (lambda: [1, 2], [B]),
    "tuple of ids": (lambda: (1, 2), [B]),
    "range": (lambda: range(1, 3), [B]),
    "own type": (lambda: FewIds([1, 2]), [B]),
    "array.array": (lambda: array.array("i", [1, 2]), [B]),
    "numpy ids": (lambda: np.array([1, 2]), [B]),
    "numpy scalars": (lambda: [np.int64(1), np.int32(2)], [B]),
    "numpy rows": (lambda: np.array([[1, 2], [97, 98]]), [B, A]),
    "list of numpy ids": (lambda: [np.array([1, 2]), np.array([97, 98])], [B, A]),
    "list of texts": (lambda: ["ab", "ab"], [A, A]),
    "tuple of texts": (lambda: ("ab",), [A]),
    "list of ids": (lambda: [[1, 2], [97, 98]], [B, A]),
    "mixed": (lambda: ["ab", [1, 2]], [A, B]),
    "generator": (generator, [A, B]),
    "nothing": (list, []),
    "empty generator": (lambda: iter(()), []),
}


@pytest.mark.parametrize("form", FORMS)
def test_prompts_in_every_form(form: str) -> None:
    make, expected = FORMS[form]
    with make_llm() as llm:
        outputs = bounded(lambda: llm.generate(make(), tokens(4)))
        assert [output.token_ids for output in outputs] == [oracle(prompt, 4) for prompt in expected]
        assert [output.prompt_token_ids for output in outputs] == expected
        assert all(type(token_id) is int for output in outputs for token_id in output.prompt_token_ids)
        assert all(output.finished for output in outputs)


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "None": (None, "NoneType"),
    "number": (7, "int"),
    "float ids": ([1.0, 2.0], "float"),
    "bools": ([True, False], "bool"),
    "mixed ids": ([1, "a"], "str"),
    "numpy floats": (np.array([1.0]), "float"),
    "numpy bools": (np.array([True]), "bool"),
    "numpy scalar": (np.array(5), "ndarray|int"),
    "id too large": ([1, 258], "258"),
    "negative id": ([-1], "-1"),
    "bytes": (b"ab", "bytes"),
    "list of bytes": ([b"ab"], "bytes"),
    "bytearray": (bytearray(b"ab"), "bytearray"),
    "mapping": ({"prompt": "ab"}, "dict"),
    "list of mappings": ([{"prompt": "ab"}], "dict"),
    "list of None": ([None], "NoneType"),
    "too deep": ([[[1, 2]]], "list"),
    "no tokens": ([[]], "no tokens"),
    "empty text": ("", "no tokens"),
    "surrogate": ("\ud800", "surrogate"),
}


@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_bad_prompts_are_refused_by_name(kind: str) -> None:
    prompt, named = BAD_PROMPTS[kind]
    with make_llm() as llm:
        with pytest.raises(InvalidRequestError, match=named):
            bounded(lambda: llm.generate(prompt, tokens(2)))
        assert_idle(llm)


@pytest.mark.parametrize("prompt", [None, 7, 1.5, [1.0], [[1]], b"ab", {"prompt": "ab"}, {1, 2}, [], "", object()])
def test_bad_prompts_are_refused_by_generate_async(prompt: Any) -> None:
    with make_llm() as llm:
        with pytest.raises(InvalidRequestError):
            llm.generate_async(prompt, tokens(2)).result(WAIT_S)
        assert_idle(llm)


def test_text_needs_a_tokenizer() -> None:
    with make_llm(tokenizer=None) as llm:
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            bounded(lambda: llm.generate("ab", tokens(2)))
        with pytest.raises(InvalidRequestError, match="a chat needs a tokenizer"):
            bounded(lambda: llm.chat([{"role": "user", "content": "ab"}], tokens(2)))
        with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
            llm.generate_async([1], tokens(2, stop=("a",)))
        assert_idle(llm)


def test_one_fault_among_many_aborts_the_others() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        with pytest.raises(InvalidRequestError, match="999"):
            bounded(lambda: llm.generate([[1], [2], [999], [3]], tokens(200)))
        gate.open()
        assert_idle(llm)
        assert llm.stats().counters.num_finished_requests == 3
        assert llm.stats().counters.num_generated_tokens <= 3


def test_params_one_for_all_one_each_and_none() -> None:
    with make_llm(next_token=counting_model) as llm:
        assert [o.text for o in bounded(lambda: llm.generate(["a", "k"], tokens(2)))] == ["bc", "lm"]
        each = [tokens(1), tokens(3)]
        assert [o.text for o in bounded(lambda: llm.generate(["a", "k"], each))] == ["b", "lmn"]
        assert [o.text for o in bounded(lambda: llm.generate(["a", "k"], tuple(each)))] == ["b", "lmn"]
        defaults = llm.get_default_sampling_params()
        assert bounded(lambda: llm.generate("a"))[0].num_tokens == defaults.max_new_tokens
        assert llm.generate_async("a").result(WAIT_S).num_tokens == defaults.max_new_tokens


@pytest.mark.parametrize("num_params", [0, 1, 3])
def test_counts_that_do_not_match(num_params: int) -> None:
    with make_llm() as llm:
        with pytest.raises(InvalidRequestError, match=f"{num_params} sampling_params for"):
            bounded(lambda: llm.generate(["a", "b"], [tokens(2)] * num_params))
        assert_idle(llm)


@pytest.mark.parametrize("params", [{"max_new_tokens": 3}, "greedy", 5, [{"top_k": 1}]])
def test_params_of_another_type(params: Any) -> None:
    with make_llm() as llm:
        with pytest.raises(InvalidRequestError, match="SamplingParams"):
            bounded(lambda: llm.generate(["a"], params))
        with pytest.raises(InvalidRequestError, match="SamplingParams"):
            llm.generate_async("a", params)


def test_stop_id_outside_the_vocabulary() -> None:
    with make_llm() as llm:
        with pytest.raises(InvalidRequestError, match=r"258.*\[0, 258\)"):
            llm.generate_async("a", tokens(2, stop_token_ids=(258,)))
        assert llm.generate_async("a", tokens(2, stop_token_ids=(257,))).result(WAIT_S).num_tokens == 2


def test_outputs_are_in_the_order_of_the_prompts() -> None:
    with make_llm(scheduler=SchedulerConfig(max_batch_size=3)) as llm:
        prompts = [[index] for index in range(30)]
        params = [tokens(1 + (index * 7) % 20) for index in range(30)]
        outputs = bounded(lambda: llm.generate(prompts, params))
        assert [output.prompt_token_ids for output in outputs] == prompts
        assert [output.num_tokens for output in outputs] == [p.max_new_tokens for p in params]


def test_priority_reaches_the_scheduler() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=SchedulerConfig(max_batch_size=1)) as llm:
        first = llm.generate_async([1], tokens(2))
        gate.wait()
        low, high = llm.generate_async([2], tokens(2)), llm.generate_async([3], tokens(2), priority=1)
        batch = start(lambda: llm.generate([[4]], tokens(2), priority=2))
        gate.open()
        for handle in (first, low, high):
            handle.result(WAIT_S)
        batch.result(WAIT_S)
        begun = [handle.result(0).timeline.first_scheduled for handle in (first, high, low)]
        assert begun == sorted(moment for moment in begun if moment is not None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"deadline_s": 0}, "deadline_s must be a number above 0, not 0"),
        ({"deadline_s": -1.0}, "deadline_s must be a number above 0, not -1.0"),
        ({"deadline_s": float("nan")}, "deadline_s must be a number above 0, not nan"),
        ({"deadline_s": "5"}, "deadline_s must be a number above 0, not '5'"),
        ({"priority": "high"}, "priority must be .*, not 'high'"),
        ({"priority": 1.5}, "priority must be .*, not 1.5"),
        ({"cache_salt": ["tenant"]}, "cache_salt must be hashable, not .*tenant"),
        ({"cache_salt": {}}, "cache_salt must be hashable, not {}"),
    ],
)
@pytest.mark.parametrize("prompt", ["a", [1]])
def test_bad_options_are_refused_and_the_engine_lives(options: dict[str, Any], named: str, prompt: Any) -> None:
    with make_llm() as llm:
        with pytest.raises(InvalidRequestError, match=named):
            llm.generate_async(prompt, tokens(2), **options)
        if "priority" in options:
            with pytest.raises(InvalidRequestError, match=named):
                bounded(lambda: llm.generate(prompt, tokens(2), **options))
        assert_idle(llm)


async def test_salts_separate_the_cache() -> None:
    with make_llm() as llm:
        async with timeout():
            prompt = list(range(20))
            cached = []
            for salt in (None, None, "a", "a", ("b", 1)):
                output = await llm.generate_async(prompt, tokens(2), cache_salt=salt)
                cached.append(output.num_cached_tokens)
                assert output.token_ids == oracle(prompt, 2)
        assert cached == [0, 16, 0, 16, 0]
        assert llm.stats().cache_hit_rate == 32 / 100


def test_without_prefix_caching_nothing_is_shared() -> None:
    with make_llm(caching=False) as llm:
        outputs = bounded(lambda: [llm.generate(list(range(20)), tokens(2))[0] for _ in range(2)])
        assert [output.num_cached_tokens for output in outputs] == [0, 0]
        assert llm.stats().num_cached_blocks == 0


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_on_stderr_only(progress: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with on_terminal() as terminal, make_llm() as llm:
        assert len(bounded(lambda: llm.generate(["a", "b"], tokens(2), progress=progress))) == 2
    assert capfd.readouterr().out == ""
    shown = terminal.getvalue()
    assert ("generating" in shown) == ("2/2" in shown) == progress


def test_progress_is_not_written_into_files(capfd: pytest.CaptureFixture[str]) -> None:
    with make_llm() as llm:
        assert len(bounded(lambda: llm.generate(["a", "b"], tokens(2), progress=True))) == 2
    assert capfd.readouterr() == ("", "")


def test_interrupted_progress_leaves_nothing_although_the_traceback_is_kept() -> None:
    """A notebook keeps the last traceback in this way."""
    threads = set(threading.enumerate())
    gate = StepGate()
    with on_terminal() as terminal, heeding_ctrl_c(), make_llm(on_step=gate) as llm:
        interrupted = start(lambda: interrupt_main_in("wait_blocking"))
        with pytest.raises(KeyboardInterrupt) as caught:
            llm.generate(["a", "b"], tokens(200), progress=True)
        interrupted.result(WAIT_S)
        gate.open()
        assert_idle(llm)
    assert "generating" in terminal.getvalue()
    assert terminal.shows_cursor
    for thread in set(threading.enumerate()) - threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), thread.name
    del caught


def test_chat_options_are_checked_and_need_a_template() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with make_llm() as llm:
        with pytest.raises(InvalidRequestError, match="render the prompt yourself"):
            bounded(lambda: llm.chat(messages, tokens(2)))
        with pytest.raises(InvalidRequestError, match=r"deadline_s must be a number above 0, not -1"):
            llm.chat_async(messages, tokens(2), deadline_s=-1)
        with pytest.raises(InvalidRequestError, match=r"priority must be an integer in .*, not 'x'"):
            llm.chat_async(messages, tokens(2), priority="x")  # type: ignore[arg-type]
        assert_idle(llm)


def test_made_from_a_backend_there_is_nothing_to_save() -> None:
    with make_llm() as llm, pytest.raises(ConfigError, match="cannot be saved: it was not loaded from a model"):
        llm.save("/nowhere")


def test_facts_are_the_backends() -> None:
    with make_llm(num_blocks=30, block_size=8) as llm:
        assert (llm.info.num_blocks, llm.info.block_size, llm.info.vocab_size) == (30, 8, 258)
        assert llm.tokenizer is not None
        assert llm.tokenizer.encode("a") == [97]
        assert llm.health().description == llm.info.description
        assert llm.get_default_sampling_params() == SamplingParams()

"""SamplingParams: ranges, types, and the names that other engines use."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine.errors import InvalidRequestError
from llmengine.sampling_params import MAX_LOGPROBS, SamplingParams

GOOD: list[tuple[str, list[Any]]] = [
    ("max_new_tokens", [1, 10**9, None]),
    ("min_new_tokens", [0, 128]),
    ("max_total_tokens", [1, 10**9, None]),
    ("min_total_tokens", [0, 2**30]),
    ("temperature", [0, 0.0, 1e-6, 0.1, 1, 100]),
    ("top_k", [0, 1, 10**6]),
    ("top_p", [1e-9, 0.5, 1, 1.0]),
    ("min_p", [0, 0.05, 1]),
    ("repetition_penalty", [0.01, 1, 1.3, 100]),
    ("frequency_penalty", [-2, 0, 0.5, 2.0]),
    ("presence_penalty", [-2.0, 0, 2]),
    ("logit_bias", [(), ((3, -100.0), (5, 100.0))]),
    ("bad_words", [(), ("a", "b c"), ((0,), (5, 6, 7)), ("a", (1, 2))]),
    ("seed", [None, 0, 2**63 - 1]),
    ("logprobs", [None, 0, MAX_LOGPROBS]),
    ("ignore_eos", [True, False]),
    ("skip_special_tokens", [True, False]),
    ("stop", [(), ("a",), ["a", "b"]]),
    ("stop_token_ids", [(), (0,), [5, 6]]),
]
BAD: list[tuple[str, list[Any]]] = [
    ("max_new_tokens", [0, -1, 1.0, "5", True]),
    ("min_new_tokens", [-1, 129, 1.5, False]),
    ("max_total_tokens", [0, -1, 1.0, "5", True]),
    ("min_total_tokens", [-1, 2**30 + 1, 1.5, False]),
    ("temperature", [-0.1, 1e-7, 5e-324, 100.1, float("nan"), float("inf"), "1", True]),
    ("top_k", [-1, 1.0, True]),
    ("top_p", [0, 0.0, -0.5, 1.01, float("nan"), "0.5"]),
    ("min_p", [-0.1, 1.1, float("nan"), "0.5", True]),
    ("repetition_penalty", [0, 0.0, -1.0, 100.5, float("inf"), "1", True]),
    ("frequency_penalty", [-2.1, 2.1, float("nan"), "1", True]),
    ("presence_penalty", [-2.1, 2.1, float("nan"), "1", True]),
    (
        "logit_bias",
        [{1: 101}, {1: -100.1}, {1: "x"}, {-1: 1}, {1.5: 1}, {"1": 1}, [(1, 2), (1, 3)], [1], 5, "ab"],
    ),
    ("bad_words", [("",), ((),), [5], [b"ab"], [(1, -1)], [(1.0,)], [("a", 1)], [True], 5, "a" * 16385]),
    ("seed", [-1, 2**63, 1.0, "x", True]),
    ("logprobs", [-1, MAX_LOGPROBS + 1, 1.0, True]),
    ("ignore_eos", [0, 1, "no"]),
    ("skip_special_tokens", [0]),
    ("stop", [("",), (1,), [b"a"], 5, ("a", None), "a" * 16385]),
    ("stop_token_ids", [(-1,), (1.0,), ("a",), True, (True,), 1.5]),
]


def cases(table: list[tuple[str, list[Any]]]) -> list[Any]:
    """Return one parameter set for each name and value."""
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table for value in values]


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_values_in_range(name: str, value: Any) -> None:
    stored = getattr(SamplingParams(**{name: value}), name)
    assert stored == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert caught.value.status == 400


def test_message_names_value_and_range() -> None:
    with pytest.raises(InvalidRequestError, match=r"top_p must be a number in \(0, 1\], not 1.5"):
        SamplingParams(top_p=1.5)
    with pytest.raises(InvalidRequestError, match="top_k must be an integer of at least 0, not -1"):
        SamplingParams(top_k=-1)
    with pytest.raises(
        InvalidRequestError, match=r"min_new_tokens must be an integer in \[0, 1073741824\], not 2147483648"
    ):
        SamplingParams(min_new_tokens=2**31, max_new_tokens=None)
    with pytest.raises(InvalidRequestError, match=r"temperature must be 0 .* or a number in \[1e-06, 100\], not 1e-30"):
        SamplingParams(temperature=1e-30)
    with pytest.raises(InvalidRequestError, match=r"temperature must be a number in \[0, 100\], not 1000"):
        SamplingParams(temperature=10**400)


def test_bias_and_bad_words_are_kept_as_tuples() -> None:
    params = SamplingParams(logit_bias={9: 1, 2: -0.5}, bad_words=["x", [1, 2]])
    assert params.logit_bias == ((2, -0.5), (9, 1.0))
    assert params.bad_words == ("x", (1, 2))
    assert SamplingParams(bad_words="word").bad_words == ("word",)
    assert params == params.replace(logit_bias=params.logit_bias, bad_words=params.bad_words)
    assert hash(params) == hash(SamplingParams(logit_bias=[(2, -0.5), (9, 1)], bad_words=("x", (1, 2))))
    with pytest.raises(InvalidRequestError, match=r"logit_bias\[7\] must be a number in \[-100, 100\], not -101"):
        SamplingParams(logit_bias={7: -101})
    for name, value in (("bad_words", ["a" * 9, "b" * 16376]), ("logit_bias", dict.fromkeys(range(16385), 1))):
        with pytest.raises(InvalidRequestError, match=f"{name} has 16385 .*; the limit is 16384"):
            SamplingParams(**{name: value})


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers(-2, 5) | st.text(max_size=1), inner),
    max_leaves=6,
)


@given(st.sampled_from([field.name for field in dataclasses.fields(SamplingParams)]), ANY_VALUE)
@settings(max_examples=400, deadline=None)
def test_any_value_is_kept_or_refused(name: str, value: Any) -> None:
    with contextlib.suppress(InvalidRequestError):
        params = SamplingParams(**{name: value})
        assert params.replace(**{name: getattr(params, name)}) == params
        assert hash(params.replace()) == hash(params)


def test_single_stop_is_one_stop() -> None:
    assert SamplingParams(stop="abc").stop == ("abc",)  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=7).stop_token_ids == (7,)  # type: ignore[arg-type]


def test_min_above_max_is_refused_unless_there_is_no_max() -> None:
    with pytest.raises(InvalidRequestError, match="min_new_tokens=9 exceeds max_new_tokens=8"):
        SamplingParams(min_new_tokens=9, max_new_tokens=8)
    assert SamplingParams(min_new_tokens=900, max_new_tokens=None).min_new_tokens == 900


def test_typos_raise() -> None:
    with pytest.raises(TypeError, match="max_tokns"):
        SamplingParams(max_tokns=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams().replace(temprature=1.0)


def test_immutable_and_hashable() -> None:
    params = SamplingParams(stop=["a"])  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 5  # type: ignore[misc]
    # TypeError: CPython's frozen slots dataclasses (gh-90562).
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        params.topk = 5  # type: ignore[attr-defined]
    assert hash(params) == hash(SamplingParams(stop=("a",)))


def test_replace_checks_again() -> None:
    params = SamplingParams(temperature=0.5)
    assert params.replace(top_k=3) == SamplingParams(temperature=0.5, top_k=3)
    with pytest.raises(InvalidRequestError, match="top_k"):
        params.replace(top_k=-3)


@pytest.mark.parametrize(
    ("params", "greedy"),
    [
        (SamplingParams(), True),
        (SamplingParams(temperature=0.7), False),
        (SamplingParams(temperature=0.7, top_k=1), True),
        (SamplingParams(temperature=0.7, top_k=2), False),
    ],
)
def test_greedy(params: SamplingParams, greedy: bool) -> None:
    assert params.greedy is greedy


def test_names_of_the_first_sampling_config() -> None:
    config = {
        "end_id": 2,
        "pad_id": 0,
        "max_new_tokens": 20,
        "min_length": 3,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "random_seed": 7,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
    }
    assert SamplingParams.from_sampling_config(config) == SamplingParams(
        stop_token_ids=(2,),
        max_new_tokens=20,
        min_new_tokens=3,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        seed=7,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
    )
    with pytest.raises(InvalidRequestError, match="num_beams"):
        SamplingParams.from_sampling_config({"num_beams": 4})
    with pytest.raises(InvalidRequestError, match="top_p"):
        SamplingParams.from_sampling_config({"top_p": 0.0})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams()),
        ({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}, SamplingParams()),
        ({"do_sample": True}, SamplingParams(temperature=1.0, top_k=50)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
            SamplingParams(temperature=0.6, top_k=20, top_p=0.9),
        ),
        (
            {"do_sample": True, "temperature": None, "top_k": None, "top_p": None},
            SamplingParams(temperature=1.0, top_k=50),
        ),
        (
            {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.1},
            SamplingParams(temperature=1.0, top_k=50, min_p=0.1, repetition_penalty=1.1),
        ),
        ({"min_p": 0.1, "repetition_penalty": 1.1}, SamplingParams(repetition_penalty=1.1)),
        ({"max_new_tokens": 7}, SamplingParams(max_new_tokens=7)),
        ({"max_new_tokens": None}, SamplingParams()),
    ],
)
def test_generation_config(config: dict[str, Any], expected: SamplingParams) -> None:
    assert SamplingParams.from_generation_config(config) == expected

"""SamplingParams: ranges, types, and the names of other engines."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmengine.errors import InvalidRequestError
from llmengine.sampling_params import MAX_LOGPROBS, SamplingParams

GOOD: list[tuple[str, list[Any]]] = [
    ("max_new_tokens", [1, 10**9, None]),
    ("min_new_tokens", [0, 128]),
    ("temperature", [0, 0.0, 0.1, 1, 100]),
    ("top_k", [0, 1, 10**6]),
    ("top_p", [1e-9, 0.5, 1, 1.0]),
    ("seed", [None, 0, 2**63 - 1]),
    ("logprobs", [None, 0, MAX_LOGPROBS]),
    ("ignore_eos", [True, False]),
    ("skip_special_tokens", [True, False]),
    ("stop", [(), ("a",), ["a", "b"]]),
    ("stop_token_ids", [(), (0,), [5, 6]]),
]
BAD: list[tuple[str, list[Any]]] = [
    ("max_new_tokens", [0, -1, 1.0, "5", True]),
    ("min_new_tokens", [-1, 129, 1.5, None, False]),
    ("temperature", [-0.1, 100.1, float("nan"), float("inf"), "1", None, True]),
    ("top_k", [-1, 1.0, None, True]),
    ("top_p", [0, 0.0, -0.5, 1.01, float("nan"), "0.5", None]),
    ("seed", [-1, 2**63, 1.0, "x", True]),
    ("logprobs", [-1, MAX_LOGPROBS + 1, 1.0, True]),
    ("ignore_eos", [0, 1, None, "no"]),
    ("skip_special_tokens", [0, None]),
    ("stop", [("",), (1,), [b"a"], 5, None, ("a", None)]),
    ("stop_token_ids", [(-1,), (1.0,), ("a",), True, (True,), None, 1.5]),
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
    with pytest.raises(InvalidRequestError, match=r"top_p=1.5 is outside \(0, 1\]"):
        SamplingParams(top_p=1.5)
    with pytest.raises(InvalidRequestError, match=r"top_k=-1 is outside \[0, inf\]"):
        SamplingParams(top_k=-1)


def test_single_stop_is_one_stop() -> None:
    assert SamplingParams(stop="abc").stop == ("abc",)  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=7).stop_token_ids == (7,)  # type: ignore[arg-type]


def test_min_above_max_is_refused_unless_there_is_no_max() -> None:
    with pytest.raises(InvalidRequestError, match="min_new_tokens=9 is above max_new_tokens=8"):
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
    }
    assert SamplingParams.from_sampling_config(config) == SamplingParams(
        stop_token_ids=(2,), max_new_tokens=20, min_new_tokens=3, temperature=0.5, top_k=4, top_p=0.9, seed=7
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
        ({"max_new_tokens": 7}, SamplingParams(max_new_tokens=7)),
        ({"max_new_tokens": None}, SamplingParams()),
    ],
)
def test_generation_config(config: dict[str, Any], expected: SamplingParams) -> None:
    assert SamplingParams.from_generation_config(config) == expected

"""SamplingParams: how one request's tokens are chosen and when it ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmengine.errors import InvalidRequestError

MAX_LOGPROBS = 20
"""Most alternatives per token that `SamplingParams.logprobs` may ask for."""

_SEED_NAMES = {
    "end_id": "stop_token_ids",
    "max_new_tokens": "max_new_tokens",
    "min_length": "min_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "random_seed": "seed",
}
"""Names of TensorRT-LLM's first `SamplingConfig`, and where they live here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Immutable; one object may serve any number of requests.

    Raises `InvalidRequestError`, naming the value and the range, when a field is out of range.

    Attributes:
        max_new_tokens: most tokens to generate, >= 1; None: until the context is full.
        min_new_tokens: EOS and stop tokens cannot be chosen, and stop strings do not end the request, before
            this many tokens.
        temperature: 0 is greedy (argmax); else logits are divided by it, in (0, 100].
        top_k: sample among the k likeliest tokens; 0: all.
        top_p: sample among the smallest set of likeliest tokens whose probabilities reach top_p, in (0, 1].
        seed: the same seed, prompt and parameters draw with the same random numbers whatever else is in the
            batch; None: a fresh seed for each request. In [0, 2**63).
        stop: strings that end the request; the text is cut just before the match.
        stop_token_ids: token ids that end the request, beside the model's EOS.
        ignore_eos: do not end at the model's EOS (stop and stop_token_ids still apply).
        logprobs: None: none; k >= 0: for each token its own log-probability and those of the k likeliest, k <= 20.
            They are of the model's distribution, before temperature, top_k and top_p.
        skip_special_tokens: leave special tokens (BOS, EOS, chat markers) out of the text.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = _as_tuple("stop", self.stop, str)
        object.__setattr__(self, "stop", stop)
        ids = _as_tuple("stop_token_ids", self.stop_token_ids, int)
        object.__setattr__(self, "stop_token_ids", ids)
        _check_int("max_new_tokens", self.max_new_tokens, 1, None, optional=True)
        _check_int("min_new_tokens", self.min_new_tokens, 0, None)
        _check_int("top_k", self.top_k, 0, None)
        _check_int("seed", self.seed, 0, 2**63 - 1, optional=True)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_float("temperature", self.temperature, 0.0, 100.0, low_open=False)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequestError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}"
            )
        for text in stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError(f"stop holds {text!r}; each stop must be a non-empty string")
        for token_id in ids:
            _check_int("stop_token_ids", token_id, 0, None)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name}={getattr(self, name)!r} is not a bool")

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is always chosen."""
        return self.temperature == 0.0 or self.top_k == 1

    def replace(self, **changes: Any) -> SamplingParams:
        """Return a copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_sampling_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """Translate the names of TensorRT-LLM's first `SamplingConfig` (`end_id`, `random_seed`, `min_length`, ...).

        `pad_id` has no meaning here and is ignored; any other unknown name raises `InvalidRequestError`.
        """
        fields: dict[str, Any] = {}
        for name, value in config.items():
            if name == "pad_id":
                continue
            if name not in _SEED_NAMES:
                raise InvalidRequestError(f"unknown SamplingConfig name {name!r}; known: {sorted(_SEED_NAMES)}")
            fields[_SEED_NAMES[name]] = value
        return cls(**fields)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """Take a Hugging Face `generation_config.json`: sampling fields count only when `do_sample` is true.

        EOS ids belong to the model, not to these parameters; keys without a meaning here are left out.
        """
        fields: dict[str, Any] = {}
        if config.get("max_new_tokens"):
            fields["max_new_tokens"] = config["max_new_tokens"]
        if config.get("do_sample"):
            temperature = config.get("temperature")
            fields["temperature"] = 1.0 if temperature is None else float(temperature)
            fields["top_k"] = int(50 if config.get("top_k") is None else config["top_k"])
            fields["top_p"] = float(1.0 if config.get("top_p") is None else config["top_p"])
        return cls(**fields)


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(value, kind):
        return (value,)
    if not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name}={value!r} is neither a {kind.__name__} nor several of them")
    return tuple(value)


def _check_int(name: str, value: Any, low: int, high: int | None, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name}={value!r} is not an integer")
    if value < low or (high is not None and value > high):
        raise InvalidRequestError(f"{name}={value} is outside [{low}, {'inf' if high is None else high}]")


def _check_float(name: str, value: Any, low: float, high: float, *, low_open: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name}={value!r} is not a number")
    inside = math.isfinite(value) and value <= high and (value > low if low_open else value >= low)
    if not inside:
        raise InvalidRequestError(f"{name}={value} is outside {'(' if low_open else '['}{low:g}, {high:g}]")

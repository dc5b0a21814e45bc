"""SamplingParams: how one request's tokens are chosen and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmengine.checks import (
    require_bool,
    require_int,
    require_kind,
    require_number,
    require_text,
    requirement,
    set_none_to_default,
)
from llmengine.errors import InvalidRequestError, UnsupportedModelError
from llmengine.generation_config import sampling_fields, unsupported_keys
from llmengine.structured_output import StructuredOutput

MAX_LOGPROBS = 20
"""Largest number of alternatives per token that `SamplingParams.logprobs` may ask for."""

MAX_OUTPUTS = 128
"""Largest number of outputs of one prompt that `SamplingParams.n` or `best_of` may ask for."""

MAX_LISTED_TOKENS = 16384
"""Most tokens in `SamplingParams.logit_bias` or `stop_token_ids`, most characters and token ids in `bad_words`, and
most characters in `stop`. The device reserves memory for that many tokens in every slot."""

MIN_TEMPERATURE = 1e-6
"""Smallest `SamplingParams.temperature` other than 0; logits divided by it stay finite in 32 bits."""

MAX_MIN_NEW_TOKENS = 2**30
"""Largest `SamplingParams.min_new_tokens`; positions are 32-bit integers on the device."""

_SAMPLING_CONFIG_FIELDS = {
    "end_id": "stop_token_ids",
    "max_new_tokens": "max_new_tokens",
    "min_length": "min_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "random_seed": "seed",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
"""Field of TensorRT-LLM's first `SamplingConfig` -> field of `SamplingParams`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Immutable; one object may serve any number of requests.

    Raises `InvalidRequestError`, naming the value and the range, when a field is out of range. None stands for a
    field's default, except for `max_new_tokens`, where it has the meaning below.

    The model's logits pass through, in this order: the allowed tokens of a grammar, logit_bias, repetition_penalty,
    frequency_penalty, presence_penalty, bad_words, min_new_tokens, temperature, top_k, top_p, min_p. The logit of
    a forbidden token does not matter, so this order is equivalent to that of transformers and of vLLM, except that vLLM
    applies min_p before top_k. A request fails if no token is left to choose from.

    Attributes:
        n: number of outputs to generate for the prompt, in [1, 128]; more than one need a temperature above 0.
            `GenerationOutput.outputs` has them. The prompt is computed once. Output i draws with a seed that depends
            only on `seed` and i; the first output uses `seed` itself.
        best_of: number of outputs to generate, in [n, 128], of which the n with the highest `cumulative_logprob` are
            returned, best first; None: n. Above n, outputs cannot be streamed, and `logprobs=None` counts as 0.
        max_new_tokens: most tokens to generate, >= 1; None: until the context is full.
        min_new_tokens: number of tokens, in [0, 2**30], before which end tokens and stop tokens cannot be chosen and
            stop strings do not end the request.
        max_total_tokens: most tokens of prompt and output together, >= 1, as well as `max_new_tokens`; None: no limit.
            A prompt that leaves no room for a token raises `PromptTooLongError`.
        min_total_tokens: like `min_new_tokens`, but for the tokens of prompt and output together.
        temperature: 0 chooses the likeliest token; otherwise logits are divided by it, in [1e-6, 100].
        top_k: sample among the k likeliest tokens; 0: all.
        top_p: sample among the smallest set of likeliest tokens whose probabilities reach top_p, in (0, 1].
        min_p: sample among the tokens that are at least min_p times as likely as the likeliest, in [0, 1]; 0: all.
        repetition_penalty: in [0.01, 100]; for tokens in the prompt or output, positive logits are divided by it and
            others multiplied by it; 1: no penalty.
        frequency_penalty: subtracted from a token's logit for each occurrence in the output, in [-2, 2].
        presence_penalty: subtracted once from the logit of each token in the output, in [-2, 2].
        logit_bias: token id -> number added to its logit, in [-100, 100]; a mapping or pairs, kept as sorted pairs.
        bad_words: strings (which need a tokenizer) and sequences of token ids that must not be generated. The last
            token of a sequence cannot be chosen after the tokens before it. A string stands for its tokens at the start
            of a text and, if they differ, for its tokens after a space.
        seed: in [0, 2**63). The same seed, prompt and parameters draw the same random numbers whatever else is in the
            batch. None: a fresh seed for each request.
        stop: strings that end the request, at most 16,384 characters in all; the text is cut just before the match.
        stop_token_ids: token ids that end the request, in addition to the model's (`LLM.eos_token_ids`).
        ignore_eos: do not end at the model's end tokens (stop and stop_token_ids still apply).
        logprobs: k in [0, 20]: for each token its own log-probability and those of the k likeliest tokens, in the
            model's distribution before these parameters change it. None: no log-probabilities.
        prompt_logprobs: the same for each token of the prompt except the first; not on every backend. Such a prompt is
            computed without reading the prefix cache.
        skip_special_tokens: leave special tokens (BOS, EOS, chat markers) out of the text.
        keep_special_tokens: texts of special tokens that are not left out, such as the markers of tool calls. Texts
            that are not special tokens of the tokenizer have no effect.
        structured: the form that the text must have. Stop tokens can be chosen only where the form may end, and the
            request ends with "stop" where nothing can follow; other limits and stop strings may cut the text off. Needs
            a tokenizer and the package llguidance.
    """

    n: int = 1
    best_of: int | None = None
    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    max_total_tokens: int | None = None
    min_total_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    bad_words: Sequence[str | Sequence[int]] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    keep_special_tokens: tuple[str, ...] = ()
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        set_none_to_default(self, but=("max_new_tokens",))
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop, str, "a string or a sequence of strings"))
        stop_token_ids = _as_tuple("stop_token_ids", self.stop_token_ids, int, "a token id or a sequence of token ids")
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        object.__setattr__(self, "logit_bias", _as_bias(self.logit_bias))
        object.__setattr__(self, "bad_words", _as_bad_words(self.bad_words))
        self._check_counts()
        self._check_distribution()
        self._check_ends()
        if self.structured is not None:
            require_kind("structured", self.structured, StructuredOutput)
        require_bool("skip_special_tokens", self.skip_special_tokens)
        kept = _as_tuple("keep_special_tokens", self.keep_special_tokens, str, "a string or a sequence of strings")
        for index, text in enumerate(kept):
            require_text(f"keep_special_tokens[{index}]", text)
        object.__setattr__(self, "keep_special_tokens", kept)

    def _check_counts(self) -> None:
        require_int("n", self.n, 1, MAX_OUTPUTS)
        _require_optional_int("best_of", self.best_of, self.n, MAX_OUTPUTS)
        _require_optional_int("max_new_tokens", self.max_new_tokens, 1)
        require_int("min_new_tokens", self.min_new_tokens, 0, MAX_MIN_NEW_TOKENS)
        _require_optional_int("max_total_tokens", self.max_total_tokens, 1)
        require_int("min_total_tokens", self.min_total_tokens, 0, MAX_MIN_NEW_TOKENS)
        _require_optional_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _require_optional_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequestError(
                f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}"
            )
        if self.max_total_tokens is not None and self.min_total_tokens > self.max_total_tokens:
            raise InvalidRequestError(
                f"min_total_tokens={self.min_total_tokens} exceeds max_total_tokens={self.max_total_tokens}"
            )

    def _check_distribution(self) -> None:
        require_number("temperature", self.temperature, 0.0, 100.0)
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            allowed = f"0 (the likeliest token) or a number in [{MIN_TEMPERATURE:g}, 100]"
            raise requirement(InvalidRequestError, "temperature", allowed, self.temperature)
        require_int("top_k", self.top_k, 0)
        require_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        require_number("min_p", self.min_p, 0.0, 1.0)
        require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_optional_int("seed", self.seed, 0, 2**63 - 1)
        if self.num_outputs > 1 and self.greedy:
            raise InvalidRequestError(
                f"all {self.num_outputs} outputs of the prompt (n, best_of) would be the same with "
                f"temperature={self.temperature} and top_k={self.top_k}; raise temperature above 0 and leave top_k at 0"
            )

    def _check_ends(self) -> None:
        for index, text in enumerate(self.stop):
            require_text(f"stop[{index}]", text)
        _check_size("stop", sum(map(len, self.stop)), "characters")
        _check_size("stop_token_ids", len(self.stop_token_ids), "tokens")
        for index, token_id in enumerate(self.stop_token_ids):
            require_int(f"stop_token_ids[{index}]", token_id, 0)
        require_bool("ignore_eos", self.ignore_eos)

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always chosen."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def num_outputs(self) -> int:
        """Number of outputs that are generated, of which `n` are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def penalizes(self) -> bool:
        """True if a penalty makes logits depend on earlier tokens."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)

    def for_prompt(self, num_tokens: int) -> SamplingParams:
        """These parameters for a prompt of `num_tokens` tokens, with total limits turned into limits of new tokens."""
        if self.max_total_tokens is None and not self.min_total_tokens:
            return self
        most, least = self.max_new_tokens, max(self.min_new_tokens, self.min_total_tokens - num_tokens)
        if self.max_total_tokens is not None:
            room = self.max_total_tokens - num_tokens
            most = room if most is None else min(most, room)
        return self.replace(
            max_new_tokens=most,
            min_new_tokens=least if most is None else min(least, most),
            max_total_tokens=None,
            min_total_tokens=0,
        )

    @classmethod
    def from_sampling_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """Translate the names of TensorRT-LLM's first `SamplingConfig` (`end_id`, `random_seed`, `min_length`, ...).

        `pad_id` has no meaning here and is ignored, as are `length_penalty` and `early_stopping`, which only beam
        search uses. `num_beams` above 1 (see `LLM.beam_search`) and any unknown name raise `InvalidRequestError`.
        """
        fields: dict[str, Any] = {}
        for name, value in config.items():
            if name == "num_beams" and value != 1:
                raise InvalidRequestError(
                    f"num_beams={value!r} is not a sampling parameter; call LLM.beam_search(prompts, num_beams)"
                )
            if name in ("pad_id", "num_beams", "length_penalty", "early_stopping"):
                continue
            if name not in _SAMPLING_CONFIG_FIELDS:
                known = ", ".join(sorted(_SAMPLING_CONFIG_FIELDS))
                raise InvalidRequestError(f"SamplingConfig field {name!r} is not supported; supported: {known}")
            fields[_SAMPLING_CONFIG_FIELDS[name]] = value
        return cls(**fields)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """Parameters that do what transformers' `generate` does by default with this `generation_config.json`.

        Fields that it leaves open are as in `SamplingParams()`; docs/sampling.md lists the keys.

        EOS ids belong to the model, not to these parameters; keys that change no token (of caches, of speculation) are
        left out. Raises `InvalidRequestError` for a malformed value, `UnsupportedModelError` naming the keys that
        change what is generated and cannot be honoured.
        """
        params = cls(**sampling_fields(config))
        keys = unsupported_keys(config)
        if keys:
            raise UnsupportedModelError(
                f"generation_config asks for {', '.join(keys)}, but this is not supported; pass your own "
                "sampling_params, or remove the keys from the file"
            )
        return params


def _as_tuple(name: str, value: Any, kind: type, what: str) -> tuple[Any, ...]:
    if isinstance(value, kind):
        return (value,)
    if not isinstance(value, Iterable):
        raise requirement(InvalidRequestError, name, what, value)
    return tuple(value)


def _as_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Checked pairs, sorted by token id."""
    pairs = list(value.items() if isinstance(value, Mapping) else value) if isinstance(value, Iterable) else [value]
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise requirement(InvalidRequestError, "logit_bias", "a mapping of token ids to numbers", value)
        require_int("a token id in logit_bias", pair[0], 0)
        require_number(f"logit_bias[{pair[0]}]", pair[1], -100.0, 100.0)
    bias = {token_id: float(amount) for token_id, amount in pairs}
    _check_size("logit_bias", len(pairs), "tokens")
    if len(bias) < len(pairs):
        raise InvalidRequestError(f"logit_bias names a token id twice: {value!r:.200}")
    return tuple(sorted(bias.items()))


def _as_bad_words(value: Any) -> tuple[str | tuple[int, ...], ...]:
    words = _as_tuple("bad_words", value, str, "a string or a sequence of strings and of sequences of token ids")
    for index, word in enumerate(words):
        if isinstance(word, (bytes, bytearray)) or not isinstance(word, Sequence) or not word:
            allowed = "a non-empty string or a non-empty sequence of token ids"
            raise requirement(InvalidRequestError, f"bad_words[{index}]", allowed, word)
        for token_id in () if isinstance(word, str) else word:
            require_int(f"a token id in bad_words[{index}]", token_id, 0)
    _check_size("bad_words", sum(map(len, words)), "characters and token ids")
    return tuple(word if isinstance(word, str) else tuple(word) for word in words)


def _check_size(name: str, size: int, what: str) -> None:
    if size > MAX_LISTED_TOKENS:
        raise InvalidRequestError(f"{name} has {size} {what}; the limit is {MAX_LISTED_TOKENS}")


def _require_optional_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if value is not None:
        require_int(name, value, low, high)

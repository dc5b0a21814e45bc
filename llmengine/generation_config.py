"""A Hugging Face generation_config.json as fields of `SamplingParams`, with the meaning that transformers gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmengine.checks import requirement
from llmengine.errors import InvalidRequestError

FORBIDDING_BIAS = -1000.0
"""A `sequence_bias` of this or less forbids its sequence, since it exceeds any difference between logits."""

LIBRARY_MAX_LENGTH = 20
"""The `max_length` that old versions of transformers wrote into every config.json."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "max_time": (),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
}
"""Unsupported keys that change what transformers generates -> the values that change nothing."""

_NEUTRAL_WHEN_SAMPLING: dict[str, float] = {"typical_p": 1.0, "top_h": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""The same for keys that count only if `do_sample` is true."""

_HINTS = {
    "num_beams": "use LLM.beam_search()",
    "max_time": "use deadline_s of generate_async()",
    "sequence_bias": "logit_bias supports single tokens in [-100, 100]",
}

_HONOURED = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "num_return_sequences",
    "stop_strings",
    "suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
)

Words = tuple[tuple[int, ...], ...]


def unsupported_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys that change what transformers generates but are not supported here, with their values."""
    found = [key for key, neutral in _NEUTRAL.items() if config.get(key) is not None and config[key] not in neutral]
    if config.get("do_sample"):
        found += [
            key
            for key, neutral in _NEUTRAL_WHEN_SAMPLING.items()
            if config.get(key) is not None and config[key] != neutral
        ]
    else:
        found += [key for key in ("num_return_sequences", "penalty_alpha") if config.get(key) not in (None, 0, 1)]
    if any(len(words) > 1 or abs(bias) > 100.0 for words, bias in _biases(config) if bias > FORBIDDING_BIAS):
        found.append("sequence_bias")
    return [f"{key}={config[key]!r:.80}" + (f" ({_HINTS[key]})" if key in _HINTS else "") for key in found]


def forbidden_sequences(config: Mapping[str, Any]) -> Words:
    """Sequences of token ids that the model must not generate: `suppress_tokens` and `bad_words_ids`.

    As in transformers, an EOS token stays allowed even if it is a bad word.
    """
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    suppressed = _token_ids("suppress_tokens", config.get("suppress_tokens") or [])
    words = [_token_ids(f"bad_words_ids[{index}]", word) for index, word in enumerate(_list(config, "bad_words_ids"))]
    if () in words:
        index = words.index(())
        raise requirement(InvalidRequestError, f"bad_words_ids[{index}]", "a non-empty list of token ids", [])
    return (
        *((token_id,) for token_id in suppressed if token_id >= 0),
        *(word for word in words if len(word) > 1 or word[0] not in ends),
    )


def sampling_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams` that do what transformers' `generate` does by default with this configuration.

    Raises `InvalidRequestError` naming key and value for a value of the wrong type.
    """
    fields = {**_lengths(config), **_sampling(config)} if config.get("do_sample") else _lengths(config)
    if config.get("repetition_penalty") is not None:
        fields["repetition_penalty"] = config["repetition_penalty"]
    stop = config.get("stop_strings")
    if stop:
        fields["stop"] = (stop,) if isinstance(stop, str) else stop
    biases = _biases(config)
    banned = [words for words, bias in biases if bias <= FORBIDDING_BIAS]
    if banned or config.get("suppress_tokens") or config.get("bad_words_ids"):
        fields["bad_words"] = tuple(dict.fromkeys((*forbidden_sequences(config), *banned)))
    weights = {words[0]: bias for words, bias in biases if len(words) == 1 and abs(bias) <= 100.0}
    if weights:
        fields["logit_bias"] = weights
    return fields


def generation_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an old config.json that transformers uses if there is no generation_config.json."""
    names = (*_HONOURED, *_NEUTRAL, *_NEUTRAL_WHEN_SAMPLING)
    found = {name: config[name] for name in names if config.get(name) is not None}
    if found.get("max_length") == LIBRARY_MAX_LENGTH:
        del found["max_length"]
    return found


def _lengths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Length limits: `max_new_tokens` or else `max_length`, and `min_new_tokens` or else `min_length`."""
    fields: dict[str, Any] = {}
    most, most_total = _integer(config, "max_new_tokens"), _integer(config, "max_length")
    if most is not None:
        fields["max_new_tokens"] = most
    elif most_total is not None:
        fields |= {"max_new_tokens": None, "max_total_tokens": most_total}
    least, least_total = _integer(config, "min_new_tokens"), _integer(config, "min_length")
    if least is not None:
        fields["min_new_tokens"] = least if most is None else min(least, most)
    elif least_total is not None:
        cap = fields.get("max_total_tokens")
        fields["min_total_tokens"] = least_total if cap is None else min(least_total, cap)
    return fields


def _sampling(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, default in (("temperature", 1.0), ("top_k", 50), ("top_p", 1.0), ("min_p", 0.0)):
        value = _integer(config, name) if name == "top_k" else config.get(name)
        fields[name] = default if value is None else value
    if fields["top_k"] == -1:  # what other engines write for "all"
        fields["top_k"] = 0
    if fields["top_p"] == 0:  # keeps one token
        fields |= {"top_p": 1.0, "top_k": 1}
    count = _integer(config, "num_return_sequences")
    return fields if count is None else {**fields, "n": count}


def _biases(config: Mapping[str, Any]) -> list[tuple[tuple[int, ...], float]]:
    """`sequence_bias`, a list of [token ids, number], as (token ids, number)."""
    biases: dict[tuple[int, ...], float] = {}
    for index, pair in enumerate(_list(config, "sequence_bias")):
        malformed = requirement(InvalidRequestError, f"sequence_bias[{index}]", "[token ids, number]", pair)
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise malformed
        words, bias = _token_ids(f"sequence_bias[{index}][0]", pair[0]), pair[1]
        if not words or isinstance(bias, bool) or not isinstance(bias, (int, float)) or bias != bias:
            raise malformed
        biases[words] = bias
    return list(biases.items())


def _list(config: Mapping[str, Any], key: str) -> list[Any]:
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise requirement(InvalidRequestError, key, "a list", value)
    return value


def _token_ids(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise requirement(InvalidRequestError, key, "a list of token ids", value)
    return tuple(value)


def _integer(config: Mapping[str, Any], key: str) -> Any:
    """The value, as an int if it is a whole float; its type is checked where it is used."""
    value = config.get(key)
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""Every key of a generation_config.json does what it does in transformers, or is refused by its name."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine import LLM, ModelConfig, SamplingParams
from llmengine.checkpoints.opening import open_model
from llmengine.errors import CorruptFileError, InvalidRequestError, PromptTooLongError, UnsupportedModelError

PROMPT = [5, 9, 3, 7, 5, 9]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def plain(directory: Path) -> list[int]:
    return expected(directory, {"max_new_tokens": 8})


def configure(directory: Path, config: dict[str, Any]) -> None:
    (directory / "generation_config.json").write_text(json.dumps(config))


def expected(directory: Path, config: dict[str, Any] | None, prompt: list[int] = PROMPT) -> list[int]:
    """Return what transformers generates from the directory with this generation_config.json."""
    from transformers import AutoModelForCausalLM

    if config is not None:
        configure(directory, config)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # limits contradict each other
        output: list[int] = model.generate(torch.tensor([prompt]), pad_token_id=0)[0, len(prompt) :].tolist()
    return output


def load(directory: Path) -> LLM:
    return LLM(ModelConfig(directory, dtype="float32", num_threads=1), enable_tokenizer=False)


def generated(directory: Path, params: SamplingParams | None = None, prompt: list[int] = PROMPT) -> list[int]:
    with load(directory) as llm:
        return llm.generate(prompt, params)[0].token_ids


def configs(plain: list[int]) -> Iterator[dict[str, Any]]:
    most = {"max_new_tokens": 8}
    end = {**most, "eos_token_id": plain[2]}
    yield {**most, "suppress_tokens": plain[1:3]}
    yield {**most, "suppress_tokens": [plain[0], 500, -1]}
    yield {**most, "suppress_tokens": []}
    yield {**most, "bad_words_ids": [[plain[2]]]}
    yield {**most, "bad_words_ids": [plain[:2], plain[3:6]]}
    yield {**end, "bad_words_ids": [[plain[2]], plain[:2]]}
    yield {**end, "bad_words_ids": [[plain[2]]]}
    yield {**end, "suppress_tokens": [plain[2]]}
    for name, value in (("min_new_tokens", 5), ("min_length", 11), ("min_length", 6), ("min_length", 3)):
        yield {**end, name: value}
    yield {**end, "min_new_tokens": 20}
    yield {**end, "min_length": 40}
    yield {**end, "min_new_tokens": 1, "min_length": 12}
    yield {**end, "eos_token_id": [plain[2], plain[4]], "min_new_tokens": 4}
    yield {"max_length": 9}
    yield {"max_length": 20}
    yield {"max_length": 7, **most}
    yield {"max_length": 12, "min_length": 30, "eos_token_id": plain[2]}
    yield {**most, "sequence_bias": [[[4], 100.0]]}
    yield {**most, "sequence_bias": [[[plain[0]], -3.5], [[plain[1]], -1e9], [[7], 1.0]]}
    yield {**most, "sequence_bias": [[plain[:2], -1e9], [plain[1:4], float("-inf")]]}
    yield {**most, "sequence_bias": [[[plain[0]], -20.0]], "repetition_penalty": 1.7, "suppress_tokens": [plain[1]]}
    yield {**most, "repetition_penalty": 3.0}
    yield {**most, "renormalize_logits": True, "num_beams": 1, "typical_p": 0.3, "top_k": 5, "temperature": 0.2}
    yield {**most, "no_repeat_ngram_size": 0, "forced_bos_token_id": None, "encoder_repetition_penalty": 1.0}
    yield {**most, "length_penalty": 2.0, "early_stopping": True, "guidance_scale": 1.0, "epsilon_cutoff": 0.5}
    yield {**most, "begin_suppress_tokens": [], "num_return_sequences": 1, "cache_implementation": "static"}
    yield {**most, "do_sample": True, "top_k": 1}
    yield {**most, "do_sample": True, "top_p": 0.0, "top_k": None}
    yield {**most, "do_sample": True, "top_k": 0, "min_p": 1.0, "typical_p": 1.0, "eta_cutoff": 0.0}


@pytest.mark.parametrize("index", range(32))
def test_tokens_are_those_of_transformers(directory: Path, plain: list[int], index: int) -> None:
    config = list(configs(plain))[index]
    wanted = expected(directory, config)
    assert generated(directory) == wanted, config


def test_every_config_is_tried(plain: list[int]) -> None:
    assert len(list(configs(plain))) == 32


UNSUPPORTED: list[tuple[str, Any]] = [
    ("num_beams", 4),
    ("no_repeat_ngram_size", 2),
    ("encoder_no_repeat_ngram_size", 2),
    ("encoder_repetition_penalty", 1.5),
    ("guidance_scale", 2.0),
    ("begin_suppress_tokens", [52]),
    ("forced_bos_token_id", 7),
    ("forced_eos_token_id", [7]),
    ("exponential_decay_length_penalty", [2, 1.5]),
    ("watermarking_config", {"bias": 2.0}),
    ("sequence_bias", [[[4, 5], 2.0]]),
    ("sequence_bias", [[[4], 101.0]]),
    ("num_return_sequences", 2),
    ("penalty_alpha", 0.6),
    ("token_healing", True),
    ("max_time", 1.0),
    ("dola_layers", "low"),
]


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED)
def test_keys_that_cannot_be_honoured_are_named(
    directory: Path, key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    configure(directory, {"max_new_tokens": 5, key: value})
    with caplog.at_level(logging.WARNING, "llmengine"), load(directory) as llm:
        assert f"generation_config asks for {key}=" in caplog.text
        for call in (lambda: llm.generate(PROMPT), lambda: llm.generate_async(PROMPT), llm.get_default_sampling_params):
            with pytest.raises(UnsupportedModelError, match=rf"asks for {key}=.*pass your own sampling_params"):
                call()  # type: ignore[no-untyped-call]
        assert len(llm.generate(PROMPT, SamplingParams(max_new_tokens=3))[0].token_ids) == 3


@pytest.mark.parametrize("key", ["typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"])
def test_cut_offs_of_sampling_count_with_do_sample(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"asks for {key}=0.5"):
        SamplingParams.from_generation_config({"do_sample": True, key: 0.5})
    assert SamplingParams.from_generation_config({"do_sample": False, key: 0.5}) == SamplingParams()


MALFORMED: list[tuple[str, Any]] = [
    ("suppress_tokens", 52),
    ("suppress_tokens", ["a"]),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [3]),
    ("bad_words_ids", {"a": 1}),
    ("sequence_bias", {"(4,)": 1.0}),
    ("sequence_bias", [[4, 1.0]]),
    ("sequence_bias", [[[4], "x"]]),
    ("min_length", -1),
    ("min_new_tokens", "5"),
    ("max_new_tokens", 0),
    ("max_length", 0),
    ("stop_strings", [""]),
    ("stop_strings", 5),
]


@pytest.mark.parametrize(("key", "value"), MALFORMED)
def test_malformed_values_name_the_file(directory: Path, key: str, value: Any) -> None:
    configure(directory, {key: value})
    with pytest.raises(CorruptFileError, match=r"generation_config\.json: "):
        open_model(directory)


def test_numbers_may_be_written_as_floats(directory: Path) -> None:
    config = {"do_sample": True, "top_k": 20.0, "max_new_tokens": 7.0, "min_new_tokens": 2.0, "num_return_sequences": 3}
    wanted = SamplingParams(temperature=1.0, top_k=20, max_new_tokens=7, min_new_tokens=2, n=3)
    assert SamplingParams.from_generation_config(config) == wanted
    assert SamplingParams.from_generation_config({"do_sample": True, "top_k": -1}).top_k == 0
    assert SamplingParams.from_generation_config({"stop_strings": "ab"}).stop == ("ab",)
    assert SamplingParams.from_generation_config({"stop_strings": ["a", "b"]}).stop == ("a", "b")


def test_a_config_json_counts_where_there_is_no_generation_config(directory: Path, plain: list[int]) -> None:
    path = directory / "config.json"
    original = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(original), "suppress_tokens": [plain[1]]}))
        (directory / "generation_config.json").unlink(missing_ok=True)
        assert generated(directory)[:20] == expected(directory, None)
        assert generated(directory)[:8] != plain
        configure(directory, {"max_new_tokens": 8})
        assert generated(directory) == plain == expected(directory, None)
        path.write_text(json.dumps({**json.loads(original), "max_length": 20, "temperature": 1.0, "num_beams": 1}))
        (directory / "generation_config.json").unlink()
        assert len(generated(directory)) > 20 - len(PROMPT)
    finally:
        path.write_text(original)


def test_tokens_of_the_model_stay_forbidden_with_parameters_of_ones_own(directory: Path, plain: list[int]) -> None:
    configure(directory, {"suppress_tokens": plain[1:2], "bad_words_ids": [[plain[0]]], "min_length": 20})
    with load(directory) as llm:
        free = llm.generate(PROMPT, SamplingParams(max_new_tokens=20))[0].token_ids
        assert not {plain[0], plain[1]} & set(free)
        more = llm.generate(PROMPT, SamplingParams(max_new_tokens=20, bad_words=[free[:1]]))[0].token_ids
        assert not {plain[0], plain[1], free[0]} & set(more)
        both = llm.generate(PROMPT, SamplingParams(max_new_tokens=20, temperature=2.0, n=2, seed=3))[0]
        assert not any({plain[0], plain[1]} & set(output.token_ids) for output in both.outputs)
        defaults = llm.get_default_sampling_params()
        assert (defaults.bad_words, defaults.min_total_tokens) == (((plain[1],), (plain[0],)), 20)


def test_beam_search_finds_what_transformers_finds(directory: Path, plain: list[int]) -> None:
    from transformers import AutoModelForCausalLM

    configure(directory, {"suppress_tokens": plain[1:2], "bad_words_ids": [[plain[0]], plain[2:4]]})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    wanted = model.generate(
        torch.tensor([PROMPT]), num_beams=3, num_return_sequences=3, max_new_tokens=6, pad_token_id=0
    )[:, len(PROMPT) :].tolist()
    with load(directory) as llm:
        found = llm.beam_search(PROMPT, num_beams=3, max_new_tokens=6)[0]
        assert [output.token_ids for output in found.outputs] == wanted
        with pytest.raises(
            InvalidRequestError,
            match=r"num_beams must be in \[1, 1\d\] with .* 3 tokens that the model must not generate, not ",
        ):
            llm.beam_search(PROMPT, num_beams=18)


def test_limits_of_prompt_and_output_together(directory: Path, plain: list[int]) -> None:
    configure(directory, {"max_length": 4})
    with load(directory) as llm:
        with pytest.raises(PromptTooLongError, match=r"6 tokens.*limit is 4 \(max_total_tokens"):
            llm.generate(PROMPT)
        assert len(llm.generate(PROMPT[:2])[0].token_ids) == 2
        assert llm.generate(PROMPT, SamplingParams(max_total_tokens=10))[0].token_ids == plain[:4]
        assert llm.generate(PROMPT, SamplingParams(max_total_tokens=10, max_new_tokens=3))[0].token_ids == plain[:3]
        stopping = SamplingParams(max_new_tokens=8, stop_token_ids=(plain[2],), min_total_tokens=9)
        assert llm.generate(PROMPT, stopping)[0].token_ids[:2] == plain[:2]
        assert len(llm.generate(PROMPT, stopping)[0].token_ids) > 3
        assert len(llm.generate(PROMPT, stopping.replace(min_total_tokens=8))[0].token_ids) == 3

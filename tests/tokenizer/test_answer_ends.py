"""Every id that a model's files mark as an end, and every token known to be one, ends an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import tests.engine.helpers as engine_helpers
from llmengine import (
    LLM,
    ConfigError,
    CorruptFileError,
    ModelConfig,
    SamplingParams,
    StructuredOutput,
)
from llmengine.checkpoints.opening import open_model
from llmengine.structured.grammar import GrammarCompiler
from llmengine.testing import FakeBackend
from llmengine.tokenizer.loading import load_tokenizer
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.backends.helpers import save_tiny
from tests.tokenizer.tiny_gguf import CONTROL, NORMAL, USER_DEFINED, byte_level_tokens, write_tiny_gguf

BYTES = [*byte_level_tokens(), "ab"]
FIRST = len(BYTES)


def gguf_model(path: Path, special: Sequence[str], named: dict[str, Any], kind: int = CONTROL, **options: Any) -> Path:
    """Write a byte-level model with `special` behind the bytes; `named` ids count from the first of them."""

    def moved(value: Any) -> Any:
        return [FIRST + item for item in value] if isinstance(value, list) else FIRST + value

    types = [NORMAL] * FIRST + [kind] * len(special)
    metadata = {"model": "gpt2", "pre": "gpt-2", "merges": ["a b"], **{key: moved(named[key]) for key in named}}
    return write_tiny_gguf(path, [*BYTES, *special], types, metadata, **options)


def ends_of(path: Path) -> set[int]:
    return {token_id - FIRST for token_id in open_model(path).eos_token_ids}


def run(llm: LLM, token_id: int, **settings: Any) -> Any:
    """Generate with a model that always wants `token_id`."""
    params = SamplingParams(**{"max_new_tokens": 4, "logit_bias": {token_id: 100.0}, **settings})
    return llm.generate([1, 2], params)[0]


NAMED = {"eos_token_id": 0, "eot_token_id": 1, "eom_token_id": 2, "fim_pad_token_id": 3}


@pytest.mark.parametrize(
    ("named", "ends"),
    [
        (NAMED, {0, 1, 2, 3}),
        ({"eos_token_id": 1, "fim_rep_token_id": 2, "fim_sep_token_id": 4}, {1, 2, 4}),
        ({"eos_token_id": 1, "eos_token_ids": [1, 3]}, {1, 3}),
        ({"eog_token_ids": [2, 4]}, {2, 4}),
        ({"eos_token_id": 0, "padding_token_id": 4, "bos_token_id": 3}, {0}),
        ({"eos_token_id": -1 - FIRST, "eom_token_id": 2**32 - 1 - FIRST}, set()),
    ],
)
def test_gguf_metadata_names_ends(tmp_path: Path, named: dict[str, Any], ends: set[int]) -> None:
    assert ends_of(gguf_model(tmp_path / "a.gguf", [f"<x{index}>" for index in range(5)], named)) == ends


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
@pytest.mark.parametrize(
    ("special", "ends"),
    [
        (["<s>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], {1, 2, 3}),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {0, 2}),
        (["<|assistant|>", "<|end|>", "<|endoftext|>"], {1, 2}),
        (["<pad>", "<eos>", "<start_of_turn>", "<end_of_turn>"], {1, 3}),
        (["<|return|>", "<|call|>", "<|end|>", "<|message|>"], {0, 1}),
        (["<|flush|>", "<|calls|>", "<|end|>"], {0, 1}),
        (["<|return|>", "<|end|>"], {0, 1}),
        (["<turn|>", "<|tool_response>", "</s>"], {0, 1}),
        (["[EOT]", "[EOS]", "<EOT>", "_<EOT>", "<end_of_utterance>"], {0, 1, 2, 3, 4}),
        (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"], {0, 1, 2}),
    ],
)
def test_llama_cpps_ends_are_found_by_their_text(tmp_path: Path, special: list[str], ends: set[int], kind: int) -> None:
    assert ends_of(gguf_model(tmp_path / "a.gguf", special, {}, kind)) == ends


def test_a_closing_tag_that_is_ordinary_text_is_no_end(tmp_path: Path) -> None:
    assert ends_of(gguf_model(tmp_path / "a.gguf", ["</s>"], {}, USER_DEFINED)) == set()
    assert ends_of(gguf_model(tmp_path / "b.gguf", ["</s>"], {}, CONTROL)) == {0}


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_a_prompt_holds_the_end_that_its_text_names(tmp_path: Path, kind: int) -> None:
    path = gguf_model(tmp_path / "a.gguf", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {}, kind)
    tokenizer = load_tokenizer(path, "gguf")
    assert tokenizer.encode("a<|im_end|>") == [BYTES.index("a"), FIRST + 2]
    assert {FIRST, FIRST + 2} <= tokenizer.special_ids


def test_what_ends_a_gguf_models_answer(tmp_path: Path) -> None:
    path = gguf_model(tmp_path / "a.gguf", ["<|end_of_text|>", "<|eot_id|>", "<x>"], {"eos_token_id": 0})
    with LLM(ModelConfig(path, num_threads=1)) as llm:
        eos, eot, other = FIRST, FIRST + 1, FIRST + 2
        assert llm.eos_token_ids == {eos, eot}
        for token_id in (eos, eot):
            output = run(llm, token_id)
            assert (output.finish_reason, output.text, output.matched_stop) == ("stop", "", token_id)
            assert output.token_ids == [token_id]
            assert run(llm, token_id, ignore_eos=True).finish_reason == "length"
            assert run(llm, token_id, ignore_eos=True, stop_token_ids=[token_id]).matched_stop == token_id
            late = run(llm, token_id, min_new_tokens=3, skip_special_tokens=False)
            assert not llm.eos_token_ids & set(late.token_ids[:3])
        assert run(llm, other).finish_reason == "length"
        assert run(llm, other, stop_token_ids=[other]).matched_stop == other


@pytest.mark.parametrize("key", ["eos_token_id", "eot_token_id", "eom_token_id", "fim_pad_token_id", "eos_token_ids"])
def test_gguf_end_outside_the_vocabulary(tmp_path: Path, key: str) -> None:
    path = gguf_model(tmp_path / "a.gguf", ["<x>"], {key: [5, 6] if key.endswith("ids") else 5})
    with pytest.raises(CorruptFileError, match=rf"a\.gguf.*{key}.*{FIRST + 5}.*\[0, {FIRST + 1}\)"):
        LLM(ModelConfig(path, num_threads=1))


def test_gguf_padding_outside_the_vocabulary_is_harmless(tmp_path: Path) -> None:
    path = gguf_model(tmp_path / "a.gguf", ["<x>"], {"eos_token_id": 0, "padding_token_id": 9})
    with LLM(ModelConfig(path, num_threads=1)) as llm:
        assert llm.eos_token_ids == {FIRST}


SPECIAL = ("<s>", "</s>", "<|im_end|>", "<|endoftext|>")


def hf_model(directory: Path, *, vocab_size: int = 311, special: Sequence[str] = SPECIAL, **config: Any) -> Path:
    """Save a tiny model with a byte-level tokenizer, whose `special` tokens come behind 256 bytes."""
    save_tiny(directory, vocab_size=vocab_size)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None, **config}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(byte_level_tokens())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.save(str(directory / "tokenizer.json"))
    return directory


def write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def loaded_ends(directory: Path, **options: Any) -> frozenset[int]:
    with LLM(ModelConfig(directory, num_threads=1), **options) as llm:
        return llm.eos_token_ids


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 7}, None, {7}),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, {7, 8, 9}),
        ({"eos_token_id": [7, 8]}, {"temperature": 0.5}, {7, 8}),
        ({"text_config": {"eos_token_id": [5, 6]}}, {"eos_token_id": 7}, {5, 6, 7}),
        ({"eos_token_id": -1}, None, set()),
        ({"eos_token_id": [-1, 3]}, {"eos_token_id": []}, {3}),
        ({"eos_token_id": None, "text_config": None}, {"eos_token_id": None}, set()),
        ({"eos_token_id": 4, "pad_token_id": 999}, {"eos_token_id": 4, "pad_token_id": -1}, {4}),
    ],
)
def test_configurations_name_ends(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, ends: set[int]
) -> None:
    directory = hf_model(tmp_path, **config)
    if generation is not None:
        write_json(directory / "generation_config.json", **generation)
    assert loaded_ends(directory, enable_tokenizer=False) == ends


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"config.json": 311}, r"config\.json: eos_token_id contains 311"),
        ({"config.json": [32000, 32001]}, r"config\.json: eos_token_id contains 32000"),
        ({"config.json": 5, "generation_config.json": 400}, r"generation_config\.json: eos_token_id contains 400"),
    ],
)
def test_a_configured_end_outside_the_vocabulary(tmp_path: Path, files: dict[str, Any], name: str) -> None:
    directory = hf_model(tmp_path, eos_token_id=files["config.json"])
    if "generation_config.json" in files:
        write_json(directory / "generation_config.json", eos_token_id=files["generation_config.json"])
    with pytest.raises(CorruptFileError, match=rf"{name}, which is outside the model's vocabulary \[0, 311\)"):
        LLM(ModelConfig(directory, num_threads=1))


def test_an_end_outside_the_vocabulary_beside_a_sound_one_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = hf_model(tmp_path, special=(), eos_token_id=[5, 32000])
    write_json(directory / "generation_config.json", eos_token_id=[400, 7])
    assert loaded_ends(directory) == {5, 7}
    messages = [record.getMessage() for record in caplog.records]
    assert any("generation_config.json: eos_token_id contains 400" in message for message in messages)
    assert any("config.json: eos_token_id contains 32000" in message for message in messages)
    path = gguf_model(tmp_path / "a.gguf", ["<x>"], {"eos_token_ids": [0, 5]})
    with LLM(ModelConfig(path, num_threads=1)) as llm:
        assert llm.eos_token_ids == {FIRST}


def test_the_tokenizers_ends(tmp_path: Path) -> None:
    directory = hf_model(tmp_path, eos_token_id=7)
    assert loaded_ends(directory) == {7, 257, 258, 259}  # all three are known by their text
    assert loaded_ends(directory, tokenizer=load_tokenizer(directory, "huggingface")) == {7, 257, 258, 259}
    assert loaded_ends(directory, tokenizer=Tokenizer.from_file(str(directory / "tokenizer.json"))) == {
        *(7, 257, 258, 259)
    }
    assert loaded_ends(directory, tokenizer=ByteTokenizer()) == {7}


def test_names_that_only_the_tokenizer_knows(tmp_path: Path) -> None:
    directory = hf_model(tmp_path, special=("<a>", "<b>", "<c>"))
    assert loaded_ends(directory) == set()
    write_json(directory / "tokenizer_config.json", eos_token="<b>")
    assert loaded_ends(directory) == {257}
    write_json(directory / "special_tokens_map.json", eos_token={"content": "<c>"})
    assert loaded_ends(directory) == {257, 258}
    (directory / "tokenizer_config.json").unlink()
    assert loaded_ends(directory) == {258}


def test_an_added_token_that_is_not_special_ends_a_turn_as_well(tmp_path: Path) -> None:
    directory = hf_model(tmp_path, special=())
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<|im_end|>", normalized=False), AddedToken("</s>", normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert loaded_ends(directory) == {256, 257}  # </s> is the EOS of Llama's tokenizers
    write_json(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert loaded_ends(directory) == {256}


def test_the_tokenizers_eos_outside_the_vocabulary(tmp_path: Path) -> None:
    directory = hf_model(tmp_path, vocab_size=258, special=("<s>", "<a>", "<b>"))
    assert loaded_ends(directory) == set()  # more tokens than rows are allowed
    write_json(directory / "tokenizer_config.json", eos_token="<b>")
    with pytest.raises(CorruptFileError, match=r"eos_token '<b>' has id 258, which is outside .*\[0, 258\)"):
        LLM(ModelConfig(directory, num_threads=1))
    with pytest.raises(ConfigError, match=r"token id 258 .*\[0, 258\)"):
        LLM(ModelConfig(directory, num_threads=1), tokenizer=load_tokenizer(directory, "huggingface"))


def test_known_tokens_without_a_row_are_no_ends(tmp_path: Path) -> None:
    assert loaded_ends(hf_model(tmp_path, vocab_size=259)) == {257, 258}


class EndingTokenizer(ByteTokenizer):
    """A caller's own tokenizer that says which ids end an answer."""

    def __init__(self, *ends: int) -> None:
        self.end_token_ids = frozenset(ends)


class OnlyEos:
    """A caller's own tokenizer that has only `eos_token_id`."""

    eos_token_id = ord("z")
    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("tokenizer", "given", "ends"),
    [
        (ByteTokenizer(), [], set()),
        (ByteTokenizer(), [257], {257}),
        (EndingTokenizer(3, 4), [], {3, 4}),
        (EndingTokenizer(3, 4), [5], {3, 4, 5}),
        (OnlyEos(), [], {ord("z")}),
        (None, [9], {9}),
    ],
)
def test_ends_of_a_callers_backend(tokenizer: Any, given: list[int], ends: set[int]) -> None:
    with engine_helpers.make_llm(tokenizer=tokenizer, eos_token_ids=given) as llm:
        assert llm.eos_token_ids == ends


@pytest.mark.parametrize(
    ("tokenizer", "given", "message"),
    [
        (EndingTokenizer(300), [], r"token id 300 .*\[0, 258\)"),
        (ByteTokenizer(), [258], r"eos_token_ids holds token id 258, outside the vocabulary \[0, 258\)"),
        (None, [-2], r"eos_token_ids holds token id -2"),
    ],
)
def test_a_callers_end_outside_the_vocabulary(tokenizer: Any, given: list[int], message: str) -> None:
    made: list[engine_helpers.RecordingBackend] = []

    def make() -> FakeBackend:
        made.append(engine_helpers.RecordingBackend())
        return made[-1]

    with pytest.raises(ConfigError, match=message):
        LLM.from_backend(make, tokenizer=tokenizer, eos_token_ids=given)
    assert made[0].closed_by


def test_structured_output_beside_an_end_outside_the_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    directory = hf_model(tmp_path, eos_token_id=[257, 32000])
    with LLM(ModelConfig(directory, num_threads=1), tokenizer=ByteTokenizer()) as llm:
        params = SamplingParams(max_new_tokens=8, structured=StructuredOutput(choice=["a", "b"]))
        assert llm.generate("hi", params)[0].text in ("a", "b")


def letters_then(*ends: int) -> Callable[[Sequence[int]], int]:
    """Return a model that writes "aaa" and then the ends in turn, one for each prompt token."""

    def next_token(ids: Sequence[int]) -> int:
        return ord("a") if ids[-1] != ord("a") or ids[-3:] != [ord("a")] * 3 else ends[ids[0] % len(ends)]

    return next_token


def test_every_end_ends_each_output_and_shows_nowhere() -> None:
    with engine_helpers.make_llm(tokenizer=EndingTokenizer(5, 6), next_token=letters_then(5, 6, 257)) as llm:
        for first, (reason, text, matched) in enumerate(
            [("stop", "aaa", 5), ("stop", "aaa", 6), ("length", "aaa", None)]
        ):
            params = SamplingParams(max_new_tokens=4, n=2, temperature=1.0)
            for output in llm.generate([[first, 1]], params)[0].outputs:
                assert (output.finish_reason, output.text, output.matched_stop) == (reason, text, matched)


def test_beams_end_at_every_end() -> None:
    for end in (5, 6):
        with engine_helpers.make_llm(tokenizer=EndingTokenizer(5, 6), next_token=letters_then(end)) as llm:
            best = llm.beam_search([[1, 2]], 2, max_new_tokens=8)[0].outputs[0]
            assert (best.text, best.finish_reason, best.token_ids[-1]) == ("aaa", "stop", end)


def allowed(mask: bytes) -> set[int]:
    return {token_id for token_id in range(8 * len(mask)) if mask[token_id // 8] >> token_id % 8 & 1}


def test_a_grammar_allows_each_end_where_the_text_may_end_and_nowhere_else() -> None:
    ends = {257, 5, ord("b")}
    grammar = GrammarCompiler(ByteTokenizer(), 258, ends).compile(StructuredOutput(regex="a[ab]+"), ends)
    assert allowed(grammar.mask) == {ord("a")}
    grammar.advance([ord("a")])
    assert allowed(grammar.mask) == {ord("a")}  # "b" ends an answer, so it is not text
    grammar.advance([ord("a")])
    assert allowed(grammar.mask) == {ord("a"), *ends}


def test_structured_output_ends_at_each_end() -> None:
    for end in (5, 6):
        with engine_helpers.make_llm(tokenizer=EndingTokenizer(5, 6), next_token=letters_then(end)) as llm:
            params = SamplingParams(structured=StructuredOutput(regex="a+"), max_new_tokens=8)
            output = llm.generate([[1, 2]], params)[0]
            assert (output.text, output.finish_reason, output.matched_stop) == ("aaa", "stop", end)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, frozenset[int]]]:
    place = tmp_path_factory.mktemp("engines")
    sources = {
        "gguf": gguf_model(
            place / "a.gguf",
            ["<|end_of_text|>", "<|eot_id|>", "<x>", "<|fim_pad|>"],
            {"eos_token_id": 0, "eom_token_id": 2},
        ),
        "hf": hf_model(place / "hf", eos_token_id=7, special=("<a>", "<b>", "<|eot_id|>")),
    }
    write_json(sources["hf"] / "tokenizer_config.json", eos_token="<b>")
    write_json(sources["hf"] / "special_tokens_map.json", eos_token="<a>")
    found = {}
    for name, path in sources.items():
        with LLM(ModelConfig(path, num_threads=1)) as llm:
            llm.save(place / f"{name}-engine")
            found[name] = (place / f"{name}-engine", llm.eos_token_ids)
    return found


@pytest.mark.parametrize("name", ["gguf", "hf"])
def test_saved_engines_keep_the_ends(engines: dict[str, tuple[Path, frozenset[int]]], name: str) -> None:
    directory, ends = engines[name]
    assert ends == ({FIRST, FIRST + 1, FIRST + 2, FIRST + 3} if name == "gguf" else {7, 256, 257, 258})
    assert loaded_ends(directory) == ends
    assert loaded_ends(directory, enable_tokenizer=False) == ends

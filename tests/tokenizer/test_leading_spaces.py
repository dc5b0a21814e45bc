"""One rule for leading spaces of SentencePiece's tokens, in generate, streams, beams, structured output, logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llmengine import LLM, GenerationOutput, SamplingParams, StructuredOutput
from llmengine.tokenizer.detokenizer import IncrementalDetokenizer, TokenTexts
from llmengine.tokenizer.loading import LoadedTokenizer, tokenizer_from_gguf
from tests.engine.helpers import in_loop, make_llm

SPACE = "\u2581"
WORDS = [f"{SPACE}It", f"{SPACE}is", f"{SPACE}yes", "yes", f"{SPACE}a", f"{SPACE}b", f"{SPACE}{SPACE}"]
PIECES = sorted({word[:size] for word in WORDS for size in range(1, len(word) + 1)} | set("aebIntsy.,"), key=len)
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
BOS, EOS, END = 1, 2, 4
METASPACE = ("first", "always", "never")


def gguf_tokenizer(with_bytes: bool = True, **changes: Any) -> LoadedTokenizer:
    """Return a tokenizer as GGUF files of Llama 2 and Mistral describe them."""
    named = [f"<0x{value:02X}>" for value in range(256)] if with_bytes else []
    tokens = [*SPECIAL, *named, *PIECES]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, 3, 3] + [6] * len(named) + [1] * len(PIECES),
        "scores": [float(len(token)) if token in PIECES and len(token) > 1 else -1e4 for token in tokens],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "unknown_token_id": 0,
        **changes,
    }
    return tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, "x.gguf")


def json_tokenizer(scheme: str | None) -> LoadedTokenizer:
    """Return a tokenizer as tokenizer.json files describe them: with Metaspace, or, for None, the steps before it."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *PIECES])}
    merges = [(word[:size], word[size]) for word in WORDS for size in range(1, len(word)) if word[size] in vocab]
    merges = [pair for pair in dict.fromkeys(merges) if "".join(pair) in vocab]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    if scheme is None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return LoadedTokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def byte_level_tokenizer() -> LoadedTokenizer:
    """Return a tokenizer whose tokens keep their spaces."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *names])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return LoadedTokenizer(backend, {"eos_token": "</s>"})


TOKENIZERS: dict[str, LoadedTokenizer] = {
    "gguf": gguf_tokenizer(),
    "gguf without bytes": gguf_tokenizer(with_bytes=False),
    "gguf without prefix": gguf_tokenizer(add_space_prefix=False),
    **{f"metaspace {scheme}": json_tokenizer(scheme) for scheme in METASPACE},
    "strip": json_tokenizer(None),
    "byte-level": byte_level_tokenizer(),
}
DROPPING = [name for name in TOKENIZERS if name not in ("gguf without prefix", "metaspace never", "byte-level")]


def piece_id(name: str, piece: str) -> int:
    """Return the id of a piece in `TOKENIZERS[name]`; names of bytes are behind the special tokens."""
    if piece.startswith("<0x"):
        return len(SPECIAL) + int(piece[3:5], 16)
    if name == "byte-level":
        return len(SPECIAL) + sorted(pre_tokenizers.ByteLevel.alphabet()).index(piece)
    first = len(SPECIAL) + (256 if name in ("gguf", "gguf without prefix") else 0)
    return first + PIECES.index(piece)


def llm_writing(tokenizer: LoadedTokenizer, num_prompt: int, generated: Sequence[int]) -> LLM:
    """Return an LLM that generates these ids, then EOS, after a prompt of the given length."""

    def next_token(context: Sequence[int]) -> int:
        return next(islice(generated, max(0, len(context) - num_prompt), None), EOS)

    return make_llm(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, next_token=next_token)


def texts_of(tokenizer: LoadedTokenizer, prompt: list[int], generated: list[int], **params: Any) -> set[str]:
    """Return the texts of every way of asking, which must all be equal."""
    settings = SamplingParams(max_new_tokens=len(generated) + 1, logprobs=2, **params)

    async def read(llm: LLM) -> list[GenerationOutput]:
        return [output async for output in llm.generate_async(prompt, settings, streaming=True)]

    with llm_writing(tokenizer, len(prompt), generated) as llm:
        whole = llm.generate(prompt, settings)[0]
        several = llm.generate(prompt, settings.replace(n=2, temperature=1.0))[0].outputs
        deltas: list[GenerationOutput] = in_loop(lambda: read(llm))
        texts = {whole.text, *(output.text for output in several), "".join(delta.text_delta for delta in deltas)}
        if not params:
            texts.add(llm.beam_search(prompt, 1, max_new_tokens=len(generated) + 1)[0].text)
    chosen = zip(whole.token_ids, whole.decoded_logprobs or (), strict=True)
    named = [entries[token_id].decoded_token or "" for token_id, entries in chosen]
    texts.add("".join(text for token_id, text in zip(whole.token_ids, named, strict=True) if token_id > END))
    return texts


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["It is", "", "It is[/INST]", "[INST] It[/INST]yes", " "])
def test_every_way_of_asking_gives_the_same_text(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt_ids = [BOS, *tokenizer.encode(prompt, add_special_tokens=False)]
    for text in (" a b", "a", "  yes", "yes is", "[INST] a", ". It"):
        generated = [token_id for token_id in tokenizer.encode(text, add_special_tokens=False) if token_id]
        assert len(texts_of(tokenizer, prompt_ids, generated)) == 1


_words = st.lists(st.sampled_from(["a", " a", "  ", "yes", " is", "[/INST]", "</s>", "It", "."]), max_size=8)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=_words, generated=_words)
def test_prompt_and_text_read_as_the_tokens_do(name: str, prompt: list[str], generated: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    prompt_ids = [BOS, *(item for word in prompt for item in tokenizer.encode(word, add_special_tokens=False))]
    ids = [item for word in generated for item in tokenizer.encode(word, add_special_tokens=False)]
    begun = max(index for index, token_id in enumerate(prompt_ids) if token_id in tokenizer.special_ids) + 1
    shown = [token_id for token_id in ids if token_id not in tokenizer.special_ids]
    head, whole = tokenizer.decode(prompt_ids[begun:]), tokenizer.decode([*prompt_ids[begun:], *shown])
    texts = TokenTexts(tokenizer)
    assert head + texts.text(prompt_ids, ids) == whole

    read = texts.reader(prompt_ids, ids, structured=False)
    positions = range(len(prompt_ids), len(prompt_ids) + len(ids))
    pieces = [read(position, token_id) for position, token_id in zip(positions, ids, strict=True)]
    assert "".join(piece for piece, item in zip(pieces, ids, strict=True) if item in shown) == whole[len(head) :]
    prompt_pieces = [read(position, prompt_ids[position]) for position in range(begun, len(prompt_ids))]
    assert "".join(prompt_pieces) == head

    everything = IncrementalDetokenizer(texts, prompt_ids, frozenset())
    with_special = "".join(map(everything.push, ids)) + everything.finish()
    assert with_special == "".join(pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=_words, generated=_words)
def test_structured_text_is_the_tokens_bytes(name: str, prompt: list[str], generated: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    prompt_ids = [item for word in prompt for item in tokenizer.encode(word, add_special_tokens=False)]
    ids = [item for word in generated for item in tokenizer.encode(word, add_special_tokens=False) if item > END]
    texts = TokenTexts(tokenizer)
    detokenizer = IncrementalDetokenizer(texts, prompt_ids, tokenizer.special_ids, structured=True)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    assert text == "".join(texts.read(token_id, begins=False) for token_id in ids)
    read = texts.reader(prompt_ids, ids, structured=True)
    assert text == "".join(read(len(prompt_ids) + place, item) for place, item in enumerate(ids))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", [[BOS], [BOS, END], "It is", "[INST] It[/INST]"])
@pytest.mark.parametrize(
    ("form", "pieces", "text"),
    [
        ({"choice": [" a", " b"]}, [f"{SPACE}b"], " b"),
        ({"choice": ["a", " a"]}, ["a"], "a"),
        ({"choice": ["a", " a"]}, [SPACE, "a"], " a"),
        ({"regex": "  a"}, [f"{SPACE}{SPACE}", "a"], "  a"),
        ({"regex": " ?yes"}, [f"{SPACE}yes"], " yes"),
    ],
)
def test_the_form_is_what_the_caller_gets(
    name: str, prompt: Any, form: dict[str, Any], pieces: list[str], text: str
) -> None:
    tokenizer = TOKENIZERS[name]
    generated = [piece_id(name, part) for piece in pieces for part in _parts(name, piece)]
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    assert texts_of(tokenizer, prompt_ids, generated, structured=StructuredOutput(**form)) == {text}


def _parts(name: str, piece: str) -> list[str]:
    return list(piece.replace(SPACE, "\u0120")) if name == "byte-level" else [piece]


@pytest.mark.parametrize("name", DROPPING)
def test_examples(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    a, b, space = (piece_id(name, piece) for piece in (f"{SPACE}a", f"{SPACE}b", SPACE))
    it = piece_id(name, f"{SPACE}It")
    for prompt, generated, text in [
        ([BOS], [a, b], "a b"),  # as `decode` reads it
        ([BOS, it], [a, b], " a b"),
        ([BOS, it, END], [a, b], "a b"),  # a chat's answer
        ([BOS, it, END, space], [a], " a"),
        ([BOS], [space, a], " a"),
        ([BOS, it], [END, a], " a"),
        ([BOS], [END, a], "a"),
        ([it], [a], " a"),
    ]:
        for skip in (True, False):
            detokenizer = IncrementalDetokenizer(tokenizer, prompt, tokenizer.special_ids if skip else frozenset())
            found = "".join(map(detokenizer.push, generated)) + detokenizer.finish()
            assert found.replace("[/INST]", "") == text, (prompt, generated, skip)


def test_each_alternative_is_read_in_its_place() -> None:
    name = "gguf"
    tokenizer = TOKENIZERS[name]
    a, b, it = (piece_id(name, f"{SPACE}{word}") for word in ("a", "b", "It"))
    with llm_writing(tokenizer, 3, [a, b]) as llm:
        for prompt, first in (([BOS, it, END], "a"), ([BOS, END, it], " a")):
            params = SamplingParams(max_new_tokens=2, logprobs=20, prompt_logprobs=1)
            output = llm.generate(prompt, params)[0]
            assert output.decoded_logprobs is not None
            assert output.decoded_prompt_logprobs is not None
            assert next(entry.decoded_token for entry in output.decoded_logprobs[0].values()) == first
            assert output.decoded_logprobs[1][b].decoded_token == " b"
            for entries, begins in zip(output.decoded_logprobs, (first == "a", False), strict=True):
                for token_id, entry in entries.items():
                    assert entry.decoded_token == TokenTexts(tokenizer).read(token_id, begins)
            read = {
                entries[item].decoded_token
                for entries, item in zip(output.decoded_prompt_logprobs, prompt, strict=True)
                if entries and item == it
            }
            assert read == {"It"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_without_a_token_are_no_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    padding, words = tokenizer.vocab_size + 3, tokenizer.encode(" a", add_special_tokens=False)
    for prompt in ([BOS], [BOS, END], tokenizer.encode("It"), [0]):
        for structured in (False, True):
            texts = TokenTexts(tokenizer)
            found = set()
            for before, ids in (([], words), ([padding], words), ([], [padding, *words]), ([padding], [0, *words])):
                behind = [*prompt, *before]
                detokenizer = IncrementalDetokenizer(texts, behind, tokenizer.special_ids, structured=structured)
                read = texts.reader(behind, ids, structured)
                pieces = [read(len(behind) + place, item) for place, item in enumerate(ids) if item]
                found |= {"".join(map(detokenizer.push, ids)) + detokenizer.finish(), "".join(pieces)}
            assert len(found) == 1, (prompt, structured)


def test_an_unfinished_character_in_the_prompt_takes_no_space_away() -> None:
    half, a = piece_id("gguf", "<0xE4>"), piece_id("gguf", f"{SPACE}a")
    assert TokenTexts(TOKENIZERS["gguf"]).text([BOS, half], [a]) == " a"

"""Tokenizers from GGUF metadata, built with the tokenizers library alone.

transformers has a converter too. It takes 8 s for a vocabulary of 49k where this takes 0.2 s, needs `AutoTokenizer`
(3 s to import), and splits text as GPT-2 does for a pre-tokenizer that it does not know: with SmolLM2, spaces and line
ends before a digit then get other ids. The patterns are those of llama.cpp's vocabulary loader, which defines what
`tokenizer.ggml.pre` means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmengine.errors import CorruptFileError, UnsupportedModelError

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+SUFFIX|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*SUFFIX"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _BY_CASE.replace("SUFFIX", "").replace("DIGITS", r"\p{N}")
_GPT4O = _BY_CASE.replace("SUFFIX", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", r"\p{N}{1,3}")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
}
"""`tokenizer.ggml.pre` -> patterns; each splits the pieces that the one before it left."""

_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
"""Words that are in the vocabulary are taken without merging, and BOS is added unless the file says otherwise."""


_KEEPING_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""Phi-3's special tokens behind which spaces and line ends are kept; behind the others they are no part of the text."""


_NO_TOKEN = (-1, (1 << 32) - 1)
"""What stands for no token in some files: -1, and the same as 32 bits without a sign."""


class _TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


def build_backend(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Return the `tokenizers.Tokenizer` that GGUF `metadata` describes; `source` is the file's name for messages.

    Byte-level BPE (`tokenizer.ggml.model` "gpt2") and SentencePiece BPE ("llama") are supported. Control tokens
    become special tokens, user-defined ones are matched whole in the text; BOS and EOS are added as the file says.
    Raises `UnsupportedModelError` for another model or an unknown pre-tokenizer, `CorruptFileError` for fields that
    are missing or contradict each other.
    """
    kind = metadata.get(_PREFIX + "model")
    tokens = _strings(metadata, "tokens", source)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CorruptFileError(f"{source}: {len(tokens) - len(vocab)} entries of tokenizer.ggml.tokens occur twice")
    if kind == "gpt2":
        backend = _byte_level(metadata, vocab, source)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens, vocab, source)
    else:
        raise UnsupportedModelError(f"{source}: tokenizer.ggml.model={kind!r} is none of 'gpt2', 'llama'")
    _add_tokens(backend, metadata, tokens, source)
    _add_post_processor(backend, metadata, source)
    return backend


def token_ids(metadata: Mapping[str, Any], source: str) -> dict[str, int]:
    """Return the ids of the special tokens that the file names: "bos", "eos", "eot", "eom", "unknown", "padding"."""
    num_tokens = len(_strings(metadata, "tokens", source))
    found = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = metadata.get(f"{_PREFIX}{name}_token_id")
        if value is None or value in _NO_TOKEN:
            continue
        if not isinstance(value, int) or not 0 <= value < num_tokens:
            if name == "padding":
                continue  # it is in no text
            raise CorruptFileError(f"{source}: {_PREFIX}{name}_token_id={value!r} is outside [0, {num_tokens})")
        found[name] = value
    return found


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int], source: str) -> Tokenizer:
    pre = metadata.get(_PREFIX + "pre")
    if pre not in _SPLITS:
        raise UnsupportedModelError(
            f"{source}: tokenizer.ggml.pre={pre!r} is not a known pre-tokenizer; known: {', '.join(sorted(_SPLITS))}"
        )
    merges = []
    for merge in _strings(metadata, "merges", source):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CorruptFileError(f"{source}: tokenizer.ggml.merges holds {merge!r}, whose parts are not all tokens")
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], vocab: dict[str, int], source: str) -> Tokenizer:
    scores = metadata.get(_PREFIX + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CorruptFileError(f"{source}: tokenizer.ggml.scores has not one score for each of {len(tokens)} tokens")
    unknown = token_ids(metadata, source).get("unknown")
    types = _token_types(metadata, tokens, source)
    merges = [pair for _, pair in sorted(_score_merges(tokens, vocab, scores, types), key=lambda item: item[0])]
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback="<0x00>" in vocab,
        )
    )
    add_space = metadata.get(_PREFIX + "add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if add_space else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_space else steps)
    return backend


def _score_merges(
    tokens: Sequence[str], vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> Iterator[tuple[tuple[float, int, int], tuple[str, str]]]:
    """Yield every way to join two tokens into a third, with its rank: SentencePiece joins the highest score first."""
    for token_id, token in enumerate(tokens):
        if types[token_id] != _TokenType.NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                yield (-scores[token_id], token_id, cut), (left, right)


def _add_tokens(backend: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> None:
    types = _token_types(metadata, tokens, source)
    # Phi-3's tokenizer.json says so. The format cannot; llama.cpp knows it by the model, too.
    drops_space = metadata.get("general.architecture") == "phi3" and metadata.get(_PREFIX + "model") == "llama"
    special, plain = [], []
    for token, token_type in zip(tokens, types, strict=True):
        if not token:
            continue
        rstrip = drops_space and token not in _KEEPING_SPACE
        if token_type in (_TokenType.CONTROL, _TokenType.UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True, rstrip=rstrip))
        elif token_type == _TokenType.USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False, rstrip=rstrip))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _add_post_processor(backend: Tokenizer, metadata: Mapping[str, Any], source: str) -> None:
    is_spm = metadata.get(_PREFIX + "model") == "llama"
    bos_default = is_spm or metadata.get(_PREFIX + "pre") in _WHOLE_WORDS
    ids = token_ids(metadata, source)
    tokens = metadata[_PREFIX + "tokens"]
    pattern = ["$A"]
    special = []
    if metadata.get(_PREFIX + "add_bos_token", bos_default) and "bos" in ids:
        special.append((tokens[ids["bos"]], ids["bos"]))
        pattern.insert(0, tokens[ids["bos"]])
    if metadata.get(_PREFIX + "add_eos_token", False) and "eos" in ids:
        special.append((tokens[ids["eos"]], ids["eos"]))
        pattern.append(tokens[ids["eos"]])
    if special:
        backend.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=special)


def _token_types(metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> Sequence[int]:
    types = metadata.get(_PREFIX + "token_type")
    if types is None:
        return [_TokenType.NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CorruptFileError(f"{source}: tokenizer.ggml.token_type has not one type for each of {len(tokens)} tokens")
    return types


def _strings(metadata: Mapping[str, Any], name: str, source: str) -> list[str]:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise CorruptFileError(f"{source}: tokenizer.ggml.{name} is missing or no list of strings")
    return value

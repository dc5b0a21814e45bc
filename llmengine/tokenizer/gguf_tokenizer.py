"""Tokenizers from GGUF metadata, built with the tokenizers and sentencepiece libraries alone.

transformers has a converter too. It takes 8 s for a vocabulary of 49k (this one takes 0.2 s), needs `AutoTokenizer` (3
s to import), and splits text like GPT-2 if it does not know the pre-tokenizer, which gives SmolLM2 other ids for
spaces and line ends before a digit. The patterns and the defaults are those of llama.cpp's vocabulary loader, which
defines what `tokenizer.ggml.pre` means.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.tokenizer.end_tokens import gguf_known_end_ids
from llmengine.tokenizer.sentencepiece_model import ModelType, Piece, PieceType, SentencePieceModel
from llmengine.tokenizer.sentencepiece_tokenizer import SentencePieceCodec

logger = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."

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

_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = _QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat"), (_GPT2,)),
    **dict.fromkeys(("a.x-4.0", "mellum", "exaone4"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("minerva-7b", "mellum2"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), (_LLAMA3,)),
    **dict.fromkeys(("lfm2", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo"), (_QWEN2,)),
    **dict.fromkeys(("solar-open", "grok-2", "f2llmv2"), (_QWEN2,)),
    "qwen35": (_QWEN35,),
    "minicpm5": (r"\p{N}{1,3}", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")),
    "seed-coder": (_SEED,),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), (_BAILING,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), (_GPT4O,)),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "falcon": _FALCON,
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (_BLOOM,)),
    "viking": (_BLOOM, r"\p{N}"),
}
"""`tokenizer.ggml.pre` -> patterns; each splits the pieces that the one before it left."""

_PRE_TOKENIZERS_WITH_BOS = frozenset(
    {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
)
"""Pre-tokenizers for which BOS is added unless the file says otherwise."""

_PRE_TOKENIZERS_WITH_WHOLE_WORDS = _PRE_TOKENIZERS_WITH_BOS | {"minicpm5"}
"""Pre-tokenizers for which a word in the vocabulary becomes one token without merging."""

_SPACE_KEEPING_TOKENS = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""Phi-3's special tokens after which spaces and line ends are kept; after the others they are dropped."""


_NO_TOKEN = (-1, (1 << 32) - 1)
"""Values that mean "no token" in some files: -1, and -1 as an unsigned 32-bit integer."""

_SPECIAL_IDS = {"gpt2": {}, "llama": {"bos": 1, "eos": 2, "unknown": 0}, "t5": {"eos": 1, "unknown": 2, "padding": 0}}
"""`tokenizer.ggml.model` -> ids of special tokens that the file does not set."""

_BYTE = re.compile("<0x[0-9A-F]{2}>")


def build_backend(metadata: Mapping[str, Any], source: str) -> Tokenizer | SentencePieceCodec:
    """An encoder built from GGUF `metadata`; `source` is the file's name for messages.

    It is a `tokenizers.Tokenizer` for byte-level BPE (`tokenizer.ggml.model` "gpt2"), and a `SentencePieceCodec` for
    SentencePiece's BPE ("llama") and unigram models ("t5"). Control tokens become special tokens, user-defined ones are
    matched whole in the text, and BOS and EOS are added as the file says.

    Raises `UnsupportedModelError` for another model, an unknown pre-tokenizer or a flag that cannot be obeyed,
    `CorruptFileError` for fields that are missing or contradict each other.
    """
    kind = metadata.get(_PREFIX + "model")
    if kind not in _SPECIAL_IDS:
        raise UnsupportedModelError(
            f"{source}: tokenizer.ggml.model={kind!r} is not supported; supported: {', '.join(_SPECIAL_IDS)}"
        )
    tokens = _string_list(metadata, "tokens", source)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CorruptFileError(f"{source}: tokenizer.ggml.tokens repeats {len(tokens) - len(vocab)} of its entries")
    if _checked_flag(metadata, "add_sep_token", False, source):
        raise UnsupportedModelError(f"{source}: tokenizer.ggml.add_sep_token=true is not supported")
    if kind != "gpt2":
        return _sentencepiece_codec(metadata, tokens, source)
    if _checked_flag(metadata, "add_space_prefix", False, source):
        raise UnsupportedModelError(
            f"{source}: tokenizer.ggml.add_space_prefix=true is not supported with model 'gpt2'"
        )
    backend = _byte_level_tokenizer(metadata, vocab, source)
    added = _added_tokens(metadata, tokens, source)
    for is_special, add in ((True, backend.add_special_tokens), (False, backend.add_tokens)):
        add([token for token in added.values() if token.special == is_special])
    begin, end = _end_token_ids(metadata, source)
    if begin or end:
        backend.post_processor = processors.TemplateProcessing(
            single=[*(tokens[token_id] for token_id in begin), "$A", *(tokens[token_id] for token_id in end)],
            special_tokens=[(tokens[token_id], token_id) for token_id in dict.fromkeys([*begin, *end])],
        )
    return backend


def token_ids(metadata: Mapping[str, Any], source: str) -> dict[str, int]:
    """Ids of the special tokens that the file names: "bos", "eos", "eot", "eom", "unknown", "padding"."""
    num_tokens = len(_string_list(metadata, "tokens", source))
    defaults = _SPECIAL_IDS.get(str(metadata.get(_PREFIX + "model")), {})
    found = {name: token_id for name, token_id in defaults.items() if token_id < num_tokens}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = metadata.get(f"{_PREFIX}{name}_token_id")
        if value is None or value in _NO_TOKEN:
            continue
        if not isinstance(value, int) or not 0 <= value < num_tokens:
            if name == "padding":
                continue  # padding never occurs in a text
            raise CorruptFileError(
                f"{source}: {_PREFIX}{name}_token_id must be an integer in [0, {num_tokens}), not {value!r}"
            )
        found[name] = value
    return found


def _byte_level_tokenizer(metadata: Mapping[str, Any], vocab: dict[str, int], source: str) -> Tokenizer:
    pre = metadata.get(_PREFIX + "pre")
    if pre is None:
        logger.warning(
            "%s: tokenizer.ggml.pre is missing, so text is split by llama.cpp's default rules, which may differ from "
            "those that the model was trained with; convert the model again, or pass LLM(tokenizer=...)",
            source,
        )
        pre = "default"
    if pre not in _SPLITS:
        raise UnsupportedModelError(
            f"{source}: tokenizer.ggml.pre={pre!r} is not supported; supported: {', '.join(sorted(_SPLITS))}"
        )
    merges = []
    for merge in _string_list(metadata, "merges", source):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CorruptFileError(
                f"{source}: tokenizer.ggml.merges has {merge!r}, but not all of its tokens are in tokenizer.ggml.tokens"
            )
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _PRE_TOKENIZERS_WITH_WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_codec(metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> SentencePieceCodec:
    is_bpe = metadata[_PREFIX + "model"] == "llama"
    scores = metadata.get(_PREFIX + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CorruptFileError(
            f"{source}: tokenizer.ggml.scores must be a list of {len(tokens)} numbers, one for each token"
        )
    charsmap = _charsmap(metadata, source)
    removes_spaces = _checked_flag(metadata, "remove_extra_whitespaces", False, source)
    if is_bpe and (charsmap or removes_spaces):
        name = "precompiled_charsmap" if charsmap else "remove_extra_whitespaces=true"
        raise UnsupportedModelError(f"{source}: tokenizer.ggml.{name} is not supported with model 'llama'")
    ids = token_ids(metadata, source)
    types = _piece_types(metadata, tokens, ids, source)
    num_bytes = types.count(PieceType.BYTE)
    if num_bytes not in (0, 256):
        raise CorruptFileError(f"{source}: only {num_bytes} of the 256 bytes have a token")
    pieces = (
        Piece(token or f"[EMPTY_{token_id}]", float(scores[token_id]), types[token_id])
        for token_id, token in enumerate(tokens)
    )
    adds_space = _checked_flag(metadata, "add_space_prefix", is_bpe, source)
    model = SentencePieceModel(
        pieces=tuple(pieces),
        model_type=ModelType.BPE if is_bpe else ModelType.UNIGRAM,
        special_ids={short: ids[name] for short, name in _SHORT_NAMES.items() if name in ids},
        add_dummy_prefix=adds_space,
        remove_extra_whitespaces=removes_spaces,
        byte_fallback=num_bytes == 256,
        charsmap=charsmap,
    )
    added = _added_tokens(metadata, tokens, source)
    unknown = ids.get("unknown")
    if unknown is not None:
        added.setdefault(unknown, AddedToken(tokens[unknown], normalized=False, special=True))
    return SentencePieceCodec(
        model, added, "always" if adds_space else "never", source, *_end_token_ids(metadata, source)
    )


_SHORT_NAMES = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}


def _piece_types(
    metadata: Mapping[str, Any], tokens: Sequence[str], ids: Mapping[str, int], source: str
) -> list[PieceType]:
    """Type of each piece.

    Tokens that are matched before SentencePiece sees the text become control pieces, which it never produces.
    """
    types = []
    for token, token_type in zip(tokens, _token_types(metadata, tokens, source), strict=True):
        if token_type in (PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN):
            types.append(PieceType.CONTROL)
        elif not token or token_type == PieceType.UNUSED:
            types.append(PieceType.UNUSED)
        else:
            types.append(PieceType.BYTE if _BYTE.fullmatch(token) else PieceType.NORMAL)
    if "unknown" in ids:
        types[ids["unknown"]] = PieceType.UNKNOWN
    return types


def _added_tokens(metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> dict[int, AddedToken]:
    """Tokens that are matched in the text before it is split, by id."""
    # Phi-3's tokenizer.json says so, but GGUF cannot express it; llama.cpp also decides by the model.
    drops_space = metadata.get("general.architecture") == "phi3" and metadata.get(_PREFIX + "model") == "llama"
    added = {}
    for token_id, token_type in enumerate(_token_types(metadata, tokens, source)):
        token = tokens[token_id]
        if token and token_type in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED):
            added[token_id] = AddedToken(
                token,
                normalized=False,
                special=token_type != PieceType.USER_DEFINED,
                rstrip=drops_space and token not in _SPACE_KEEPING_TOKENS,
            )
    return added


def _end_token_ids(metadata: Mapping[str, Any], source: str) -> tuple[list[int], list[int]]:
    """Ids that are added before and after a text."""
    kind, ids = metadata.get(_PREFIX + "model"), token_ids(metadata, source)
    defaults = {
        "bos": kind == "llama" or metadata.get(_PREFIX + "pre") in _PRE_TOKENIZERS_WITH_BOS,
        "eos": kind == "t5",
    }
    found = []
    for name, default in defaults.items():
        key = f"add_{name}_token"
        is_added = _checked_flag(metadata, key, default, source)
        if is_added and name not in ids and metadata.get(_PREFIX + key) is not None:
            raise CorruptFileError(f"{source}: {_PREFIX}{key} is true, but {_PREFIX}{name}_token_id is missing")
        found.append([ids[name]] if is_added and name in ids else [])
    return found[0], found[1]


def _checked_flag(metadata: Mapping[str, Any], name: str, default: bool, source: str) -> bool:
    value = metadata.get(_PREFIX + name)
    if value is not None and not isinstance(value, bool):
        raise CorruptFileError(f"{source}: {_PREFIX}{name} must be true or false, not {value!r}")
    return default if value is None else value


def _charsmap(metadata: Mapping[str, Any], source: str) -> bytes:
    value = metadata.get(_PREFIX + "precompiled_charsmap")
    try:
        return b"" if value is None else bytes(octet & 255 for octet in value)
    except TypeError:
        raise CorruptFileError(f"{source}: {_PREFIX}precompiled_charsmap must be an array of bytes") from None


def _token_types(metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> Sequence[int]:
    """Types of the tokens; as in llama.cpp, tokens known to end an answer are always control tokens."""
    types = metadata.get(_PREFIX + "token_type")
    if types is not None and (not isinstance(types, list) or len(types) != len(tokens)):
        raise CorruptFileError(
            f"{source}: tokenizer.ggml.token_type must be a list of {len(tokens)} integers, one for each token"
        )
    found = [PieceType.NORMAL] * len(tokens) if types is None else list(types)
    for token_id in gguf_known_end_ids(tokens, types):
        found[token_id] = PieceType.CONTROL
    return found


def _string_list(metadata: Mapping[str, Any], name: str, source: str) -> list[str]:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise CorruptFileError(f"{source}: tokenizer.ggml.{name} must be a non-empty list of strings")
    return value

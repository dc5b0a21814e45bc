"""SentencePiece models: the flags in their files, and ids by the sentencepiece library itself.

The library defines what a model's ids are: normalization tables, the order of merges among equal scores, pieces that
are unused, words and characters as pieces. Conversions to other tokenizers lose one or the other. What it does not
know is what transformers adds around it: tokens that are matched in the text before SentencePiece sees it, and a space
that is put before each stretch between them or only before the first. `SentencePieceCodec` does that part.

The file format is sentencepiece_model.proto in protobuf's wire format. Its flags are read here, since the library does
not tell them, and models are written in it for GGUF files, which hold the same things as lists.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models

from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.tokenizer_config import TokenizerConfig

Prefix = Literal["always", "first", "never"]
"""Where a space is put before the text: before each stretch between added tokens, before the text, or nowhere."""

SPACE = "\u2581"

_FIRST_BYTE = 0x0A
"""Of every model: its first field is a piece. Files of other tokenizers are also called tokenizer.model."""

_PIECE, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _REMOVES_SPACES, _ESCAPES = 2, 3, 4, 5
_SPECIAL_IDS = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
"""Name -> field of the trainer's specification, and its default."""

_VARINT, _LENGTH = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}


_CLASSES = frozenset(
    {"", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer", "PreTrainedTokenizerFast"}
    | {"TokenizersBackend", "SentencePieceBackend", "MistralTokenizer", "InternLM2Tokenizer", "YiTokenizer"}
)
"""Classes that only encode with the model and add tokens, BOS and EOS around."""


class ModelType(IntEnum):
    """How a model segments text."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class PieceType(IntEnum):
    """What a piece is; GGUF's `token_type` has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of a model; its id is its place in the list."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A SentencePiece model.

    Attributes:
        pieces: by id.
        model_type: see `ModelType`.
        special_ids: "unk", "bos", "eos", "pad" -> id, of those that the model has.
        add_dummy_prefix: a space is put before the text, or behind it with `treat_whitespace_as_suffix`.
        remove_extra_whitespaces: leading and trailing spaces are dropped, and runs of them become one.
        escape_whitespaces: spaces are U+2581 in pieces.
        treat_whitespace_as_suffix: a word's space stands behind it.
        byte_fallback: characters without a piece become the pieces of their bytes.
        charsmap: the compiled normalization table, empty for none.
    """

    pieces: tuple[Piece, ...] = field(repr=False)
    model_type: int = ModelType.UNIGRAM
    special_ids: Mapping[str, int] = field(default_factory=dict)
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    treat_whitespace_as_suffix: bool = False
    byte_fallback: bool = False
    charsmap: bytes = field(default=b"", repr=False)

    def serialized(self) -> bytes:
        """The model as a tokenizer.model."""
        pieces = (
            _field(_PIECE, _field(1, piece.text.encode()) + _field(2, piece.score) + _field(3, int(piece.type)))
            for piece in self.pieces
        )
        trainer = [_field(_MODEL_TYPE, self.model_type), _field(_SUFFIX, int(self.treat_whitespace_as_suffix))]
        trainer.append(_field(_BYTE_FALLBACK, int(self.byte_fallback)))
        for name, (number, _) in _SPECIAL_IDS.items():
            token_id = self.special_ids.get(name, -1)
            trainer.append(_field(number, token_id % 2**64))
            if token_id >= 0:
                trainer.append(_field(number + 5, self.pieces[token_id].text.encode()))
        flags = (self.add_dummy_prefix, self.remove_extra_whitespaces, self.escape_whitespaces)
        normalizer = [_field(1, b"user_defined" if self.charsmap else b"identity"), _field(_CHARSMAP, self.charsmap)]
        normalizer += [_field(number, int(flag)) for number, flag in enumerate(flags, _DUMMY_PREFIX)]
        return b"".join((*pieces, _field(_TRAINER, b"".join(trainer)), _field(_NORMALIZER, b"".join(normalizer))))


def read_sentencepiece(data: bytes, source: str) -> SentencePieceModel | None:
    """Return the model that a tokenizer.model holds; None for a file of another tokenizer.

    Raises `CorruptFileError` naming `source` for data that is damaged, `UnsupportedModelError` for a model that
    changes text after decoding.
    """
    if not data or data[0] != _FIRST_BYTE:
        return None
    pieces: list[Piece] = []
    parts: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}, _DENORMALIZER: {}}
    try:
        for number, value in _fields(data):
            if number == _PIECE:
                pieces.append(_piece(value))
            elif number in parts:
                parts[number] |= dict(_fields(value))
        trainer, normalizer = parts[_TRAINER], parts[_NORMALIZER]
        named = {name: _signed(trainer.get(number, default)) for name, (number, default) in _SPECIAL_IDS.items()}
        charsmap = bytes(normalizer.get(_CHARSMAP, b""))
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise CorruptFileError(f"{source}: is no SentencePiece model: {error}") from error
    if parts[_DENORMALIZER].get(_CHARSMAP):
        raise UnsupportedModelError(f"{source}: has a denormalizer_spec, which changes decoded text: not supported")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=trainer.get(_MODEL_TYPE, ModelType.UNIGRAM),
        special_ids={name: token_id for name, token_id in named.items() if 0 <= token_id < len(pieces)},
        add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, True)),
        remove_extra_whitespaces=bool(normalizer.get(_REMOVES_SPACES, True)),
        escape_whitespaces=bool(normalizer.get(_ESCAPES, True)),
        treat_whitespace_as_suffix=bool(trainer.get(_SUFFIX, False)),
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, False)),
        charsmap=charsmap,
    )


class SentencePieceCodec:
    """Text to ids and back by the sentencepiece library, around tokens that are matched first.

    Safe to use from several threads. The library gives up the interpreter lock while it encodes.

    Attributes:
        vocab_size: one above the highest id.
        special_ids: ids of the added tokens that are special.
    """

    def __init__(
        self,
        model: SentencePieceModel,
        added: Mapping[int, AddedToken],
        prefix: Prefix,
        source: str,
        begin_ids: Sequence[int] = (),
        end_ids: Sequence[int] = (),
    ) -> None:
        """Make it of `model`, with the `added` tokens by id, which may name pieces anew.

        `begin_ids` and `end_ids` are put around a text by `encode(..., add_special_tokens=True)`. Raises
        `CorruptFileError` naming `source` for a model that the library refuses.
        """
        _check_charsmap(model.charsmap, source)
        self.model = model
        self.added = dict(added)
        self.prefix = prefix
        self._begin, self._end = list(begin_ids), list(end_ids)
        self._plain = _processor(replace(model, add_dummy_prefix=False), source)
        self._spaced = _processor(replace(model, add_dummy_prefix=True), source)
        self._texts: list[str | None] = [piece.text for piece in model.pieces]
        self._texts += [None] * (max(added, default=-1) + 1 - len(self._texts))
        for token_id, token in added.items():
            self._texts[token_id] = token.content
        self.vocab_size = len(self._texts)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._ids = {text: token_id for token_id, text in reversed([*enumerate(self._texts)]) if text is not None}
        self._splitter, self._split_ids = _splitter(added)
        self._decoder = _decoder(model, prefix)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`."""
        ids: list[int] = list(self._begin) if add_special_tokens else []
        for start, end, token_id in self._stretches(text):
            if token_id is not None:
                ids.append(token_id)
            else:
                ids += self._encode_stretch(text[start:end], is_first=start == 0)
        return ids + self._end if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text, added and control tokens included; ids outside the vocabulary have none."""
        size, texts = self.vocab_size, self._texts
        tokens = [text for i in token_ids if 0 <= i < size and (text := texts[i]) is not None]
        decoded: str = self._decoder.decode(tokens)
        return decoded.removesuffix(" ") if self.model.treat_whitespace_as_suffix else decoded

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a piece or added token, None if there is none."""
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the piece or added token of an id, None if there is none."""
        return self._texts[token_id] if 0 <= token_id < self.vocab_size else None

    def token_bytes(self) -> list[bytes]:
        """Return what each id stands for inside a text."""
        found = []
        for token_id, text in enumerate(self._texts):
            if token_id not in self.added and self._is_byte(token_id):
                found.append(bytes((int(str(text)[3:5], 16),)))
            else:
                found.append((text or "").replace(SPACE, " ").encode())
        return found

    def flags(self) -> dict[str, Any]:
        """Return what a tokenizer_config.json beside `model.serialized()` must say for `codec_of_directory`."""
        tokens = {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(self.added.items())
        }
        flags: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False}
        flags |= {"add_bos_token": bool(self._begin), "add_eos_token": bool(self._end)}
        flags["legacy"] = self.prefix != "first"
        if self.model.add_dummy_prefix != (self.prefix != "never"):
            flags["add_prefix_space"] = self.prefix != "never"
        return {**flags, "added_tokens_decoder": tokens}

    def _is_byte(self, token_id: int) -> bool:
        return token_id < len(self.model.pieces) and self.model.pieces[token_id].type == PieceType.BYTE

    def _encode_stretch(self, text: str, is_first: bool) -> list[int]:
        spaced = self.prefix == "always" or (self.prefix == "first" and is_first)
        # Where the model would put a space and the files say otherwise, one that is in the text is kept, as by
        # transformers, although SentencePiece drops leading spaces.
        if not spaced and self.model.add_dummy_prefix and self.model.remove_extra_whitespaces:
            spaced = text.startswith((" ", SPACE))
        ids: list[int] = (self._spaced if spaced else self._plain).encode(text)
        return ids

    def _stretches(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """Yield start, end and the id of each added token in `text`, and the text between them with id None."""
        if self._splitter is None:
            if text:
                yield 0, len(text), None
            return
        (encoding,) = self._splitter.encode_batch([text], add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if end > start:
                yield start, end, self._split_ids[token]


def codec_of_directory(
    model: SentencePieceModel, config: TokenizerConfig, source: str
) -> tuple[SentencePieceCodec, dict[str, str]]:
    """Return what encodes with `model` and the files beside it, and role -> token.

    Control pieces and what the files add are matched in the text. User-defined pieces are left to SentencePiece unless
    the files list them. Unlike a tokenizer.json the model does not say whether BOS and EOS are added: the files do, and
    BOS is added where they do not. `legacy` is true where it is absent, as it was when there was no such flag.
    """
    if config.tokenizer_class not in _CLASSES:
        raise UnsupportedModelError(
            f"{config.path}: tokenizer_class={config.values.get('tokenizer_class')!r} with a tokenizer.model is not "
            f"supported: {', '.join(sorted(_CLASSES - {''}))} are; pass LLM(tokenizer=...)"
        )
    legacy, prefix_space = config.flags.get("legacy", True), config.flags.get("add_prefix_space")
    if model.treat_whitespace_as_suffix and (prefix_space is not None or not legacy):
        raise UnsupportedModelError(
            f"{config.path}: legacy=false and add_prefix_space are not supported with a model that "
            f"has treat_whitespace_as_suffix: {source}"
        )
    adds_space = model.add_dummy_prefix if prefix_space is None else prefix_space
    prefix: Prefix = "never" if not adds_space else "always" if legacy else "first"
    named = {f"{name}_token": model.pieces[token_id].text for name, token_id in model.special_ids.items()}
    named = {role: token for role, token in named.items() if role not in config.named} | config.special_tokens
    added = _added_tokens(model, config, named, source)
    ids = {token.content: token_id for token_id, token in added.items()}
    ends = []
    for role, default in (("bos_token", True), ("eos_token", False)):
        is_added = config.flags.get(f"add_{role}", default)
        if is_added and role not in named and f"add_{role}" in config.flags:
            raise CorruptFileError(f"{config.path}: add_{role} is true, but there is no {role}")
        ends.append([ids[named[role]]] if is_added and role in named else [])
    return SentencePieceCodec(model, added, prefix, source, *ends), named


def _added_tokens(
    model: SentencePieceModel, config: TokenizerConfig, named: Mapping[str, str], source: str
) -> dict[int, AddedToken]:
    """Return id -> token of what is matched in the text before SentencePiece sees it."""
    ids = {piece.text: token_id for token_id, piece in reversed([*enumerate(model.pieces)])}
    added = {
        token_id: AddedToken(piece.text, normalized=False, special=True)
        for token_id, piece in enumerate(model.pieces)
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)
    }
    for token_id, token in sorted(config.added.items()):
        if ids.setdefault(token.content, token_id) != token_id:
            raise CorruptFileError(
                f"{config.path.parent}: the files beside {source} give {token.content!r} the id {token_id}, "
                f"and it is piece {ids[token.content]} of the model"
            )
        added[token_id] = token
    special = [config.named.get(role) or AddedToken(text, normalized=False) for role, text in named.items()]
    for token in (*special, *config.unnamed):
        known_id = ids.setdefault(token.content, max(len(model.pieces), max(added, default=-1) + 1))
        known = added.get(known_id, token)
        added[known_id] = AddedToken(
            known.content,
            single_word=known.single_word,
            lstrip=known.lstrip,
            rstrip=known.rstrip,
            normalized=known.normalized,
            special=True,
        )
    return added


def _processor(model: SentencePieceModel, source: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=model.serialized())
    except (RuntimeError, ValueError, TypeError) as error:
        raise CorruptFileError(f"{source}: sentencepiece refuses the model: {error}") from error


def _splitter(added: Mapping[int, AddedToken]) -> tuple[Tokenizer | None, list[int | None]]:
    """Return a tokenizer that finds the added tokens, and what its ids mean: of the tokenizers library, whose rules
    for overlapping tokens, word borders and spaces around tokens are the ones that the flags are made for."""
    if not added:
        return None, []
    splitter = Tokenizer(models.WordLevel(vocab={"": 0}, unk_token=""))
    meaning: list[int | None] = [None]
    for special in (True, False):
        chosen = [(token_id, token) for token_id, token in sorted(added.items()) if token.special == special]
        (splitter.add_special_tokens if special else splitter.add_tokens)([token for _, token in chosen])
        meaning += [token_id for token_id, _ in chosen]
    return splitter, meaning


def _decoder(model: SentencePieceModel, prefix: Prefix) -> Any:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix != "never" and not model.treat_whitespace_as_suffix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _check_charsmap(charsmap: bytes, source: str) -> None:
    """Raise `CorruptFileError` unless every step in the table stays inside it; the library does not look.

    The table is the size of a double array (darts-clone), its 32-bit units, and the texts that they point to.
    """
    if not charsmap:
        return
    size = int.from_bytes(charsmap[:4], "little") if len(charsmap) > 4 else 0
    texts = charsmap[4 + size :]
    if not size or size % 1024 or not texts or texts[-1]:
        raise CorruptFileError(f"{source}: precompiled_charsmap is no normalization table: truncated?")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    is_leaf = units >> 31 == 1
    offsets = np.where(is_leaf, 0, (units >> 10) << ((units & 512) >> 6))
    inner = (np.arange(units.size) ^ offsets) | 255
    values = np.where(is_leaf, units & (2**31 - 1), 0)
    if inner.max() >= units.size or values.max() >= len(texts):
        raise CorruptFileError(f"{source}: precompiled_charsmap points outside itself")


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(str(fields.get(1, b""), "utf-8"), score, int(fields.get(3, 1)))


def _signed(value: int) -> int:
    """Return what a varint of 64 bits means: -1 is written as 2**64 - 1."""
    return value - 2**64 if value >= 2**63 else value


def _field(number: int, value: int | float | bytes) -> bytes:
    """Return a field of a message."""
    if isinstance(value, float):
        return _encoded(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return _encoded(number << 3 | _LENGTH) + _encoded(len(value)) + value
    return _encoded(number << 3 | _VARINT) + _encoded(value)


def _encoded(value: int) -> bytes:
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a message: an integer for a varint, else the bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == _LENGTH:
            size, position = _varint(data, position)
        elif wire_type in _FIXED_SIZES:
            size = _FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + size > len(data):
            raise ValueError(f"{position + size - len(data)} bytes are missing: truncated?")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the integer that begins at `position`, and where it ends."""
    value = shift = 0
    while True:
        octet = data[position]
        position += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError(f"an integer before byte {position} does not end")

"""SentencePiece models as files: sentencepiece_model.proto in protobuf's wire format.

The flags are read here, since the sentencepiece library does not expose them. Models are also written here, for GGUF
files, which store the same data as lists.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from llmengine.errors import CorruptFileError, UnsupportedModelError

_FIRST_BYTE = 0x0A
"""First byte of every model, whose first field is a piece. Files of other tokenizers are called tokenizer.model too."""

_PIECE, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _REMOVES_SPACES, _ESCAPES = 2, 3, 4, 5
_SPECIAL_IDS = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
"""Name -> field of the trainer's specification, and its default."""

_VARINT, _LENGTH = 0, 2
_SHORT_PIECE, _PIECE_END, _FLOAT = struct.Struct("4B"), struct.Struct("<BfBB"), struct.Struct("<f")
_FIXED_SIZES = {1: 8, 5: 4}


class ModelType(IntEnum):
    """The way in which a model segments text."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class PieceType(IntEnum):
    """The kind of a piece; GGUF's `token_type` has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One piece of a model; its id is its place in the list."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A SentencePiece model.

    Attributes:
        pieces: pieces by id.
        model_type: see `ModelType`.
        special_ids: "unk", "bos", "eos", "pad" -> id, if the model has the token.
        add_dummy_prefix: a space is added before the text, or after it with `treat_whitespace_as_suffix`.
        remove_extra_whitespaces: leading and trailing spaces are dropped, and runs of them become one.
        escape_whitespaces: spaces are U+2581 in pieces.
        treat_whitespace_as_suffix: the space of a word follows it.
        byte_fallback: characters without a piece become the pieces of their bytes.
        charsmap: the compiled normalization table, empty for none.
        data: content of the file that the model was read from, empty for none.
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
    data: bytes = field(default=b"", repr=False)

    def serialized(self) -> bytes:
        """The model as a tokenizer.model."""
        if self.data:
            return self.data
        trainer = [
            _message_field(_MODEL_TYPE, self.model_type),
            _message_field(_SUFFIX, int(self.treat_whitespace_as_suffix)),
        ]
        trainer.append(_message_field(_BYTE_FALLBACK, int(self.byte_fallback)))
        for name, (number, _) in _SPECIAL_IDS.items():
            token_id = self.special_ids.get(name, -1)
            trainer.append(_message_field(number, token_id % 2**64))
            if token_id >= 0:
                trainer.append(_message_field(number + 5, self.pieces[token_id].text.encode()))
        flags = (self.add_dummy_prefix, self.remove_extra_whitespaces, self.escape_whitespaces)
        normalizer = [
            _message_field(1, b"user_defined" if self.charsmap else b"identity"),
            _message_field(_CHARSMAP, self.charsmap),
        ]
        normalizer += [_message_field(number, int(flag)) for number, flag in enumerate(flags, _DUMMY_PREFIX)]
        specs = (_message_field(_TRAINER, b"".join(trainer)), _message_field(_NORMALIZER, b"".join(normalizer)))
        return b"".join((*map(_piece_field, self.pieces), *specs))


def read_sentencepiece(data: bytes, source: str) -> SentencePieceModel | None:
    """The model that a tokenizer.model holds; None for a file of another tokenizer.

    Raises `CorruptFileError` naming `source` for data that is damaged, `UnsupportedModelError` for a model that
    changes text after decoding.
    """
    if not data or data[0] != _FIRST_BYTE:
        return None
    pieces, position = _leading_pieces(data)
    parts: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}, _DENORMALIZER: {}}
    try:
        for number, value in _message_fields(data, position):
            if number == _PIECE:
                pieces.append(_parsed_piece(value))
            elif number in parts:
                parts[number] |= dict(_message_fields(value))
        trainer, normalizer = parts[_TRAINER], parts[_NORMALIZER]
        named = {name: _signed_int(trainer.get(number, default)) for name, (number, default) in _SPECIAL_IDS.items()}
        charsmap = bytes(normalizer.get(_CHARSMAP, b""))
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise CorruptFileError(f"{source}: not a valid SentencePiece model: {error}") from error
    if parts[_DENORMALIZER].get(_CHARSMAP):
        raise UnsupportedModelError(f"{source}: denormalizer_spec, which changes decoded text, is not supported")
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
        data=data,
    )


def with_dummy_prefix(data: bytes, add_dummy_prefix: bool) -> bytes:
    """The serialized model with this flag: in protobuf a later message overrides fields of an earlier one."""
    return data + _message_field(_NORMALIZER, _message_field(_DUMMY_PREFIX, int(add_dummy_prefix)))


def check_charsmap(charsmap: bytes, source: str) -> None:
    """Raise `CorruptFileError` if an offset in the table points outside it, which the library does not check.

    The table consists of the size of a double array (darts-clone), its 32-bit units, and the texts that they point to.
    """
    if not charsmap:
        return
    size = int.from_bytes(charsmap[:4], "little") if len(charsmap) > 4 else 0
    texts = charsmap[4 + size :]
    if not size or size % 1024 or not texts or texts[-1]:
        raise CorruptFileError(f"{source}: precompiled_charsmap is not a valid normalization table: truncated?")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    is_leaf = units >> 31 == 1
    offsets = np.where(is_leaf, 0, (units >> 10) << ((units & 512) >> 6))
    inner = (np.arange(units.size) ^ offsets) | 255
    values = np.where(is_leaf, units & (2**31 - 1), 0)
    if inner.max() >= units.size or values.max() >= len(texts):
        raise CorruptFileError(f"{source}: precompiled_charsmap has an offset that points outside the table")


def _leading_pieces(data: bytes) -> tuple[list[Piece], int]:
    """Pieces at the start of a file that have the usual short form, and the position after them.

    This reads a vocabulary of 256k in a fraction of the time that `_message_fields` takes.
    """
    pieces: list[Piece] = []
    position, end = 0, len(data)
    while position + 9 < end and data[position] == 10:
        size, text_size = data[position + 1], data[position + 3]
        text = position + 4
        score = text + text_size
        after = position + 2 + size
        is_typed = size == text_size + 9
        if data[position + 2] != 10 or size > 127 or not (is_typed or size == text_size + 7) or after > end:
            break
        if data[score] != 21 or (is_typed and (data[score + 5] != 24 or data[score + 6] > 127)):
            break
        try:
            content = str(data[text:score], "utf-8")
        except UnicodeDecodeError:
            break
        piece_type = data[score + 6] if is_typed else PieceType.NORMAL
        pieces.append(Piece(content, _FLOAT.unpack_from(data, score + 1)[0], piece_type))
        position = after
    return pieces, position


def _piece_field(piece: Piece) -> bytes:
    text = piece.text.encode()
    if len(text) < 100:  # nearly all: lengths are single bytes
        size = len(text)
        return _SHORT_PIECE.pack(10, size + 9, 10, size) + text + _PIECE_END.pack(21, piece.score, 24, piece.type)
    return _message_field(
        _PIECE, _message_field(1, text) + _message_field(2, piece.score) + _message_field(3, int(piece.type))
    )


def _parsed_piece(data: bytes) -> Piece:
    fields = dict(_message_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(str(fields.get(1, b""), "utf-8"), score, int(fields.get(3, 1)))


def _signed_int(value: int) -> int:
    """The signed value of a 64-bit varint: -1 is written as 2**64 - 1."""
    return value - 2**64 if value >= 2**63 else value


def _message_field(number: int, value: int | float | bytes) -> bytes:
    """A field of a message."""
    if isinstance(value, float):
        return _varint_bytes(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return _varint_bytes(number << 3 | _LENGTH) + _varint_bytes(len(value)) + value
    return _varint_bytes(number << 3 | _VARINT) + _varint_bytes(value)


def _varint_bytes(value: int) -> bytes:
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def _message_fields(data: bytes, position: int = 0) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: an integer for a varint, else the bytes."""
    while position < len(data):
        key, position = _read_varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if wire_type == _LENGTH:
            size, position = _read_varint(data, position)
        elif wire_type in _FIXED_SIZES:
            size = _FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"unknown wire type {wire_type} at byte {position}")
        if position + size > len(data):
            raise ValueError(f"{position + size - len(data)} bytes are missing: truncated?")
        yield number, data[position : position + size]
        position += size


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The integer that begins at `position`, and where it ends."""
    value = shift = 0
    while True:
        octet = data[position]
        position += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError(f"the integer before byte {position} has more than 10 bytes")

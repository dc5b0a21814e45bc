"""SentencePiece models (tokenizer.model) as GGUF metadata, which `tokenizer_gguf` makes a tokenizer of.

Read without sentencepiece or protobuf, since for this format transformers needs both, and then loses the space that
SentencePiece puts before a text: Mistral's and Phi-3's would get other ids, and Llama's for texts that begin with one.
The format is sentencepiece_model.proto, in protobuf's wire format, of which few fields matter here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from llmengine.errors import CorruptFileError

_FIRST_BYTE = 0x0A
"""Of every model: its first field is a piece. Files of other tokenizers are also called tokenizer.model."""

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_BPE = 2
_USER_DEFINED = 4
_SPECIAL_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}
"""Name in GGUF -> field of the trainer's specification, and its default."""

_VARINT, _LENGTH = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}


def sentencepiece_metadata(data: bytes, source: str) -> dict[str, Any] | None:
    """Return the model as GGUF metadata; None for one of a kind that these cannot express.

    That is what is no BPE or normalizes the text: none of the families has such a model. Raises `CorruptFileError`
    naming `source` for data that is damaged.
    """
    if not data or data[0] != _FIRST_BYTE:
        return None
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == _PIECE:
                pieces.append(_piece(value))
            elif number == _TRAINER:
                trainer |= dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer |= dict(_fields(value))
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise CorruptFileError(f"{source}: is no SentencePiece model: {error}") from error
    if trainer.get(3, 1) != _BPE or not _keeps_text(trainer, normalizer):
        return None
    metadata: dict[str, Any] = {
        "model": "llama",
        "tokens": [text.replace("\u2581", " ") if kind == _USER_DEFINED else text for text, _, kind in pieces],
        "scores": [score for _, score, _ in pieces],
        "token_type": [kind for _, _, kind in pieces],
        "add_space_prefix": bool(normalizer.get(3, True)),
    }
    for name, (number, default) in _SPECIAL_IDS.items():
        token_id = trainer.get(number, default)
        if isinstance(token_id, int) and 0 <= token_id < len(pieces):  # none is -1, as 64 bits
            metadata[f"{name}_token_id"] = token_id
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}


def _keeps_text(trainer: Mapping[int, Any], normalizer: Mapping[int, Any]) -> bool:
    """Say whether nothing is normalized but spaces to their escapes, which stand in front of words."""
    charsmap, removes_spaces, escapes = normalizer.get(2, b""), normalizer.get(4, True), normalizer.get(5, True)
    return not charsmap and not removes_spaces and bool(escapes) and not trainer.get(24, False)


def _piece(data: bytes) -> tuple[str, float, int]:
    """Return text, score and type."""
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return str(fields.get(1, b""), "utf-8"), score, int(fields.get(3, 1))


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

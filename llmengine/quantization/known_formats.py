"""Every weight format by its name, and formats as manifests describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError
from llmengine.quantization.bnb4 import Bnb4Bit
from llmengine.quantization.formats import Dense, WeightFormat, settings
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.gguf_blocks import GGUF_BLOCKS
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import Int8PerChannel, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4
from llmengine.quantization.stacked import Stacked, StackedPart

_KINDS: tuple[type[WeightFormat], ...] = (Dense, Int8PerChannel, Int8Groups, Int4Groups, Fp8, Int8W8A8, Mxfp4, Nvfp4)
_KINDS += (Bnb4Bit, Stacked, *(type(blocks) for blocks in GGUF_BLOCKS.values()))

FORMATS: Mapping[str, type[WeightFormat]] = {kind.name: kind for kind in _KINDS}
"""Every weight format by its name."""


def format_from_json(values: Mapping[str, Any], where: str) -> WeightFormat:
    """The format that `WeightFormat.to_json` gave; without a name it is dense.

    `where` names the file and key in messages. Raises `UnsupportedModelError` for a format that this version does not
    know, `CorruptFileError` for settings that the format does not have.
    """
    name = values.get("weights", Dense.name)
    kind = FORMATS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UnsupportedModelError(
            f"{where}: weights in format {name!r} are not supported; supported are: {', '.join(FORMATS)}"
        )
    known, found = {item.name for item in settings(kind)}, values.keys() - {"weights"}
    required = {item.name for item in settings(kind) if item.default is MISSING}
    if not required <= found <= known:
        raise CorruptFileError(
            f"{where}: format {name!r} has the settings {sorted(known)}, but these are given: {sorted(found)}"
        )
    try:
        if kind is Stacked:
            return Stacked(_parts_from_json(values["parts"], where))
        return kind(**{key: values[key] for key in found})
    except ConfigError as error:
        raise CorruptFileError(f"{where}: {error}") from error


def _parts_from_json(parts: Any, where: str) -> tuple[StackedPart, ...]:
    if not isinstance(parts, list) or not parts or not all(isinstance(part, Mapping) for part in parts):
        raise CorruptFileError(f"{where}: parts: expected a list of objects, found {parts!r}")
    found = []
    for index, part in enumerate(parts):
        share = part.get("share")
        if type(share) is not int or share < 1:
            raise CorruptFileError(f"{where}: parts: {index}: share: expected a positive integer, found {share!r}")
        stored = {key: value for key, value in part.items() if key != "share"}
        found.append(StackedPart(share, format_from_json(stored, f"{where}: parts: {index}")))
    return tuple(found)

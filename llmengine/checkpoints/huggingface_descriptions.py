"""Where a Hugging Face directory says how its weights are quantized, and what all readers of that need.

Most tools write `quantization_config` into config.json. Older ones wrote a file of their own beside it, and some write
both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmengine.checkpoints.metadata_fields import Fields, read_json_object
from llmengine.checkpoints.quantized_linears import LinearLayout
from llmengine.errors import CorruptFileError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Module:
    """A linear or an embedding of the model.

    Attributes:
        names: what a description may call it: first as transformers names it in the language model alone.
        kind: its class in transformers, "Linear" or "Embedding".
    """

    names: tuple[str, ...]
    kind: str


LayoutChoice = Callable[[Module], LinearLayout | None]
"""The layout of a module, None if it is dense."""

NO_BITS = "; load the unquantized checkpoint and set quant_config"
"""Advice that ends messages about what is not supported."""

_KEYS = ("quantization_config", "compression_config")
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files of AutoGPTQ, AutoAWQ and ModelOpt, and the `quant_method` of one that names none."""

_MLX_KEY = "quantization"
_OLD_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}
_COMPARED = ("quant_method", "bits", "group_size", "sym", "version", "checkpoint_format", "quant_algo")
_MAX_SIZE = 1 << 20
_MAX_REPETITIONS = 4


def quantization_description(directory: Path, config: Fields) -> Fields | None:
    """What a directory says about its quantization, with the keys of `quantization_config`; None if it says nothing.

    Raises `CorruptFileError` where config.json and another file contradict each other.
    """
    key = next((key for key in _KEYS if config.values.get(key) not in (None, {})), None)
    described = None if key is None else config.fields(key)
    if config.has(_MLX_KEY) and (described is None or not described.has("quant_method")):
        raise UnsupportedModelError(f"{config.where}: {_MLX_KEY}: the format of MLX is not supported{NO_BITS}")
    for name, method in _FILES.items():
        if (directory / name).is_file():
            other = _in_one_form(read_json_object(directory / name), method)
            if described is None:
                described = other
            else:
                _compare(described, other)
    return described


def _in_one_form(fields: Fields, method: str) -> Fields:
    """The keys of a file as `quantization_config` would have them."""
    values = {_OLD_KEYS.get(key, key): value for key, value in fields.values.items()}
    for old, new in _OLD_KEYS.items():
        if fields.has(old) and fields.has(new) and fields.values[old] != fields.values[new]:
            raise CorruptFileError(
                f"{fields.where}: {old}={fields.values[old]!r} contradicts {new}={fields.values[new]!r}"
            )
    if method == "modelopt" and fields.has("quantization"):
        quantization = fields.fields("quantization")
        return Fields({"quant_method": method, **quantization.values}, quantization.where)
    if values.get("quant_method") is None:
        values["quant_method"] = method
    return Fields(values, fields.where)


def _compare(described: Fields, other: Fields) -> None:
    for key in _COMPARED:
        one, two = described.values.get(key), other.values.get(key)
        if one is None or two is None:
            continue
        if isinstance(one, str) and isinstance(two, str):
            one, two = one.lower(), two.lower()
        if one != two:
            raise CorruptFileError(
                f"{described.where}: {key}={described.values[key]!r} contradicts {key}={other.values[key]!r} in "
                f"{other.where}; correct one of them, or remove the one that is wrong"
            )


def refused(fields: Fields, key: str, value: object, supported: str) -> UnsupportedModelError:
    """The error for a value that is not supported."""
    return UnsupportedModelError(f"{fields.where}: {key}={value!r} is not supported; supported: {supported}{NO_BITS}")


def group_size(fields: Fields, key: str, default: int) -> int:
    """A positive size, or -1 for one group a row."""
    if fields.values.get(key) == -1:
        return -1
    return fields.integer(key, default, low=1, high=_MAX_SIZE) if fields.has(key) else default


def everywhere(layout: LinearLayout) -> LayoutChoice:
    """The choice of one layout for all modules that are quantized."""
    return lambda module: layout


def by_pattern(
    rules: Sequence[tuple[re.Pattern[str], LinearLayout | None]], usual: LinearLayout | None
) -> LayoutChoice:
    """The choice of the first pattern that matches the beginning of one of a module's names."""

    def choose(module: Module) -> LinearLayout | None:
        for rule, layout in rules:
            if any(rule.match(name) for name in module.names):
                return layout
        return usual

    return choose


def pattern(text: str, where: str) -> re.Pattern[str]:
    """A regular expression of a file, of a kind that takes no exponential time to match."""
    if re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > _MAX_REPETITIONS or len(text) > 1000:
        raise UnsupportedModelError(
            f"{where}: pattern {text!r} is not supported: patterns must have no repeated groups, and at most "
            f"{_MAX_REPETITIONS} repetitions"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise Fields({"pattern": text}, where).error("pattern", f"a regular expression ({error})") from error

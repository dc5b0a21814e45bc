"""`quantization_config` of a Hugging Face config.json: which layout the linears of a checkpoint have.

It is about what tools mean to quantize. Which linears they did quantize, the files say: a linear with a dense "weight"
is not quantized.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmengine.checkpoints.metadata_fields import Fields
from llmengine.checkpoints.packed_layouts import Awq, AwqVector, Gptq, Packed
from llmengine.checkpoints.quantized_linears import Activations, LinearLayout, Scales
from llmengine.checkpoints.scaled_layouts import Floats, Integers, Microscaled
from llmengine.errors import UnsupportedModelError
from llmengine.quantization.fp8 import BLOCK

logger = logging.getLogger(__name__)

LayoutChoice = Callable[[str, str], LinearLayout | None]
"""(name of a module, its class in transformers: "Linear" or "Embedding") -> its layout, None if it is dense."""

_KEYS = ("quantization_config", "compression_config")
_MAX_SIZE = 1 << 20
_MAX_REPETITIONS = 4
_NO_BITS = "; load the unquantized checkpoint and set quant_config"


def layout_choice(config: Fields) -> LayoutChoice | None:
    """The layouts that a config.json describes; None if it describes no quantization.

    Raises `UnsupportedModelError` for a method, layout or option that is not supported, `CorruptFileError` for a
    malformed value.
    """
    key = next((key for key in _KEYS if config.has(key)), None)
    if key is None:
        return None
    fields = config.fields(key)
    if not fields.has("quant_method") and any(fields.has(name) for name in ("load_in_4bit", "load_in_8bit")):
        raise _unknown_method(fields, "bitsandbytes")
    method = fields.string("quant_method")
    if method not in _METHODS:
        raise _unknown_method(fields, method)
    return _METHODS[method](fields)


def _unknown_method(fields: Fields, method: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{fields.where}: quant_method={method!r} is not supported; supported: {', '.join(_METHODS)}{_NO_BITS}"
    )


def _refuse(fields: Fields, key: str, value: object, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{fields.where}: {key}={value!r} is not supported; supported: {supported}{_NO_BITS}")


def _everywhere(layout: LinearLayout) -> LayoutChoice:
    return lambda module, kind: layout


def _awq(fields: Fields) -> LayoutChoice:
    key = next((key for key in ("version", "format", "checkpoint_format") if fields.has(key)), None)
    version = fields.string(key).lower() if key else "gemm"
    if version not in ("gemm", "gemv"):
        raise _refuse(fields, key or "version", version, "gemm, gemv")
    bits = fields.integer("bits", 4)
    if bits != 4:
        raise _refuse(fields, "bits", bits, "4")
    group_size = _group_size(fields, "group_size", 128)
    return _everywhere(Awq(group_size) if version == "gemm" else AwqVector(group_size))


def _gptq(fields: Fields) -> LayoutChoice:
    key = next((key for key in ("checkpoint_format", "format") if fields.has(key)), None)
    version = fields.string(key).lower() if key else "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise _refuse(fields, key or "checkpoint_format", version, "gptq, gptq_v2")
    zero_offset = 1 if version == "gptq" else 0
    usual = _gptq_layout(fields, fields, zero_offset)
    rules = []
    dynamic = fields.fields("dynamic") if fields.has("dynamic") else Fields({}, fields.where)
    for rule in dynamic.values:
        negative = rule.startswith("-:")
        pattern = _pattern(rule.removeprefix("-:").removeprefix("+:"), dynamic.where)
        rules.append((pattern, None if negative else _gptq_layout(dynamic.fields(rule), fields, zero_offset)))

    def choose(module: str, kind: str) -> LinearLayout | None:
        return next((layout for pattern, layout in rules if pattern.match(module)), usual)

    return choose


def _gptq_layout(fields: Fields, usual: Fields, zero_offset: int) -> Gptq:
    """The layout that `fields` describe; keys that they lack are in `usual`."""
    merged = Fields({**usual.values, **fields.values}, fields.where)
    bits = merged.integer("bits")
    if bits not in (4, 8):
        raise _refuse(merged, "bits", bits, "4, 8")
    return Gptq(
        bits,
        _group_size(merged, "group_size", 128),
        symmetric=merged.boolean("sym", False),
        act_order=merged.boolean("desc_act", False),
        zero_offset=zero_offset,
    )


def _fp8(fields: Fields) -> LayoutChoice:
    for key, supported in (("fmt", "e4m3"), ("scale_fmt", "float")):
        if fields.string(key, supported) != supported:
            raise _refuse(fields, key, fields.values[key], supported)
    scheme = fields.string("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise _refuse(fields, "activation_scheme", scheme, "dynamic, static")
    if not fields.has("weight_block_size"):
        return _everywhere(Floats("tensor", "token" if scheme == "dynamic" else "tensor"))
    block = fields.sizes("weight_block_size")
    if block != (BLOCK, BLOCK):
        raise _refuse(fields, "weight_block_size", list(block), str([BLOCK, BLOCK]))
    if scheme != "dynamic":
        raise _refuse(fields, "activation_scheme", scheme, "dynamic with weight_block_size")
    return _everywhere(Floats("block", "block", "weight_scale_inv"))


def _mxfp4(fields: Fields) -> LayoutChoice:
    return _everywhere(Microscaled())


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of `config_groups`; `targets` are names and classes of modules, or "re:" and a pattern."""

    targets: Sequence[str]
    layout: LinearLayout


def _compressed_tensors(fields: Fields) -> LayoutChoice:
    _check_compression(fields)
    groups = fields.fields("config_groups")
    usual = fields.string("format", "")
    found = []
    for name in groups.values:
        group = groups.fields(name)
        layout = _compressed_layout(group, group.string("format", usual))
        found.append(_Group([*map(_checked(group.where), group.strings("targets"))], layout))
    ignored = [*map(_checked(fields.where), fields.strings("ignore"))] if fields.has("ignore") else []

    def choose(module: str, kind: str) -> LinearLayout | None:
        if any(_fits(target, module, kind) for target in ignored):
            return None
        # A name says more than a pattern, and that more than a class.
        for rank in (_is_name, _is_pattern, _is_class):
            for group in found:
                if any(rank(target, module, kind) for target in group.targets):
                    return group.layout
        return None

    return choose


def _is_name(target: str, module: str, kind: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str, kind: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def _is_class(target: str, module: str, kind: str) -> bool:
    return target == kind


def _fits(target: str, module: str, kind: str) -> bool:
    return any(rank(target, module, kind) for rank in (_is_name, _is_pattern, _is_class))


def _checked(where: str) -> Callable[[str], str]:
    """A function that returns a target whose pattern, if it has one, is sound."""

    def check(target: str) -> str:
        if target.startswith("re:"):
            _pattern(target.removeprefix("re:"), where)
        return target

    return check


def _check_compression(fields: Fields) -> None:
    """Raise for options that concern the whole model."""
    status = fields.string("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise _refuse(fields, "quantization_status", status, "compressed, frozen")
    if fields.has("transform_config") and fields.fields("transform_config").values:
        raise UnsupportedModelError(f"{fields.where}: transform_config is not supported{_NO_BITS}")
    if fields.has("sparsity_config"):
        sparsity = fields.fields("sparsity_config")
        kind = sparsity.string("format", "dense") if sparsity.values else "dense"
        if kind != "dense":
            raise _refuse(sparsity, "format", kind, "dense")
    if fields.has("kv_cache_scheme"):
        logger.warning(
            "%s: kv_cache_scheme is ignored: quant_config says whether the KV cache is quantized", fields.where
        )


def _compressed_layout(group: Fields, name: str) -> LinearLayout:
    """The layout of a group of `config_groups` in the format `name`."""
    if group.has("output_activations"):
        raise UnsupportedModelError(f"{group.where}: output_activations are not supported{_NO_BITS}")
    weights = group.fields("weights")
    kind, bits = weights.string("type", "int"), weights.integer("num_bits", 8)
    if name == "naive-quantized":
        name = "int-quantized" if kind == "int" else "float-quantized"
    expected = _COMPRESSED.get(name)
    if expected is None:
        raise _refuse(group, "format", name, ", ".join((*_COMPRESSED, "naive-quantized")))
    if (kind, bits) not in expected:
        listed = ", ".join(f"{kind}{bits}" for kind, bits in expected)
        raise _refuse(weights, "num_bits", f"{kind}{bits}", f"{listed} in format {name!r}")
    if weights.boolean("dynamic", False):
        raise _refuse(weights, "dynamic", True, "false")
    activations = _activations(group, kind)
    strategy, group_size = _strategy(weights)
    symmetric = weights.boolean("symmetric", True)
    if name == "pack-quantized":
        _require_none(group, activations, name)
        if strategy not in ("tensor", "channel", "group"):
            raise _refuse(weights, "strategy", strategy, "tensor, channel, group")
        return Packed(bits, group_size, symmetric, one_scale=strategy == "tensor")
    if not symmetric:
        raise _refuse(weights, "symmetric", False, f"true in format {name!r}")
    if name == "mxfp4-pack-quantized":
        _require_none(group, activations, name)
        return Microscaled("weight_packed", "weight_scale")
    if name == "float-quantized":
        return Floats(_float_scales(weights, strategy), activations)
    return _integers(group, weights, strategy, group_size, activations)


_COMPRESSED: Mapping[str, tuple[tuple[str, int], ...]] = {
    "pack-quantized": (("int", 4), ("int", 8)),
    "int-quantized": (("int", 8),),
    "float-quantized": (("float", 8),),
    "mxfp4-pack-quantized": (("float", 4),),
}


def _integers(group: Fields, weights: Fields, strategy: str, group_size: int, activations: Activations) -> LinearLayout:
    if strategy not in ("tensor", "channel", "group"):
        raise _refuse(weights, "strategy", strategy, "tensor, channel, group")
    if activations == "block" or (strategy == "group" and activations != "none"):
        raise UnsupportedModelError(
            f"{group.where}: int8 activations with scales in groups are not supported{_NO_BITS}"
        )
    return Integers("tensor" if strategy == "tensor" else "channel", activations, group_size)


def _float_scales(weights: Fields, strategy: str) -> Scales:
    if strategy == "block":
        block = weights.values.get("block_structure")
        if block not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
            raise _refuse(weights, "block_structure", block, str([BLOCK, BLOCK]))
        return "block"
    if strategy == "tensor":
        return "tensor"
    if strategy == "channel":
        return "channel"
    raise _refuse(weights, "strategy", strategy, "tensor, channel, block")


def _strategy(weights: Fields) -> tuple[str, int]:
    """Which weights share a scale, and the size of groups; -1 where there are none."""
    group_size = _group_size(weights, "group_size", -1) if weights.has("group_size") else None
    inferred = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    strategy = weights.string("strategy", inferred)
    if strategy == "group" and group_size in (None, -1):
        raise weights.error("group_size", "a positive integer with strategy 'group'")
    return strategy, group_size if strategy == "group" and group_size is not None else -1


def _activations(group: Fields, kind: str) -> Activations:
    """How activations are rounded, with weights of this kind ("int" or "float")."""
    if not group.has("input_activations"):
        return "none"
    inputs = group.fields("input_activations")
    found = inputs.string("type", "int"), inputs.integer("num_bits", 8)
    if found != (kind, 8):
        raise _refuse(inputs, "num_bits", f"{found[0]}{found[1]}", f"{kind}8 with weights of that type")
    if not inputs.boolean("symmetric", True):
        raise _refuse(inputs, "symmetric", False, "true")
    is_dynamic = inputs.boolean("dynamic", False)
    group_size = inputs.optional_integer("group_size", high=_MAX_SIZE)
    strategy = inputs.string("strategy", "tensor" if group_size is None else "group")
    if is_dynamic and strategy == "token":
        return "token"
    if is_dynamic and strategy == "group" and group_size == BLOCK:
        return "block"
    if not is_dynamic and strategy == "tensor":
        return "tensor"
    supported = f"'token' or 'group' with group_size={BLOCK}" if is_dynamic else "'tensor'"
    raise _refuse(inputs, "strategy", strategy, f"{supported} with dynamic={str(is_dynamic).lower()}")


def _require_none(group: Fields, activations: Activations, name: str) -> None:
    if activations != "none":
        raise UnsupportedModelError(f"{group.where}: input_activations are not supported in format {name!r}{_NO_BITS}")


def _group_size(fields: Fields, key: str, default: int) -> int:
    """A positive size, or -1 for one group a row."""
    if fields.values.get(key) == -1:
        return -1
    return fields.integer(key, default, low=1, high=_MAX_SIZE) if fields.has(key) else default


def _pattern(text: str, where: str) -> re.Pattern[str]:
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


_METHODS: Mapping[str, Callable[[Fields], LayoutChoice]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
}

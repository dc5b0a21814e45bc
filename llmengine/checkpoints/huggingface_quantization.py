"""How the linears of a quantized Hugging Face checkpoint are laid out, by what its directory says about that.

It is about what tools mean to quantize. Which linears they did quantize, the files say: a linear with a dense "weight"
is not quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from llmengine.checkpoints.bitsandbytes_layouts import Bnb4BitBlocks, Bnb8BitRows
from llmengine.checkpoints.huggingface_compressed_tensors import compressed_tensors
from llmengine.checkpoints.huggingface_descriptions import (
    NO_BITS,
    LayoutChoice,
    Module,
    by_pattern,
    everywhere,
    group_size,
    pattern,
    refused,
)
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.checkpoints.packed_layouts import Awq, AwqVector, Gptq
from llmengine.checkpoints.quantized_linears import LinearLayout
from llmengine.checkpoints.scaled_layouts import Floats, Microscaled, NvidiaFloats
from llmengine.errors import UnsupportedModelError
from llmengine.quantization import nvfp4
from llmengine.quantization.bnb4 import TABLES
from llmengine.quantization.fp8 import BLOCK

logger = logging.getLogger(__name__)

_AWQ_GEMM = ("gemm", "exllama", "ipex")
"""Names of versions whose files are alike."""

_AUTO_ROUND = {"gptq": {"gptq", "auto_gptq"}, "awq": {"awq", "auto_awq"}}
"""Whose layout AutoRound packs in, by the parts of its names."""


def layout_choice(fields: Fields) -> LayoutChoice:
    """The layouts that a `quantization_config` describes.

    Raises `UnsupportedModelError` for a method, layout or option that is not supported, `CorruptFileError` for a
    malformed value.
    """
    if not fields.has("quant_method") and any(fields.has(name) for name in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    else:
        method = fields.string("quant_method").lower().removeprefix("intel/")
    if method not in _METHODS:
        raise UnsupportedModelError(
            f"{fields.where}: quant_method={method!r} is not supported; supported: {', '.join(_METHODS)}{NO_BITS}"
        )
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        if fields.values.get(key):
            logger.warning("%s: %s is ignored: quant_config says whether the KV cache is quantized", fields.where, key)
    return _METHODS[method](fields)


def _awq(fields: Fields) -> LayoutChoice:
    key = next((key for key in ("version", "format", "checkpoint_format") if fields.has(key)), None)
    version = fields.string(key).lower() if key else "gemm"
    if version not in (*_AWQ_GEMM, "gemv"):
        raise refused(fields, key or "version", version, "gemm, gemv")
    return everywhere(_awq_layout(fields, is_vector=version == "gemv"))


def _awq_layout(fields: Fields, *, is_vector: bool) -> LinearLayout:
    bits = fields.integer("bits", 4)
    if bits != 4:
        raise refused(fields, "bits", bits, "4")
    size = group_size(fields, "group_size", 128)
    return AwqVector(size) if is_vector else Awq(size, fields.boolean("zero_point", False))


def _gptq(fields: Fields) -> LayoutChoice:
    key = next((key for key in ("checkpoint_format", "format") if fields.has(key)), None)
    version = fields.string(key).lower() if key else "gptq"
    if fields.boolean("is_marlin_format", False):
        version = "marlin"
    if version not in ("gptq", "gptq_v2"):
        raise refused(fields, key or "checkpoint_format", version, "gptq, gptq_v2")
    zero_offset = 1 if version == "gptq" else 0
    rules = []
    dynamic = fields.fields("dynamic") if fields.has("dynamic") else Fields({}, fields.where)
    for rule in dynamic.values:
        negative = rule.startswith("-:")
        compiled = pattern(rule.removeprefix("-:").removeprefix("+:"), dynamic.where)
        rules.append((compiled, None if negative else _gptq_layout(dynamic.fields(rule), fields, zero_offset)))
    return by_pattern(rules, _gptq_layout(fields, fields, zero_offset))


def _gptq_layout(fields: Fields, usual: Fields, zero_offset: int) -> Gptq:
    """The layout that `fields` describe; keys that they lack are in `usual`."""
    merged = _merged(fields, usual)
    bits = merged.integer("bits")
    if bits not in (4, 8):
        raise refused(merged, "bits", bits, "4, 8")
    return Gptq(
        bits,
        group_size(merged, "group_size", 128),
        symmetric=merged.boolean("sym", False),
        act_order=merged.boolean("desc_act", False),
        zero_offset=zero_offset,
    )


def _merged(fields: Fields, usual: Fields) -> Fields:
    return Fields({**usual.values, **fields.values}, fields.where)


def _auto_round(fields: Fields) -> LayoutChoice:
    """AutoRound packs integers as AutoGPTQ or AutoAWQ does, and lists the modules that differ by their names."""
    # Versions before packing_format have a backend; those that are neither of these store zero points in another way.
    key = "packing_format" if fields.has("packing_format") or not fields.has("backend") else "backend"
    packing = fields.string(key, "auto_round:auto_gptq").lower()
    kind = next((kind for kind, names in _AUTO_ROUND.items() if not names.isdisjoint(packing.split(":"))), None)
    if kind is None:
        raise refused(fields, key, packing, "auto_round:auto_gptq, auto_round:auto_awq")
    data_type = fields.string("data_type", "int").lower()
    if data_type != "int":
        raise refused(fields, "data_type", data_type, "int")

    def layout(own: Fields) -> LinearLayout | None:
        merged = _merged(own, fields)
        if merged.integer("bits") >= 16:
            return None
        return _awq_layout(merged, is_vector=False) if kind == "awq" else _gptq_layout(merged, merged, 1)

    usual = layout(fields)
    extra = fields.fields("extra_config") if fields.has("extra_config") else Fields({}, fields.where)
    own = [(pattern(f"{name}$", extra.where), layout(extra.fields(name))) for name in extra.values]
    return by_pattern(own, usual)


def _fp8(fields: Fields) -> LayoutChoice:
    for key, supported in (("fmt", ("e4m3",)), ("scale_fmt", ("float", "ue8m0"))):
        if fields.string(key, supported[0]) not in supported:
            raise refused(fields, key, fields.values[key], ", ".join(supported))
    scheme = fields.string("activation_scheme", "dynamic").lower()
    if scheme not in ("dynamic", "static"):
        raise refused(fields, "activation_scheme", scheme, "dynamic, static")
    if not fields.has("weight_block_size"):
        return everywhere(Floats("tensor", "token" if scheme == "dynamic" else "tensor"))
    block = fields.sizes("weight_block_size")
    if block != (BLOCK, BLOCK):
        raise refused(fields, "weight_block_size", list(block), str([BLOCK, BLOCK]))
    if scheme != "dynamic":
        raise refused(fields, "activation_scheme", scheme, "dynamic with weight_block_size")
    return everywhere(Floats("block", "block", "weight_scale_inv"))


def _mxfp4(fields: Fields) -> LayoutChoice:
    return everywhere(Microscaled())


def _bitsandbytes(fields: Fields) -> LayoutChoice:
    # transformers writes them with a leading underscore as well.
    in_8_bits, in_4_bits = (
        fields.boolean(name, False) or fields.boolean(f"_{name}", False) for name in ("load_in_8bit", "load_in_4bit")
    )
    if in_8_bits == in_4_bits:
        raise fields.error("load_in_4bit", f"the opposite of load_in_8bit={str(in_8_bits).lower()}")
    if in_8_bits:
        return everywhere(Bnb8BitRows())
    found = fields.string("bnb_4bit_quant_type").lower() if fields.has("bnb_4bit_quant_type") else None
    tables = [name for name in TABLES if name == found]
    if found is not None and not tables:
        raise refused(fields, "bnb_4bit_quant_type", found, ", ".join(TABLES))
    return everywhere(Bnb4BitBlocks(tables[0] if tables else None))


def _modelopt(fields: Fields) -> LayoutChoice:
    """NVIDIA's ModelOpt: one algorithm for all linears, or a list of linears with an algorithm each."""
    if not fields.has("quant_algo"):
        return lambda module: None  # only the KV cache is quantized
    if fields.string("quant_algo").upper() != "MIXED_PRECISION":
        return everywhere(_modelopt_layout(fields))
    layers = fields.fields("quantized_layers")
    own = {name: _modelopt_layout(layers.fields(name)) for name in layers.values}

    def choose(module: Module) -> LinearLayout | None:
        return next((own[name] for name in module.names if name in own), None)

    return choose


def _modelopt_layout(fields: Fields) -> LinearLayout:
    name = fields.string("quant_algo").upper()
    layout = _MODELOPT.get(name)
    if layout is None:
        raise refused(fields, "quant_algo", name, ", ".join(_MODELOPT))
    if isinstance(layout, NvidiaFloats) and (size := group_size(fields, "group_size", nvfp4.BLOCK)) != nvfp4.BLOCK:
        raise refused(fields, "group_size", size, str(nvfp4.BLOCK))
    if name == "NVFP4":
        logger.warning("%s: products use activations as they are; NVFP4 activations are not supported", fields.where)
    return layout


_NVFP4 = NvidiaFloats("weight", "weight_scale_2", is_divisor=False)
_MODELOPT: Mapping[str, LinearLayout] = {
    "FP8": Floats("tensor", "tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": Floats("channel", "token"),
    "FP8_PB_WO": Floats("block", "none"),
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _NVFP4,
}
_METHODS: Mapping[str, Callable[[Fields], LayoutChoice]] = {
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "compressed-tensors": compressed_tensors,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
}

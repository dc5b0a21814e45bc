"""`quantization_config` of compressed-tensors, which llm-compressor writes: groups of modules with a scheme each.

What it says of weights decides how they are read. What it says of activations holds where a format of ours rounds them
alike; else products use them as they are, which is more exact, and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmengine.checkpoints.huggingface_descriptions import (
    NO_BITS,
    LayoutChoice,
    Module,
    group_size,
    pattern,
    refused,
)
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.checkpoints.packed_layouts import Packed
from llmengine.checkpoints.quantized_linears import Activations, LinearLayout, Scales
from llmengine.checkpoints.scaled_layouts import Floats, Integers, Microscaled, NvidiaFloats
from llmengine.errors import UnsupportedModelError
from llmengine.quantization import mxfp4, nvfp4
from llmengine.quantization.fp8 import BLOCK

logger = logging.getLogger(__name__)

_DENSE_FORMATS = ("dense", "fakequant")
_FORMATS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "pack-quantized": (("int", 4), ("int", 8)),
    "int-quantized": (("int", 8),),
    "float-quantized": (("float", 8),),
    "mxfp4-pack-quantized": (("float", 4),),
    "nvfp4-pack-quantized": (("float", 4),),
}
"""Formats and the types and bits that weights have in them."""

_NUMBERS = ("int", "float")
_STRATEGIES = ("tensor", "channel", "token", "group", "block", "tensor_group", "attn_head")
_ORDERS = {"group": True, "dynamic": True, "weight": False, "static": False}
"""Values of `actorder`, and whether groups are then of columns that are not consecutive."""

_DYNAMIC = (True, False, "local")
_LARGEST_GROUP = 1 << 20


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of `config_groups`.

    Attributes:
        targets: names and classes of modules, or "re:" and a pattern.
        layout: None where the file has the weights as they were.
    """

    targets: Sequence[str]
    layout: LinearLayout | None


def compressed_tensors(fields: Fields) -> LayoutChoice:
    """The layouts of a model that compressed-tensors wrote."""
    _check_model(fields)
    groups = fields.fields("config_groups")
    usual = fields.string("format", "")
    found = []
    for name in groups.values:
        group = groups.fields(name)
        targets = [*map(_checked(group.where), group.strings("targets"))]
        found.append(_Group(targets, _layout(group, group.string("format", usual).lower())))
    ignored = [*map(_checked(fields.where), fields.strings("ignore"))] if fields.has("ignore") else []

    def choose(module: Module) -> LinearLayout | None:
        if any(_fits(target, module) for target in ignored):
            return None
        # A name says more than a pattern, and that more than a class.
        for rank in (_is_name, _is_pattern, _is_class):
            for group in found:
                if any(rank(target, module) for target in group.targets):
                    return group.layout
        return None

    return choose


def _is_name(target: str, module: Module) -> bool:
    return target in module.names


def _is_pattern(target: str, module: Module) -> bool:
    if not target.startswith("re:"):
        return False
    compiled = pattern(target.removeprefix("re:"), "targets")
    return any(compiled.match(name) for name in module.names)


def _is_class(target: str, module: Module) -> bool:
    return target == module.kind


def _fits(target: str, module: Module) -> bool:
    return any(rank(target, module) for rank in (_is_name, _is_pattern, _is_class))


def _checked(where: str) -> Callable[[str], str]:
    """A function that returns a target whose pattern, if it has one, is sound."""

    def check(target: str) -> str:
        if target.startswith("re:"):
            pattern(target.removeprefix("re:"), where)
        return target

    return check


def _check_model(fields: Fields) -> None:
    """Raise for options that concern the whole model."""
    status = fields.string("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise refused(fields, "quantization_status", status, "compressed, frozen")
    if fields.has("transform_config") and fields.fields("transform_config").values:
        raise UnsupportedModelError(f"{fields.where}: transform_config is not supported{NO_BITS}")
    if fields.has("sparsity_config"):
        sparsity = fields.fields("sparsity_config")
        kind = sparsity.string("format", "dense") if sparsity.values else "dense"
        if kind != "dense":
            raise refused(sparsity, "format", kind, "dense")


def _layout(group: Fields, name: str) -> LinearLayout | None:
    """The layout of a group of `config_groups` in the format `name`."""
    if not group.has("weights"):
        logger.warning("%s: ignored, since it quantizes no weights", group.where)
        return None
    weights = group.fields("weights")
    kind, bits = weights.string("type", "int").lower(), weights.integer("num_bits", 8)
    if name == "naive-quantized":
        name = "int-quantized" if kind == "int" else "float-quantized"
    if name in _DENSE_FORMATS:
        return None
    expected = _FORMATS.get(name)
    if expected is None:
        raise refused(group, "format", name, ", ".join((*_FORMATS, "naive-quantized", *_DENSE_FORMATS)))
    if (kind, bits) not in expected:
        listed = ", ".join(f"{kind}{bits}" for kind, bits in expected)
        raise refused(weights, "num_bits", f"{kind}{bits}", f"{listed} in format {name!r}")
    if weights.values.get("dynamic"):
        raise refused(weights, "dynamic", weights.values["dynamic"], "false")
    if group.has("output_activations"):
        logger.warning("%s: output_activations are ignored: results of products are not rounded", group.where)
    return _LAYOUTS[name](group, weights)


def _packed(group: Fields, weights: Fields) -> LinearLayout:
    strategy, size = _strategy(weights)
    if strategy not in ("tensor", "channel", "group"):
        raise refused(weights, "strategy", strategy, "tensor, channel, group")
    _activations(group, "")
    return Packed(
        weights.integer("num_bits", 8),
        size,
        weights.boolean("symmetric", True),
        one_scale=strategy == "tensor",
        act_order=_reorders_columns(weights) and strategy == "group",
    )


def _reorders_columns(weights: Fields) -> bool:
    """Whether groups are of columns that are not consecutive; older files have true in place of a name."""
    order = weights.values.get("actorder") or "weight"
    name = "group" if order is True else order
    if not isinstance(name, str) or name.lower() not in _ORDERS:
        raise refused(weights, "actorder", order, ", ".join(_ORDERS))
    return _ORDERS[name.lower()]


def _integers(group: Fields, weights: Fields) -> LinearLayout:
    strategy, size = _strategy(weights)
    if strategy not in ("tensor", "channel", "group"):
        raise refused(weights, "strategy", strategy, "tensor, channel, group")
    symmetric = weights.boolean("symmetric", True)
    are_rounded = symmetric and strategy != "group"
    activations = _activations(group, "int" if are_rounded else "")
    return Integers("tensor" if strategy == "tensor" else "channel", activations, size, symmetric)


def _floats(group: Fields, weights: Fields) -> LinearLayout:
    _require_symmetric(weights, "float-quantized")
    strategy, _ = _strategy(weights)
    return Floats(_float_scales(weights, strategy), _activations(group, "float"))


def _mxfp4(group: Fields, weights: Fields) -> LinearLayout:
    _require_symmetric(weights, "mxfp4-pack-quantized")
    _require_group_size(weights, mxfp4.BLOCK)
    _activations(group, "")
    return Microscaled("weight_packed", "weight_scale")


def _nvfp4(group: Fields, weights: Fields) -> LinearLayout:
    _require_symmetric(weights, "nvfp4-pack-quantized")
    _require_group_size(weights, nvfp4.BLOCK)
    _activations(group, "")
    return NvidiaFloats("weight_packed", "weight_global_scale", is_divisor=True)


_LAYOUTS: Mapping[str, Callable[[Fields, Fields], LinearLayout]] = {
    "pack-quantized": _packed,
    "int-quantized": _integers,
    "float-quantized": _floats,
    "mxfp4-pack-quantized": _mxfp4,
    "nvfp4-pack-quantized": _nvfp4,
}


def _require_symmetric(weights: Fields, name: str) -> None:
    if not weights.boolean("symmetric", True):
        raise refused(weights, "symmetric", False, f"true in format {name!r}")


def _require_group_size(weights: Fields, size: int) -> None:
    found = group_size(weights, "group_size", size)
    if found != size:
        raise refused(weights, "group_size", found, str(size))


def _float_scales(weights: Fields, strategy: str) -> Scales:
    if strategy == "block":
        block = weights.values.get("block_structure")
        if block not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
            raise refused(weights, "block_structure", block, str([BLOCK, BLOCK]))
        return "block"
    if strategy == "tensor":
        return "tensor"
    if strategy == "channel":
        return "channel"
    raise refused(weights, "strategy", strategy, "tensor, channel, block")


def _strategy(weights: Fields) -> tuple[str, int]:
    """Which weights share a scale, and the size of groups; -1 where there are none."""
    size = group_size(weights, "group_size", -1) if weights.has("group_size") else None
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.string("strategy", inferred).lower()
    if strategy == "group" and size in (None, -1):
        raise weights.error("group_size", "a positive integer with strategy 'group'")
    return strategy, size if strategy == "group" and size is not None else -1


def _activations(group: Fields, kind: str) -> Activations:
    """How products round activations: as `input_activations` says, or not at all, which is then logged.

    Args:
        kind: the type of 8 bits to which the format of the weights can round them: "int" or "float", "" if to none.
    """
    if not group.has("input_activations"):
        return "none"
    inputs = group.fields("input_activations")
    number, bits = inputs.string("type", "int").lower(), inputs.integer("num_bits", 8)
    size = inputs.optional_integer("group_size", low=-1, high=_LARGEST_GROUP)
    strategy = inputs.string("strategy", "tensor" if size is None else "group").lower()
    symmetric, dynamic = inputs.boolean("symmetric", True), inputs.values.get("dynamic") or False
    checked = {"type": (number, _NUMBERS), "strategy": (strategy, _STRATEGIES), "dynamic": (dynamic, _DYNAMIC)}
    for key, (value, known) in checked.items():
        if value not in known:
            raise refused(inputs, key, value, ", ".join(map(str, known)))
    if (number, bits, symmetric) == (kind, 8, True):
        if dynamic is True and strategy == "token":
            return "token"
        if dynamic is True and strategy == "group" and size == BLOCK and kind == "float":
            return "block"
        if dynamic is False and strategy == "tensor":
            return "tensor"
    logger.warning(
        "%s: products use activations as they are: %s%d with strategy=%r, symmetric=%s, dynamic=%s is not supported",
        *(inputs.where, number, bits, strategy, symmetric, dynamic),
    )
    return "none"

"""Which stored formats a device computes with, and which are dequantized while they load."""

from __future__ import annotations

from llmengine.checkpoints.dequantized_source import dequantized_source
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.gguf_blocks import GgufBlocks


def source_in_use(config: ModelConfig, source: ModelSource) -> ModelSource:
    """`source` as the device of a resolved `config` computes with it: blocks stay where that is fastest.

    The blocks of a GGUF file stay on a CPU if the native library multiplies them, on CUDA if a kernel does, unless
    `dtype` names another type for the weights or `quant_config` another format. A saved engine stays as it was saved,
    unless `dtype` names a type; on CUDA, blocks that no kernel multiplies are dequantized in any case.
    `weights="stored"` keeps all. TensorRT has no products with blocks.

    Other formats stay, but for those few that no kernel multiplies on CUDA.
    """
    if config.quant_config.weights == "stored":
        return source
    reasons: dict[WeightFormat, str] = {}
    for item in source.formats.kinds:
        why = _why_dequantized(config, source, item) if isinstance(item, GgufBlocks) else _why_not_kept(config, item)
        if why is not None:
            reasons[item] = why
    return dequantized_source(source, reasons) if reasons else source


def _why_dequantized(config: ModelConfig, source: ModelSource, blocks: GgufBlocks) -> str | None:
    weights, is_saved = config.quant_config.weights, source.kind == "engine"
    on_cpu = config.device == "cpu"
    if not on_cpu and config.backend == "tensorrt":
        return "TensorRT has no products with them"
    if weights != "none":
        return None if is_saved else f"quant_config asks for {weights}"
    if config.dtype != "auto":
        return f"dtype={config.dtype!r}"
    if not on_cpu:
        from llmengine.kernels.packed_gguf import why_not_packed

        return why_not_packed(blocks)
    if is_saved:
        return None
    from llmengine.backends.cpu.native import why_not_multiplied

    return why_not_multiplied(blocks)


def _why_not_kept(config: ModelConfig, weight_format: WeightFormat) -> str | None:
    if config.device == "cpu" or config.backend == "tensorrt" or weight_format == DENSE:
        return None
    from llmengine.kernels.packed_weights import is_packed
    from llmengine.kernels.scaled_weights import has_scaled_products

    has_products = has_scaled_products(weight_format) or is_packed(weight_format)
    return None if has_products else "no kernel multiplies by its groups"

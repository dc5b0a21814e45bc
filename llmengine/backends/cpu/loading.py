"""The start of the CPU backend: the native library, the weights, the KV cache, and what runs the steps."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import torch

from llmengine.backends.cpu.attention import LayerAttention, PagedAttention
from llmengine.backends.cpu.backend import CpuBackend, CpuParts, trim_heap
from llmengine.backends.cpu.forward_pass import ForwardPass
from llmengine.backends.cpu.kv_store import AttentionShape
from llmengine.backends.cpu.native import BYTE_KV_MULTIPLE, MAX_BYTE_HEAD_DIM, NativeDecoder, looks_up, multiplies
from llmengine.backends.cpu.native_library import (
    NATIVE_DIRECTORY,
    NativeLibrary,
    NativeUnavailableError,
    load_native_library,
)
from llmengine.backends.cpu.step_inputs import BlockTables
from llmengine.backends.cpu.weights import CpuModel, load_cpu_model
from llmengine.backends.kv_layout import KvLayout, KvPool, byte_kv_layout, context_limit, fit_kv_pool, split_kv_layout
from llmengine.batch import BackendInfo
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.models.arch import ModelArch
from llmengine.models.rope import layer_tables
from llmengine.quantization.formats import DENSE
from llmengine.quantization.model_formats import ModelFormats

_logger = logging.getLogger("llmengine.backends.cpu.backend")

_DEFAULT_FRACTION = 0.2
"""Share of the free memory that the KV cache takes unless told otherwise."""


def load_cpu_backend(config: ModelConfig, source: ModelSource, native_directory: Path = NATIVE_DIRECTORY) -> CpuBackend:
    """Load a model; the backend belongs to the calling thread.

    Args:
        config: resolved.
        native_directory: where the native library is looked for.

    Raises what `backends.load_backend` raises.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    limit = context_limit(config, source.arch)
    why_not_native = _why_not_native(config, source.arch, limit, source.formats)
    try:
        library = load_native_library(native_directory, borrowed_threads=why_not_native is not None)
    except NativeUnavailableError as error:
        library, why_not_native = None, str(error)
    try:
        return CpuBackend(_load_parts(config, source, limit, library, why_not_native))
    except BaseException:
        if library is not None:
            library.close()
        raise


def _load_parts(
    config: ModelConfig, source: ModelSource, limit: int, library: NativeLibrary | None, why_not_native: str | None
) -> CpuParts:
    arch = source.arch
    with torch.inference_mode():
        # The fastest format is measured, so it need not be the same the next time.
        row_major = why_not_native is None or config.deterministic
        model = load_cpu_model(config, source, library, row_major=row_major)
        pool = cpu_kv_pool(config, arch, limit)
        attention = paged_attention(arch, model, pool)
        native = None
        if library is not None and why_not_native is None:
            assert model.embed is not None
            assert model.lm_head is not None
            native = NativeDecoder(
                library,
                arch,
                embedding=model.embed.source,
                norms={name: norm.weight for name, norm in model.norms.items()},
                linears=model.linears,
                lm_head=model.lm_head,
                attention=attention,
                max_context=pool.max_model_len,
            )
            native_text = f"{_native_steps(native)} in the native decoder ({library.variant})"
        else:
            native_text = f"no native decoder: {why_not_native}"
    trim_heap()
    info = cpu_info(config, source, model, pool, native_text)
    _logger.info("%s; KV cache of %d tokens", info.description, pool.num_tokens)
    tables = BlockTables(config.scheduler_config.max_batch_size, pool.max_blocks_per_request)
    return CpuParts(
        info, model, ForwardPass(model, attention, tables), native, library, tables, deterministic=config.deterministic
    )


def cpu_info(config: ModelConfig, source: ModelSource, model: CpuModel, pool: KvPool, steps: str) -> BackendInfo:
    """Facts about a loaded model; `steps` says what runs its steps."""
    layout = pool.layout
    return BackendInfo(
        description=f"torch {torch.__version__}, cpu with {torch.get_num_threads()} threads, {model.description}"
        + (f" ({source.dequantized})" if source.dequantized else "")
        + f", {steps}"
        + f", KV cache in {layout.kv_dtype}"
        + (", deterministic" if config.deterministic else ""),
        vocab_size=source.arch.vocab_size,
        max_model_len=pool.max_model_len,
        num_blocks=pool.num_blocks,
        block_size=layout.block_size,
        kv_bytes_per_block=layout.bytes_per_block,
        kv_dtype=layout.kv_dtype,
        weight_bytes=model.size_bytes,
        max_steps_in_flight=1,
        has_prompt_logprobs=True,
    )


def paged_attention(arch: ModelArch, model: CpuModel, pool: KvPool) -> PagedAttention:
    """Attention over a new KV cache of the pool's size."""
    tables = layer_tables(arch, pool.max_model_len)
    layers = [
        LayerAttention(tables[index], arch.layer(index).sliding_window, *model.qk_norms[index])
        for index in range(arch.num_layers)
    ]
    return PagedAttention(_attention_shape(arch), pool, layers)


def cpu_kv_layout(config: ModelConfig, arch: ModelArch) -> KvLayout:
    """What a KV block of this backend consists of."""
    block_size, number_format = config.kv_cache_config.block_size, config.quant_config.kv_cache
    if number_format == "none":
        return split_kv_layout(arch, block_size)
    return byte_kv_layout(arch, block_size, number_format)


def cpu_kv_pool(config: ModelConfig, arch: ModelArch, limit: int) -> KvPool:
    """The KV cache that the memory holds now; arguments and errors are those of `fit_kv_pool`."""
    free_bytes = psutil.virtual_memory().available
    return fit_kv_pool(cpu_kv_layout(config, arch), config, limit, free_bytes, _DEFAULT_FRACTION)


def _why_not_native(config: ModelConfig, arch: ModelArch, limit: int, formats: ModelFormats) -> str | None:
    """What the native decoder lacks for a model, None if nothing."""
    if not arch.is_llama(limit):
        return f"it does not compute {arch.architecture} with contexts of {limit} tokens"
    if (lacking_kv := _why_no_native_kv(config, arch)) is not None:
        return lacking_kv
    lacking = sorted({str(item) for item in formats.in_use if not multiplies(item)})
    if lacking:
        return f"it does not multiply {', '.join(lacking)} weights"
    embedding = formats.of("embed_tokens")
    return None if embedding == DENSE or looks_up(embedding) else f"it does not look up rows of {embedding} embeddings"


def _why_no_native_kv(config: ModelConfig, arch: ModelArch) -> str | None:
    number_format, block_size = config.quant_config.kv_cache, config.kv_cache_config.block_size
    if number_format == "fp8":
        return "it has no fp8 KV cache"
    if number_format == "int8" and (
        block_size % BYTE_KV_MULTIPLE or arch.head_dim % BYTE_KV_MULTIPLE or arch.head_dim > MAX_BYTE_HEAD_DIM
    ):
        return (
            f"its int8 KV cache needs blocks of a multiple of {BYTE_KV_MULTIPLE} tokens, not {block_size}, and heads "
            f"of a multiple of {BYTE_KV_MULTIPLE} and at most {MAX_BYTE_HEAD_DIM} dimensions, not {arch.head_dim}"
        )
    return None


def _native_steps(native: NativeDecoder) -> str:
    return "steps" if native.max_tokens is None else f"steps of up to {native.max_tokens} tokens"


def _attention_shape(arch: ModelArch) -> AttentionShape:
    return AttentionShape(
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        score_scale=arch.score_scale,
        soft_cap=arch.attention_soft_cap,
    )

"""The start of the CUDA backend: parts are built in order, each one finished before the next one uses it.

::

    sizes ─▶ weights (room) ─▶ model ─▶ KV pool (how many blocks) ─▶ step program (KV cache, buffers)
          ─▶ weights (values) beside compiled kernels ─▶ tuning ─▶ graphs ─▶ backend
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch

from llmengine.backends.cuda.backend import CudaBackend, CudaParts
from llmengine.backends.cuda.buckets import Bucket, BucketSizes
from llmengine.backends.cuda.following import Run, Tell
from llmengine.backends.cuda.fused_segments import SegmentsFactory
from llmengine.backends.cuda.generic_segments import build_cuda_segments
from llmengine.backends.cuda.graphs import GraphCache
from llmengine.backends.cuda.memory_errors import memory_error_context
from llmengine.backends.cuda.model import CudaModel, build_cuda_model
from llmengine.backends.cuda.peers import Peers
from llmengine.backends.cuda.stage_link import StageLink
from llmengine.backends.cuda.step_program import StepProgram
from llmengine.backends.cuda.stream import CudaStream, HostStream, StepStream
from llmengine.backends.cuda.warmup import GraphWarmup, load_and_compile, tune
from llmengine.backends.cuda.weights import allocate_weights
from llmengine.backends.kv_layout import KvLayout, KvPool, context_limit, fit_kv_pool, joint_kv_layout
from llmengine.batch import BackendInfo
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.dtypes import dtype_name
from llmengine.errors import ConfigError
from llmengine.models.arch import ModelArch

_logger = logging.getLogger("llmengine.backends.cuda.backend")

_DEFAULT_FRACTION = 0.9
"""Share of the free memory that the KV cache takes unless told otherwise."""

STEPS_IN_FLIGHT = 8
"""Most steps that are launched and not collected; of a pipeline, each of them is as many as there are stages."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How one rank of several loads its part of a model.

    Attributes:
        peers: those that have the other shards of its stage; None if it has all of it.
        link: its place among the stages; None if there is one.
        agree: (layout, most tokens of a request, free bytes of the device) of this rank -> its pool, of as many blocks
            as on every other rank.
        await_others: called when all is ready but graphs; returns when it is on the other ranks.
        tell: on rank 0, tells the others what it queues.
    """

    peers: Peers | None
    link: StageLink | None
    agree: Callable[[KvLayout, int, int], KvPool]
    await_others: Callable[[], None]
    tell: Tell | None


_KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Dtypes by `quant_config.kv_cache`; a cache that is not quantized has the dtype of the activations."""

_KV_CAPABILITIES = {"int8": (8, 0), "fp8": (8, 9)}
"""The compute capabilities from which on GPUs multiply in bfloat16, and convert e4m3."""


def check_kv_cache(config: ModelConfig, device: torch.device) -> None:
    """Raise `ConfigError` for a KV cache whose numbers the device cannot convert."""
    needed = _KV_CAPABILITIES.get(config.quant_config.kv_cache)
    if needed is None or (found := torch.cuda.get_device_capability(device)) >= needed:
        return
    usable = [name for name, capability in _KV_CAPABILITIES.items() if capability <= found]
    raise ConfigError(
        f"quant_config.kv_cache={config.quant_config.kv_cache!r} needs compute capability {needed[0]}.{needed[1]}; "
        f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: use {(usable or ['none'])[0]!r}"
    )


def load_cuda_backend(
    config: ModelConfig,
    source: ModelSource,
    device: torch.device,
    segments_factory: SegmentsFactory = build_cuda_segments,
) -> CudaBackend:
    """Load a model; the backend belongs to the calling thread. See `load_cuda_parts`."""
    return CudaBackend(load_cuda_parts(config, source, device, segments_factory))


def load_cuda_parts(
    config: ModelConfig,
    source: ModelSource,
    device: torch.device,
    segments_factory: SegmentsFactory,
    sharing: Sharing | None = None,
) -> CudaParts:
    """Build the parts of a backend that is ready for its first step.

    On a CPU device (with Triton's interpreter) everything is the same but for graphs and compiling ahead, for tests.

    Args:
        config: resolved.
        segments_factory: builds what computes between the attentions.
        sharing: if `source` is a part of a model, whose other parts other ranks load at the same time.

    Raises:
        OutOfMemoryError: weights, activations or a useful KV cache do not fit.
        ConfigError: the configuration asks for what the device or the model does not have.
        UnsupportedModelError: the model is larger than the kernels take.
        CorruptFileError: weights are damaged.
    """
    _claim_thread(device)
    sizes = BucketSizes.of(config.scheduler_config, only_mixed=config.deterministic)
    limit = context_limit(config, source.arch)
    with torch.inference_mode():
        model = _allocate_model(config, source, device, limit, segments_factory, sharing)
        layout = cuda_kv_layout(config, source.arch, model.dtype)
        if sharing is None:
            pool = fit_cuda_pool(layout, config, limit, _free_bytes(device))
        else:
            pool = sharing.agree(layout, limit, _free_bytes(device))
        component = f"KV cache: {pool.size_bytes / 2**20:.0f} MiB, and what steps need beside it,"
        tell = None if sharing is None else sharing.tell
        steps_in_flight = STEPS_IN_FLIGHT * config.parallel_config.pp_size
        depth = steps_in_flight + 1  # one more is being written
        with memory_error_context(component, device, "lower kv_cache_config.free_memory_fraction"):
            program = StepProgram.allocate(model, pool, config, depth, tell)
            load_and_compile(program, sizes, source)
            tune(program, config.tuning_budget_s)
            stream: StepStream = CudaStream.open(depth) if device.type == "cuda" else HostStream()
            if sharing is not None:
                sharing.await_others()
            graphs: GraphCache[Bucket] = GraphCache(device, stream, None if tell is None else _announcing(tell))
            warmup = GraphWarmup(program, graphs, sizes, stream)
            if device.type == "cuda" and (sharing is None or tell is not None):
                warmup.capture_first()
    info = replace(_info(config, source, model, pool, device), max_steps_in_flight=steps_in_flight)
    _logger.info("%s; KV cache of %d tokens", info.description, pool.num_tokens)
    return CudaParts(device, info, sizes, pool, program, stream, graphs, warmup)


def cuda_kv_layout(config: ModelConfig, arch: ModelArch, dtype: torch.dtype) -> KvLayout:
    """What a KV block consists of, with activations of `dtype`."""
    kv_dtype = _KV_DTYPES.get(config.quant_config.kv_cache, dtype)
    return joint_kv_layout(arch, config.kv_cache_config.block_size, kv_dtype)


def fit_cuda_pool(layout: KvLayout, config: ModelConfig, limit: int, free_bytes: int) -> KvPool:
    """Size the KV cache on a device with so many free bytes; see `fit_kv_pool`."""
    return fit_kv_pool(layout, config, limit, free_bytes, _DEFAULT_FRACTION)


def _announcing(tell: Tell) -> Callable[[Bucket, bool], None]:
    """Tells the other ranks of each step before it is queued."""
    return lambda bucket, captures: tell(Run(bucket, captures))


def _claim_thread(device: torch.device) -> None:
    """Make a device, and a new stream on it that nothing else uses, the current ones of the calling thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))


def _allocate_model(
    config: ModelConfig,
    source: ModelSource,
    device: torch.device,
    limit: int,
    segments_factory: SegmentsFactory,
    sharing: Sharing | None,
) -> CudaModel:
    """Allocate weights and activations, and build the model on them."""
    weights = allocate_weights(config, source, device)
    scheduler = config.scheduler_config
    peers, link = (None, None) if sharing is None else (sharing.peers, sharing.link)
    limits = f"max_tokens_per_step={scheduler.max_tokens_per_step} and max_batch_size={scheduler.max_batch_size}"
    with memory_error_context(f"activations: buffers for {limits}", device, "lower these of scheduler_config"):
        return build_cuda_model(source.arch, weights, config, limit, segments_factory, peers, link)


def _info(
    config: ModelConfig, source: ModelSource, model: CudaModel, pool: KvPool, device: torch.device
) -> BackendInfo:
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    formats = [*dict.fromkeys(str(matrix.format) for matrix in model.weights.quantized.values())]
    weights = f"{', '.join([*formats, dtype_name(model.dtype)])} weights"
    if source.dequantized:
        weights += f", {source.dequantized}"
    return BackendInfo(
        description=f"torch {torch.__version__}, {name}, {weights}, {model.description}"
        + f", KV cache in {pool.layout.kv_dtype}"
        + (", deterministic" if config.deterministic else ""),
        vocab_size=model.logits.shape[1],
        max_model_len=pool.max_model_len,
        num_blocks=pool.num_blocks,
        block_size=pool.layout.block_size,
        kv_bytes_per_block=pool.layout.bytes_per_block,
        kv_dtype=pool.layout.kv_dtype,
        weight_bytes=model.weights.size_bytes,
        has_prompt_logprobs=True,
    )


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]

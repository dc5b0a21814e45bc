"""A dense decoder on CUDA: weights on the device, paged attention, one forward pass for any bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.torch.cuda_segments import FusedSegments
from llmengine.backends.torch.cuda_step import Bucket
from llmengine.config import ModelConfig
from llmengine.errors import ConfigError, OutOfMemoryError
from llmengine.kernels.attention import (
    AttentionConfig,
    attention_workspace,
    decode_attention,
    prefill_attention,
    query_block_size,
    rope_and_write,
)
from llmengine.kernels.step import DeviceStep, SlotState, begin_step
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.models.decoder import Attend, Segments, forward
from llmengine.models.rope import rope_table
from llmengine.models.source import ModelSource

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class CudaWeights:
    """All weights on the device by canonical name; matrices are [out_features, in_features], row-major."""

    by_name: dict[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self.by_name.values())

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the canonical weights, one copy in host memory at a time."""
        for name, tensor in self.by_name.items():
            yield name, tensor.cpu()


def allocate_weights(config: ModelConfig, source: ModelSource, device: torch.device) -> CudaWeights:
    """Return room for all weights of `source` on the device, not filled yet.

    Raises `ConfigError` for quantized weights, `OutOfMemoryError` if they do not fit.
    """
    if "int8" in (config.quant_config.weights, source.quantization.get("weights")):
        raise ConfigError("quant_config.weights='int8' is not available on CUDA in this version; use 'none'")
    dtype = _DTYPES[source.checkpoint_dtype if config.dtype == "auto" else config.dtype]
    shapes = canonical_shapes(source.arch)
    try:
        return CudaWeights({name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()})
    except torch.OutOfMemoryError as failure:
        free, total = torch.cuda.mem_get_info(device)
        needed = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        raise OutOfMemoryError(
            f"weights: {needed / 2**20:.0f} MiB in {dtype} do not fit on {device}, {free / 2**20:.0f} of "
            f"{total / 2**20:.0f} MiB were left when it was full; choose a smaller dtype or model, or free memory there"
        ) from failure


def load_weights(weights: CudaWeights, source: ModelSource) -> None:
    """Stream the weights of `source` into their places; host memory peaks at one fused tensor."""
    for name, tensor in source.weights(next(iter(weights.by_name.values())).dtype):
        weights.by_name[name].copy_(tensor)


class CudaModel:
    """A decoder's weights, its forward pass for any bucket, and the buffers of the largest step.

    Attributes:
        logits: fp32 [max_batch_size, vocab], the last step's; at a fixed address.
        query_block: query tokens of a program of the prefill attention.
    """

    def __init__(self, arch: ModelArch, weights: CudaWeights, config: ModelConfig, limit: int) -> None:
        self.weights = weights
        self.embedding = weights.by_name["embed_tokens.weight"]
        device, dtype = self.embedding.device, self.embedding.dtype
        self._attention = AttentionConfig(
            arch.num_heads, arch.num_kv_heads, arch.head_dim, config.kv_cache_config.block_size
        )
        self.query_block = query_block_size(self._attention, dtype)
        max_tokens = config.scheduler_config.max_tokens_per_step
        self._hidden = torch.zeros((max_tokens, arch.hidden_size), dtype=dtype, device=device)
        self._attended = torch.zeros((max_tokens, arch.num_heads * arch.head_dim), dtype=dtype, device=device)
        self._rope = rope_table(arch.rope, arch.head_dim, limit).to(device)
        self._workspace = attention_workspace(self._attention, _num_sms(device), device)
        self._pdl = _has_pdl(device)
        max_rows = config.scheduler_config.max_batch_size
        self.logits = torch.zeros((max_rows, arch.vocab_size), dtype=torch.float32, device=device)
        fused = FusedSegments(arch, weights.by_name, config.scheduler_config, self.logits, self._pdl)
        fused.tune(config.tuning_budget_s)
        self._segments: Segments = fused

    def forward(self, step: DeviceStep, state: SlotState, kv: Tensor, bucket: Bucket) -> Tensor:
        """Return fp32 logits [bucket.num_samples, vocab] of the step's sampled tokens; write the KV of all tokens.

        Nothing in it allocates or looks at a value, so that a CUDA graph can hold it.

        Args:
            kv: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim].
        """
        x = self._hidden[: bucket.num_tokens]
        begin_step(step, state, self.embedding, x)
        sample_tokens = step.sample_tokens[: bucket.num_samples] if bucket.mixed else None
        logits = forward(self._segments, x, self._attend(step, kv, bucket), sample_tokens)
        assert logits is not None, "a bucket has samples"
        return logits

    def _attend(self, step: DeviceStep, kv: Tensor, bucket: Bucket) -> Attend:
        config, attended, pdl = self._attention, self._attended[: bucket.num_tokens], self._pdl

        def attend(layer: int, qkv: Tensor) -> Tensor:
            if bucket.mixed:
                rope_and_write(step, qkv, kv[layer], self._rope, config, pdl=pdl)
                prefill_attention(step, qkv, kv[layer], config, attended, pdl=pdl)
            decode_attention(step, qkv, kv[layer], self._rope, config, attended, self._workspace, pdl=pdl)
            return attended

        return attend


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

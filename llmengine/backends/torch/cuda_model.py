"""A dense decoder on CUDA: weights on the device, paged attention, one forward pass for any bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.torch.cuda_generic import head_norm
from llmengine.backends.torch.cuda_segments import MakeSegments, SegmentsContext
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
from llmengine.models.arch import ModelArch
from llmengine.models.decoder import Attend, forward
from llmengine.models.fused import weight_layout
from llmengine.models.rope import layer_tables
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
    layout = weight_layout(source.arch, str(dtype).removeprefix("torch."), {})
    try:
        return CudaWeights(
            {
                name: torch.empty(shape, dtype=getattr(torch, stored), device=device)
                for name, (stored, shape) in layout.items()
            }
        )
    except torch.OutOfMemoryError as failure:
        free, total = torch.cuda.mem_get_info(device)
        needed = sum(torch.Size(shape).numel() for _, shape in layout.values()) * dtype.itemsize
        raise OutOfMemoryError(
            f"weights: {needed / 2**20:.0f} MiB in {dtype} do not fit on {device}, {free / 2**20:.0f} of "
            f"{total / 2**20:.0f} MiB were left when it was full; choose a smaller dtype or model, or free memory there"
        ) from failure


def load_weights(weights: CudaWeights, source: ModelSource) -> None:
    """Stream the weights of `source` into their places; host memory peaks at one fused tensor."""
    for name, tensor in source.weights(weights.by_name["embed_tokens.weight"].dtype):
        weights.by_name[name].copy_(tensor)


@dataclass(frozen=True, slots=True)
class _LayerAttention:
    """What a layer's attention has of its own; see `kernels.attention`.

    Attributes:
        projection_norms: of all of q and all of k, in place, ahead of the kernels.
    """

    config: AttentionConfig
    rope_table: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    projection_norms: tuple[Callable[[Tensor], None], ...]


class CudaModel:
    """A decoder's weights, its forward pass for any bucket, and the buffers of the largest step.

    Attributes:
        logits: fp32 [max_batch_size, vocab], the last step's; at a fixed address.
        query_block: query tokens of a program of the prefill attention.
        made: what computes between the attentions.
    """

    def __init__(
        self, arch: ModelArch, weights: CudaWeights, config: ModelConfig, limit: int, make_segments: MakeSegments
    ) -> None:
        self.weights = weights
        self.embedding = weights.by_name["embed_tokens.weight"]
        device, dtype = self.embedding.device, self.embedding.dtype
        self._arch = arch
        self._layers = _attention_layers(arch, weights, config.kv_cache_config.block_size, limit)
        attention = self._layers[0].config
        self.query_block = query_block_size(attention, dtype)
        max_tokens = config.scheduler_config.max_tokens_per_step
        self._hidden = torch.zeros((max_tokens, arch.hidden_size), dtype=dtype, device=device)
        self._attended = torch.zeros((max_tokens, arch.num_heads * arch.head_dim), dtype=dtype, device=device)
        self._workspace = attention_workspace(attention, _num_sms(device), device)
        self._pdl = _has_pdl(device)
        max_rows = config.scheduler_config.max_batch_size
        self.logits = torch.zeros((max_rows, arch.vocab_size), dtype=torch.float32, device=device)
        context = SegmentsContext(arch, weights.by_name, config, self.logits, self._pdl)
        self.made = make_segments(context)

    def forward(self, step: DeviceStep, state: SlotState, kv: Tensor, bucket: Bucket) -> Tensor:
        """Return fp32 logits [bucket.num_samples, vocab] of the step's sampled tokens; write the KV of all tokens.

        Nothing in it looks at a value, and what some segments allocate is torch's, so that a CUDA graph can hold it.

        Args:
            kv: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim].
        """
        x = self._hidden[: bucket.num_tokens]
        begin_step(step, state, self.embedding, x)
        if self._arch.embedding_scale != 1.0:
            x.mul_(self._arch.embedding_scale)
        sample_tokens = step.sample_tokens[: bucket.num_samples] if bucket.mixed else None
        logits = forward(self.made.segments, x, self._attend(step, kv, bucket), sample_tokens)
        assert logits is not None, "a bucket has samples"
        return logits

    def _attend(self, step: DeviceStep, kv: Tensor, bucket: Bucket) -> Attend:
        arch, attended, pdl = self._arch, self._attended[: bucket.num_tokens], self._pdl
        sizes = (arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            own = self._layers[layer]
            for norm, part in zip(own.projection_norms, qkv.split((*sizes, sizes[1]), dim=1), strict=False):
                norm(part)
            norms, eps = (own.q_norm, own.k_norm), arch.rms_norm_eps
            if bucket.mixed:
                rope_and_write(step, qkv, kv[layer], own.rope_table, own.config, *norms, eps, pdl=pdl)
                prefill_attention(step, qkv, kv[layer], own.config, attended, pdl=pdl)
            decode_attention(
                step, qkv, kv[layer], own.rope_table, own.config, attended, self._workspace, *norms, eps, pdl=pdl
            )
            return attended

        return attend


def _attention_layers(arch: ModelArch, weights: CudaWeights, block_size: int, limit: int) -> list[_LayerAttention]:
    device = weights.by_name["embed_tokens.weight"].device
    on_host = layer_tables(arch, limit)
    tables = {id(table): table.to(device) for table in on_host}
    layers = []
    for index, table in enumerate(on_host):
        window = arch.layer(index).sliding_window or limit
        config = AttentionConfig(
            arch.num_heads,
            arch.num_kv_heads,
            arch.head_dim,
            block_size,
            scale=arch.score_scale,
            sliding_window=window if window < limit else 0,
            soft_cap=arch.attention_soft_cap or 0.0,
        )
        q_norm, k_norm = (weights.by_name.get(f"layers.{index}.{name}_norm.weight") for name in ("q", "k"))
        projection_norms: tuple[Callable[[Tensor], None], ...] = ()
        if arch.qk_norm == "projection" and q_norm is not None and k_norm is not None:
            projection_norms = (head_norm(q_norm, arch.rms_norm_eps), head_norm(k_norm, arch.rms_norm_eps))
            q_norm = k_norm = None
        layers.append(_LayerAttention(config, tables[id(table)], q_norm, k_norm, projection_norms))
    return layers


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

"""A dense decoder on CUDA: weights on the device, activations at fixed addresses, one forward pass for any bucket.

Nothing in `CudaModel.forward` allocates or looks at a value, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
from llmengine.kernels.gemm_choice import ROW_BUCKETS, CudaTimer, cuda_choices
from llmengine.kernels.linear import BoundLinear, GemmShape, LinearKernels, LinearOps, Operation
from llmengine.kernels.step import DeviceStep, SlotState, begin_step
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.models.rope import rope_table
from llmengine.models.source import ModelSource

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_OPERATIONS: dict[str, Operation] = {
    "qkv": "norm_linear",
    "o": "linear_add",
    "gate_up": "norm_linear_silu",
    "down": "linear_add",
}
"""A layer's matrices, and what each is used in."""


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


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's products with their weights bound: (input, where the result goes)."""

    qkv: BoundLinear
    o: BoundLinear
    gate_up: BoundLinear
    down: BoundLinear


class CudaModel:
    """Weights, activation buffers for the largest step, and the forward pass."""

    def __init__(self, arch: ModelArch, weights: CudaWeights, config: ModelConfig, limit: int) -> None:
        scheduler = config.scheduler_config
        max_tokens, max_rows = scheduler.max_tokens_per_step, scheduler.max_batch_size
        tensors = weights.by_name
        self.embedding = tensors["embed_tokens.weight"]
        device, dtype = self.embedding.device, self.embedding.dtype

        def buffer(rows: int, columns: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros((rows, columns), dtype=dtype, device=device)

        heads, kv_heads, head_dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
        self.weights = weights
        self.attention = AttentionConfig(heads, kv_heads, head_dim, config.kv_cache_config.block_size)
        self.query_block = query_block_size(self.attention, dtype)
        self.logits = buffer(max_rows, arch.vocab_size, torch.float32)
        self._rope = rope_table(arch.rope, head_dim, limit).to(device)
        self._workspace = attention_workspace(self.attention, _num_sms(device), device)
        self._hidden = buffer(max_tokens, arch.hidden_size)
        self._qkv = buffer(max_tokens, (heads + 2 * kv_heads) * head_dim)
        self._attended = buffer(max_tokens, heads * head_dim)
        self._inner = buffer(max_tokens, arch.intermediate_size)
        self._sampled = buffer(max_rows, arch.hidden_size)
        self._pdl = _has_pdl(device)
        self._kernels = LinearKernels(device, pdl=self._pdl)
        self._choices = cuda_choices(self._kernels, device) if device.type == "cuda" else None
        ops = LinearOps(self._kernels, self._choices.choose if self._choices is not None else _plain)
        self._layers = [
            _bind_layer(ops, tensors, f"layers.{index}.", arch.rms_norm_eps) for index in range(arch.num_layers)
        ]
        head = self.embedding if arch.tie_word_embeddings else tensors["lm_head.weight"]
        self._lm_head = ops.norm_linear(tensors["final_norm.weight"], arch.rms_norm_eps, head)

    def tune(self, budget_s: float) -> None:
        """Measure which products are fastest for the model's shapes, those of the smallest steps first.

        Takes device memory for a copy of the largest matrix; gives it back.
        """
        if self._choices is None or not budget_s:
            return
        dtype, tensors = self.embedding.dtype, self.weights.by_name
        shapes: list[GemmShape] = []
        for rows in ROW_BUCKETS:
            for name, operation in _OPERATIONS.items():
                n, k = tensors[f"layers.0.{name}.weight"].shape
                n = n // 2 if operation == "norm_linear_silu" else n
                shapes.append(GemmShape(operation, rows, n, k, dtype, dtype))
            vocab, hidden = self.embedding.shape
            shapes.append(GemmShape("norm_linear", rows, vocab, hidden, dtype, torch.float32))
        self._choices.measure(shapes, budget_s, CudaTimer(self._kernels, self.embedding.device))
        torch.cuda.empty_cache()

    def forward(self, step: DeviceStep, state: SlotState, kv: Tensor, bucket: Bucket) -> Tensor:
        """Return fp32 logits [bucket.num_samples, vocab] of the step's sampled tokens; write the KV of all tokens.

        Args:
            kv: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim].
        """
        x, qkv, attended, inner = (
            buffer[: bucket.num_tokens] for buffer in (self._hidden, self._qkv, self._attended, self._inner)
        )
        begin_step(step, state, self.embedding, x)
        for index, layer in enumerate(self._layers):
            layer.qkv(x, qkv)
            if bucket.mixed:
                rope_and_write(step, qkv, kv[index], self._rope, self.attention, pdl=self._pdl)
                prefill_attention(step, qkv, kv[index], self.attention, attended, pdl=self._pdl)
            decode_attention(step, qkv, kv[index], self._rope, self.attention, attended, self._workspace, pdl=self._pdl)
            layer.o(attended, x)
            layer.gate_up(x, inner)
            layer.down(inner, x)
        if bucket.mixed:
            sampled = self._sampled[: bucket.num_samples]
            x = torch.index_select(x, 0, step.sample_tokens[: bucket.num_samples], out=sampled)
        logits = self.logits[: bucket.num_samples]
        self._lm_head(x, logits)
        return logits


def _bind_layer(ops: LinearOps, tensors: dict[str, Tensor], prefix: str, eps: float) -> _Layer:
    def get(name: str) -> Tensor:
        return tensors[prefix + name]

    def bias(name: str) -> Tensor | None:
        return tensors.get(prefix + name)

    return _Layer(
        qkv=ops.norm_linear(get("input_norm.weight"), eps, get("qkv.weight"), bias("qkv.bias")),
        o=ops.linear_add(get("o.weight"), bias("o.bias")),
        gate_up=ops.norm_linear_silu(
            get("post_attention_norm.weight"), eps, get("gate_up.weight"), bias("gate_up.bias")
        ),
        down=ops.linear_add(get("down.weight"), bias("down.bias")),
    )


def _plain(_: GemmShape) -> None:
    """Choose torch's product: there is no device to measure on."""


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

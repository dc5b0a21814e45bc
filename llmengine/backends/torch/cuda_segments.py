"""A decoder's dense compute on CUDA: fused kernels, with activations at fixed addresses so that graphs can hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.config import SchedulerConfig
from llmengine.kernels.gemm_choice import ROW_BUCKETS, CudaTimer, cuda_choices
from llmengine.kernels.linear import BoundLinear, GemmShape, LinearKernels, LinearOps, Operation
from llmengine.models.arch import ModelArch

_OPERATIONS: dict[str, Operation] = {
    "qkv": "norm_linear",
    "o": "linear_add",
    "gate_up": "norm_linear_silu",
    "down": "linear_add",
}
"""A layer's matrices, and what each is used in."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's products with their weights bound: (input, where the result goes)."""

    qkv: BoundLinear
    o: BoundLinear
    gate_up: BoundLinear
    down: BoundLinear


class FusedSegments:
    """`models.decoder.Segments`; nothing in it allocates or looks at a value.

    Args:
        tensors: canonical weights on the device.
        logits: fp32 [max_batch_size, vocab], where `last` leaves its result.
        pdl: kernels may start before those ahead of them have ended.
    """

    def __init__(
        self, arch: ModelArch, tensors: dict[str, Tensor], scheduler: SchedulerConfig, logits: Tensor, pdl: bool
    ) -> None:
        max_tokens, max_rows = scheduler.max_tokens_per_step, scheduler.max_batch_size
        embedding = tensors["embed_tokens.weight"]
        self._device, dtype = embedding.device, embedding.dtype

        def buffer(rows: int, columns: int) -> Tensor:
            return torch.zeros((rows, columns), dtype=dtype, device=self._device)

        q_size = arch.num_heads * arch.head_dim
        self._qkv = buffer(max_tokens, q_size + 2 * arch.num_kv_heads * arch.head_dim)
        self._inner = buffer(max_tokens, arch.intermediate_size)
        self._sampled_attended = buffer(max_rows, q_size)
        self._sampled_x = buffer(max_rows, arch.hidden_size)
        self._logits = logits
        self._kernels = LinearKernels(self._device, pdl=pdl)
        self._choices = cuda_choices(self._kernels, self._device) if self._device.type == "cuda" else None
        ops = LinearOps(self._kernels, self._choices.choose if self._choices is not None else _plain)
        self._layers = [
            _bind_layer(ops, tensors, f"layers.{index}.", arch.rms_norm_eps) for index in range(arch.num_layers)
        ]
        head = embedding if arch.tie_word_embeddings else tensors["lm_head.weight"]
        self._lm_head = ops.norm_linear(tensors["final_norm.weight"], arch.rms_norm_eps, head)
        self._shapes = [
            (operation, *tensors[f"layers.0.{name}.weight"].shape) for name, operation in _OPERATIONS.items()
        ]
        self._head_shape, self._dtype = head.shape, dtype

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def tune(self, budget_s: float) -> None:
        """Measure which products are fastest for the model's shapes, those of the smallest steps first.

        Takes device memory for a copy of the largest matrix; gives it back.
        """
        if self._choices is None or not budget_s:
            return
        shapes: list[GemmShape] = []
        for rows in ROW_BUCKETS:
            for operation, n, k in self._shapes:
                outputs = n // 2 if operation == "norm_linear_silu" else n
                shapes.append(GemmShape(operation, rows, outputs, k, self._dtype, self._dtype))
            vocab, hidden = self._head_shape
            shapes.append(GemmShape("norm_linear", rows, vocab, hidden, self._dtype, torch.float32))
        self._choices.measure(shapes, budget_s, CudaTimer(self._kernels, self._device))
        torch.cuda.empty_cache()

    def first(self, x: Tensor) -> Tensor:
        qkv = self._qkv[: len(x)]
        self._layers[0].qkv(x, qkv)
        return qkv

    def mid(self, layer: int, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        self._finish(layer, attended, x)
        qkv = self._qkv[: len(x)]
        self._layers[layer + 1].qkv(x, qkv)
        return x, qkv

    def last(self, attended: Tensor, x: Tensor, sample_tokens: Tensor | None) -> Tensor:
        if sample_tokens is not None:
            num_samples = len(sample_tokens)
            attended = torch.index_select(attended, 0, sample_tokens, out=self._sampled_attended[:num_samples])
            x = torch.index_select(x, 0, sample_tokens, out=self._sampled_x[:num_samples])
        self._finish(len(self._layers) - 1, attended, x)
        logits = self._logits[: len(x)]
        self._lm_head(x, logits)
        return logits

    def _finish(self, layer: int, attended: Tensor, x: Tensor) -> None:
        """Add to x what comes after the layer's attention."""
        inner = self._inner[: len(x)]
        self._layers[layer].o(attended, x)
        self._layers[layer].gate_up(x, inner)
        self._layers[layer].down(inner, x)


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

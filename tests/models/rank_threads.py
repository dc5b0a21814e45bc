"""Tensor parallelism with a thread for each rank: the decoder over every shard, and sums in memory of the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.checkpoints.sharded_source import format_units, shard_source
from llmengine.checkpoints.source import ModelSource
from llmengine.models.arch import ModelArch
from llmengine.models.causal_attention import CausalAttention
from llmengine.models.decoder import ACT_AND_MUL, DecoderLayer, Linear, Norm, TorchSegments, forward
from llmengine.models.rope import layer_tables
from llmengine.models.sharding import Shard, divided, vocabulary_range
from llmengine.quantization.model_formats import matrix_shapes

Sum = Callable[[Tensor], Tensor]


class Meeting:
    """Where ranks wait for one another."""

    def __init__(self, size: int) -> None:
        self._barrier = Barrier(size, timeout=60)
        self._given: dict[int, Tensor] = {}

    def gather(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """What all ranks give, in order."""
        self._given[rank] = tensor
        self._barrier.wait()
        tensors = [self._given[index] for index in sorted(self._given)]
        self._barrier.wait()
        return tensors


@dataclass(frozen=True)
class Product:
    """A linear, whose results over all ranks are added up if there is a `total`; residuals come once, afterwards."""

    weight: Tensor
    bias: Tensor | None
    total: Sum | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        y = y if self.total is None else self.total(y)
        return y if residual is None else y + residual


def dequantized(source: ModelSource) -> dict[str, Tensor]:
    """All weights in float32, matrices under their names less ".weight"."""
    shapes, stored = matrix_shapes(source.arch), dict(source.weights(torch.float32))
    weights = {}
    for matrix, shape in shapes.items():
        weight_format = source.formats.of(matrix)
        specs = weight_format.tensors(shape, "float32")
        weights[matrix] = weight_format.dequantize({suffix: stored.pop(f"{matrix}.{suffix}") for suffix in specs})
        assert weights[matrix].shape == shape
    return {**weights, **stored}


def layers_of(arch: ModelArch, weights: dict[str, Tensor], total: Sum | None) -> list[DecoderLayer]:
    def norm(name: str) -> Norm | None:
        weight = weights.get(f"{name}.weight")
        return None if weight is None else lambda x: F.rms_norm(x, weight.shape, weight, arch.rms_norm_eps)

    def linear(name: str, total: Sum | None = None) -> Linear:
        return Product(weights[name], weights.get(f"{name}.bias"), total)

    return [
        DecoderLayer(
            qkv=linear(f"{layer}.qkv"),
            o=linear(f"{layer}.o", total),
            gate_up=linear(f"{layer}.gate_up"),
            down=linear(f"{layer}.down", total),
            input_norm=norm(f"{layer}.input_norm"),
            attention_out_norm=norm(f"{layer}.attention_out_norm"),
            post_attention_norm=norm(f"{layer}.post_attention_norm"),
            mlp_out_norm=norm(f"{layer}.mlp_out_norm"),
        )
        for layer in (f"layers.{index}" for index in range(arch.num_layers))
    ]


def attentions_of(
    arch: ModelArch, weights: dict[str, Tensor], gather: Callable[[Tensor], list[Tensor]], ids: Sequence[range]
) -> list[CausalAttention]:
    """`ids` are the heads of keys that each rank has."""

    def head_norm(name: str) -> Norm | None:
        weight = weights.get(name)
        if weight is None:
            return None
        if arch.qk_norm == "projection":
            return lambda heads: norm_over_ranks(heads, weight, "k_norm" in name)
        return lambda heads: F.rms_norm(heads, weight.shape, weight, arch.rms_norm_eps)

    def norm_over_ranks(heads: Tensor, weight: Tensor, is_k: bool) -> Tensor:
        found = {(rank, head): part for rank, part in enumerate(gather(heads)) for head in range(part.shape[1])}
        every = {ids[rank][head] if is_k else (rank, head): part[:, head] for (rank, head), part in found.items()}
        mean_square = torch.cat(list(every.values()), dim=1).square().mean(dim=1)
        return heads * (mean_square + arch.rms_norm_eps).rsqrt()[:, None, None] * weight.view(heads.shape[1:])

    tables = layer_tables(arch, arch.max_position_embeddings)
    return [
        CausalAttention(
            arch,
            tables[index],
            head_norm(f"layers.{index}.q_norm.weight"),
            head_norm(f"layers.{index}.k_norm.weight"),
            arch.layer(index).sliding_window,
        )
        for index in range(arch.num_layers)
    ]


def rank_logits(
    source: ModelSource,
    ids: range,
    tokens: Tensor,
    gather: Callable[[Tensor], list[Tensor]],
    kv_heads: Sequence[range],
) -> Tensor:
    """One rank's logits, float32 [num_tokens, its vocabulary]; `source` is its shard, `ids` are its tokens.

    `kv_heads` are the heads of keys and values that each rank has.
    """
    arch, weights = source.arch, dequantized(source)

    def total(tensor: Tensor) -> Tensor:
        return torch.stack(gather(tensor)).sum(dim=0)

    is_own = (tokens >= ids.start) & (tokens < ids.stop)
    embedded = weights["embed_tokens"][(tokens - ids.start).clamp(0, len(ids) - 1)]
    x = total(embedded.masked_fill(~is_own[:, None], 0.0)) * arch.embedding_scale
    final_norm = weights["final_norm.weight"]
    segments = TorchSegments(
        layers_of(arch, weights, total),
        lambda x: F.rms_norm(x, final_norm.shape, final_norm, arch.rms_norm_eps),
        Product(weights["embed_tokens" if arch.tie_word_embeddings else "lm_head"], None, None),
        ACT_AND_MUL[arch.hidden_act],
        arch.logit_scale,
        arch.logit_soft_cap,
    )
    attentions = attentions_of(arch, weights, gather, kv_heads)
    logits = forward(segments, x, lambda layer, qkv: attentions[layer](qkv), None)
    assert logits is not None
    return logits


def logits_of(source: ModelSource, tokens: Sequence[int], size: int) -> Tensor:
    """Logits of a model that `size` ranks share, float32 [num_tokens, vocab]."""
    meeting = Meeting(size)
    kv_heads = [held.kv_heads for held in divided(source.arch, size, format_units(source.arch, source.formats))]

    def run(rank: int) -> Tensor:
        shard = Shard(rank, size)
        ids = vocabulary_range(source.arch, shard)
        with torch.inference_mode():
            return rank_logits(
                shard_source(source, shard),
                ids,
                torch.tensor(tokens),
                lambda tensor: meeting.gather(rank, tensor),
                kv_heads,
            )

    with ThreadPoolExecutor(size) as pool:
        return torch.cat(list(pool.map(run, range(size))), dim=1)

"""Canonical weights to a CPU decoder, and back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmengine.backends.cpu.linear import (
    MEASURED_TOKENS,
    ROW_MAJOR,
    Choice,
    CpuLinear,
    Int8Linear,
    dense_formats,
    fastest_format,
    quantize_int8,
)
from llmengine.backends.cpu.native import NativeInt8Linear, NativeLibrary
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.models.decoder import ACT_AND_MUL, DecoderLayer, Norm, TorchSegments
from llmengine.quantization.formats import INT8
from llmengine.quantization.model_formats import formats_in_use

_logger = logging.getLogger("llmengine.backends.cpu.backend")

_DTYPES = {"auto": torch.float32, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CpuNorm:
    """RMSNorm in fp32, in half of `F.rms_norm`'s time on a CPU: x * (weight * sqrt(n)) / sqrt(sum(x^2) + n * eps)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        size = weight.shape[0]
        self._scaled_weight = weight.float() * size**0.5
        self._floor = torch.tensor([(size * eps) ** 0.5])

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised [num_tokens, hidden], fp32."""
        length: Tensor = torch.linalg.vector_norm(x, 2, -1, True).hypot_(self._floor)
        return torch.mul(x, self._scaled_weight).div_(length)

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        return int(self._weight.nbytes + self._scaled_weight.nbytes)

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("weight", ...)."""
        yield "weight", self._weight


class CpuEmbedding:
    """Rows of the embedding times `scale`, as fp32."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        self.weight = weight
        self._scale = scale

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return a new fp32 tensor [num_tokens, hidden]."""
        rows = self.weight.index_select(0, token_ids).float()
        return rows if self._scale == 1.0 else rows.mul_(self._scale)

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        return self.weight.nbytes

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("weight", ...)."""
        yield "weight", self.weight


class _Part(Protocol):
    @property
    def size_bytes(self) -> int: ...

    def canonical(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True, slots=True)
class CpuModel:
    """A decoder, and its parts by canonical name (less ".weight"), in canonical order.

    Attributes:
        qk_norms: each layer's norms of q and k, of [num_tokens, heads, head_dim], for its attention.
    """

    embed: CpuEmbedding
    segments: TorchSegments
    lm_head: CpuLinear
    qk_norms: Sequence[tuple[Norm | None, Norm | None]]
    parts: Mapping[str, _Part]
    size_bytes: int
    description: str

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the canonical weights; packed ones are unpacked one at a time."""
        for name, part in self.parts.items():
            for suffix, tensor in part.canonical():
                yield f"{name}.{suffix}", tensor


def load_cpu_model(
    config: ModelConfig, source: ModelSource, library: NativeLibrary | None, *, row_major: bool
) -> CpuModel:
    """Stream the weights of `source` into the format that measures fastest; peak memory is the model and one matrix.

    With the native library int8 matrices are packed for it. With `row_major` others stay [out, in] as they came, as
    the native decoder takes them.

    Matrices that arrive as int8 with a `weight_scale` stay so; `quant_config.weights="int8"` quantizes the others. The
    embedding is never quantized, the output matrix is, also where an int8 engine ties the two.
    """
    formats = formats_in_use(source.formats, config.quant_config)
    loader = _Loader(config, source.arch, formats.default == INT8, library, row_major)
    for name, tensor in source.weights(_DTYPES[config.dtype]):
        loader.add(name, tensor)
    return loader.finish()


@dataclass(slots=True)
class _Loader:
    config: ModelConfig
    arch: ModelArch
    wants_int8: bool
    library: NativeLibrary | None
    row_major: bool
    norms: dict[str, CpuNorm] = field(default_factory=dict)
    linears: dict[str, CpuLinear] = field(default_factory=dict)
    embeddings: dict[str, CpuEmbedding] = field(default_factory=dict)
    arrived: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    num_int8: int = 0
    choice: Choice | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Take over one canonical tensor; a matrix is packed as soon as its scale and bias are there."""
        prefix, _, suffix = name.rpartition(".")
        if prefix == "embed_tokens":
            self.embeddings[prefix] = CpuEmbedding(tensor, self.arch.embedding_scale)
        elif prefix.endswith("norm"):
            self.norms[prefix] = CpuNorm(tensor, self.arch.rms_norm_eps)
        else:
            tensors = self.arrived.setdefault(prefix, {})
            tensors[suffix] = tensor
            if self._complete(prefix, tensors):
                self.linears[prefix] = self._pack(self.arrived.pop(prefix))

    def finish(self) -> CpuModel:
        """Bind everything into a decoder."""
        assert not self.arrived, f"incomplete: {sorted(self.arrived)}"
        arch, embedding = self.arch, self.embeddings["embed_tokens"]
        tied = self._pack({"weight": embedding.weight}) if arch.tie_word_embeddings else None
        lm_head = tied or self.linears["lm_head"]
        segments = TorchSegments(
            layers=[self._layer(f"layers.{index}.") for index in range(arch.num_layers)],
            final_norm=self.norms["final_norm"],
            lm_head=lm_head,
            act_and_mul=ACT_AND_MUL[arch.hidden_act],
            logit_scale=arch.logit_scale,
            logit_soft_cap=arch.logit_soft_cap,
        )
        unordered: dict[str, _Part] = {**self.embeddings, **self.norms, **self.linears}
        names = dict.fromkeys(name.rpartition(".")[0] for name in canonical_shapes(arch))
        parts = {name: unordered[name] for name in names}
        size_bytes = sum(part.size_bytes for part in parts.values())
        if tied is not None and self.choice is not ROW_MAJOR:
            size_bytes += tied.size_bytes
        qk_norms = [
            (self._head_norm(f"layers.{index}.q_norm"), self._head_norm(f"layers.{index}.k_norm"))
            for index in range(arch.num_layers)
        ]
        return CpuModel(embedding, segments, lm_head, qk_norms, parts, size_bytes, self._describe())

    def _head_norm(self, name: str) -> Norm | None:
        """Return the norm of [num_tokens, heads, head_dim], None if there is none."""
        norm = self.norms.get(name)
        if norm is None or self.arch.qk_norm == "head":
            return norm
        return lambda heads: norm(heads.flatten(1)).view(heads.shape)

    def _layer(self, prefix: str) -> DecoderLayer:
        return DecoderLayer(
            qkv=self.linears[prefix + "qkv"],
            o=self.linears[prefix + "o"],
            gate_up=self.linears[prefix + "gate_up"],
            down=self.linears[prefix + "down"],
            input_norm=self.norms.get(prefix + "input_norm"),
            attention_out_norm=self.norms.get(prefix + "attention_out_norm"),
            post_attention_norm=self.norms.get(prefix + "post_attention_norm"),
            mlp_out_norm=self.norms.get(prefix + "mlp_out_norm"),
        )

    def _complete(self, prefix: str, tensors: Mapping[str, Tensor]) -> bool:
        if "weight" not in tensors or (f"{prefix}.bias" in canonical_shapes(self.arch) and "bias" not in tensors):
            return False
        return tensors["weight"].dtype != torch.int8 or "weight_scale" in tensors

    def _pack(self, tensors: Mapping[str, Tensor]) -> CpuLinear:
        weight, bias = tensors["weight"], tensors.get("bias")
        if weight.dtype == torch.int8:
            return self._pack_int8(weight, tensors["weight_scale"], bias)
        if self.wants_int8:
            return self._pack_int8(*quantize_int8(weight), bias)
        if self.choice is None:
            self.choice = ROW_MAJOR if self.row_major else _choose_format(self.arch, weight.dtype)
        return self.choice.format.pack(weight, bias)

    def _pack_int8(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> CpuLinear:
        self.num_int8 += 1
        if self.library is None:
            return Int8Linear(weight, scale, bias)
        return NativeInt8Linear(self.library, weight, scale, bias)

    def _describe(self) -> str:
        texts = []
        if self.num_int8:
            texts.append(
                "int8 weights" if self.library is not None else "int8 weights (made float32 on each use: slow)"
            )
        if self.choice is not None:
            texts.append(f"{self.config.dtype} weights in format {self.choice}".replace("auto", "float32"))
        return ", ".join(texts)


def _choose_format(arch: ModelArch, dtype: torch.dtype) -> Choice:
    formats = dense_formats(dtype)
    if len(formats) == 1 and dtype != torch.float32:
        _logger.warning("%s weights: this processor or torch has no fast product for them, float32 is faster", dtype)
    shapes = canonical_shapes(arch)
    layer = [shapes[f"layers.0.{name}.weight"] for name in ("qkv", "o", "gate_up", "down")]
    choice = fastest_format(formats, [(rows, columns) for rows, columns in layer], dtype)
    for name, seconds in choice.seconds.items():
        listed = ", ".join(f"{value * 1e3:.2f}" for value in seconds)
        _logger.info("format %s: %s ms a layer at %s tokens", name, listed, MEASURED_TOKENS)
    return choice

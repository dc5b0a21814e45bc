"""Canonical weights to a CPU decoder, and back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from llmengine.backends.cpu.linear import (
    DEQUANTIZED,
    MEASURED_TOKENS,
    ROW_MAJOR,
    TORCH_W8A8,
    Choice,
    CpuLinear,
    DequantizedLinear,
    Layout,
    StackedLinear,
    TorchLinear,
    dense_layouts,
    fastest_layout,
)
from llmengine.backends.cpu.native import NativeLinear, looks_up
from llmengine.backends.cpu.native_library import NativeLibrary
from llmengine.backends.cpu.native_packing import packing_of
from llmengine.checkpoints.canonical_weights import COPY_ELEMENTS
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.dtypes import ModelDType, model_dtype_name, torch_dtype
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.models.decoder import ACT_AND_MUL, DecoderLayer, Norm, TorchSegments
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.int8 import Int8W8A8
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import ModelFormats, matrix_shapes
from llmengine.quantization.stacked import Stacked

_logger = logging.getLogger("llmengine.backends.cpu.backend")


NATIVE = "native"
"""Name of the layout of matrices in panels."""


class CpuNorm:
    """RMSNorm in float32, in half of `F.rms_norm`'s time on a CPU.

    It computes x * (weight * sqrt(n)) / sqrt(sum(x^2) + n * eps).
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        size = weight.shape[0]
        self._scaled_weight = weight.float() * size**0.5
        self._floor = torch.tensor([(size * eps) ** 0.5])

    def __call__(self, x: Tensor) -> Tensor:
        """The normalised [num_tokens, hidden], float32."""
        length: Tensor = torch.linalg.vector_norm(x, 2, -1, True).hypot_(self._floor)
        return torch.mul(x, self._scaled_weight).div_(length)

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        return int(self.weight.nbytes + self._scaled_weight.nbytes)


class CpuEmbedding:
    """Rows of the embedding times `scale`, as float32.

    Attributes:
        source: the embedding as it is stored, or packed for the native library.
        scale: what rows are multiplied by.
    """

    def __init__(self, source: Matrix | NativeLinear, scale: float) -> None:
        self.source = source
        self.scale = scale

    def __call__(self, token_ids: Tensor) -> Tensor:
        """A new float32 tensor [num_tokens, hidden]."""
        rows = self.source.rows(token_ids)
        return rows if self.scale == 1.0 else rows.mul_(self.scale)

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        return self.source.size_bytes

    @property
    def matrix(self) -> Matrix:
        """The embedding as it is stored; a copy where it is packed."""
        return self.source.matrix if isinstance(self.source, NativeLinear) else self.source


@dataclass(frozen=True, slots=True)
class CpuModel:
    """A decoder and its parts by canonical name less ".weight".

    Attributes:
        embed: None for a stage of a model that begins with hidden states, and does not end with logits by this matrix.
        segments: of a stage that does not end with logits, `last` gives hidden states.
        lm_head: None for such a stage.
        norms: of layers, q and k, and the last one.
        linears: those that are stored; with tied embeddings `lm_head` is not among them.
        qk_norms: each layer's norms of q and k, of [num_tokens, heads, head_dim], for its attention.
        order: names of all parts in canonical order.
    """

    embed: CpuEmbedding | None
    segments: TorchSegments
    lm_head: CpuLinear | None
    norms: Mapping[str, CpuNorm]
    linears: Mapping[str, CpuLinear]
    qk_norms: Sequence[tuple[Norm | None, Norm | None]]
    order: Sequence[str]
    size_bytes: int
    description: str

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the canonical weights. Matrices in another layout are copied back one at a time."""
        for name in self.order:
            linear = self.linears.get(name)
            if name in self.norms:
                yield f"{name}.weight", self.norms[name].weight
                continue
            matrix = linear or self.embed
            assert matrix is not None, name
            yield from matrix.matrix.named_tensors(name)
            if linear is not None and linear.bias is not None:
                yield f"{name}.bias", linear.bias


def load_cpu_model(
    config: ModelConfig, source: ModelSource, library: NativeLibrary | None, *, row_major: bool
) -> CpuModel:
    """The model of `source`, its matrices in the layouts that measure fastest; memory peaks at it and one matrix.

    With the native library, matrices that it multiplies are packed for it, and a quantized embedding too. With
    `row_major`, dense ones stay [out, in] as they came, as the native decoder takes them. Matrices stay in the format
    in which `source` has them; with tied embeddings, a copy of the embedding is rounded to that of the output matrix.
    With `dtype="auto"`, dense ones that bfloat16 holds exactly are kept in it where the library multiplies them, which
    adds the same products in half the memory.

    Those in a format without a layout of its own are dequantized part by part in every product.
    """
    dtype: ModelDType = "float32" if config.dtype == "auto" else config.dtype
    narrows = config.dtype == "auto" and library is not None and library.variant != "generic"
    linears = _LinearPacker(source.arch, dtype, source.formats, library, row_major, narrows)
    loader = _Loader(source, dtype, linears)
    for name, tensor in source.weights(torch_dtype(dtype)):
        loader.add(name, tensor)
    return loader.finish()


@dataclass(slots=True)
class _LinearPacker:
    """Makes linears of matrices; each weight format in its layout, chosen when its first matrix comes."""

    arch: ModelArch
    dtype: ModelDType
    formats: ModelFormats
    library: NativeLibrary | None
    row_major: bool
    narrows: bool
    choices: dict[tuple[WeightFormat, ModelDType], Choice] = field(default_factory=dict)

    def pack(self, name: str, matrix: Matrix, bias: Tensor | None) -> CpuLinear:
        """The linear of the matrix `name`, quantized first where its format in use is another."""
        matrix = matrix.quantized(self.formats.of(name))
        if isinstance(matrix.format, Stacked):
            parts = [self._pack(part, None) for part in matrix.format.matrices(matrix.tensors, matrix.shape)]
            return StackedLinear(matrix.format, parts, bias)
        return self._pack(matrix, bias)

    def _pack(self, matrix: Matrix, bias: Tensor | None) -> CpuLinear:
        matrix = self._narrowed(matrix)
        return self._choice(matrix).layout.pack(matrix, bias)

    def _narrowed(self, matrix: Matrix) -> Matrix:
        """A dense matrix in bfloat16 if that has the same values; else itself."""
        if not self.narrows or matrix.format != DENSE or matrix.weight.dtype != torch.float32:
            return matrix
        weight = matrix.weight.bfloat16()
        rows = max(1, COPY_ELEMENTS // weight.shape[1])
        pieces = zip(weight.split(rows), matrix.weight.split(rows), strict=True)
        return Matrix.dense(weight) if all(torch.equal(one.float(), other) for one, other in pieces) else matrix

    def _choice(self, matrix: Matrix) -> Choice:
        key = (matrix.format, model_dtype_name(matrix.weight.dtype) if matrix.format == DENSE else self.dtype)
        choice = self.choices.get(key)
        if choice is None:
            choice = self.choices[key] = self._choose(*key)
        return choice

    def pack_embedding(self, matrix: Matrix) -> Matrix | NativeLinear:
        """The embedding as its rows are looked up, which also multiplies by it where it is packed."""
        matrix = self._narrowed(matrix)
        if self.library is not None and (looks_up(matrix.format) or self._is_packed_for_output(matrix)):
            return NativeLinear(self.library, matrix, None)
        return matrix

    def _is_packed_for_output(self, embedding: Matrix) -> bool:
        """Whether a dense embedding is the output matrix as well, and packed as that."""
        arch = self.arch
        if not (arch.has_head and arch.tie_word_embeddings):
            return False
        if embedding.format != DENSE or self.formats.of("lm_head") != DENSE:
            return False
        return self._choice(embedding).layout.name == NATIVE

    def pack_tied(self, embedding: Matrix | NativeLinear) -> CpuLinear:
        """The output matrix that is the embedding; with its tensors where they need no other layout."""
        if isinstance(embedding, NativeLinear):
            assert self.formats.of("lm_head") == embedding.format, embedding.format
            return embedding
        return self.pack("lm_head", embedding, None)

    def _choose(self, weight_format: WeightFormat, dtype_name: ModelDType) -> Choice:
        dtype = torch_dtype(dtype_name)
        layouts, shapes = self._layouts(weight_format, dtype), matrix_shapes(self.arch)
        layer = [shapes[f"layers.0.{name}"] for name in ("qkv", "o", "gate_up", "down")]
        choice = fastest_layout(layouts, weight_format, layer, dtype)
        for name, seconds in choice.seconds.items():
            listed = ", ".join(f"{value * 1e3:.2f}" for value in seconds)
            _logger.info("layout %s: %s ms a layer at %s tokens", name, listed, MEASURED_TOKENS)
        return choice

    def _layouts(self, weight_format: WeightFormat, dtype: torch.dtype) -> list[Layout]:
        """The layouts that this processor and installation have for a format, the plain one first.

        Args:
            dtype: of dense weights.
        """
        native: list[Layout] = []
        if self.library is not None and packing_of(weight_format, dtype) is not None:
            native = [Layout(NATIVE, partial(NativeLinear, self.library))]
        if weight_format == DENSE and not (native and self.narrows):
            if self.row_major:
                return [ROW_MAJOR] if not native or torch.cpu._is_amx_tile_supported() else native
            layouts = dense_layouts(dtype) + native
            if len(layouts) == 1 and dtype != torch.float32:
                _logger.warning(
                    "%s weights: this processor or torch has no fast product for them, float32 is faster", self.dtype
                )
            return layouts
        if native:
            return native
        return [TORCH_W8A8 if isinstance(weight_format, Int8W8A8) else DEQUANTIZED]

    @property
    def description(self) -> str:
        """The weights and their layouts, for people; quantized ones first."""
        texts = []
        for (weight_format, dtype), choice in sorted(self.choices.items(), key=lambda item: item[0][0] == DENSE):
            if weight_format == DENSE:
                texts.append(f"{dtype} weights in layout {choice}")
            else:
                slow = " (made float32 on each use: slow)" if choice.layout is DEQUANTIZED else ""
                texts.append(f"{weight_format} weights{slow}")
        return ", ".join(texts)


class _Loader:
    """Takes canonical tensors as they come and binds them into a decoder."""

    def __init__(self, source: ModelSource, dtype: ModelDType, packer: _LinearPacker) -> None:
        self._arch = source.arch
        self._stored = source.formats
        self._packer = packer
        self._shapes = matrix_shapes(source.arch)
        layout = source.formats.layout(source.arch, dtype)
        self._num_tensors = Counter(name.rpartition(".")[0] for name in layout)
        self._norms: dict[str, CpuNorm] = {}
        self._linears: dict[str, CpuLinear] = {}
        self._embeddings: dict[str, CpuEmbedding] = {}
        self._arrived: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take over one canonical tensor; a matrix is packed as soon as all its tensors and its bias are there."""
        prefix, _, suffix = name.rpartition(".")
        if prefix.endswith("norm"):
            self._norms[prefix] = CpuNorm(tensor, self._arch.rms_norm_eps)
        else:
            tensors = self._arrived.setdefault(prefix, {})
            tensors[suffix] = tensor
            if len(tensors) == self._num_tensors[prefix]:
                del self._arrived[prefix]
                bias = tensors.pop("bias", None)
                matrix = Matrix(self._stored.of(prefix), self._shapes[prefix], tensors)
                if prefix == "embed_tokens":
                    source = self._packer.pack_embedding(matrix)
                    self._embeddings[prefix] = CpuEmbedding(source, self._arch.embedding_scale)
                else:
                    self._linears[prefix] = self._packer.pack(prefix, matrix, bias)

    def finish(self) -> CpuModel:
        """Bind everything into a decoder."""
        assert not self._arrived, f"incomplete: {sorted(self._arrived)}"
        arch, embedding = self._arch, self._embeddings.get("embed_tokens")
        size_bytes = sum(part.size_bytes for part in self._embeddings.values())
        size_bytes += sum(norm.size_bytes for norm in self._norms.values())
        size_bytes += sum(linear.size_bytes for linear in self._linears.values())
        lm_head, copied_bytes = self._head(embedding) if arch.has_head else (None, 0)
        segments = TorchSegments(
            layers=[self._layer(f"layers.{index}.") for index in range(arch.num_layers)],
            final_norm=_unchanged if lm_head is None else self._norms["final_norm"],
            lm_head=_unchanged if lm_head is None else lm_head,
            act_and_mul=ACT_AND_MUL[arch.hidden_act],
            logit_scale=1.0 if lm_head is None else arch.logit_scale,
            logit_soft_cap=None if lm_head is None else arch.logit_soft_cap,
        )
        qk_norms = [
            (self._head_norm(f"layers.{index}.q_norm"), self._head_norm(f"layers.{index}.k_norm"))
            for index in range(arch.num_layers)
        ]
        order = list(dict.fromkeys(name.rpartition(".")[0] for name in canonical_shapes(arch)))
        return CpuModel(
            embed=embedding,
            segments=segments,
            lm_head=lm_head,
            norms=self._norms,
            linears=self._linears,
            qk_norms=qk_norms,
            order=order,
            size_bytes=size_bytes + copied_bytes,
            description=self._packer.description,
        )

    def _head(self, embedding: CpuEmbedding | None) -> tuple[CpuLinear, int]:
        """The output matrix, and its bytes if it is a copy of the embedding."""
        if not self._arch.tie_word_embeddings:
            return self._linears["lm_head"], 0
        assert embedding is not None
        lm_head = self._packer.pack_tied(embedding.source)
        shares_embedding = lm_head is embedding.source or (
            isinstance(lm_head, TorchLinear | DequantizedLinear) and lm_head.matrix is embedding.source
        )
        return lm_head, 0 if shares_embedding else lm_head.size_bytes

    def _head_norm(self, name: str) -> Norm | None:
        """The norm of [num_tokens, heads, head_dim], None if there is none."""
        norm = self._norms.get(name)
        if norm is None or self._arch.qk_norm == "head":
            return norm
        return lambda heads: norm(heads.flatten(1)).view(heads.shape)

    def _layer(self, prefix: str) -> DecoderLayer:
        return DecoderLayer(
            qkv=self._linears[prefix + "qkv"],
            o=self._linears[prefix + "o"],
            gate_up=self._linears[prefix + "gate_up"],
            down=self._linears[prefix + "down"],
            input_norm=self._norms.get(prefix + "input_norm"),
            attention_out_norm=self._norms.get(prefix + "attention_out_norm"),
            post_attention_norm=self._norms.get(prefix + "post_attention_norm"),
            mlp_out_norm=self._norms.get(prefix + "mlp_out_norm"),
        )


def _unchanged(x: Tensor, residual: Tensor | None = None) -> Tensor:
    """What stands for the last norm and the output matrix where hidden states are the result."""
    assert residual is None
    return x

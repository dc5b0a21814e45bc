"""A model's weights on a CUDA device: allocated, filled from a checkpoint, and handed out as matrices and vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from llmengine.backends.cuda.memory_errors import memory_error_context
from llmengine.backends.cuda.upload import Uploads
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.dtypes import torch_dtype
from llmengine.errors import ConfigError, UnsupportedModelError
from llmengine.kernels.linear_ops import DeviceMatrix
from llmengine.kernels.norm import MAX_HIDDEN
from llmengine.kernels.packed_weights import PackedLayout, PackedMatrix
from llmengine.kernels.sampling import MAX_VOCAB
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.quantization.formats import DENSE
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import matrix_shapes

_UPLOAD_WEIGHTS = 1 << 24
"""Weights that are packed at a time, which bounds the scratch memory on the device."""


@dataclass(frozen=True, slots=True)
class CudaWeights:
    """All weights of a model on the device, in their places but perhaps not filled yet.

    Attributes:
        arch: of the model.
        by_name: norms, biases and dense matrices, as `ModelFormats.layout` names them.
        matrices: by canonical name less ".weight"; quantized ones are packed. "lm_head" is among them also where it is
            the embedding, or a quantized copy of it.
    """

    arch: ModelArch
    by_name: Mapping[str, Tensor]
    matrices: Mapping[str, DeviceMatrix]

    @classmethod
    def of(
        cls, arch: ModelArch, by_name: Mapping[str, Tensor], packed: Mapping[str, PackedMatrix] | None = None
    ) -> Self:
        """The weights of a model whose tensors are `by_name`, but for the matrices that are `packed`."""
        matrices: dict[str, DeviceMatrix] = dict(packed or {})
        for name in matrix_shapes(arch):
            if name not in matrices:
                matrices[name] = Matrix.dense(by_name[f"{name}.weight"])
        if arch.tie_word_embeddings:
            matrices.setdefault("lm_head", matrices["embed_tokens"])
        return cls(arch, by_name, matrices)

    @property
    def embedding(self) -> Tensor:
        """[vocab, hidden], in the dtype of the activations."""
        return self.by_name["embed_tokens.weight"]

    def norm(self, name: str) -> Tensor | None:
        """The weight [size] of a norm by canonical name less ".weight", None if the model does not have it."""
        return self.by_name.get(f"{name}.weight")

    def bias(self, name: str) -> Tensor | None:
        """The bias [out_features] of a matrix, None if it has none."""
        return self.by_name.get(f"{name}.bias")

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        packed = sum(matrix.size_bytes for matrix in self.packed.values())
        return packed + sum(tensor.nbytes for tensor in self.by_name.values())

    @property
    def packed(self) -> dict[str, PackedMatrix]:
        """The matrices that are packed."""
        return {name: matrix for name, matrix in self.matrices.items() if isinstance(matrix, PackedMatrix)}

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the canonical weights as they are stored, one copy in host memory at a time."""
        for name in canonical_shapes(self.arch):
            matrix = self.matrices.get(name.removesuffix(".weight"))
            if name.endswith(".weight") and isinstance(matrix, PackedMatrix):
                for stored_name, tensor in matrix.stored().named_tensors(name.removesuffix(".weight")):
                    yield stored_name, tensor.cpu()
            else:
                yield name, self.by_name[name].cpu()


def allocate_weights(config: ModelConfig, source: ModelSource, device: torch.device) -> CudaWeights:
    """Allocate all weights of `source` on the device, without filling them.

    Raises `ConfigError` for formats that have no product here, `UnsupportedModelError` for a model that is too large
    for the kernels, and `OutOfMemoryError` if the weights do not fit.
    """
    _check_sizes(source.arch)
    dtype = source.checkpoint_dtype if config.dtype == "auto" else config.dtype
    layouts = _packed_layouts(source, torch_dtype(dtype))
    layout = source.formats.layout(source.arch, dtype)
    specs = {name: spec for name, spec in layout.items() if _is_kept(name, layouts)}
    needed = sum(spec.size_bytes for spec in specs.values())
    needed += sum(tensor.nbytes for item in layouts.values() for tensor in item.empty("meta").values())
    with memory_error_context(
        f"weights: {needed / 2**20:.0f} MiB in {dtype}", device, "choose a smaller dtype or model"
    ):
        by_name = {
            name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device) for name, spec in specs.items()
        }
        packed = {name: PackedMatrix(source.formats.of(name), item, device) for name, item in layouts.items()}
    return CudaWeights.of(source.arch, by_name, packed)


def _packed_layouts(source: ModelSource, dtype: torch.dtype) -> dict[str, PackedLayout]:
    """The layouts of the quantized matrices, by canonical name less ".weight"."""
    shapes = matrix_shapes(source.arch)
    if source.arch.tie_word_embeddings and source.formats.of("lm_head") != source.formats.of("embed_tokens"):
        shapes["lm_head"] = shapes["embed_tokens"]
    layouts: dict[str, PackedLayout] = {}
    for name, shape in shapes.items():
        weight_format = source.formats.of(name)
        if weight_format == DENSE:
            continue
        layout = None if name == "embed_tokens" else PackedLayout.of(weight_format, shape, dtype)
        if layout is None:
            raise ConfigError(
                f"weights in format {str(weight_format)!r} are not available on CUDA in this version ({name}); use "
                "device='cpu', or another format"
            )
        layouts[name] = layout
    return layouts


def _is_kept(name: str, layouts: Mapping[str, PackedLayout]) -> bool:
    """Whether a stored tensor stays what it is on the device."""
    prefix, _, suffix = name.rpartition(".")
    return suffix == "bias" or prefix not in layouts


def _check_sizes(arch: ModelArch) -> None:
    sizes = {"vocab_size": (arch.vocab_size, MAX_VOCAB), "hidden_size": (arch.hidden_size, MAX_HIDDEN)}
    for name, (size, most) in sizes.items():
        if size > most:
            raise UnsupportedModelError(
                f"{name}={size} is above the {most} that the CUDA kernels take; use device='cpu'"
            )


def load_weights(weights: CudaWeights, source: ModelSource) -> None:
    """Stream the weights of `source` into their places; host memory peaks at one matrix and what `Uploads` has.

    Quantized matrices are packed on the device. The last copies may still be under way, in the current stream.
    """
    uploads = Uploads(weights.embedding.device)
    packed = weights.packed
    arrived: dict[str, Tensor] = {}
    for name, tensor in source.weights(weights.embedding.dtype):
        prefix, _, suffix = name.rpartition(".")
        if suffix == "bias" or prefix not in packed:
            uploads.copy(weights.by_name[name], tensor)
            continue
        matrix = packed[prefix]
        arrived[suffix] = tensor
        if arrived.keys() == matrix.format.tensors(matrix.shape, "float32").keys():
            _upload_packed(uploads, matrix, arrived)
            arrived = {}
    assert not arrived, sorted(arrived)
    if weights.arch.tie_word_embeddings and "lm_head" in packed:
        _quantize_packed(packed["lm_head"], weights.embedding)


def _upload_packed(uploads: Uploads, matrix: PackedMatrix, tensors: Mapping[str, Tensor]) -> None:
    for begin, end in _row_ranges(matrix):
        piece = matrix.format.cut(tensors, matrix.shape, "out", begin, end)
        on_device = {name: torch.empty_like(part, device=matrix.device) for name, part in piece.items()}
        for name, part in piece.items():
            uploads.copy(on_device[name], part)
        matrix.fill(on_device, begin)


def _quantize_packed(matrix: PackedMatrix, dense: Tensor) -> None:
    """Fill `matrix` with what `dense`, on the device, is in its format."""
    for begin, end in _row_ranges(matrix):
        matrix.fill(matrix.format.quantize(dense[begin:end]), begin)


def _row_ranges(matrix: PackedMatrix) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that begin where tiles, and blocks that share a scale, do."""
    num_rows, columns = matrix.shape
    size = max(1, _UPLOAD_WEIGHTS // (128 * columns)) * 128
    for begin in range(0, num_rows, size):
        yield begin, min(begin + size, num_rows)

"""A model's weights on a CUDA device: allocated, filled from a checkpoint, and handed out as matrices and vectors."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from llmengine.backends.cuda.memory_errors import memory_error_context
from llmengine.backends.cuda.upload import Uploads
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.dtypes import ModelDType, torch_dtype
from llmengine.errors import ConfigError, UnsupportedModelError
from llmengine.kernels.embedding import has_rows, look_up
from llmengine.kernels.linear_ops import DeviceMatrix, quantized_matrix
from llmengine.kernels.norm import MAX_HIDDEN
from llmengine.kernels.quantized_matrix import ROW_UNIT, QuantizedMatrix
from llmengine.kernels.sampling import MAX_VOCAB
from llmengine.kernels.stacked_weights import StackedMatrix
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.quantization.formats import DENSE, WeightFormat
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
        matrices: by canonical name less ".weight"; "lm_head" is among them also where it is
            the embedding, or a quantized copy of it, but not in a stage without one.
        dtype: of the activations.
    """

    arch: ModelArch
    by_name: Mapping[str, Tensor]
    matrices: Mapping[str, DeviceMatrix]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        arch: ModelArch,
        by_name: Mapping[str, Tensor],
        dtype: torch.dtype,
        quantized: Mapping[str, QuantizedMatrix] | None = None,
    ) -> Self:
        """The weights of a model whose tensors are `by_name`, but for the matrices that are `quantized`."""
        matrices: dict[str, DeviceMatrix] = dict(quantized or {})
        for name in matrix_shapes(arch):
            if name not in matrices:
                matrices[name] = Matrix.dense(by_name[f"{name}.weight"])
        if arch.tie_word_embeddings and arch.has_head:
            matrices.setdefault("lm_head", matrices["embed_tokens"])
        return cls(arch, by_name, matrices, dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.by_name.values())).device

    def norm(self, name: str) -> Tensor | None:
        """The weight [size] of a norm by canonical name less ".weight", None if the model does not have it."""
        return self.by_name.get(f"{name}.weight")

    def bias(self, name: str) -> Tensor | None:
        """The bias [out_features] of a matrix, None if it has none."""
        return self.by_name.get(f"{name}.bias")

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        quantized = sum(matrix.size_bytes for matrix in {id(item): item for item in self.quantized.values()}.values())
        return quantized + sum(tensor.nbytes for tensor in self.by_name.values())

    @property
    def quantized(self) -> dict[str, QuantizedMatrix]:
        """The matrices that are quantized."""
        return {name: matrix for name, matrix in self.matrices.items() if isinstance(matrix, QuantizedMatrix)}

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the canonical weights as they are stored, one copy in host memory at a time."""
        for name in canonical_shapes(self.arch):
            matrix = self.matrices.get(name.removesuffix(".weight"))
            if name.endswith(".weight") and isinstance(matrix, QuantizedMatrix):
                for stored_name, tensor in matrix.stored().named_tensors(name.removesuffix(".weight")):
                    yield stored_name, tensor.cpu()
            else:
                yield name, self.by_name[name].cpu()


def activation_dtype(config: ModelConfig, source: ModelSource) -> ModelDType:
    """The dtype that the activations of a model have."""
    return source.checkpoint_dtype if config.dtype == "auto" else config.dtype


def allocate_weights(config: ModelConfig, source: ModelSource, device: torch.device) -> CudaWeights:
    """Allocate all weights of `source` on the device, without filling them.

    Raises `ConfigError` for formats that have no product here, `UnsupportedModelError` for a model that is too large
    for the kernels, and `OutOfMemoryError` if the weights do not fit.
    """
    _check_sizes(source.arch)
    dtype = activation_dtype(config, source)
    matrices = partial(_quantized_matrices, source, torch_dtype(dtype))
    names = matrices("meta").keys()
    layout = source.formats.layout(source.arch, dtype)
    specs = {name: spec for name, spec in layout.items() if _is_kept(name, names)}
    needed = sum(spec.size_bytes for spec in specs.values())
    needed += sum(matrix.size_bytes for matrix in matrices("meta").values())
    with memory_error_context(
        f"weights: {needed / 2**20:.0f} MiB in {dtype}", device, "choose a smaller dtype or model"
    ):
        by_name = {
            name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device) for name, spec in specs.items()
        }
        return CudaWeights.of(source.arch, by_name, torch_dtype(dtype), matrices(device))


def _quantized_matrices(
    source: ModelSource, dtype: torch.dtype, device: torch.device | str
) -> dict[str, QuantizedMatrix]:
    """The quantized matrices, to be filled, by canonical name less ".weight"."""
    shapes = matrix_shapes(source.arch)
    tied = source.arch.tie_word_embeddings and source.arch.has_head
    if tied and source.formats.of("lm_head") != source.formats.of("embed_tokens"):
        shapes["lm_head"] = shapes["embed_tokens"]
    matrices: dict[str, QuantizedMatrix] = {}
    for name, shape in shapes.items():
        weight_format = source.formats.of(name)
        if weight_format == DENSE:
            continue
        matrix = quantized_matrix(weight_format, shape, dtype, device)
        if matrix is not None and (name != "embed_tokens" or has_rows(matrix)):
            _check_capability(weight_format, matrix, torch.device(device))
        else:
            raise ConfigError(
                f"weights in format {str(weight_format)!r} are not available on CUDA in this version ({name}); use "
                "device='cpu', or another format"
            )
        matrices[name] = matrix
    return matrices


def _check_capability(weight_format: WeightFormat, matrix: QuantizedMatrix, device: torch.device) -> None:
    """Raise `ConfigError` for a format whose numbers the device does not compute with."""
    if device.type != "cuda" or (found := torch.cuda.get_device_capability(device)) >= matrix.least_capability:
        return
    needed = ".".join(map(str, matrix.least_capability))
    raise ConfigError(
        f"weights in format {str(weight_format)!r} need compute capability {needed}; "
        f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: use device='cpu', or another format"
    )


def _is_kept(name: str, quantized: Container[str]) -> bool:
    """Whether a stored tensor stays what it is on the device."""
    prefix, _, suffix = name.rpartition(".")
    return suffix == "bias" or prefix not in quantized


def _check_sizes(arch: ModelArch) -> None:
    sizes = {"vocab_size": (arch.vocab_size, MAX_VOCAB), "hidden_size": (arch.hidden_size, MAX_HIDDEN)}
    for name, (size, most) in sizes.items():
        if size > most:
            raise UnsupportedModelError(
                f"{name}={size} is above the {most} that the CUDA kernels take; use device='cpu'"
            )


def load_weights(weights: CudaWeights, source: ModelSource) -> None:
    """Stream the weights of `source` into their places; host memory peaks at one matrix and what `Uploads` has.

    Quantized matrices are rearranged on the device, and rounded there where nothing but that is to be done. The last
    copies may still be under way, in the current stream.
    """
    uploads = Uploads(weights.device)
    quantized = weights.quantized
    arrived: dict[str, Tensor] = {}
    for name, tensor in (source.unrounded or source).weights(weights.dtype):
        prefix, _, suffix = name.rpartition(".")
        if suffix == "bias" or prefix not in quantized:
            uploads.copy(weights.by_name[name], tensor)
            continue
        matrix = quantized[prefix]
        if source.unrounded is not None:
            _fill_rounding(uploads, matrix, partial(_rows, tensor))
            continue
        arrived[suffix] = tensor
        if arrived.keys() == matrix.format.tensors(matrix.shape, "float32").keys():
            _upload_quantized(uploads, matrix, arrived)
            arrived = {}
    assert not arrived, sorted(arrived)
    tied = weights.arch.tie_word_embeddings and weights.arch.has_head
    if tied and quantized.get("lm_head") is not quantized.get("embed_tokens"):
        _fill_rounding(uploads, quantized["lm_head"], partial(_embedding_rows, weights))


def _upload_quantized(uploads: Uploads, matrix: QuantizedMatrix, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(matrix, StackedMatrix):
        for item, stored in matrix.split(tensors):
            if isinstance(item, QuantizedMatrix):
                _upload_quantized(uploads, item, stored)
            else:
                uploads.copy(item.weight, stored["weight"])
        return
    for begin, end in _row_ranges(matrix):
        piece = matrix.format.cut(tensors, matrix.shape, "out", begin, end)
        on_device = {name: torch.empty_like(part, device=matrix.device) for name, part in piece.items()}
        for name, part in piece.items():
            uploads.copy(on_device[name], part)
        matrix.fill(on_device, begin)


def _rows(dense: Tensor, begin: int, end: int) -> Tensor:
    return dense[begin:end]


def _embedding_rows(weights: CudaWeights, begin: int, end: int) -> Tensor:
    """Rows of the embedding, on the device."""
    embedding = weights.matrices["embed_tokens"]
    if isinstance(embedding, Matrix):
        return embedding.weight[begin:end]
    rows = torch.empty((end - begin, embedding.shape[1]), dtype=weights.dtype, device=weights.device)
    look_up(embedding, torch.arange(begin, end, dtype=torch.int32, device=weights.device), rows)
    return rows


def _fill_rounding(uploads: Uploads, matrix: QuantizedMatrix, rows: Callable[[int, int], Tensor]) -> None:
    """Fill `matrix` with a dense weight, rounded to nearest on the device.

    Args:
        rows: (begin, end) -> these rows of the weight, on the host or the device.
    """
    for begin, end in _row_ranges(matrix, rounding=True):
        part = rows(begin, end)
        if part.device != matrix.device:
            on_host, part = part, torch.empty_like(part, device=matrix.device)
            uploads.copy(part, on_host)
        matrix.fill(matrix.format.quantize(part), begin)


def _row_ranges(matrix: QuantizedMatrix, rounding: bool = False) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that can be filled one after the other; all rows where `rounding` finds a scale for all."""
    num_rows, columns = matrix.shape
    size = max(1, _UPLOAD_WEIGHTS // (ROW_UNIT * columns)) * ROW_UNIT
    specs = matrix.format.tensors(matrix.shape, "float32")
    scales = [specs[name] for name in ("weight_scale", "global_scale") if name in specs]
    if rounding and not all(any(along is not None and along.axis == "out" for along in spec.along) for spec in scales):
        size = num_rows
    for begin in range(0, num_rows, size):
        yield begin, min(begin + size, num_rows)

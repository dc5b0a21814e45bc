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
from llmengine.dtypes import model_dtype_name, torch_dtype
from llmengine.errors import ConfigError, UnsupportedModelError
from llmengine.kernels.norm import MAX_HIDDEN
from llmengine.kernels.sampling import MAX_VOCAB
from llmengine.models.arch import ModelArch
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats, matrix_shapes


@dataclass(frozen=True, slots=True)
class CudaWeights:
    """All weights of a model on the device, in their places but perhaps not filled yet.

    Attributes:
        by_name: the tensors, as `ModelFormats.layout` names and orders them.
        matrices: the same tensors as matrices, by canonical name less ".weight"; "lm_head" is among them also where it
            is the embedding.
    """

    by_name: Mapping[str, Tensor]
    matrices: Mapping[str, Matrix]

    @classmethod
    def of(cls, arch: ModelArch, by_name: Mapping[str, Tensor], formats: ModelFormats = DENSE_MODEL) -> Self:
        """The weights of a model whose tensors are `by_name`."""
        dtype = model_dtype_name(by_name["embed_tokens.weight"].dtype)
        matrices = {}
        for name, shape in matrix_shapes(arch).items():
            suffixes = formats.of(name).tensors(shape, dtype)
            matrices[name] = Matrix(formats.of(name), shape, {item: by_name[f"{name}.{item}"] for item in suffixes})
        if arch.tie_word_embeddings:
            matrices["lm_head"] = matrices["embed_tokens"]
        return cls(by_name, matrices)

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
        return sum(tensor.nbytes for tensor in self.by_name.values())

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the canonical weights, one copy in host memory at a time."""
        for name, tensor in self.by_name.items():
            yield name, tensor.cpu()


def allocate_weights(config: ModelConfig, source: ModelSource, device: torch.device) -> CudaWeights:
    """Allocate all weights of `source` on the device, without filling them.

    Raises `ConfigError` for quantized weights, `UnsupportedModelError` for a model that is too large for the kernels,
    and `OutOfMemoryError` if the weights do not fit.
    """
    _check_sizes(source.arch)
    formats = source.formats
    if not formats.is_dense:
        raise ConfigError(
            f"weights in format {str(formats)!r} are not available on CUDA in this version, but will be in the next; "
            "use device='cpu', or quant_config.weights='none' with a checkpoint that is not quantized"
        )
    dtype = source.checkpoint_dtype if config.dtype == "auto" else config.dtype
    layout = formats.layout(source.arch, dtype)
    needed = sum(spec.size_bytes for spec in layout.values())
    with memory_error_context(
        f"weights: {needed / 2**20:.0f} MiB in {dtype}", device, "choose a smaller dtype or model"
    ):
        by_name = {
            name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device) for name, spec in layout.items()
        }
    return CudaWeights.of(source.arch, by_name, formats)


def _check_sizes(arch: ModelArch) -> None:
    sizes = {"vocab_size": (arch.vocab_size, MAX_VOCAB), "hidden_size": (arch.hidden_size, MAX_HIDDEN)}
    for name, (size, most) in sizes.items():
        if size > most:
            raise UnsupportedModelError(
                f"{name}={size} is above the {most} that the CUDA kernels take; use device='cpu'"
            )


def load_weights(weights: CudaWeights, source: ModelSource) -> None:
    """Stream the weights of `source` into their places; host memory peaks at one fused tensor and what `Uploads` has.

    The last copies may still be under way, in the current stream.
    """
    uploads = Uploads(weights.embedding.device)
    for name, tensor in source.weights(weights.embedding.dtype):
        uploads.copy(weights.by_name[name], tensor)

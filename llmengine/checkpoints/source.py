"""`ModelSource`: a checkpoint as an architecture and a stream of canonical weights, whatever its file format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmengine.dtypes import ModelDType, model_dtype_name
from llmengine.models.arch import ModelArch
from llmengine.quantization.formats import TensorSpec
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats

if TYPE_CHECKING:
    import torch

    from llmengine.checkpoints.saved_files import SavedPlans
    from llmengine.models.sharding import Cut
    from llmengine.quantization.quality_report import QualityReport

SourceKind = Literal["huggingface", "gguf", "engine", "dummy"]
WeightStream = Iterator[tuple[str, "torch.Tensor"]]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint whose metadata is read and checked, and whose weights are not read yet.

    Attributes:
        path: the directory or file that was opened.
        checkpoint_dtype: as the files say; float16 for a quantized GGUF.
        generation_config: contents of generation_config.json, empty if there is none.
        eos_token_ids: ids that end a generation, in the order of the files; may be empty.
        bos_token_id: id that begins a text, None if the files name none.
        tokenizer_path: directory with the tokenizer's files, or the GGUF file.
        stream: makes the unchecked weight stream; use `weights`.
        stream_slices: makes a stream in which those of the dense tensors that are named come cut, as the rank that
            loads them has them, and without the tensors and matrices of which it has `NOTHING`; None where the whole
            has to be read. Like `stream` it is unchecked.
        tokenizer_metadata: what the file at `tokenizer_path` says under its own keys, where the model's file has the
            tokenizer in it (GGUF); else empty.
        formats: how the matrices of `stream` are stored.
        dequantized: for people, which of the files' formats `stream` dequantizes and why; empty if none.
        unrounded: the same checkpoint before its dense weights are rounded to nearest, where `stream` does that: a
            backend may round them itself, on its device. Else None.
        plans: what an engine directory keeps beside the weights.
        quality: how good the model was found when it was saved; None where that is not known.
    """

    kind: SourceKind
    path: Path
    arch: ModelArch
    checkpoint_dtype: ModelDType
    generation_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    tokenizer_path: Path
    stream: Callable[[torch.dtype], WeightStream]
    stream_slices: Callable[[torch.dtype, Mapping[str, Cut]], WeightStream] | None = None
    tokenizer_metadata: Mapping[str, Any] = field(default_factory=dict)
    formats: ModelFormats = DENSE_MODEL
    dequantized: str = ""
    unrounded: ModelSource | None = None
    plans: SavedPlans | None = None
    quality: QualityReport | None = None

    def weights(self, dtype: torch.dtype) -> WeightStream:
        """Yield every canonical weight once, on the CPU, in the order of `arch.canonical_shapes`.

        What is not quantized comes in `dtype`; of a quantized matrix come the tensors of its format, as
        `ModelFormats.layout` has them.
        Tensors are freshly allocated and contiguous; the caller owns them. Beyond those the caller keeps, memory
        peaks at one fused tensor plus a bounded conversion buffer (a checkpoint in .bin files is also memory-mapped);
        at two of them for the quantized matrices of a Hugging Face checkpoint.
        Raises `CorruptFileError` naming file and tensor for missing, left-over, misshapen or truncated tensors.
        """
        expected = iter(self.formats.layout(self.arch, model_dtype_name(dtype)).items())
        for name, tensor in self.stream(dtype):
            streamed, wanted = (name, TensorSpec.of(tensor)), next(expected, None)
            assert streamed == wanted, f"{streamed} streamed, expected {wanted}"
            assert tensor.is_contiguous()
            yield name, tensor
        assert next(expected, None) is None
